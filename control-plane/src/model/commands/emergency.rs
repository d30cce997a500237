//! Lockdown, mass revocations ("cut-offs") and their second approvals.

use std::convert::Infallible;

use keygate_core::decide::cutoff::{Cutoff, Lockdown};
use keygate_core::token::Claims;

use super::Plan;
use crate::model::approval::{ApprovalError, Count, Proposal};
use crate::model::change::Change;
use crate::model::key::{KeyRecord, RevocationReason};
use crate::model::{RecordsError, View};

/// The most cut-offs in force at a time: each is looked at for every request.
const MAX_CUTOFFS: usize = 256;
/// The most proposals that wait at a time.
pub const MAX_PENDING: usize = 64;

/// The longest justification, in characters.
const MAX_JUSTIFICATION_CHARS: usize = 500;

/// A cut-off is not put in force, approved, withdrawn or lifted.
#[derive(Debug, thiserror::Error)]
pub enum CutoffError {
    /// Too many are in force.
    #[error("{MAX_CUTOFFS} cut-offs are in force; lift some that are not needed any more.")]
    TooMany,
    /// Too many wait.
    #[error("{MAX_PENDING} cut-offs wait for their approval; approve or withdraw some.")]
    TooManyPending,
    /// The justification is blank or too long.
    #[error("'break_glass' must be a justification of at most {MAX_JUSTIFICATION_CHARS} characters.")]
    InvalidJustification,
    /// It would end keys that are not issued yet.
    #[error(
        "'created_before' must not be in the future: keys issued from now on would be refused. To refuse every key for a time, \
             order a lockdown."
    )]
    ReachesFuture,
    /// None with this id is in force.
    #[error("There is no cut-off with this id in force.")]
    NotInForce,
    /// None with this id waits.
    #[error("No cut-off with this id waits for an approval; each does so for 1 h.")]
    NotPending,
    /// The approval does not count.
    #[error(transparent)]
    Approval(#[from] ApprovalError),
    /// The records cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
}

/// Begins, replaces or lifts the lockdown.
pub fn lock_down(view: &View<'_>, lockdown: Option<Lockdown>) -> Plan<(), Infallible> {
    let is_same = view.model.lockdown() == lockdown.as_ref();
    Ok((if is_same { Vec::new() } else { vec![Change::LockdownChanged { lockdown }] }, ()))
}

/// Has the rules in force spare a key that is issued in the same step: those that would refuse it. The author of a cut-off
/// that ends it is spared no more.
pub fn spare(view: &View<'_>, key: &KeyRecord) -> Vec<Change> {
    let mut changes = Vec::new();
    if let Some(lockdown) = view.model.lockdown().filter(|lockdown| lockdown.holds(&key.role, view.now)) {
        let mut lockdown = lockdown.clone();
        lockdown.exempt_roles.push(key.role.clone());
        lockdown.exempt_roles.sort();
        changes.push(Change::LockdownChanged { lockdown: Some(lockdown) });
    }
    let (issuer, audience) = view.model.issuer();
    let claims = key.claims(issuer, audience);
    for cutoff in view.model.cutoffs().iter().filter(|cutoff| cutoff.hits(&claims, &key.kid)) {
        // A rule of another name: what was lifted does not come back.
        let id = format!("{}_{}", cutoff.id, key.key_id);
        let sparing = Cutoff { id, excluded_key: Some(key.key_id.clone()), ..cutoff.clone() };
        changes.push(Change::CutoffLifted { id: cutoff.id.clone() });
        changes.push(Change::CutoffAdded {
            cutoff: sparing,
            reason: RevocationReason::Emergency,
            approved_by: None,
            break_glass: None,
        });
    }
    changes
}

/// Lifts the lockdown and cut-offs: those that are named, or all.
///
/// # Errors
/// When one that is named is not in force.
pub fn lift(view: &View<'_>, which: &Lift) -> Plan<(), CutoffError> {
    let mut changes = Vec::new();
    let is_wanted = |id: &str| matches!(which, Lift::All) || matches!(which, Lift::Cutoff(one) if one == id);
    let cutoffs = view.model.cutoffs().iter().filter(|cutoff| is_wanted(&cutoff.id));
    changes.extend(cutoffs.map(|cutoff| Change::CutoffLifted { id: cutoff.id.clone() }));
    if matches!(which, Lift::Cutoff(_)) && changes.is_empty() {
        return Err(CutoffError::NotInForce);
    }
    if !matches!(which, Lift::Cutoff(_)) && view.model.lockdown().is_some() {
        changes.push(Change::LockdownChanged { lockdown: None });
    }
    Ok((changes, ()))
}

/// What is lifted without asking for a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lift {
    /// Every cut-off, and the lockdown.
    All,
    /// The lockdown.
    Lockdown,
    /// The cut-off with this id.
    Cutoff(String),
}

/// A mass revocation that is ordered.
#[derive(Debug)]
pub struct Order {
    /// The rule.
    pub cutoff: Cutoff,
    /// The reason.
    pub reason: RevocationReason,
    /// The number of keys that it ends; nothing is counted where no threshold is set.
    pub count: Count,
    /// The justification of doing without a second approval, should it need one.
    pub break_glass: Option<String>,
    /// The id of the key that orders it.
    pub by: String,
}

/// The receipt of an order.
#[derive(Debug)]
pub enum Ordered {
    /// It is in force; with the justification, if it needed a second approval and did without.
    InForce(Option<String>),
    /// It waits for its second approval.
    Pending(Proposal),
}

/// Puts a cut-off in force, or has it wait for a second approval if it ends more than the share `threshold` of live keys
/// and no justification was given.
///
/// # Errors
/// When too many are in force or wait, or the justification is none.
pub fn order(view: &View<'_>, order: Order, threshold: Option<f64>) -> Plan<Ordered, CutoffError> {
    let Order { cutoff, reason, count, break_glass, by } = order;
    check_justification(break_glass.as_deref())?;
    check_reach(&cutoff, view.now)?;
    let needs_approval = count.exceeds(threshold);
    if needs_approval && break_glass.is_none() {
        let (changes, proposal) = propose(view, cutoff, reason, count, by)?;
        return Ok((changes, Ordered::Pending(proposal)));
    }
    let break_glass = break_glass.filter(|_| needs_approval);
    let added = Change::CutoffAdded { cutoff, reason, approved_by: None, break_glass: break_glass.clone() };
    Ok((put_in_force(view, added)?, Ordered::InForce(break_glass)))
}

/// Refuses a justification that is none, needed or not, so that a bad one is found before the day on which it is needed.
///
/// # Errors
/// When it is blank or too long.
pub fn check_justification(text: Option<&str>) -> Result<(), CutoffError> {
    let is_one = |text: &str| !text.trim().is_empty() && text.chars().count() <= MAX_JUSTIFICATION_CHARS;
    if text.is_none_or(is_one) { Ok(()) } else { Err(CutoffError::InvalidJustification) }
}

/// Refuses a cut-off that would end keys which are not issued yet. It reaches at most to the end of the second `now`.
///
/// # Errors
/// When it reaches beyond.
pub fn check_reach(cutoff: &Cutoff, now: u64) -> Result<(), CutoffError> {
    if cutoff.created_before <= now.saturating_add(1) { Ok(()) } else { Err(CutoffError::ReachesFuture) }
}

/// Lifts a cut-off.
///
/// # Errors
/// When none with this id is in force.
pub fn lift_cut_off(view: &View<'_>, id: &str) -> Plan<Cutoff, CutoffError> {
    let cutoff = view.model.cutoffs().iter().find(|cutoff| cutoff.id == id).cloned();
    let cutoff = cutoff.ok_or(CutoffError::NotInForce)?;
    Ok((vec![Change::CutoffLifted { id: cutoff.id.clone() }], cutoff))
}

/// Has a cut-off, which ends `count` keys, wait for its second approval. Expired proposals are forgotten.
///
/// # Errors
/// When too many wait.
fn propose(
    view: &View<'_>,
    cutoff: Cutoff,
    reason: RevocationReason,
    count: Count,
    requested_by: String,
) -> Plan<Proposal, CutoffError> {
    let (pending, expired): (Vec<_>, Vec<_>) =
        view.model.proposals().iter().partition(|proposal| proposal.is_pending(view.now));
    if pending.len() >= MAX_PENDING {
        return Err(CutoffError::TooManyPending);
    }
    let proposal = Proposal { cutoff, reason, requested_by, requested_at: view.now, count };
    let mut changes: Vec<Change> = expired.into_iter().map(withdrawal).collect();
    changes.push(Change::CutoffProposed { proposal: proposal.clone() });
    Ok((changes, proposal))
}

/// Gives the second approval, with the key that has these claims, and puts the cut-off in force.
///
/// # Errors
/// When none waits, or the approval does not count.
pub fn approve(view: &View<'_>, id: &str, approver: &Claims) -> Plan<Proposal, CutoffError> {
    let proposal = pending(view, id)?;
    proposal.check_approver(approver)?;
    let requester = view.key(&proposal.requested_by)?;
    proposal.check_requester(requester.as_ref(), view.model.cutoffs(), view.now)?;
    let added = Change::CutoffAdded {
        cutoff: proposal.cutoff.clone(),
        reason: proposal.reason,
        approved_by: Some(approver.sub.clone()),
        break_glass: None,
    };
    Ok((put_in_force(view, added)?, proposal.clone()))
}

/// Withdraws a proposal.
///
/// # Errors
/// When none waits.
pub fn withdraw(view: &View<'_>, id: &str) -> Plan<Proposal, CutoffError> {
    let proposal = pending(view, id)?.clone();
    Ok((vec![withdrawal(&proposal)], proposal))
}

/// The changes that add a cut-off; those that hit only expired keys give place to it.
fn put_in_force(view: &View<'_>, added: Change) -> Result<Vec<Change>, CutoffError> {
    if view.model.cutoffs().len() < MAX_CUTOFFS {
        return Ok(vec![added]);
    }
    let spent = view.model.spent_cutoffs(view.model.expired_until());
    let mut changes: Vec<Change> =
        spent.map(|cutoff| Change::CutoffLifted { id: cutoff.id.clone() }).collect();
    if changes.is_empty() {
        return Err(CutoffError::TooMany);
    }
    changes.push(added);
    Ok(changes)
}

fn pending<'v>(view: &'v View<'_>, id: &str) -> Result<&'v Proposal, CutoffError> {
    let mut proposals = view.model.proposals().iter();
    let found = proposals.find(|proposal| proposal.cutoff.id == id && proposal.is_pending(view.now));
    found.ok_or(CutoffError::NotPending)
}

fn withdrawal(proposal: &Proposal) -> Change {
    Change::CutoffWithdrawn { id: proposal.cutoff.id.clone() }
}
