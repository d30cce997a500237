//! The names of the Redis keys. Operators type those of the first group; those of the second are Keygate's own.

/// A key that operators edit with redis-cli.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OperatorKey {
    /// The lockdown, JSON with a TTL.
    Lockdown,
    /// The rollout, JSON.
    Flags,
    /// The users that go to V2 before others, a set.
    CanaryUsers,
    /// Limits in place of the roles' own, JSON with a TTL.
    Limits,
}

impl OperatorKey {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lockdown, Self::Flags, Self::CanaryUsers, Self::Limits];

    /// Its name in Redis.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lockdown => LOCKDOWN,
            Self::Flags => FLAGS,
            Self::CanaryUsers => CANARY_USERS,
            Self::Limits => LIMITS,
        }
    }

    /// Whether it is a set, not a string.
    pub const fn is_set(self) -> bool {
        match self {
            Self::CanaryUsers => true,
            Self::Lockdown | Self::Flags | Self::Limits => false,
        }
    }
}

/// The rollout, JSON.
const FLAGS: &str = "feature_flags:api_key_v2";
/// The users that go to V2 before others, a set.
const CANARY_USERS: &str = "feature_flags:canary_users";
/// Limits in place of the roles' own, JSON with a TTL.
const LIMITS: &str = "rate_limits:emergency";
/// The lockdown, JSON with a TTL.
const LOCKDOWN: &str = "emergency_revocation";
/// The set of the revoked tokens' ids.
pub const REVOKED_SET: &str = "revoked_bloom";
/// What [`revoked`] begins with.
pub const REVOKED_PREFIX: &str = "revoked:";

/// An operator's order to revoke a key: the reason, as a string.
pub fn revocation_order(key_id: &str) -> String {
    format!("revoke:{key_id}")
}

/// The channel on which the id of a token that was revoked is told.
pub const KEY_REVOKED: &str = "key_revoked";
/// The channel on which the id of a new secret is told.
pub const SECRET_ROTATION: &str = "secret_rotation";
/// The channel on which a lockdown is told.
pub const EMERGENCY_REVOCATION: &str = "emergency_revocation";
/// The channel on which any other change is told.
pub const CHANGED: &str = "keygate:changed";

/// A key's record, JSON, until it expires.
pub fn key(key_id: &str) -> String {
    format!("api_key:v2:{key_id}")
}

/// The revocation of a token, JSON, until it expires.
pub fn revoked(jti: &str) -> String {
    format!("{REVOKED_PREFIX}{jti}")
}

/// A revocation as it happened at a time, Unix seconds; JSON, for 30 days.
pub fn revocation_audit(id: &str, at: u64) -> String {
    format!("revocation_audit:{id}:{at}")
}

/// A secret, sealed.
pub fn secret(kid: &str) -> String {
    format!("jwt_secret:{kid}")
}

/// The state of a secret, JSON.
pub fn secret_version(kid: &str) -> String {
    format!("jwt_version:{kid}")
}

/// The set of the sources of all control planes, in hexadecimal.
pub const SOURCES: &str = "keygate:sources";

/// What each control plane said of itself last, sealed: a hash by its source.
pub const REPORTS: &str = "keygate:reports";

/// The changes of a control plane, a stream whose ids are their numbers.
pub fn log(source: u64) -> String {
    format!("keygate:log:{source:x}")
}

/// What was written to a key last, a hash. In braces, so that both are in one slot of a cluster.
pub fn written(key: &str) -> String {
    format!("keygate:written:{{{key}}}")
}

/// The rollout's counts of each control plane, JSON: a hash by its source.
pub const ROLLOUT_COUNTS: &str = "keygate:rollout-counts";

/// Who deals with an edit of a key just now.
pub fn claim(key: &str) -> String {
    format!("keygate:edit:{{{key}}}")
}

/// Who does a scheduled work, and its fencing token.
pub fn lease(work: &str) -> [String; 2] {
    [format!("keygate:lease:{{{work}}}"), format!("keygate:lease:{{{work}}}:fence")]
}
