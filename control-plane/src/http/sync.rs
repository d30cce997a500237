//! The sync port: proxies ask for news and acknowledge what they enforce.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use keygate_core::quota::{MAX_BYTES, Question};
use keygate_core::revocation::Fingerprint;
use keygate_core::sync::wire::{
    self, Body, FORMAT, MAX_PART_BYTES, MAX_SHARDS_PER_REQUEST, Part, Poll, SHARDS_ANSWER_BYTES, ShardRequest,
};
use keygate_core::telemetry::Report;
use keygate_core::version::Version;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::http::api::ApiState;
use crate::http::api::RequestBody;
use crate::http::api::json;
use crate::http::problem::Problem;
use crate::model::state;
use crate::observe::telemetry::ReportError;
use crate::services::quota::{self, Forwarded, LedgerService, QuotaError};
use crate::services::recovery::{self, RecoveryError};

/// The longest time for which a poll is held back.
const MAX_WAIT: Duration = Duration::from_secs(30);
/// The most bytes of a request.
const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// The most bytes of a report: as many series as it may have, with names as long as they get in practice.
const MAX_REPORT_BYTES: usize = 512 * 1024;
/// How long a proxy may take to give back what it has: it does so within a second, unless it is cut off.
const DRAINED_WITHIN: Duration = Duration::from_secs(4);
const QUOTA: &str = "/sync/v1/quota";
const DRAIN: &str = "/sync/v1/drain";
/// The most characters of a proxy's error that are kept.
const MAX_ERROR_CHARS: usize = 300;
/// The longest node id that is kept.
const MAX_ID_BYTES: usize = 256;

/// Snapshots that were handed out lately, so that a proxy can fetch their shards while the state moves on.
/// Shards are shared between versions; keeping one costs what it has of its own.
#[derive(Debug, Default)]
pub struct Snapshots(Mutex<VecDeque<Arc<state::State>>>);

impl Snapshots {
    const KEPT: usize = 16;

    fn keep(&self, state: Arc<state::State>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.iter().all(|other| other.version != state.version) {
            kept.push_back(state);
        }
        if kept.len() > Self::KEPT {
            kept.pop_front();
        }
    }

    fn find(&self, version: Version) -> Option<Arc<state::State>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().find(|state| state.version == version).cloned()
    }
}

/// The sync port's routes.
pub fn router(app: Arc<ApiState>) -> Router {
    Router::new()
        .route("/sync/v1/poll", post(poll))
        .route("/sync/v1/shards", post(shards))
        .route("/sync/v1/enforced", post(enforced).layer(DefaultBodyLimit::max(MAX_PART_BYTES)))
        .route(DRAIN, post(drain))
        .route(quota::OWNER, post(owner))
        .route(QUOTA, post(units).layer(DefaultBodyLimit::max(MAX_BYTES)))
        .route("/sync/v1/report", post(report).layer(DefaultBodyLimit::max(MAX_REPORT_BYTES)))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), of_fleet))
        .fallback(|| async { Problem::not_found("This port is for proxies: POST /sync/v1/poll.") })
        .layer(DefaultBodyLimit::max(MAX_REQUEST_BYTES))
        .with_state(app)
}

async fn poll(State(app): State<Arc<ApiState>>, RequestBody(body): RequestBody) -> Result<Response, Problem> {
    let mut poll: Poll = read(&body)?;
    poll.last_error = poll.last_error.map(|error| printable(&error));
    check_proxy(poll.format, &poll.proxy.id, &poll.proxy.incarnation)?;
    whole_state(&app).await?;
    let applied = poll.applied;
    let base = applied.filter(|_| !poll.resync);
    let wanted_wait = Duration::from_millis(poll.wait_ms).min(MAX_WAIT);
    let mut states = app.states.clone();
    let state = states.borrow_and_update().clone();
    let standing = applied.map_or(Ok(None), |applied| standing(&app, applied, &state));
    let process = format!("{} {}", poll.proxy.incarnation, poll.proxy.id);
    let polling = app.fleet.heard(poll, &state, standing.is_err(), app.clock.now_ms());
    let covers = standing.map_err(|lacking| {
        let returns = recovery::may_return(&app, &state, lacking.enforced, polling.ahead_for)
            && app.recovery.asks(&process, lacking.enforced);
        lacking.problem(&app, returns)
    })?;
    // Held back no longer than a third of the hard age: a quiet proxy must not look cut off.
    let wait = wanted_wait.min(Duration::from_secs(state.rules.hard_age_s) / 3);
    let mut stopping = app.stopping.clone();
    let news = async {
        while base == Some(states.borrow_and_update().version) {
            if states.changed().await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = news => {}
        () = tokio::time::sleep(wait) => {}
        _ = stopping.wait_for(|stop| *stop) => {}
    }
    let state = whole_state(&app).await?;
    let answer = app.deltas.answer(&state, base, covers, app.clock.now_ms());
    let kind = match &answer.body {
        Body::Snapshot { .. } => {
            app.snapshots.keep(state);
            "snapshot"
        }
        Body::Delta { .. } if base == Some(answer.version) => "current",
        Body::Delta { .. } => "delta",
    };
    drop(polling);
    Ok(octets(&app, kind, answer.encode()))
}

async fn shards(
    State(app): State<Arc<ApiState>>,
    RequestBody(body): RequestBody,
) -> Result<Response, Problem> {
    let request: ShardRequest = read(&body)?;
    if request.format != FORMAT || request.shards.len() > MAX_SHARDS_PER_REQUEST {
        return Err(Problem::bad_request(format!(
            "This control plane reads format {FORMAT}, and gives {MAX_SHARDS_PER_REQUEST} shards at a time."
        )));
    }
    let state = app.snapshots.find(request.version).ok_or_else(|| {
        Problem::new(StatusCode::GONE, "version_gone", "That snapshot is not kept any more; poll again.")
    })?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    for index in &request.shards {
        let shard = state.revocations.shards().get(usize::from(*index));
        let shard = shard.ok_or_else(|| Problem::not_found("There is no such shard."))?;
        bytes += shard.encoded_bytes();
        if !found.is_empty() && bytes > SHARDS_ANSWER_BYTES {
            break;
        }
        found.push(shard.encode());
    }
    Ok(octets(&app, "shards", wire::encode_shards(found.iter().map(Vec::as_slice))))
}

/// A part of the state of a proxy that enforces changes which are lacking here.
async fn enforced(
    State(app): State<Arc<ApiState>>,
    RequestBody(body): RequestBody,
) -> Result<Response, Problem> {
    let part = Part::decode(&body).map_err(|error| Problem::bad_request(error.to_string()))?;
    if let Some(enforced) = app.recovery.take(&part)? {
        // A proxy that gives up waiting does not stop it.
        let (recovery, node) = (Arc::clone(&app.recovery), Arc::clone(&app.node));
        let taken = tokio::spawn(async move { recovery.take_back(&node, enforced).await });
        taken.await.map_err(|_| RecoveryError::Stopping)??;
    }
    Ok(json(StatusCode::OK, serde_json::json!({})))
}

async fn report(
    State(app): State<Arc<ApiState>>,
    RequestBody(body): RequestBody,
) -> Result<Response, Problem> {
    let report: Report = read(&body)?;
    check_proxy(report.format, &report.proxy, &report.incarnation)?;
    let policy = &app.state().rules.policy;
    let receipt = app.telemetry.take(&report, policy, app.clock.now_s()).await;
    receipt.map(|receipt| json(StatusCode::OK, serde_json::json!(receipt))).map_err(|error| match error {
        ReportError::Invalid(why) => Problem::bad_request(why),
        ReportError::NotKept => Problem::unavailable(error.to_string()),
    })
}

/// What a proxy may do of limits: from the ledger, wherever that is kept.
async fn units(
    State(app): State<Arc<ApiState>>,
    headers: HeaderMap,
    RequestBody(body): RequestBody,
) -> Result<Response, Problem> {
    let question = Question::decode(&body).map_err(|error| Problem::bad_request(error.to_string()))?;
    let Some(service) = app.quotas.here() else { return forwarded(&app, &headers, QUOTA, body).await };
    let answer = service.answer(&question, app.stopping.clone()).await.map_err(|error| match error {
        QuotaError::Superseded => Problem::new(StatusCode::CONFLICT, "superseded", error.to_string()),
        QuotaError::NotKept | QuotaError::Over | QuotaError::Suspended => {
            Problem::unavailable(error.to_string())
        }
    })?;
    app.metrics.quota.requests.inc();
    Ok(json(StatusCode::OK, serde_json::json!(answer)))
}

/// The answer of the control plane that keeps the ledger, to a question that came with `headers`. A problem stays one.
async fn forwarded(
    app: &ApiState,
    headers: &HeaderMap,
    path: &str,
    body: Bytes,
) -> Result<Response, Problem> {
    let Forwarded { status, kind, body } = quota::pass_on(&app.quotas, headers, path, body).await?;
    Ok((status, [(header::CONTENT_TYPE, kind)], body).into_response())
}

/// Another control plane's call of the one that keeps the ledger.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CallOfOwner {
    /// Its line of history, in hexadecimal.
    from: String,
}

async fn owner(
    State(app): State<Arc<ApiState>>,
    RequestBody(body): RequestBody,
) -> Result<Response, Problem> {
    let call: CallOfOwner = read(&body)?;
    let from = u64::from_str_radix(&call.from, 16)
        .map_err(|_| Problem::bad_request("'from' must be a hexadecimal number."))?;
    if app.quotas.called_by(from) {
        Ok(json(StatusCode::OK, serde_json::json!({ "owner": true })))
    } else {
        Err(Problem::unavailable("This control plane does not keep the ledger of limits."))
    }
}

/// A proxy that is about to end.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Drain {
    /// [`FORMAT`].
    format: u32,
    /// Its node id.
    proxy: String,
}

async fn drain(
    State(app): State<Arc<ApiState>>,
    headers: HeaderMap,
    RequestBody(body): RequestBody,
) -> Result<Response, Problem> {
    let drain: Drain = read(&body)?;
    check_proxy(drain.format, &drain.proxy, "-")?;
    let Some(service) = app.quotas.here() else { return forwarded(&app, &headers, DRAIN, body).await };
    drained(&service, &drain.proxy).await
}

/// Has a proxy give back what it has of limits, wherever the ledger is kept.
///
/// # Errors
/// When the proxy is not known, or the ledger cannot be asked.
pub async fn drain_proxy(app: &ApiState, proxy: String) -> Result<Response, Problem> {
    let drain = Drain { format: FORMAT, proxy };
    check_proxy(drain.format, &drain.proxy, "-")?;
    let Some(service) = app.quotas.here() else {
        let body = serde_json::to_vec(&drain).unwrap_or_default();
        return forwarded(app, &HeaderMap::new(), DRAIN, body.into()).await;
    };
    drained(&service, &drain.proxy).await
}

async fn drained(service: &LedgerService, proxy: &str) -> Result<Response, Problem> {
    match service.drain(Fingerprint::of(proxy).0, DRAINED_WITHIN).await {
        Some(true) => Ok(json(StatusCode::OK, serde_json::json!({ "proxy": proxy, "drained": true }))),
        Some(false) => {
            Ok(json(StatusCode::ACCEPTED, serde_json::json!({ "proxy": proxy, "drained": false })))
        }
        None => Err(Problem::not_found("No proxy with this node id has a part of the limits.")),
    }
}

/// What a proxy says of an error, cut and without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().take(MAX_ERROR_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Whether a question is in a format that is read here, and of a proxy that has names.
fn check_proxy(format: u32, id: &str, incarnation: &str) -> Result<(), Problem> {
    if format != FORMAT {
        return Err(Problem::bad_request(format!("This control plane reads format {FORMAT} of polls.")));
    }
    let fits = |name: &str| {
        (1..=MAX_ID_BYTES).contains(&name.len()) && name.bytes().all(|b| (b' '..=b'~').contains(&b))
    };
    if !fits(id) || !fits(incarnation) || incarnation.contains(' ') {
        let detail = "The proxy's id and incarnation must be 1 to 256 printable characters of ASCII.";
        return Err(Problem::bad_request(detail));
    }
    Ok(())
}

/// The state, unless what others had is only taken in by half: then there may be a secret and not yet that a key signed
/// with it was revoked. A poll that was held back must ask again when it is answered.
async fn whole_state(app: &ApiState) -> Result<Arc<state::State>, Problem> {
    while app.peers.wait_caught_up().await {
        let before = app.peers.intake();
        let state = app.state();
        // Taking in had not begun, or was done, for as long as it took to look.
        if app.peers.intake() == before {
            return Ok(state);
        }
    }
    Err(Problem::unavailable("This control plane still takes in what others have; poll again."))
}

/// Whether a proxy that enforces a version may take what is here: nothing of it may be lacking. The version itself if it
/// is of another line of history.
fn standing(app: &ApiState, enforced: Version, state: &state::State) -> Result<Option<Version>, Lacking> {
    let have = state.version;
    if enforced.source == have.source && enforced.seq <= have.seq {
        return Ok(None);
    }
    let of_journal = state.lines.get(&enforced.source).max(state.returned.get(&enforced.source));
    let known = app.peers.covered(enforced.source).max(of_journal.copied());
    if known.is_some_and(|covered| enforced.seq <= covered) {
        return Ok(Some(enforced));
    }
    Err(Lacking { enforced, have })
}

/// A proxy enforces changes that are lacking here.
#[derive(Debug, Clone, Copy)]
struct Lacking {
    enforced: Version,
    have: Version,
}

impl Lacking {
    /// The answer; `returns`: the proxy is to return what it enforces.
    fn problem(self, app: &ApiState, returns: bool) -> Problem {
        let Self { enforced, have } = self;
        app.metrics.sync.conflicts.inc();
        if returns {
            tracing::warn!(%enforced, %have, "a proxy enforces changes that are lacking here; it returns what it knows");
        } else if app.recovery.is_to_be_logged(enforced) {
            tracing::error!(
                %enforced, %have,
                "a proxy enforces changes that are lacking here, and keeps what it has until they come"
            );
        }
        let detail =
            format!("The proxy enforces {enforced}, of which this control plane, at {have}, lacks changes.");
        Problem::new(StatusCode::CONFLICT, "proxy_ahead", detail).with("wants_state", returns)
    }
}

impl From<RecoveryError> for Problem {
    fn from(error: RecoveryError) -> Self {
        match error {
            RecoveryError::OutOfOrder => Self::new(StatusCode::CONFLICT, "out_of_order", error.to_string()),
            RecoveryError::TooLarge | RecoveryError::Rules(_) | RecoveryError::Shard(_) => {
                Self::bad_request(error.to_string())
            }
            RecoveryError::Store(error) => error.into(),
            RecoveryError::Commit(error) => error.into(),
            RecoveryError::Secret(_) | RecoveryError::Stopping => Self::unavailable(error.to_string()),
        }
    }
}

/// Lets a request pass that has the fleet token. Without it no body is read.
async fn of_fleet(State(app): State<Arc<ApiState>>, request: Request, next: Next) -> Response {
    match authenticate(&app, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

fn authenticate(app: &ApiState, headers: &HeaderMap) -> Result<(), Problem> {
    let shown =
        headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    // Digests of equal length: how long the comparison takes says nothing about the token.
    let matches = shown
        .is_some_and(|shown| Sha256::digest(shown) == Sha256::digest(app.fleet_token.expose().as_bytes()));
    if matches {
        return Ok(());
    }
    app.metrics.sync.unauthorized.inc();
    Err(Problem::new(StatusCode::UNAUTHORIZED, "invalid_token", "The fleet token is missing or wrong.")
        .with_header(header::WWW_AUTHENTICATE, "Bearer realm=\"keygate fleet\""))
}

fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| Problem::bad_request(error.to_string()))
}

fn octets(app: &ApiState, kind: &'static str, bytes: Vec<u8>) -> Response {
    app.metrics.sync.answered(kind, bytes.len());
    let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::CACHE_CONTROL, "no-store")];
    (headers, bytes).into_response()
}
