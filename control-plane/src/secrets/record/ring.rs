//! All secrets of a history, each at its latest stage, and which of them signs. Control planes that hear of each
//! other's changes in another order come to the same: of two records of one secret the later stage counts, of two at
//! the same stage the one with the greater [`Mark`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use keygate_core::decide::rules::VerificationKey;
use keygate_core::secret::Secret;
use keygate_core::token::crypto::Algorithm;

use super::{Opened, SecretError, SecretRecord, SecretState, Signer};
use crate::platform::hlc::Mark;
use crate::secrets::keyring::Keyring;

/// A secret as it stands.
#[derive(Debug, Clone)]
pub struct Held {
    /// Its record.
    pub record: SecretRecord,
    /// The mark of the change that made it.
    pub created: Mark,
    /// The mark of the change to its stage.
    moved: Mark,
    /// The number of the change here from which on proxies know it.
    pub seq: u64,
    /// Whether its latest record was written here.
    own: bool,
    /// What its tokens are verified with, once that is known. It is the same at every stage.
    verification: Option<Secret<Vec<u8>>>,
    /// What proxies tell its tokens' ids with.
    jti_key: Option<Secret<Vec<u8>>>,
    signer: Option<Arc<Signer>>,
    /// Whether its latest record was opened.
    is_open: bool,
}

impl Held {
    /// Whether its latest record is open here.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Whether proxies of this control plane get what verifies its keys.
    pub fn verifies(&self) -> bool {
        self.verification.is_some()
    }

    /// What signs with it, whether or not it may yet.
    pub fn signer(&self) -> Option<&Arc<Signer>> {
        self.signer.as_ref()
    }
}

/// All of them.
#[derive(Debug, Clone, Default)]
pub struct Ring {
    /// Shared with the pictures that were made of it: most changes are that a key was issued.
    by_kid: BTreeMap<String, Arc<Held>>,
    /// Those of which it was said that every live proxy knows them; maybe before they came themselves.
    announced: BTreeSet<String>,
    /// When the last key that each signed expires, Unix seconds; likewise.
    last_expiry: BTreeMap<String, u64>,
}

/// Why nothing signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoSigner {
    /// There is no active secret.
    #[error("there is no signing secret")]
    None,
    /// It is not known to every live proxy yet.
    #[error(
        "the new signing secret is not known to every proxy yet; try again in a moment, or see who is waited for: keygate secrets status"
    )]
    Unannounced,
    /// It cannot be opened here.
    #[error("the signing secret cannot be opened here; see /readyz?verbose")]
    Locked,
}

impl Ring {
    /// Takes a record, as change `seq`; whether it counts more than what was there. `own`: it was written here, so it
    /// cannot be late.
    ///
    /// # Errors
    /// When it is not as it was written, or would set the secret back.
    pub fn take(
        &mut self,
        record: &SecretRecord,
        mark: Mark,
        (seq, own): (u64, bool),
        keys: &Keyring,
    ) -> Result<bool, SecretError> {
        record.check(keys)?;
        let Some(held) = self.by_kid.get_mut(&record.kid).map(Arc::make_mut) else {
            let held = Held {
                record: record.clone(),
                created: mark,
                moved: mark,
                seq,
                own,
                verification: None,
                jti_key: record.jti_material(keys),
                signer: None,
                is_open: false,
            };
            self.by_kid.insert(record.kid.clone(), Arc::new(held));
            return Ok(true);
        };
        if own && record.state < held.record.state {
            return Err(SecretError::RolledBack {
                kid: record.kid.clone(),
                from: held.record.state.label(),
                to: record.state.label(),
            });
        }
        held.created = held.created.min(mark);
        if (record.state, mark) <= (held.record.state, held.moved) {
            return Ok(false);
        }
        (held.record, held.moved, held.own) = (record.clone(), mark, own);
        (held.signer, held.is_open) = (None, false);
        if record.state == SecretState::Expired {
            held.verification = None;
        }
        Ok(true)
    }

    /// Every live proxy knows a secret.
    pub fn announce(&mut self, kid: &str) {
        self.announced.insert(kid.to_owned());
    }

    /// A key was issued that a secret signed.
    pub fn note_key(&mut self, kid: &str, expires_at: u64) {
        match self.last_expiry.get_mut(kid) {
            Some(last) => *last = (*last).max(expires_at),
            None => drop(self.last_expiry.insert(kid.to_owned(), expires_at)),
        }
    }

    /// Opens those that are not open, as of change `seq`. What another control plane sealed may have to wait for its data
    /// key; until then its public half verifies, or what is known of it from before.
    ///
    /// # Errors
    /// When one does not open that must.
    pub fn open(&mut self, keys: &Keyring, seq: u64) -> Result<(), SecretError> {
        for held in self.by_kid.values_mut().filter(|held| !held.is_open).map(Arc::make_mut) {
            let was_known = held.verifies();
            match held.record.open(keys) {
                Ok(Opened { verification, signer }) => {
                    (held.verification, held.signer, held.is_open) = (verification, signer, true);
                }
                Err(SecretError::NoDataKey { .. }) if !held.own => {
                    held.verification = held.verification.take().or_else(|| held.record.public_material());
                }
                Err(error) => return Err(error),
            }
            if !was_known && held.verifies() {
                held.seq = held.seq.max(seq); // Proxies that have an earlier version do not know it.
            }
        }
        Ok(())
    }

    /// Whether a secret may sign: proxies know it.
    pub fn is_announced(&self, held: &Held) -> bool {
        !held.record.unannounced || self.announced.contains(&held.record.kid)
    }

    /// When the last key that a secret signed expires, as far as is known, Unix seconds; 0: none.
    pub fn last_expiry(&self, kid: &str) -> u64 {
        self.last_expiry.get(kid).copied().unwrap_or(0)
    }

    /// Whether there is an HSM, if the secret that signs is one that was made here and is kept by it.
    ///
    /// # Errors
    /// When there is none.
    pub fn check_hsm(&self, keys: &Keyring) -> Result<(), SecretError> {
        match self.active() {
            Some(held) if held.own && held.record.in_hsm && keys.hsm().is_none() => {
                Err(SecretError::NoHsm { kid: held.record.kid.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Those that wait for their data key.
    pub fn locked(&self) -> impl Iterator<Item = &SecretRecord> {
        self.by_kid.values().filter(|held| !held.is_open).map(|held| &held.record)
    }

    /// The data keys that are still needed.
    pub fn data_keys(&self) -> impl Iterator<Item = &str> {
        self.by_kid.values().filter_map(|held| held.record.data_key())
    }

    /// A secret by its id.
    pub fn get(&self, kid: &str) -> Option<&Held> {
        self.by_kid.get(kid).map(Arc::as_ref)
    }

    /// All of them, the oldest first.
    pub fn all(&self) -> Vec<&Held> {
        let mut all: Vec<&Held> = self.by_kid.values().map(Arc::as_ref).collect();
        all.sort_by(|a, b| (a.created, &a.record.kid).cmp(&(b.created, &b.record.kid)));
        all
    }

    fn at(&self, state: SecretState) -> impl Iterator<Item = &Held> {
        self.by_kid.values().map(Arc::as_ref).filter(move |held| held.record.state == state)
    }

    /// The secret that signs: of several active ones, as two control planes that could not hear each other may have
    /// made, the one that became so last.
    pub fn active(&self) -> Option<&Held> {
        self.at(SecretState::Active).max_by_key(|held| (held.moved, &held.record.kid))
    }

    /// The secret to which a rotation is under way: of several, the first.
    pub fn rotating(&self) -> Option<&Held> {
        self.at(SecretState::Rotating).min_by_key(|held| (held.created, &held.record.kid))
    }

    /// Those at a stage that only one can be at, and which are not that one.
    pub fn surplus(&self, state: SecretState) -> Vec<&Held> {
        let one = match state {
            SecretState::Active => self.active(),
            SecretState::Rotating => self.rotating(),
            SecretState::Previous | SecretState::Expired => return Vec::new(),
        };
        self.at(state).filter(|held| one.is_some_and(|one| one.record.kid != held.record.kid)).collect()
    }

    /// The stage as it counts: an active secret that another one has taken the place of is a previous one.
    pub fn state_of(&self, held: &Held) -> SecretState {
        match held.record.state {
            SecretState::Active if self.active().is_some_and(|one| one.record.kid != held.record.kid) => {
                SecretState::Previous
            }
            state => state,
        }
    }

    /// Whether keys of a secret are accepted at `now`, Unix seconds.
    pub fn accepts(&self, kid: &str, now: u64) -> bool {
        self.get(kid).is_some_and(|held| {
            held.record.state < SecretState::Expired && held.record.not_after.is_none_or(|end| now < end)
        })
    }

    /// What signs.
    ///
    /// # Errors
    /// Why nothing does.
    pub fn signer(&self) -> Result<&Arc<Signer>, NoSigner> {
        let active = self.active().ok_or(NoSigner::None)?;
        if !self.is_announced(active) {
            return Err(NoSigner::Unannounced);
        }
        active.signer().ok_or(NoSigner::Locked)
    }

    /// What tokens are verified with: every secret that has not expired.
    pub fn verification_keys(&self) -> Vec<VerificationKey> {
        let keys = self.all().into_iter().filter_map(|held| {
            let record = &held.record;
            let material = held.verification.clone()?;
            Some(VerificationKey {
                kid: record.kid.clone(),
                alg: record.alg,
                material,
                not_after: record.not_after,
                jti_key: held.jti_key.clone(),
            })
        });
        keys.collect()
    }

    /// The public keys of all that verify as JWKs (RFC 7517), the one that signs first.
    pub fn jwks(&self, now: u64) -> Vec<serde_json::Value> {
        let active = self.active().map(|held| held.record.kid.as_str());
        let mut keys = self.verification_keys();
        keys.retain(|key| key.not_after.is_none_or(|end| now < end));
        keys.sort_by_key(|key| active != Some(key.kid.as_str()));
        keys.iter().filter_map(jwk).collect()
    }
}

/// A verification key as a JWK; an HMAC secret has none.
fn jwk(key: &VerificationKey) -> Option<serde_json::Value> {
    let bytes = key.material.expose();
    let mut jwk = match key.alg {
        Algorithm::ES256 => serde_json::json!({
            "kty": "EC", "crv": "P-256",
            "x": BASE64URL.encode(bytes.get(1..33)?), "y": BASE64URL.encode(bytes.get(33..65)?),
        }),
        Algorithm::EdDSA => {
            serde_json::json!({ "kty": "OKP", "crv": "Ed25519", "x": BASE64URL.encode(bytes) })
        }
        Algorithm::HS256 => return None,
    };
    let members = jwk.as_object_mut()?;
    members.insert("kid".into(), key.kid.clone().into());
    members.insert("alg".into(), key.alg.name().into());
    members.insert("use".into(), "sig".into());
    Some(jwk)
}
