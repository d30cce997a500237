//! The limits of keys as they are set: what roles have by the configuration, what was put in its place, and an emergency
//! override for a time. As people write them, by HTTP and in Redis.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use keygate_core::limits::{AN_HOUR_S, Limit, Limits, MAX_UNITS, MAX_WINDOW_S, Override};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{canary, clock};

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
    /// Of each client's address on public routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<Limit>,
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
            public: self.public,
            emergency: emergency.cloned(),
            spares: None,
        };
        // Where nobody has any, nothing need be looked at.
        let spares = (!limits.is_empty()).then(|| canary::OWNER.into());
        Limits { spares, ..limits }
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
                "public" if value.is_null() => set.public = None,
                "public" => match limit(value) {
                    Ok(limit) => set.public = limit,
                    Err(problem) => errors.push(format!("public: {problem}")),
                },
                // Shown, and set by a call of its own.
                "emergency" | "version" | "durability" => {}
                other => {
                    errors.push(format!("{other}: there is no such member; they are roles, keys, public"))
                }
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
    let keys: Map<String, Value> =
        limits.keys.iter().map(|(key, limit)| (key.clone(), show(limit.as_ref()))).collect();
    json!({
        "roles": roles,
        "keys": keys,
        "public": limits.public.as_ref().map(|limit| show(Some(limit))),
        "emergency": show_override(limits.emergency.as_ref(), now_s),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!((set.keys["key_2"], set.public), (of(7, 3_600), of(9, 60)));
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
        let document = json!({"roles": {"basic": {"requests": 50, "window": "90s"}}, "keys": {"key_1": -1}});
        let set = Set::default().edited(&document, is_role).unwrap();
        let names = ["basic".to_owned()];
        let shown = show(&set.in_force(&BTreeMap::new(), None), names.iter(), 0);
        assert_eq!(set.edited(&shown, is_role).unwrap(), set);
    }
}
