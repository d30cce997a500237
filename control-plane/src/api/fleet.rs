//! `/api/admin/fleet`: the proxies.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;

use super::json;
use crate::app::App;

pub async fn list(State(app): State<Arc<App>>) -> Response {
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
