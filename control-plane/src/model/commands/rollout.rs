//! The rollout of V2.

use std::convert::Infallible;
use std::time::Duration;

use super::{Expected, Plan, RevisionMismatch};
use crate::model::View;
use crate::model::change::Change;
use crate::model::rollout::Flags;
use crate::model::rollout::OnBreach;
use crate::model::rollout::Pasts;
use crate::model::rollout::document::{Edit, Surroundings};

/// An edit of the rollout is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RolloutError {
    /// It was written for another revision.
    #[error(transparent)]
    Revision(#[from] RevisionMismatch),
    /// It has errors.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
}

/// The revision of the rollout: the journal entry of its last change.
pub fn revision(pasts: &Pasts) -> u64 {
    pasts.last().map_or(0, |past| past.seq)
}

/// Changes the members of the rollout that an edit has; whether anything changed. An edit without effect counts as a change
/// when it gives a reason.
///
/// # Errors
/// See [`RolloutError`].
pub fn edit(view: &View<'_>, edit: Edit, expected: Expected) -> Plan<bool, RolloutError> {
    expected.check(revision(view.model.pasts()))?;
    let current = view.model.flags();
    let around = Surroundings { has_v1: view.model.has_v1(), policy: view.model.policy().0, now_s: view.now };
    let flags = edit.apply(current, around).map_err(RolloutError::Invalid)?;
    let is_same = Flags { cause: current.cause.clone(), ..flags.clone() } == *current;
    if is_same && flags.cause.is_none() {
        return Ok((Vec::new(), false));
    }
    Ok((vec![Change::RolloutChanged { flags: Box::new(flags) }], true))
}

/// A rollback.
#[derive(Debug)]
pub struct RolledBack {
    /// The share of V2 before, see [`Flags::share_at`].
    pub from: u32,
    /// The rollout now.
    pub flags: Flags,
}

/// Does what `on_breach` says, if nothing changed since `seen`, the revision that was judged. A step is stable that was in
/// force for `stable_after`.
pub fn roll_back(
    view: &View<'_>,
    seen: u64,
    (on_breach, stable_after): (OnBreach, Duration),
    cause: String,
) -> Plan<Option<RolledBack>, Infallible> {
    let pasts = view.model.pasts();
    if revision(pasts) != seen {
        return Ok((Vec::new(), None));
    }
    let current = view.model.flags();
    let from = current.share_at(view.now);
    let Some(flags) = pasts.after_breach(current, view.now, stable_after, on_breach) else {
        return Ok((Vec::new(), Some(RolledBack { from, flags: current.clone() })));
    };
    let flags = Flags { cause: Some(cause), ..flags };
    let change = Change::RolloutChanged { flags: Box::new(flags.clone()) };
    Ok((vec![change], Some(RolledBack { from, flags })))
}
