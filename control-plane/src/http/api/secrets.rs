//! `/api/admin/secrets`: the signing secrets and their rotation; never their material.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use keygate_core::secret::Secret;
use keygate_core::token::crypto::Algorithm;
use serde::Deserialize;

use super::request::{self, Because, Body, Waits};
use super::{Caller, actor, json};
use crate::config;
use crate::durability::store::StoreError;
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::commands::rotation::{self as commands, Asked, Begun, Order, RotationError};
use crate::model::key::KeyState;
use crate::observe::notify::Kind;
use crate::platform::clock;
use crate::secrets::record::import;
use crate::secrets::record::ring::{Held, Ring};
use crate::secrets::record::{Retire, SecretState};
use crate::services::issuing;
use crate::services::rotation;

fn view(ring: &Ring, held: &Held) -> serde_json::Value {
    let record = &held.record;
    serde_json::json!({
        "version_id": record.kid,
        "state": ring.state_of(held),
        "alg": record.alg,
        "created_at": clock::rfc3339(record.created_at),
        "since": clock::rfc3339(record.since.max(record.created_at)),
        "reason": record.why,
        "retire": record.retire,
        "ends_at": commands::ends_at(ring, held).map(clock::rfc3339),
        "in_hsm": record.in_hsm,
        "open": held.is_open(),
    })
}

pub async fn status(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    let ring = &state.secrets;
    let progress = app.driver.progress();
    let under_way = commands::under_way(ring).map(|held| {
        let is_late = progress.kid.as_deref() == Some(held.record.kid.as_str()) && progress.stalled;
        serde_json::json!({
            "version_id": held.record.kid,
            "state": held.record.state,
            "since": clock::rfc3339(held.record.since),
            "waiting_for": rotation::missing(&app, &state, held),
            "stalled": is_late,
        })
    });
    json(
        StatusCode::OK,
        serde_json::json!({
            "active": ring.active().map(|held| view(ring, held)),
            "versions": ring.all().into_iter().rev().map(|held| view(ring, held)).collect::<Vec<_>>(),
            "rotation": under_way,
            "failure": progress.failure,
            "next_rotation": rotation::next_at(&app, &state).map(clock::rfc3339),
        }),
    )
}

pub async fn jwks(State(app): State<Arc<ApiState>>) -> Response {
    let keys = app.state().secrets.jwks(app.clock.now_s());
    let headers = [(header::CONTENT_TYPE, "application/jwk-set+json"), (header::CACHE_CONTROL, "max-age=60")];
    (headers, serde_json::json!({ "keys": keys }).to_string()).into_response()
}

/// The identity of this control plane: a client compares it with its key before it sends the key.
pub async fn identity(State(app): State<Arc<ApiState>>) -> Response {
    let now = app.clock.now_s();
    let state = app.state();
    let accepted = state.secrets.verification_keys().into_iter();
    let accepted = accepted.filter(|key| key.not_after.is_none_or(|end| now < end)).map(|key| key.kid);
    let body = serde_json::json!({
        "product": "keygate",
        "issuer": app.config.issuer,
        "fleet": app.keys.root().fleet_id(),
        "secrets": accepted.collect::<Vec<_>>(),
    });
    json(StatusCode::OK, body)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RotateBody {
    reason: Option<String>,
    #[serde(default)]
    immediate: bool,
    #[serde(default)]
    dry_run: bool,
    algorithm: Option<String>,
    /// An HMAC secret that was made elsewhere, base64url.
    secret: Option<Secret<String>>,
    propagation_timeout: Option<String>,
}

impl RotateBody {
    /// What is wanted, and how long proxies may take.
    fn read(self, app: &ApiState) -> Result<(Order, bool, Option<Duration>), Problem> {
        let wrong = |name: &str, problem: String| Problem::bad_request(format!("'{name}': {problem}."));
        let why = self.reason.unwrap_or_else(|| commands::UNSAID.into());
        if !commands::is_why(&why) {
            return Err(Problem::bad_request("'reason' must be 1 to 200 printable characters."));
        }
        let usual = if self.secret.is_some() { Algorithm::HS256 } else { app.config.signing.algorithm };
        let alg = match &self.algorithm {
            None => usual,
            Some(name) => Algorithm::from_name(name)
                .ok_or_else(|| Problem::bad_request("'algorithm' must be ES256, EdDSA or HS256."))?,
        };
        if self.secret.is_some() && alg != Algorithm::HS256 {
            return Err(Problem::bad_request(
                "'secret' can only be an HS256 secret; leave it out, and one is made for the algorithm.",
            ));
        }
        if alg != Algorithm::ES256 && app.config.signing.in_hsm && self.secret.is_none() {
            return Err(Problem::bad_request(
                "'algorithm': hsm.signing is set, and the HSM signs with ES256 only.",
            ));
        }
        let imported = self
            .secret
            .map(|text| import::read(text.expose()))
            .transpose()
            .map_err(|error| wrong("secret", error.to_string()))?;
        let propagation_timeout = self
            .propagation_timeout
            .map(|text| config::propagation_timeout(&toml::Value::String(text)))
            .transpose()
            .map_err(|problem| wrong("propagation_timeout", problem))?;
        Ok((
            Order { alg, immediate: self.immediate, why, imported, in_hsm: None },
            self.dry_run,
            propagation_timeout,
        ))
    }
}

/// Begins a rotation, or says what one would end. Who ends the secret of their own key gets another key.
pub async fn rotate(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let body: RotateBody = request::body(&bytes)?;
    let idempotency = request::idempotency(&headers, actor(&caller.0), "rotate", &bytes)?;
    let (order, dry_run, propagation_timeout) = body.read(&app)?;
    let immediate = order.immediate;
    if dry_run {
        let state = app.state();
        let old = state.secrets.active().map(|held| held.record.kid.clone()).unwrap_or_default();
        let ends = what_ends(&app, &old, immediate).await?;
        return Ok(json(StatusCode::OK, serde_json::json!({ "dry_run": true, "ends": ends })));
    }
    // Two control planes that begin at once do not hear of each other in time.
    if app.peers.claim("rotation", app.state().version.source).await == Some(false) {
        return Err(RotationError::Elsewhere.into());
    }
    let failed = |error: &RotationError| {
        if let RotationError::Secret(error) = error {
            rotation::note_failure(&app, "it cannot be begun", &error.to_string());
        }
    };
    let mut order = order;
    if order.imported.is_none() && commands::under_way(&app.state().secrets).is_none() {
        order.in_hsm = rotation::make_in_hsm(&app.node, order.alg).await.inspect_err(failed)?;
    }
    let pair = order.in_hsm.as_ref().map(|pair| pair.kid.clone());
    let needs_pair = app.config.signing.in_hsm && order.imported.is_none();
    let (roles, verified) = (app.config.roles.clone(), Arc::clone(&caller.0));
    let command =
        move |view: &View<'_>| commands::ask(view, order, idempotency, &verified, &roles, needs_pair);
    let submitted = app.writer.submit(&caller.author(), command).await;
    let is_used = |kid: &String| matches!(&submitted, Ok(Ok((asked, _))) if asked.begun.kid == *kid);
    if let Some(kid) = pair.filter(|kid| !is_used(kid)) {
        rotation::discard_in_hsm(&app.node, kid).await;
    }
    let (Asked { begun, renewed }, committed) = submitted?.inspect_err(failed)?;
    let Begun { kid, state, old, replayed, ended, ids: _ } = begun;
    let mut body = serde_json::json!({ "version_id": kid, "state": state, "replaces": old });
    if !replayed {
        app.metrics.secrets.rotations.with(["begun"]).inc();
        tracing::info!(by = actor(&caller.0), kid, old, immediate, "a rotation of secrets was begun");
        if let Some(timeout) = propagation_timeout {
            app.driver.allow(&kid, timeout);
        }
    }
    if let Some(key) = renewed {
        // Should proxies take longer than this waits, the caller still needs it here.
        issuing::wait_for_signer(&app).await;
        let state = app.state();
        if let Some(signer) = state.secrets.get(&key.kid).and_then(Held::signer) {
            body["api_key"] = issuing::token(&app.config, signer, &key).await?.expose().as_str().into();
            body["key_id"] = key.key_id.clone().into();
            body["renews"] = key.renews.clone().into();
            body["expires_at"] = clock::rfc3339(key.expires_at).into();
        }
    }
    if !replayed {
        // It has happened, whatever becomes of the count.
        let ends = what_ends(&app, &old, immediate).await.unwrap_or_else(|problem| {
            tracing::error!(?problem, "the keys that end with a secret cannot be counted");
            serde_json::Value::Null
        });
        if !ended.is_empty() {
            let details =
                vec![("by", actor(&caller.0).to_owned()), ("keys by role", ends["by_role"].to_string())];
            let summary = format!("{} keys ended with their signing secret", ends["keys"]);
            app.notifier.tell(Kind::MassRevocation, summary, details);
        }
        body["ends"] = ends;
    }
    Ok(request::finish(&app, committed, waits, StatusCode::ACCEPTED, body).await)
}

/// How many live keys end with a secret when it is rotated now, and when. The others are not hurt.
async fn what_ends(app: &Arc<ApiState>, old: &str, immediate: bool) -> Result<serde_json::Value, Problem> {
    let now = app.clock.now_s();
    let state = app.state();
    let Some(held) = state.secrets.get(old) else { return Ok(serde_json::Value::Null) };
    let retire = app.config.signing.retire(held.record.alg);
    let end = if immediate { Some(now) } else { app.config.signing.end(retire, now) };
    let (here, kid) = (Arc::clone(app), old.to_owned());
    let by_role = request::read(move || {
        let mut by_role: BTreeMap<String, u64> = BTreeMap::new();
        let Some(end) = end else { return Ok(by_role) };
        here.store.each_key(|key| {
            let lives = matches!(key.state(now), KeyState::Active | KeyState::Suspended);
            if lives && key.kid == kid && key.expires_at > end {
                *by_role.entry(key.role).or_default() += 1;
            }
        })?;
        Ok::<_, StoreError>(by_role)
    });
    let by_role = by_role.await??;
    let retire = if immediate {
        "at_once"
    } else if retire == Retire::AfterOverlap {
        "after_overlap"
    } else {
        "with_last_key"
    };
    Ok(serde_json::json!({
        "retire": retire,
        "at": end.map(clock::rfc3339),
        "keys": by_role.values().sum::<u64>(),
        "by_role": by_role,
    }))
}

/// Ends a rotation whose secret has not signed yet.
pub async fn cancel(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let author = caller.author_because(reason)?;
    let (kid, committed) = app.writer.submit(&author, commands::cancel).await??;
    app.metrics.secrets.rotations.with(["cancelled"]).inc();
    tracing::warn!(by = actor(&caller.0), kid, "a rotation of secrets was cancelled");
    let body = serde_json::json!({ "version_id": kid, "state": SecretState::Expired });
    Ok(request::finish(&app, committed, waits, StatusCode::OK, body).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ForceBody {
    justification: String,
}

/// Has the new secret sign although some proxies may not know it: they refuse its keys until they do.
pub async fn force(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let ForceBody { justification } = request::body(&bytes)?;
    if !commands::is_why(&justification) {
        return Err(Problem::bad_request("'justification' must be 1 to 200 printable characters."));
    }
    let state = app.state();
    let waits_for = state.secrets.rotating().or_else(|| state.secrets.active());
    let without = waits_for.map(|held| rotation::missing(&app, &state, held)).unwrap_or_default();
    let policy = app.config.signing.clone();
    let plan = move |view: &View<'_>| commands::force(view, &policy, justification);
    let (kid, committed) = app.writer.submit(&caller.author(), plan).await??;
    app.metrics.secrets.rotations.with(["forced"]).inc();
    tracing::error!(
        by = actor(&caller.0),
        kid,
        without = without.join(", "),
        "a new secret signs although not every proxy knows it"
    );
    let details = vec![("by", actor(&caller.0).to_owned()), ("without", without.join(", "))];
    app.notifier.tell(
        Kind::RotationForced,
        "a new signing secret signs before every proxy knows it",
        details,
    );
    let body = serde_json::json!({ "version_id": kid, "state": SecretState::Active, "without": without });
    Ok(request::finish(&app, committed, waits, StatusCode::OK, body).await)
}
