//! Mass revocation: rules that end many keys at once, instead of a list of them.

use serde::{Deserialize, Serialize};

use crate::token::Claims;

/// Which keys a cut-off is about: those that match every member that is set. None set: all keys.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// Keys of this role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Keys of this owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Keys signed with this secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kid: Option<String>,
}

/// Refuse every key of a scope that was issued within `created_after ≤ iat < created_before`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cutoff {
    /// Its id, for lifting it.
    pub id: String,
    /// Whom it is about.
    pub scope: Scope,
    /// Unix seconds; a key issued in this second or later is not hit.
    pub created_before: u64,
    /// Unix seconds; a key issued before this second is not hit.
    #[serde(default)]
    pub created_after: u64,
    /// The id of a key that it does not hit: that of its author, which is needed to lift it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excluded_key: Option<String>,
}

impl Cutoff {
    /// Whether it ends a key with these claims, signed with `kid`.
    pub fn hits(&self, claims: &Claims, kid: &str) -> bool {
        let matches = |wanted: &Option<String>, have: Option<&str>| match wanted {
            None => true,
            Some(wanted) => have == Some(wanted.as_str()),
        };
        (self.created_after..self.created_before).contains(&claims.iat)
            && self.excluded_key.as_deref() != Some(&claims.sub)
            && matches(&self.scope.role, Some(&claims.role))
            && matches(&self.scope.owner, claims.own.as_deref())
            && matches(&self.scope.kid, Some(kid))
    }

    /// Whether every key that it could hit has expired by itself at `now`; `longest_life_s` is the longest
    /// that was ever issued.
    pub fn is_spent(&self, longest_life_s: u64, now: u64) -> bool {
        self.created_before.saturating_add(longest_life_s) <= now
    }
}

/// For a time, no key passes except those of exempt roles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lockdown {
    /// Its end, Unix seconds: the first second at which keys pass again.
    pub until: u64,
    /// Roles whose keys pass all the same.
    #[serde(default)]
    pub exempt_roles: Vec<String>,
}

impl Lockdown {
    /// Whether it is in force at `now`.
    pub fn is_active(&self, now: u64) -> bool {
        now < self.until
    }

    /// Whether it holds for a role at `now`.
    pub fn holds(&self, role: &str, now: u64) -> bool {
        self.is_active(now) && !self.exempt_roles.iter().any(|exempt| exempt == role)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(role: &str, own: Option<&str>, iat: u64) -> Claims {
        Claims {
            iss: "keygate".into(),
            sub: "key_1".into(),
            jti: "j".into(),
            iat,
            exp: iat + 100,
            nbf: None,
            aud: None,
            role: role.into(),
            scope: String::new(),
            own: own.map(Into::into),
            lrole: None,
        }
    }

    fn cutoff(role: Option<&str>, owner: Option<&str>, kid: Option<&str>, after: u64, before: u64) -> Cutoff {
        let scope =
            Scope { role: role.map(Into::into), owner: owner.map(Into::into), kid: kid.map(Into::into) };
        Cutoff { id: "c".into(), scope, created_before: before, created_after: after, excluded_key: None }
    }

    #[test]
    fn a_cutoff_hits_its_scope_and_its_window() {
        let key = claims("basic", Some("acme"), 100);
        for (cutoff, hits) in [
            (cutoff(None, None, None, 0, 101), true),
            (cutoff(None, None, None, 0, 100), false),
            (cutoff(None, None, None, 100, 101), true),
            (cutoff(None, None, None, 101, 200), false),
            (cutoff(None, None, None, 200, 100), false),
            (cutoff(Some("basic"), None, None, 0, 101), true),
            (cutoff(Some("admin"), None, None, 0, 101), false),
            (cutoff(None, Some("acme"), None, 0, 101), true),
            (cutoff(None, Some("other"), None, 0, 101), false),
            (cutoff(None, None, Some("k1"), 0, 101), true),
            (cutoff(None, None, Some("k2"), 0, 101), false),
            (cutoff(Some("basic"), Some("acme"), Some("k1"), 0, 101), true),
            (cutoff(Some("basic"), Some("other"), Some("k1"), 0, 101), false),
        ] {
            assert_eq!(cutoff.hits(&key, "k1"), hits, "{cutoff:?}");
        }
        let excluding =
            |id: &str| Cutoff { excluded_key: Some(id.into()), ..cutoff(None, None, None, 0, 101) };
        assert!(!excluding("key_1").hits(&key, "k1"));
        assert!(excluding("key_2").hits(&key, "k1"));
        assert!(!cutoff(None, Some("acme"), None, 0, 101).hits(&claims("basic", None, 100), "k1"));
    }

    #[test]
    fn a_lockdown_ends_by_itself() {
        let lockdown = Lockdown { until: 100, exempt_roles: vec!["admin".into()] };
        assert!(lockdown.holds("basic", 99));
        assert!(!lockdown.holds("admin", 99));
        assert!(!lockdown.holds("basic", 100));
        assert!(lockdown.is_active(99) && !lockdown.is_active(100));
    }

    #[test]
    fn a_cutoff_is_spent_when_its_last_key_has_expired() {
        let cutoff = cutoff(None, None, None, 0, 100);
        assert!(!cutoff.is_spent(50, 149));
        assert!(cutoff.is_spent(50, 150));
    }
}
