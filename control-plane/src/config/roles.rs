//! The roles: the usual ones, changed member by member and added to by `[roles.NAME]` tables.

use std::collections::BTreeSet;
use std::time::Duration;

use keygate_core::token;

use super::raw::RawConfig;
use super::value::{requests_per_hour, scopes, ttl, words};
use crate::model::roles::{self, Role, Roles};

pub(super) fn read(raw: &mut RawConfig) -> Roles {
    let mut roles = roles::defaults();
    let named: BTreeSet<String> = raw
        .keys()
        .filter_map(|key| Some(key.strip_prefix("roles.")?.split_once('.')?.0.to_owned()))
        .collect();
    for name in named {
        let key = |member: &str| format!("roles.{name}.{member}");
        let ttl = raw.take(&key("ttl"), ttl);
        let limit = raw.take(&key("requests_per_hour"), requests_per_hour);
        let scopes = raw.take(&key("scopes"), scopes);
        let may_create = raw.take(&key("may_create"), words);
        if !token::is_identifier(&name) {
            raw.errors.push(format!("roles.{name}: a role's name is one word of visible ASCII"));
        }
        let known = roles.contains_key(&name);
        if !known && (ttl.is_none() || scopes.is_none()) {
            let key = format!("roles.{name}");
            if !raw.errors.iter().any(|error| error.starts_with(&key)) {
                raw.errors.push(format!("{key}: a new role needs at least 'ttl' and 'scopes'"));
            }
        }
        let role = roles.entry(name).or_insert_with(|| Role {
            ttl: Duration::ZERO,
            requests_per_hour: None,
            scopes: Vec::new(),
            may_create: Vec::new(),
        });
        role.ttl = ttl.unwrap_or(role.ttl);
        role.requests_per_hour = limit.unwrap_or(role.requests_per_hour);
        role.scopes = scopes.unwrap_or_else(|| std::mem::take(&mut role.scopes));
        role.may_create = may_create.unwrap_or_else(|| std::mem::take(&mut role.may_create));
    }
    for (name, role) in &roles {
        for other in role.may_create.iter().filter(|other| *other != roles::ALL) {
            if !roles.contains_key(other) {
                raw.errors.push(format!("roles.{name}.may_create: there is no role {other:?}"));
            }
        }
    }
    roles::expand(roles)
}
