//! `/api/admin/keys`: listing, showing, revoking, suspending and resuming keys.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;

use super::request::{self, Because, Body, KeyId, Waits};
use super::{Caller, actor, json, key_view};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::author::Author;
use crate::model::commands::Plan;
use crate::model::commands::keys::{self as commands, KeyError, Revocation, Revoked};
use crate::model::key::{KeyRecord, KeyState, RevocationReason};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    role: Option<String>,
    owner: Option<String>,
    state: Option<KeyState>,
    cursor: Option<String>,
    limit: Option<usize>,
}

pub async fn list(
    State(app): State<Arc<ApiState>>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::bad_parameter(&rejection.body_text()))?;
    let limit = request::limit(query.limit)?;
    let now = app.clock.now_s();
    let store = Arc::clone(&app.store);
    let read = request::read(move || {
        store.keys(query.cursor.as_deref(), limit, |key| {
            query.role.as_ref().is_none_or(|role| *role == key.role)
                && query.owner.as_ref().is_none_or(|owner| key.owner.as_ref() == Some(owner))
                && query.state.is_none_or(|state| state == key.state(now))
        })
    });
    let (keys, more) = read.await??;
    let next_cursor = keys.last().filter(|_| more).map(|key| key.key_id.clone());
    let secrets = Arc::clone(&app.state().secrets);
    let keys: Vec<_> = keys.iter().map(|key| key_view(key, &secrets, now)).collect();
    Ok(json(StatusCode::OK, serde_json::json!({ "keys": keys, "next_cursor": next_cursor })))
}

pub async fn show(State(app): State<Arc<ApiState>>, KeyId(id): KeyId) -> Result<Response, Problem> {
    let key = app.store.key(&id)?.ok_or(KeyError::Unknown)?;
    Ok(json(StatusCode::OK, key_view(&key, &app.state().secrets, app.clock.now_s())))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RevokeBody {
    reason: Option<RevocationReason>,
    with_successors: Option<bool>,
}

pub async fn revoke(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    KeyId(id): KeyId,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let body: RevokeBody = request::body(&bytes)?;
    let reason = body.reason.unwrap_or(RevocationReason::AdminAction);
    let order = Revocation { id, reason, with_successors: body.with_successors };
    revoke_key(&app, &caller, order, waits).await
}

/// Revokes a key in the name of `caller`. One that is revoked already stays as it is; the keys that renewed it are named.
pub async fn revoke_key(
    app: &ApiState,
    caller: &Caller,
    order: Revocation,
    waits: Waits,
) -> Result<Response, Problem> {
    let by = actor(&caller.0).to_owned();
    let command = move |view: &View<'_>| {
        let (changes, revoked) = commands::revoke(view, &order, &by)?;
        let changed: Vec<String> =
            changes.iter().filter_map(|change| change.facts().target).map(Into::into).collect();
        Ok::<_, KeyError>((changes, (revoked, changed)))
    };
    let ((Revoked { key, successors }, changed), committed) =
        app.writer.submit(&caller.author(), command).await??;
    let is_changed = |key: &KeyRecord| changed.contains(&key.key_id);
    for key in std::iter::once(&key).chain(&successors).filter(|key| is_changed(key)) {
        if let Some(revoked) = &key.revoked {
            app.metrics.keys.revoked.with([&key.role, revoked.reason.label()]).inc();
        }
    }
    let now = app.clock.now_s();
    let mut view = key_view(&key, &app.state().secrets, now);
    view["changed"] = is_changed(&key).into();
    let successor = |key: &KeyRecord| serde_json::json!({ "key_id": key.key_id, "state": key.state(now), "changed": is_changed(key) });
    view["successors"] = successors.iter().map(successor).collect();
    Ok(request::finish(app, committed, waits, StatusCode::OK, view).await)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SuspendBody {
    reason: Option<String>,
}

pub async fn suspend(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    KeyId(id): KeyId,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let body: SuspendBody = request::body(&bytes)?;
    let by = actor(&caller.0).to_owned();
    let command = move |view: &View<'_>| commands::suspend(view, &id, body.reason, &by);
    change_key(&app, &caller.author(), waits, command).await
}

pub async fn resume(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    KeyId(id): KeyId,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let author = caller.author_because(reason)?;
    change_key(&app, &author, waits, move |view| commands::resume(view, &id)).await
}

/// Carries out a command about one key, and answers with the key as it is then.
async fn change_key(
    app: &ApiState,
    author: &Author,
    waits: Waits,
    command: impl FnOnce(&View<'_>) -> Plan<KeyRecord, KeyError> + Send + 'static,
) -> Result<Response, Problem> {
    let command = move |view: &View<'_>| {
        let (changes, key) = command(view)?;
        let changed = !changes.is_empty();
        Ok::<_, KeyError>((changes, (key, changed)))
    };
    let ((key, changed), committed) = app.writer.submit(author, command).await??;
    let mut view = key_view(&key, &app.state().secrets, app.clock.now_s());
    view["changed"] = changed.into();
    Ok(request::finish(app, committed, waits, StatusCode::OK, view).await)
}
