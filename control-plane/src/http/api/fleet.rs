//! `/api/admin/fleet`: the proxies.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;

use super::json;
use super::request::{self, Body};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::http::sync;

pub async fn list(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    let proxies = app.fleet.view(&state);
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
