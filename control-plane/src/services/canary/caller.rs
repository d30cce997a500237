//! Makes one call of a test, as a client would.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, Request, header};
use http_body_util::Full;
use keygate_core::secret::Secret;
use serde_json::Value;

use crate::model::canary::Test;
use crate::model::canary::target::Allowed;
use crate::platform::http_client::{HttpClient, HttpError};
use crate::platform::trace::{self, Trace};

/// The most of a body that is read: enough for an answer about a key, and little for one that never ends.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// A call.
pub struct Call<'c> {
    /// The method.
    pub method: &'c str,
    /// The URL.
    pub url: String,
    /// The key to send.
    pub key: Option<&'c Secret<String>>,
    /// More headers.
    pub headers: &'c BTreeMap<String, String>,
    /// The body.
    pub payload: Option<String>,
    /// Time-out of the call.
    pub timeout: Duration,
    /// The trace that it belongs to.
    pub trace: Trace,
}

/// An answer.
pub struct Answer {
    /// The status.
    pub status: u16,
    headers: HeaderMap,
    /// The body, if it is JSON.
    pub json: Option<Value>,
}

/// The outcome of a test's call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Called {
    /// The status, if there was an answer.
    pub status: Option<u16>,
    /// Its duration.
    pub took: Duration,
    /// The failure; `None`: it passed.
    pub failure: Option<String>,
}

/// Calls.
#[derive(Debug)]
pub struct Caller {
    client: HttpClient,
}

impl Caller {
    /// One that calls only what is allowed.
    pub fn new(allowed: Arc<Allowed>) -> Self {
        Self { client: HttpClient::guarded(allowed) }
    }

    /// Makes a test's call at a proxy and says whether all of it held.
    pub async fn run(&self, test: &Test, proxy: &str, key: Option<&Secret<String>>, trace: Trace) -> Called {
        let is_path = test.endpoint.starts_with('/');
        let url = if is_path { format!("{proxy}{}", test.endpoint) } else { test.endpoint.clone() };
        let begun = Instant::now();
        let call = Call {
            method: &test.method,
            url,
            key: key.filter(|_| test.send_key),
            headers: &test.headers,
            payload: test.payload.as_ref().map(Value::to_string),
            timeout: Duration::from_millis(test.timeout_ms),
            trace,
        };
        let answered = self.call(call).await;
        let took = begun.elapsed();
        let answer = match answered {
            Ok(answer) => answer,
            Err(failure) => return Called { status: None, took, failure: Some(failure) },
        };
        let failure = if answer.status == test.expected_status {
            let header = |name: &str| answer.headers.get(name).and_then(|value| value.to_str().ok());
            test.assertions.iter().find_map(|assertion| assertion.failure(header, answer.json.as_ref()))
        } else {
            Some(format!("status {} in place of {}", answer.status, test.expected_status))
        };
        Called { status: Some(answer.status), took, failure }
    }

    /// Makes a call.
    ///
    /// # Errors
    /// A description of the failure, without anything of the request or the answer.
    pub async fn call(&self, call: Call<'_>) -> Result<Answer, String> {
        let mut request = Request::builder().method(call.method).uri(call.url);
        for (name, value) in call.headers {
            request = request.header(name, value);
        }
        let lacks = |name: &str| !call.headers.keys().any(|given| given.eq_ignore_ascii_case(name));
        if lacks(trace::HEADER) {
            request = request.header(trace::HEADER, call.trace.part());
        }
        for (name, value) in [("user-agent", "keygate-canary"), ("accept", "*/*")] {
            if lacks(name) {
                request = request.header(name, value);
            }
        }
        let unmakeable = |_| "the request cannot be made".to_owned();
        if let Some(key) = call.key {
            let bearer = Secret::new(format!("Bearer {}", key.expose()));
            let mut bearer =
                HeaderValue::try_from(bearer.expose()).map_err(|error| unmakeable(error.into()))?;
            bearer.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, bearer);
        }
        if call.payload.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Bytes::from(call.payload.unwrap_or_default());
        let request = request.body(Full::new(body)).map_err(unmakeable)?;
        let answer = self.client.exchange(request, call.timeout, MAX_BODY_BYTES).await;
        let (head, body) = answer.map_err(|error: HttpError| error.to_string())?.into_parts();
        Ok(Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            json: serde_json::from_slice(&body).ok(),
        })
    }
}
