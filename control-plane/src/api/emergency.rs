//! `/api/admin/emergency`: what is done when there is no time to look at keys one by one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use keygate_core::cutoff::Lockdown;
use serde::Deserialize;

use super::auth::wait;
use super::request::{self, Body, Wait};
use super::{Caller, actor, json};
use crate::app::App;
use crate::change::Change;
use crate::clock;
use crate::problem::Problem;
use crate::writer::View;

/// The playbook's: "all validations fail for one hour".
const DEFAULT_TTL: Duration = Duration::from_secs(60 * 60);
const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Whoever would lift it must get through.
const DEFAULT_EXEMPT: &str = "admin";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockdownBody {
    ttl: Option<String>,
    exempt_roles: Option<Vec<String>>,
}

impl LockdownBody {
    fn lockdown(self, app: &App, now: u64) -> Result<Lockdown, Problem> {
        let ttl = match self.ttl.as_deref().map(humantime::parse_duration) {
            None => DEFAULT_TTL,
            Some(Ok(ttl)) if (Duration::from_secs(1)..=MAX_TTL).contains(&ttl) => ttl,
            Some(_) => {
                return Err(Problem::bad_request("'ttl' must be a duration such as 1h, from 1s to 30d."));
            }
        };
        let exempt_roles = self.exempt_roles.unwrap_or_else(|| vec![DEFAULT_EXEMPT.into()]);
        if let Some(unknown) = exempt_roles.iter().find(|role| !app.config.roles.contains_key(*role)) {
            return Err(Problem::bad_request(format!("'exempt_roles': there is no role {unknown:?}.")));
        }
        Ok(Lockdown { until: now.saturating_add(ttl.as_secs()), exempt_roles })
    }
}

pub async fn show(State(app): State<Arc<App>>) -> Response {
    let state = app.state();
    json(StatusCode::OK, view(state.rules.lockdown.as_ref(), app.clock.now_s()))
}

pub async fn lock_down(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<Wait>, QueryRejection>,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let body: LockdownBody = request::body(&bytes)?;
    let lockdown = body.lockdown(&app, app.clock.now_s())?;
    change(&app, &caller, query, Some(lockdown)).await
}

pub async fn lift(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<Wait>, QueryRejection>,
) -> Result<Response, Problem> {
    change(&app, &caller, query, None).await
}

async fn change(
    app: &App,
    caller: &Caller,
    query: Result<Query<Wait>, QueryRejection>,
    lockdown: Option<Lockdown>,
) -> Result<Response, Problem> {
    let limit = wait(query)?.limit()?;
    let since = Instant::now();
    let body = view(lockdown.as_ref(), app.clock.now_s());
    let plan = move |view: &View<'_>| {
        let changes = if view.model.lockdown() == lockdown.as_ref() {
            Vec::new()
        } else {
            vec![Change::LockdownChanged { lockdown }]
        };
        Ok::<_, Problem>((changes, ()))
    };
    let ((), committed) = app.writer.submit(actor(&caller.0), plan).await??;
    tracing::warn!(by = actor(&caller.0), lockdown = %body["lockdown"], "the lockdown was changed");
    Ok(json(StatusCode::OK, request::finish(app, committed, since, limit, body).await))
}

fn view(lockdown: Option<&Lockdown>, now: u64) -> serde_json::Value {
    let lockdown = lockdown.filter(|lockdown| now < lockdown.until).map(|lockdown| {
        serde_json::json!({
            "until": clock::rfc3339(lockdown.until),
            "remaining_s": lockdown.until.saturating_sub(now),
            "exempt_roles": lockdown.exempt_roles,
        })
    });
    serde_json::json!({ "active": lockdown.is_some(), "lockdown": lockdown })
}
