//! What the upstream is told, and what a client may not tell it.

use std::sync::Arc;

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

/// What the upstream of a request that passes is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    version: ApiVersion,
    /// The key, when one was checked and counts.
    key: Option<Arc<Verified>>,
}

impl Forwarded {
    /// After this decision.
    pub fn of(decision: &Decision<'_>) -> Self {
        let key = decision.key.clone().filter(|_| decision.reason == Reason::Allowed);
        Self { version: decision.choice.version, key }
    }

    /// Its headers: the version always, the identity where there is one. An owner that is not there is an empty
    /// header, so that an upstream can tell "no owner" from "not through Keygate".
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let identity = self.key.as_deref().map(|key| {
            let claims = &key.claims;
            [
                ("x-keygate-key-id", claims.sub.as_str()),
                ("x-keygate-role", claims.role.as_str()),
                ("x-keygate-scopes", claims.scope.as_str()),
                ("x-keygate-owner", claims.own.as_deref().unwrap_or("")),
            ]
        });
        std::iter::once((VERSION_HEADER, self.version.label())).chain(identity.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::is_reserved;

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
