//! The attributes of changes: each variant answers all of them, in one place.

use super::{Change, Idempotency};
use crate::model::key::{Ended, KeyRecord, RevocationReason};
use crate::secrets::record::{SecretRecord, SecretState};

impl Change {
    /// Its attributes. A new variant answers all of them here.
    pub fn facts(&self) -> Facts<'_> {
        match self {
            Self::Genesis { .. } => Facts::of("genesis"),
            Self::HistoryForked { .. } => Facts::of("history_forked"),
            Self::StateReturned { .. } => Facts { ends_keys: true, ..Facts::of("state_returned") },
            Self::FingerprintsEnded { .. } => Facts { ends_keys: true, ..Facts::of("fingerprints_ended") },
            Self::SettingsChanged { .. } => Facts::of_rules("settings_changed"),
            Self::SecretCreated { secret, idempotency } => Facts {
                target: Some(&secret.kid),
                reason: secret.why.as_deref(),
                secret: Some(secret),
                request: idempotency.as_ref().map(|request| (request, secret.kid.as_str())),
                ..Facts::of_rules("secret_created")
            },
            Self::SecretMoved { secret, justification } => Facts {
                target: Some(&secret.kid),
                reason: justification.as_deref(),
                secret: Some(secret),
                ..Facts::of_rules(match secret.state {
                    SecretState::Rotating => "secret_rotating",
                    SecretState::Active => "secret_activated",
                    SecretState::Previous => "secret_retired",
                    SecretState::Expired => "secret_expired",
                })
            },
            Self::SecretAnnounced { kid, justification } => Facts {
                target: Some(kid),
                reason: justification.as_deref(),
                ..Facts::of_rules("secret_announced")
            },
            Self::SecretsOpened {} => Facts::of_rules("secrets_opened"),
            Self::KeyIssued { key, idempotency } => Facts {
                target: Some(&key.key_id),
                owner: key.owner.as_deref(),
                request: idempotency.as_ref().map(|request| (request, key.key_id.as_str())),
                alters: key.renews.as_deref().map(|old| (old, Alteration::Renewed(&key.key_id))),
                ..Facts::of("key_issued")
            },
            Self::KeyRevoked { key_id, revocation, .. } => Facts {
                target: Some(key_id),
                reason: Some(revocation.reason.label()),
                ends_keys: true,
                alters: Some((key_id, Alteration::Revoked(revocation))),
                ..Facts::of("key_revoked")
            },
            Self::JtiRevoked { jti, revocation, .. } => Facts {
                target: Some(jti),
                reason: Some(revocation.reason.label()),
                ends_keys: true,
                ..Facts::of("jti_revoked")
            },
            Self::KeySuspended { key_id, suspension, .. } => Facts {
                target: Some(key_id),
                reason: suspension.reason.as_deref(),
                ends_keys: true,
                alters: Some((key_id, Alteration::Suspended(suspension))),
                ..Facts::of("key_suspended")
            },
            Self::KeyResumed { key_id, .. } => Facts {
                target: Some(key_id),
                alters: Some((key_id, Alteration::Resumed)),
                ..Facts::of("key_resumed")
            },
            Self::ExpiredForgotten { .. } => Facts::of_rules("expired_forgotten"),
            Self::RevocationsRebuilt {} => Facts::of("revocations_rebuilt"),
            Self::PeerChanged { .. } => Facts::of("peer_changed"),
            Self::EditRefused { key, problem } => Facts {
                target: Some(key),
                reason: Some(problem),
                outcome: "refused",
                ..Facts::of("edit_refused")
            },
            Self::CutoffAdded { cutoff, reason, .. } => Facts {
                target: Some(&cutoff.id),
                reason: Some(reason.label()),
                owner: cutoff.scope.owner.as_deref(),
                ends_keys: true,
                ..Facts::of_rules("cutoff_added")
            },
            Self::CutoffLifted { id } => Facts { target: Some(id), ..Facts::of_rules("cutoff_lifted") },
            Self::CutoffProposed { proposal } => Facts {
                target: Some(&proposal.cutoff.id),
                reason: Some(proposal.reason.label()),
                owner: proposal.cutoff.scope.owner.as_deref(),
                ..Facts::of("cutoff_proposed")
            },
            Self::CutoffWithdrawn { id } => Facts { target: Some(id), ..Facts::of("cutoff_withdrawn") },
            Self::LockdownChanged { lockdown } => {
                Facts { ends_keys: lockdown.is_some(), ..Facts::of_rules("lockdown_changed") }
            }
            Self::CanaryTestPut { test } => Facts { target: Some(&test.id), ..Facts::of("canary_test_put") },
            Self::CanaryTestDeleted { id } => Facts { target: Some(id), ..Facts::of("canary_test_deleted") },
            Self::PolicyReplaced { .. } => Facts::of_rules("policy_replaced"),
            Self::LimitsChanged { .. } => Facts::of_rules("limits_changed"),
            Self::LimitsOverridden { .. } => Facts::of_rules("limits_overridden"),
            Self::QuotaOwnerChanged { .. } => Facts::of("quota_owner_changed"),
            Self::RolloutChanged { flags } => {
                Facts { reason: flags.cause.as_deref(), ..Facts::of_rules("rollout_changed") }
            }
        }
    }

    /// Alters the record of a key, if it is about one; see [`Facts::alters`].
    pub fn alter(&self, key: &mut KeyRecord) {
        match self.facts().alters {
            Some((_, Alteration::Revoked(revocation))) => key.revoked = Some(revocation.clone()),
            Some((_, Alteration::Suspended(suspension))) => key.suspended = Some(suspension.clone()),
            Some((_, Alteration::Resumed)) => key.suspended = None,
            Some((_, Alteration::Renewed(by))) => key.renewed_by = Some(by.to_owned()),
            None => {}
        }
    }
}

/// The attributes of a change.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'c> {
    /// Its action: its type, as it stands in the journal.
    pub action: &'static str,
    /// Its outcome, as it stands in the journal: `done` or `refused`.
    pub outcome: &'static str,
    /// The id of the one thing that it is about.
    pub target: Option<&'c str>,
    /// The reason that was given for it.
    pub reason: Option<&'c str>,
    /// The owner of the key or of the keys that it is about, as [`Change::personal`] has it.
    pub owner: Option<&'c str>,
    /// The signing secret as it is from then on.
    pub secret: Option<&'c SecretRecord>,
    /// The request that asked for it, if that is remembered, and the id of what it made.
    pub request: Option<(&'c Idempotency, &'c str)>,
    /// The id of the key whose record it alters, and how.
    pub alters: Option<(&'c str, Alteration<'c>)>,
    /// Whether it changes the rules that proxies have.
    pub of_rules: bool,
    /// Whether it ends keys. Such changes are still taken when the disk is full.
    pub ends_keys: bool,
}

/// The alteration of the record of a key.
#[derive(Debug, Clone, Copy)]
pub enum Alteration<'c> {
    /// It is revoked.
    Revoked(&'c Ended<RevocationReason>),
    /// It is suspended.
    Suspended(&'c Ended<Option<String>>),
    /// Its suspension ends.
    Resumed,
    /// Another key takes its place.
    Renewed(&'c str),
}

impl Facts<'_> {
    /// A change that says no more of itself.
    const fn of(action: &'static str) -> Self {
        Self {
            action,
            outcome: "done",
            target: None,
            reason: None,
            owner: None,
            secret: None,
            request: None,
            alters: None,
            of_rules: false,
            ends_keys: false,
        }
    }

    /// A change of the rules that proxies have.
    const fn of_rules(action: &'static str) -> Self {
        let mut facts = Self::of(action);
        facts.of_rules = true;
        facts
    }
}
