//! How the control plane fares, for load balancers and Prometheus. No key is needed, so nothing secret and
//! nothing about keys stands here.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::{canary, json};
use crate::app::App;
use crate::rotation::driver;
use crate::secret::SecretState;
use crate::secret::ring::NoSigner;

/// What is wrong, if anything.
fn reasons(app: &App) -> Vec<String> {
    let mut reasons = Vec::new();
    if app.metrics.journal_failures.get() > 0 {
        reasons.push("the journal could not be written; changes are refused until a restart".into());
    }
    if app.metrics.journal_reserve.get() == 0.0 {
        reasons.push("the disk of the journal is full; only changes that end keys are taken".into());
    }
    if let Some(mirror) = &app.mirror {
        let status = mirror.status();
        if !status.connected || status.error.is_some() {
            let error = status.error.unwrap_or_else(|| "not connected yet".into());
            reasons.push(format!("Redis: {error}; changes are in the journal only"));
        }
        reasons.extend(status.problems.into_iter().map(|(_, problem)| format!("Redis: {problem}")));
        let peers = status.peers.into_iter().filter_map(|peer| peer.error);
        reasons.extend(peers.map(|error| format!("Redis: {error}")));
    }
    let state = app.state();
    let progress = app.driver.progress();
    if progress.stalled {
        let missing = progress.missing.join(", ");
        reasons.push(format!("secrets: a rotation waits for {missing}; the secret before goes on signing"));
    }
    if let Some(failure) = progress.failure {
        reasons.push(format!("secrets: {failure}"));
    }
    for record in state.secrets.locked().filter(|record| record.state != SecretState::Expired) {
        let (kid, stage) = (&record.kid, record.state.label());
        reasons
            .push(format!("secrets: {kid} ({stage}) cannot be opened here: its data key has not come yet"));
    }
    if let Err(NoSigner::Locked | NoSigner::None) = state.secrets.signer() {
        reasons.push("secrets: the one that signs cannot be used here; no key can be issued".into());
    }
    if !app.config.canary.proxies.is_empty() {
        let health = canary::health(app);
        if !matches!(health.status, "healthy" | "no_data") {
            reasons.push(format!("canaries: {}, see /api/admin/canary/health", health.status));
        }
    }
    let fleet = app.fleet.summary(&state, &app.deltas);
    if fleet.behind > 0 {
        let (behind, live) = (fleet.behind, fleet.live);
        reasons.push(format!("{behind} of {live} proxies do not enforce the newest version yet"));
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

#[derive(Debug, Deserialize)]
pub struct Verbose {
    verbose: Option<String>,
}

/// Whether it can be used. What does not keep it from its work makes it `degraded`, and is told with `?verbose`.
pub async fn readyz(State(app): State<Arc<App>>, Query(Verbose { verbose }): Query<Verbose>) -> Response {
    if app.metrics.journal_failures.get() > 0 {
        return json(
            StatusCode::SERVICE_UNAVAILABLE,
            serde_json::json!({ "status": "not ready", "journal": "sealed" }),
        );
    }
    let reasons = reasons(&app);
    let status = if reasons.is_empty() { "ready" } else { "degraded" };
    let store = if app.mirror.is_some() { "redis" } else { "embedded" };
    let mut answer = serde_json::json!({ "status": status, "journal": "ok", "store": store });
    if let Some(mirror) = &app.mirror {
        let connected = mirror.status().connected;
        answer["redis"] = (if connected { "connected" } else { "unreachable" }).into();
    }
    if verbose.is_some() {
        answer["reasons"] = serde_json::json!(reasons);
        answer["version"] = serde_json::json!(app.state().version);
        if let Some(mirror) = &app.mirror {
            answer["redis"] = serde_json::json!(mirror.status());
        }
    }
    json(StatusCode::OK, answer)
}

pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let state = app.state();
    for (role, live) in state.census.live(app.clock.now_s()) {
        if app.config.roles.contains_key(role) {
            app.metrics.active_keys.with_label_values(&[role]).set(as_f64(live));
        }
    }
    app.metrics.show_fleet(app.fleet.summary(&state, &app.deltas));
    app.metrics.snapshot_bytes.set(as_f64(state.snapshot_bytes() as u64));
    app.metrics.snapshot_age.set(state.published.elapsed().as_secs_f64());
    app.metrics.revocations.set(as_f64(state.revocations.len() as u64));
    app.metrics.state_seq.set(as_f64(state.version.seq));
    let now = app.clock.now_s();
    app.metrics.show_canary(&canary::health(&app), app.canary.history().last_run_ms());
    app.metrics.show_secrets(&state.secrets, driver::next_at(&app, &state), now);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.text()).into_response()
}

/// Counts below 2^53 are exact.
#[allow(clippy::cast_precision_loss)]
fn as_f64(count: u64) -> f64 {
    count as f64
}
