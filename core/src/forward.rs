//! What the upstream is told, and what a client may not tell it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cache::Verified;
use crate::decision::{Decision, Reason};
use crate::rollout::ApiVersion;

/// The header that says which version of the upstream a request is for; Envoy's routes go by it.
pub const VERSION_HEADER: &str = "x-keygate-version";

/// Whether a header is ours to set, so that one from a client is removed: `x-keygate-*` in any case,
/// also with underscores, which many upstreams take for hyphens (RFC 3875 section 4.1.18).
pub fn is_reserved(name: &[u8]) -> bool {
    const PREFIX: &[u8] = b"x-keygate-";
    name.get(..PREFIX.len()).is_some_and(|head| {
        head.iter().zip(PREFIX).all(|(byte, wanted)| {
            let byte = if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
            byte == *wanted
        })
    })
}

/// One thing that an upstream can be told of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// `x-keygate-key-id`.
    KeyId,
    /// `x-keygate-role`.
    Role,
    /// `x-keygate-scopes`.
    Scopes,
    /// `x-keygate-owner`.
    Owner,
}

impl Identity {
    const ALL: [Self; 4] = [Self::KeyId, Self::Role, Self::Scopes, Self::Owner];

    const fn header(self) -> &'static str {
        match self {
            Self::KeyId => "x-keygate-key-id",
            Self::Role => "x-keygate-role",
            Self::Scopes => "x-keygate-scopes",
            Self::Owner => "x-keygate-owner",
        }
    }

    /// What is not there, as a key's owner, is an empty header, so that an upstream can tell "none" from "not through
    /// Keygate". (From a dynamic module it is no header: Envoy does not let modules set empty ones.)
    fn of(self, key: &Verified) -> &str {
        match self {
            Self::KeyId => &key.claims.sub,
            Self::Role => &key.claims.role,
            Self::Scopes => &key.claims.scope,
            Self::Owner => key.claims.own.as_deref().unwrap_or(""),
        }
    }
}

/// What a route's upstream is told of a key: all of it, unless the policy names less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Identity>", into = "Vec<Identity>")]
pub struct Told([bool; Identity::ALL.len()]);

impl Told {
    /// Whether it is all.
    pub fn is_all(&self) -> bool {
        *self == Self::default()
    }

    fn parts(self) -> impl Iterator<Item = Identity> {
        Identity::ALL.into_iter().zip(self.0).filter_map(|(part, told)| told.then_some(part))
    }
}

impl Default for Told {
    fn default() -> Self {
        Self([true; Identity::ALL.len()])
    }
}

impl From<Vec<Identity>> for Told {
    fn from(parts: Vec<Identity>) -> Self {
        Self(Identity::ALL.map(|part| parts.contains(&part)))
    }
}

impl From<Told> for Vec<Identity> {
    fn from(told: Told) -> Self {
        told.parts().collect()
    }
}

/// What the upstream of a request that passes is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    version: ApiVersion,
    /// The key, when one was checked and counts.
    key: Option<Arc<Verified>>,
    told: Told,
}

impl Forwarded {
    /// After this decision.
    pub fn of(decision: &Decision<'_>) -> Self {
        let key = decision.key.clone().filter(|_| decision.reason == Reason::Allowed);
        let told = decision.route.map(|route| route.forward).unwrap_or_default();
        Self { version: decision.choice.version, key, told }
    }

    /// Its headers: the version always, of the identity, where there is one, what the route says.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let identity = self
            .key
            .as_deref()
            .into_iter()
            .flat_map(|key| self.told.parts().map(move |part| (part.header(), part.of(key))));
        std::iter::once((VERSION_HEADER, self.version.label())).chain(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::{Told, is_reserved};

    #[test]
    fn what_a_route_tells_is_a_list_of_names() {
        let read = |json: &str| serde_json::from_str::<Told>(json);
        assert!(read(r#"["owner", "key_id", "role", "scopes"]"#).unwrap().is_all());
        let some = read(r#"["owner", "key_id"]"#).unwrap();
        assert!(!some.is_all());
        assert_eq!(serde_json::to_string(&some).unwrap(), r#"["key_id","owner"]"#);
        assert_eq!(serde_json::to_string(&read("[]").unwrap()).unwrap(), "[]");
        assert!(read(r#"["name"]"#).unwrap_err().to_string().contains("`key_id`, `role`, `scopes`, `owner`"));
    }

    #[test]
    fn what_an_upstream_could_take_for_ours_is_reserved() {
        for name in ["x-keygate-role", "X-Keygate-Role", "x_keygate_role", "X-KEYGATE_role", "x-keygate-"] {
            assert!(is_reserved(name.as_bytes()), "{name}");
        }
        for name in ["x-keygat", "x-keygate", "keygate-role", "x-keygater", "x--keygate-role", ""] {
            assert!(!is_reserved(name.as_bytes()), "{name}");
        }
        assert!(!is_reserved(b"\xff-keygate-x"));
    }
}
