//! `/api/admin/feature_flags`: the rollout from V1 to V2.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use super::request::{self, Body, Waits};
use super::{Caller, actor, json};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::commands::rollout::{self as commands, RolloutError};
use crate::model::rollout::Past;
use crate::model::rollout::Pasts;
use crate::model::rollout::document::{self, Edit, percent};
use crate::model::state;
use crate::platform::clock;

pub async fn show(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    tagged(json(StatusCode::OK, shown(&app, &state)), &state.pasts)
}

/// The document with what happened to it last, and what came of it.
fn shown(app: &ApiState, state: &state::State) -> Value {
    let mut members = document::show(&state.flags, state.has_v1, app.clock.now_s());
    members.insert("last_change".into(), state.pasts.last().map_or(Value::Null, past));
    members.insert("metrics".into(), counts(app));
    Value::Object(members)
}

fn past(past: &Past) -> Value {
    json!({
        "at": clock::rfc3339_ms(past.at_ms),
        "by": past.actor,
        "reason": past.flags.cause,
        "strategy": past.flags.rollout.strategy.label(),
        "percentage": percent(past.flags.share_at(past.at_ms / 1_000)),
        "guard": past.flags.guard,
    })
}

pub async fn history(State(app): State<Arc<ApiState>>) -> Response {
    let changes: Vec<Value> = app.state().pasts.iter().map(past).collect();
    json(StatusCode::OK, json!({ "changes": changes }))
}

pub async fn replace(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let asked: Value = request::body(&bytes)?;
    let edit = Edit::read(&asked).map_err(RolloutError::Invalid)?;
    let expected = request::if_match(&headers);
    let command = move |view: &View<'_>| commands::edit(view, edit, expected);
    let (_, committed) = app.writer.submit(&caller.author(), command).await??;
    let state = app.state();
    app.metrics.rollout.show(&state.flags, state.has_v1, app.clock.now_s());
    let answer = request::finish(&app, committed, waits, StatusCode::OK, shown(&app, &state)).await;
    Ok(tagged(answer, &state.pasts))
}

pub async fn metrics(State(app): State<Arc<ApiState>>) -> Response {
    let mut answer = counts(&app);
    answer["by_endpoint"] = json!(app.telemetry.by_endpoint());
    json(StatusCode::OK, answer)
}

pub async fn reset(State(app): State<Arc<ApiState>>, Extension(caller): Extension<Caller>) -> Response {
    let now_ms = app.clock.now_ms();
    app.telemetry.reset_rollout(now_ms);
    app.telemetry.write(now_ms / 1_000).await;
    tracing::warn!(by = actor(&caller.0), "the rollout's counts begin anew");
    json(StatusCode::OK, counts(&app))
}

/// Since they were begun anew.
pub fn counts(app: &ApiState) -> Value {
    let (before, since_ms) = app.telemetry.rollout_reset();
    let others = app.redis.as_ref().map(|redis| redis.counted_by_others()).unwrap_or_default();
    let mut counts = app.telemetry.tally().since(before).plus(others).show();
    counts["since"] = json!((since_ms > 0).then(|| clock::rfc3339_ms(since_ms)));
    counts["last_updated"] = json!(clock::rfc3339_ms(app.clock.now_ms()));
    counts
}

fn tagged(mut response: Response, pasts: &Pasts) -> Response {
    if let Ok(value) = HeaderValue::from_str(&request::etag(commands::revision(pasts))) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}
