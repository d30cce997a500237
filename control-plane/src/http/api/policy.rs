//! `/api/admin/policy`: the route policy.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use keygate_core::decide::policy::{Mode, Route};
use serde::Deserialize;

use super::request::{self, Body, Waits};
use super::{Caller, json};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::commands::policy as commands;

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
    let (change, reason): (PolicyChange, _) = request::order(&bytes)?;
    let author = caller.author_because(reason)?;
    let roles = app.config.roles.clone();
    let expected = request::if_match(&headers);
    let command =
        move |view: &View<'_>| commands::replace(view, change.mode, change.routes, expected, &roles);
    let (policy, committed) = app.writer.submit(&author, command).await??;
    app.telemetry.note_routes(&policy);
    let answer = request::finish(&app, committed, waits, StatusCode::OK, serde_json::json!(policy)).await;
    Ok(tagged(answer, app.state().policy_seq))
}

fn tagged(mut response: Response, seq: u64) -> Response {
    if let Ok(value) = HeaderValue::from_str(&request::etag(seq)) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}
