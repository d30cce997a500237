//! How the control plane fares, for load balancers and Prometheus. No key is needed, so nothing secret and
//! nothing about keys stands here.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::json;
use crate::app::App;

/// What is wrong, if anything.
fn reasons(app: &App) -> Vec<String> {
    let mut reasons = Vec::new();
    if app.metrics.journal_failures.get() > 0 {
        reasons.push("the journal could not be written; changes are refused until a restart".into());
    }
    if app.metrics.journal_reserve.get() == 0.0 {
        reasons.push("the disk of the journal is full; only changes that end keys are taken".into());
    }
    let (total, behind) = app.fleet.counts(&app.state());
    if behind > 0 {
        reasons.push(format!("{behind} of {total} proxies do not enforce the newest version yet"));
    }
    reasons
}

pub async fn health(State(app): State<Arc<App>>) -> Response {
    let reasons = reasons(&app);
    let status = match (app.metrics.journal_failures.get() > 0, reasons.is_empty()) {
        (true, _) => "unhealthy",
        (false, false) => "degraded",
        (false, true) => "healthy",
    };
    let code = if status == "unhealthy" { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let version = app.state().version;
    json(code, serde_json::json!({ "status": status, "reasons": reasons, "version": version }))
}

pub async fn livez() -> Response {
    json(StatusCode::OK, serde_json::json!({ "status": "alive" }))
}

pub async fn readyz(State(app): State<Arc<App>>) -> Response {
    if app.metrics.journal_failures.get() > 0 {
        return json(
            StatusCode::SERVICE_UNAVAILABLE,
            serde_json::json!({ "status": "not ready", "journal": "sealed" }),
        );
    }
    json(StatusCode::OK, serde_json::json!({ "status": "ready", "journal": "ok", "store": "embedded" }))
}

pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let state = app.state();
    for (role, live) in state.census.live(app.clock.now_s()) {
        if app.config.roles.contains_key(role) {
            app.metrics.active_keys.with_label_values(&[role]).set(as_f64(live));
        }
    }
    let (total, behind) = app.fleet.counts(&state);
    app.metrics.fleet_proxies.set(as_f64(total as u64));
    app.metrics.fleet_behind.set(as_f64(behind as u64));
    app.metrics.revocations.set(as_f64(state.revocations.len() as u64));
    app.metrics.state_seq.set(as_f64(state.version.seq));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.text()).into_response()
}

/// Counts below 2^53 are exact.
#[allow(clippy::cast_precision_loss)]
fn as_f64(count: u64) -> f64 {
    count as f64
}
