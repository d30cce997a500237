//! `/api/admin/feature_flags`: the rollout from V1 to V2.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde_json::{Value, json};

use super::request::{self, Body, Waits};
use super::{Caller, actor, json};
use crate::api::ApiState;
use crate::change::Change;
use crate::clock;
use crate::problem::Problem;
use crate::rollout::document::{self, Edit, Surroundings, percent};
use crate::rollout::{Flags, Past, Pasts};
use crate::state;
use crate::writer::View;

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
    let edit = Edit::read(&asked).map_err(wrong)?;
    let wanted = headers.get(header::IF_MATCH).map(|value| value.as_bytes().to_vec());
    let plan = move |view: &View<'_>| {
        let tag = etag(view.model.pasts());
        if wanted.is_some_and(|wanted| wanted != b"*" && wanted != tag.as_bytes()) {
            return Err(Problem::new(
                StatusCode::PRECONDITION_FAILED,
                "version_mismatch",
                "The rollout was changed since it was read; read it again.",
            )
            .with("etag", tag));
        }
        let current = view.model.flags();
        let around =
            Surroundings { has_v1: view.model.has_v1(), policy: view.model.policy().0, now_s: view.now };
        let flags = edit.apply(current, around).map_err(wrong)?;
        let is_same = Flags { cause: current.cause.clone(), ..flags.clone() } == *current;
        let changes = if is_same && flags.cause.is_none() {
            Vec::new()
        } else {
            vec![Change::RolloutChanged { flags: Box::new(flags) }]
        };
        Ok((changes, ()))
    };
    let ((), committed) = app.writer.submit(actor(&caller.0), plan).await??;
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
    let others = app.mirror.as_ref().map(|mirror| mirror.counted_by_others()).unwrap_or_default();
    let mut counts = app.telemetry.tally().since(before).plus(others).show();
    counts["since"] = json!((since_ms > 0).then(|| clock::rfc3339_ms(since_ms)));
    counts["last_updated"] = json!(clock::rfc3339_ms(app.clock.now_ms()));
    counts
}

fn wrong(errors: Vec<String>) -> Problem {
    let detail = match errors.as_slice() {
        [only] => format!("{only}; nothing was changed."),
        all => format!("The rollout has {} errors; nothing was changed.", all.len()),
    };
    Problem::bad_request(detail).with("errors", json!(errors))
}

fn etag(pasts: &Pasts) -> String {
    format!("\"{}\"", pasts.last().map_or(0, |past| past.seq))
}

fn tagged(mut response: Response, pasts: &Pasts) -> Response {
    if let Ok(value) = HeaderValue::from_str(&etag(pasts)) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response
}
