//! The limits of keys as they are set: what roles have by the configuration, what was put in its place, and an emergency
//! override for a time. As people write them, by HTTP and in Redis.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::time::Duration;

use keygate_core::decide::client::DEFAULT_IPV6_PREFIX;
use keygate_core::decide::limits::{
    AN_HOUR_S, ClientLimit, Limit, Limits, MAX_UNITS, MAX_WINDOW_S, Override, Share,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::model::canary;
use crate::model::key::{self, KeyRecord};
use crate::platform::clock;

/// How long an override lasts that does not say: the handbook's hour.
pub const DEFAULT_TTL: Duration = Duration::from_secs(60 * 60);
/// How long one may last.
pub const TTL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30 * 24 * 60 * 60);

/// What was put in place of the configuration's; of a role or key that is not named, nothing was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Set {
    /// By role; `None`: unlimited.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, Option<Limit>>,
    /// By the key's id; `None`: unlimited.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, Option<Limit>>,
    /// By owner, shared by its keys; `None`: unlimited.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub owners: BTreeMap<String, Option<Limit>>,
    /// Of each client's address on public routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<ClientLimit>,
}

impl Set {
    /// What proxies get. `configured` has the requests per hour of each role that has a limit.
    pub fn in_force(&self, configured: &BTreeMap<String, u32>, emergency: Option<&Override>) -> Limits {
        let mut roles: BTreeMap<String, Limit> = configured
            .iter()
            .map(|(role, units)| (role.clone(), Limit { units: *units, window_s: AN_HOUR_S }))
            .collect();
        for (role, limit) in &self.roles {
            match limit {
                Some(limit) => drop(roles.insert(role.clone(), *limit)),
                None => drop(roles.remove(role)),
            }
        }
        let limits = Limits {
            roles,
            keys: self.keys.clone(),
            owners: self.owners.clone(),
            public: self.public,
            emergency: emergency.cloned(),
            exempt_owner: None,
        };
        // Where nobody has any, nothing need be looked at.
        let exempt_owner = (!limits.is_empty()).then(|| canary::OWNER.into());
        Limits { exempt_owner, ..limits }
    }

    /// This with the members that a document names; `null` takes a limit of one's own away again.
    ///
    /// # Errors
    /// Everything that is wrong with it, each with its member and what would be right.
    pub fn edited(&self, document: &Value, is_role: impl Fn(&str) -> bool) -> Result<Self, Vec<String>> {
        let Value::Object(members) = document else {
            return Err(vec!["it is not a JSON object such as {\"roles\": {\"basic\": 100}}".into()]);
        };
        let (mut set, mut errors) = (self.clone(), Vec::new());
        for (name, value) in members {
            match name.as_str() {
                "roles" => edit(&mut set.roles, "roles", value, &mut errors, |role| {
                    if is_role(role) { Ok(()) } else { Err(format!("there is no role {role:?}")) }
                }),
                "keys" => edit(&mut set.keys, "keys", value, &mut errors, |_| Ok(())),
                "owners" => edit(&mut set.owners, "owners", value, &mut errors, |owner| {
                    if key::is_owner(owner) {
                        Ok(())
                    } else {
                        Err("an owner is visible ASCII, at most 128 bytes".into())
                    }
                }),
                "public" if value.is_null() => set.public = None,
                "public" => match client_limit(value) {
                    Ok(limit) => set.public = limit,
                    Err(problem) => errors.push(format!("public: {problem}")),
                },
                // Shown, and set by a call of its own.
                "emergency" | "version" | "durability" => {}
                other => errors
                    .push(format!("{other}: there is no such member; they are roles, keys, owners, public")),
            }
        }
        if let Err(problem) = set.in_force(&BTreeMap::new(), None).check() {
            errors.push(problem.into());
        }
        if errors.is_empty() { Ok(set) } else { Err(errors) }
    }
}

fn edit(
    limits: &mut BTreeMap<String, Option<Limit>>,
    member: &str,
    value: &Value,
    errors: &mut Vec<String>,
    check: impl Fn(&str) -> Result<(), String>,
) {
    let Value::Object(values) = value else {
        errors.push(format!("{member}: must be an object of names and limits"));
        return;
    };
    for (name, value) in values {
        let shown: String = name.chars().take(40).collect();
        if let Err(problem) = check(name) {
            errors.push(format!("{member}: {problem}"));
        } else if value.is_null() {
            limits.remove(name);
        } else {
            match limit(value) {
                Ok(limit) => drop(limits.insert(name.clone(), limit)),
                Err(problem) => errors.push(format!("{member}.{shown}: {problem}")),
            }
        }
    }
}

/// A number an hour, or an object with a window; -1 is unlimited.
fn limit(value: &Value) -> Result<Option<Limit>, String> {
    const PROBLEM: &str =
        "must be a number an hour, -1 for unlimited, or such as {\"requests\": 50, \"window\": \"1s\"}";
    match value {
        Value::Number(_) => Ok(units(value)?.map(|units| Limit { units, window_s: AN_HOUR_S })),
        Value::Object(members) => {
            if members.keys().any(|name| name != "requests" && name != "window") {
                return Err(PROBLEM.into());
            }
            let window_s = match members.get("window") {
                None => AN_HOUR_S,
                Some(window) => {
                    let window = window.as_str().and_then(|text| humantime::parse_duration(text).ok());
                    let seconds = window.filter(|window| window.subsec_nanos() == 0);
                    let seconds = seconds.and_then(|window| u32::try_from(window.as_secs()).ok());
                    seconds
                        .filter(|seconds| (1..=MAX_WINDOW_S).contains(seconds))
                        .ok_or("'window' must be whole seconds from 1s to 31d, such as \"1h\"")?
                }
            };
            let requests = members.get("requests").ok_or(PROBLEM)?;
            Ok(units(requests)?.map(|units| Limit { units, window_s }))
        }
        _ => Err(PROBLEM.into()),
    }
}

/// The limit of each client; the same, with the leading bits of an IPv6 address that make a client.
fn client_limit(value: &Value) -> Result<Option<ClientLimit>, String> {
    let mut value = value.clone();
    let prefix = value.as_object_mut().and_then(|members| members.remove("ipv6_prefix"));
    let ipv6_prefix = match prefix {
        None => DEFAULT_IPV6_PREFIX,
        Some(prefix) => prefix
            .as_u64()
            .and_then(|bits| u8::try_from(bits).ok())
            .filter(|bits| (1..=128).contains(bits))
            .ok_or("'ipv6_prefix' must be a whole number of bits from 1 to 128, such as 56")?,
    };
    Ok(limit(&value)?.map(|limit| ClientLimit { ipv6_prefix, ..limit.into() }))
}

fn units(value: &Value) -> Result<Option<u32>, String> {
    match value.as_i64() {
        Some(-1) => Ok(None),
        Some(units) if (0..=i64::from(MAX_UNITS)).contains(&units) => {
            Ok(Some(u32::try_from(units).unwrap_or(MAX_UNITS)))
        }
        _ => Err(format!("must be a whole number up to {MAX_UNITS}, or -1 for unlimited")),
    }
}

/// The roles of an override, as the API and Redis have them.
///
/// # Errors
/// What is wrong.
pub fn override_roles(
    value: &Value,
    is_role: impl Fn(&str) -> bool,
) -> Result<BTreeMap<String, Option<u32>>, String> {
    let problem =
        || "it is not a JSON object of roles and limits an hour, such as {\"basic\": 1000}".to_owned();
    let roles = value.as_object().filter(|roles| !roles.is_empty()).ok_or_else(problem)?;
    roles
        .iter()
        .map(|(role, value)| {
            if !is_role(role) {
                let role: String = role.chars().take(40).collect();
                return Err(format!("there is no role {role:?}"));
            }
            units(value).map(|units| (role.clone(), units)).map_err(|problem| format!("{role}: {problem}"))
        })
        .collect()
}

/// The roles of an override for people and Redis.
pub fn show_override_roles(roles: &BTreeMap<String, Option<u32>>) -> Value {
    let show = |(role, units): (&String, &Option<u32>)| {
        (role.clone(), units.map_or(json!(-1), |units| json!(units)))
    };
    Value::Object(roles.iter().map(show).collect())
}

/// An override that is in force, for people.
pub fn show_override(emergency: Option<&Override>, now_s: u64) -> Value {
    emergency.filter(|emergency| now_s < emergency.until).map_or(Value::Null, |emergency| {
        json!({
            "limits": show_override_roles(&emergency.roles),
            "until": clock::rfc3339(emergency.until),
            "remaining_s": emergency.until.saturating_sub(now_s),
        })
    })
}

/// The limits in force, for people; `roles` are all that there are.
pub fn show<'r>(limits: &Limits, roles: impl Iterator<Item = &'r String>, now_s: u64) -> Value {
    let show = |limit: Option<&Limit>| match limit {
        None => json!({ "requests": -1 }),
        Some(limit) => {
            let window = humantime::format_duration(Duration::from_secs(limit.window_s.into())).to_string();
            json!({ "requests": limit.units, "window": window })
        }
    };
    let roles: Map<String, Value> = roles.map(|role| (role.clone(), show(limits.roles.get(role)))).collect();
    let named = |limits: &BTreeMap<String, Option<Limit>>| -> Map<String, Value> {
        limits.iter().map(|(name, limit)| (name.clone(), show(limit.as_ref()))).collect()
    };
    let public = limits.public.map(|public| {
        let mut shown = show(Some(&public.limit()));
        shown["ipv6_prefix"] = public.ipv6_prefix.into();
        shown
    });
    json!({
        "roles": roles,
        "keys": named(&limits.keys),
        "owners": named(&limits.owners),
        "public": public,
        "emergency": show_override(limits.emergency.as_ref(), now_s),
    })
}

/// The names of accounts. Proxies know an account by a hash of its name, so each key that is known is tried; of one whose
/// keys have all left the store, and of a client's, there is no name.
#[derive(Debug)]
pub struct AccountNames(HashMap<u64, Option<Named>>);

/// The key or owner of an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The id of the key whose limit it is; `None`: it is an owner's.
    pub key_id: Option<String>,
    /// The role: the key's, or that whose limit the owner's keys share; `None`: it is the owner's own limit.
    pub role: Option<String>,
    /// The owner, if it has one.
    pub owner: Option<String>,
}

impl AccountNames {
    /// None yet, of these accounts.
    pub fn new(accounts: impl Iterator<Item = u64>) -> Self {
        Self(accounts.map(|account| (account, None)).collect())
    }

    /// Names those of a key.
    pub fn note(&mut self, key: &KeyRecord) {
        if self.0.is_empty() {
            return;
        }
        let holder = key.holder();
        let (accounts, owner) = (holder.accounts(), holder.effective_owner());
        let key_id = || Some(key.key_id.clone());
        if let Some(named) = self.0.get_mut(&accounts.of(Share::Key)) {
            *named = Some(Named { key_id: key_id(), role: Some(key.role.clone()), owner: key.owner.clone() });
        }
        if let Some(named) = self.0.get_mut(&accounts.of(Share::Owner)) {
            *named = Some(Named { key_id: None, role: None, owner: Some(owner.to_owned()) });
        }
        // Of a key without owner by that key, also where keys that it made are found before or after it.
        if let Some(named) = self.0.get_mut(&accounts.of(Share::Role))
            && (named.is_none() || key.owner.is_none())
        {
            let role = Some(holder.limit_role.to_owned());
            *named = Some(match &key.owner {
                None => Named { key_id: key_id(), role, owner: None },
                Some(owner) => Named { key_id: None, role, owner: Some(owner.clone()) },
            });
        }
    }

    /// The name of an account, if a key of it was noted.
    pub fn get(&self, account: u64) -> Option<&Named> {
        self.0.get(&account)?.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use keygate_core::decide::limits::AccountName;

    use super::*;

    fn key(id: &str, owner: Option<&str>, limit_role: Option<&str>) -> KeyRecord {
        serde_json::from_value(json!({
            "key_id": id, "jti": "j", "kid": "k", "name": "n", "role": "basic", "scopes": [], "owner": owner,
            "limit_role": limit_role, "issued_at": 1, "expires_at": 2,
        }))
        .unwrap()
    }

    #[test]
    fn accounts_are_named_by_their_keys_and_owners() {
        let role = |owner, role| AccountName::Role { owner, role }.account();
        let accounts = [
            AccountName::Key("key_1").account(),
            AccountName::Owner("acme").account(),
            role("key_1", "basic"),
            role("acme", "basic"),
            role("acme", "contributor"),
            role("key_9", "basic"),
            0,
        ];
        let keys = [
            key("key_2", Some("key_1"), None),
            key("key_1", None, None),
            key("key_3", Some("key_1"), None),
            key("key_4", Some("acme"), None),
            key("key_5", Some("acme"), Some("contributor")),
            key("key_6", Some("key_9"), None),
        ];
        let mut names = AccountNames::new(accounts.into_iter());
        keys.iter().for_each(|key| names.note(key));
        let named = accounts.map(|account| {
            let named = names.get(account)?;
            Some((named.key_id.as_deref(), named.role.as_deref(), named.owner.as_deref()))
        });
        assert_eq!(
            named,
            [
                Some((Some("key_1"), Some("basic"), None)),
                Some((None, None, Some("acme"))),
                Some((Some("key_1"), Some("basic"), None)),
                Some((None, Some("basic"), Some("acme"))),
                Some((None, Some("contributor"), Some("acme"))),
                Some((None, Some("basic"), Some("key_9"))),
                None,
            ]
        );
    }

    fn is_role(role: &str) -> bool {
        ["basic", "admin"].contains(&role)
    }

    fn of(units: u32, window_s: u32) -> Option<Limit> {
        Some(Limit { units, window_s })
    }

    #[test]
    fn members_that_are_not_named_stay_and_null_takes_away() {
        let document = json!({"roles": {"basic": {"requests": 50, "window": "1s"}}, "keys": {"key_1": -1}});
        let set = Set::default().edited(&document, is_role).unwrap();
        assert_eq!((set.roles["basic"], set.keys["key_1"]), (of(50, 1), None));
        let set = set
            .edited(&json!({"keys": {"key_2": 7}, "public": {"requests": 9, "window": "1m"}}), is_role)
            .unwrap();
        assert_eq!((set.keys["key_2"], set.public), (of(7, 3_600), of(9, 60).map(Into::into)));
        let owners = json!({"owners": {"acme": 500, "other": -1, "third": {"requests": 5, "window": "1s"}}});
        let set = set.edited(&owners, is_role).unwrap();
        let names: Vec<_> = set.owners.iter().map(|(owner, limit)| (owner.as_str(), *limit)).collect();
        assert_eq!(names, [("acme", of(500, 3_600)), ("other", None), ("third", of(5, 1))]);
        let set = set.edited(&json!({"owners": {"acme": null}}), is_role).unwrap();
        assert_eq!((set.owners.len(), set.keys.len()), (2, 2));
        assert_eq!(set.in_force(&BTreeMap::new(), None).owners, set.owners);
        let configured = BTreeMap::from([("basic".into(), 100), ("other".into(), 5)]);
        let limits = set.in_force(&configured, None);
        assert_eq!((limits.roles["basic"].units, limits.roles["other"].units), (50, 5));
        let set = set.edited(&json!({"roles": {"basic": null}, "public": null}), is_role).unwrap();
        assert_eq!(set.in_force(&configured, None).roles["basic"].units, 100);
        let set = set.edited(&json!({"roles": {"basic": -1}}), is_role).unwrap();
        assert!(!set.in_force(&configured, None).roles.contains_key("basic"));
    }

    #[test]
    fn what_is_wrong_is_all_named() {
        for (document, starts) in [
            (json!([]), vec!["it is not a JSON object"]),
            (json!({"roles": {"nobody": 1}}), vec!["roles: there is no role"]),
            (json!({"roles": {"basic": "ten"}}), vec!["roles.basic: must be a number"]),
            (json!({"roles": {"basic": -2}, "x": 1}), vec!["roles.basic: must be a whole", "x: there is no"]),
            (json!({"keys": {"k": {"requests": 1, "window": "0s"}}}), vec!["keys.k: 'window' must be"]),
            (json!({"public": {"window": "1s"}}), vec!["public: must be"]),
            (json!({"public": {"requests": 1, "ipv6_prefix": 0}}), vec!["public: 'ipv6_prefix' must be"]),
            (json!({"public": {"requests": 1, "ipv6_prefix": 129}}), vec!["public: 'ipv6_prefix' must be"]),
            (json!({"public": {"requests": 1, "ipv6_prefix": "56"}}), vec!["public: 'ipv6_prefix' must be"]),
            (json!({"keys": {"k": {"requests": 1, "ipv6_prefix": 56}}}), vec!["keys.k: must be"]),
            (json!({"owners": {"a b": 1}}), vec!["owners: an owner is"]),
            (json!({"owners": {"acme": "1"}}), vec!["owners.acme: must be"]),
            (json!({"owners": [1]}), vec!["owners: must be an object"]),
        ] {
            let errors = Set::default().edited(&document, is_role).unwrap_err();
            assert_eq!(errors.len(), starts.len(), "{document}: {errors:?}");
            for start in starts {
                assert!(errors.iter().any(|error| error.starts_with(start)), "{document}: {errors:?}");
            }
        }
    }

    #[test]
    fn an_override_is_by_role_and_hour() {
        let roles = override_roles(&json!({"basic": 1000, "admin": -1}), is_role).unwrap();
        assert_eq!(show_override_roles(&roles), json!({"admin": -1, "basic": 1000}));
        for bad in [json!({}), json!([1]), json!({"nobody": 1}), json!({"basic": "1"}), json!({"basic": 1.5})]
        {
            assert!(override_roles(&bad, is_role).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_shown_can_be_written_back() {
        let document = json!({
            "roles": {"basic": {"requests": 50, "window": "90s"}},
            "keys": {"key_1": -1},
            "owners": {"acme": 7},
            "public": {"requests": 3, "window": "1m", "ipv6_prefix": 56},
        });
        let set = Set::default().edited(&document, is_role).unwrap();
        assert_eq!(set.public, Some(ClientLimit { units: 3, window_s: 60, ipv6_prefix: 56 }));
        let names = ["basic".to_owned()];
        let shown = show(&set.in_force(&BTreeMap::new(), None), names.iter(), 0);
        assert_eq!(set.edited(&shown, is_role).unwrap(), set);
    }
}
