//! Errors over HTTP: problem documents (RFC 9457) with a stable `code`. A client gets a sentence; the cause
//! goes to the log, once, here.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use keygate_core::decide::refusal::Refusal;

use crate::approval::ApprovalError;
use crate::issuing::SignError;
use crate::key::KeyRequestError;
use crate::quota::ForwardError;
use crate::rotation::RotationError;
use crate::route_cost::CostAboveLimit;
use crate::secret::ring::NoSigner;
use crate::store::StoreError;
use crate::writer::CommitError;

/// An error for a client.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    headers: Vec<(HeaderName, String)>,
    members: Vec<(&'static str, serde_json::Value)>,
    /// The refusal that it is, whose body is then the very same as a proxy's.
    refusal: Option<Refusal>,
}

impl Problem {
    /// An error with a status, a code and a sentence.
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into(), headers: Vec::new(), members: Vec::new(), refusal: None }
    }

    /// 400: the request cannot be understood.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", detail)
    }

    /// 503: it cannot be done at the moment.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
    }

    /// 404: there is no such thing.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", detail)
    }

    /// The same refusal as a proxy gives, for `scopes` of a route.
    pub fn refusal(refusal: Refusal, realm: &str, scopes: &[String]) -> Self {
        let status = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        let mut problem = Self::new(status, refusal.code(), refusal.detail());
        problem.refusal = Some(refusal);
        if let Some(challenge) = refusal.challenge(realm, scopes) {
            problem = problem.with_header(header::WWW_AUTHENTICATE, challenge);
        }
        problem
    }

    /// With a header.
    pub fn with_header(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// With another member.
    pub fn with(mut self, name: &'static str, value: impl Into<serde_json::Value>) -> Self {
        self.members.push((name, value.into()));
        self
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut body = serde_json::json!({
            "type": "about:blank",
            "title": self.status.canonical_reason().unwrap_or_default(),
            "status": self.status.as_u16(),
            "code": self.code,
            "detail": self.detail,
        });
        for (name, value) in self.members {
            body[name] = value;
        }
        let body = self.refusal.map_or_else(|| body.to_string(), Refusal::body);
        let headers =
            [(header::CONTENT_TYPE, "application/problem+json"), (header::CACHE_CONTROL, "no-store")];
        let mut response = (self.status, headers, body).into_response();
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(name, value);
            }
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "the store cannot be read");
        Self::unavailable("The store cannot be read; retry later.")
    }
}

impl From<CommitError> for Problem {
    fn from(error: CommitError) -> Self {
        if let CommitError::Rules(_) = error {
            return Self::new(StatusCode::CONFLICT, "rules_do_not_hold", error.to_string());
        }
        Self::unavailable(error.to_string())
    }
}

/// Costs of routes that are above a limit.
impl From<Vec<CostAboveLimit>> for Problem {
    fn from(errors: Vec<CostAboveLimit>) -> Self {
        let first = errors.first().map(ToString::to_string).unwrap_or_default();
        let more = match errors.len() {
            0 | 1 => String::new(),
            count => format!(" ({} more in 'errors')", count - 1),
        };
        Self::bad_request(format!("{first}{more}; nothing was changed."))
            .with("errors", serde_json::json!(errors))
    }
}

impl From<ForwardError> for Problem {
    fn from(error: ForwardError) -> Self {
        Self::unavailable(error.to_string())
    }
}

impl From<SignError> for Problem {
    fn from(error: SignError) -> Self {
        match error {
            SignError::Secret(error) => {
                tracing::error!(%error, "a key cannot be signed");
                Self::unavailable(format!("The key cannot be signed: {error}."))
            }
            SignError::Stopped => Self::unavailable("Retry later."),
        }
    }
}

impl From<NoSigner> for Problem {
    fn from(error: NoSigner) -> Self {
        Self::unavailable(format!("{error}."))
    }
}

impl From<RotationError> for Problem {
    fn from(error: RotationError) -> Self {
        let detail = format!("{error}.");
        match error {
            RotationError::InProgress(_) | RotationError::JustBegun(_) | RotationError::Elsewhere => {
                Self::new(StatusCode::CONFLICT, "rotation_in_progress", detail)
            }
            RotationError::None => Self::new(StatusCode::CONFLICT, "no_rotation", detail),
            RotationError::TooLate(_) => Self::new(StatusCode::CONFLICT, "too_late", detail),
            RotationError::TooMany => Self::new(StatusCode::CONFLICT, "too_many_secrets", detail),
            RotationError::KeyReused => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused", detail)
            }
            RotationError::Secret(error) => {
                tracing::error!(%error, "a secret cannot be made or moved on");
                Self::unavailable(detail)
            }
            RotationError::Store(error) => error.into(),
        }
    }
}

impl From<ApprovalError> for Problem {
    fn from(error: ApprovalError) -> Self {
        let (status, code) = match error {
            ApprovalError::OwnRequest => (StatusCode::FORBIDDEN, "own_request"),
            ApprovalError::KeyTooNew => (StatusCode::FORBIDDEN, "key_too_new"),
            ApprovalError::RequesterEnded => (StatusCode::CONFLICT, "requester_ended"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<KeyRequestError> for Problem {
    fn from(error: KeyRequestError) -> Self {
        let detail = error.to_string();
        match error {
            KeyRequestError::Invalid(errors) => Self::bad_request(detail).with("errors", errors),
            KeyRequestError::ScopeNotHeld(_) => Self::new(StatusCode::FORBIDDEN, "scope_not_held", detail),
            KeyRequestError::OwnerNotAllowed => Self::new(StatusCode::FORBIDDEN, "owner_not_allowed", detail),
            KeyRequestError::RoleNotAllowed { .. } => {
                Self::new(StatusCode::FORBIDDEN, "role_not_allowed", detail)
            }
        }
    }
}
