//! `/api/auth/*`: what the holder of a key can do with it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use keygate_core::decide::Reason;
use keygate_core::decide::cache::Verified;
use keygate_core::decide::policy::Route;
use keygate_core::decide::refusal::Refusal;
use zeroize::Zeroizing;

use super::request::{self, Body, Waits, authenticate, authenticate_or};
use super::{actor, json};
use crate::api::ApiState;
use crate::canary::{self, runner};
use crate::change::{Change, Idempotency};
use crate::clock;
use crate::issuing;
use crate::key::{self, Creator, Ended, KeyRecord, KeyRequest, RevocationReason};
use crate::metrics::V2;
use crate::problem::Problem;
use crate::registrations::MOST_UNLIMITED;
use crate::rotation::driver;
use crate::secret::{SecretState, Signer};
use crate::writer::{Committed, View};

/// A key that was issued now or by the same request before, and its token.
struct Issued {
    key: KeyRecord,
    token: Zeroizing<String>,
    replayed: bool,
}

/// What a plan to issue a key comes to.
enum Planned {
    /// The key that was made and signed before.
    Issued,
    /// The one that the same request created.
    Replayed(Box<KeyRecord>, Arc<Signer>),
    /// Another secret signs by now, or the key to be renewed has changed: from the beginning.
    Overtaken,
}

/// How often a key is made anew since another secret signs by then. Rotations are at least a second apart.
const TRIES: usize = 3;

/// Issues a key. It is signed before it is journalled: when it cannot be signed, nothing has happened. `make` makes its
/// record, for what signs it; `plan` the changes with it.
async fn issue<M, P>(
    app: &Arc<ApiState>,
    caller: &Arc<Verified>,
    make: M,
    plan: P,
) -> Result<(Issued, Committed), Problem>
where
    M: Fn(&Signer, u64) -> Result<KeyRecord, Problem>,
    P: Fn(&View<'_>, &KeyRecord) -> Result<(Vec<Change>, Planned), Problem> + Clone + Send + 'static,
{
    for _ in 0..TRIES {
        driver::wait_for_signer(app).await;
        let signer = Arc::clone(app.state().secrets.signer()?);
        let key = make(&signer, app.clock.now_s())?;
        let token = issuing::token(&app.config, &signer, &key).await?;
        let (plan, made, verified) = (plan.clone(), key.clone(), Arc::clone(caller));
        let refusal = Problem::refusal(Refusal::InvalidToken, &app.state().rules.realm, &[]);
        let whole = move |view: &View<'_>| {
            // Whoever was let in a moment ago may wait here while the secret of their key ends.
            if !still_verifies(view, &verified.kid) {
                return Err(refusal);
            }
            let (changes, planned) = plan(view, &made)?;
            match planned {
                Planned::Issued if signer_of(view)?.kid != made.kid => Ok((Vec::new(), Planned::Overtaken)),
                planned => Ok((changes, planned)),
            }
        };
        let (planned, committed) = app.writer.submit(actor(caller), whole).await??;
        match planned {
            Planned::Overtaken => {}
            Planned::Issued => return Ok((Issued { key, token, replayed: false }, committed)),
            Planned::Replayed(key, signer) => {
                let token = issuing::token(&app.config, &signer, &key).await?;
                return Ok((Issued { key: *key, token, replayed: true }, committed));
            }
        }
    }
    Err(Problem::unavailable("Secrets are being rotated; retry later."))
}

/// Whether a secret counts at the moment.
fn still_verifies(view: &View<'_>, kid: &str) -> bool {
    view.model.secrets().get(kid).is_some_and(|held| {
        held.record.state < SecretState::Expired && held.record.not_after.is_none_or(|end| view.now < end)
    })
}

pub async fn register(
    State(app): State<Arc<ApiState>>,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let caller = authenticate(&app, &headers, &Route::keyed("register", &[]))?.0;
    let request: KeyRequest = request::body(&bytes)?;
    let idempotency = request::idempotency(&headers, actor(&caller), "register", &bytes)?;
    let make = |signer: &Signer, now| {
        let (request, identity) = (request.clone(), signer.identity());
        Ok(request.record(creator_of(&caller), &app.config.roles, identity, &signer.kid, now)?)
    };
    let maker = Arc::clone(&caller);
    let plan = move |view: &View<'_>, key: &KeyRecord| {
        if let Some((key, signer)) = replay(view, idempotency.as_ref())? {
            return Ok((Vec::new(), Planned::Replayed(Box::new(key), signer)));
        }
        check_registrations(view, &maker, key)?;
        let change = Change::KeyIssued { key: Box::new(key.clone()), idempotency: idempotency.clone() };
        Ok((vec![change], Planned::Issued))
    };
    let (issued, committed) = issue(&app, &caller, make, plan).await?;
    if !issued.replayed {
        app.metrics.created.with_label_values(&[issued.key.role.as_str(), V2]).inc();
    }
    Ok(request::finish(&app, committed, Waits::for_nobody(), StatusCode::CREATED, issued_view(&issued)).await)
}

/// Refuses a registration by a key that is no administrator's, when its owner has made as many keys within the hour as the
/// key's limit has units. The canaries make one with each probe.
fn check_registrations(view: &View<'_>, maker: &Verified, key: &KeyRecord) -> Result<(), Problem> {
    let Some(owner) =
        key.registered_by.as_ref().and(key.owner.as_deref()).filter(|owner| *owner != canary::OWNER)
    else {
        return Ok(());
    };
    let limit = view.model.limits_in_force().of_key(maker.claims.holder(), view.now).map(|(_, limit)| limit);
    view.model.registrations().check(owner, limit, key.issued_at).map_err(|until| {
        let wait_s = until.saturating_sub(view.now).max(1);
        let most = limit.map_or(MOST_UNLIMITED, |limit| limit.units);
        let detail =
            format!("At most {most} keys are made within an hour for one owner; retry in {wait_s} s.");
        Problem::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail)
            .with_header(header::RETRY_AFTER, wait_s.to_string())
    })
}

pub async fn validate(State(app): State<Arc<ApiState>>, headers: HeaderMap) -> Result<Response, Problem> {
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
    State(app): State<Arc<ApiState>>,
    waits: Waits,
    headers: HeaderMap,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let route = Route::keyed("refresh", &[]);
    // The renewal itself revokes this key. Whoever did not get the answer asks again with it.
    let again = headers.contains_key("idempotency-key");
    let caller = authenticate_or(&app, &headers, &route, |reason| again && reason == Reason::Revoked)?.0;
    let realm = app.state().rules.realm.clone();
    let role = caller.claims.role.clone();
    let count = |success: &str| {
        if app.config.roles.contains_key(&role) {
            app.metrics.refreshed.with_label_values(&[role.as_str(), success]).inc();
        }
    };
    let idempotency = request::idempotency(&headers, actor(&caller), "refresh", &bytes)?;
    let (key_id, jti) = (caller.claims.sub.clone(), caller.claims.jti.clone());
    // Also the one that was renewed before: whether this is the same request again shows in the plan.
    let unknown = || Problem::not_found("This key is not known here.");
    let known = app.store.key(&key_id)?.filter(|old| old.jti == jti).ok_or_else(unknown)?;
    let configured = app.config.roles.get(&role);
    let make =
        |signer: &Signer, now| Ok(key::renewal(&known, configured, signer.identity(), &signer.kid, now));
    let old_then = known.clone();
    let plan = move |view: &View<'_>, key: &KeyRecord| {
        let old = view.key(&key_id)?.filter(|old| old.jti == jti).ok_or_else(unknown)?;
        let renewed = old.revoked.as_ref().is_some_and(|ended| ended.reason == RevocationReason::Rotation);
        if renewed && let Some((key, signer)) = replay(view, idempotency.as_ref())? {
            return Ok((Vec::new(), Planned::Replayed(Box::new(key), signer)));
        }
        if old.revoked.is_some() {
            return Err(Problem::refusal(Refusal::InvalidToken, &realm, &[]));
        }
        // A key whose secret signs no more may end before its time.
        let ring = view.model.secrets();
        let is_previous = ring.get(&old.kid).is_some_and(|held| ring.state_of(held) == SecretState::Previous);
        if view.now < old.refresh_after() && !is_previous {
            let after = clock::rfc3339(old.refresh_after());
            let detail = format!("This key can be renewed from {after} on.");
            return Err(
                Problem::new(StatusCode::BAD_REQUEST, "too_early", detail).with("refresh_after", after)
            );
        }
        if old != old_then {
            return Ok((Vec::new(), Planned::Overtaken)); // Suspended or resumed meanwhile.
        }
        let ended = Ended { at: view.now, reason: RevocationReason::Rotation, by: key_id.clone() };
        let issued = Change::KeyIssued { key: Box::new(key.clone()), idempotency: idempotency.clone() };
        Ok((vec![issued, Change::revoking(&old, ended)], Planned::Issued))
    };
    let is_canarys = runner::is_canarys(&known);
    let (issued, committed) = issue(&app, &caller, make, plan).await.inspect_err(|_| {
        // That its key is not renewed yet is what the canary tests, again and again.
        if !is_canarys {
            count("false");
        }
    })?;
    if !issued.replayed {
        count("true");
        let role = issued.key.role.as_str();
        app.metrics.created.with_label_values(&[role, V2]).inc();
        app.metrics.revoked.with_label_values(&[role, RevocationReason::Rotation.label()]).inc();
    }
    Ok(request::finish(&app, committed, waits, StatusCode::OK, issued_view(&issued)).await)
}

pub async fn revoke(
    State(app): State<Arc<ApiState>>,
    waits: Waits,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let caller = authenticate(&app, &headers, &Route::keyed("revoke", &[]))?.0;
    super::keys::revoke_key(&app, actor(&caller), actor(&caller), RevocationReason::UserRequest, waits).await
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

fn signer_of(view: &View<'_>) -> Result<Arc<Signer>, Problem> {
    Ok(Arc::clone(view.model.secrets().signer()?))
}

/// The key that the same request created before, if it did, and what signs it again.
fn replay(
    view: &View<'_>,
    idempotency: Option<&Idempotency>,
) -> Result<Option<(KeyRecord, Arc<Signer>)>, Problem> {
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
    let signer = signer_of(view)?;
    if signer.kid != key.kid {
        return Err(gone()); // Its secret signs no more.
    }
    Ok(Some((key, signer)))
}

fn issued_view(issued: &Issued) -> serde_json::Value {
    let Issued { key, token, .. } = issued;
    serde_json::json!({
        "api_key": token.as_str(),
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

    use crate::api::world::World;

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
