//! `/api/auth/*`: what the holder of a key can do with it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use keygate_core::decide::Reason;
use keygate_core::decide::cache::Verified;
use keygate_core::decide::policy::Route;

use super::request::{self, Body, Waits, authenticate, authenticate_or};
use super::{actor, json};
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::canary;
use crate::model::commands::keys::{self, IssueError};
use crate::model::key::{self, Creator, KeyRecord, KeyRequest, RevocationReason};
use crate::observe::metrics::V2;
use crate::observe::telemetry::counts::UNKNOWN;
use crate::platform::clock;
use crate::secrets::record::Signer;
use crate::services::issuing::{self, Issued};

pub async fn register(
    State(app): State<Arc<ApiState>>,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let caller = authenticate(&app, &headers, &Route::keyed("register", &[]))?;
    let (request, reason): (KeyRequest, _) = request::order(&bytes)?;
    let author = caller.author_because(reason)?;
    let caller = caller.0;
    let idempotency = request::idempotency(&headers, actor(&caller), "register", &bytes)?;
    let make = |signer: &Signer, now| {
        let creator = creator_of(&caller);
        request.clone().record(creator, &app.config.roles, signer.identity(), &signer.kid, now)
    };
    let maker = Arc::clone(&caller);
    let command =
        move |view: &View<'_>, key: &KeyRecord| keys::register(view, key, &maker, idempotency.as_ref());
    let (issued, committed) = issuing::issue(&app, &author, make, command).await?;
    if !issued.replayed {
        app.metrics.keys.created.with([&issued.key.role, V2]).inc();
    }
    Ok(request::finish(&app, committed, Waits::for_nobody(), StatusCode::CREATED, issued_view(&issued)).await)
}

pub async fn validate(State(app): State<Arc<ApiState>>, headers: HeaderMap) -> Result<Response, Problem> {
    match authenticate(&app, &headers, &Route::keyed("validate", &[])) {
        Ok(caller) => {
            let claims = &caller.0.claims;
            app.telemetry.key_validated(&claims.role, true);
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
            app.telemetry.key_validated(UNKNOWN, false);
            Err(problem)
        }
    }
}

pub async fn refresh(
    State(app): State<Arc<ApiState>>,
    waits: Waits,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let route = Route::keyed("refresh", &[]);
    // The renewal itself revokes this key. Whoever did not get the answer asks again with it.
    let again = headers.contains_key("idempotency-key");
    let caller = authenticate_or(&app, &headers, &route, |reason| again && reason == Reason::Revoked)?;
    let author = if again { caller.author().although(Reason::Revoked) } else { caller.author() };
    let caller = caller.0;
    let role = caller.claims.role.clone();
    let count = |success: &str| {
        if app.config.roles.contains_key(&role) {
            app.metrics.keys.refreshed.with([&role, success]).inc();
        }
    };
    let idempotency = request::idempotency(&headers, actor(&caller), "refresh", &bytes)?;
    let (key_id, jti) = (caller.claims.sub.clone(), caller.claims.jti.clone());
    // Also the one that was renewed before: the command sees whether this is the same request again.
    let known = app.store.key(&key_id)?.filter(|old| old.jti == jti).ok_or(IssueError::Unknown)?;
    let configured = app.config.roles.get(&role);
    let make =
        |signer: &Signer, now| Ok(key::renewal(&known, configured, signer.identity(), &signer.kid, now));
    let former = known.clone();
    let command =
        move |view: &View<'_>, key: &KeyRecord| keys::renew(view, key, &former, idempotency.as_ref());
    let is_canary_key = canary::is_canary_key(&known);
    let issuing = issuing::issue(&app, &author, make, command).await;
    let (issued, committed) = issuing.inspect_err(|_| {
        // That its key is not renewed yet is what the canary tests, again and again.
        if !is_canary_key {
            count("false");
        }
    })?;
    if !issued.replayed {
        count("true");
        let role = issued.key.role.as_str();
        app.metrics.keys.created.with([role, V2]).inc();
        app.metrics.keys.revoked.with([role, RevocationReason::Rotation.label()]).inc();
    }
    Ok(request::finish(&app, committed, waits, StatusCode::OK, issued_view(&issued)).await)
}

pub async fn revoke(
    State(app): State<Arc<ApiState>>,
    waits: Waits,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let caller = authenticate(&app, &headers, &Route::keyed("revoke", &[]))?;
    let own = actor(&caller.0).to_owned();
    let order = keys::Revocation { id: own, reason: RevocationReason::UserRequest, with_successors: None };
    super::keys::revoke_key(&app, &caller, order, waits).await
}

fn creator_of(key: &Verified) -> Creator<'_> {
    let (claims, holder) = (&key.claims, key.claims.holder());
    Creator {
        key_id: Some(holder.key_id),
        role: &claims.role,
        limit_role: holder.limit_role,
        scopes: &claims.scope,
        owner: holder.owner,
    }
}

fn issued_view(issued: &Issued) -> serde_json::Value {
    let Issued { key, token, .. } = issued;
    serde_json::json!({
        "api_key": token.expose().as_str(),
        "key_id": key.key_id,
        "jti": key.jti,
        "name": key.name,
        "role": key.role,
        "scopes": key.scopes,
        "owner": key.owner,
        "limit_role": key.holder().limit_role,
        "issued_at": clock::rfc3339(key.issued_at),
        "expires_at": clock::rfc3339(key.expires_at),
        "refresh_after": clock::rfc3339(key.refresh_after()),
        "renews": key.renews,
        "metadata": key.metadata,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::http::api::world::World;

    const LIMITS: &str = "/api/admin/rate_limits";

    fn basic() -> Value {
        json!({ "name": "n", "role": "basic" })
    }

    impl World {
        async fn limit(&self, limits: Value) {
            let (status, answer) = self.call("PUT", LIMITS, &self.admin, limits).await;
            assert_eq!(status, 200, "{answer}");
        }

        /// The seconds after which a registration that is refused may be tried again; `None`: it is not refused.
        async fn refused(&self, key: &str) -> Option<u64> {
            let (status, headers, answer) =
                self.ask_for("POST", "/api/auth/register", key, basic(), &[]).await;
            if status == 201 {
                return None;
            }
            assert_eq!((status, &answer["code"]), (429, &json!("rate_limited")), "{answer}");
            headers["retry-after"].to_str().unwrap().parse().ok()
        }
    }

    #[tokio::test]
    async fn keys_are_registered_within_the_limit_of_their_owner_also_after_a_restart() {
        let world = World::new("").await;
        world.limit(json!({ "roles": { "basic": 3 } })).await;
        let (maker, maker_id) = world.issue_with_id("basic").await;
        let (status, child) = world.register(&maker, basic()).await;
        assert_eq!((status, &child["owner"]), (201, &json!(maker_id)), "{child}");
        let child = child["api_key"].as_str().unwrap().to_owned();
        world.pass(10);
        let (status, grandchild) = world.register(&child, basic()).await;
        assert_eq!((status, &grandchild["owner"]), (201, &json!(maker_id)));
        // One that ends counts all the same.
        let end = format!("/api/admin/keys/{}/revoke", grandchild["key_id"].as_str().unwrap());
        assert_eq!(world.call("POST", &end, &world.admin, json!({})).await.0, 200);
        assert_eq!(world.refused(&maker).await, None);
        assert_eq!(world.refused(&maker).await, Some(3_590));
        assert_eq!(world.refused(&child).await, Some(3_590), "together");

        let world = world.restart().await;
        assert_eq!(world.refused(&child).await, Some(3_590));
        world.pass(3_589);
        assert_eq!(world.refused(&maker).await, Some(1));
        world.pass(1);
        assert_eq!(world.refused(&maker).await, None, "it was told the truth");
        assert_eq!(world.refused(&maker).await, Some(10));

        // Others are not concerned, nor are administrators.
        let other = world.issue("basic").await;
        assert_eq!(world.refused(&other).await, None);
        for _ in 0..5 {
            world.issue("basic").await;
        }
        // Its own limit counts before that of its role.
        world.limit(json!({ "keys": { &maker_id: 5 } })).await;
        assert_eq!(world.refused(&child).await, None);
        world.limit(json!({ "owners": { &maker_id: 0 } })).await;
        assert_eq!(world.refused(&child).await, Some(3_600));
    }

    #[tokio::test]
    async fn the_same_request_again_is_no_other_registration() {
        let world = World::new("").await;
        world.limit(json!({ "roles": { "basic": 1 } })).await;
        let maker = world.issue("basic").await;
        let again = [("idempotency-key", "one")];
        let ask = || world.ask_for("POST", "/api/auth/register", &maker, basic(), &again);
        let ((status, _, first), (_, _, second)) = (ask().await, ask().await);
        assert_eq!((status, &first["key_id"]), (201, &second["key_id"]));
        assert_eq!(world.refused(&maker).await, Some(3_600));
        assert_eq!(ask().await.0, 201);
    }

    #[tokio::test]
    async fn a_key_keeps_owner_and_limit_role_when_it_is_renewed_and_names_no_other_owner() {
        let world = World::new("").await;
        let (maker, maker_id) = world.issue_with_id("contributor").await;
        let day = json!({ "name": "n", "role": "basic", "expires_in": "24h" });
        let (_, child) = world.register(&maker, day.clone()).await;
        assert_eq!(
            (&child["owner"], &child["limit_role"]),
            (&json!(maker_id), &json!("contributor")),
            "{child}"
        );
        let child_key = child["api_key"].as_str().unwrap();
        let (status, renewed) = world.call("POST", "/api/auth/refresh", child_key, json!({})).await;
        assert_eq!(status, 200, "{renewed}");
        assert_eq!((&renewed["owner"], &renewed["limit_role"]), (&child["owner"], &child["limit_role"]));

        let (_, alone) = world.register(&world.admin, day).await;
        let alone_key = alone["api_key"].as_str().unwrap();
        let (_, renewed) = world.call("POST", "/api/auth/refresh", alone_key, json!({})).await;
        assert_eq!((&alone["owner"], &renewed["owner"]), (&Value::Null, &alone["key_id"]));

        let named = json!({ "name": "n", "role": "basic", "owner": "acme" });
        let (status, answer) = world.register(&maker, named).await;
        assert_eq!((status, &answer["code"]), (403, &json!("owner_not_allowed")), "{answer}");
    }
}
