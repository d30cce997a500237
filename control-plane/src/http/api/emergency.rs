//! `/api/admin/emergency`: what is done when there is no time to look at keys one by one.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use keygate_core::decide::cutoff::{Cutoff, Lockdown, Scope};
use serde::Deserialize;

use super::request::{self, Because, Body, KeyId, Waits};
use super::{Caller, actor, approvals, json};
use crate::durability::store::StoreError;
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::approval::{Count, Warrant};
use crate::model::author::Author;
use crate::model::commands::emergency::{self as commands, Order, Ordered};
use crate::model::key::{self, KeyState, RevocationReason};
use crate::model::lockdown;
use crate::model::provenance::{CutoffOrder, Provenance};
use crate::model::state;
use crate::observe::notify::Kind;
use crate::platform::clock;
use crate::platform::random;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CutoffBody {
    #[serde(default)]
    scope: CutoffScope,
    #[serde(default)]
    dry_run: bool,
    reason: Option<RevocationReason>,
    /// What justifies doing without a second approval, should one be needed.
    break_glass: Option<String>,
}

/// Which keys; without any member, all of them.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CutoffScope {
    role: Option<String>,
    owner: Option<String>,
    kid: Option<String>,
    created_before: Option<String>,
    created_after: Option<String>,
}

impl CutoffScope {
    /// The rule. Without `created_before` it hits every key issued until now, this second included.
    fn cutoff(self, app: &ApiState, excluded_key: &str, now: u64) -> Result<Cutoff, Problem> {
        let time = |name: &str, text: Option<String>, default: u64| match text {
            None => Ok(default),
            Some(text) => humantime::parse_rfc3339_weak(&text)
                .ok()
                .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
                .map(|since| since.as_secs())
                .ok_or_else(|| {
                    Problem::bad_request(format!("'{name}' must be a time such as {}.", clock::rfc3339(now)))
                }),
        };
        let created_before = time("created_before", self.created_before, now.saturating_add(1))?;
        let created_after = time("created_after", self.created_after, 0)?;
        if created_after >= created_before {
            return Err(Problem::bad_request("'created_after' must be before 'created_before'."));
        }
        if self.owner.as_ref().is_some_and(|owner| !key::is_owner(owner)) {
            return Err(Problem::bad_request("'owner': that is no owner's id."));
        }
        if self.role.as_ref().is_some_and(|role| !app.config.roles.contains_key(role)) {
            return Err(Problem::bad_request("'role': there is no such role."));
        }
        if self.kid.as_ref().is_some_and(|kid| app.state().secrets.get(kid).is_none()) {
            return Err(Problem::bad_request(
                "'kid': there is no such secret; see /api/admin/secrets/status.",
            ));
        }
        Ok(Cutoff {
            id: format!("cutoff_{}", random::identifier()),
            scope: Scope { role: self.role, owner: self.owner, kid: self.kid },
            created_before,
            created_after,
            excluded_key: Some(excluded_key.into()),
        })
    }
}

pub async fn cut_off(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let body: CutoffBody = request::body(&bytes)?;
    commands::check_justification(body.break_glass.as_deref())?;
    let now = app.clock.now_s();
    let reason = body.reason.unwrap_or(RevocationReason::Emergency);
    let cutoff = body.scope.cutoff(&app, actor(&caller.0), now)?;
    commands::check_reach(&cutoff, now)?;
    // In an emergency nobody waits for a count that nothing depends on: it reads all keys.
    let counted_first = body.dry_run || app.config.second_approval_threshold.is_some();
    let count = if counted_first { hits(&app, &cutoff, now).await? } else { Count::default() };
    let threshold = app.config.second_approval_threshold;
    if body.dry_run {
        let mut answer = order_view(&cutoff, &count);
        answer["dry_run"] = true.into();
        answer["share"] = count.share().into();
        answer["needs_approval"] = count.exceeds(threshold).into();
        return Ok(json(StatusCode::OK, answer));
    }
    let view = |count: &Count| {
        let mut view = order_view(&cutoff, count);
        view["dry_run"] = false.into();
        view["reason"] = serde_json::json!(reason);
        view
    };
    let order = Order {
        cutoff: cutoff.clone(),
        reason,
        count: count.clone(),
        break_glass: body.break_glass,
        by: actor(&caller.0).to_owned(),
    };
    let command = move |view: &View<'_>| commands::order(view, order, threshold);
    let (ordered, committed) = app.writer.submit(&caller.author(), command).await??;
    let break_glass = match ordered {
        Ordered::Pending(proposal) => {
            return Ok(approvals::pending(&app, committed, waits, &proposal, view(&count)).await);
        }
        Ordered::InForce(break_glass) => break_glass,
    };
    if let Some(justification) = &break_glass {
        app.metrics.keys.break_glass.inc();
        tracing::error!(
            by = actor(&caller.0),
            id = cutoff.id,
            ?justification,
            "a cut-off did without its second approval"
        );
        let details = vec![
            ("by", actor(&caller.0).to_owned()),
            ("cut-off", cutoff.id.clone()),
            ("justification", justification.clone()),
        ];
        app.notifier.tell(Kind::BreakGlass, "a mass revocation did without its second approval", details);
    }
    let count = if counted_first {
        count
    } else {
        // It is in force, whatever becomes of the count.
        hits(&app, &cutoff, now).await.unwrap_or_else(|problem| {
            tracing::error!(?problem, "the keys of a cut-off cannot be counted");
            Count::default()
        })
    };
    note_revoked(&app, &caller, &cutoff.id, &count, reason);
    let mut answer = view(&count);
    if break_glass.is_some() {
        answer["break_glass"] = true.into();
    }
    Ok(request::finish(&app, committed, waits, StatusCode::OK, answer).await)
}

/// Counts and logs what a cut-off ended that has come into force.
pub fn note_revoked(app: &ApiState, caller: &Caller, id: &str, count: &Count, reason: RevocationReason) {
    for (role, keys) in &count.by_role {
        app.metrics.keys.revoked.with([role, reason.label()]).inc_by(*keys);
    }
    tracing::warn!(by = actor(&caller.0), id, keys = count.keys(), "mass revocation");
    let by_role: Vec<String> = count.by_role.iter().map(|(role, keys)| format!("{role} {keys}")).collect();
    let details = vec![
        ("by", actor(&caller.0).to_owned()),
        ("cut-off", id.to_owned()),
        ("reason", reason.label().to_owned()),
        ("keys by role", by_role.join(", ")),
    ];
    app.notifier.tell(Kind::MassRevocation, format!("{} keys were ended by one rule", count.keys()), details);
}

pub async fn lift_cut_off(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    KeyId(id): KeyId,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let command = move |view: &View<'_>| commands::lift_cut_off(view, &id);
    let (cutoff, committed) = app.writer.submit(&caller.author_because(reason)?, command).await??;
    tracing::warn!(by = actor(&caller.0), id = cutoff.id, "a mass revocation was lifted");
    let body = serde_json::json!({ "lifted": cutoff_view(&cutoff) });
    Ok(request::finish(&app, committed, waits, StatusCode::OK, body).await)
}

/// How many live keys a cut-off ends.
async fn hits(app: &Arc<ApiState>, cutoff: &Cutoff, now: u64) -> Result<Count, Problem> {
    let (app, cutoff) = (Arc::clone(app), cutoff.clone());
    let counted = request::read(move || {
        let mut count = Count::default();
        app.store.each_key(|key| {
            if !matches!(key.state(now), KeyState::Active | KeyState::Suspended) {
                return;
            }
            count.live += 1;
            if cutoff.hits(&key.claims(&app.config.issuer, None), &key.kid) {
                *count.by_role.entry(key.role).or_insert(0) += 1;
            }
        })?;
        Ok::<_, StoreError>(count)
    });
    Ok(counted.await??)
}

/// A cut-off and what it hits.
pub fn order_view(cutoff: &Cutoff, count: &Count) -> serde_json::Value {
    serde_json::json!({
        "cutoff": cutoff_view(cutoff),
        "keys": count.keys(),
        "by_role": count.by_role,
    })
}

fn cutoff_view(cutoff: &Cutoff) -> serde_json::Value {
    let mut view = scope_view(cutoff);
    view["id"] = cutoff.id.as_str().into();
    view
}

/// The keys that a cut-off ends.
pub fn scope_view(cutoff: &Cutoff) -> serde_json::Value {
    serde_json::json!({
        "role": cutoff.scope.role,
        "owner": cutoff.scope.owner,
        "kid": cutoff.scope.kid,
        "created_before": clock::rfc3339(cutoff.created_before),
        "created_after": (cutoff.created_after > 0).then(|| clock::rfc3339(cutoff.created_after)),
        "excluded_key": cutoff.excluded_key,
    })
}

/// A cut-off in force: since when, by whom and why, who approved it, or the justification of doing without.
fn in_force_view(cutoff: &Cutoff, order: Option<&CutoffOrder>) -> serde_json::Value {
    let mut view = cutoff_view(cutoff);
    let Some(order) = order else { return view };
    add_provenance(&mut view, Some(&order.provenance));
    view["reason"] = serde_json::json!(order.reason);
    view["requested_by"] = order.requested_by.clone().into();
    match &order.warrant {
        None => {}
        Some(Warrant::ApprovedBy(key_id)) => view["approved_by"] = key_id.as_str().into(),
        Some(Warrant::BreakGlass(justification)) => view["break_glass"] = justification.as_str().into(),
    }
    view
}

fn add_provenance(view: &mut serde_json::Value, provenance: Option<&Provenance>) {
    if let Some(Provenance { by, at_ms, reason }) = provenance {
        view["since"] = clock::rfc3339_ms(*at_ms).into();
        view["by"] = by.as_str().into();
        view["reason"] = reason.as_deref().into();
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockdownBody {
    ttl: Option<String>,
    exempt_roles: Option<Vec<String>>,
    /// Whether the keys that could lift it are to be refused as well.
    #[serde(default)]
    lock_out_admins: bool,
}

impl LockdownBody {
    fn lockdown(self, app: &ApiState, now: u64) -> Result<Lockdown, Problem> {
        let ttl = match self.ttl.as_deref().map(humantime::parse_duration) {
            None => lockdown::DEFAULT_TTL,
            Some(Ok(ttl)) if lockdown::TTL.contains(&ttl) => ttl,
            Some(_) => {
                return Err(Problem::bad_request("'ttl' must be a duration such as 1h, from 1s to 24h."));
            }
        };
        let exempt_roles = lockdown::exempt_roles(self.exempt_roles, self.lock_out_admins, &app.config.roles)
            .map_err(|problem| Problem::bad_request(format!("{problem}.")))?;
        Ok(Lockdown { until: now.saturating_add(ttl.as_secs()), exempt_roles })
    }
}

pub async fn show(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    let now = app.clock.now_s();
    let mut body = view(state.rules.lockdown.as_ref(), now);
    if !body["lockdown"].is_null() {
        add_provenance(&mut body["lockdown"], state.lockdown_order.as_ref());
    }
    let in_force = |cutoff: &Cutoff| in_force_view(cutoff, state.cutoff_orders.get(&cutoff.id));
    body["cutoffs"] = state.rules.cutoffs.iter().map(in_force).collect();
    if !state.rules.cutoffs.is_empty() {
        body["active"] = true.into();
    }
    body["approvals"] = approvals::pending_view(&state.proposals, now);
    body["rate_limits"] = limits_view(&state, now);
    json(StatusCode::OK, body)
}

/// The override of limits in force; null when there is none.
fn limits_view(state: &state::State, now: u64) -> serde_json::Value {
    let Some(override_) = state.limits_override.as_ref().filter(|override_| now < override_.until) else {
        return serde_json::Value::Null;
    };
    let mut view = serde_json::json!({
        "limits": override_.roles,
        "until": clock::rfc3339(override_.until),
        "remaining_s": override_.until.saturating_sub(now),
    });
    add_provenance(&mut view, state.override_order.as_ref());
    view
}

pub async fn lock_down(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let (body, reason): (LockdownBody, _) = request::order(&bytes)?;
    let lockdown = body.lockdown(&app, app.clock.now_s())?;
    change(&app, &caller.author_because(reason)?, waits, Some(lockdown)).await
}

pub async fn lift(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    change(&app, &caller.author_because(reason)?, waits, None).await
}

async fn change(
    app: &ApiState,
    author: &Author,
    waits: Waits,
    lockdown: Option<Lockdown>,
) -> Result<Response, Problem> {
    let body = view(lockdown.as_ref(), app.clock.now_s());
    let command = move |view: &View<'_>| commands::lock_down(view, lockdown);
    let ((), committed) = app.writer.commit(author, command).await?;
    tracing::warn!(by = author.name(), reason = author.reason(), lockdown = %body["lockdown"], "the lockdown was changed");
    Ok(request::finish(app, committed, waits, StatusCode::OK, body).await)
}

fn view(lockdown: Option<&Lockdown>, now: u64) -> serde_json::Value {
    let lockdown = lockdown.filter(|lockdown| lockdown.is_active(now)).map(|lockdown| {
        serde_json::json!({
            "until": clock::rfc3339(lockdown.until),
            "remaining_s": lockdown.until.saturating_sub(now),
            "exempt_roles": lockdown.exempt_roles,
        })
    });
    serde_json::json!({ "active": lockdown.is_some(), "lockdown": lockdown })
}
