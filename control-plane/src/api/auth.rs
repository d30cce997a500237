//! `/api/auth/*`: what the holder of a key can do with it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use keygate_core::cache::Verified;
use keygate_core::decision::Reason;
use keygate_core::policy::Route;
use keygate_core::refusal::Refusal;
use zeroize::Zeroizing;

use super::request::{self, Body, Waits, authenticate, authenticate_or};
use super::{actor, json};
use crate::app::App;
use crate::change::{Change, Idempotency};
use crate::clock;
use crate::key::{self, Creator, Ended, KeyRecord, KeyRequest, RevocationReason};
use crate::metrics::V2;
use crate::problem::Problem;
use crate::random;
use crate::rotation::driver;
use crate::secret::{SecretState, Signer};
use crate::writer::View;

/// A key that was issued now or by the same request before.
struct Issued {
    key: KeyRecord,
    signer: Arc<Signer>,
    replayed: bool,
}

pub async fn register(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let caller = authenticate(&app, &headers, &Route::keyed("register", &[]))?.0;
    let request: KeyRequest = request::body(&bytes)?;
    let idempotency = request::idempotency(&headers, actor(&caller), "register", &bytes)?;
    let roles = app.config.roles.clone();
    let creator = Arc::clone(&caller);
    driver::wait_for_signer(&app).await;
    let plan = move |view: &View<'_>| {
        if let Some(issued) = replay(view, idempotency.as_ref())? {
            return Ok((Vec::new(), issued));
        }
        let signer = signer(view)?;
        let key = request.record(creator_of(&creator), &roles, random::identity(), &signer.kid, view.now)?;
        let change = Change::KeyIssued { key: Box::new(key.clone()), idempotency };
        Ok::<_, Problem>((vec![change], Issued { key, signer, replayed: false }))
    };
    let (issued, committed) = app.writer.submit(actor(&caller), plan).await??;
    if !issued.replayed {
        app.metrics.created.with_label_values(&[issued.key.role.as_str(), V2]).inc();
    }
    let view = issued_view(&app, &issued).await?;
    Ok(request::finish(&app, committed, Waits::for_nobody(), StatusCode::CREATED, view).await)
}

pub async fn validate(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, Problem> {
    match authenticate(&app, &headers, &Route::keyed("validate", &[])) {
        Ok(caller) => {
            let claims = &caller.0.claims;
            // Only roles of the configuration are labels: the set must stay closed.
            let role =
                if app.config.roles.contains_key(&claims.role) { claims.role.as_str() } else { "unknown" };
            app.metrics.validated.with_label_values(&[role, V2, "success"]).inc();
            let scopes: Vec<&str> = claims.scope.split_terminator(' ').collect();
            Ok(json(
                StatusCode::OK,
                serde_json::json!({
                    "valid": true,
                    "key_id": claims.sub,
                    "role": claims.role,
                    "scopes": scopes,
                    "expires_at": clock::rfc3339(claims.exp),
                }),
            ))
        }
        Err(problem) => {
            app.metrics.validated.with_label_values(&["unknown", V2, "failure"]).inc();
            Err(problem)
        }
    }
}

pub async fn refresh(
    State(app): State<Arc<App>>,
    waits: Waits,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let route = Route::keyed("refresh", &[]);
    // The renewal itself revokes this key. Whoever did not get the answer asks again with it.
    let again = headers.contains_key("idempotency-key");
    let caller = authenticate_or(&app, &headers, &route, |reason| again && reason == Reason::Revoked)?.0;
    let refusal = Problem::refusal(Refusal::InvalidToken, &app.state().rules.realm, &[]);
    let role = caller.claims.role.clone();
    let count = |success: &str| {
        if app.config.roles.contains_key(&role) {
            app.metrics.refreshed.with_label_values(&[role.as_str(), success]).inc();
        }
    };
    let idempotency = request::idempotency(&headers, actor(&caller), "refresh", &bytes)?;
    let (key_id, by) = (caller.claims.sub.clone(), caller.claims.sub.clone());
    let configured = app.config.roles.get(&role).cloned();
    driver::wait_for_signer(&app).await;
    let plan = move |view: &View<'_>| {
        let old = view.key(&key_id)?.ok_or_else(|| Problem::not_found("This key is not known here."))?;
        let renewed = old.revoked.as_ref().is_some_and(|ended| ended.reason == RevocationReason::Rotation);
        if renewed && let Some(issued) = replay(view, idempotency.as_ref())? {
            return Ok((Vec::new(), issued));
        }
        if old.revoked.is_some() {
            return Err(refusal);
        }
        // A key whose secret signs no more may end before its time.
        let is_previous =
            view.model.secrets().get(&old.kid).is_some_and(|held| held.record.state == SecretState::Previous);
        if view.now < old.refresh_after() && !is_previous {
            let after = clock::rfc3339(old.refresh_after());
            let detail = format!("This key can be renewed from {after} on.");
            return Err(
                Problem::new(StatusCode::BAD_REQUEST, "too_early", detail).with("refresh_after", after)
            );
        }
        let signer = signer(view)?;
        let key = key::renewal(&old, configured.as_ref(), random::identity(), &signer.kid, view.now);
        let ended = Ended { at: view.now, reason: RevocationReason::Rotation, by };
        let changes = vec![
            Change::KeyIssued { key: Box::new(key.clone()), idempotency },
            Change::revoking(&old, ended),
        ];
        Ok((changes, Issued { key, signer, replayed: false }))
    };
    let submitted =
        app.writer.submit(actor(&caller), plan).await.map_err(Problem::from).and_then(|done| done);
    let (issued, committed) = submitted.inspect_err(|_| count("false"))?;
    if !issued.replayed {
        count("true");
        let role = issued.key.role.as_str();
        app.metrics.created.with_label_values(&[role, V2]).inc();
        app.metrics.revoked.with_label_values(&[role, RevocationReason::Rotation.label()]).inc();
    }
    let view = issued_view(&app, &issued).await?;
    Ok(request::finish(&app, committed, waits, StatusCode::OK, view).await)
}

pub async fn revoke(
    State(app): State<Arc<App>>,
    waits: Waits,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let caller = authenticate(&app, &headers, &Route::keyed("revoke", &[]))?.0;
    super::keys::revoke_key(&app, actor(&caller), actor(&caller), RevocationReason::UserRequest, waits).await
}

fn creator_of(key: &Verified) -> Creator<'_> {
    Creator { role: &key.claims.role, scopes: &key.claims.scope, owner: key.claims.own.as_deref() }
}

fn signer(view: &View<'_>) -> Result<Arc<Signer>, Problem> {
    Ok(Arc::clone(view.model.secrets().signer()?))
}

/// The key that the same request created before, if it did.
fn replay(view: &View<'_>, idempotency: Option<&Idempotency>) -> Result<Option<Issued>, Problem> {
    let Some(idempotency) = idempotency else { return Ok(None) };
    let Some(seen) = view.request(&idempotency.request_id)? else { return Ok(None) };
    if seen.body != idempotency.body {
        return Err(Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "idempotency_key_reused",
            "This Idempotency-Key was used for another request; choose a new one.",
        ));
    }
    let gone = || {
        Problem::new(
            StatusCode::CONFLICT,
            "key_gone",
            "The key that this request created cannot be shown again.",
        )
    };
    let key = view.key(&seen.made)?.ok_or_else(gone)?;
    let signer = signer(view)?;
    if signer.kid != key.kid {
        return Err(gone()); // Its secret signs no more.
    }
    Ok(Some(Issued { key, signer, replayed: true }))
}

async fn issued_view(app: &App, issued: &Issued) -> Result<serde_json::Value, Problem> {
    let key = &issued.key;
    let token = token(app, &issued.signer, key).await?;
    Ok(serde_json::json!({
        "api_key": token.as_str(),
        "key_id": key.key_id,
        "jti": key.jti,
        "name": key.name,
        "role": key.role,
        "scopes": key.scopes,
        "owner": key.owner,
        "issued_at": clock::rfc3339(key.issued_at),
        "expires_at": clock::rfc3339(key.expires_at),
        "refresh_after": clock::rfc3339(key.refresh_after()),
        "renews": key.renews,
        "metadata": key.metadata,
    }))
}

/// The token of a key.
pub async fn token(app: &App, signer: &Arc<Signer>, key: &KeyRecord) -> Result<Zeroizing<String>, Problem> {
    let claims = key.claims(&app.config.issuer, app.config.audience.as_deref());
    let signed = if signer.takes_long() {
        let signer = Arc::clone(signer);
        request::read(move || signer.sign(&claims)).await?
    } else {
        signer.sign(&claims)
    };
    signed.map_err(|error| {
        tracing::error!(%error, "a key cannot be signed");
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "unavailable",
            format!("The key cannot be signed: {error}."),
        )
    })
}
