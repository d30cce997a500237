//! `/api/admin/policy`: the route policy.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use keygate_core::decide::policy::{Mode, Policy, Route};
use keygate_core::decide::rules::MAX_RULES_BYTES;
use serde::Deserialize;

use super::request::{self, Body, Waits};
use super::{Caller, actor, json};
use crate::api::ApiState;
use crate::change::Change;
use crate::problem::Problem;
use crate::route_cost;
use crate::writer::View;

/// What a policy may take of the rules' bytes; the rest of them is small.
const MAX_POLICY_BYTES: usize = MAX_RULES_BYTES - 64 * 1024;

/// The members that are to be replaced.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyChange {
    mode: Option<Mode>,
    routes: Option<Vec<Route>>,
}

pub async fn show(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    tagged(json(StatusCode::OK, serde_json::json!(state.rules.policy)), state.policy_seq)
}

pub async fn replace(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let change: PolicyChange = request::body(&bytes)?;
    let roles = app.config.roles.clone();
    let wanted = headers.get(header::IF_MATCH).map(|value| value.as_bytes().to_vec());
    let plan = move |view: &View<'_>| {
        let (current, seq) = view.model.policy();
        if wanted.is_some_and(|wanted| wanted != b"*" && wanted != etag(seq).as_bytes()) {
            return Err(Problem::new(
                StatusCode::PRECONDITION_FAILED,
                "version_mismatch",
                "The policy was changed since it was read; read it again.",
            )
            .with("etag", etag(seq)));
        }
        let policy = Policy {
            mode: change.mode.unwrap_or(current.mode),
            routes: change.routes.unwrap_or_else(|| current.routes.clone()),
        };
        policy.validate().map_err(|errors| {
            Problem::bad_request(format!("The policy has {} error(s); nothing was changed.", errors.len()))
                .with("errors", serde_json::json!(errors))
        })?;
        let limits = view.model.limits_in_force();
        route_cost::check((current, &limits), (&policy, &limits), &roles, view.now)?;
        let bytes = serde_json::to_vec(&policy).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > MAX_POLICY_BYTES {
            return Err(Problem::bad_request(format!(
                "The policy has {bytes} bytes; at most {MAX_POLICY_BYTES} reach a proxy at once."
            )));
        }
        let changes = if policy == *current {
            Vec::new()
        } else {
            vec![Change::PolicyReplaced { policy: policy.clone() }]
        };
        Ok((changes, policy))
    };
    let (policy, committed) = app.writer.submit(actor(&caller.0), plan).await??;
    app.metrics.begin_routes(&app.config.roles, &policy);
    let answer = request::finish(&app, committed, waits, StatusCode::OK, serde_json::json!(policy)).await;
    Ok(tagged(answer, app.state().policy_seq))
}

fn etag(seq: u64) -> String {
    format!("\"{seq}\"")
}

fn tagged(mut response: Response, seq: u64) -> Response {
    if let Ok(value) = HeaderValue::from_str(&etag(seq)) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}
