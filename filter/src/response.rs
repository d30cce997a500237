//! The answers to clients: the answer to a refused request, and the headers added to the upstream's answer.

use keygate_core::decide::limits::Left;
use keygate_core::decide::refusal::Refusal;
use keygate_core::telemetry::{self, Trouble};

use crate::host;

/// The realm of challenges before there is a state that names one.
pub const DEFAULT_REALM: &str = "keygate";

/// An answer that does not come from the upstream.
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// Its headers.
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: String,
}

impl Response {
    /// The refusal where nothing can be decided.
    pub fn unavailable() -> Self {
        Self::refusing(Refusal::Unavailable, DEFAULT_REALM, &[], None)
    }

    /// The answer to a request that is refused: a problem document, and what is left of its limit, if it has one.
    pub fn refusing(refusal: Refusal, realm: &str, scopes: &[String], left: Option<Left>) -> Self {
        let mut headers = vec![
            ("content-type", "application/problem+json".to_owned()),
            ("cache-control", "no-store".to_owned()),
        ];
        if let Some(challenge) = refusal.challenge(realm, scopes) {
            headers.push(("www-authenticate", challenge));
        }
        let wait = left.filter(|_| refusal == Refusal::RateLimited).map(|left| left.reset_s);
        if let Some(seconds) = wait.or(refusal.retry_after().map(u64::from)) {
            headers.push(("retry-after", seconds.to_string()));
        }
        let left = left.map(limit_headers).into_iter().flatten();
        headers.extend(left.map(|(name, number)| (name, number.to_string())));
        Self { status: refusal.status(), headers, body: refusal.body() }
    }
}

/// What passed and is to be answered.
pub struct Awaited {
    /// While a rollout is under way: its answer is counted.
    pub counted: Option<telemetry::Awaited>,
    /// What is left of its limit: the client is told.
    pub left: Option<Left>,
}

/// The upstream answers: the client is told what is left of its limit. What is to be counted, while a rollout is under
/// way: what that costs is not for everybody to pay.
pub fn on_response(awaited: Awaited) -> Option<(telemetry::Awaited, Trouble)> {
    if let Some(left) = awaited.left {
        // Written where they stand: a number needs no memory of its own.
        let mut digits = [itoa::Buffer::new(); 3];
        let mut headers = [("", ""); 3];
        for ((place, digits), (name, number)) in headers.iter_mut().zip(&mut digits).zip(limit_headers(left))
        {
            *place = (name, digits.format(number));
        }
        host::add_response_headers(&headers);
    }
    let counted = awaited.counted?;
    Some((counted, host::response_status().and_then(Trouble::of)?))
}

/// What a client is told of its limit: draft-ietf-httpapi-ratelimit-headers in its widespread form.
fn limit_headers(left: Left) -> [(&'static str, u64); 3] {
    [
        ("x-ratelimit-limit", left.limit.units.into()),
        ("x-ratelimit-remaining", left.remaining.into()),
        ("x-ratelimit-reset", left.reset_s),
    ]
}
