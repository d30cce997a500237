//! The rollout as people read and write it: percentages, hours and times instead of what travels to proxies. The same
//! document by HTTP and in Redis.

use std::collections::{BTreeMap, BTreeSet};

use keygate_core::decide::policy::Policy;
use keygate_core::decide::rollout::{ApiVersion, FULL_SHARE, Gradual, Step, Strategy, WEEKLY_STEPS};
use serde_json::{Map, Value, json};

use super::Flags;
use crate::platform::clock;

const AN_HOUR_S: f64 = 3_600.0;
/// What the name of the preset of steps is.
const WEEKLY: &str = "weekly";
/// The longest cause, in characters.
const MAX_CAUSE_CHARS: usize = 500;
/// Members that are shown and cannot be set; a document that was read can be written back.
const SHOWN: [&str; 7] =
    ["metrics", "effective_percentage", "next_step", "last_change", "v1_available", "version", "durability"];

/// What is to be changed. Members that are not named stay as they are.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Edit {
    strategy: Option<Strategy>,
    share: Option<u32>,
    canary_users: Option<BTreeSet<String>>,
    override_users: Option<BTreeMap<String, ApiVersion>>,
    enabled_endpoints: Option<BTreeSet<String>>,
    start: Option<Option<u64>>,
    ramp_s: Option<Option<u64>>,
    steps: Option<Vec<Step>>,
    paused: Option<bool>,
    v1_retired: Option<bool>,
    salt: Option<String>,
    guard: Option<bool>,
    cause: Option<String>,
}

/// What stands around a rollout.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'s> {
    /// Whether there is a V1 upstream.
    pub has_v1: bool,
    /// The route policy.
    pub policy: &'s Policy,
    /// Unix seconds.
    pub now_s: u64,
}

impl Edit {
    /// Reads a document.
    ///
    /// # Errors
    /// Everything that is wrong with it, each with its member and what would be right.
    pub fn read(document: &Value) -> Result<Self, Vec<String>> {
        let Value::Object(members) = document else {
            return Err(vec!["it is not a JSON object such as {\"strategy\": \"off\"}".into()]);
        };
        let mut reader = Reader { members, errors: Vec::new() };
        let edit = Self {
            strategy: reader.take("strategy", strategy),
            share: reader.take("percentage", share),
            canary_users: reader.take("canary_users", texts),
            override_users: reader.take("override_users", overrides),
            enabled_endpoints: reader.take("enabled_endpoints", texts),
            start: reader.take("start_time", |value| or_none(value, time)),
            ramp_s: reader.take("ramp_duration_hours", |value| or_none(value, hours)),
            steps: reader.take("steps", steps),
            paused: reader.take("paused", flag),
            v1_retired: reader.take("v1_retired", flag),
            salt: reader.take("salt", |value| text(value).map(ToOwned::to_owned)),
            guard: reader.take("guard", flag),
            cause: reader.take("reason", cause),
        };
        reader.finish().map(|()| edit)
    }

    /// Only of the canary users.
    pub fn of_canary_users(users: BTreeSet<String>) -> Self {
        Self { canary_users: Some(users), ..Self::default() }
    }

    /// What is set then.
    ///
    /// # Errors
    /// Everything that is wrong with the outcome.
    pub fn apply(self, current: &Flags, around: Surroundings<'_>) -> Result<Flags, Vec<String>> {
        let mut rollout = current.rollout.clone();
        let was_settled = rollout.is_settled();
        let strategy = self.strategy.unwrap_or(rollout.strategy);
        let mut errors = Vec::new();
        rollout.gradual = match strategy {
            Strategy::Gradual => self.gradual(rollout.gradual.take(), around.now_s, &mut errors),
            _ => None, // The next one begins anew.
        };
        rollout.strategy = strategy;
        rollout.share = self.share.unwrap_or(rollout.share);
        rollout.canary_users = self.canary_users.unwrap_or(rollout.canary_users);
        rollout.override_users = self.override_users.unwrap_or(rollout.override_users);
        rollout.enabled_endpoints = self.enabled_endpoints.unwrap_or(rollout.enabled_endpoints);
        rollout.salt = self.salt.unwrap_or(rollout.salt);
        // Where a migration begins, V1's own keys are still good.
        let begins = was_settled && strategy != Strategy::Full;
        rollout.v1_retired = self.v1_retired.unwrap_or(rollout.v1_retired && !begins);
        let flags = Flags { rollout, guard: self.guard.unwrap_or(current.guard), cause: self.cause };
        let rollout = &flags.rollout;
        if around.has_v1 {
            errors.extend(flags.in_force().validate(true).err().unwrap_or_default());
        } else if !rollout.is_settled() {
            errors.push(
                "it would send traffic to V1, and no V1 upstream is configured: set rollout.v1_cluster"
                    .into(),
            );
        }
        // Of those that are set already a route may have gone since: that must not stand in the way of `off`.
        let names: BTreeSet<&str> = around.policy.routes.iter().map(|route| route.name.as_str()).collect();
        for endpoint in rollout.enabled_endpoints.difference(&current.rollout.enabled_endpoints) {
            if !endpoint.starts_with('/') && !names.contains(endpoint.as_str()) {
                errors.push(format!("enabled_endpoints: the policy has no route {endpoint:?}"));
            }
        }
        if errors.is_empty() { Ok(flags) } else { Err(errors) }
    }

    fn gradual(&self, before: Option<Gradual>, now_s: u64, errors: &mut Vec<String>) -> Option<Gradual> {
        if matches!(self.ramp_s, Some(Some(_))) && self.steps.as_ref().is_some_and(|steps| !steps.is_empty())
        {
            errors.push("steps: must not stand beside ramp_duration_hours; drop one of them".into());
        }
        let mut gradual = before.unwrap_or(Gradual {
            start: now_s,
            ramp_s: None,
            steps: WEEKLY_STEPS.to_vec(),
            paused_at: None,
        });
        if let Some(start) = self.start {
            gradual.start = start.unwrap_or(now_s);
        }
        match (self.ramp_s, &self.steps) {
            (Some(Some(ramp_s)), _) => {
                gradual.ramp_s = Some(ramp_s);
                gradual.steps.clear();
            }
            (_, Some(steps)) if !steps.is_empty() => {
                gradual.ramp_s = None;
                gradual.steps.clone_from(steps);
            }
            _ => {}
        }
        match self.paused {
            Some(true) => gradual.pause(now_s),
            Some(false) => gradual.resume(now_s),
            None => {}
        }
        Some(gradual)
    }
}

/// The document of what is set, at a time.
pub fn show(flags: &Flags, has_v1: bool, now_s: u64) -> Map<String, Value> {
    let rollout = &flags.rollout;
    let gradual = rollout.gradual.as_ref();
    let percentage = match rollout.strategy {
        Strategy::Full => FULL_SHARE,
        Strategy::Gradual => flags.share_at(now_s),
        _ => rollout.share,
    };
    let overrides: Map<String, Value> =
        rollout.override_users.iter().map(|(user, version)| (user.clone(), version.label().into())).collect();
    let steps: Vec<Value> = gradual
        .map(|gradual| gradual.steps.iter())
        .into_iter()
        .flatten()
        .map(|step| json!({ "percentage": percent(step.share), "hold_hours": to_hours(step.hold_s) }))
        .collect();
    let next = flags
        .next_step(now_s)
        .map(|(at, share)| json!({ "at": clock::rfc3339(at), "percentage": percent(share) }));
    // Where there is no V1, everything goes to V2, whatever was set when there was one.
    let effective = if has_v1 { flags.share_at(now_s) } else { FULL_SHARE };
    let document = json!({
        "strategy": rollout.strategy.label(),
        "percentage": percent(percentage),
        "effective_percentage": percent(effective),
        "canary_users": rollout.canary_users,
        "override_users": overrides,
        "enabled_endpoints": rollout.enabled_endpoints,
        "start_time": gradual.map(|gradual| clock::rfc3339(gradual.start)),
        "ramp_duration_hours": gradual.and_then(|gradual| gradual.ramp_s).map(to_hours),
        "steps": steps,
        "paused": gradual.is_some_and(|gradual| gradual.paused_at.is_some()),
        "next_step": next,
        "v1_retired": rollout.v1_retired,
        "v1_available": has_v1,
        "salt": rollout.salt,
        "guard": flags.guard,
    });
    match document {
        Value::Object(members) => members,
        _ => Map::new(),
    }
}

/// A share as a number of percent, with at most two decimals; whole ones without any.
pub fn percent(share: u32) -> Value {
    if share.is_multiple_of(100) { json!(share / 100) } else { json!(f64::from(share) / 100.0) }
}

fn to_hours(seconds: u64) -> Value {
    if seconds.is_multiple_of(3_600) {
        return json!(seconds / 3_600);
    }
    #[allow(clippy::cast_precision_loss)] // At most ten years.
    let hours = seconds as f64 / AN_HOUR_S;
    json!(hours)
}

/// Takes members one by one, and knows which were left.
struct Reader<'r> {
    members: &'r Map<String, Value>,
    errors: Vec<String>,
}

impl Reader<'_> {
    fn take<T>(&mut self, name: &str, read: impl FnOnce(&Value) -> Result<T, String>) -> Option<T> {
        match read(self.members.get(name)?) {
            Ok(value) => Some(value),
            Err(problem) => {
                self.errors.push(format!("{name}: {problem}"));
                None
            }
        }
    }

    fn finish(mut self) -> Result<(), Vec<String>> {
        const SET: [&str; 13] = [
            "strategy",
            "percentage",
            "canary_users",
            "override_users",
            "enabled_endpoints",
            "start_time",
            "ramp_duration_hours",
            "steps",
            "paused",
            "v1_retired",
            "salt",
            "guard",
            "reason",
        ];
        for name in self.members.keys() {
            if !SET.contains(&name.as_str()) && !SHOWN.contains(&name.as_str()) {
                let name: String = name.chars().take(40).collect();
                self.errors.push(format!("{name}: there is no such member; they are {}", SET.join(", ")));
            }
        }
        if self.errors.is_empty() { Ok(()) } else { Err(self.errors) }
    }
}

fn strategy(value: &Value) -> Result<Strategy, String> {
    serde_json::from_value(value.clone())
        .map_err(|_| "must be \"off\", \"canary\", \"percentage\", \"gradual\" or \"full\"".into())
}

fn share(value: &Value) -> Result<u32, String> {
    let problem =
        || "must be a number from 0 to 100 with at most two decimals, such as 25 or 0.01".to_owned();
    let percent = value.as_f64().filter(|percent| (0.0..=100.0).contains(percent)).ok_or_else(problem)?;
    let share = (percent * 100.0).round();
    if (percent * 100.0 - share).abs() > 1e-6 {
        return Err(problem());
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // From 0 to 10,000.
    Ok(share as u32)
}

fn hours(value: &Value) -> Result<u64, String> {
    let hours = value.as_f64().filter(|hours| (0.0..=87_600.0).contains(hours) && *hours > 0.0);
    let seconds = hours.map(|hours| (hours * AN_HOUR_S).round().max(1.0));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // At most ten years.
    seconds
        .map(|seconds| seconds as u64)
        .ok_or_else(|| "must be a number of hours above 0, at most ten years".into())
}

fn time(value: &Value) -> Result<u64, String> {
    let seconds = match value {
        Value::String(text) => Some(clock::unix_ms(text) / 1_000).filter(|seconds| *seconds > 0),
        value => value.as_u64(),
    };
    seconds.ok_or_else(|| "must be a time such as \"2026-01-01T00:00:00Z\", or Unix seconds".into())
}

fn or_none<T>(value: &Value, read: impl FnOnce(&Value) -> Result<T, String>) -> Result<Option<T>, String> {
    if value.is_null() { Ok(None) } else { read(value).map(Some) }
}

fn steps(value: &Value) -> Result<Vec<Step>, String> {
    const PROBLEM: &str = "must be a list of {\"percentage\", \"hold_hours\"}, or \"weekly\" for 5, 25, 50 and 100, a week each";
    match value {
        Value::String(name) if name == WEEKLY => Ok(WEEKLY_STEPS.to_vec()),
        Value::Null => Ok(Vec::new()),
        Value::Array(steps) => steps
            .iter()
            .map(|step| {
                let step = step.as_object().filter(|step| step.len() == 2).ok_or(PROBLEM)?;
                let percentage = step.get("percentage").ok_or(PROBLEM)?;
                let hold = step.get("hold_hours").ok_or(PROBLEM)?;
                Ok(Step { share: share(percentage)?, hold_s: hours(hold)? })
            })
            .collect(),
        _ => Err(PROBLEM.into()),
    }
}

fn flag(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| "must be true or false".into())
}

fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| "must be a text".into())
}

fn cause(value: &Value) -> Result<String, String> {
    let text = text(value)?;
    if text.chars().count() > MAX_CAUSE_CHARS {
        return Err(format!("must be at most {MAX_CAUSE_CHARS} characters"));
    }
    Ok(text.to_owned())
}

fn texts(value: &Value) -> Result<BTreeSet<String>, String> {
    let problem = || "must be a list of texts".to_owned();
    let list = value.as_array().ok_or_else(problem)?;
    list.iter().map(|item| item.as_str().map(ToOwned::to_owned).ok_or_else(problem)).collect()
}

/// Also a list of those for V2, and true and false for V2 and V1, as other tools have it.
fn overrides(value: &Value) -> Result<BTreeMap<String, ApiVersion>, String> {
    const PROBLEM: &str = "must be an object of users with \"v1\" or \"v2\" each";
    match value {
        Value::Array(_) => Ok(texts(value)?.into_iter().map(|user| (user, ApiVersion::V2)).collect()),
        Value::Object(users) => users
            .iter()
            .map(|(user, version)| match version {
                Value::Bool(true) => Ok((user.clone(), ApiVersion::V2)),
                Value::Bool(false) => Ok((user.clone(), ApiVersion::V1)),
                version => serde_json::from_value(version.clone())
                    .map(|version| (user.clone(), version))
                    .map_err(|_| PROBLEM.to_owned()),
            })
            .collect(),
        _ => Err(PROBLEM.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn policy() -> Policy {
        serde_json::from_str(r#"{"routes":[{"name":"chat","path":"/chat","access":"key"}]}"#).unwrap()
    }

    fn apply(flags: &Flags, document: &Value) -> Result<Flags, Vec<String>> {
        let policy = policy();
        let around = Surroundings { has_v1: true, policy: &policy, now_s: NOW };
        Edit::read(document).and_then(|edit| edit.apply(flags, around))
    }

    #[test]
    fn members_that_are_not_named_stay() {
        let flags = apply(&Flags::default(), &json!({"strategy": "canary", "canary_users": ["a"]})).unwrap();
        assert!(!flags.rollout.v1_retired, "a migration begins, so V1's keys are good");
        let flags = apply(&flags, &json!({"strategy": "percentage", "percentage": 0.01})).unwrap();
        assert_eq!(flags.rollout.share, 1);
        assert!(flags.rollout.canary_users.contains("a"));
        let flags = apply(&flags, &json!({"strategy": "off"})).unwrap();
        let flags = apply(&flags, &json!({"strategy": "percentage"})).unwrap();
        assert_eq!(flags.rollout.share, 1);
        let flags = apply(&flags, &json!({"strategy": "full"})).unwrap();
        assert!(!flags.rollout.v1_retired, "that is for somebody to say");
        assert!(apply(&flags, &json!({"v1_retired": true})).unwrap().rollout.is_settled());
    }

    #[test]
    fn a_document_that_is_wrong_is_refused_with_all_that_is_wrong() {
        for (document, starts) in [
            (json!([]), vec!["it is not a JSON object"]),
            (json!({"strategy": "on"}), vec!["strategy: must be"]),
            (json!({"percentage": 101}), vec!["percentage: must be"]),
            (json!({"percentage": -1}), vec!["percentage: must be"]),
            (json!({"percentage": "ten"}), vec!["percentage: must be"]),
            (json!({"percentage": 0.001}), vec!["percentage: must be"]),
            (json!({"strategy": "x", "percent": 5}), vec!["strategy: must be", "percent: there is no such"]),
            (json!({"canary_users": "a"}), vec!["canary_users: must be a list"]),
            (json!({"canary_users": [1]}), vec!["canary_users: must be a list"]),
            (json!({"override_users": {"a": "v3"}}), vec!["override_users: must be"]),
            (json!({"enabled_endpoints": ["nowhere"]}), vec!["enabled_endpoints: the policy has no route"]),
            (json!({"enabled_endpoints": ["/a/../b"]}), vec!["enabled_endpoints:"]),
            (json!({"strategy": "gradual", "start_time": "soon"}), vec!["start_time: must be"]),
            (json!({"strategy": "gradual", "ramp_duration_hours": 0}), vec!["ramp_duration_hours: must be"]),
            (
                json!({"strategy": "gradual", "steps": [{"percentage": 50, "hold_hours": 1}, {"percentage": 5, "hold_hours": 1}]}),
                vec!["gradual.steps[1].share"],
            ),
            (
                json!({"strategy": "gradual", "ramp_duration_hours": 1, "steps": "weekly"}),
                vec!["steps: must not stand beside"],
            ),
        ] {
            let errors = apply(&Flags::default(), &document).unwrap_err();
            assert_eq!(errors.len(), starts.len(), "{document}: {errors:?}");
            for start in starts {
                assert!(errors.iter().any(|error| error.starts_with(start)), "{document}: {errors:?}");
            }
        }
    }

    #[test]
    fn without_a_v1_nothing_is_sent_there() {
        let policy = policy();
        let around = Surroundings { has_v1: false, policy: &policy, now_s: NOW };
        let apply = |document: Value| Edit::read(&document).unwrap().apply(&Flags::default(), around);
        for document in [
            json!({"strategy": "off"}),
            json!({"strategy": "percentage", "percentage": 100}),
            json!({"override_users": {"a": "v1"}}),
            json!({"enabled_endpoints": ["chat"]}),
            json!({"v1_retired": false}),
        ] {
            assert!(apply(document.clone()).unwrap_err()[0].contains("no V1 upstream"), "{document}");
        }
        assert!(apply(json!({"strategy": "full", "canary_users": ["a"]})).is_ok());
        let mut left = Flags::default();
        left.rollout.strategy = Strategy::Off;
        assert_eq!(show(&left, false, NOW)["effective_percentage"], 100, "what is left of one that is gone");
    }

    #[test]
    fn a_route_that_is_gone_does_not_stand_in_the_way_of_off() {
        let mut flags = apply(&Flags::default(), &json!({"enabled_endpoints": ["chat"]})).unwrap();
        flags.rollout.enabled_endpoints = BTreeSet::from(["gone".to_owned()]);
        assert!(apply(&flags, &json!({"strategy": "off"})).is_ok());
        assert!(apply(&flags, &json!({"enabled_endpoints": ["gone", "chat"]})).is_ok());
        assert!(apply(&flags, &json!({"enabled_endpoints": ["gone", "never"]})).is_err());
    }

    #[test]
    fn gradual_is_the_handbooks_steps_unless_told_and_can_be_paused() {
        let flags = apply(&Flags::default(), &json!({"strategy": "gradual"})).unwrap();
        let shown = show(&flags, true, NOW);
        assert_eq!(shown["percentage"], 5);
        assert_eq!(shown["next_step"], json!({"at": clock::rfc3339(NOW + 7 * 86_400), "percentage": 25}));
        let paused = apply(&flags, &json!({"paused": true})).unwrap();
        assert_eq!(show(&paused, true, NOW + 30 * 86_400)["percentage"], 5);
        assert_eq!(show(&paused, true, NOW)["next_step"], Value::Null);
        let ramp = apply(&flags, &json!({"ramp_duration_hours": 10, "start_time": NOW})).unwrap();
        assert_eq!(show(&ramp, true, NOW + 3_600)["percentage"], 10);
        assert_eq!(apply(&ramp, &json!({"strategy": "off"})).unwrap().rollout.gradual, None);
    }

    #[test]
    fn what_is_shown_can_be_written_back() {
        for document in [
            json!({"strategy": "percentage", "percentage": 12.5, "override_users": {"a": "v1", "b": true}}),
            json!({"strategy": "gradual", "steps": "weekly", "canary_users": ["a"]}),
            json!({"strategy": "canary", "enabled_endpoints": ["chat", "/api/x"], "salt": "s"}),
        ] {
            let flags = apply(&Flags::default(), &document).unwrap();
            let again = apply(&flags, &Value::Object(show(&flags, true, NOW))).unwrap();
            assert_eq!(again.rollout.gradual, flags.rollout.gradual);
            assert_eq!(again.rollout.override_users, flags.rollout.override_users);
            assert_eq!(show(&again, true, NOW), show(&flags, true, NOW));
        }
    }
}
