//! Keys: their records, and the rules for issuing, ending and renewing them. Pure: what is to change is
//! returned, the writer carries it out.

use std::time::Duration;

use keygate_core::decide::limits::Holder;
use keygate_core::revocation::Fingerprint;
use keygate_core::token::{Claims, is_identifier};
use serde::{Deserialize, Serialize};

use crate::model::roles::{Role, Roles};
use crate::secrets::record::Identity;

/// A key may be renewed from this long before it expires.
pub const REFRESH_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);
const MAX_NAME_CHARS: usize = 200;
const MAX_METADATA_BYTES: usize = 4_096;
/// Owners and ids travel in headers; long ones would crowd a token.
const MAX_OWNER_BYTES: usize = 128;
/// The scope of an administrator's key: it may create keys for any owner, and these do not share its limit.
const ADMIN_SCOPE: &str = "admin:write";

/// What is known of a key. The token itself is kept nowhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRecord {
    /// The key's id, the `sub` of its token.
    pub key_id: String,
    /// The token's id.
    pub jti: String,
    /// The secret that signed it.
    pub kid: String,
    /// What people call it.
    pub name: String,
    /// Its role.
    pub role: String,
    /// Its scopes.
    pub scopes: Vec<String>,
    /// Whose it is, an opaque identifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The role whose limit holds for it, where that is not its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_role: Option<String>,
    /// The key that registered it, unless that was an administrator's: such registrations are counted by owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registered_by: Option<String>,
    /// Whatever its creator wants to keep with it.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Unix seconds.
    pub issued_at: u64,
    /// Unix seconds: the first at which it is refused.
    pub expires_at: u64,
    /// The key that it renews.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renews: Option<String>,
    /// The key that renewed it last. The journal has it in that key's record alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewed_by: Option<String>,
    /// Its revocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Ended<RevocationReason>>,
    /// Its suspension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended: Option<Ended<Option<String>>>,
}

/// When, why and by whom a key was ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ended<R> {
    /// Unix seconds.
    pub at: u64,
    /// Why.
    pub reason: R,
    /// Whose key did it.
    pub by: String,
}

/// Why a key is revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevocationReason {
    /// It got into wrong hands.
    Compromised,
    /// It ended.
    Expired,
    /// Its holder asked for it.
    UserRequest,
    /// An operator decided so.
    AdminAction,
    /// It behaved oddly.
    SuspiciousActivity,
    /// Another one took its place.
    Rotation,
    /// An emergency.
    Emergency,
}

impl RevocationReason {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Compromised,
        Self::Expired,
        Self::UserRequest,
        Self::AdminAction,
        Self::SuspiciousActivity,
        Self::Rotation,
        Self::Emergency,
    ];

    /// Its name in the API and in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Compromised => "compromised",
            Self::Expired => "expired",
            Self::UserRequest => "user_request",
            Self::AdminAction => "admin_action",
            Self::SuspiciousActivity => "suspicious_activity",
            Self::Rotation => "rotation",
            Self::Emergency => "emergency",
        }
    }
}

/// Whether a key counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    /// It does.
    Active,
    /// Not until it is resumed.
    Suspended,
    /// Never again.
    Revoked,
    /// Its time is over.
    Expired,
}

impl KeyRecord {
    /// Whether it counts at `now`, Unix seconds. A revoked key is revoked also after it expired.
    pub fn state(&self, now: u64) -> KeyState {
        if self.revoked.is_some() {
            KeyState::Revoked
        } else if now >= self.expires_at {
            KeyState::Expired
        } else if self.suspended.is_some() {
            KeyState::Suspended
        } else {
            KeyState::Active
        }
    }

    /// The claims of its token.
    pub fn claims(&self, issuer: &str, audience: Option<&str>) -> Claims {
        Claims {
            iss: issuer.into(),
            sub: self.key_id.clone(),
            jti: self.jti.clone(),
            iat: self.issued_at,
            exp: self.expires_at,
            nbf: None,
            aud: audience.map(Into::into),
            role: self.role.clone(),
            scope: self.scopes.join(" "),
            own: self.owner.clone(),
            lrole: self.limit_role.clone(),
        }
    }

    /// The view of the key that limits have.
    pub fn holder(&self) -> Holder<'_> {
        Holder {
            key_id: &self.key_id,
            owner: self.owner.as_deref(),
            limit_role: self.limit_role.as_deref().unwrap_or(&self.role),
        }
    }

    /// What revocation knows it by.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.jti)
    }

    /// The first second at which it may be renewed.
    pub fn refresh_after(&self) -> u64 {
        self.expires_at.saturating_sub(REFRESH_WINDOW.as_secs()).max(self.issued_at)
    }
}

/// A request for a key, as it was typed.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRequest {
    /// What people will call it.
    #[serde(default)]
    pub name: String,
    /// Its role.
    #[serde(default)]
    pub role: String,
    /// Its scopes; all of the role's if not given.
    pub scopes: Option<Vec<String>>,
    /// Whose it is.
    pub owner: Option<String>,
    /// Whatever is to be kept with it.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// How long it lives, such as `24h`; as long as the role allows if not given.
    pub expires_in: Option<String>,
}

/// Why a key is not issued.
#[derive(Debug, thiserror::Error)]
pub enum KeyRequestError {
    /// What is wrong with the request, member by member.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
    /// The caller would give away a scope that its own key does not have.
    #[error("a key cannot give what it does not have: {}", .0.join(" "))]
    ScopeNotHeld(Vec<String>),
    /// The caller would act for another owner.
    #[error("only a key with the scope {ADMIN_SCOPE} may create keys for another owner than its own")]
    OwnerNotAllowed,
    /// The caller's role may not create keys of this one.
    #[error("keys of role '{caller}' may not create keys of role '{wanted}'")]
    RoleNotAllowed {
        /// The caller's role.
        caller: String,
        /// The role asked for.
        wanted: String,
    },
}

/// Who asks for a key.
#[derive(Debug, Clone, Copy)]
pub struct Creator<'c> {
    /// The id of its key; `None`: the control plane itself asks.
    pub key_id: Option<&'c str>,
    /// The role of its key.
    pub role: &'c str,
    /// The role whose limit holds for its key.
    pub limit_role: &'c str,
    /// The scopes of its key, which may be fewer than its role has.
    pub scopes: &'c str,
    /// Whose its key is.
    pub owner: Option<&'c str>,
}

impl<'c> Creator<'c> {
    /// The key whose limit holds for the keys that it makes, too; `None`: an administrator's, whose do not share it.
    fn shares_limit(self) -> Option<&'c str> {
        self.key_id.filter(|_| !self.scopes.split(' ').any(|scope| scope == ADMIN_SCOPE))
    }
}

impl KeyRequest {
    /// The record of the key that is to be issued.
    ///
    /// # Errors
    /// Everything that is wrong with the request, or that the caller may not.
    pub fn record(
        self,
        creator: Creator<'_>,
        roles: &Roles,
        identity: Identity,
        kid: &str,
        now: u64,
    ) -> Result<KeyRecord, KeyRequestError> {
        let mut wrong = Vec::new();
        if self.name.trim().is_empty()
            || self.name.chars().count() > MAX_NAME_CHARS
            || self.name.chars().any(char::is_control)
        {
            wrong.push(format!("'name' must be 1 to {MAX_NAME_CHARS} printable characters"));
        }
        let role = roles.get(&self.role);
        if role.is_none() {
            let known: Vec<&str> = roles.keys().map(String::as_str).collect();
            wrong.push(format!("'role' must be one of {}", known.join(", ")));
        }
        if let Some(owner) = &self.owner
            && !is_owner(owner)
        {
            wrong.push(format!(
                "'owner' must be 1 to {MAX_OWNER_BYTES} bytes of visible ASCII; an id, not a name"
            ));
        }
        if serde_json::to_vec(&self.metadata).map_or(usize::MAX, |bytes| bytes.len()) > MAX_METADATA_BYTES {
            wrong.push(format!("'metadata' must be at most {MAX_METADATA_BYTES} bytes of JSON"));
        }
        let (mut scopes, mut life) = (Vec::new(), Duration::ZERO);
        if let Some(role) = role {
            scopes = self.scopes.unwrap_or_else(|| role.scopes.clone());
            scopes.sort();
            scopes.dedup();
            if let Some(other) = scopes.iter().find(|scope| !role.scopes.contains(scope)) {
                wrong.push(format!(
                    "'scopes': role '{}' does not have {other:?}; it has {}",
                    self.role,
                    role.scopes.join(" ")
                ));
            }
            match life_of(self.expires_in.as_deref(), role) {
                Ok(wanted) => life = wanted,
                Err(problem) => wrong.push(problem),
            }
        }
        if !wrong.is_empty() {
            return Err(KeyRequestError::Invalid(wrong));
        }
        if !roles.get(creator.role).is_some_and(|role| role.may_create.contains(&self.role)) {
            return Err(KeyRequestError::RoleNotAllowed { caller: creator.role.into(), wanted: self.role });
        }
        let held: Vec<&str> = creator.scopes.split(' ').collect();
        // Upstreams take the owner for who calls, and limits are an owner's: nobody may put another one there.
        let (mut owner, mut limit_role, mut registered_by) = (self.owner, None, None);
        if let Some(maker) = creator.shares_limit() {
            let own = creator.owner.unwrap_or(maker);
            if owner.is_some_and(|owner| owner != own) {
                return Err(KeyRequestError::OwnerNotAllowed);
            }
            owner = Some(own.into());
            limit_role = Some(creator.limit_role).filter(|role| *role != self.role).map(Into::into);
            registered_by = Some(maker.into());
        }
        let beyond: Vec<String> =
            scopes.iter().filter(|scope| !held.contains(&scope.as_str())).cloned().collect();
        if !beyond.is_empty() {
            return Err(KeyRequestError::ScopeNotHeld(beyond));
        }
        Ok(KeyRecord {
            key_id: identity.key_id,
            jti: identity.jti,
            kid: kid.into(),
            name: self.name,
            role: self.role,
            scopes,
            owner,
            limit_role,
            registered_by,
            metadata: self.metadata,
            issued_at: now,
            expires_at: now.saturating_add(life.as_secs()),
            renews: None,
            renewed_by: None,
            revoked: None,
            suspended: None,
        })
    }
}

/// Whether a text can be an owner's id.
pub fn is_owner(text: &str) -> bool {
    is_identifier(text) && text.len() <= MAX_OWNER_BYTES
}

fn life_of(expires_in: Option<&str>, role: &Role) -> Result<Duration, String> {
    let Some(text) = expires_in else { return Ok(role.ttl) };
    let range = Duration::from_secs(1)..=role.ttl;
    match humantime::parse_duration(text) {
        Ok(life) if range.contains(&life) => Ok(Duration::from_secs(life.as_secs())),
        Ok(_) => Err(format!("'expires_in' must be from 1s to {}", humantime::format_duration(role.ttl))),
        Err(_) => Err(format!("'expires_in': {text:?} is not a duration such as \"24h\"")),
    }
}

/// The record of a key that renews `old`: the same in all but its ids, its secret and its time. One without owner is the
/// owner of what renews it, so that both are counted in one account.
pub fn renewal(old: &KeyRecord, role: Option<&Role>, identity: Identity, kid: &str, now: u64) -> KeyRecord {
    let life = old.expires_at.saturating_sub(old.issued_at);
    let longest = role.map_or(life, |role| role.ttl.as_secs());
    KeyRecord {
        key_id: identity.key_id,
        jti: identity.jti,
        kid: kid.into(),
        issued_at: now,
        expires_at: now.saturating_add(life.min(longest)),
        owner: Some(old.holder().effective_owner().to_owned()),
        registered_by: None,
        renews: Some(old.key_id.clone()),
        renewed_by: None,
        revoked: None,
        suspended: None,
        ..old.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::roles;

    fn identity() -> Identity {
        Identity { key_id: "key_1".into(), jti: "j1".into() }
    }

    fn request(json: &str, caller: &str) -> Result<KeyRecord, KeyRequestError> {
        let roles = roles::expand(roles::defaults());
        let scopes = roles.get(caller).map_or_else(String::new, |role| role.scopes.join(" "));
        request_of(json, creator(caller, &scopes, None))
    }

    fn creator<'c>(role: &'c str, scopes: &'c str, owner: Option<&'c str>) -> Creator<'c> {
        Creator { key_id: Some("key_0"), role, limit_role: role, scopes, owner }
    }

    fn request_of(json: &str, creator: Creator<'_>) -> Result<KeyRecord, KeyRequestError> {
        let request: KeyRequest = serde_json::from_str(json).unwrap();
        request.record(creator, &roles::expand(roles::defaults()), identity(), "k1", 1_000)
    }

    #[test]
    fn a_key_gives_no_scope_that_it_does_not_have() {
        let narrow = creator("admin", "admin:read", None);
        assert!(matches!(
            request_of(r#"{"name":"a","role":"admin"}"#, narrow),
            Err(KeyRequestError::ScopeNotHeld(_))
        ));
        assert!(request_of(r#"{"name":"a","role":"admin","scopes":["admin:read"]}"#, narrow).is_ok());
        let reader = creator("basic", "chat:read", None);
        assert!(request_of(r#"{"name":"a","role":"basic","scopes":["chat:write"]}"#, reader).is_err());
        assert!(request_of(r#"{"name":"a","role":"basic","scopes":["chat:read"]}"#, reader).is_ok());
    }

    #[test]
    fn a_key_creates_keys_for_its_own_owner_unless_it_is_an_administrators() {
        let scopes = "admin:write chat:read chat:write";
        let of = |json: &str, creator| request_of(json, creator).map(|key| key.owner);
        let own = r#"{"name":"a","role":"basic","owner":"acme"}"#;
        let none = r#"{"name":"a","role":"basic"}"#;
        let admin = creator("admin", scopes, None);
        assert_eq!(of(own, admin).unwrap().as_deref(), Some("acme"));
        assert_eq!(of(none, admin).unwrap(), None);
        let itself = Creator { key_id: None, ..creator("admin", "chat:read chat:write", None) };
        assert_eq!(of(own, itself).unwrap().as_deref(), Some("acme"), "the control plane itself");
        let acme = creator("basic", "chat:read chat:write", Some("acme"));
        assert_eq!(of(own, acme).unwrap().as_deref(), Some("acme"));
        assert_eq!(of(none, acme).unwrap().as_deref(), Some("acme"));
        for other in [Some("other"), None] {
            let creator = Creator { owner: other, ..acme };
            assert!(matches!(of(own, creator), Err(KeyRequestError::OwnerNotAllowed)));
        }
        // Without an owner its keys belong to the key itself, which may be named.
        let alone = Creator { owner: None, ..acme };
        assert_eq!(of(none, alone).unwrap().as_deref(), Some("key_0"));
        let named = r#"{"name":"a","role":"basic","owner":"key_0"}"#;
        assert_eq!(of(named, alone).unwrap().as_deref(), Some("key_0"));
    }

    #[test]
    fn a_key_shares_the_limit_of_the_key_that_made_it_unless_that_is_an_administrators() {
        let json = r#"{"name":"a","role":"basic"}"#;
        let made = |creator| {
            let key = request_of(json, creator).unwrap();
            (key.owner, key.limit_role, key.registered_by)
        };
        let some = |text: &str| Some(text.to_owned());
        let scopes = "chat:read chat:write";
        let contributor = creator("contributor", scopes, None);
        assert_eq!(made(contributor), (some("key_0"), some("contributor"), some("key_0")));
        let basic = creator("basic", scopes, Some("acme"));
        assert_eq!(made(basic), (some("acme"), None, some("key_0")));
        let child = Creator { limit_role: "contributor", ..basic };
        assert_eq!(made(child), (some("acme"), some("contributor"), some("key_0")), "and so on");
        let of_basic = Creator { limit_role: "basic", ..contributor };
        assert_eq!(made(of_basic), (some("key_0"), None, some("key_0")));
        let admin = creator("admin", "admin:write chat:read chat:write", Some("staff"));
        assert_eq!(made(admin), (None, None, None));
        let narrow = creator("admin", scopes, None);
        assert_eq!(
            made(narrow),
            (some("key_0"), some("admin"), some("key_0")),
            "the scope makes an administrator"
        );

        // The account is that of the key which made it.
        let key = request_of(json, contributor).unwrap();
        let maker = Holder { key_id: "key_0", owner: None, limit_role: "contributor" };
        let role = keygate_core::decide::limits::Share::Role;
        assert_eq!(key.holder().accounts().of(role), maker.accounts().of(role));
        assert_eq!(key.claims("keygate", None).holder(), key.holder());
    }

    #[test]
    fn a_renewal_is_counted_in_the_account_of_the_first_key() {
        let role = keygate_core::decide::limits::Share::Role;
        let mut key = request(r#"{"name":"a","role":"basic"}"#, "admin").unwrap();
        key.registered_by = Some("key_0".into());
        let account = key.holder().accounts().of(role);
        for n in 2..5 {
            let id = Identity { key_id: format!("key_{n}"), jti: format!("j{n}") };
            key = renewal(&key, None, id, "k1", 2_000);
            assert_eq!(key.holder().accounts().of(role), account, "{n}");
            assert_eq!((key.owner.as_deref(), &key.registered_by), (Some("key_1"), &None));
        }
        let mut child = request(r#"{"name":"a","role":"basic","owner":"acme"}"#, "admin").unwrap();
        child.limit_role = Some("contributor".into());
        let id = Identity { key_id: "key_9".into(), jti: "j9".into() };
        let renewed = renewal(&child, None, id, "k1", 2_000);
        assert_eq!(
            (renewed.owner.as_deref(), renewed.limit_role.as_deref()),
            (Some("acme"), Some("contributor"))
        );
    }

    #[test]
    fn a_key_has_its_roles_scopes_and_life_or_fewer() {
        let key = request(r#"{"name":"a","role":"basic"}"#, "admin").unwrap();
        assert_eq!(key.scopes, ["chat:read", "chat:write"]);
        assert_eq!(key.expires_at, 1_000 + 7 * 86_400);
        assert_eq!(key.refresh_after(), 1_000 + 6 * 86_400);
        let key = request(r#"{"name":"a","role":"basic","scopes":["chat:read"],"expires_in":"1h"}"#, "basic")
            .unwrap();
        assert_eq!(key.scopes, ["chat:read"]);
        assert_eq!((key.expires_at, key.refresh_after()), (4_600, 1_000));
    }

    #[test]
    fn what_a_role_does_not_allow_is_refused_with_every_problem() {
        let Err(KeyRequestError::Invalid(wrong)) = request(
            r#"{"name":" ","role":"basic","scopes":["admin:write"],"owner":"a b","expires_in":"8d"}"#,
            "admin",
        ) else {
            panic!("accepted")
        };
        assert_eq!(wrong.len(), 4, "{wrong:?}");
        assert!(matches!(request(r#"{"name":"a","role":"god"}"#, "admin"), Err(KeyRequestError::Invalid(_))));
        assert!(matches!(
            request(r#"{"name":"a","role":"admin"}"#, "basic"),
            Err(KeyRequestError::RoleNotAllowed { .. })
        ));
        assert!(request(r#"{"name":"a","role":"basic"}"#, "contributor").is_ok());
        assert!(request(r#"{"name":"a","role":"basic"}"#, "unknown").is_err());
        for life in ["0s", "nonsense", "-1h", "999999999999999999999d"] {
            assert!(
                request(&format!(r#"{{"name":"a","role":"basic","expires_in":"{life}"}}"#), "admin").is_err()
            );
        }
    }

    #[test]
    fn a_renewal_is_the_same_key_for_the_same_time() {
        let old = request(r#"{"name":"a","role":"basic","owner":"o","expires_in":"1h"}"#, "admin").unwrap();
        let new = renewal(&old, None, Identity { key_id: "key_2".into(), jti: "j2".into() }, "k2", 4_000);
        assert_eq!((new.issued_at, new.expires_at), (4_000, 7_600));
        assert_eq!((new.owner.as_deref(), new.renews.as_deref()), (Some("o"), Some("key_1")));
    }

    #[test]
    fn a_revoked_key_is_revoked_whatever_else_it_is() {
        let mut key = request(r#"{"name":"a","role":"basic","expires_in":"1h"}"#, "admin").unwrap();
        assert_eq!(key.state(1_000), KeyState::Active);
        assert_eq!(key.state(4_600), KeyState::Expired);
        key.suspended = Some(Ended { at: 1, reason: None, by: "x".into() });
        assert_eq!(key.state(1_000), KeyState::Suspended);
        key.revoked = Some(Ended { at: 1, reason: RevocationReason::Rotation, by: "x".into() });
        assert_eq!(key.state(1_000), KeyState::Revoked);
        assert_eq!(key.state(9_999), KeyState::Revoked);
    }
}
