//! Taking back what a proxy enforces and this history lacks: after a restore, or where it began empty.

use std::collections::HashMap;

use keygate_core::decide::rules::Rules;
use keygate_core::revocation::{Fingerprint, Revocations as _, Standing};
use keygate_core::version::Version;

use super::Plan;
use crate::model::View;
use crate::model::change::{Change, Fingerprints};
use crate::model::key::{Ended, KeyRecord, RevocationReason};
use crate::model::state::Model;
use crate::secrets::keyring::Keyring;
use crate::secrets::record::{SecretError, SecretRecord, SecretState};

/// Who does it, in the journal.
pub const ACTOR: &str = "system";
/// Fingerprints in one change.
const AT_A_TIME: usize = 20_000;

/// The state that a proxy enforces.
#[derive(Debug)]
pub struct Enforced {
    /// Its version.
    pub version: Version,
    /// The rules.
    pub rules: Rules,
    /// The revoked tokens.
    pub revoked: Vec<Fingerprint>,
    /// The suspended tokens.
    pub suspended: Vec<Fingerprint>,
}

/// The receipt of what was taken back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TakenBack {
    /// Revocations that were unknown here.
    pub revoked: usize,
    /// Suspensions that were unknown here.
    pub suspended: usize,
    /// Cut-offs that were unknown here.
    pub cutoffs: usize,
    /// Whether a lockdown was in force that was unknown here.
    pub lockdown: bool,
    /// Secrets that had ended.
    pub secrets: usize,
    /// Whether the secret that signs is one of them.
    pub ends_signing: bool,
}

/// Takes back all that ends keys, and lets proxies go on from that version. `keys` has the records of keys that are ended by
/// it, as far as there are any.
///
/// # Errors
/// When the record of a secret cannot be sealed anew.
pub fn take_back(
    view: &View<'_>,
    enforced: &Enforced,
    keys: &HashMap<Fingerprint, KeyRecord>,
) -> Plan<TakenBack, SecretError> {
    let (model, now) = (view.model, view.now);
    let mut changes = Vec::new();
    let lacks = |run: &[Fingerprint], enough: fn(Standing) -> bool| -> Vec<Fingerprint> {
        let mut set = model.revocations();
        run.iter().copied().filter(|fingerprint| !enough(set.standing(*fingerprint))).collect()
    };
    let revoked = lacks(&enforced.revoked, |standing| standing == Standing::Revoked);
    let suspended = lacks(&enforced.suspended, |standing| standing != Standing::Clear);
    let ended = |reason| Ended { at: now, reason, by: ACTOR.to_owned() };
    let (mut unknown_revoked, mut unknown_suspended) = (Vec::new(), Vec::new());
    for fingerprint in &revoked {
        match keys.get(fingerprint) {
            Some(key) => changes.push(Change::revoking(key, ended(RevocationReason::AdminAction))),
            None => unknown_revoked.push(*fingerprint),
        }
    }
    for fingerprint in &suspended {
        match keys.get(fingerprint) {
            Some(key) => changes.push(Change::KeySuspended {
                key_id: key.key_id.clone(),
                jti: key.jti.clone(),
                expires_at: key.expires_at,
                suspension: Ended { at: now, reason: None, by: ACTOR.to_owned() },
            }),
            None => unknown_suspended.push(*fingerprint),
        }
    }
    let longest = model.longest_life_s().max(enforced.rules.max_life_s);
    let expires_at = model.latest_s(now).saturating_add(longest);
    let change = |revoked: &[Fingerprint], suspended: &[Fingerprint]| Change::FingerprintsEnded {
        revoked: Fingerprints(revoked.to_vec()),
        suspended: Fingerprints(suspended.to_vec()),
        expires_at,
        at: now,
    };
    changes.extend(unknown_revoked.chunks(AT_A_TIME).map(|some| change(some, &[])));
    changes.extend(unknown_suspended.chunks(AT_A_TIME).map(|some| change(&[], some)));

    let is_new = |id: &str| model.cutoffs().iter().all(|known| known.id != id) && !model.is_lifted(id);
    let cutoffs: Vec<_> = enforced.rules.cutoffs.iter().filter(|cutoff| is_new(&cutoff.id)).collect();
    changes.extend(cutoffs.iter().map(|cutoff| Change::CutoffAdded {
        cutoff: (*cutoff).clone(),
        reason: RevocationReason::Emergency,
        approved_by: None,
        break_glass: None,
    }));
    let lockdown = enforced.rules.lockdown.as_ref().filter(|lockdown| lockdown.is_active(now));
    let lockdown =
        lockdown.filter(|lockdown| model.lockdown().is_none_or(|here| here.until < lockdown.until));
    changes.extend(lockdown.map(|lockdown| Change::LockdownChanged { lockdown: Some(lockdown.clone()) }));
    if enforced.rules.expired_until > model.expired_until() {
        changes.push(Change::ExpiredForgotten { until: enforced.rules.expired_until });
    }
    let kids: Vec<String> = enforced.rules.keys.iter().map(|key| key.kid.clone()).collect();
    let secrets = ended_secrets(model, model.end_of_line(enforced.version.source), &kids, now, view.keys)?;
    let signs = model.secrets().active().map(|held| held.record.kid.as_str());
    let taken = TakenBack {
        revoked: revoked.len(),
        suspended: suspended.len(),
        cutoffs: cutoffs.len(),
        lockdown: lockdown.is_some(),
        secrets: secrets.len(),
        ends_signing: secrets.iter().any(|secret| Some(secret.kid.as_str()) == signs),
    };
    changes.extend(secrets.into_iter().map(|secret| Change::SecretMoved { secret, justification: None }));
    let Version { source, seq } = enforced.version;
    changes.push(Change::StateReturned { source, seq, kids });
    Ok((changes, taken))
}

/// The secrets that had ended by a later version of this history: they were made before their line of history ended, at
/// `line_end` in Unix milliseconds, and are not among `kids`, which verified then.
///
/// # Errors
/// When the record of one cannot be sealed anew.
pub fn ended_secrets(
    model: &Model,
    line_end: Option<u64>,
    kids: &[String],
    now: u64,
    keys: &Keyring,
) -> Result<Vec<SecretRecord>, SecretError> {
    let Some(line_end) = line_end else { return Ok(Vec::new()) };
    let all = model.secrets().all().into_iter().filter(|held| {
        held.record.state < SecretState::Expired
            && held.created.stamp < line_end
            && !kids.contains(&held.record.kid)
    });
    all.map(|held| held.record.moved(SecretState::Expired, now, keys)).collect()
}
