//! The revocation set as a whole.

use std::convert::Infallible;

use super::Plan;
use crate::model::View;
use crate::model::change::Change;

/// Records of keys that were never revoked are forgotten as well when the last clean-up is this long ago, in seconds.
const A_DAY_S: u64 = 24 * 60 * 60;

/// The receipt of a clean-up.
#[derive(Debug, Clone, Copy)]
pub struct CleanedUp {
    /// Revocations and suspensions that were dropped.
    pub forgotten: usize,
    /// Those that are left.
    pub remaining: usize,
    /// Keys whose `exp` is not later have expired for good. Unix seconds.
    pub until: u64,
}

/// Forgets revocations, and cut-offs that hit only such keys, of keys that expired at `until`, Unix seconds, or before.
pub fn forget_expired(view: &View<'_>, until: u64) -> Plan<CleanedUp, Infallible> {
    let model = view.model;
    let forgotten = model.due(until);
    let spent: Vec<_> = model.spent_cutoffs(until).collect();
    let mut changes = Vec::new();
    let is_long_ago = until >= model.expired_until().saturating_add(A_DAY_S);
    if forgotten > 0 || !spent.is_empty() || is_long_ago {
        changes.push(Change::ExpiredForgotten { until });
        changes.extend(spent.iter().map(|cutoff| Change::CutoffLifted { id: cutoff.id.clone() }));
    }
    let remaining = model.revocations().len().saturating_sub(forgotten);
    let until = if changes.is_empty() { model.expired_until() } else { until };
    Ok((changes, CleanedUp { forgotten, remaining, until }))
}

/// Has every proxy take the whole set again.
pub fn rebuild(_: &View<'_>) -> Plan<(), Infallible> {
    Ok((vec![Change::RevocationsRebuilt {}], ()))
}
