//! `/api/admin/revocations`: revoking many at once.

use std::collections::HashSet;
use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use keygate_core::gate;
use keygate_core::token::is_identifier;
use serde::Deserialize;
use serde_json::json as value;

use super::auth::revoked;
use super::request::{self, Body, Waits};
use super::{Caller, actor, json};
use crate::app::App;
use crate::change::Change;
use crate::key::{Ended, KeyRecord, RevocationReason};
use crate::problem::Problem;
use crate::writer::View;

/// The most that one call revokes; a proxy follows as many at once.
const MAX_ITEMS: usize = 10_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch {
    #[serde(default)]
    key_ids: Vec<String>,
    #[serde(default)]
    jtis: Vec<String>,
    reason: RevocationReason,
}

impl Batch {
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

/// What became of one item.
enum Outcome {
    Revoked,
    Already,
    /// No key of this id: there is nothing to revoke.
    UnknownKey,
    /// No key of this token's id, revoked all the same: a key issued elsewhere, or not seen here yet.
    RevokedUnseen,
}

impl Outcome {
    const fn label(&self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::Already => "already_revoked",
            Self::UnknownKey => "unknown_key",
            Self::RevokedUnseen => "revoked_unseen",
        }
    }
}

/// A batch as it is planned.
struct Planned {
    ended: Ended<RevocationReason>,
    changes: Vec<Change>,
    results: Vec<serde_json::Value>,
    roles: Vec<String>,
    seen: HashSet<String>,
}

impl Planned {
    fn key(&mut self, key: &KeyRecord) -> Outcome {
        if key.revoked.is_some() || !self.seen.insert(key.jti.clone()) {
            return Outcome::Already;
        }
        self.changes.push(revoked(key, self.ended.clone()));
        self.roles.push(key.role.clone());
        Outcome::Revoked
    }

    fn jti(&mut self, view: &View<'_>, jti: &str) -> Result<Outcome, Problem> {
        if let Some(key) = view.key_of_jti(jti)? {
            return Ok(self.key(&key));
        }
        if view.model.is_revoked(jti) || !self.seen.insert(jti.to_owned()) {
            return Ok(Outcome::Already);
        }
        self.changes.push(Change::JtiRevoked {
            jti: jti.to_owned(),
            expires_at: view.now.saturating_add(view.model.longest_life_s()),
            revocation: self.ended.clone(),
        });
        Ok(Outcome::RevokedUnseen)
    }
}

pub async fn revoke_many(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    waits: Waits,
    Body(bytes): Body,
) -> Result<Response, Problem> {
    let batch: Batch = request::body(&bytes)?;
    batch.check()?;
    let (by, reason) = (actor(&caller.0).to_owned(), batch.reason);
    let plan = move |view: &View<'_>| {
        let mut planned = Planned {
            ended: Ended { at: view.now, reason, by },
            changes: Vec::new(),
            results: Vec::new(),
            roles: Vec::new(),
            seen: HashSet::new(),
        };
        for key_id in &batch.key_ids {
            let outcome = view.key(key_id)?.map_or(Outcome::UnknownKey, |key| planned.key(&key));
            planned.results.push(value!({ "key_id": key_id, "result": outcome.label() }));
        }
        for jti in &batch.jtis {
            let outcome = planned.jti(view, jti)?;
            planned.results.push(value!({ "jti": jti, "result": outcome.label() }));
        }
        Ok::<_, Problem>((planned.changes, (planned.results, planned.roles)))
    };
    let ((results, roles), committed) = app.writer.submit(actor(&caller.0), plan).await??;
    for role in &roles {
        app.metrics.revoked.with_label_values(&[role.as_str(), reason.label()]).inc();
    }
    let count = |label: &str| results.iter().filter(|result| result["result"] == label).count();
    let body = value!({
        "revoked": count("revoked") + count("revoked_unseen"),
        "already_revoked": count("already_revoked"),
        "unknown": count("unknown_key"),
        "results": results,
    });
    Ok(json(StatusCode::OK, request::finish(&app, committed, waits, body).await))
}

/// How much is revoked, and what that costs a proxy. Keys that a cut-off ends are not counted: it is a rule.
pub async fn stats(State(app): State<Arc<App>>) -> Response {
    let state = app.state();
    let now = app.clock.now_s();
    let (mut bits, mut expected_hits, mut bytes) = (0, 0.0, 0);
    for shard in state.revocations.shards() {
        let (shard_bits, rate) = gate::size_for(shard.len());
        bits += shard_bits;
        expected_hits += rate;
        bytes += shard.encoded_bytes();
    }
    // A key that is not revoked falls into each shard alike.
    #[allow(clippy::cast_precision_loss)]
    let rate = expected_hits / state.revocations.shards().len() as f64;
    let locked = state.rules.lockdown.as_ref().is_some_and(|lockdown| lockdown.is_active(now));
    json(
        StatusCode::OK,
        value!({
            "total_revoked": state.revocations.revoked(),
            "total_suspended": state.revocations.len() - state.revocations.revoked(),
            "revoked_last_24h": state.recent.last_24h(now),
            "emergency_active": locked,
            "cutoffs": state.rules.cutoffs.len(),
            "bloom_bits": bits,
            "bloom_fp_rate": rate,
            "exact_bytes": bytes,
        }),
    )
}
