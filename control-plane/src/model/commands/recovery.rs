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

/// The actor in the journal.
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
}

/// Takes back all that ends keys, and lets proxies go on from that version. `keys` has the records of keys that are ended by
/// it, as far as there are any.
///
/// # Errors
/// When the record of a secret cannot be sealed again.
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
    let taken = TakenBack {
        revoked: revoked.len(),
        suspended: suspended.len(),
        cutoffs: cutoffs.len(),
        lockdown: lockdown.is_some(),
        secrets: secrets.len(),
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
/// When the record of one cannot be sealed again.
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

#[cfg(test)]
mod tests {
    use keygate_core::decide::cutoff::{Cutoff, Lockdown, Scope};
    use keygate_core::token::crypto::Algorithm;

    use super::*;
    use crate::model::change::Entry;
    use crate::model::{Records, RecordsError, Seen};
    use crate::secrets::master_key::MasterKey;
    use crate::secrets::record::NewSecret;
    use crate::secrets::root_key::RootKey;

    /// None.
    struct NoRecords;

    impl Records for NoRecords {
        fn key(&self, _: &str) -> Result<Option<KeyRecord>, RecordsError> {
            Ok(None)
        }

        fn key_of_jti(&self, _: &str) -> Result<Option<KeyRecord>, RecordsError> {
            Ok(None)
        }

        fn request(&self, _: &str) -> Result<Option<Seen>, RecordsError> {
            Ok(None)
        }
    }

    struct World {
        keys: Keyring,
        model: Model,
        seq: u64,
    }

    impl World {
        /// A history that was restored: a secret was made before line 1,000 ended, another one after.
        fn restored() -> (Self, [String; 2]) {
            keygate_core::token::crypto::native::install();
            let keys = Keyring::in_memory(MasterKey::of([1; 32]), RootKey::of([2; 32]));
            let secret = |keys: &Keyring| {
                SecretRecord::make(NewSecret::first(Algorithm::ES256, None), keys, 1).unwrap()
            };
            let (old, new) = (secret(&keys), secret(&keys));
            let kids = [old.kid.clone(), new.kid.clone()];
            let mut world = Self { keys, model: Model::default(), seq: 0 };
            let created = |secret| Change::SecretCreated { secret, idempotency: None };
            world.apply(vec![Change::Genesis { source: 1_000 }, created(old)], 1_500);
            world.apply(vec![Change::HistoryForked { source: 2_000 }, created(new)], 2_500);
            (world, kids)
        }

        fn apply(&mut self, changes: Vec<Change>, stamp: u64) {
            for change in changes {
                self.seq += 1;
                let entry = Entry::new(ACTOR, stamp, change);
                self.model.apply(self.seq, &entry, &self.keys).unwrap();
            }
        }

        fn take_back(&mut self, enforced: &Enforced) -> (Vec<&'static str>, TakenBack) {
            let view = View {
                model: &self.model,
                now: 3,
                now_ms: 3_000,
                stamp: 3_000,
                keys: &self.keys,
                records: &NoRecords,
            };
            let (changes, taken) = take_back(&view, enforced, &HashMap::new()).unwrap();
            let actions = changes.iter().map(|change| change.facts().action).collect();
            self.apply(changes, 3_000);
            (actions, taken)
        }
    }

    fn cutoff(id: &str) -> Cutoff {
        let (created_before, created_after) = (100, 0);
        Cutoff { id: id.into(), scope: Scope::default(), created_before, created_after, excluded_key: None }
    }

    fn enforced(cutoffs: Vec<Cutoff>, lockdown_until: u64) -> Enforced {
        let lockdown = Some(Lockdown { until: lockdown_until, exempt_roles: Vec::new() });
        Enforced {
            version: Version { source: 1_000, seq: 9 },
            rules: Rules { cutoffs, lockdown, ..Rules::minimal(Vec::new()) },
            revoked: vec![Fingerprint(1), Fingerprint(2)],
            suspended: vec![Fingerprint(3)],
        }
    }

    #[test]
    fn what_ends_keys_is_united_once_and_what_was_lifted_here_stays_lifted() {
        let (mut world, kids) = World::restored();
        let added = Change::CutoffAdded {
            cutoff: cutoff("b"),
            reason: RevocationReason::Emergency,
            approved_by: None,
            break_glass: None,
        };
        world.apply(vec![added, Change::CutoffLifted { id: "b".into() }], 2_600);
        let enforced = enforced(vec![cutoff("a"), cutoff("b")], 50);
        let (actions, taken) = world.take_back(&enforced);
        assert_eq!(
            actions,
            [
                "fingerprints_ended",
                "fingerprints_ended",
                "cutoff_added",
                "lockdown_changed",
                "secret_expired",
                "state_returned"
            ]
        );
        assert_eq!((taken.revoked, taken.suspended, taken.cutoffs, taken.secrets), (2, 1, 1, 1));
        let mut set = world.model.revocations();
        let standing = [1, 2, 3].map(|value| set.standing(Fingerprint(value)));
        assert_eq!(standing, [Standing::Revoked, Standing::Revoked, Standing::Suspended]);
        assert_eq!(world.model.cutoffs().iter().map(|cutoff| cutoff.id.as_str()).collect::<Vec<_>>(), ["a"]);
        assert!(world.model.lockdown().is_some_and(|lockdown| lockdown.until == 50));
        // The proxy did not know the secret that was made here since, which says nothing of it.
        let state = |kid: &str| world.model.secrets().get(kid).map(|held| held.record.state);
        assert_eq!(
            kids.each_ref().map(|kid| state(kid)),
            [Some(SecretState::Expired), Some(SecretState::Active)]
        );
        assert_eq!(world.take_back(&enforced).0, ["state_returned"], "again is harmless");
    }

    #[test]
    fn a_lockdown_that_is_over_or_ends_sooner_than_the_one_here_is_not_taken() {
        let (mut world, _) = World::restored();
        assert!(!world.take_back(&enforced(Vec::new(), 3)).1.lockdown, "it is over");
        let here = Some(Lockdown { until: 60, exempt_roles: Vec::new() });
        world.apply(vec![Change::LockdownChanged { lockdown: here }], 3_100);
        assert!(!world.take_back(&enforced(Vec::new(), 50)).1.lockdown);
        assert!(world.take_back(&enforced(Vec::new(), 70)).1.lockdown);
    }
}
