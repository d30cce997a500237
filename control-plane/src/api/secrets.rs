//! The signing secrets, as far as anybody may know of them.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::json;
use crate::app::App;
use crate::clock;
use crate::secret::SecretRecord;

fn view(secret: &SecretRecord) -> serde_json::Value {
    serde_json::json!({
        "version_id": secret.kid,
        "state": secret.state,
        "alg": secret.alg,
        "created_at": clock::rfc3339(secret.created_at),
    })
}

pub async fn status(State(app): State<Arc<App>>) -> Response {
    let state = app.state();
    let active = state.secrets.iter().find(|secret| secret.kid == state.signer.kid);
    json(
        StatusCode::OK,
        serde_json::json!({
            "active": active.map(view),
            "versions": state.secrets.iter().map(view).collect::<Vec<_>>(),
            "next_rotation": null,
        }),
    )
}

pub async fn jwks(State(app): State<Arc<App>>) -> Response {
    let keys: Vec<_> = app.state().signer.jwk().into_iter().collect();
    let headers = [(header::CONTENT_TYPE, "application/jwk-set+json"), (header::CACHE_CONTROL, "max-age=60")];
    (headers, serde_json::json!({ "keys": keys }).to_string()).into_response()
}
