//! The HTTP API: one table of operations, from which both the router and `/openapi.json` are made, so that
//! the two cannot differ. An operation with a scope is behind the check of that scope; there is no other way
//! to add one.

mod approvals;
mod audit;
mod auth;
mod canary;
mod emergency;
mod explain;
pub mod feature_flags;
mod fleet;
mod health;
pub mod in_flight;
mod keys;
mod masked;
mod openapi;
mod policy;
mod rate_limits;
mod request;
mod revocations;
mod secrets;
mod state;
#[cfg(test)]
mod world;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::HttpBody as _;
use axum::extract::{DefaultBodyLimit, FromRequest as _, MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post, put};
use keygate_core::decide::cache::Verified;
use keygate_core::decide::policy::Route;
use tracing::Instrument as _;

use crate::http::problem::Problem;
use crate::model::key::{KeyRecord, KeyState};
use crate::platform::clock;
use crate::platform::trace::{self, Trace};
use crate::secrets::record::Ring;

use self::in_flight::Permit;
use self::request::Body;
pub use self::state::ApiState;
pub use request::{Body as RequestBody, Caller, authenticate};

/// The most bytes of a request's body.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// Who may call an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Anybody.
    Nothing,
    /// Whoever has a key; the operation is about that key.
    Key,
    /// Whoever has a key with this scope.
    Scope(&'static str),
}

/// One operation.
pub struct Operation {
    verb: &'static str,
    path: &'static str,
    summary: &'static str,
    needs: Needs,
    /// The parameters of the query.
    query: &'static [(&'static str, &'static str)],
    /// An example of the body, if it takes one.
    body: Option<&'static str>,
    /// The status of success.
    success: u16,
    /// What 202 means, if it may be the answer.
    accepted: Option<&'static str>,
    handler: MethodRouter<Arc<ApiState>>,
}

const WAIT: &[(&str, &str)] = &[
    ("wait", "`applied`: answer when every proxy enforces the change"),
    ("timeout", "how long to wait for that, such as `5s` (the default)"),
];
const REPLACE_POLICY: &[(&str, &str)] = &[
    WAIT[0],
    WAIT[1],
    ("dry_run", "`true`: check it and say what would change"),
    ("allow_warnings", "`true`: take also what is legal but hardly meant, such as a policy without a route"),
];
const READ: Needs = Needs::Scope("admin:read");
const WRITE: Needs = Needs::Scope("admin:write");
const MANAGE: Needs = Needs::Scope("system:manage");

/// Every operation.
fn operations() -> Vec<Operation> {
    let op = |verb: &'static str, path, needs, summary, handler: MethodRouter<Arc<ApiState>>| Operation {
        verb,
        path,
        summary,
        needs,
        query: &[],
        body: None,
        success: 200,
        accepted: None,
        handler,
    };
    let waits = |op: Operation| Operation { query: WAIT, ..op };
    let takes = |body: &'static str, op: Operation| Operation { body: Some(body), ..op };
    vec![
        Operation {
            success: 201,
            ..takes(
                r#"{"name": "billing service", "role": "basic", "scopes": ["chat:read"], "owner": "team-7", "metadata": {}, "expires_in": "24h"}"#,
                op(
                    "post",
                    "/api/auth/register",
                    Needs::Key,
                    "Issue a key; the caller's role must allow it. One that is no administrator's shares its limit with the key, and \
                     makes no more keys in an hour than its limit has units: 429 with Retry-After",
                    post(auth::register),
                ),
            )
        },
        op(
            "get",
            "/api/auth/validate",
            Needs::Key,
            "Say whether the key in the header counts",
            get(auth::validate),
        ),
        waits(op(
            "post",
            "/api/auth/refresh",
            Needs::Key,
            "Renew the key in the header, within 24 h before it expires",
            post(auth::refresh),
        )),
        waits(op("post", "/api/auth/revoke", Needs::Key, "Revoke the key in the header", post(auth::revoke))),
        op(
            "get",
            "/.well-known/jwks.json",
            Needs::Nothing,
            "The public keys that verify keys (RFC 7517)",
            get(secrets::jwks),
        ),
        op(
            "get",
            "/.well-known/keygate",
            Needs::Nothing,
            "The issuer, the fleet's id and the ids of the secrets whose keys are accepted, to compare with a key before it is sent",
            get(secrets::identity),
        ),
        Operation {
            query: &[
                ("role", "only keys of this role"),
                ("owner", "only keys of this owner"),
                ("state", "only keys that are `active`, `suspended`, `revoked` or `expired`"),
                ("cursor", "where the page before ended"),
                ("limit", "keys of a page, 1 to 1000 (100 is the default)"),
            ],
            ..op("get", "/api/admin/keys", READ, "List keys", get(keys::list))
        },
        op("get", "/api/admin/keys/{id}", READ, "Show a key", get(keys::show)),
        waits(takes(
            r#"{"reason": "compromised", "with_successors": true}"#,
            op(
                "post",
                "/api/admin/keys/{id}/revoke",
                WRITE,
                "Revoke a key, for good; with the keys that renewed it if `with_successors`, which is the default for `compromised`",
                post(keys::revoke),
            ),
        )),
        waits(takes(
            r#"{"reason": "under investigation"}"#,
            op("post", "/api/admin/keys/{id}/suspend", WRITE, "Suspend a key", post(keys::suspend)),
        )),
        waits(op("post", "/api/admin/keys/{id}/resume", WRITE, "End a suspension", post(keys::resume))),
        op(
            "get",
            "/api/admin/secrets/status",
            READ,
            "The signing secrets; never their material",
            get(secrets::status),
        ),
        Operation {
            success: 202,
            ..waits(takes(
                r#"{"reason": "scheduled_quarterly", "immediate": false}"#,
                op(
                    "post",
                    "/api/admin/secrets/rotate",
                    MANAGE,
                    "Begin a rotation to a new signing secret; `immediate` ends the old one at once, `dry_run` counts the \
                     keys that end with it, `algorithm` goes over to another, `secret` is an HS256 secret made elsewhere \
                     (base64url), `propagation_timeout` how long proxies may take to know it",
                    post(secrets::rotate),
                ),
            ))
        },
        waits(op(
            "delete",
            "/api/admin/secrets/rotate",
            MANAGE,
            "Cancel the rotation, as long as its secret signs nothing",
            delete(secrets::cancel),
        )),
        waits(takes(
            r#"{"justification": "proxy-7 is being replaced"}"#,
            op(
                "post",
                "/api/admin/secrets/rotate/force",
                MANAGE,
                "Have the new secret sign without waiting for the proxies that do not know it; they refuse its keys",
                post(secrets::force),
            ),
        )),
        op("get", "/api/admin/policy", READ, "The route policy; its version is the ETag", get(policy::show)),
        Operation {
            query: REPLACE_POLICY,
            ..takes(
                r#"{"mode": "enforce", "routes": [{"name": "home", "path": "/", "access": "public"}]}"#,
                op(
                    "put",
                    "/api/admin/policy",
                    WRITE,
                    "Replace the members named of the route policy; honours If-Match. A cost above a limit that applies to its \
                     route is refused",
                    put(policy::replace),
                ),
            )
        },
        op(
            "get",
            "/api/admin/rate_limits",
            READ,
            "How much keys may do, by role, by key and by owner, and clients on public routes",
            get(rate_limits::show),
        ),
        op(
            "get",
            "/api/admin/rate_limits/usage",
            READ,
            "The keys (`key_id`), and owners (`owner`, with `role` where they share that role's), that use the greatest part of \
             their limits, as far as proxies have told",
            get(rate_limits::usage),
        ),
        waits(takes(
            r#"{"roles": {"basic": 200, "contributor": {"requests": 50, "window": "1s"}}, "keys": {"key_…": -1}, "owners": {"acme": 500}, "public": {"requests": 3, "window": "1m", "ipv6_prefix": 56}}"#,
            op(
                "put",
                "/api/admin/rate_limits",
                WRITE,
                "Set the limits that are named: a number an hour, or with a window; -1 is unlimited, null as configured. One below \
                 the cost of a route that it applies to is refused",
                put(rate_limits::replace),
            ),
        )),
        waits(takes(
            r#"{"limits": {"basic": 1000, "node_operator": -1}, "ttl": "1h"}"#,
            op(
                "post",
                "/api/admin/rate_limits/emergency",
                MANAGE,
                "Override limits of roles for a time, an hour unless told; they come back by themselves",
                post(rate_limits::override_for_a_time),
            ),
        )),
        waits(op(
            "post",
            "/api/admin/rate_limits/ledger/takeover",
            MANAGE,
            "Have this control plane divide limits among proxies, when the one that did is gone for good",
            post(rate_limits::take_over),
        )),
        waits(op(
            "delete",
            "/api/admin/rate_limits/emergency",
            MANAGE,
            "Lift that before its end",
            delete(rate_limits::lift_override),
        )),
        op(
            "get",
            "/api/admin/feature_flags",
            READ,
            "The rollout from V1 to V2; its version is the ETag",
            get(feature_flags::show),
        ),
        waits(takes(
            r#"{"strategy": "percentage", "percentage": 25, "reason": "week 2"}"#,
            op(
                "put",
                "/api/admin/feature_flags",
                WRITE,
                "Change the members named of the rollout; honours If-Match. Strategies are off, canary, percentage, gradual, full",
                put(feature_flags::replace),
            ),
        )),
        op(
            "get",
            "/api/admin/feature_flags/history",
            READ,
            "Who changed the rollout, when and why, the last change first",
            get(feature_flags::history),
        ),
        op(
            "get",
            "/api/admin/feature_flags/metrics",
            READ,
            "How many requests went to which version, and what became of them",
            get(feature_flags::metrics),
        ),
        op(
            "post",
            "/api/admin/feature_flags/metrics/reset",
            WRITE,
            "Begin these counts anew; those for Prometheus go on",
            post(feature_flags::reset),
        ),
        waits(takes(
            r#"{"key_ids": ["key_…"], "jtis": ["…"], "reason": "compromised"}"#,
            op(
                "post",
                "/api/admin/revocations",
                WRITE,
                "Revoke many at once, by key id or token id, also ids not known here",
                post(revocations::revoke_many),
            ),
        )),
        Operation {
            accepted: Some("Nothing is revoked yet: it hits so many keys that another key must approve it"),
            ..waits(takes(
                r#"{"scope": {"role": "basic", "created_before": "2026-01-01T00:00:00Z"}, "dry_run": true, "reason": "emergency"}"#,
                op(
                    "post",
                    "/api/admin/emergency/revoke",
                    MANAGE,
                    "Revoke every key of a scope that was issued within a time, but the caller's own; a dry run counts them; \
                     `break_glass`, a justification, does without the second approval",
                    post(emergency::cut_off),
                ),
            ))
        },
        waits(op(
            "delete",
            "/api/admin/emergency/revoke/{id}",
            MANAGE,
            "Lift such a revocation",
            delete(emergency::lift_cut_off),
        )),
        waits(op(
            "post",
            "/api/admin/emergency/approvals/{id}",
            MANAGE,
            "Approve such a revocation that another key asked for, with a key older than the request",
            post(approvals::approve),
        )),
        op(
            "delete",
            "/api/admin/emergency/approvals/{id}",
            MANAGE,
            "Withdraw such a revocation that waits for its approval",
            delete(approvals::withdraw),
        ),
        Operation {
            query: &[
                ("reason", "only revocations for this reason"),
                ("role", "only of keys of this role"),
                ("key_id", "only of this key"),
                ("jti", "only of this token"),
                ("by", "only those that this key ordered"),
                ("cursor", "where the page before ended"),
                ("limit", "revocations of a page, 1 to 1000 (100 is the default)"),
            ],
            ..op(
                "get",
                "/api/admin/revocations",
                READ,
                "What was revoked, the last one first",
                get(revocations::history),
            )
        },
        waits(op(
            "post",
            "/api/admin/revocations/cleanup",
            WRITE,
            "Forget the revocations of keys that have expired; done by itself every few minutes",
            post(revocations::cleanup),
        )),
        waits(op(
            "post",
            "/api/admin/revocations/rebuild",
            WRITE,
            "Have every proxy take the whole revocation set over anew",
            post(revocations::rebuild),
        )),
        op(
            "get",
            "/api/admin/revocations/stats",
            READ,
            "How much is revoked, and what that costs a proxy",
            get(revocations::stats),
        ),
        op(
            "get",
            "/api/admin/emergency",
            READ,
            "What emergency measures are in force, and what waits for an approval",
            get(emergency::show),
        ),
        waits(takes(
            r#"{"ttl": "1h", "exempt_roles": ["admin"]}"#,
            op(
                "post",
                "/api/admin/emergency/lockdown",
                MANAGE,
                "Refuse every key but those of exempt roles, for a time",
                post(emergency::lock_down),
            ),
        )),
        waits(op(
            "delete",
            "/api/admin/emergency/lockdown",
            MANAGE,
            "Lift the lockdown before its end",
            delete(emergency::lift),
        )),
        Operation {
            query: &[
                ("actor", "only what this key did, or `system`"),
                ("action", "only changes of this type, such as `key_revoked`"),
                ("target", "only changes of this key, token, cut-off or secret, by its id"),
                ("owner", "only changes about keys of this owner, by name or by the hash that is shown"),
                ("reason", "only changes made for this reason"),
                ("since", "not before this time, such as `2026-01-01T00:00:00Z`"),
                ("until", "before this time"),
                ("cursor", "where the page before ended"),
                ("limit", "records of a page, 1 to 1000 (100 is the default)"),
            ],
            ..op("get", "/api/admin/audit", READ, "Who changed what, the last change first", get(audit::list))
        },
        op(
            "get",
            "/api/admin/audit/verify",
            READ,
            "Check that the audit log is whole and unchanged; reads all of it",
            get(audit::verify),
        ),
        op(
            "get",
            "/api/admin/canary/health",
            READ,
            "What the canary tests of the last five minutes say",
            get(canary::health_of),
        ),
        op(
            "post",
            "/api/admin/canary/run",
            WRITE,
            "Run every canary test now, and say what came of it",
            post(canary::run),
        ),
        op("get", "/api/admin/canary/tests", READ, "The canary tests", get(canary::list)),
        takes(
            r#"{"id": "chat", "name": "Chat answers", "endpoint": "/api/chat", "method": "GET", "expected_status": 200, "timeout": "5s", "critical": true, "assertions": [{"header": "content-type", "contains": "json"}]}"#,
            Operation {
                success: 201,
                ..op(
                    "post",
                    "/api/admin/canary/tests",
                    WRITE,
                    "Define a canary test, or put it in place of the one with its id",
                    post(canary::put),
                )
            },
        ),
        op(
            "delete",
            "/api/admin/canary/tests/{id}",
            WRITE,
            "Remove a canary test, also one that is there from the start",
            delete(canary::remove),
        ),
        Operation {
            query: &[
                ("test_id", "only results of this test"),
                ("limit", "results, 1 to 1000 (100 is the default)"),
            ],
            ..op(
                "get",
                "/api/admin/canary/results",
                READ,
                "What canary tests came to, the last one first",
                get(canary::results),
            )
        },
        op("get", "/api/admin/fleet", READ, "The proxies and what they enforce", get(fleet::list)),
        takes(
            r#"{"proxy": "edge-7"}"#,
            op(
                "post",
                "/api/admin/fleet/drain",
                MANAGE,
                "Have a proxy that is about to end give back what it has of limits; it answers 503 to limited keys then",
                post(fleet::drain),
            ),
        ),
        takes(
            r#"{"token": "…", "method": "GET", "path": "/api/chat"}"#,
            op(
                "post",
                "/api/admin/explain",
                READ,
                "How a request would be decided, step by step",
                post(explain::explain),
            ),
        ),
        op("get", "/health", Needs::Nothing, "Whether all is well, and if not, why", get(health::health)),
        op("get", "/livez", Needs::Nothing, "Whether the process lives", get(health::livez)),
        Operation {
            query: &[(
                "verbose",
                "whatever its value: each dependency under `checks`, `ok` or `failed` and why; with `Accept: text/plain` a \
                 line for each, such as `[+]journal ok`",
            )],
            ..op("get", "/readyz", Needs::Nothing, "Whether changes are taken", get(health::readyz))
        },
        op("get", "/metrics", Needs::Nothing, "Metrics, for Prometheus", get(health::metrics)),
        op("get", "/openapi.json", Needs::Nothing, "This description", get(openapi::document)),
        op("get", "/docs", Needs::Nothing, "This description, for people", get(openapi::page)),
    ]
}

/// The API's routes.
pub fn router(app: Arc<ApiState>) -> Router {
    let mut router = Router::new();
    for operation in operations() {
        let handler = match operation.needs {
            Needs::Nothing => operation.handler,
            // These decide about the key themselves, once the body is there.
            Needs::Key => {
                operation.handler.route_layer(middleware::from_fn_with_state(Arc::clone(&app), of_key))
            }
            Needs::Scope(scope) => {
                let route = Arc::new(Route::keyed(operation.path, &[scope]));
                operation.handler.route_layer(middleware::from_fn_with_state(
                    Arc::clone(&app),
                    move |app: State<Arc<ApiState>>, request: Request, next: Next| {
                        let route = Arc::clone(&route);
                        async move { admitted(app, &route, request, next).await }
                    },
                ))
            }
        };
        router = router.route(operation.path, handler);
    }
    router
        .fallback(|| async { Problem::not_found("There is no such path; /docs lists what there is.") })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                "This path does not take that method; see /docs.",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(logged))
        .with_state(app)
}

/// Lets a request pass that has a key, whatever it may; the operation decides that. Without a genuine key no body is read.
async fn of_key(State(app): State<Arc<ApiState>>, request: Request, next: Next) -> Response {
    let permit = match request::genuine_key(&app, request.headers()) {
        Some(key) => app.in_flight.enter(&key.claims.sub).map(Some),
        None if request.body().is_end_stream() => Ok(None),
        None => authenticate(&app, request.headers(), &Route::keyed("key", &[])).map(|_| None),
    };
    match permit {
        Ok(_permit) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

/// Lets a request pass whose key has the operation's scope, before its body is read and when it is there.
async fn admitted(State(app): State<Arc<ApiState>>, route: &Route, request: Request, next: Next) -> Response {
    match with_caller(&app, route, request).await {
        Ok((request, _permit)) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

/// The request with its caller, once all of it has come.
async fn with_caller(app: &ApiState, route: &Route, request: Request) -> Result<(Request, Permit), Problem> {
    let mut caller = authenticate(app, request.headers(), route)?;
    let permit = app.in_flight.enter(actor(&caller.0))?;
    let mut request = request;
    if !request.body().is_end_stream() {
        let (parts, body) = request.into_parts();
        let Body(bytes) = Body::from_request(Request::from_parts(parts.clone(), body), &()).await?;
        // The key may have been ended while the body was on its way.
        caller = authenticate(app, &parts.headers, route)?;
        request = Request::from_parts(parts, bytes.into());
    }
    request.extensions_mut().insert(caller);
    Ok((request, permit))
}

/// One line a request: never a header, a body or a query, in all of which there may be keys; but for the trace that it
/// belongs to, which all lines have that come of it, and which the caller is told.
async fn logged(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let trace = Trace::of(request.headers());
    let span = tracing::info_span!(target: "keygate::access", "request", trace_id = %trace);
    let mut response = trace.with(next.run(request)).instrument(span.clone()).await;
    let path = path.as_ref().map_or("-", MatchedPath::as_str);
    let micros = started.elapsed().as_micros();
    span.in_scope(|| {
        tracing::debug!(target: "keygate::access", %method, path, status = response.status().as_u16(), micros);
    });
    if let Ok(part) = HeaderValue::try_from(trace.part()) {
        response.headers_mut().insert(trace::HEADER, part);
    }
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// A key as the API shows it: everything but the token. With its secret it ends, whatever its own state is.
fn key_view(key: &KeyRecord, ring: &Ring, now: u64) -> serde_json::Value {
    let secret_state = ring.get(&key.kid).map(|held| ring.state_of(held));
    let mut view = serde_json::json!({
        "key_id": key.key_id,
        "jti": key.jti,
        "kid": key.kid,
        "secret_state": secret_state,
        "name": key.name,
        "role": key.role,
        "scopes": key.scopes,
        "owner": key.owner,
        "limit_role": key.holder().limit_role,
        "registered_by": key.registered_by,
        "metadata": key.metadata,
        "state": key.state(now),
        "issued_at": clock::rfc3339(key.issued_at),
        "expires_at": clock::rfc3339(key.expires_at),
        "refresh_after": clock::rfc3339(key.refresh_after()),
        "renews": key.renews,
        "renewed_by": key.renewed_by,
    });
    if let Some(revoked) = &key.revoked {
        view["revoked"] = serde_json::json!({
            "at": clock::rfc3339(revoked.at), "reason": revoked.reason, "by": revoked.by,
        });
    }
    if let Some(suspended) = key.suspended.as_ref().filter(|_| key.state(now) == KeyState::Suspended) {
        view["suspended"] = serde_json::json!({
            "at": clock::rfc3339(suspended.at), "reason": suspended.reason, "by": suspended.by,
        });
    }
    view
}

/// The key's id of a caller, for the journal.
fn actor(key: &Verified) -> &str {
    &key.claims.sub
}

/// JSON with a status.
pub(crate) fn json(status: StatusCode, body: serde_json::Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}
