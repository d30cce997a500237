//! What handlers take from a request: who calls, JSON bodies, and `wait=applied`.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use keygate_core::decide::cache::Verified;
use keygate_core::decide::policy::Route;
use keygate_core::decide::{Decision, Judge, Reason, Verdict, decide_on_route};
use keygate_core::telemetry::Timing;
use keygate_core::token::credential;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::masked::without_keys;
use crate::durability::writer::Committed;
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::author::{self, Author};
use crate::model::change::Idempotency;
use crate::model::commands::Expected;
use crate::model::state::State;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_TIMEOUT: Duration = Duration::from_secs(900);
const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1_000;
/// The time that the body of a request may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_IDEMPOTENCY_KEY_BYTES: usize = 255;

/// Whoever calls: a key whose token counts.
#[derive(Debug, Clone)]
pub struct Caller(pub Arc<Verified>);

impl Caller {
    /// The author of the changes that it orders.
    pub fn author(&self) -> Author {
        Author::key(Arc::clone(&self.0))
    }

    /// The same with the reason that it gives.
    ///
    /// # Errors
    /// 400 when it is none.
    pub fn author_because(&self, reason: Option<String>) -> Result<Author, Problem> {
        if reason.as_deref().is_some_and(|reason| !author::is_reason(reason)) {
            let most = author::MAX_REASON_CHARS;
            return Err(Problem::bad_request(format!(
                "'reason' must be one line of at most {most} characters."
            )));
        }
        Ok(self.author().because(reason))
    }
}

/// Decides on the key in the headers as a proxy would for `route`.
///
/// # Errors
/// The refusal that a proxy would give.
pub fn authenticate(app: &ApiState, headers: &HeaderMap, route: &Route) -> Result<Caller, Problem> {
    authenticate_or(app, headers, route, |_| false)
}

/// The same, and lets a key pass that is refused for a reason which `but` takes, if its signature is good.
///
/// # Errors
/// The refusal that a proxy would give.
pub fn authenticate_or(
    app: &ApiState,
    headers: &HeaderMap,
    route: &Route,
    but: impl Fn(Reason) -> bool,
) -> Result<Caller, Problem> {
    let started = Instant::now();
    let state = app.state();
    let decision = decided(app, &state, headers, route);
    app.telemetry.observe(Timing::Validation, started.elapsed());
    match (decision.verdict, decision.key) {
        (Verdict::Forward, Some(key)) => Ok(Caller(key)),
        (Verdict::Refuse(_), Some(key)) if but(decision.reason) => Ok(Caller(key)),
        (Verdict::Refuse(refusal), _) => {
            app.telemetry.request_refused(decision.reason);
            Err(Problem::refusal(refusal, &state.rules.realm, &route.scopes))
        }
        (Verdict::Forward, None) => Err(Problem::not_found("This path needs no key.")),
    }
}

/// The key in the headers, if its signature is good, whatever becomes of the request.
pub fn genuine_key(app: &ApiState, headers: &HeaderMap) -> Option<Arc<Verified>> {
    decided(app, &app.state(), headers, &Route::keyed("key", &[])).key
}

fn decided<'r>(app: &ApiState, state: &State, headers: &HeaderMap, route: &'r Route) -> Decision<'r> {
    let pairs = headers.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    let mut cache = app.cache.lock().unwrap_or_else(PoisonError::into_inner);
    let begun = Instant::now();
    let judge = Judge {
        cache: &mut cache,
        meter: (),
        revocations: &state.revocations,
        now: app.clock.now_s(),
        trace: &mut (),
    };
    let decision = decide_on_route(&state.rules, route, credential::find(pairs), judge);
    app.telemetry.observe(Timing::Decode, begun.elapsed());
    decision
}

/// A request's body, with a problem document when it is too long or breaks off.
pub struct Body(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let read = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, state));
        let Ok(read) = read.await else {
            let detail = format!("The body did not come within {} s.", BODY_TIMEOUT.as_secs());
            return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", detail));
        };
        read.map(Self).map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Problem::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too_large",
                "The body is too long: at most 1 MiB, and 64 KiB at the sync port.",
            ),
            _ => Problem::bad_request(rejection.body_text()),
        })
    }
}

/// A key's id in the path, with a problem document when it is no text.
pub struct KeyId(pub String);

impl<S: Send + Sync> FromRequestParts<S> for KeyId {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        Path::from_request_parts(parts, state)
            .await
            .map(|Path(id)| Self(id))
            .map_err(|rejection| Problem::bad_request(rejection.body_text()))
    }
}

/// Reads a JSON body, whatever its `Content-Type` says: `curl -d` says "form". Nothing at all is `{}`. Keys in its texts are
/// masked.
///
/// # Errors
/// 400 with what is wrong and where.
pub fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, Problem> {
    let masked = without_keys(bytes);
    body_with_key(&masked)
}

/// The same of a body that may have a key.
///
/// # Errors
/// 400 with what is wrong and where.
pub fn body_with_key<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let bytes = if bytes.trim_ascii().is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes)
        .map_err(|error| Problem::bad_request(format!("The body is not as expected: {error}.")))
}

/// The same for a change whose body has no `reason` of its own: what is asked for, and the `reason` that is given for it.
///
/// # Errors
/// 400 with what is wrong and where.
pub fn order<T: DeserializeOwned>(bytes: &Bytes) -> Result<(T, Option<String>), Problem> {
    let bytes = without_keys(bytes);
    let Ok(Members(members)) = serde_json::from_slice(&bytes) else {
        return Ok((body_with_key(&bytes)?, None));
    };
    let (reasons, others): (Vec<_>, Vec<_>) = members.into_iter().partition(|(name, _)| name == "reason");
    let reason = match reasons.as_slice() {
        [] => None,
        [(_, one)] => {
            serde_json::from_str(one.get()).map_err(|_| Problem::bad_request("'reason' must be a text."))?
        }
        _ => return Err(Problem::bad_request("The body has 'reason' twice.")),
    };
    let others: Vec<String> = others
        .iter()
        .map(|(name, value)| format!("{}:{}", Value::from(name.as_str()), value.get()))
        .collect();
    Ok((body_with_key(format!("{{{}}}", others.join(",")).as_bytes())?, reason))
}

/// The members of an object in their order, also those that are there twice.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;

        impl<'de> Visitor<'de> for Read {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Read)
    }
}

/// The reason for a change that needs no more to be said. Other members of the body are ignored, and so is a body that is no
/// object.
pub struct Because(pub Option<String>);

impl<S: Send + Sync> FromRequest<S> for Because {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let Body(bytes) = Body::from_request(request, state).await?;
        let bytes = without_keys(&bytes);
        let members: serde_json::Map<String, Value> = serde_json::from_slice(&bytes).unwrap_or_default();
        match members.get("reason") {
            None | Some(Value::Null) => Ok(Self(None)),
            Some(Value::String(reason)) => Ok(Self(Some(reason.clone()))),
            Some(_) => Err(Problem::bad_request("'reason' must be a text.")),
        }
    }
}

/// When a change was asked for, and how long its caller waits for the proxies, if at all.
#[derive(Debug, Clone, Copy)]
pub struct Waits {
    since: Instant,
    limit: Option<Duration>,
}

impl Waits {
    /// By the parameters `wait` and `timeout` of a query.
    ///
    /// # Errors
    /// 400 when they are none.
    pub fn new(wait: Option<String>, timeout: Option<String>) -> Result<Self, Problem> {
        Ok(Self { since: Instant::now(), limit: Wait { wait, timeout }.limit()? })
    }

    /// For a call that cannot ask for it.
    pub fn for_nobody() -> Self {
        Self { since: Instant::now(), limit: None }
    }

    /// The same for a change that there is nothing to wait for: proxies need not know it.
    pub fn for_nothing(self) -> Self {
        Self { limit: None, ..self }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Waits {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let since = Instant::now();
        let Query(wait) = Query::<Wait>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Problem::bad_parameter(&rejection.body_text()))?;
        Ok(Self { since, limit: wait.limit()? })
    }
}

/// The query of a call that may wait.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wait {
    wait: Option<String>,
    timeout: Option<String>,
}

impl Wait {
    fn limit(&self) -> Result<Option<Duration>, Problem> {
        let timeout = match &self.timeout {
            None => DEFAULT_TIMEOUT,
            Some(text) => {
                humantime::parse_duration(text).ok().filter(|timeout| *timeout <= MAX_TIMEOUT).ok_or_else(
                    || Problem::bad_request("'timeout' must be a duration such as 5s, at most 15m."),
                )?
            }
        };
        match self.wait.as_deref() {
            None => Ok(None),
            Some("applied") => Ok(Some(timeout)),
            Some(_) => Err(Problem::bad_request("'wait' can only be 'applied'.")),
        }
    }
}

/// The answer to a change, which says the version, how durable it is, and, if asked for, how far it has got. When
/// the configuration asks for a copy in Redis and there is none yet, the status is 202.
pub async fn finish(
    app: &ApiState,
    committed: Committed,
    waits: Waits,
    status: StatusCode,
    mut body: serde_json::Value,
) -> Response {
    body["version"] = serde_json::json!(committed.version);
    let durability = app.peers.durability(committed.journal_seq).await;
    body["durability"] = serde_json::json!(durability);
    if let Some(limit) = waits.limit {
        let state = app.state();
        let propagation = app.fleet.wait_applied(committed.version, &state, waits.since, limit).await;
        if !propagation.missing.is_empty() {
            app.metrics.fleet.propagation_timeouts.inc();
        } else if propagation.total > 0 {
            app.metrics.fleet.propagation.observe(Duration::from_millis(propagation.max_lag_ms));
        }
        body["propagation"] = serde_json::json!(propagation);
    }
    let is_short_of = durability < app.config.durability;
    super::json(if is_short_of { StatusCode::ACCEPTED } else { status }, body)
}

/// The entity tag of a document at a revision.
pub fn etag(revision: u64) -> String {
    format!("\"{revision}\"")
}

/// The revision that the `If-Match` of a request names (RFC 9110, 13.1.1).
pub fn if_match(headers: &HeaderMap) -> Expected {
    let Some(tag) = headers.get(header::IF_MATCH) else { return Expected::Any };
    if tag == "*" {
        return Expected::Any;
    }
    let digits = tag.to_str().ok().and_then(|tag| tag.strip_prefix('"')?.strip_suffix('"'));
    let revision = digits.and_then(|digits| digits.parse().ok()).filter(|revision| tag == &etag(*revision));
    revision.map_or(Expected::Unknown, Expected::Revision)
}

/// Reads what takes a while, on a thread that answers nobody.
pub async fn read<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let unavailable = |_| Problem::unavailable("Retry later.");
    tokio::task::spawn_blocking(read).await.map_err(unavailable)
}

/// How many items a page has.
pub fn limit(wanted: Option<usize>) -> Result<usize, Problem> {
    let limit = wanted.unwrap_or(DEFAULT_LIMIT);
    if (1..=MAX_LIMIT).contains(&limit) {
        return Ok(limit);
    }
    Err(Problem::bad_request(format!("'limit' must be 1 to {MAX_LIMIT}.")))
}

/// The `Idempotency-Key` of a request (draft-ietf-httpapi-idempotency-key-header), if it has one.
///
/// # Errors
/// 400 when it is no key.
pub fn idempotency(
    headers: &HeaderMap,
    caller: &str,
    operation: &str,
    body: &[u8],
) -> Result<Option<Idempotency>, Problem> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    if value.is_empty() || value.len() > MAX_IDEMPOTENCY_KEY_BYTES {
        return Err(Problem::bad_request(format!(
            "'Idempotency-Key' must be 1 to {MAX_IDEMPOTENCY_KEY_BYTES} bytes."
        )));
    }
    let mut request = Sha256::new();
    for part in [caller.as_bytes(), operation.as_bytes(), value.as_bytes()] {
        request.update(part.len().to_le_bytes());
        request.update(part);
    }
    Ok(Some(Idempotency {
        request_id: BASE64URL.encode(request.finalize()),
        body: BASE64URL.encode(Sha256::digest(body)),
    }))
}
