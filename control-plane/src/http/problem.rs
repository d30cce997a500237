//! Errors over HTTP: problem documents (RFC 9457) with a stable `code`. A client gets a sentence; the cause
//! goes to the log, once, here.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use keygate_core::decide::policy::Policy;
use keygate_core::decide::refusal::Refusal;

use crate::durability::store::StoreError;
use crate::durability::writer::CommitError;
use crate::model::RecordsError;
use crate::model::approval::ApprovalError;
use crate::model::commands::RevisionMismatch;
use crate::model::commands::canary::TestError;
use crate::model::commands::emergency::CutoffError;
use crate::model::commands::keys::{IssueError, KeyError};
use crate::model::commands::limits::LimitsError;
use crate::model::commands::policy::{self, PolicyError};
use crate::model::commands::rollout::RolloutError;
use crate::model::commands::rotation::RotationError;
use crate::model::key::KeyRequestError;
use crate::model::route_cost::CostAboveLimit;
use crate::platform::clock;
use crate::secrets::record::ring::NoSigner;
use crate::services::issuing::{IssuingError, SignError};
use crate::services::quota::ForwardError;

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

    /// 400: the query or the path cannot be understood; `text` is the framework's.
    pub fn bad_parameter(text: &str) -> Self {
        let said = text.split_once(": ").map_or(text, |(_, what)| what);
        Self::bad_request(format!("The query is not as expected: {said}."))
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

    /// 412: the document was changed since it was read.
    fn version_mismatch(document: &str, error: RevisionMismatch) -> Self {
        let detail = format!("The {document} was changed since it was read; read it again.");
        Self::new(StatusCode::PRECONDITION_FAILED, "version_mismatch", detail)
            .with("etag", format!("\"{}\"", error.current))
    }

    /// 400: a document has errors. `document` is its name with the verb: "limits have".
    fn invalid(document: &str, errors: Vec<String>) -> Self {
        let detail = match errors.as_slice() {
            [only] => format!("{only}; nothing was changed."),
            all => format!("The {document} {} errors; nothing was changed.", all.len()),
        };
        Self::bad_request(detail).with("errors", serde_json::json!(errors))
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
        match &error {
            CommitError::Rules(_) | CommitError::Documents => {
                Self::new(StatusCode::CONFLICT, "rules_do_not_hold", error.to_string())
            }
            // The answer that the key gets from now on.
            CommitError::AuthorEnded { reason, realm } => match reason.refusal() {
                Some(refusal) => Self::refusal(refusal, realm, &[]),
                None => Self::unavailable(error.to_string()),
            },
            CommitError::Journal
            | CommitError::NoSpace
            | CommitError::Inapplicable
            | CommitError::Stopped => Self::unavailable(error.to_string()),
        }
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
            RotationError::Records(error) => error.into(),
        }
    }
}

impl From<RecordsError> for Problem {
    fn from(error: RecordsError) -> Self {
        tracing::error!(%error, "the store cannot be read");
        Self::unavailable("The store cannot be read; retry later.")
    }
}

impl From<KeyError> for Problem {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::Unknown => Self::not_found(error.to_string()),
            KeyError::Revoked => Self::new(StatusCode::CONFLICT, "revoked", error.to_string()),
            KeyError::ReasonTooLong => Self::bad_request(error.to_string()),
            KeyError::Records(error) => error.into(),
        }
    }
}

impl From<IssueError> for Problem {
    fn from(error: IssueError) -> Self {
        let detail = error.to_string();
        match error {
            IssueError::CallerEnded { realm } => Self::refusal(Refusal::InvalidToken, &realm, &[]),
            IssueError::Unknown => Self::not_found(detail),
            IssueError::TooEarly { refresh_after } => {
                let after = clock::rfc3339(refresh_after);
                let detail = format!("This key can be renewed from {after} on.");
                Self::new(StatusCode::BAD_REQUEST, "too_early", detail).with("refresh_after", after)
            }
            IssueError::TooMany { wait_s, .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail)
                    .with_header(header::RETRY_AFTER, wait_s.to_string())
            }
            IssueError::IdempotencyKeyReused => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused", detail)
            }
            IssueError::KeyGone => Self::new(StatusCode::CONFLICT, "key_gone", detail),
            IssueError::NoSigner(error) => error.into(),
            IssueError::Records(error) => error.into(),
        }
    }
}

impl From<IssuingError> for Problem {
    fn from(error: IssuingError) -> Self {
        match error {
            IssuingError::Request(error) => error.into(),
            IssuingError::Command(error) => error.into(),
            IssuingError::NoSigner(error) => error.into(),
            IssuingError::Sign(error) => error.into(),
            IssuingError::Commit(error) => error.into(),
            IssuingError::Rotating => Self::unavailable(error.to_string()),
        }
    }
}

impl From<CutoffError> for Problem {
    fn from(error: CutoffError) -> Self {
        let detail = error.to_string();
        match error {
            CutoffError::TooMany => Self::new(StatusCode::CONFLICT, "too_many_cutoffs", detail),
            CutoffError::TooManyPending => Self::new(StatusCode::CONFLICT, "too_many_approvals", detail),
            CutoffError::InvalidJustification | CutoffError::ReachesFuture => Self::bad_request(detail),
            CutoffError::NotInForce | CutoffError::NotPending => Self::not_found(detail),
            CutoffError::Approval(error) => error.into(),
            CutoffError::Records(error) => error.into(),
        }
    }
}

impl From<LimitsError> for Problem {
    fn from(error: LimitsError) -> Self {
        match error {
            LimitsError::Invalid(errors) => Self::invalid("limits have", errors),
            LimitsError::CostAboveLimit(errors) => errors.into(),
        }
    }
}

impl From<PolicyError> for Problem {
    fn from(error: PolicyError) -> Self {
        let detail = error.to_string();
        match error {
            PolicyError::Revision(error) => Self::version_mismatch("policy", error),
            PolicyError::Invalid(errors) => {
                Self::bad_request(detail).with("errors", serde_json::json!(errors))
            }
            PolicyError::CostAboveLimit(errors) => errors.into(),
            PolicyError::NoRoutes => {
                let errors = serde_json::json!(policy::warnings(&Policy::default()));
                Self::bad_request(detail).with("errors", errors)
            }
            PolicyError::TooLong(_) => Self::bad_request(detail),
        }
    }
}

impl From<RolloutError> for Problem {
    fn from(error: RolloutError) -> Self {
        match error {
            RolloutError::Revision(error) => Self::version_mismatch("rollout", error),
            RolloutError::Invalid(errors) => Self::invalid("rollout has", errors),
        }
    }
}

impl From<TestError> for Problem {
    fn from(error: TestError) -> Self {
        let detail = error.to_string();
        match error {
            TestError::TooMany => Self::new(StatusCode::CONFLICT, "too_many_tests", detail),
            TestError::Unknown => Self::not_found(detail),
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
