//! Makes one call of a test, as a client would.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use zeroize::Zeroizing;

use super::Test;
use super::target::Allowed;
use crate::trace::{self, Trace};

/// The most of a body that is read: enough for an answer about a key, and little for one that never ends.
const MAX_BODY_BYTES: u64 = 64 * 1024;
const MAX_HEADER_BYTES: usize = 32 * 1024;

/// Resolves names and lets only addresses through that may be called. There is no redirect and one connection a call, so
/// the address that was checked is the one that is called.
struct Checked {
    allowed: Arc<Allowed>,
    system: DefaultResolver,
}

impl fmt::Debug for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Checked")
    }
}

impl Resolver for Checked {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let refused = |problem: String| ureq::Error::Other(Box::new(Refused(problem)));
        let host = uri.host().unwrap_or_default();
        let usual = if uri.scheme_str() == Some("https") { 443 } else { 80 };
        self.allowed.permits(host, uri.port_u16().unwrap_or(usual)).map_err(refused)?;
        let found = self.system.resolve(uri, config, timeout)?;
        for address in &found[..] {
            self.allowed.permits_address(host, address.ip()).map_err(refused)?;
        }
        Ok(found)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

/// A call.
pub struct Call<'c> {
    /// The method.
    pub method: &'c str,
    /// The URL.
    pub url: String,
    /// The key to send.
    pub key: Option<&'c Zeroizing<String>>,
    /// More headers.
    pub headers: &'c BTreeMap<String, String>,
    /// The body.
    pub payload: Option<String>,
    /// How long it may take.
    pub timeout: Duration,
    /// The trace that it belongs to.
    pub trace: Trace,
}

/// What came back.
pub struct Answer {
    /// The status.
    pub status: u16,
    headers: ureq::http::HeaderMap,
    /// The body, if it is JSON.
    pub json: Option<Value>,
}

/// How a test's call went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Called {
    /// The status, if there was an answer.
    pub status: Option<u16>,
    /// How long it took.
    pub took: Duration,
    /// Why it failed; `None`: it did not.
    pub failure: Option<String>,
}

/// Calls.
pub struct Caller {
    agent: ureq::Agent,
}

impl Caller {
    /// One that calls only what is allowed.
    pub fn new(allowed: Arc<Allowed>) -> Self {
        let config = Config::builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_idle_connections(0)
            .max_response_header_size(MAX_HEADER_BYTES)
            .proxy(None)
            .user_agent("keygate-canary")
            .allow_non_standard_methods(true)
            .build();
        let resolver = Checked { allowed, system: DefaultResolver::default() };
        Self { agent: ureq::Agent::with_parts(config, DefaultConnector::default(), resolver) }
    }

    /// Makes a test's call at a proxy and says whether all of it held. Blocks for as long as the test may take.
    pub fn run(&self, test: &Test, proxy: &str, key: Option<&Zeroizing<String>>, trace: Trace) -> Called {
        let is_path = test.endpoint.starts_with('/');
        let url = if is_path { format!("{proxy}{}", test.endpoint) } else { test.endpoint.clone() };
        let begun = Instant::now();
        let answered = self.call(Call {
            method: &test.method,
            url,
            key: key.filter(|_| test.send_key),
            headers: &test.headers,
            payload: test.payload.as_ref().map(Value::to_string),
            timeout: Duration::from_millis(test.timeout_ms),
            trace,
        });
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

    /// Makes a call. Blocks for as long as it may take.
    ///
    /// # Errors
    /// What went wrong, without anything of the request or the answer.
    pub fn call(&self, call: Call<'_>) -> Result<Answer, String> {
        let mut request = ureq::http::Request::builder().method(call.method).uri(call.url);
        for (name, value) in call.headers {
            request = request.header(name, value);
        }
        if !call.headers.keys().any(|name| name.eq_ignore_ascii_case(trace::HEADER)) {
            request = request.header(trace::HEADER, call.trace.part());
        }
        if let Some(key) = call.key {
            let bearer = Zeroizing::new(format!("Bearer {}", key.as_str()));
            request = request.header("authorization", bearer.as_str());
        }
        if call.payload.is_some() {
            request = request.header("content-type", "application/json");
        }
        let unmakeable = |_| "the request cannot be made".to_owned();
        let answered = match call.payload {
            Some(payload) => {
                let request = request.body(payload).map_err(unmakeable)?;
                self.agent
                    .run(self.agent.configure_request(request).timeout_global(Some(call.timeout)).build())
            }
            None => {
                let request = request.body(()).map_err(unmakeable)?;
                self.agent
                    .run(self.agent.configure_request(request).timeout_global(Some(call.timeout)).build())
            }
        };
        let mut answer = answered.map_err(|error| problem(&error))?;
        let body = answer.body_mut().with_config().limit(MAX_BODY_BYTES).read_to_vec();
        let body = body.map_err(|error| problem(&error))?;
        Ok(Answer {
            status: answer.status().as_u16(),
            headers: answer.headers().clone(),
            json: serde_json::from_slice(&body).ok(),
        })
    }
}

/// What went wrong, without anything of the request or the answer.
fn problem(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::HostNotFound => "the host is not found".into(),
        ureq::Error::Io(error) => format!("not reached: {}", error.kind()),
        ureq::Error::BodyExceedsLimit(limit) => format!("the body is longer than {limit} bytes"),
        ureq::Error::Other(other) if other.is::<Refused>() => other.to_string(),
        _ => "no answer that can be read".into(),
    }
}
