//! Canaries: tests that are run again and again through Envoy, as a client would call, so that trouble is known before
//! users tell of it.
//!
//! ```text
//!  definitions (journal) ─▶ runner ──HTTP, by a checked address──▶ Envoy ─▶ …
//!                             │  with a key of its own
//!                             └─▶ history ─▶ health, metrics, notifications
//! ```
//!
//! Definitions are kept like everything else, in the journal. Results are not: after a start there are none until the
//! first run.

pub mod history;
pub mod reach;
pub mod target;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::history::{Alert, Health, History, Outcome};
pub use self::target::{Allowed, Url};
use crate::model::key::KeyRecord;

/// The name of the canary's own keys.
pub const KEY_NAME: &str = "keygate canary";
/// The seed that needs a key which may not be renewed yet.
pub const TOO_EARLY: &str = "seed_refresh_too_early";
/// The owner of the canary's keys. A rollout sends them to V2 unless somebody fixes another version for it.
pub const OWNER: &str = "keygate-canary";
/// The most definitions.
pub const MAX_TESTS: usize = 100;
const MAX_ID_BYTES: usize = 64;
const MAX_NAME_CHARS: usize = 200;
const MAX_PAYLOAD_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 20;
const MAX_ASSERTIONS: usize = 20;
const TIMEOUT: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(30);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
const METHODS: [&str; 6] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"];
/// Headers that the runner sets itself, or that would change what is on the line.
const RESERVED: [&str; 8] = [
    "authorization",
    "connection",
    "content-length",
    "host",
    "te",
    "transfer-encoding",
    "upgrade",
    "x-api-key",
];

/// A test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Test {
    /// Its id.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// A path at each of the configured proxies, or the URL of an allowed host.
    pub endpoint: String,
    /// The method.
    pub method: String,
    /// The body, JSON, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<Value>,
    /// The status that must come.
    pub expected_status: u16,
    /// Milliseconds until it has failed.
    pub timeout_ms: u64,
    /// Whether somebody is told when it fails again and again.
    pub critical: bool,
    /// Whether the canary's key is sent with it.
    pub send_key: bool,
    /// More headers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// What else must hold of the answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assertions: Vec<Assertion>,
}

/// Something that must hold of an answer: of a header, or of a place in its JSON body.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assertion {
    /// The header's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// The place, a JSON pointer (RFC 6901).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<String>,
    /// What must stand there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equals: Option<Value>,
    /// What must be a part of what stands there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contains: Option<String>,
}

/// A test, as it was typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TestRequest {
    #[serde(alias = "test_id")]
    id: String,
    name: Option<String>,
    endpoint: String,
    method: Option<String>,
    payload: Option<Value>,
    expected_status: Option<u16>,
    /// A duration such as `5s`, or a number of seconds.
    timeout: Option<Value>,
    #[serde(default)]
    critical: bool,
    send_key: Option<bool>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    assertions: Vec<Assertion>,
}

impl TestRequest {
    /// The test, if all of it is valid.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn test(self, allowed: &Allowed) -> Result<Test, Vec<String>> {
        let mut wrong = Vec::new();
        let is_id = |text: &str| {
            (1..=MAX_ID_BYTES).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        };
        if !is_id(&self.id) {
            wrong.push(format!("'id' must be 1 to {MAX_ID_BYTES} letters, digits, '_' or '-'"));
        }
        let name = self.name.unwrap_or_else(|| self.id.clone());
        if name.trim().is_empty()
            || name.chars().count() > MAX_NAME_CHARS
            || name.chars().any(char::is_control)
        {
            wrong.push(format!("'name' must be 1 to {MAX_NAME_CHARS} printable characters"));
        }
        let method = self.method.unwrap_or_else(|| "GET".into());
        if !METHODS.contains(&method.as_str()) {
            wrong.push(format!("'method' must be one of {}", METHODS.join(", ")));
        }
        if let Err(problem) = allowed.check_endpoint(&self.endpoint) {
            wrong.push(format!("'endpoint': {problem}"));
        }
        let payload = self.payload.filter(|payload| !payload.is_null());
        if payload.as_ref().is_some_and(|payload| payload.to_string().len() > MAX_PAYLOAD_BYTES) {
            wrong.push(format!("'payload' must be at most {MAX_PAYLOAD_BYTES} bytes of JSON"));
        }
        if payload.is_some() && matches!(method.as_str(), "GET" | "HEAD") {
            wrong.push(format!("'payload': a {method} has none"));
        }
        let expected_status = self.expected_status.unwrap_or(200);
        if !(200..=599).contains(&expected_status) {
            wrong.push("'expected_status' must be from 200 to 599".into());
        }
        let timeout = match self.timeout.as_ref().map(duration) {
            None => DEFAULT_TIMEOUT,
            Some(Some(timeout)) if TIMEOUT.contains(&timeout) => timeout,
            Some(_) => {
                wrong
                    .push("'timeout' must be a duration such as \"5s\", or seconds, from 10ms to 30s".into());
                DEFAULT_TIMEOUT
            }
        };
        if self.headers.len() > MAX_HEADERS {
            wrong.push(format!("'headers': at most {MAX_HEADERS}"));
        }
        for (name, value) in &self.headers {
            let is_token = ::http::HeaderName::from_bytes(name.as_bytes()).is_ok();
            if !is_token || ::http::HeaderValue::from_str(value).is_err() {
                wrong.push(format!("'headers': {name:?} is no header, or its value is none"));
            } else if RESERVED.contains(&name.to_ascii_lowercase().as_str()) {
                wrong.push(format!("'headers': {name:?} is set by the runner; see 'send_key'"));
            }
        }
        if self.assertions.len() > MAX_ASSERTIONS {
            wrong.push(format!("'assertions': at most {MAX_ASSERTIONS}"));
        }
        wrong.extend(self.assertions.iter().filter_map(Assertion::problem));
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Ok(Test {
            id: self.id,
            name,
            endpoint: self.endpoint,
            method,
            payload,
            expected_status,
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            critical: self.critical,
            send_key: self.send_key.unwrap_or(true),
            headers: self.headers,
            assertions: self.assertions,
        })
    }
}

fn duration(value: &Value) -> Option<Duration> {
    match value {
        Value::String(text) => humantime::parse_duration(text).ok(),
        Value::Number(seconds) => {
            seconds.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        }
        _ => None,
    }
}

impl Assertion {
    fn problem(&self) -> Option<String> {
        match (&self.header, &self.json) {
            (Some(name), None) if ::http::HeaderName::from_bytes(name.as_bytes()).is_ok() => {}
            (None, Some(place)) if place.is_empty() || place.starts_with('/') => {}
            _ => {
                return Some(
                    "'assertions': each names a 'header', or a 'json' pointer such as \"/valid\"".into(),
                );
            }
        }
        if self.equals.is_some() && self.contains.is_some() {
            return Some("'assertions': either 'equals' or 'contains'".into());
        }
        None
    }

    /// Why an answer does not meet it; `None`: it does. `header` finds one by its name.
    pub fn failure<'a>(
        &self,
        header: impl Fn(&str) -> Option<&'a str>,
        body: Option<&Value>,
    ) -> Option<String> {
        let (what, found) = match (&self.header, &self.json) {
            (Some(name), _) => (format!("header {name}"), header(name).map(Value::from)),
            (None, place) => {
                let place = place.as_deref().unwrap_or_default();
                (format!("JSON at {place:?}"), body.and_then(|body| body.pointer(place)).cloned())
            }
        };
        let Some(found) = found else { return Some(format!("{what} is not there")) };
        let as_text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        let text = as_text(&found);
        let holds = match (&self.equals, &self.contains) {
            // A header is text, whatever it is compared with.
            (Some(wanted), _) => found == *wanted || (self.header.is_some() && as_text(wanted) == text),
            (None, Some(part)) => text.contains(part.as_str()),
            (None, None) => true,
        };
        // What stands there may be anybody's; that it is not as wanted is all that is told.
        (!holds).then(|| format!("{what} is not as wanted"))
    }
}

/// The tests there are: those of the journal, and the seeds that it does not change.
pub fn defined(app_endpoint: &str, journalled: &BTreeMap<String, Option<Test>>) -> Vec<Test> {
    let mut tests: BTreeMap<String, Test> =
        seeds(app_endpoint).into_iter().map(|test| (test.id.clone(), test)).collect();
    for (id, test) in journalled {
        match test {
            Some(test) => drop(tests.insert(id.clone(), test.clone())),
            None => drop(tests.remove(id)),
        }
    }
    tests.into_values().collect()
}

/// Whether a key is the canary's own.
pub fn is_canary_key(key: &KeyRecord) -> bool {
    key.name == KEY_NAME && key.metadata.get("canary") == Some(&Value::Bool(true))
}

/// What is tested unless somebody says otherwise: what a holder of a key does. Registering, revoking and the end of a key
/// are the probe's, see [`runner`].
pub fn seeds(app_endpoint: &str) -> Vec<Test> {
    let test = |id: &str, name: &str, endpoint: &str, method: &str, expected_status, assertions| Test {
        id: id.into(),
        name: name.into(),
        endpoint: endpoint.into(),
        method: method.into(),
        payload: None,
        expected_status,
        timeout_ms: 5_000,
        critical: true,
        send_key: true,
        headers: BTreeMap::new(),
        assertions,
    };
    let json = |place: &str, value: Value| Assertion {
        header: None,
        json: Some(place.into()),
        equals: Some(value),
        contains: None,
    };
    let without_key = |test: Test| Test { send_key: false, ..test };
    vec![
        test(
            "seed_validate",
            "A key counts",
            "/api/auth/validate",
            "GET",
            200,
            vec![json("/valid", json!(true))],
        ),
        test(
            TOO_EARLY,
            "A fresh key is not renewed",
            "/api/auth/refresh",
            "POST",
            400,
            vec![json("/code", json!("too_early"))],
        ),
        test("seed_app", "The application answers", app_endpoint, "GET", 200, Vec::new()),
        without_key(test(
            "seed_no_key",
            "Without a key nobody passes",
            app_endpoint,
            "GET",
            401,
            vec![json("/code", json!("missing_credential"))],
        )),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> Result<Test, Vec<String>> {
        let allowed = Allowed::new(&["http://127.0.0.1:10000".parse().unwrap()], &[]).unwrap();
        serde_json::from_value::<TestRequest>(json).unwrap().test(&allowed)
    }

    #[test]
    fn the_handbooks_test_is_one() {
        let test = read(json!({
            "test_id": "custom_test", "name": "Custom Endpoint Test", "endpoint": "/api/custom", "method": "GET",
            "payload": null, "expected_status": 200, "timeout": 5.0, "critical": true,
        }))
        .unwrap();
        assert_eq!((test.id.as_str(), test.timeout_ms, test.critical), ("custom_test", 5_000, true));
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let wrong = read(json!({
            "id": "a b", "name": "\u{7}", "endpoint": "http://elsewhere/", "method": "TRACE", "payload": "x",
            "expected_status": 101, "timeout": "1h", "headers": { "host": "x", "a b": "c" },
            "assertions": [{ "equals": 1 }, { "header": "a", "json": "/a" }, { "json": "a" },
                           { "json": "/a", "equals": 1, "contains": "1" }],
        }))
        .unwrap_err();
        assert_eq!(wrong.len(), 12, "{wrong:#?}");
    }

    #[test]
    fn an_assertion_holds_or_says_what_does_not() {
        let of = |assertion: Value, body: &Value| {
            let header = |name: &str| (name == "x-a").then_some("12");
            serde_json::from_value::<Assertion>(assertion).unwrap().failure(header, Some(body))
        };
        let body = json!({ "a": { "b": [1, "text"] } });
        for holds in [
            json!({ "json": "/a/b/0", "equals": 1 }),
            json!({ "json": "/a/b/1", "contains": "ex" }),
            json!({ "json": "/a" }),
            json!({ "header": "x-a", "equals": "12" }),
            json!({ "header": "x-a", "equals": 12 }),
        ] {
            assert_eq!(of(holds.clone(), &body), None, "{holds}");
        }
        for fails in [
            json!({ "json": "/a/b/0", "equals": "1" }),
            json!({ "json": "/c" }),
            json!({ "header": "x-b" }),
            json!({ "header": "x-a", "contains": "3" }),
        ] {
            let said = of(fails.clone(), &body).unwrap_or_else(|| panic!("{fails}"));
            assert!(!said.contains("text"), "{said}");
        }
    }
}
