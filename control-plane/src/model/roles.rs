//! Roles: how long keys live, what they may, and who may create them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Stands for every role in `may_create`, and for the scopes of every role in `scopes`.
pub const ALL: &str = "*";

/// A role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Role {
    /// Longest lifetime of its keys.
    #[serde(skip)]
    pub ttl: Duration,
    /// How many requests a key of it may make in an hour; `None` is unlimited.
    pub requests_per_hour: Option<u64>,
    /// Its scopes, sorted.
    pub scopes: Vec<String>,
    /// The roles of which its keys may create others.
    pub may_create: Vec<String>,
}

/// The scope that emergency measures need.
pub const MANAGE: &str = "system:manage";

impl Role {
    /// Whether its keys may order and lift emergency measures.
    pub fn may_manage(&self) -> bool {
        self.scopes.iter().any(|scope| scope == MANAGE)
    }
}

/// The roles by name.
pub type Roles = BTreeMap<String, Role>;

/// The roles that there are unless the configuration says otherwise, as it would say them.
pub fn defaults() -> Roles {
    let role = |days: u32, requests_per_hour, scopes: &[&str], may_create: &str| Role {
        ttl: DAY * days,
        requests_per_hour,
        scopes: scopes.iter().map(|scope| (*scope).to_owned()).collect(),
        may_create: vec![may_create.to_owned()],
    };
    Roles::from([
        ("basic".into(), role(7, Some(100), &["chat:read", "chat:write"], "basic")),
        (
            "contributor".into(),
            role(
                30,
                Some(1_000),
                &["chat:read", "chat:write", "chat:history", "dataset:read", "dataset:write"],
                "basic",
            ),
        ),
        (
            "node_operator".into(),
            role(
                90,
                Some(10_000),
                &["chat:read", "chat:write", "chat:history", "node:register", "node:manage"],
                "basic",
            ),
        ),
        ("admin".into(), role(365, None, &[ALL, "admin:read", "admin:write", "system:manage"], ALL)),
    ])
}

/// Replaces [`ALL`] by what it stands for, and sorts.
pub fn expand(mut roles: Roles) -> Roles {
    let names: Vec<String> = roles.keys().cloned().collect();
    let every_scope: Vec<String> =
        roles.values().flat_map(|role| role.scopes.iter().filter(|scope| *scope != ALL).cloned()).collect();
    for role in roles.values_mut() {
        for (list, all) in [(&mut role.scopes, &every_scope), (&mut role.may_create, &names)] {
            if list.iter().any(|entry| entry == ALL) {
                list.extend(all.iter().cloned());
                list.retain(|entry| entry != ALL);
            }
            list.sort();
            list.dedup();
        }
    }
    roles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_admin_has_every_scope_and_creates_every_role() {
        let roles = expand(defaults());
        let admin = &roles["admin"];
        for role in roles.values() {
            assert!(role.scopes.iter().all(|scope| admin.scopes.contains(scope)));
        }
        assert!(admin.scopes.contains(&"system:manage".to_owned()));
        assert_eq!(admin.may_create, ["admin", "basic", "contributor", "node_operator"]);
        assert_eq!(roles["basic"].may_create, ["basic"]);
        assert_eq!(roles["basic"].scopes, ["chat:read", "chat:write"]);
    }
}
