//! `/api/admin/rate_limits`: how much keys may do.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use keygate_core::decide::limits::Override;
use keygate_core::quota::SHARES;
use keygate_core::revocation::Fingerprint;
use serde::Deserialize;
use serde_json::Value;

use super::request::{self, Because, Body, Waits};
use super::{Caller, json};
use crate::durability::store::StoreError;
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::author::Author;
use crate::model::commands::Plan;
use crate::model::commands::limits::{self as commands, LimitsError};
use crate::model::limits::{self, AccountNames, DEFAULT_TTL, TTL};
use crate::services::quota::{self, Role};

pub async fn show(State(app): State<Arc<ApiState>>) -> Response {
    json(StatusCode::OK, shown(&app))
}

fn shown(app: &ApiState) -> Value {
    limits::show(&app.state().rules.limits, app.config.roles.keys(), app.clock.now_s())
}

pub async fn replace(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let (document, reason): (Value, _) = request::order(&bytes)?;
    let author = caller.author_because(reason)?;
    let roles = app.config.roles.clone();
    submit(&app, &author, waits, move |view| commands::edit(view, &document, &roles)).await
}

/// Number of accounts shown: those that use the greatest part of their limits.
const BUSIEST: usize = 20;

pub async fn usage(State(app): State<Arc<ApiState>>) -> Result<Response, Problem> {
    let busiest = app.quotas.busiest(BUSIEST);
    let mut names = AccountNames::new(busiest.iter().map(|(account, ..)| account.key));
    let store = Arc::clone(&app.store);
    let names = request::read(move || {
        store.each_key(|key| names.note(&key))?;
        Ok::<_, StoreError>(names)
    })
    .await??;
    let keys: Vec<Value> = busiest
        .iter()
        .map(|(account, used, limit)| {
            let named = names.get(account.key);
            serde_json::json!({
                "key_id": named.and_then(|named| named.key_id.as_ref()),
                "role": named.and_then(|named| named.role.as_ref()),
                "owner": named.and_then(|named| named.owner.as_ref()),
                "used": used,
                "limit": limit,
                "window_s": account.window_s,
            })
        })
        .collect();
    let keeper = match app.quotas.role() {
        Role::Unknown => None,
        Role::Here(_) => Some((app.state().version.source, true, Some(app.sync_url.clone()))),
        Role::Elsewhere(source) => Some((source, false, app.peers.sync_url(source))),
    };
    let keeper = keeper.map(|(source, here, url)| {
        serde_json::json!({ "source": format!("{source:x}"), "here": here, "url": url })
    });
    let doubts = app.quotas.doubts().unwrap_or_default();
    let names: HashMap<u64, String> = app
        .fleet
        .view(&app.state())
        .into_iter()
        .map(|proxy| (Fingerprint::of(&proxy.id).0, proxy.id))
        .collect();
    // What they spend is not known until they are heard of, at most 30 s.
    let silent: Vec<Value> = doubts
        .silent
        .iter()
        .map(|proxy| {
            serde_json::json!({
                "proxy": names.get(&proxy.member.proxy),
                "incarnation": format!("{:016x}", proxy.member.incarnation),
                "silent_s": proxy.silent_ns / 1_000_000_000,
                "unreported_units": proxy.units,
                "share": f64::from(proxy.share) / f64::from(SHARES),
            })
        })
        .collect();
    let usage = serde_json::json!({
        "keys": keys,
        "in_doubt": !doubts.recovers_in.is_zero(),
        "grows_in_s": doubts.recovers_in.as_secs_f64().ceil(),
        "suspended": doubts.suspended,
        "silent_proxies": silent,
        "released": { "proxies": doubts.released_proxies, "units": doubts.released_units },
        "keeper": keeper,
    });
    Ok(json(StatusCode::OK, usage))
}

pub async fn take_over(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let committed = quota::take_over(&app.quotas, &caller.author_because(reason)?).await?;
    let kept = serde_json::json!({ "keeper": format!("{:x}", app.state().version.source) });
    Ok(request::finish(&app, committed, waits, StatusCode::OK, kept).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OverrideBody {
    limits: Value,
    ttl: Option<String>,
}

pub async fn override_for_a_time(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let (body, reason): (OverrideBody, _) = request::order(&bytes)?;
    let author = caller.author_because(reason)?;
    let ttl = match &body.ttl {
        None => DEFAULT_TTL,
        Some(text) => humantime::parse_duration(text)
            .ok()
            .filter(|ttl| TTL.contains(ttl))
            .ok_or_else(|| Problem::bad_request("'ttl' must be a duration such as 1h, at most 30 days."))?,
    };
    let roles = limits::override_roles(&body.limits, |role| app.config.roles.contains_key(role))
        .map_err(|problem| Problem::bad_request(format!("'limits': {problem}; nothing was changed.")))?;
    let until = app.clock.now_s().saturating_add(ttl.as_secs().max(1));
    let emergency = Override { until, roles };
    let roles = app.config.roles.clone();
    submit(&app, &author, waits, move |view| commands::override_roles(view, Some(emergency), &roles)).await
}

pub async fn lift_override(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let author = caller.author_because(reason)?;
    let roles = app.config.roles.clone();
    submit(&app, &author, waits, move |view| commands::override_roles(view, None, &roles)).await
}

async fn submit(
    app: &Arc<ApiState>,
    author: &Author,
    waits: Waits,
    command: impl FnOnce(&View<'_>) -> Plan<(), LimitsError> + Send + 'static,
) -> Result<Response, Problem> {
    let ((), committed) = app.writer.submit(author, command).await??;
    Ok(request::finish(app, committed, waits, StatusCode::OK, shown(app)).await)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::http::api::world::World;

    const LIMITS: &str = "/api/admin/rate_limits";
    const POLICY: &str = "/api/admin/policy";

    #[tokio::test]
    async fn a_cost_above_a_limit_is_refused_from_both_sides() {
        let world = World::new("").await;
        let policy = |cost: u32| {
            json!({ "routes": [
                { "name": "report", "path": "/report", "access": "key", "roles": ["basic"], "cost": cost },
                { "name": "free", "path": "/free", "access": "key", "cost": 0 },
            ]})
        };
        let refused = |(status, answer): (u16, serde_json::Value), limit: &str| {
            assert_eq!((status, &answer["code"]), (400, &json!("bad_request")), "{answer}");
            let error = &answer["errors"][0];
            assert_eq!((&error["route"], &error["code"]), (&json!("report"), &json!("cost_above_limit")));
            for text in [&error["detail"], &answer["detail"]] {
                assert!(text.as_str().unwrap().contains(limit), "{text}");
            }
            assert!(answer["detail"].as_str().unwrap().contains("report"), "{answer}");
        };
        refused(world.call("PUT", POLICY, &world.admin, policy(101)).await, "role \"basic\" is 100");
        assert_eq!(world.call("PUT", POLICY, &world.admin, policy(100)).await.0, 200);
        let put = |limits| world.call("PUT", LIMITS, &world.admin, limits);
        refused(put(json!({ "roles": { "basic": 99 } })).await, "role \"basic\" is 99");
        refused(put(json!({ "owners": { "acme": 99 } })).await, "owner \"acme\" is 99");
        let emergency = format!("{LIMITS}/emergency");
        let body = json!({ "limits": { "basic": 50 } });
        refused(world.call("POST", &emergency, &world.admin, body).await, "override, is 50");
        let (status, shown) = put(json!({ "roles": { "basic": 0 }, "owners": { "acme": 500 } })).await;
        assert_eq!(status, 200, "nothing at all may be allowed: {shown}");
        assert_eq!(shown["owners"], json!({ "acme": { "requests": 500, "window": "1h" } }));
        assert_eq!(world.call("PUT", POLICY, &world.admin, policy(500)).await.0, 200);
        let public = json!({ "public": { "requests": 3, "window": "1m", "ipv6_prefix": 56 } });
        assert_eq!(put(public.clone()).await.1["public"], public["public"]);
    }

    #[tokio::test]
    async fn a_history_does_not_begin_with_a_cost_above_a_limit_and_goes_on_with_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |cost: u32| {
            let route = json!({ "name": "report", "path": "/report", "access": "key", "cost": cost });
            std::fs::write(file.path(), json!({ "routes": [route] }).to_string()).unwrap();
        };
        let settings = format!("policy_file = {:?}", file.path().display().to_string());
        write(101);
        let refused = World::try_new(&settings).await.err().unwrap().to_string();
        assert!(refused.contains("report") && refused.contains("role \"basic\" is 100"), "{refused}");
        World::try_new(&format!("{settings}\nlimits.enforce = false")).await.unwrap();
        write(100);
        let world = World::new(&settings).await;
        write(101);
        // The file is for a new data directory only.
        assert_eq!(world.restart().await.serving.app.state().rules.policy.routes[0].cost, 100);
    }
}
