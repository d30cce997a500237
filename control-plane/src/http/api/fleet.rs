//! `/api/admin/fleet`: the proxies.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use keygate_core::quota::Member;
use keygate_core::revocation::Fingerprint;
use serde::Deserialize;

use super::json;
use super::request::{self, Body};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::http::sync;

pub async fn list(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    let mut proxies = app.fleet.view(&state);
    // Where the ledger of limits is another control plane's, that is not known here.
    if let Some(service) = app.quotas.here() {
        for proxy in &mut proxies {
            let incarnation = u64::from_str_radix(&proxy.incarnation, 16).unwrap_or(0);
            let member = Member { proxy: Fingerprint::of(&proxy.id).0, incarnation };
            proxy.drained = service.is_drained(&member);
        }
    }
    json(
        StatusCode::OK,
        serde_json::json!({
            "version": state.version,
            "hard_age_s": state.rules.hard_age_s,
            "total": proxies.len(),
            "current": proxies.iter().filter(|proxy| proxy.current && !proxy.stale).count(),
            "proxies": proxies,
        }),
    )
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Drain {
    proxy: String,
}

pub async fn drain(State(app): State<Arc<ApiState>>, Body(bytes): Body) -> Result<Response, Problem> {
    let Drain { proxy } = request::body(&bytes)?;
    sync::drain_proxy(&app, proxy).await
}
