//! Passes a proxy's question on to the control plane that keeps the ledger. Over HTTP and not through Redis, so that limits
//! hold while Redis is away.

use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use keygate_core::quota::MAX_BYTES;

/// Says that a question was passed on already, so that it is not passed on in a circle.
pub const PASSED_ON: &str = "keygate-passed-on";
/// A question is held back for 3 s; a proxy waits for 5 s.
const WITHIN: Duration = Duration::from_millis(4_500);
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// Why a question did not get there.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Where it listens cannot be an address.
    #[error("{0:?} is no address of a control plane's sync port")]
    Address(String),
    /// There was no answer.
    #[error("the control plane that keeps the limits does not answer at {0}: {1}")]
    Call(String, String),
    /// It took too long.
    #[error("the control plane that keeps the limits does not answer at {0} in time")]
    Late(String),
}

/// Passes questions on.
#[derive(Debug)]
pub struct Forwarder(Client<HttpConnector, Full<Bytes>>);

impl Default for Forwarder {
    fn default() -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_WITHIN));
        connector.set_nodelay(true);
        Self(Client::builder(TokioExecutor::new()).build(connector))
    }
}

impl Forwarder {
    /// Sends a question to the sync port at `url`, with the fleet token; what was answered.
    ///
    /// # Errors
    /// See [`ForwardError`].
    pub async fn post(
        &self,
        url: &str,
        path: &str,
        token: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), ForwardError> {
        let wrong = || ForwardError::Address(url.to_owned());
        let mut bearer = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| wrong())?;
        bearer.set_sensitive(true);
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}{path}", url.trim_end_matches('/')))
            .header(header::AUTHORIZATION, bearer)
            .header(PASSED_ON, "1")
            .body(Full::new(body))
            .map_err(|_| wrong())?;
        let failed = |error: String| ForwardError::Call(url.to_owned(), error);
        let call = async {
            let response = self.0.request(request).await.map_err(|error| failed(causes(&error)))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
            Ok((status, body.map_err(|error| failed(error.to_string()))?.to_bytes()))
        };
        tokio::time::timeout(WITHIN, call).await.map_err(|_| ForwardError::Late(url.to_owned()))?
    }
}

/// An error and what it comes from.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
