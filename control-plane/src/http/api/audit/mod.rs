//! `/api/admin/audit`: who did what, when and why, and whether the record of it is whole. It is the journal.

mod detail;

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::json as value;

use self::detail::detail;
pub use self::detail::differences;
use super::{json, request};
use crate::durability::journal::{self, JournalError, Privacy, Record};
use crate::http::api::ApiState;
use crate::http::problem::Problem;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditQuery {
    actor: Option<String>,
    action: Option<String>,
    target: Option<String>,
    owner: Option<String>,
    reason: Option<String>,
    since: Option<String>,
    until: Option<String>,
    cursor: Option<u64>,
    limit: Option<usize>,
}

impl AuditQuery {
    /// Times and the owner as the journal writes them, so that they compare as text.
    fn normalised(mut self, privacy: &Privacy) -> Result<Self, Problem> {
        self.owner = self.owner.map(|owner| privacy.named(&owner));
        for (name, time) in [("since", &mut self.since), ("until", &mut self.until)] {
            if let Some(text) = time {
                let parsed = humantime::parse_rfc3339_weak(text).map_err(|_| {
                    Problem::bad_request(format!("'{name}' must be a time such as 2026-01-01T00:00:00Z."))
                })?;
                *text = humantime::format_rfc3339_millis(parsed).to_string();
            }
        }
        Ok(self)
    }

    fn wants(&self, record: &Record, privacy: &Privacy) -> bool {
        let is = |wanted: &Option<String>, have: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| Some(wanted) == have)
        };
        is(&self.actor, Some(&record.actor))
            && is(&self.action, Some(&record.action))
            && is(&self.target, record.target.as_deref())
            && (self.owner.is_none() || self.owner == privacy.owner_of(record))
            && is(&self.reason, record.reason.as_deref())
            && self.since.as_ref().is_none_or(|since| *since <= record.at)
            && self.until.as_ref().is_none_or(|until| record.at < *until)
    }
}

/// The records, the last one first, with what was changed and from what to what.
pub async fn list(
    State(app): State<Arc<ApiState>>,
    query: Result<Query<AuditQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| Problem::bad_parameter(&rejection.body_text()))?;
    let limit = request::limit(query.limit)?;
    let query = query.normalised(&app.privacy)?;
    let (dir, privacy) = (app.config.journal_dir(), Arc::clone(&app.privacy));
    let read = move || {
        let before = query.cursor.unwrap_or(u64::MAX);
        journal::page(&dir, before, limit, |record| query.wants(record, &privacy))
    };
    let (records, more) = request::read(read).await?.map_err(unreadable)?;
    let next_cursor = records.last().filter(|_| more).map(|record| record.seq);
    let records: Vec<_> = records.iter().map(|record| view(record, app.privacy.owner_of(record))).collect();
    Ok(json(StatusCode::OK, value!({ "records": records, "next_cursor": next_cursor })))
}

fn view(record: &Record, owner: Option<String>) -> serde_json::Value {
    let after = detail(&record.change);
    let before = record.before.as_deref().map(detail);
    let changes = before.as_ref().filter(|_| !after.is_null()).map(|before| differences(before, &after));
    let undone = before.filter(|_| after.is_null());
    value!({
        "seq": record.seq,
        "at": record.at,
        "actor": record.actor,
        "action": record.action,
        "target": record.target,
        "owner": owner,
        "reason": record.reason,
        "outcome": record.outcome,
        "detail": after,
        "undone": undone,
        "changes": changes,
        "prev": record.prev,
        "hash": record.hash,
    })
}

/// Reads the whole journal and checks its chain and its checkpoints.
pub async fn verify(State(app): State<Arc<ApiState>>) -> Result<Response, Problem> {
    let (dir, key) = (app.config.journal_dir(), app.notary.public_key());
    match request::read(move || journal::verify(&dir, Some(&key))).await? {
        Ok(report) => Ok(json(StatusCode::OK, value!({ "valid": true, "journal": report }))),
        Err(JournalError::Damaged { path, line, problem }) => {
            let segment = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let damage = value!({ "segment": segment, "line": line, "problem": problem });
            tracing::error!(%damage, "the journal is not what was written");
            Ok(json(StatusCode::OK, value!({ "valid": false, "damage": damage })))
        }
        Err(error) => Err(unreadable(error)),
    }
}

fn unreadable(error: JournalError) -> Problem {
    tracing::error!(%error, "the journal cannot be read");
    let detail = "The journal cannot be read; the control plane's log says why.";
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "journal_unreadable", detail)
}
