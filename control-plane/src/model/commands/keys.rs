//! Keys: issued, renewed, replaced, suspended, resumed and revoked.

use std::collections::HashSet;
use std::sync::Arc;

use keygate_core::decide::cache::Verified;
use keygate_core::decide::cutoff::Cutoff;

use super::Plan;
use crate::model::canary;
use crate::model::change::{Change, Idempotency};
use crate::model::key::{Ended, KeyRecord, KeyState, RevocationReason};
use crate::model::registrations::MOST_UNLIMITED;
use crate::model::{RecordsError, View};
use crate::secrets::record::ring::NoSigner;
use crate::secrets::record::{SecretState, Signer};

/// The longest reason of a suspension, in characters.
const MAX_REASON_CHARS: usize = 200;

/// A key is not revoked, suspended or resumed.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There is none. The id is not repeated: it may be a key that was put there by mistake.
    #[error("There is no key with this id. (The id begins with 'key_'; it is not the key itself.)")]
    Unknown,
    /// It is revoked.
    #[error("This key is revoked; that is for good.")]
    Revoked,
    /// The reason is too long.
    #[error("'reason' must be at most {MAX_REASON_CHARS} characters.")]
    ReasonTooLong,
    /// The records cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
}

/// The order to revoke a key.
#[derive(Debug, Clone)]
pub struct Revocation {
    /// The key's id.
    pub id: String,
    /// The reason.
    pub reason: RevocationReason,
    /// Whether the keys that renewed it are revoked with it; `None`: if it was compromised, since a thief may have
    /// renewed it.
    pub with_successors: Option<bool>,
}

/// A key that is revoked, and the keys that renewed it, one after the other.
#[derive(Debug)]
pub struct Revoked {
    /// The key.
    pub key: KeyRecord,
    /// Its successors, as they are then.
    pub successors: Vec<KeyRecord>,
}

/// Revokes a key, and its successors if that is wanted. What is revoked already stays as it is.
///
/// # Errors
/// When there is none.
pub fn revoke(view: &View<'_>, order: &Revocation, by: &str) -> Plan<Revoked, KeyError> {
    let mut key = view.key(&order.id)?.ok_or(KeyError::Unknown)?;
    let mut successors = successors(view, &key)?;
    let ended = Ended { at: view.now, reason: order.reason, by: by.to_owned() };
    let with_successors = order.with_successors.unwrap_or(order.reason == RevocationReason::Compromised);
    let also = successors.iter_mut().filter(|_| with_successors);
    let mut changes = Vec::new();
    for one in std::iter::once(&mut key).chain(also).filter(|one| one.revoked.is_none()) {
        one.revoked = Some(ended.clone());
        changes.push(Change::revoking(one, ended.clone()));
    }
    Ok((changes, Revoked { key, successors }))
}

/// The keys that renewed a key, one after the other.
fn successors(view: &View<'_>, key: &KeyRecord) -> Result<Vec<KeyRecord>, RecordsError> {
    let (mut found, mut seen) = (Vec::<KeyRecord>::new(), HashSet::from([key.key_id.clone()]));
    let mut next = key.renewed_by.clone();
    while let Some(id) = next.filter(|id| seen.insert(id.clone())) {
        let Some(successor) = view.key(&id)? else { break };
        next = successor.renewed_by.clone();
        found.push(successor);
    }
    Ok(found)
}

/// Suspends a key. One that is suspended already stays as it is.
///
/// # Errors
/// When there is none, it is revoked, or the reason is too long.
pub fn suspend(view: &View<'_>, id: &str, reason: Option<String>, by: &str) -> Plan<KeyRecord, KeyError> {
    if reason.as_ref().is_some_and(|reason| reason.chars().count() > MAX_REASON_CHARS) {
        return Err(KeyError::ReasonTooLong);
    }
    let mut key = unrevoked(view, id)?;
    if key.suspended.is_some() {
        return Ok((Vec::new(), key));
    }
    let suspension = Ended { at: view.now, reason, by: by.to_owned() };
    key.suspended = Some(suspension.clone());
    let change = Change::KeySuspended {
        key_id: key.key_id.clone(),
        jti: key.jti.clone(),
        expires_at: key.expires_at,
        suspension,
    };
    Ok((vec![change], key))
}

/// Ends the suspension of a key, if it has one.
///
/// # Errors
/// When there is none, or it is revoked.
pub fn resume(view: &View<'_>, id: &str) -> Plan<KeyRecord, KeyError> {
    let mut key = unrevoked(view, id)?;
    if key.suspended.take().is_none() {
        return Ok((Vec::new(), key));
    }
    let change = Change::KeyResumed { key_id: key.key_id.clone(), jti: key.jti.clone() };
    Ok((vec![change], key))
}

fn unrevoked(view: &View<'_>, id: &str) -> Result<KeyRecord, KeyError> {
    let key = view.key(id)?.ok_or(KeyError::Unknown)?;
    if key.revoked.is_some() { Err(KeyError::Revoked) } else { Ok(key) }
}

/// Keys to revoke at once, by their ids and by those of their tokens.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Ids of keys.
    pub key_ids: Vec<String>,
    /// Ids of tokens.
    pub jtis: Vec<String>,
    /// The reason.
    pub reason: RevocationReason,
}

/// The outcome for one item of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is revoked now.
    Revoked,
    /// It was revoked before.
    AlreadyRevoked,
    /// There is no key with this id.
    UnknownKey,
    /// The token's id is revoked now, without a key that is known to have it: it was issued elsewhere.
    RevokedUnseen,
}

impl Outcome {
    /// Its name in the API.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::AlreadyRevoked => "already_revoked",
            Self::UnknownKey => "unknown_key",
            Self::RevokedUnseen => "revoked_unseen",
        }
    }
}

/// The receipt of a batch.
#[derive(Debug, Default)]
pub struct BatchReceipt {
    /// Each key id and its outcome.
    pub keys: Vec<(String, Outcome)>,
    /// Each token id, its outcome, and the id of its key.
    pub jtis: Vec<(String, Outcome, Option<String>)>,
    /// The roles of the keys that were revoked.
    pub roles: Vec<String>,
}

impl BatchReceipt {
    /// The number of items with an outcome.
    pub fn count(&self, outcome: Outcome) -> usize {
        let outcomes = self
            .keys
            .iter()
            .map(|(_, outcome)| outcome)
            .chain(self.jtis.iter().map(|(_, outcome, _)| outcome));
        outcomes.filter(|other| **other == outcome).count()
    }
}

/// Revokes many keys at once.
///
/// # Errors
/// When the records cannot be read.
pub fn revoke_many(view: &View<'_>, batch: &Batch, by: &str) -> Plan<BatchReceipt, RecordsError> {
    let ended = Ended { at: view.now, reason: batch.reason, by: by.to_owned() };
    let (mut changes, mut receipt, mut seen) = (Vec::new(), BatchReceipt::default(), HashSet::new());
    let revoke = |key: &KeyRecord, roles: &mut Vec<String>, seen: &mut HashSet<String>| {
        if key.revoked.is_some() || !seen.insert(key.jti.clone()) {
            return (None, Outcome::AlreadyRevoked);
        }
        roles.push(key.role.clone());
        (Some(Change::revoking(key, ended.clone())), Outcome::Revoked)
    };
    let with_successors = batch.reason == RevocationReason::Compromised;
    for key_id in &batch.key_ids {
        let key = view.key(key_id)?;
        let (change, outcome) = match &key {
            Some(key) => revoke(key, &mut receipt.roles, &mut seen),
            None => (None, Outcome::UnknownKey),
        };
        changes.extend(change);
        receipt.keys.push((key_id.clone(), outcome));
        if let Some(key) = key.filter(|_| with_successors) {
            for successor in successors(view, &key)? {
                let (change, outcome) = revoke(&successor, &mut receipt.roles, &mut seen);
                if let Some(change) = change {
                    changes.push(change);
                    receipt.keys.push((successor.key_id, outcome));
                }
            }
        }
    }
    for jti in &batch.jtis {
        let key = view.key_of_jti(jti)?;
        let (change, outcome) = match &key {
            Some(key) => revoke(key, &mut receipt.roles, &mut seen),
            None if view.model.is_revoked(jti) || !seen.insert(jti.clone()) => {
                (None, Outcome::AlreadyRevoked)
            }
            None => (Some(view.revoking(jti, ended.clone())?), Outcome::RevokedUnseen),
        };
        changes.extend(change);
        receipt.jtis.push((jti.clone(), outcome, key.map(|key| key.key_id)));
    }
    Ok((changes, receipt))
}

/// A key is not issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The caller's key does not count any more.
    #[error("the caller's key does not count any more")]
    CallerEnded {
        /// The realm of the challenge.
        realm: String,
    },
    /// The caller's key has no record here.
    #[error("This key is not known here.")]
    Unknown,
    /// It cannot be renewed yet.
    #[error("This key cannot be renewed yet.")]
    TooEarly {
        /// Unix second from which on it can.
        refresh_after: u64,
    },
    /// Its owner registered too many keys.
    #[error("At most {most} keys are made within an hour for one owner; retry in {wait_s} s.")]
    TooMany {
        /// The most within an hour.
        most: u32,
        /// Seconds until the next one.
        wait_s: u64,
    },
    /// The `Idempotency-Key` came with another request.
    #[error("This Idempotency-Key was used for another request; choose a new one.")]
    IdempotencyKeyReused,
    /// The key of the earlier request cannot be signed again.
    #[error("The key that this request created cannot be shown again.")]
    KeyGone,
    /// Nothing signs.
    #[error(transparent)]
    NoSigner(#[from] NoSigner),
    /// The records cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
}

/// The outcome of a command that issues a key which was signed beforehand.
#[derive(Debug)]
pub enum Issuance {
    /// The key is issued.
    New,
    /// The same request created this key before, and this secret signs it again.
    Replayed(Box<KeyRecord>, Arc<Signer>),
    /// Another secret signs by now, or the former key was changed: the key has to be made again.
    Overtaken,
    /// A mass revocation ends all keys that are issued in this second: the key has to be made again in the next one.
    EndsThisSecond,
}

/// Issues a key that the holder of another one asks for.
///
/// # Errors
/// See [`IssueError`].
pub fn register(
    view: &View<'_>,
    key: &KeyRecord,
    caller: &Verified,
    idempotency: Option<&Idempotency>,
) -> Plan<Issuance, IssueError> {
    if let Some(replayed) = replay(view, idempotency)? {
        return Ok((Vec::new(), replayed));
    }
    check_registrations(view, caller, key)?;
    issue(view, key, idempotency, None)
}

/// Issues the key that takes the place of the caller's, `former`, as it was when the new one was made.
///
/// # Errors
/// See [`IssueError`].
pub fn renew(
    view: &View<'_>,
    key: &KeyRecord,
    former: &KeyRecord,
    idempotency: Option<&Idempotency>,
) -> Plan<Issuance, IssueError> {
    let known = view.key(&former.key_id)?.filter(|known| known.jti == former.jti);
    let known = known.ok_or(IssueError::Unknown)?;
    let is_renewed = known.revoked.as_ref().is_some_and(|ended| ended.reason == RevocationReason::Rotation);
    if is_renewed && let Some(replayed) = replay(view, idempotency)? {
        return Ok((Vec::new(), replayed));
    }
    if known.revoked.is_some() {
        return Err(caller_ended(view));
    }
    // A key whose secret signs no more may end before its time.
    let ring = view.model.secrets();
    let is_previous = ring.get(&known.kid).is_some_and(|held| ring.state_of(held) == SecretState::Previous);
    if view.now < known.refresh_after() && !is_previous {
        return Err(IssueError::TooEarly { refresh_after: known.refresh_after() });
    }
    if known != *former {
        return Ok((Vec::new(), Issuance::Overtaken)); // Suspended or resumed meanwhile.
    }
    issue(view, key, idempotency, Some(&known))
}

/// Issues a key in the place of others of the same holder, as the canary does.
///
/// # Errors
/// See [`IssueError`].
pub fn replace(
    view: &View<'_>,
    key: &KeyRecord,
    former: &[KeyRecord],
    by: &str,
) -> Plan<Issuance, IssueError> {
    let (mut changes, issuance) = issue(view, key, None, None)?;
    if let Issuance::New = issuance {
        for old in former {
            if view.key(&old.key_id)?.is_some_and(|old| old.state(view.now) == KeyState::Active) {
                changes.push(renewal_of(view, old, by));
            }
        }
    }
    Ok((changes, issuance))
}

/// The changes that issue a key and revoke the one that it renews, if the secret that signed it still signs.
fn issue(
    view: &View<'_>,
    key: &KeyRecord,
    idempotency: Option<&Idempotency>,
    renewed: Option<&KeyRecord>,
) -> Plan<Issuance, IssueError> {
    if view.model.secrets().signer()?.kid != key.kid {
        return Ok((Vec::new(), Issuance::Overtaken));
    }
    let (issuer, audience) = view.model.issuer();
    let claims = key.claims(issuer, audience);
    let next_second = key.issued_at.saturating_add(1);
    let ends = |cutoff: &Cutoff| cutoff.created_before == next_second && cutoff.hits(&claims, &key.kid);
    if view.model.cutoffs().iter().any(ends) {
        return Ok((Vec::new(), Issuance::EndsThisSecond));
    }
    let mut changes =
        vec![Change::KeyIssued { key: Box::new(key.clone()), idempotency: idempotency.cloned() }];
    changes.extend(renewed.map(|old| renewal_of(view, old, &old.key_id)));
    Ok((changes, Issuance::New))
}

/// The revocation of a key that another one takes the place of.
pub(super) fn renewal_of(view: &View<'_>, old: &KeyRecord, by: &str) -> Change {
    let ended = Ended { at: view.now, reason: RevocationReason::Rotation, by: by.to_owned() };
    Change::revoking(old, ended)
}

fn caller_ended(view: &View<'_>) -> IssueError {
    IssueError::CallerEnded { realm: view.model.settings().realm.clone() }
}

/// The key that the same request created before, and the secret that signs it again.
fn replay(view: &View<'_>, idempotency: Option<&Idempotency>) -> Result<Option<Issuance>, IssueError> {
    let Some(idempotency) = idempotency else { return Ok(None) };
    let Some(seen) = view.records.request(&idempotency.request_id)? else { return Ok(None) };
    if seen.body != idempotency.body {
        return Err(IssueError::IdempotencyKeyReused);
    }
    let key = view.key(&seen.made)?.ok_or(IssueError::KeyGone)?;
    let signer = Arc::clone(view.model.secrets().signer()?);
    if signer.kid != key.kid {
        return Err(IssueError::KeyGone); // Its secret signs no more.
    }
    Ok(Some(Issuance::Replayed(Box::new(key), signer)))
}

/// Refuses a registration by a key that is no administrator's, when its owner has made as many keys within the hour as the
/// key's limit has units. The canary makes one with each probe.
fn check_registrations(view: &View<'_>, maker: &Verified, key: &KeyRecord) -> Result<(), IssueError> {
    let owner = key.registered_by.as_ref().and(key.owner.as_deref());
    let Some(owner) = owner.filter(|owner| *owner != canary::OWNER) else { return Ok(()) };
    let limit = view.model.limits_in_force().of_key(maker.claims.holder(), view.now).map(|(_, limit)| limit);
    view.model.registrations().check(owner, limit, key.issued_at).map_err(|until| IssueError::TooMany {
        most: limit.map_or(MOST_UNLIMITED, |limit| limit.units),
        wait_s: until.saturating_sub(view.now).max(1),
    })
}
