//! What the upstream is told, and what a client may not tell it.

use std::sync::Arc;

use crate::decide::cache::Verified;
use crate::decide::policy::{Identity, Told};
use crate::decide::rollout::ApiVersion;
use crate::decide::{Decision, Reason};

/// The header that says which version of the upstream a request is for; Envoy's routes go by it.
pub const VERSION_HEADER: &str = "x-keygate-version";

/// Whether a header is ours to set, so that one from a client is removed: `x-keygate-*` in any case, also with any other
/// character in place of the hyphens: many upstreams make one character of all that are no letters and digits
/// (RFC 3875, section 4.1.18).
pub fn is_reserved(name: &[u8]) -> bool {
    const PREFIX: &[u8] = b"x-keygate-";
    name.get(..PREFIX.len()).is_some_and(|head| {
        head.iter().zip(PREFIX).all(|(byte, wanted)| {
            let byte = if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'-' };
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
            .flat_map(|key| self.told.parts().map(move |part| (header(part), value(part, key))));
        std::iter::once((VERSION_HEADER, self.version.label())).chain(identity)
    }
}

/// The header of a part.
const fn header(part: Identity) -> &'static str {
    match part {
        Identity::KeyId => "x-keygate-key-id",
        Identity::Role => "x-keygate-role",
        Identity::Scopes => "x-keygate-scopes",
        Identity::Owner => "x-keygate-owner",
    }
}

/// The value of a part. A missing one, such as the owner of a key without one, is an empty header, so that an upstream
/// can tell "none" from "not through Keygate". (From a dynamic module it is no header: Envoy does not let modules set empty ones.)
fn value(part: Identity, key: &Verified) -> &str {
    match part {
        Identity::KeyId => &key.claims.sub,
        Identity::Role => &key.claims.role,
        Identity::Scopes => &key.claims.scope,
        Identity::Owner => key.claims.own.as_deref().unwrap_or(""),
    }
}

#[cfg(test)]
mod tests {
    use super::is_reserved;

    #[test]
    fn what_an_upstream_could_take_for_ours_is_reserved() {
        for name in [
            "x-keygate-role",
            "X-Keygate-Role",
            "x_keygate_role",
            "X-KEYGATE_role",
            "x-keygate-",
            "x-keygate.role",
            "x.keygate~role",
            "x!keygate-role",
        ] {
            assert!(is_reserved(name.as_bytes()), "{name}");
        }
        for name in ["x-keygat", "x-keygate", "keygate-role", "x-keygater", "x--keygate-role", ""] {
            assert!(!is_reserved(name.as_bytes()), "{name}");
        }
        assert!(!is_reserved(b"\xff-keygate-x"));
    }
}
