//! The control plane's API, as tests call it.

use serde_json::{Value, json};

use crate::http::{self, Request, Response};

/// An API at a port, called with a key.
#[derive(Debug, Clone)]
pub struct Api {
    port: u16,
    key: String,
}

/// A key that was issued.
#[derive(Debug, Clone)]
pub struct Key {
    /// The key itself.
    pub token: String,
    /// Its id.
    pub id: String,
    /// Its token's id.
    pub jti: String,
    /// The whole answer.
    pub answer: Value,
}

impl Key {
    /// From the answer of `register` or `refresh`.
    #[track_caller]
    pub fn from_answer(answer: &Value) -> Self {
        let text = |member: &str| {
            answer[member]
                .as_str()
                .unwrap_or_else(|| panic!("no {member} in {}", without_key(answer)))
                .to_owned()
        };
        Self { token: text("api_key"), id: text("key_id"), jti: text("jti"), answer: answer.clone() }
    }
}

/// What `wait=applied` answers.
#[derive(Debug, Clone)]
pub struct Propagation {
    /// How many proxies enforce it.
    pub applied: u64,
    /// How many there are.
    pub total: u64,
    /// The slowest, in milliseconds.
    pub max_lag_ms: f64,
    /// The identities of those that do not.
    pub missing: Vec<Value>,
    /// The version, as it is shown.
    pub version: Value,
}

impl Propagation {
    /// From the answer of a change.
    #[track_caller]
    pub fn from_answer(answer: &Value) -> Self {
        let of = &answer["propagation"];
        let number = |member: &str| of[member].as_u64().unwrap_or_else(|| panic!("no {member} in {answer}"));
        assert!(!of["version"].is_null(), "no version in {answer}");
        Self {
            applied: number("applied"),
            total: number("total"),
            max_lag_ms: of["max_lag_ms"].as_f64().unwrap_or_else(|| panic!("no max_lag_ms in {answer}")),
            missing: of["missing"].as_array().unwrap_or_else(|| panic!("no missing in {answer}")).clone(),
            version: of["version"].clone(),
        }
    }

    /// Panics unless every one of `total` proxies enforces it.
    #[track_caller]
    pub fn expect_everywhere(self, total: u64) -> Self {
        assert_eq!((self.applied, self.total), (total, total), "{self:?}");
        assert!(self.missing.is_empty(), "{self:?}");
        self
    }
}

impl Api {
    /// The key that it is called with.
    pub fn key(&self) -> String {
        self.key.clone()
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The API at `port`, called with `key`.
    pub fn new(port: u16, key: &str) -> Self {
        Self { port, key: key.to_owned() }
    }

    /// The same, called with another key.
    pub fn with_key(&self, key: &str) -> Self {
        Self::new(self.port, key)
    }

    /// A request as it is.
    #[track_caller]
    pub fn call(&self, request: &Request) -> Response {
        http::call(self.port, request)
    }

    /// A request with the key.
    #[track_caller]
    pub fn send(&self, request: Request) -> Response {
        self.call(&request.bearer(&self.key))
    }

    /// The same, when there may be nobody to answer.
    pub fn try_send(&self, request: Request) -> std::io::Result<Response> {
        http::try_call(self.port, &request.bearer(&self.key))
    }

    /// A `GET`.
    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        self.send(Request::get(path))
    }

    /// A `POST`.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.send(Request::post(path, body))
    }

    /// Issues a key with a role's own scopes and life.
    #[track_caller]
    pub fn issue(&self, role: &str) -> Key {
        self.issue_with(&json!({ "name": "e2e", "role": role }))
    }

    /// Issues a key as asked, and waits until every proxy can verify it.
    #[track_caller]
    pub fn issue_with(&self, body: &Value) -> Key {
        let answer = self.post("/api/auth/register", body);
        assert_eq!(answer.status, 201, "{}", answer.text());
        Key::from_answer(&answer.json())
    }

    /// Revokes a key and waits until every proxy enforces it.
    #[track_caller]
    pub fn revoke(&self, id: &str) -> Propagation {
        self.change(&format!("/api/admin/keys/{id}/revoke"), &json!({ "reason": "compromised" }))
    }

    /// Makes a change and waits until every proxy enforces it.
    #[track_caller]
    pub fn change(&self, path: &str, body: &Value) -> Propagation {
        let answer = self.post(&format!("{path}?wait=applied&timeout=10s"), body).expect(200);
        Propagation::from_answer(&answer.json())
    }

    /// The proxies.
    #[track_caller]
    pub fn fleet(&self) -> Vec<Value> {
        let answer = self.get("/api/admin/fleet").expect(200).json();
        answer["proxies"].as_array().unwrap_or_else(|| panic!("no proxies in {answer}")).clone()
    }
}

/// An answer without the secret in it, for messages.
fn without_key(answer: &Value) -> Value {
    let mut answer = answer.clone();
    if let Some(members) = answer.as_object_mut() {
        members.remove("api_key");
    }
    answer
}
