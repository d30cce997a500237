//! The effect of each change of the journal on the model and on proxies.

use std::sync::Arc;

use keygate_core::decide::cutoff::{Cutoff, Lockdown};
use keygate_core::decide::limits::Override;
use keygate_core::decide::policy::Policy;
use keygate_core::revocation::{Fingerprint, Op, Revocations as _, Standing};

use super::{Effect, Keeper, Model, Settings};
use crate::model::approval::{Proposal, Warrant};
use crate::model::canary::Test;
use crate::model::change::{Change, Entry};
use crate::model::key::{KeyRecord, RevocationReason};
use crate::model::limits;
use crate::model::provenance::{CutoffOrder, Provenance};
use crate::model::rollout::{Flags, Past};
use crate::platform::hlc::{Mark, Origin};
use crate::secrets::keyring::Keyring;
use crate::secrets::record::{SecretError, SecretRecord};

impl Effect {
    /// Of a change of the rules.
    fn of_rules() -> Self {
        Self { rules: true, ..Self::default() }
    }

    /// Of a change that comes after a later one to the same thing.
    fn superseded() -> Self {
        Self { superseded: true, ..Self::default() }
    }

    fn of_op(op: Op) -> Self {
        Self { ops: vec![op], ..Self::default() }
    }
}

impl Model {
    /// Applies a change that is number `seq` of the journal. A secret that it brings is opened by
    /// [`Model::open_secrets`]: one that a later change moves on need not, and may not any more.
    ///
    /// # Errors
    /// When the record of a secret is not as it was written, or would set the secret back.
    pub fn apply(&mut self, seq: u64, entry: &Entry, keys: &Keyring) -> Result<Effect, SecretError> {
        let mark = entry.mark(self.source);
        let is_own = entry.origin.is_none();
        match &entry.origin {
            None => self.latest_own_stamp = self.latest_own_stamp.max(entry.stamp),
            Some(Origin { source, seq, .. }) => {
                self.latest_peer_stamp = self.latest_peer_stamp.max(entry.stamp);
                let merged = Arc::make_mut(&mut self.merged).entry(*source).or_default();
                *merged = (*merged).max(*seq);
            }
        }
        let effect = match &entry.change {
            Change::Genesis { source } => self.begin(*source, seq),
            Change::HistoryForked { source } => self.fork(*source, seq),
            Change::StateReturned { source, seq, .. } => self.note_returned(*source, *seq),
            Change::FingerprintsEnded { revoked, suspended, expires_at, at } => {
                self.end_fingerprints(&revoked.0, &suspended.0, *expires_at, *at)
            }
            Change::SettingsChanged { settings } => self.set_settings(settings),
            Change::PeerChanged { max_life_s } => {
                self.longest_life_s = self.longest_life_s.max(*max_life_s);
                Effect::default()
            }
            Change::EditRefused { .. } => Effect::default(),
            Change::CanaryTestPut { test } => self.put_canary_test(&test.id, Some((**test).clone()), mark),
            Change::CanaryTestDeleted { id } => self.put_canary_test(id, None, mark),
            Change::SecretCreated { secret, .. } | Change::SecretMoved { secret, .. } => {
                self.take_secret(secret, mark, (seq, is_own), keys)?
            }
            Change::SecretAnnounced { kid, .. } => {
                Arc::make_mut(&mut self.secrets).announce(kid);
                // Nothing new for proxies, but a version that can be waited for.
                Effect::of_rules()
            }
            Change::SecretsOpened {} => Effect { secrets: true, ..Effect::of_rules() },
            Change::CutoffAdded { cutoff, reason, approved_by, break_glass } => {
                let warrant = Warrant::of(approved_by.as_ref(), break_glass.as_ref());
                self.add_cutoff(cutoff, *reason, warrant, Provenance::of(entry))
            }
            Change::CutoffProposed { proposal } => self.propose_cutoff(proposal),
            Change::CutoffWithdrawn { id } => {
                self.proposals.retain(|proposal| proposal.cutoff.id != *id);
                Effect::default()
            }
            Change::CutoffLifted { id } => self.lift_cutoff(id),
            Change::LockdownChanged { lockdown } => self.lock_down(lockdown.as_ref(), mark, entry),
            Change::PolicyReplaced { policy } => self.replace_policy(policy, mark, seq),
            Change::LimitsChanged { limits } => self.set_limits(limits, mark),
            Change::LimitsOverridden { emergency } => self.override_limits(emergency.as_ref(), mark, entry),
            Change::QuotaOwnerChanged { keeper } => self.set_quota_owner(*keeper, entry.stamp, mark),
            Change::RolloutChanged { flags } => self.change_rollout(flags, entry, mark, seq),
            Change::KeyIssued { key, .. } => self.issue(key, is_own),
            Change::KeyRevoked { jti, role, expires_at, revocation, .. } => {
                // Of two control planes each may have revoked it.
                if !self.is_revoked(jti) {
                    self.census.change(role, *expires_at, -1);
                }
                self.revoke(jti, *expires_at, revocation.at, is_own)
            }
            Change::JtiRevoked { jti, expires_at, revocation } => {
                self.revoke(jti, *expires_at, revocation.at, is_own)
            }
            Change::KeySuspended { jti, expires_at, .. } => self.suspend(jti, *expires_at, mark),
            Change::KeyResumed { jti, .. } => self.resume(jti, mark),
            Change::ExpiredForgotten { until } => self.forget_expired(*until),
            Change::RevocationsRebuilt {} => Effect { rebuilt: true, ..Effect::default() },
        };
        if is_own {
            self.last_own_seq = seq;
        }
        if !effect.is_empty() {
            self.seq = seq;
        }
        if let Some(relaid) = self.revocations.relaid() {
            self.revocations = relaid;
        }
        Ok(effect)
    }
}

/// The history.
impl Model {
    fn begin(&mut self, source: u64, seq: u64) -> Effect {
        self.source = source;
        self.line_start = seq;
        Effect::of_rules()
    }

    fn fork(&mut self, source: u64, seq: u64) -> Effect {
        Arc::make_mut(&mut self.merged).insert(self.source, self.last_own_seq);
        Arc::make_mut(&mut self.lines).insert(self.source, seq.saturating_sub(1));
        self.source = source;
        self.line_start = seq;
        Effect { rebuilt: true, ..Effect::default() }
    }

    /// Nothing new for proxies, but a version from which those of that line go on.
    fn note_returned(&mut self, source: u64, seq: u64) -> Effect {
        let returned = Arc::make_mut(&mut self.returned).entry(source).or_default();
        *returned = (*returned).max(seq);
        Effect::of_rules()
    }

    fn end_fingerprints(
        &mut self,
        revoked: &[Fingerprint],
        suspended: &[Fingerprint],
        expires_at: u64,
        at: u64,
    ) -> Effect {
        let revoke = revoked.iter().copied().map(Op::Revoke);
        for op in revoke.chain(suspended.iter().copied().map(Op::Suspend)) {
            self.revocations.apply(op);
            self.expiries.note(op.fingerprint(), expires_at);
        }
        revoked.iter().for_each(|_| self.recent.add(at));
        // More than a delta takes.
        Effect { rebuilt: true, ..Effect::default() }
    }

    fn set_settings(&mut self, settings: &Settings) -> Effect {
        self.longest_life_s = self.longest_life_s.max(settings.max_life_s);
        self.settings = Arc::new(settings.clone());
        Effect::of_rules()
    }
}

/// Secrets and canary tests.
impl Model {
    fn take_secret(
        &mut self,
        secret: &SecretRecord,
        mark: Mark,
        created: (u64, bool),
        keys: &Keyring,
    ) -> Result<Effect, SecretError> {
        let counts = Arc::make_mut(&mut self.secrets).take(secret, mark, created, keys)?;
        Ok(if counts { Effect { secrets: true, ..Effect::of_rules() } } else { Effect::superseded() })
    }

    fn put_canary_test(&mut self, id: &str, test: Option<Test>, mark: Mark) -> Effect {
        let marks = Arc::make_mut(&mut self.canary_marks);
        if marks.get(id).is_some_and(|last| mark < *last) {
            return Effect::superseded();
        }
        marks.insert(id.to_owned(), mark);
        Arc::make_mut(&mut self.canary_tests).insert(id.to_owned(), test);
        Effect::default()
    }
}

/// Emergencies.
impl Model {
    fn add_cutoff(
        &mut self,
        cutoff: &Cutoff,
        reason: RevocationReason,
        warrant: Option<Warrant>,
        provenance: Provenance,
    ) -> Effect {
        let is_known = self.cutoffs.iter().any(|known| known.id == cutoff.id);
        if is_known || self.lifted.contains(&cutoff.id) {
            return Effect::superseded();
        }
        let proposal = self.proposals.iter().find(|proposal| proposal.cutoff.id == cutoff.id);
        let requested_by = proposal.map(|proposal| proposal.requested_by.clone());
        let order = CutoffOrder { provenance, reason, requested_by, warrant };
        Arc::make_mut(&mut self.cutoff_orders).insert(cutoff.id.clone(), order);
        self.proposals.retain(|proposal| proposal.cutoff.id != cutoff.id);
        self.cutoffs.push(cutoff.clone());
        Effect::of_rules()
    }

    /// Until it is approved, a proposal is no news for proxies.
    fn propose_cutoff(&mut self, proposal: &Proposal) -> Effect {
        let id = &proposal.cutoff.id;
        if self.lifted.contains(id) || self.cutoffs.iter().any(|cutoff| cutoff.id == *id) {
            return Effect::superseded();
        }
        self.proposals.push(proposal.clone());
        Effect::default()
    }

    fn lift_cutoff(&mut self, id: &str) -> Effect {
        self.cutoffs.retain(|cutoff| cutoff.id != id);
        Arc::make_mut(&mut self.cutoff_orders).remove(id);
        Arc::make_mut(&mut self.lifted).insert(id.to_owned());
        Effect::of_rules()
    }

    fn lock_down(&mut self, lockdown: Option<&Lockdown>, mark: Mark, entry: &Entry) -> Effect {
        if mark < self.lockdown_mark {
            return Effect::superseded();
        }
        self.lockdown = lockdown.cloned();
        self.lockdown_order = Some(Provenance::of(entry));
        self.lockdown_mark = mark;
        Effect::of_rules()
    }
}

/// Documents that are replaced whole: policy, limits, rollout.
impl Model {
    fn replace_policy(&mut self, policy: &Policy, mark: Mark, seq: u64) -> Effect {
        if mark < self.policy_mark {
            return Effect::superseded();
        }
        self.policy = Arc::new(policy.clone());
        self.policy_seq = seq;
        self.policy_mark = mark;
        Effect::of_rules()
    }

    fn set_limits(&mut self, limits: &limits::Set, mark: Mark) -> Effect {
        if mark < self.limits_mark {
            return Effect::superseded();
        }
        self.limits = Arc::new(limits.clone());
        self.limits_mark = mark;
        Effect::of_rules()
    }

    fn override_limits(&mut self, emergency: Option<&Override>, mark: Mark, entry: &Entry) -> Effect {
        if mark < self.override_mark {
            return Effect::superseded();
        }
        self.limits_override = emergency.cloned();
        self.override_order = Some(Provenance::of(entry));
        self.override_mark = mark;
        Effect::of_rules()
    }

    fn set_quota_owner(&mut self, source: u64, since: u64, mark: Mark) -> Effect {
        if self.limits_keeper.is_some_and(|(_, last)| mark < last) {
            return Effect::superseded();
        }
        self.limits_keeper = Some((Keeper { source, since }, mark));
        Effect::default()
    }

    fn change_rollout(&mut self, flags: &Flags, entry: &Entry, mark: Mark, seq: u64) -> Effect {
        if mark < self.rollout_mark {
            return Effect::superseded();
        }
        self.flags = Arc::new(flags.clone());
        self.rollout_mark = mark;
        let past = Past { at_ms: entry.stamp, seq, actor: entry.actor.clone(), flags: flags.clone() };
        Arc::make_mut(&mut self.pasts).push(past);
        Effect::of_rules()
    }
}

/// Keys.
impl Model {
    fn issue(&mut self, key: &KeyRecord, is_own: bool) -> Effect {
        if is_own {
            self.latest_s = self.latest_s.max(key.issued_at);
        }
        self.census.change(&key.role, key.expires_at, 1);
        if let (Some(_), Some(owner)) = (&key.registered_by, &key.owner) {
            self.registrations.note(owner, key.issued_at, self.latest_s);
        }
        Arc::make_mut(&mut self.secrets).note_key(&key.kid, key.expires_at);
        Effect::default()
    }

    fn revoke(&mut self, jti: &str, expires_at: u64, at: u64, is_own: bool) -> Effect {
        if is_own {
            self.latest_s = self.latest_s.max(at);
        }
        self.recent.add(at);
        self.keep_until(Op::Revoke(Fingerprint::of(jti)), expires_at)
    }

    fn suspend(&mut self, jti: &str, expires_at: u64, mark: Mark) -> Effect {
        if self.is_suspension_superseded(jti, mark) {
            return Effect::superseded();
        }
        Arc::make_mut(&mut self.suspension_marks).insert(Fingerprint::of(jti), mark);
        self.keep_until(Op::Suspend(Fingerprint::of(jti)), expires_at)
    }

    fn resume(&mut self, jti: &str, mark: Mark) -> Effect {
        if self.is_suspension_superseded(jti, mark) {
            return Effect::superseded();
        }
        let fingerprint = Fingerprint::of(jti);
        Arc::make_mut(&mut self.suspension_marks).insert(fingerprint, mark);
        self.revocations.apply(Op::Resume(fingerprint));
        if (&self.revocations).standing(fingerprint) == Standing::Clear {
            self.expiries.drop_one(fingerprint);
        }
        Effect::of_op(Op::Resume(fingerprint))
    }

    fn is_suspension_superseded(&self, jti: &str, mark: Mark) -> bool {
        self.suspension_marks.get(&Fingerprint::of(jti)).is_some_and(|last| mark < *last)
    }

    fn keep_until(&mut self, op: Op, expires_at: u64) -> Effect {
        self.revocations.apply(op);
        self.expiries.note(op.fingerprint(), expires_at);
        Effect::of_op(op)
    }

    fn forget_expired(&mut self, until: u64) -> Effect {
        self.expired_until = self.expired_until.max(until);
        self.census.forget(until);
        let due = self.expiries.take_due(until);
        if !self.suspension_marks.is_empty() {
            let marks = Arc::make_mut(&mut self.suspension_marks);
            marks.retain(|fingerprint, _| !due.contains(fingerprint));
        }
        self.revocations.forget_all(&due);
        Effect { ops: due.into_iter().map(Op::Forget).collect(), ..Effect::of_rules() }
    }
}
