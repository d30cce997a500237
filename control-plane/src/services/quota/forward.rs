//! Passes a proxy's question on to the control plane that keeps the ledger: over HTTP and not through Redis, so that limits
//! hold without Redis.

use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::Full;
use keygate_core::quota::MAX_BYTES;

use super::{Quotas, Role};
use crate::platform::http_client::{HttpClient, HttpError};

/// Header of a question that was passed on already, so that it is not passed on in a circle.
const FORWARDED: &str = "keygate-forwarded";
/// Path of the call by which the others see that the owner is there.
pub const OWNER: &str = "/sync/v1/quota/owner";
/// A call of the owner is not held back.
const CALLED_WITHIN: Duration = Duration::from_millis(900);
/// A question is held back for up to 2 s; a proxy waits for 5 s.
const WITHIN: Duration = Duration::from_millis(4_500);
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// Passes a question, which came with these headers, on to the control plane that keeps the ledger.
///
/// # Errors
/// When that is not known, or does not answer, or the question was passed on already.
pub async fn pass_on(
    quotas: &Quotas,
    headers: &HeaderMap,
    path: &str,
    body: Bytes,
) -> Result<Forwarded, ForwardError> {
    let Role::Elsewhere(keeper) = quotas.role() else {
        return Err(ForwardError::OwnerUnknown);
    };
    if headers.contains_key(FORWARDED) {
        return Err(ForwardError::NotOwner);
    }
    let url = quotas.node.peers.sync_url(keeper);
    let answer = match url {
        Some(url) => quotas.forwarder.post(&url, path, quotas.node.fleet_token.expose(), body).await,
        None => Err(ForwardError::AddressUnknown),
    };
    let is_answered = answer
        .as_ref()
        .is_ok_and(|answer| !answer.status.is_server_error() && answer.status != StatusCode::UNAUTHORIZED);
    if !is_answered {
        quotas.node.metrics.quota.forward_failures.inc();
    }
    answer
}

/// Calls the owner of the ledger; whether it is there and keeps it.
pub async fn call_owner(quotas: &Quotas, owner: u64) -> bool {
    let url = quotas.node.peers.sync_url(owner);
    let Some(url) = url else { return false };
    let body = serde_json::json!({ "from": format!("{:x}", quotas.node.state().version.source) });
    let body = Bytes::from(body.to_string());
    let call = quotas.forwarder.post(&url, OWNER, quotas.node.fleet_token.expose(), body);
    let called = tokio::time::timeout(CALLED_WITHIN, call).await;
    matches!(called, Ok(Ok(Forwarded { status: StatusCode::OK, .. })))
}

/// The owner's answer to a question that was forwarded.
#[derive(Debug)]
pub struct Forwarded {
    /// The HTTP status.
    pub status: StatusCode,
    /// The content type.
    pub kind: HeaderValue,
    /// The body.
    pub body: Bytes,
}

/// A question did not reach the owner of the ledger.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// No owner is known yet.
    #[error("It is not known yet which control plane keeps the limits; ask again.")]
    OwnerUnknown,
    /// The question was forwarded to this control plane, which is not the owner.
    #[error("This control plane does not keep the limits (any more); ask again.")]
    NotOwner,
    /// The owner has not said where it listens.
    #[error("It is not known where the control plane is that keeps the limits.")]
    AddressUnknown,
    /// Where it listens cannot be an address.
    #[error("{0:?} is no address of a control plane's sync port")]
    Address(String),
    /// There was no answer.
    #[error("the control plane that keeps the limits does not answer at {0}: {1}")]
    Call(String, #[source] HttpError),
    /// It took too long.
    #[error("the control plane that keeps the limits does not answer at {0} in time")]
    Late(String),
}

/// Passes questions on.
#[derive(Debug)]
pub struct Forwarder(HttpClient);

impl Default for Forwarder {
    fn default() -> Self {
        Self(HttpClient::keeping_connections(CONNECT_WITHIN))
    }
}

impl Forwarder {
    /// Sends a question to the sync port at `url`, with the fleet token; what was answered.
    ///
    /// # Errors
    /// See [`ForwardError`].
    async fn post(&self, url: &str, path: &str, token: &str, body: Bytes) -> Result<Forwarded, ForwardError> {
        let wrong = || ForwardError::Address(url.to_owned());
        let mut bearer = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| wrong())?;
        bearer.set_sensitive(true);
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}{path}", url.trim_end_matches('/')))
            .header(header::AUTHORIZATION, bearer)
            .header(FORWARDED, "1")
            .body(Full::new(body))
            .map_err(|_| wrong())?;
        let answer = self.0.exchange(request, WITHIN, MAX_BYTES).await.map_err(|error| match error {
            HttpError::Late => ForwardError::Late(url.to_owned()),
            error => ForwardError::Call(url.to_owned(), error),
        })?;
        let kind = answer.headers().get(header::CONTENT_TYPE).cloned();
        let kind = kind.unwrap_or(HeaderValue::from_static("application/json"));
        Ok(Forwarded { status: answer.status(), kind, body: answer.into_body() })
    }
}
