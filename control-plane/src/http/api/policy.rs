//! `/api/admin/policy`: the route policy.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use keygate_core::decide::policy::{Mode, Route};
use serde::Deserialize;

use super::request::{self, Body, Waits};
use super::{Caller, audit, json};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::commands::policy::{self as commands, Options, Replaced};

/// The members that are to be replaced.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyChange {
    mode: Option<Mode>,
    routes: Option<Vec<Route>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplaceQuery {
    wait: Option<String>,
    timeout: Option<String>,
    #[serde(default)]
    allow_warnings: bool,
    #[serde(default)]
    dry_run: bool,
}

pub async fn show(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    tagged(json(StatusCode::OK, serde_json::json!(state.rules.policy)), state.policy_seq)
}

pub async fn replace(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<ReplaceQuery>, QueryRejection>,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::bad_parameter(&rejection.body_text()))?;
    let waits = Waits::new(query.wait, query.timeout)?;
    let (change, reason): (PolicyChange, _) = request::order(&bytes)?;
    let author = caller.author_because(reason)?;
    let roles = app.config.roles.clone();
    let options = Options {
        expected: request::if_match(&headers),
        allow_warnings: query.allow_warnings,
        dry_run: query.dry_run,
    };
    let command = move |view: &View<'_>| commands::replace(view, change.mode, change.routes, options, &roles);
    let (Replaced { before, policy }, committed) = app.writer.submit(&author, command).await??;
    let mut body = serde_json::json!(policy);
    let changes = audit::differences(&serde_json::json!(before), &body);
    body["warnings"] = serde_json::json!(commands::warnings(&policy));
    body["changes"] = changes.into();
    if query.dry_run {
        body["dry_run"] = true.into();
        return Ok(tagged(json(StatusCode::OK, body), app.state().policy_seq));
    }
    app.telemetry.note_routes(&policy);
    let answer = request::finish(&app, committed, waits, StatusCode::OK, body).await;
    Ok(tagged(answer, app.state().policy_seq))
}

fn tagged(mut response: Response, seq: u64) -> Response {
    if let Ok(value) = HeaderValue::from_str(&request::etag(seq)) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}
