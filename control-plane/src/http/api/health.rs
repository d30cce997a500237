//! How the control plane fares, for load balancers and Prometheus. No key is needed, so nothing secret and
//! nothing about keys stands here.

use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::json;
use crate::http::api::ApiState;
use crate::model::state;
use crate::platform::clock;
use crate::redis_store::Status;
use crate::secrets::record::SecretState;
use crate::secrets::record::ring::NoSigner;
use crate::services::canary::runner;
use crate::services::rotation;

/// Something that this control plane needs, or that depends on it.
#[derive(Debug, Serialize)]
struct Check {
    /// Its name for machines.
    name: &'static str,
    /// `ok` or `failed`.
    status: &'static str,
    /// What is wrong with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
    /// A remark although nothing is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

impl Check {
    fn new(name: &'static str, reasons: Vec<String>) -> Self {
        Self { name, status: if reasons.is_empty() { "ok" } else { "failed" }, reasons, note: None }
    }

    /// A line as Kubernetes writes it.
    fn line(&self) -> String {
        if self.reasons.is_empty() {
            let note = self.note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
            return format!("[+]{} ok{note}\n", self.name);
        }
        format!("[-]{} failed: {}\n", self.name, self.reasons.join("; "))
    }
}

/// How everything fares, each once.
fn checks(app: &ApiState) -> Vec<Check> {
    let state = app.state();
    let mut checks = vec![Check::new("journal", of_journal(app)), Check::new("store", of_store(app))];
    if let Some(redis) = &app.redis {
        checks.push(Check::new("redis", of_redis(&redis.status())));
    }
    checks.push(Check::new("rotation", of_rotation(app)));
    checks.push(Check::new("keyring", of_keyring(&state)));
    if !app.config.canary.proxies.is_empty() {
        let status = runner::health(&app.canary).status;
        let is_well = matches!(status, "healthy" | "no_data");
        let wrong = (!is_well).then(|| format!("canaries: {status}, see /api/admin/canary/health"));
        checks.push(Check::new("canary", wrong.into_iter().collect()));
    }
    if app.config.enforces_limits {
        checks.push(of_limits(app));
    }
    let fleet = app.fleet.summary(&state, &app.deltas);
    let (behind, live) = (fleet.behind, fleet.live);
    let wrong =
        (behind > 0).then(|| format!("{behind} of {live} proxies do not enforce the newest version yet"));
    checks.push(Check::new("proxies", wrong.into_iter().collect()));
    checks
}

fn of_journal(app: &ApiState) -> Vec<String> {
    let status = app.writer.status();
    let mut reasons = Vec::new();
    if status.is_sealed() {
        reasons.push("the journal could not be written; changes are refused until a restart".into());
    }
    if !status.reserve_ok {
        reasons.push("the disk of the journal is full; only changes that end keys are taken".into());
    }
    reasons
}

/// What waits for the store is tried again with the next change, but after some failures only a restart helps.
fn of_store(app: &ApiState) -> Vec<String> {
    let waiting = app.writer.status().store_backlog;
    let waits = (waiting > 0)
        .then(|| format!("store: {waiting} changes wait to be taken; they are in the journal, and a restart has it take them"));
    let unread = app.store.key("readyz").err().map(|error| format!("store: it cannot be read: {error}"));
    waits.into_iter().chain(unread).collect()
}

fn of_redis(status: &Status) -> Vec<String> {
    let mut reasons = Vec::new();
    if !status.connected || status.error.is_some() {
        let error = status.error.as_deref().unwrap_or("not connected yet");
        reasons.push(format!("Redis: {error}; changes are in the journal only"));
    }
    reasons.extend(status.problems.iter().map(|(_, problem)| format!("Redis: {problem}")));
    let peers = status.peers.iter().filter_map(|peer| peer.error.as_deref());
    reasons.extend(peers.map(|error| format!("Redis: {error}")));
    reasons
}

fn of_rotation(app: &ApiState) -> Vec<String> {
    let progress = app.driver.progress();
    let mut reasons = Vec::new();
    if progress.stalled {
        let missing = progress.missing.join(", ");
        reasons.push(format!("secrets: a rotation waits for {missing}; the secret before goes on signing"));
    }
    reasons.extend(progress.failure.map(|failure| format!("secrets: {failure}")));
    let state = app.state();
    if let Err(NoSigner::Unannounced) = state.secrets.signer()
        && let Some(active) = state.secrets.active()
    {
        let (missing, hard_age) = (rotation::missing(app, &state, active), state.rules.hard_age_s);
        let since = active.record.since.max(app.started_s);
        let until = clock::rfc3339(since.saturating_add(hard_age));
        reasons.push(format!(
            "secrets: no key can be issued until the new secret is known to {}; those that are gone are waited for until {until}",
            if missing.is_empty() { "all".to_owned() } else { missing.join(", ") }
        ));
    }
    reasons
}

fn of_keyring(state: &state::State) -> Vec<String> {
    let mut reasons = Vec::new();
    for record in state.secrets.locked().filter(|record| record.state != SecretState::Expired) {
        let (kid, stage) = (&record.kid, record.state.label());
        reasons
            .push(format!("secrets: {kid} ({stage}) cannot be opened here: its data key has not come yet"));
    }
    if let Err(NoSigner::Locked | NoSigner::None) = state.secrets.signer() {
        reasons.push("secrets: the one that signs cannot be used here; no key can be issued".into());
    }
    reasons
}

fn of_limits(app: &ApiState) -> Check {
    let Some(doubts) = app.quotas.doubts() else { return Check::new("limits", Vec::new()) };
    let mut reasons = Vec::new();
    if doubts.suspended {
        reasons.push(
            "limits: neither Redis nor every other control plane can be reached; proxies go by their shares"
                .into(),
        );
    }
    if !doubts.recovers_in.is_zero() {
        let seconds = doubts.recovers_in.as_secs().saturating_add(1);
        reasons.push(format!(
            "limits: proxies tell what they have; for {seconds} s, no proxy gets more units of a limit"
        ));
    }
    let silent = doubts.silent.len();
    let note = (silent > 0).then(|| {
        format!("{silent} proxies not heard of for 3 s go by their shares; after 30 s what they have is free")
    });
    Check { note, ..Check::new("limits", reasons) }
}

/// What is wrong, if anything.
fn reasons(checks: &[Check]) -> Vec<&str> {
    checks.iter().flat_map(|check| check.reasons.iter().map(String::as_str)).collect()
}

pub async fn health(State(app): State<Arc<ApiState>>) -> Response {
    let checks = checks(&app);
    let reasons = reasons(&checks);
    let status = match (app.writer.status().is_sealed(), reasons.is_empty()) {
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

/// Whether it can be used. What does not keep it from its work makes it `degraded`, and is told with `?verbose`: as JSON,
/// or as text with a line for each, as Kubernetes writes it, if that is accepted.
pub async fn readyz(
    State(app): State<Arc<ApiState>>,
    Query(Verbose { verbose }): Query<Verbose>,
    headers: HeaderMap,
) -> Response {
    let is_verbose = verbose.is_some();
    let checks = checks(&app);
    let reasons = reasons(&checks);
    let (code, status) = match (app.writer.status().is_sealed(), reasons.is_empty()) {
        (true, _) => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        (false, false) => (StatusCode::OK, "degraded"),
        (false, true) => (StatusCode::OK, "ready"),
    };
    if is_verbose && wants_text(&headers) {
        let outcome = match status {
            "not ready" => "failed",
            "degraded" => "passed, degraded",
            _ => "passed",
        };
        let text = checks.iter().map(Check::line).chain([format!("readyz check {outcome}\n")]);
        return (code, text.collect::<String>()).into_response();
    }
    let mut answer = serde_json::json!({ "status": status, "journal": "sealed" });
    if code == StatusCode::OK {
        answer["journal"] = "ok".into();
        answer["store"] = (if app.redis.is_some() { "redis" } else { "embedded" }).into();
        if let Some(redis) = &app.redis {
            let connected = redis.status().connected;
            answer["redis"] = (if connected { "connected" } else { "unreachable" }).into();
        }
    }
    if is_verbose {
        answer["checks"] = serde_json::json!(checks);
        answer["reasons"] = serde_json::json!(reasons);
        answer["version"] = serde_json::json!(app.state().version);
        if let Some(redis) = &app.redis {
            answer["redis"] = serde_json::json!(redis.status());
        }
    }
    json(code, answer)
}

/// Whether text is asked for, and JSON is not.
fn wants_text(headers: &HeaderMap) -> bool {
    let accepts = |what: &str| {
        let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
        values
            .flat_map(|value| value.split(','))
            .any(|one| one.split(';').next().map(str::trim) == Some(what))
    };
    accepts("text/plain") && !accepts("application/json")
}

pub async fn metrics(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    for (role, live) in state.census.live(app.clock.now_s()) {
        if app.config.roles.contains_key(role) {
            app.metrics.keys.active.with([role]).set_count(live);
        }
    }
    app.metrics.durability.show(app.writer.status());
    app.metrics.fleet.show(app.fleet.summary(&state, &app.deltas), &state);
    let now = app.clock.now_s();
    app.telemetry.write(now).await;
    app.metrics.quota.show(app.quotas.doubts().as_ref());
    app.metrics.canary.show(&runner::health(&app.canary), app.canary.history().last_run_ms());
    app.metrics.secrets.show(&state.secrets, rotation::next_at(&app, &state), now);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.text()).into_response()
}
