//! `/api/admin/revocations`: revoking many at once, what was revoked, and the upkeep of the set.

use std::sync::Arc;

use axum::Extension;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use keygate_core::revocation::ExactSet;
use keygate_core::revocation::gate;
use keygate_core::token::is_identifier;
use serde::Deserialize;
use serde_json::json as value;

use super::request::{self, Because, Body, Waits};
use super::{Caller, actor, json};
use crate::durability::store::PastRevocation;
use crate::http::api::ApiState;
use crate::http::problem::Problem;
use crate::model::View;
use crate::model::commands::keys::{self, Batch, Outcome};
use crate::model::key::RevocationReason;
use crate::platform::clock;
use crate::services::upkeep;

/// The most that one call revokes; a proxy follows as many at once.
const MAX_ITEMS: usize = 10_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchBody {
    #[serde(default)]
    key_ids: Vec<String>,
    #[serde(default)]
    jtis: Vec<String>,
    reason: RevocationReason,
}

impl BatchBody {
    fn check(&self) -> Result<(), Problem> {
        let items = self.key_ids.len() + self.jtis.len();
        if !(1..=MAX_ITEMS).contains(&items) {
            return Err(Problem::bad_request(format!(
                "'key_ids' and 'jtis' must name 1 to {MAX_ITEMS} in all."
            )));
        }
        if self.jtis.iter().any(|jti| !is_identifier(jti)) {
            return Err(Problem::bad_request("'jtis': a token's id is visible ASCII, at most 256 bytes."));
        }
        Ok(())
    }
}

pub async fn revoke_many(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let batch: BatchBody = request::body(&bytes)?;
    batch.check()?;
    let (by, reason) = (actor(&caller.0).to_owned(), batch.reason);
    let batch = Batch { key_ids: batch.key_ids, jtis: batch.jtis, reason };
    let command = move |view: &View<'_>| keys::revoke_many(view, &batch, &by);
    let (receipt, committed) = app.writer.submit(&caller.author(), command).await??;
    for role in &receipt.roles {
        app.metrics.keys.revoked.with([role, reason.label()]).inc();
    }
    let of_keys =
        receipt.keys.iter().map(|(key_id, outcome)| value!({ "key_id": key_id, "result": outcome.label() }));
    let of_jtis = receipt.jtis.iter().map(|(jti, outcome, key_id)| {
        let mut result = value!({ "jti": jti, "result": outcome.label() });
        if let Some(key_id) = key_id {
            result["key_id"] = key_id.as_str().into();
        }
        result
    });
    let body = value!({
        "revoked": receipt.count(Outcome::Revoked) + receipt.count(Outcome::RevokedUnseen),
        "already_revoked": receipt.count(Outcome::AlreadyRevoked),
        "unknown": receipt.count(Outcome::UnknownKey),
        "results": of_keys.chain(of_jtis).collect::<Vec<_>>(),
    });
    Ok(request::finish(&app, committed, waits, StatusCode::OK, body).await)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryQuery {
    reason: Option<RevocationReason>,
    role: Option<String>,
    key_id: Option<String>,
    jti: Option<String>,
    by: Option<String>,
    cursor: Option<u64>,
    limit: Option<usize>,
}

impl HistoryQuery {
    fn wants(&self, revocation: &PastRevocation) -> bool {
        let is = |wanted: &Option<String>, have: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| Some(wanted) == have)
        };
        self.reason.is_none_or(|reason| reason == revocation.reason)
            && is(&self.role, revocation.role.as_deref())
            && is(&self.key_id, revocation.key_id.as_deref())
            && is(&self.jti, Some(&revocation.jti))
            && is(&self.by, Some(&revocation.by))
    }
}

/// What was revoked, the last one first. Cut-offs are rules: `/api/admin/emergency` has them.
pub async fn history(
    State(app): State<Arc<ApiState>>,
    query: Result<Query<HistoryQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::bad_parameter(&rejection.body_text()))?;
    let limit = request::limit(query.limit)?;
    let store = Arc::clone(&app.store);
    let read = move || store.revocations(query.cursor, limit, |revocation| query.wants(revocation));
    let (found, more) = request::read(read).await??;
    let next_cursor = found.last().filter(|_| more).map(|(seq, _)| *seq);
    let revocations: Vec<_> = found
        .into_iter()
        .map(|(seq, revocation)| {
            value!({
                "seq": seq,
                "at": clock::rfc3339(revocation.at),
                "key_id": revocation.key_id,
                "jti": revocation.jti,
                "role": revocation.role,
                "reason": revocation.reason,
                "by": revocation.by,
                "expires_at": clock::rfc3339(revocation.expires_at),
            })
        })
        .collect();
    Ok(json(StatusCode::OK, value!({ "revocations": revocations, "next_cursor": next_cursor })))
}

/// Forgets the revocations of keys that have expired.
pub async fn cleanup(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let (cleaned, committed) = upkeep::clean_up(&app, &caller.author_because(reason)?).await?;
    let body = value!({
        "removed": cleaned.forgotten,
        "remaining": cleaned.remaining,
        "expired_until": clock::rfc3339(cleaned.until),
    });
    Ok(request::finish(&app, committed, waits, StatusCode::OK, body).await)
}

/// Has every proxy take the whole set over anew: only shards that it does not have cross the wire.
pub async fn rebuild(
    State(app): State<Arc<ApiState>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Because(reason): Because,
) -> Result<Response, Problem> {
    let committed = upkeep::rebuild(&app, &caller.author_because(reason)?).await?;
    let size = Size::of(&app.state().revocations);
    let body = value!({
        "shards": size.shards,
        "bloom_bits": size.bloom_bits,
        "bloom_fp_rate": size.bloom_fp_rate,
        "exact_bytes": size.exact_bytes,
    });
    Ok(request::finish(&app, committed, waits, StatusCode::OK, body).await)
}

/// What the set costs a proxy.
struct Size {
    shards: usize,
    bloom_bits: usize,
    bloom_fp_rate: f64,
    exact_bytes: usize,
}

impl Size {
    fn of(set: &ExactSet) -> Self {
        let shards = set.shards().len();
        let (mut bloom_bits, mut expected_hits, mut exact_bytes) = (0, 0.0, 0);
        for shard in set.shards() {
            let (bits, rate) = gate::size_for(shard.len());
            bloom_bits += bits;
            expected_hits += rate;
            exact_bytes += shard.encoded_bytes();
        }
        // A key that is not revoked falls into each shard alike.
        #[allow(clippy::cast_precision_loss)]
        let bloom_fp_rate = expected_hits / shards as f64;
        Self { shards, bloom_bits, bloom_fp_rate, exact_bytes }
    }
}

/// How much is revoked, and what that costs a proxy. Keys that a cut-off ends are not counted: it is a rule.
pub async fn stats(State(app): State<Arc<ApiState>>) -> Response {
    let state = app.state();
    let now = app.clock.now_s();
    let size = Size::of(&state.revocations);
    let locked = state.rules.lockdown.as_ref().is_some_and(|lockdown| lockdown.is_active(now));
    json(
        StatusCode::OK,
        value!({
            "total_revoked": state.revocations.revoked(),
            "total_suspended": state.revocations.len() - state.revocations.revoked(),
            "revoked_last_24h": state.recent.last_24h(now),
            "emergency_active": locked,
            "cutoffs": state.rules.cutoffs.len(),
            "shards": size.shards,
            "bloom_bits": size.bloom_bits,
            "bloom_fp_rate": size.bloom_fp_rate,
            "exact_bytes": size.exact_bytes,
            "expired_until": clock::rfc3339(state.rules.expired_until),
        }),
    )
}
