//! The rollout: which of two versions of the upstream a request goes to.
//!
//! V1 is what was there before Keygate, and gets requests untouched; V2 is what is served with Keygate's
//! enforcement. [`Rollout`] is the document that travels in the rules, [`Plan`] the same thing ready for a
//! request. The answer depends on the plan, the subject, the endpoint and the time, and on nothing else: so
//! every proxy gives the same one.
//!
//! A subject is in one of 10,000 buckets, and goes to V2 when its bucket is below the share. So raising the
//! share moves nobody back, and another salt draws anew:
//!
//! ```text
//! hash(tag, bytes) = first 8 bytes, big-endian, of SHA-256(tag || bytes)
//!                    tag: 0 salt, 1 owner, 2 key id, 3 credential, 4 address
//! mix(z)           = finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014; the constants are
//!                    "Mix13" of Stafford, 2011)
//! bucket           = mix(hash(subject) xor hash(salt)) * 10,000 / 2^64
//! ```
//!
//! These numbers are part of the contract between versions of Keygate: another formula would move users in
//! the middle of a migration.

mod gradual;
mod plan;
mod subject;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use gradual::{Gradual, MAX_SPAN_S, MAX_STEPS, Step, WEEKLY_STEPS};
pub use plan::{Choice, Plan, Why};
pub use subject::Subject;

use crate::decide::policy;
use crate::token;

/// Everybody, in 10,000ths.
pub const FULL_SHARE: u32 = 10_000;
/// The most users of each of the two lists.
pub const MAX_USERS: usize = 10_000;
/// The most endpoints.
pub const MAX_ENDPOINTS: usize = 256;
/// The longest path of an endpoint, in bytes.
pub const MAX_ENDPOINT_BYTES: usize = 256;
/// The longest salt, in bytes.
pub const MAX_SALT_BYTES: usize = 64;
/// The most bytes of an encoded rollout: half of [`crate::decide::rules::MAX_RULES_BYTES`]. The other half is left to
/// the verification keys and the policy.
pub const MAX_BYTES: usize = 128 * 1024;

/// A version of the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApiVersion {
    /// What was there before. It enforces by itself, or not at all.
    V1,
    /// What Keygate enforces for.
    V2,
}

impl ApiVersion {
    /// Its name in headers, metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }
}

/// How subjects come to V2 of whom nothing else is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Nobody does, canary users neither, nor a credential that is no key: the way back in an incident.
    Off,
    /// Canary users do.
    Canary,
    /// Canary users do, and a fixed share of all others.
    Percentage,
    /// Canary users do, and a share of all others that grows with time.
    Gradual,
    /// Everybody does.
    #[default]
    Full,
}

impl Strategy {
    /// Its name in documents, metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Canary => "canary",
            Self::Percentage => "percentage",
            Self::Gradual => "gradual",
            Self::Full => "full",
        }
    }
}

/// The rollout document. The default is no migration: everything goes to V2.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", default, deny_unknown_fields)]
pub struct Rollout {
    /// How subjects come to V2.
    pub strategy: Strategy,
    /// The share of strategy `percentage`, in 10,000ths, at most [`FULL_SHARE`].
    #[serde(skip_serializing_if = "is_zero")]
    pub share: u32,
    /// Owners and ids of keys that go to V2 before others. They keep doing so under `percentage` and
    /// `gradual`, so that going on from `canary` moves nobody back.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub canary_users: BTreeSet<String>,
    /// Owners and ids of keys for whom the version is fixed, whatever the strategy. An id counts before an
    /// owner, since it says more.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub override_users: BTreeMap<String, ApiVersion>,
    /// The endpoints that are migrated at all; none named, all. What begins with `/` is a path and stands
    /// for itself and for whatever is below it, by whole segments; one that ends in `/` only for what is
    /// below it. Anything else is the name of a route of the policy.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub enabled_endpoints: BTreeSet<String>,
    /// Another salt draws anew who is in a share.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub salt: String,
    /// How the share of strategy `gradual` grows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gradual: Option<Gradual>,
    /// Whether a credential that is no key of Keygate is refused, rather than V1's to judge.
    pub v1_retired: bool,
}

// Serde hands over a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Serialize for Rollout {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

/// As derived, but from an object only. Serde would take a list of values too, so `[]` would be the default
/// and end a migration.
impl<'de> Deserialize<'de> for Rollout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Rollout;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a rollout as an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Rollout, A::Error> {
                Rollout::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_map(Object)
    }
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            strategy: Strategy::Full,
            share: 0,
            canary_users: BTreeSet::new(),
            override_users: BTreeMap::new(),
            enabled_endpoints: BTreeSet::new(),
            salt: String::new(),
            gradual: None,
            v1_retired: true,
        }
    }
}

impl Rollout {
    /// Whether every request goes to V2, whoever makes it and for whatever: strategy `full`, nobody fixed to
    /// V1, no `enabled_endpoints`, and `v1_retired`. Nothing else is settled, not even a share of 100 %.
    pub fn is_settled(&self) -> bool {
        self.strategy == Strategy::Full
            && self.v1_retired
            && self.enabled_endpoints.is_empty()
            && !self.override_users.values().any(|version| *version == ApiVersion::V1)
    }

    /// Everything that is wrong with it. `has_v1` says whether there is a V1 upstream; without one, a rollout
    /// must be settled, see [`Rollout::is_settled`].
    ///
    /// # Errors
    /// At least one, each with its member and what would be right.
    pub fn validate(&self, has_v1: bool) -> Result<(), Vec<String>> {
        let mut errors = Vec::new();
        if !has_v1 {
            self.check_without_v1(&mut errors);
        }
        if self.share > FULL_SHARE {
            errors.push(format!("share: {} is too much; at most {FULL_SHARE} ten-thousandths", self.share));
        }
        check_users("canary_users", self.canary_users.len(), self.canary_users.iter(), &mut errors);
        check_users("override_users", self.override_users.len(), self.override_users.keys(), &mut errors);
        self.check_endpoints(&mut errors);
        if self.salt.len() > MAX_SALT_BYTES || self.salt.chars().any(char::is_control) {
            errors.push(format!("salt: must be at most {MAX_SALT_BYTES} bytes without control characters"));
        }
        match &self.gradual {
            Some(gradual) => gradual.check(&mut errors),
            None if self.strategy == Strategy::Gradual => {
                errors.push("gradual: strategy \"gradual\" needs it, with start and ramp_s or steps".into());
            }
            None => {}
        }
        let bytes = self.encoded_bytes();
        if bytes > MAX_BYTES {
            errors.push(format!("canary_users, override_users, enabled_endpoints: the rollout is {bytes} bytes; at most {MAX_BYTES}, so name fewer"));
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn check_without_v1(&self, errors: &mut Vec<String>) {
        let mut wrong = |problem: &str| {
            errors.push(format!("{problem}, since the configuration names no V1 upstream"));
        };
        if self.strategy != Strategy::Full {
            wrong("strategy: must be \"full\"");
        }
        if self.override_users.values().any(|version| *version == ApiVersion::V1) {
            wrong("override_users: must fix nobody to \"v1\"");
        }
        if !self.enabled_endpoints.is_empty() {
            wrong("enabled_endpoints: must be empty");
        }
        if !self.v1_retired {
            wrong("v1_retired: must be true");
        }
    }

    fn check_endpoints(&self, errors: &mut Vec<String>) {
        if self.enabled_endpoints.len() > MAX_ENDPOINTS {
            let count = self.enabled_endpoints.len();
            errors.push(format!("enabled_endpoints: {count} endpoints; at most {MAX_ENDPOINTS}"));
        }
        for endpoint in self.enabled_endpoints.iter().take(MAX_ENDPOINTS) {
            let problem = if endpoint.starts_with('/') {
                check_path(endpoint)
            } else {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.';
                ((1..=64).contains(&endpoint.len()) && endpoint.bytes().all(plain))
                    .then_some(())
                    .ok_or("must be a path that begins with '/', or the name of a route of the policy")
            };
            if let Err(problem) = problem {
                errors.push(format!("enabled_endpoints: {:?} {problem}", beginning(endpoint)));
            }
        }
    }

    fn encoded_bytes(&self) -> usize {
        // Writing a struct of strings and numbers into memory cannot fail.
        serde_json::to_vec(self).map_or(usize::MAX, |bytes| bytes.len())
    }
}

fn check_users<'u>(
    member: &str,
    count: usize,
    users: impl Iterator<Item = &'u String>,
    errors: &mut Vec<String>,
) {
    if count > MAX_USERS {
        errors.push(format!("{member}: {count} users; at most {MAX_USERS}"));
    }
    // One line for all of them: there may be thousands.
    let mut bad = users.filter(|user| !token::is_identifier(user));
    if let Some(first) = bad.next() {
        let first = beginning(first);
        let who = match bad.count() {
            0 => format!("{first:?} is"),
            others => format!("{first:?} and {others} more are"),
        };
        let most = token::MAX_IDENTIFIER_BYTES;
        errors.push(format!("{member}: {who} no owner or key id; 1 to {most} bytes of visible ASCII"));
    }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.len() > MAX_ENDPOINT_BYTES {
        return Err("is longer than 256 bytes");
    }
    if path.contains('*') {
        return Err("must have no '*'; a path stands for what is below it too");
    }
    if path.bytes().any(|b| !b.is_ascii_graphic() || b == b'?' || b == b'#') {
        return Err("must be visible ASCII without query or fragment");
    }
    match policy::canonical_path(path.as_bytes()) {
        Some(canonical) if *canonical == *path.as_bytes() => Ok(()),
        _ => Err("would never match; no '.', '..' or empty segments, no encoded letters or slashes"),
    }
}

/// As much of a text as an error shows.
fn beginning(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests;
