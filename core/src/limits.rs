//! How much a key may do within a time: by its role, by itself, and for a while by an emergency override. What was done
//! is counted by a [`Meter`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The most limits that are named for single keys.
pub const MAX_KEYS: usize = 1_000;
/// The longest window, in seconds: 31 days.
pub const MAX_WINDOW_S: u32 = 31 * 86_400;
/// The largest limit. What is more is no limit.
pub const MAX_UNITS: u32 = 1_000_000_000;
/// The window of an emergency override, in seconds.
pub const AN_HOUR_S: u32 = 3_600;

/// So many units within any window of that length; a request costs one unless its route says more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// How many, at most [`MAX_UNITS`].
    pub units: u32,
    /// Seconds, 1 to [`MAX_WINDOW_S`].
    pub window_s: u32,
}

impl Limit {
    fn is_valid(self) -> bool {
        self.units <= MAX_UNITS && (1..=MAX_WINDOW_S).contains(&self.window_s)
    }
}

/// Limits in place of the roles' own, for a time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// Unix seconds from which on it says nothing more.
    pub until: u64,
    /// By role, units an hour; `None`: unlimited.
    pub roles: BTreeMap<String, Option<u32>>,
}

/// Everybody's limits. A role that is not named has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// By role.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, Limit>,
    /// By the key's id, in place of its role's; `None`: unlimited.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, Option<Limit>>,
    /// Of each client's address on public routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public: Option<Limit>,
    /// The owner whose keys have none: of the tests that run all the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spares: Option<String>,
    /// In place of the roles', while it lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emergency: Option<Override>,
}

impl Limits {
    /// Whether nobody has any.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The limit of a key at `now`, Unix seconds; `None`: it has none.
    pub fn of_key(&self, key_id: &str, role: &str, owner: Option<&str>, now: u64) -> Option<Limit> {
        if owner.is_some() && owner == self.spares.as_deref() {
            return None;
        }
        if !self.keys.is_empty()
            && let Some(own) = self.keys.get(key_id)
        {
            return *own;
        }
        if let Some(emergency) = self.emergency.as_ref().filter(|emergency| now < emergency.until)
            && let Some(units) = emergency.roles.get(role)
        {
            return units.map(|units| Limit { units, window_s: AN_HOUR_S });
        }
        self.roles.get(role).copied()
    }

    /// The longest window that is in use, in seconds.
    pub fn longest_window_s(&self) -> u32 {
        let own = self.keys.values().flatten();
        let all = self.roles.values().chain(own).chain(&self.public).map(|limit| limit.window_s);
        all.chain([AN_HOUR_S]).max().unwrap_or(AN_HOUR_S)
    }

    /// Whether they can be gone by.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.keys.len() > MAX_KEYS {
            return Err("limits: at most 1000 keys have one of their own");
        }
        let own = self.keys.values().flatten();
        if !self.roles.values().chain(own).chain(&self.public).all(|limit| limit.is_valid()) {
            return Err("limits: at most 1,000,000,000 units in a window of 1 s to 31 days");
        }
        let overrides = self.emergency.iter().flat_map(|emergency| emergency.roles.values().flatten());
        if overrides.into_iter().any(|units| *units > MAX_UNITS) {
            return Err("limits: at most 1,000,000,000 units an hour");
        }
        Ok(())
    }
}

/// What is left of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// The limit.
    pub limit: Limit,
    /// Units that are left, as far as is known here.
    pub remaining: u32,
    /// Seconds until there are more, at least 1.
    pub reset_s: u64,
}

/// What a meter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metered {
    /// It is within the limit, and was counted.
    Within(Left),
    /// It is not.
    Beyond(Left),
    /// Units are left in the fleet, but not at this proxy yet: they come within a second.
    Pending(Left),
    /// It is not known: what was counted cannot be read, or this proxy has no part of the limit yet.
    Unknown,
    /// Nobody counts here.
    Not,
}

/// Counts what is done.
pub trait Meter {
    /// Counts a request that costs `cost` of `account`, if it is within the limit.
    fn spend(&mut self, account: u64, limit: Limit, cost: u32) -> Metered;
}

/// Counts nothing: where a decision is asked for and nothing is done.
impl Meter for () {
    fn spend(&mut self, _: u64, _: Limit, _: u32) -> Metered {
        Metered::Not
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        serde_json::from_str(
            r#"{"roles":{"basic":{"units":100,"window_s":3600},"fast":{"units":50,"window_s":1}},
                "keys":{"key_1":{"units":5,"window_s":60},"key_2":null},
                "emergency":{"until":1000,"roles":{"basic":1000,"fast":null}}}"#,
        )
        .unwrap()
    }

    #[test]
    fn a_keys_own_limit_counts_before_an_override_and_that_before_its_roles() {
        let limits = limits();
        let of = |key: &str, role: &str, now| {
            limits.of_key(key, role, Some("me"), now).map(|limit| (limit.units, limit.window_s))
        };
        assert_eq!(of("key_1", "basic", 0), Some((5, 60)));
        assert_eq!(of("key_2", "basic", 0), None);
        assert_eq!(of("key_3", "basic", 999), Some((1_000, 3_600)));
        assert_eq!(of("key_3", "basic", 1_000), Some((100, 3_600)), "it ends by itself");
        assert_eq!(of("key_3", "fast", 999), None);
        assert_eq!(of("key_3", "fast", 1_000), Some((50, 1)));
        assert_eq!(of("key_3", "admin", 0), None);
        assert_eq!(limits.longest_window_s(), 3_600);
        let spares = Limits { spares: Some("me".into()), ..limits };
        assert_eq!(spares.of_key("key_3", "basic", Some("me"), 0), None);
        assert!(spares.of_key("key_3", "basic", None, 0).is_some());
    }

    #[test]
    fn limits_that_cannot_be_are_refused() {
        assert_eq!(limits().check(), Ok(()));
        assert!(!limits().is_empty() && Limits::default().is_empty());
        for (units, window_s) in [(1, 0), (1, MAX_WINDOW_S + 1), (MAX_UNITS + 1, 1)] {
            let mut limits = limits();
            limits.public = Some(Limit { units, window_s });
            assert!(limits.check().is_err(), "{units} {window_s}");
        }
        let mut many = limits();
        many.keys = (0..=MAX_KEYS).map(|n| (n.to_string(), None)).collect();
        assert!(many.check().is_err());
    }
}
