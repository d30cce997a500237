//! Keys that operators edit by hand: what stands there is compared with the state, and told apart what is an edit,
//! what is a copy that lags behind, and what was lost. Pure.
//!
//! Beside each such key stands what was written to it last, with the stamp of the change that did. Redis may have
//! been emptied or restored meanwhile: then that record is missing or older than the state, and what stands there
//! is written again rather than obeyed.

use std::collections::BTreeSet;

use keygate_core::decide::cutoff::Lockdown;
use keygate_core::decide::limits::Override;
use keygate_core::token::json;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Error as _};

use crate::model::limits;
use crate::model::lockdown;
use crate::model::roles::Roles;
use crate::model::rollout::Flags;
use crate::model::rollout::document::Edit;
use crate::platform::clock;

/// By how much the end of a key may differ from what was written: clocks of two machines, in milliseconds.
const END_TOLERANCE_MS: u64 = 1_500;

/// What stands under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Nothing.
    None,
    /// A text.
    Text(String),
    /// Something of another type, named.
    Other(String),
}

/// What was written last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The stamp of the change that did.
    pub stamp: u64,
    /// The digest of what was written, as Redis makes it.
    pub digest: String,
    /// When it ends, Unix milliseconds; 0: not by itself.
    pub until_ms: u64,
}

/// A key as it was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// What stands there.
    pub value: Value,
    /// Its TTL in milliseconds, if it has one.
    pub ttl_ms: Option<u64>,
    /// The digest of that.
    pub digest: String,
    /// What was written last; `None`: unknown here.
    pub written: Option<Written>,
    /// What Redis's clock said, Unix milliseconds.
    pub now_ms: u64,
}

/// What should stand there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ours {
    /// The stamp of the change that made it so.
    pub stamp: u64,
    /// The text; `None`: nothing.
    pub text: Option<String>,
    /// When it ends, Unix milliseconds; 0: not by itself.
    pub until_ms: u64,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Same,
    /// Redis lacks it, or has an older one: write ours.
    Write,
    /// Somebody edited it.
    Edited,
    /// Another control plane wrote a newer one, which comes by its log.
    Newer,
}

impl Seen {
    /// Whether it is as it was written.
    fn is_untouched(&self, written: &Written) -> bool {
        if self.value == Value::None && written.until_ms != 0 && written.until_ms <= self.now_ms {
            return true; // It ended by itself.
        }
        self.digest == written.digest && self.ends_at(written.until_ms)
    }

    /// Whether it shows what ours does, but for what is counted.
    pub fn is_of(&self, ours: &Ours) -> bool {
        self.written.as_ref().is_some_and(|written| written.stamp == ours.stamp)
            && matches!(self.value, Value::Text(_))
    }

    fn ends_at(&self, until_ms: u64) -> bool {
        match (self.ttl_ms, until_ms) {
            (None, 0) => true,
            _ if self.value == Value::None => true,
            (None, _) | (Some(_), 0) => false,
            (Some(ttl), until) => self.now_ms.saturating_add(ttl).abs_diff(until) <= END_TOLERANCE_MS,
        }
    }

    /// What is to be done about it.
    pub fn judge(&self, ours: &Ours) -> Verdict {
        let Some(written) = &self.written else { return Verdict::Write };
        let untouched = self.is_untouched(written);
        if written.stamp > ours.stamp {
            return Verdict::Newer;
        }
        if !untouched {
            return Verdict::Edited;
        }
        let text = match &self.value {
            Value::Text(text) => Some(text),
            Value::None => None,
            Value::Other(_) => return Verdict::Write,
        };
        if written.stamp == ours.stamp && text == ours.text.as_ref() { Verdict::Same } else { Verdict::Write }
    }
}

#[derive(Debug, Deserialize)]
struct LockdownEdit {
    until: Option<String>,
    exempt_roles: Option<Vec<String>>,
    #[serde(default)]
    lock_out_admins: bool,
}

/// What an edit of [`super::names::OperatorKey::Lockdown`] says. Members that are not known are left alone: other tools write some.
///
/// # Errors
/// What is wrong with it, for operators.
pub fn lockdown(
    value: &Value,
    ttl_ms: Option<u64>,
    now: u64,
    roles: &Roles,
) -> Result<Option<Lockdown>, String> {
    let text = match value {
        Value::None => return Ok(None),
        Value::Text(text) => text,
        Value::Other(kind) => return Err(is_of_type(kind)),
    };
    let edit: LockdownEdit = object(text).map_err(|error| {
        format!("it is not a JSON object such as {{\"exempt_roles\": [\"admin\"]}}: {error}")
    })?;
    let longest = now.saturating_add(lockdown::TTL.end().as_secs());
    let until = match (ttl_ms, edit.until) {
        (Some(ttl), _) => now.saturating_add(ttl.div_ceil(1_000)),
        (None, Some(until)) => match clock::unix_ms(&until) / 1_000 {
            0 => return Err(format!("'until' is not a time such as {}", clock::rfc3339(now))),
            until => until,
        },
        (None, None) => now.saturating_add(lockdown::DEFAULT_TTL.as_secs()),
    };
    if until <= now || until > longest {
        return Err(format!("it must end within 24 h from now, before {}", clock::rfc3339(longest)));
    }
    let exempt_roles = lockdown::exempt_roles(edit.exempt_roles, edit.lock_out_admins, roles)?;
    Ok(Some(Lockdown { until, exempt_roles }))
}

/// What stands under [`super::names::OperatorKey::Lockdown`] at `now`, Unix seconds.
pub fn ours_lockdown(lockdown: Option<&Lockdown>, stamp: u64, now: u64) -> Ours {
    let Some(lockdown) = lockdown.filter(|lockdown| lockdown.is_active(now)) else {
        return Ours { stamp, text: None, until_ms: 0 };
    };
    let text = serde_json::json!({
        "active": true,
        "exempt_roles": lockdown.exempt_roles,
        "until": clock::rfc3339(lockdown.until),
    });
    Ours { stamp, text: Some(text.to_string()), until_ms: lockdown.until.saturating_mul(1_000) }
}

/// What stands under [`super::names::OperatorKey::CanaryUsers`].
pub fn ours_canary_users(flags: &Flags, stamp: u64) -> Ours {
    let users = &flags.rollout.canary_users;
    // In the order in which Redis sorts: by bytes.
    let text = (!users.is_empty()).then(|| serde_json::json!(users).to_string());
    Ours { stamp, text, until_ms: 0 }
}

/// What an edit of [`super::names::OperatorKey::Flags`] says; `None`: it was deleted, which says nothing.
///
/// # Errors
/// What is wrong with it, for operators.
pub fn flags(value: &Value) -> Result<Option<Edit>, String> {
    let text = match value {
        Value::None => return Ok(None),
        Value::Text(text) => text,
        Value::Other(kind) => return Err(is_of_type(kind)),
    };
    let document: serde_json::Value = serde_json::from_str(text)
        .and_then(|document| distinct(text).map(|()| document))
        .map_err(|error| format!("it is not a JSON object such as {{\"strategy\": \"off\"}}: {error}"))?;
    Edit::read(&document).map(Some).map_err(|errors| errors.join("; "))
}

/// What an edit of [`super::names::OperatorKey::CanaryUsers`] says: a set that is not there has no members.
///
/// # Errors
/// When it is no set.
pub fn canary_users(value: &Value) -> Result<Edit, String> {
    let users: BTreeSet<String> = match value {
        Value::None => BTreeSet::new(),
        Value::Text(text) => {
            serde_json::from_str(text).map_err(|_| "it is not a Redis set of users".to_owned())?
        }
        Value::Other(kind) => return Err(format!("it is a Redis {kind}, not a set")),
    };
    Ok(Edit::of_canary_users(users))
}

/// What an edit of [`super::names::OperatorKey::Limits`] says.
///
/// # Errors
/// What is wrong with it, for operators.
pub fn limits(
    value: &Value,
    ttl_ms: Option<u64>,
    now: u64,
    is_role: impl Fn(&str) -> bool,
) -> Result<Option<Override>, String> {
    let text = match value {
        Value::None => return Ok(None),
        Value::Text(text) => text,
        Value::Other(kind) => return Err(is_of_type(kind)),
    };
    let document: serde_json::Value =
        serde_json::from_str(text).and_then(|document| distinct(text).map(|()| document)).unwrap_or_default();
    let roles = limits::override_roles(&document, is_role)?;
    let ttl_s = ttl_ms.map_or(limits::DEFAULT_TTL.as_secs(), |ttl| ttl.div_ceil(1_000));
    if ttl_s > limits::TTL.end().as_secs() {
        return Err("it must end within 30 days".into());
    }
    Ok(Some(Override { until: now.saturating_add(ttl_s.max(1)), roles }))
}

/// What stands under [`super::names::OperatorKey::Limits`] at `now`, Unix seconds.
pub fn ours_limits(emergency: Option<&Override>, stamp: u64, now: u64) -> Ours {
    let Some(emergency) = emergency.filter(|emergency| now < emergency.until) else {
        return Ours { stamp, text: None, until_ms: 0 };
    };
    let text = limits::show_override_roles(&emergency.roles).to_string();
    Ours { stamp, text: Some(text), until_ms: emergency.until.saturating_mul(1_000) }
}

/// Reads a JSON object. Without this an array would do, with its members in the order of the fields.
fn object<T: DeserializeOwned>(text: &str) -> Result<T, serde_json::Error> {
    let members: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)?;
    distinct(text)?;
    serde_json::from_value(members.into())
}

/// Refuses an object with a member twice, at any depth: of two, readers disagree which one counts.
fn distinct(text: &str) -> Result<(), serde_json::Error> {
    json::object(text.as_bytes()).map(drop).map_err(serde_json::Error::custom)
}

fn is_of_type(kind: &str) -> String {
    format!("it is a Redis {kind}, not a string")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_000_000;

    fn roles() -> Roles {
        crate::model::roles::expand(crate::model::roles::defaults())
    }

    fn seen(value: &str, ttl_ms: Option<u64>, written: Option<(u64, &str, u64)>) -> Seen {
        let value_of = |text: &str| match text {
            "" => Value::None,
            "list" => Value::Other("list".into()),
            text => Value::Text(text.into()),
        };
        Seen {
            value: value_of(value),
            ttl_ms,
            digest: format!("#{value}"),
            written: written.map(|(stamp, text, until_ms)| Written {
                stamp,
                digest: format!("#{text}"),
                until_ms,
            }),
            now_ms: NOW_MS,
        }
    }

    #[test]
    fn an_edit_is_told_from_a_copy_that_lags_and_from_a_loss() {
        let ours = |stamp, text: &str, until_ms| Ours {
            stamp,
            text: Some(text.to_owned()).filter(|text| !text.is_empty()),
            until_ms,
        };
        let in_a_minute = NOW_MS + 60_000;
        for (what, seen, ours, verdict) in [
            ("as written", seen("a", None, Some((5, "a", 0))), ours(5, "a", 0), Verdict::Same),
            ("nothing, as written", seen("", None, Some((5, "", 0))), ours(5, "", 0), Verdict::Same),
            ("emptied", seen("", None, None), ours(5, "a", 0), Verdict::Write),
            ("emptied, then set by hand", seen("b", None, None), ours(5, "a", 0), Verdict::Write),
            ("never written", seen("", None, None), ours(0, "", 0), Verdict::Write),
            ("restored from before", seen("b", None, Some((4, "b", 0))), ours(5, "a", 0), Verdict::Write),
            ("set by hand", seen("b", None, Some((5, "a", 0))), ours(5, "a", 0), Verdict::Edited),
            ("deleted by hand", seen("", None, Some((5, "a", 0))), ours(5, "a", 0), Verdict::Edited),
            ("another type", seen("list", None, Some((5, "a", 0))), ours(5, "a", 0), Verdict::Edited),
            (
                "set by hand, changed here meanwhile",
                seen("b", None, Some((4, "a", 0))),
                ours(5, "c", 0),
                Verdict::Edited,
            ),
            ("changed elsewhere", seen("b", None, Some((6, "b", 0))), ours(5, "a", 0), Verdict::Newer),
            (
                "changed elsewhere, then by hand",
                seen("c", None, Some((6, "b", 0))),
                ours(5, "a", 0),
                Verdict::Newer,
            ),
            (
                "with its end",
                seen("a", Some(60_500), Some((5, "a", in_a_minute))),
                ours(5, "a", in_a_minute),
                Verdict::Same,
            ),
            (
                "its end was moved",
                seen("a", Some(90_000), Some((5, "a", in_a_minute))),
                ours(5, "a", in_a_minute),
                Verdict::Edited,
            ),
            (
                "its end was taken away",
                seen("a", None, Some((5, "a", in_a_minute))),
                ours(5, "a", in_a_minute),
                Verdict::Edited,
            ),
            ("it ended by itself", seen("", None, Some((5, "a", NOW_MS))), ours(5, "", 0), Verdict::Same),
            (
                "an older one ended by itself",
                seen("", None, Some((4, "a", NOW_MS))),
                ours(5, "b", in_a_minute),
                Verdict::Write,
            ),
            (
                "deleted before its end",
                seen("", None, Some((5, "a", in_a_minute))),
                ours(5, "a", in_a_minute),
                Verdict::Edited,
            ),
        ] {
            assert_eq!(seen.judge(&ours), verdict, "{what}");
        }
    }

    #[test]
    fn a_lockdown_by_hand_is_read_or_refused_with_a_reason() {
        let read = |text: &str, ttl_ms| lockdown(&Value::Text(text.into()), ttl_ms, 1_000, &roles());
        let until = |until, roles: &[&str]| {
            let exempt_roles = roles.iter().map(ToString::to_string).collect();
            Ok(Some(Lockdown { until, exempt_roles }))
        };
        assert_eq!(read("{}", None), until(4_600, &["admin"]));
        assert_eq!(read("{}", Some(1_500)), until(1_002, &["admin"]));
        assert_eq!(
            read(r#"{"exempt_roles":["basic","admin","basic"],"by":"x"}"#, Some(1_000)),
            until(1_001, &["admin", "basic"])
        );
        let everyone = r#"{"until":"1970-01-01T01:00:00Z","exempt_roles":[],"lock_out_admins":true}"#;
        assert_eq!(read(everyone, None), until(3_600, &[]));
        assert_eq!(lockdown(&Value::None, None, 0, &roles()), Ok(None));
        for bad in [
            "",
            "1",
            "[]",
            "[null,null]",
            "{",
            r#"{"exempt_roles":"admin"}"#,
            r#"{"exempt_roles":["nobody"]}"#,
            r#"{"exempt_roles":["basic"]}"#,
            r#"{"exempt_roles":["admin"],"exempt_roles":["admin","basic"]}"#,
            r#"{"until":"soon"}"#,
            r#"{"until":"1970-01-01T00:00:01Z"}"#,
            r#"{"until":"2970-01-01T00:00:01Z"}"#,
        ] {
            assert!(read(bad, None).is_err(), "{bad}");
        }
        assert!(lockdown(&Value::Other("list".into()), None, 0, &roles()).is_err());
    }

    #[test]
    fn what_is_written_reads_back() {
        let lockdown_ = Lockdown { until: 2_000, exempt_roles: vec!["admin".into()] };
        let ours = ours_lockdown(Some(&lockdown_), 7, 1_000);
        let value = Value::Text(ours.text.unwrap());
        assert_eq!(lockdown(&value, None, 1_000, &roles()), Ok(Some(lockdown_.clone())));
        assert_eq!(ours_lockdown(Some(&lockdown_), 7, 2_000).text, None, "over");
    }

    #[test]
    fn flags_by_hand_are_read_or_refused_with_a_reason() {
        const TWICE: &str = r#"{"strategy":"full","strategy":"off"}"#;
        let read = |text: &str| flags(&Value::Text(text.into()));
        assert!(read(r#"{"strategy": "off"}"#).unwrap().is_some());
        assert_eq!(flags(&Value::None), Ok(None));
        for bad in ["off", r#"["full"]"#, r#"{"strategy":"on"}"#, r#"{"percentage": "ten"}"#, "{", TWICE] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(flags(&Value::Other("list".into())).is_err());
    }

    #[test]
    fn canary_users_are_a_set() {
        let users = |value: &Value| canary_users(value);
        let of = |users: &[&str]| Edit::of_canary_users(users.iter().map(ToString::to_string).collect());
        assert_eq!(users(&Value::None), Ok(of(&[])));
        assert_eq!(users(&Value::Text(r#"["a","b"]"#.into())), Ok(of(&["a", "b"])));
        assert!(users(&Value::Text("x".into())).is_err());
        assert!(users(&Value::Other("hash".into())).is_err());
    }

    #[test]
    fn limits_by_hand_are_read_or_refused_with_a_reason() {
        let read = |text: &str, ttl_ms| {
            super::limits(&Value::Text(text.into()), ttl_ms, 1_000, |role| role == "basic")
        };
        let roles = std::collections::BTreeMap::from([("basic".to_owned(), Some(1_000))]);
        let of = |until| Ok(Some(Override { until, roles: roles.clone() }));
        assert_eq!(read(r#"{"basic": 1000}"#, Some(3_599_500)), of(4_600));
        assert_eq!(read(r#"{"basic": 1000}"#, None), of(4_600));
        assert_eq!(super::limits(&Value::None, None, 0, |_| true), Ok(None));
        for bad in ["", "1", "{}", "[]", r#"{"nobody": 1}"#, r#"{"basic": "many"}"#] {
            assert!(read(bad, None).is_err(), "{bad}");
        }
        let ours = ours_limits(of(4_600).unwrap().as_ref(), 7, 1_000);
        assert_eq!(
            super::limits(&Value::Text(ours.text.unwrap()), Some(3_600_000), 1_000, |_| true),
            of(4_600)
        );
        assert_eq!(ours_limits(of(4_600).unwrap().as_ref(), 7, 4_600).text, None, "over");
    }
}
