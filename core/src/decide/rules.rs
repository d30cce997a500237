//! Everything that a proxy enforces apart from the revoked keys: [`Rules`] as they travel and
//! [`Ruleset`] as they are decided with.

use std::collections::BTreeSet;
use std::fmt;

use jsonwebtoken::DecodingKey;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::decide::cutoff::{Cutoff, Lockdown};
use crate::decide::limits::Limits;
use crate::decide::policy::{Policy, PolicyError};
use crate::decide::rollout::{Plan, Rollout};
use crate::secret::Secret;
use crate::token;
use crate::token::credential::Credential;
use crate::token::crypto::Algorithm;
use crate::token::jti::JtiKey;

/// The format of [`Rules`] that this code reads.
pub const FORMAT: u32 = 1;
/// The most bytes of encoded rules: one shared-data value in Envoy.
pub const MAX_RULES_BYTES: usize = 256 * 1024;
/// The longest clock leeway, in seconds.
pub const MAX_LEEWAY_S: u64 = 60;
/// The most secrets that verify at a time: each of some 220 bytes, so that all of them leave most of
/// [`MAX_RULES_BYTES`] to the policy.
pub const MAX_KEYS: usize = 256;

/// The rules as they travel from the control plane to a proxy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rules {
    /// [`FORMAT`].
    pub format: u32,
    /// The `iss` of every key.
    pub issuer: String,
    /// The `aud` of every key, if the deployment has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// The realm of challenges.
    pub realm: String,
    /// Seconds by which clocks may differ, at most [`MAX_LEEWAY_S`].
    pub leeway_s: u64,
    /// The longest life of a key that is issued, in seconds.
    pub max_life_s: u64,
    /// Seconds without contact after which routes answer 503.
    pub hard_age_s: u64,
    /// What signatures are verified with.
    pub keys: Vec<VerificationKey>,
    /// The route policy.
    pub policy: Policy,
    /// The cut-offs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cutoffs: Vec<Cutoff>,
    /// The lockdown, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lockdown: Option<Lockdown>,
    /// How much keys may do.
    #[serde(default, skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
    /// Which requests go to which version of the upstream; when there is no migration, all to V2.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rollout: Rollout,
    /// A key whose `exp` is not later has expired, whatever any clock says: its revocation may have been
    /// forgotten. Unix seconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub expired_until: u64,
}

// Serde hands over a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_default(rollout: &Rollout) -> bool {
    *rollout == Rollout::default()
}

/// What a signature is verified with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerificationKey {
    /// The `kid` of the tokens it verifies.
    pub kid: String,
    /// The only algorithm it is for.
    pub alg: Algorithm,
    /// The raw bytes, see [`Algorithm::verification_key`].
    pub material: Secret<Vec<u8>>,
    /// Unix seconds from which on it verifies nothing more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<u64>,
    /// What its tokens' ids are told from made-up ones with, see [`crate::token::jti`]; without it, any id will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jti_key: Option<Secret<Vec<u8>>>,
}

/// What is wrong with rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    /// Not the JSON of rules, or of another format.
    #[error("rules cannot be read: {0}")]
    Unreadable(String),
    /// A member that is out of its range.
    #[error("rules: {0}")]
    Invalid(&'static str),
    /// A verification key that is none.
    #[error("rules: verification key {0:?} is not usable")]
    Key(String),
    /// The policy.
    #[error("rules: policy has {} errors, first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
    Policy(Vec<PolicyError>),
    /// The rollout.
    #[error("rules: rollout has {} errors, first: {}", .0.len(), .0.first().map(String::as_str).unwrap_or_default())]
    Rollout(Vec<String>),
}

impl Rules {
    /// Rules with these keys and as little else as there can be, for tests and benches to begin with: no audience, no
    /// leeway, lives of 1,000 s, a hard age of 300 s, and nothing of what may be absent.
    pub fn minimal(keys: Vec<VerificationKey>) -> Self {
        Self {
            format: FORMAT,
            issuer: "keygate".into(),
            audience: None,
            realm: "keygate".into(),
            leeway_s: 0,
            max_life_s: 1_000,
            hard_age_s: 300,
            keys,
            policy: Policy::default(),
            cutoffs: Vec::new(),
            lockdown: None,
            limits: Limits::default(),
            rollout: Rollout::default(),
            expired_until: 0,
        }
    }

    /// Reads rules from their bytes.
    ///
    /// # Errors
    /// When they are too long, no JSON, have unknown members, or are of another format.
    pub fn decode(bytes: &[u8]) -> Result<Self, RulesError> {
        if bytes.len() > MAX_RULES_BYTES {
            return Err(RulesError::Invalid("longer than 256 KiB"));
        }
        let rules: Self = serde_json::from_slice(bytes).map_err(|e| RulesError::Unreadable(e.to_string()))?;
        if rules.format != FORMAT {
            return Err(RulesError::Invalid("of another format than this version reads"));
        }
        Ok(rules)
    }

    /// The bytes; equal rules have equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        // Writing a struct of strings and numbers into memory cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// The members that differ between the bytes of two rules.
pub fn changed_members(old: &[u8], new: &[u8]) -> BTreeSet<String> {
    let (old, new) = (members(old), members(new));
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    names.into_iter().filter(|name| old.get(*name) != new.get(*name)).cloned().collect()
}

/// What changes rules that had other values of these members into `new`: a JSON merge patch (RFC 7396) of whole
/// members.
pub fn patch(new: &[u8], changed: &BTreeSet<String>) -> Vec<u8> {
    let new = members(new);
    let value = |name: &String| new.get(name).cloned().unwrap_or(Value::Null);
    let patch: Map<String, Value> = changed.iter().map(|name| (name.clone(), value(name))).collect();
    serde_json::to_vec(&patch).unwrap_or_default()
}

/// The bytes of the rules that `patch` makes of `old`.
///
/// # Errors
/// When either cannot be read, or the outcome are no rules.
pub fn patched(old: &[u8], patch: &[u8]) -> Result<Vec<u8>, RulesError> {
    let unreadable = |e: serde_json::Error| RulesError::Unreadable(e.to_string());
    let mut rules: Map<String, Value> = serde_json::from_slice(old).map_err(unreadable)?;
    let patch: Map<String, Value> = serde_json::from_slice(patch).map_err(unreadable)?;
    for (name, value) in patch {
        if value.is_null() {
            rules.remove(&name);
        } else {
            rules.insert(name, value);
        }
    }
    let rules: Rules = serde_json::from_value(Value::Object(rules)).map_err(unreadable)?;
    Ok(rules.encode())
}

fn members(rules: &[u8]) -> Map<String, Value> {
    serde_json::from_slice(rules).unwrap_or_default()
}

/// A verification key, ready for use.
#[derive(Clone)]
pub struct Verifier {
    /// The `kid` it is for.
    pub kid: String,
    /// The only algorithm it is for.
    pub alg: Algorithm,
    /// The key.
    pub key: DecodingKey,
    /// Unix seconds from which on it verifies nothing more.
    pub not_after: Option<u64>,
    /// What its tokens' ids are made with, if not at will.
    pub jti_key: Option<JtiKey>,
    /// Tells keys apart by their material too: a `kid` that comes to mean another key is another key.
    pub tag: u64,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("kid", &self.kid).field("alg", &self.alg).finish_non_exhaustive()
    }
}

/// Rules that were checked and are ready to decide with.
#[derive(Debug, Clone)]
pub struct Ruleset {
    /// The `iss` of every key.
    pub issuer: String,
    /// The `aud` of every key, if the deployment has one.
    pub audience: Option<String>,
    /// The realm of challenges.
    pub realm: String,
    /// Seconds by which clocks may differ.
    pub leeway_s: u64,
    /// The longest life of a key, in seconds.
    pub max_life_s: u64,
    /// Seconds without contact after which routes answer 503.
    pub hard_age_s: u64,
    /// The route policy.
    pub policy: Policy,
    /// The cut-offs.
    pub cutoffs: Vec<Cutoff>,
    /// The lockdown.
    pub lockdown: Option<Lockdown>,
    /// How much keys may do.
    pub limits: Limits,
    /// Which requests go to which version of the upstream.
    pub rollout: Plan,
    /// A key whose `exp` is not later has expired, whatever any clock says. Unix seconds.
    pub expired_until: u64,
    /// By their `kid`.
    verifiers: Vec<Verifier>,
}

impl Ruleset {
    /// Whether a decision on a request with this credential goes by the client's address, which a proxy has to ask for:
    /// for a limit of clients on public routes, or for a rollout of those who show no key.
    pub fn reads_client(&self, credential: Credential<'_>) -> bool {
        self.limits.public.is_some() || credential == Credential::None && !self.rollout.is_settled()
    }

    /// What verifies tokens of this `kid`.
    pub fn verifier(&self, kid: &str) -> Option<&Verifier> {
        let position = self.verifiers.binary_search_by(|verifier| verifier.kid.as_str().cmp(kid)).ok()?;
        self.verifiers.get(position)
    }
}

impl TryFrom<Rules> for Ruleset {
    type Error = RulesError;

    fn try_from(rules: Rules) -> Result<Self, RulesError> {
        // Named one by one: a member that is not enforced is an error of the compiler.
        let Rules {
            format: _,
            issuer,
            audience,
            realm,
            leeway_s,
            max_life_s,
            hard_age_s,
            keys,
            policy,
            cutoffs,
            lockdown,
            limits,
            rollout,
            expired_until,
        } = rules;
        let quoted =
            |text: &str| text.bytes().any(|b| !(b' '..=b'~').contains(&b) || b == b'"' || b == b'\\');
        if !token::is_identifier(&issuer) {
            return Err(RulesError::Invalid("issuer must be visible ASCII"));
        }
        if audience.as_deref().is_some_and(|audience| !token::is_identifier(audience)) {
            return Err(RulesError::Invalid("audience must be visible ASCII"));
        }
        if realm.is_empty() || quoted(&realm) {
            return Err(RulesError::Invalid("realm must be printable ASCII without quotes and backslashes"));
        }
        if leeway_s > MAX_LEEWAY_S {
            return Err(RulesError::Invalid("leeway is more than 60 s"));
        }
        if max_life_s == 0 || hard_age_s == 0 {
            return Err(RulesError::Invalid("longest life and hard age must be positive"));
        }
        if keys.len() > MAX_KEYS {
            return Err(RulesError::Invalid("more than 256 verification keys"));
        }
        policy.validate().map_err(RulesError::Policy)?;
        limits.check().map_err(RulesError::Invalid)?;
        // Whether there is a V1 was for the control plane to know.
        rollout.validate(true).map_err(RulesError::Rollout)?;
        let mut verifiers: Vec<Verifier> = Vec::with_capacity(keys.len());
        for key in keys {
            let material = key.material.expose();
            let decoding = key.alg.verification_key(material).filter(|_| token::is_identifier(&key.kid));
            let Some(decoding) = decoding else { return Err(RulesError::Key(key.kid)) };
            let jti_key = key.jti_key.as_ref().map(|material| JtiKey::new(material.expose()));
            if jti_key.as_ref().is_some_and(Option::is_none) {
                return Err(RulesError::Key(key.kid));
            }
            let tag = Sha256::new()
                .chain_update(key.alg.name())
                .chain_update([0])
                .chain_update(&key.kid)
                .chain_update([0])
                .chain_update(material)
                .finalize();
            let tag = u64::from_le_bytes(tag.first_chunk().copied().unwrap_or_default());
            verifiers.push(Verifier {
                kid: key.kid,
                alg: key.alg,
                key: decoding,
                not_after: key.not_after,
                jti_key: jti_key.flatten(),
                tag,
            });
        }
        verifiers.sort_by(|a, b| a.kid.cmp(&b.kid));
        if let Some(twice) = verifiers.windows(2).find_map(|pair| match pair {
            [a, b] if a.kid == b.kid => Some(a.kid.clone()),
            _ => None,
        }) {
            return Err(RulesError::Key(twice));
        }
        Ok(Self {
            issuer,
            audience,
            realm,
            leeway_s,
            max_life_s,
            hard_age_s,
            policy,
            cutoffs,
            lockdown,
            limits,
            rollout: Plan::new(&rollout),
            expired_until,
            verifiers,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn rules() -> Rules {
        Rules::minimal(vec![VerificationKey {
            kid: "k1".into(),
            alg: Algorithm::HS256,
            material: Secret::new(vec![7; 32]),
            not_after: None,
            jti_key: None,
        }])
    }

    #[test]
    fn golden_bytes() {
        let bytes = rules().encode();
        assert_eq!(
            String::from_utf8(bytes.clone()).unwrap(),
            r#"{"format":1,"issuer":"keygate","realm":"keygate","leeway_s":0,"max_life_s":1000,"hard_age_s":300,"keys":[{"kid":"k1","alg":"HS256","material":"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc"}],"policy":{"mode":"enforce","routes":[]}}"#
        );
        assert_eq!(Rules::decode(&bytes).unwrap(), rules());
    }

    #[test]
    fn material_is_not_printed() {
        let printed = format!("{:?} {:?}", rules(), Ruleset::try_from(rules()).unwrap());
        assert!(!printed.contains("BwcHBw") && !printed.contains("7, 7"), "{printed}");
    }

    #[test]
    fn bad_rules_are_refused_whole() {
        let bad = |change: fn(&mut Rules)| {
            let mut rules = rules();
            change(&mut rules);
            Ruleset::try_from(rules).is_err()
        };
        assert!(!bad(|_| ()));
        assert!(bad(|r| r.issuer = String::new()));
        assert!(bad(|r| r.audience = Some("a b".into())));
        assert!(bad(|r| r.realm = "a\"b".into()));
        assert!(bad(|r| r.leeway_s = 61));
        assert!(bad(|r| r.max_life_s = 0));
        assert!(bad(|r| r.keys[0].kid = String::new()));
        assert!(bad(|r| r.keys[0].material = Secret::new(vec![7; 31])));
        assert!(bad(|r| r.keys[0].alg = Algorithm::ES256));
        assert!(bad(|r| r.keys.push(r.keys[0].clone())));
        let text = String::from_utf8(rules().encode()).unwrap();
        assert!(Rules::decode(text.replace("\"format\":1", "\"format\":2").as_bytes()).is_err());
        assert!(Rules::decode(text.replace("\"realm\"", "\"relm\"").as_bytes()).is_err());
        assert!(Rules::decode(&vec![b' '; MAX_RULES_BYTES + 1]).is_err());
    }

    #[test]
    fn a_patch_makes_of_the_old_rules_the_new_ones_and_is_small() {
        let old = rules();
        let mut new = rules();
        new.lockdown = Some(Lockdown { until: 7, exempt_roles: vec!["admin".into()] });
        new.expired_until = 5;
        let (old, new) = (old.encode(), new.encode());
        for (from, to) in [(&old, &new), (&new, &old)] {
            let changed = changed_members(from, to);
            assert_eq!(changed.iter().map(String::as_str).collect::<Vec<_>>(), ["expired_until", "lockdown"]);
            let patch = patch(to, &changed);
            assert!(patch.len() < 80, "{}", String::from_utf8_lossy(&patch));
            assert_eq!(patched(from, &patch).unwrap(), *to);
        }
        assert!(changed_members(&old, &old).is_empty());
        for bad in ["", "[]", r#"{"realm":null}"#, r#"{"colour":"red"}"#, r#"{"keys":[{"kid":1}]}"#] {
            assert!(patched(&old, bad.as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Rules::decode(&bytes);
        }
    }
}
