//! `/api/admin/canary`: tests through the proxies, and what they come to.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;

use super::request::{self, Because, Body, KeyId, Waits};
use super::{Caller, json};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::canary::Test;
use crate::model::canary::TestRequest;
use crate::model::commands::canary as commands;
use crate::services::canary::runner;

pub async fn health_of(State(app): State<Arc<ApiState>>) -> Response {
    json(StatusCode::OK, serde_json::json!(runner::health(&app.canary)))
}

pub async fn run(State(app): State<Arc<ApiState>>) -> Result<Response, Problem> {
    if app.config.canary.proxies.is_empty() {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "no_proxies",
            "No proxies are named to be tested: set canary.urls.",
        ));
    }
    let results = runner::run_once(&app.canary, true).await;
    let (total, passed) = (results.len(), results.iter().filter(|result| result.passed).count());
    #[allow(clippy::cast_precision_loss)] // There are some hundreds.
    let rate = if total == 0 { 0.0 } else { (passed as f64 / total as f64 * 1_000.0).round() / 10.0 };
    let statistics =
        serde_json::json!({ "total": total, "passed": passed, "failed": total - passed, "pass_rate": rate });
    let body = serde_json::json!({ "statistics": statistics, "results": results, "health": runner::health(&app.canary) });
    Ok(json(StatusCode::OK, body))
}

pub async fn list(State(app): State<Arc<ApiState>>) -> Response {
    let tests: Vec<_> = runner::tests(&app.canary).iter().map(view).collect();
    json(StatusCode::OK, serde_json::json!({ "tests": tests }))
}

fn view(test: &Test) -> serde_json::Value {
    let mut view = serde_json::json!(test);
    if let Some(members) = view.as_object_mut() {
        members.remove("timeout_ms");
        let timeout = std::time::Duration::from_millis(test.timeout_ms);
        members.insert("timeout".into(), humantime::format_duration(timeout).to_string().into());
    }
    view
}

pub async fn put(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let (request, reason): (TestRequest, _) = request::order(&bytes)?;
    let author = caller.author_because(reason)?;
    let test = request
        .test(&app.config.canary.allowed)
        .map_err(|wrong| Problem::bad_request(format!("{}.", wrong.join("; "))).with("errors", wrong))?;
    let (endpoint, added) = (app.config.canary.app_endpoint.clone(), test.clone());
    let command = move |view: &View<'_>| commands::put(view, &endpoint, added);
    let ((), committed) = app.writer.submit(&author, command).await??;
    Ok(request::finish(&app, committed, Waits::for_nobody(), StatusCode::CREATED, view(&test)).await)
}

pub async fn remove(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    KeyId(id): KeyId,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let author = caller.author_because(reason)?;
    let (endpoint, removed) = (app.config.canary.app_endpoint.clone(), id.clone());
    let command = move |view: &View<'_>| commands::remove(view, &endpoint, &id);
    let ((), committed) = app.writer.submit(&author, command).await??;
    let body = serde_json::json!({ "removed": removed });
    Ok(request::finish(&app, committed, Waits::for_nobody(), StatusCode::OK, body).await)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Results {
    test_id: Option<String>,
    limit: Option<usize>,
}

pub async fn results(
    State(app): State<Arc<ApiState>>,
    query: Result<Query<Results>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::bad_parameter(&rejection.body_text()))?;
    let results = app.canary.history().results(query.test_id.as_deref(), request::limit(query.limit)?);
    Ok(json(StatusCode::OK, serde_json::json!({ "results": results })))
}
