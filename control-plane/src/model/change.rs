//! What can change, as it stands in the journal. Applying the changes of a journal in order gives the
//! state; nothing else does.
//!
//! Several control planes may serve one fleet, each with a journal of its own that takes in the others' changes.
//! They come in another order there, so applying them must give the same: what ends keys is united, and of two
//! changes to the same thing the one with the later [`Mark`] counts.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use keygate_core::decide::cutoff::{Cutoff, Lockdown};
use keygate_core::decide::limits::{Limit, Override};
use keygate_core::decide::policy::Policy;
use serde::{Deserialize, Serialize};

use crate::model::approval::Proposal;
use crate::model::canary::Test;
use crate::model::key::{Ended, KeyRecord, RevocationReason};
use crate::model::limits;
use crate::model::rollout::Flags;
use crate::model::state::Settings;
use crate::platform::hlc::{Mark, Origin};
use crate::secrets::record::{SecretRecord, SecretState};

/// A change to be written to the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Whose key did it, or `system`, `redis`.
    pub actor: String,
    /// Its [`Mark::stamp`].
    pub stamp: u64,
    /// Where it was made, if not here.
    pub origin: Option<Origin>,
    /// What it is.
    pub change: Change,
}

impl Entry {
    /// Its mark, in the journal of `here`.
    pub fn mark(&self, here: u64) -> Mark {
        let source = self.origin.as_ref().map_or(here, |origin| origin.source);
        Mark { stamp: self.stamp, source: Reverse(source) }
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Change {
    /// A new line of history.
    Genesis {
        /// Its number: the Unix milliseconds of its beginning.
        source: u64,
    },
    /// This journal is an older copy of one that went on: what follows is another line of history, into which the
    /// changes that the copy lacks are taken as those of another control plane.
    LineBegun {
        /// Its number.
        source: u64,
        /// Whether changes that the copy lacks are lost for good, so that proxies shall not wait for them.
        accepts_loss: bool,
    },
    /// The configuration says something else than before.
    SettingsChanged {
        /// What it says.
        settings: Settings,
    },
    /// A signing secret was made.
    SecretCreated {
        /// The secret, sealed.
        secret: SecretRecord,
        /// The request that had it made, so that the same request again makes no other.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idempotency: Option<Idempotency>,
    },
    /// A signing secret went on to a later stage.
    SecretMoved {
        /// The secret as it is now, sealed.
        secret: SecretRecord,
        /// What justifies that proxies were not waited for, if they were not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        justification: Option<String>,
    },
    /// Every live proxy knows a secret that became active before that; from now on it signs.
    SecretAnnounced {
        /// Its id.
        kid: String,
        /// What justifies that proxies were not waited for, if they were not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        justification: Option<String>,
    },
    /// The data key came of secrets that another control plane made: they can be opened here now.
    SecretsOpened {},
    /// A key was issued.
    KeyIssued {
        /// The key; not the token, which can be signed again from it.
        key: Box<KeyRecord>,
        /// The request that created it, so that the same request again gives the same key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idempotency: Option<Idempotency>,
    },
    /// A key was revoked, for good.
    KeyRevoked {
        /// The key's id.
        key_id: String,
        /// The token's id.
        jti: String,
        /// The key's role.
        role: String,
        /// When the key would have expired; the revocation is kept until then. Unix seconds.
        expires_at: u64,
        /// When, why and by whom.
        revocation: Ended<RevocationReason>,
    },
    /// A token's id was revoked that belongs to no key known here: of a key not seen yet, or a foreign one.
    JtiRevoked {
        /// The token's id.
        jti: String,
        /// Until when the revocation is kept: no key issued before it lives longer. Unix seconds.
        expires_at: u64,
        /// When, why and by whom.
        revocation: Ended<RevocationReason>,
    },
    /// A key was suspended.
    KeySuspended {
        /// The key's id.
        key_id: String,
        /// The token's id.
        jti: String,
        /// When the key would have expired; the suspension is kept until then. Unix seconds.
        expires_at: u64,
        /// When, why and by whom.
        suspension: Ended<Option<String>>,
    },
    /// A suspension ended.
    KeyResumed {
        /// The key's id.
        key_id: String,
        /// The token's id.
        jti: String,
    },
    /// Keys that have expired were forgotten: their revocations and suspensions were dropped.
    ExpiredForgotten {
        /// Those whose `exp` is not later. From now on such a key has expired whatever any clock says. Unix
        /// seconds.
        until: u64,
    },
    /// The revocation set was cut anew for its size; proxies take it over as a snapshot.
    RevocationsRebuilt {},
    /// Another control plane changed something that is its own matter, but for this.
    PeerChanged {
        /// The longest life of a key that it issues, in seconds; 0: not that.
        max_life_s: u64,
    },
    /// Something was written into the shared store by hand that cannot be honoured.
    EditRefused {
        /// The Redis key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Many keys were revoked by a rule.
    CutoffAdded {
        /// The rule.
        cutoff: Cutoff,
        /// Why.
        reason: RevocationReason,
        /// The key that gave the second approval, if it needed one and got it. Whoever asked for it is in its
        /// [`Change::CutoffProposed`], which it ends.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        approved_by: Option<String>,
        /// What justifies that it needed a second approval and did without.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        break_glass: Option<String>,
    },
    /// A rule was asked for that needs a second approval.
    CutoffProposed {
        /// The rule and who asked for it.
        proposal: Proposal,
    },
    /// Such a request was taken back, or expired.
    CutoffWithdrawn {
        /// The id of the rule.
        id: String,
    },
    /// A rule in force was lifted.
    CutoffLifted {
        /// Its id.
        id: String,
    },
    /// A lockdown was put in place of the one before, or lifted.
    LockdownChanged {
        /// The new one; `None`: lifted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lockdown: Option<Lockdown>,
    },
    /// A canary test was defined, or put in place of the one before.
    CanaryTestPut {
        /// It.
        test: Box<Test>,
    },
    /// A canary test was removed.
    CanaryTestDeleted {
        /// Its id.
        id: String,
    },
    /// The route policy was replaced.
    PolicyReplaced {
        /// The new one.
        policy: Policy,
    },
    /// The limits of keys were changed.
    LimitsChanged {
        /// What is set in place of the configuration's from then on.
        limits: Box<limits::Set>,
    },
    /// Limits were overridden for a time, or that was lifted.
    LimitsOverridden {
        /// By what; `None`: lifted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        emergency: Option<Override>,
    },
    /// Who keeps the ledger of limits was decided.
    LimitsKept {
        /// The control plane that does from then on, by its line of history.
        keeper: u64,
    },
    /// The rollout was changed.
    RolloutChanged {
        /// What is set from then on.
        flags: Box<Flags>,
    },
}

impl Change {
    /// The one that revokes a key.
    pub fn revoking(key: &KeyRecord, revocation: Ended<RevocationReason>) -> Self {
        Self::KeyRevoked {
            key_id: key.key_id.clone(),
            jti: key.jti.clone(),
            role: key.role.clone(),
            expires_at: key.expires_at,
            revocation,
        }
    }

    /// What it does: its type, as it stands in the journal.
    pub const fn action(&self) -> &'static str {
        match self {
            Self::Genesis { .. } => "genesis",
            Self::LineBegun { .. } => "line_begun",
            Self::SettingsChanged { .. } => "settings_changed",
            Self::SecretCreated { .. } => "secret_created",
            Self::SecretMoved { secret, .. } => match secret.state {
                SecretState::Rotating => "secret_rotating",
                SecretState::Active => "secret_activated",
                SecretState::Previous => "secret_retired",
                SecretState::Expired => "secret_expired",
            },
            Self::SecretAnnounced { .. } => "secret_announced",
            Self::SecretsOpened {} => "secrets_opened",
            Self::KeyIssued { .. } => "key_issued",
            Self::KeyRevoked { .. } => "key_revoked",
            Self::JtiRevoked { .. } => "jti_revoked",
            Self::KeySuspended { .. } => "key_suspended",
            Self::KeyResumed { .. } => "key_resumed",
            Self::ExpiredForgotten { .. } => "expired_forgotten",
            Self::RevocationsRebuilt {} => "revocations_rebuilt",
            Self::PeerChanged { .. } => "peer_changed",
            Self::EditRefused { .. } => "edit_refused",
            Self::CutoffAdded { .. } => "cutoff_added",
            Self::CutoffLifted { .. } => "cutoff_lifted",
            Self::CutoffProposed { .. } => "cutoff_proposed",
            Self::CutoffWithdrawn { .. } => "cutoff_withdrawn",
            Self::LockdownChanged { .. } => "lockdown_changed",
            Self::CanaryTestPut { .. } => "canary_test_put",
            Self::CanaryTestDeleted { .. } => "canary_test_deleted",
            Self::PolicyReplaced { .. } => "policy_replaced",
            Self::LimitsChanged { .. } => "limits_changed",
            Self::LimitsOverridden { .. } => "limits_overridden",
            Self::LimitsKept { .. } => "limits_kept",
            Self::RolloutChanged { .. } => "rollout_changed",
        }
    }

    /// Whether it moves a signing secret on.
    pub fn is_of_secrets(&self) -> bool {
        matches!(self, Self::SecretCreated { .. } | Self::SecretMoved { .. } | Self::SecretAnnounced { .. })
    }

    /// The signing secret as it is from then on, if it is about one.
    pub fn secret(&self) -> Option<&SecretRecord> {
        match self {
            Self::SecretCreated { secret, .. } | Self::SecretMoved { secret, .. } => Some(secret),
            _ => None,
        }
    }

    /// The id of what it is about, if it is about one thing.
    pub fn target(&self) -> Option<&str> {
        match self {
            Self::KeyIssued { key, .. } => Some(&key.key_id),
            Self::KeyRevoked { key_id, .. }
            | Self::KeySuspended { key_id, .. }
            | Self::KeyResumed { key_id, .. } => Some(key_id),
            Self::JtiRevoked { jti, .. } => Some(jti),
            Self::SecretCreated { secret, .. } | Self::SecretMoved { secret, .. } => Some(&secret.kid),
            Self::SecretAnnounced { kid, .. } => Some(kid),
            Self::CutoffAdded { cutoff, .. } => Some(&cutoff.id),
            Self::CutoffProposed { proposal } => Some(&proposal.cutoff.id),
            Self::CanaryTestPut { test } => Some(&test.id),
            Self::CutoffLifted { id } | Self::CutoffWithdrawn { id } | Self::CanaryTestDeleted { id } => {
                Some(id)
            }
            Self::EditRefused { key, .. } => Some(key),
            _ => None,
        }
    }

    /// Why it was made, if that was said.
    pub fn reason(&self) -> Option<String> {
        match self {
            Self::KeyRevoked { revocation, .. } | Self::JtiRevoked { revocation, .. } => {
                Some(revocation.reason.label().into())
            }
            Self::CutoffAdded { reason, .. } => Some(reason.label().into()),
            Self::CutoffProposed { proposal } => Some(proposal.reason.label().into()),
            Self::KeySuspended { suspension, .. } => suspension.reason.clone(),
            Self::EditRefused { problem, .. } => Some(problem.clone()),
            Self::SecretCreated { secret, .. } => secret.why.clone(),
            Self::RolloutChanged { flags } => flags.cause.clone(),
            Self::SecretMoved { justification, .. } | Self::SecretAnnounced { justification, .. } => {
                justification.clone()
            }
            _ => None,
        }
    }

    /// What became of it, as it stands in the journal.
    pub const fn outcome(&self) -> &'static str {
        match self {
            Self::EditRefused { .. } => "refused",
            _ => "done",
        }
    }

    /// What other control planes take in: the change itself, unless it is a matter of this one alone. When keys
    /// have expired each judges by its own clock.
    pub fn for_peers(&self) -> Self {
        match self {
            Self::SettingsChanged { settings } => Self::PeerChanged { max_life_s: settings.max_life_s() },
            Self::Genesis { .. }
            | Self::LineBegun { .. }
            | Self::RevocationsRebuilt {}
            | Self::ExpiredForgotten { .. }
            | Self::SecretsOpened {}
            | Self::EditRefused { .. } => Self::PeerChanged { max_life_s: 0 },
            change => change.clone(),
        }
    }

    /// Whether it changes the rules that proxies have.
    pub fn is_of_rules(&self) -> bool {
        matches!(
            self,
            Self::SettingsChanged { .. }
                | Self::SecretCreated { .. }
                | Self::SecretMoved { .. }
                | Self::SecretAnnounced { .. }
                | Self::SecretsOpened {}
                | Self::ExpiredForgotten { .. }
                | Self::CutoffAdded { .. }
                | Self::CutoffLifted { .. }
                | Self::LockdownChanged { .. }
                | Self::PolicyReplaced { .. }
                | Self::LimitsChanged { .. }
                | Self::LimitsOverridden { .. }
                | Self::RolloutChanged { .. }
        )
    }

    /// Whether it ends keys. Such changes are still taken when the disk is full.
    pub fn ends_keys(&self) -> bool {
        matches!(
            self,
            Self::KeyRevoked { .. }
                | Self::JtiRevoked { .. }
                | Self::KeySuspended { .. }
                | Self::CutoffAdded { .. }
                | Self::LockdownChanged { lockdown: Some(_) }
        )
    }

    /// What of it is personal data, if anything is. What people wrote freely, as a key's name or why a key was
    /// suspended, does not count: that is for them to read.
    pub fn personal(&mut self) -> Option<Personal<'_>> {
        match self {
            Self::KeyIssued { key, idempotency } => {
                let owner = key.owner.as_mut();
                let metadata = Some(&mut key.metadata).filter(|metadata| !metadata.is_empty());
                if owner.is_none() && metadata.is_none() {
                    return None;
                }
                let body = idempotency.as_mut().map(|seen| &mut seen.body);
                Some(Personal { owner, metadata, body, limits: None })
            }
            Self::LimitsChanged { limits } => {
                let limits = Some(&mut limits.owners).filter(|owners| !owners.is_empty())?;
                Some(Personal { owner: None, metadata: None, body: None, limits: Some(limits) })
            }
            Self::CutoffAdded { cutoff, .. } => Personal::of(&mut cutoff.scope.owner),
            Self::CutoffProposed { proposal } => Personal::of(&mut proposal.cutoff.scope.owner),
            Self::Genesis { .. }
            | Self::LineBegun { .. }
            | Self::SettingsChanged { .. }
            | Self::SecretCreated { .. }
            | Self::SecretMoved { .. }
            | Self::SecretAnnounced { .. }
            | Self::SecretsOpened {}
            | Self::PeerChanged { .. }
            | Self::EditRefused { .. }
            | Self::KeyRevoked { .. }
            | Self::JtiRevoked { .. }
            | Self::KeySuspended { .. }
            | Self::KeyResumed { .. }
            | Self::ExpiredForgotten { .. }
            | Self::RevocationsRebuilt {}
            | Self::CutoffWithdrawn { .. }
            | Self::CutoffLifted { .. }
            | Self::LockdownChanged { .. }
            | Self::CanaryTestPut { .. }
            | Self::CanaryTestDeleted { .. }
            | Self::PolicyReplaced { .. }
            | Self::LimitsOverridden { .. }
            | Self::LimitsKept { .. }
            | Self::RolloutChanged { .. } => None,
        }
    }

    /// The owner of the key or of the keys that it is about, as [`Change::personal`] has it.
    pub fn owner(&self) -> Option<&str> {
        match self {
            Self::KeyIssued { key, .. } => key.owner.as_deref(),
            Self::CutoffAdded { cutoff, .. } => cutoff.scope.owner.as_deref(),
            Self::CutoffProposed { proposal } => proposal.cutoff.scope.owner.as_deref(),
            _ => None,
        }
    }

    /// The id of the key whose record it alters, if it alters one.
    pub fn altered_key(&self) -> Option<&str> {
        match self {
            Self::KeyRevoked { key_id, .. }
            | Self::KeySuspended { key_id, .. }
            | Self::KeyResumed { key_id, .. } => Some(key_id),
            Self::Genesis { .. }
            | Self::LineBegun { .. }
            | Self::SettingsChanged { .. }
            | Self::SecretCreated { .. }
            | Self::SecretMoved { .. }
            | Self::SecretAnnounced { .. }
            | Self::SecretsOpened {}
            | Self::KeyIssued { .. }
            | Self::JtiRevoked { .. }
            | Self::ExpiredForgotten { .. }
            | Self::RevocationsRebuilt {}
            | Self::PeerChanged { .. }
            | Self::EditRefused { .. }
            | Self::CutoffAdded { .. }
            | Self::CutoffProposed { .. }
            | Self::CutoffWithdrawn { .. }
            | Self::CutoffLifted { .. }
            | Self::LockdownChanged { .. }
            | Self::CanaryTestPut { .. }
            | Self::CanaryTestDeleted { .. }
            | Self::PolicyReplaced { .. }
            | Self::LimitsChanged { .. }
            | Self::LimitsOverridden { .. }
            | Self::LimitsKept { .. }
            | Self::RolloutChanged { .. } => None,
        }
    }

    /// The request that asked for it, if that is remembered, and the id of what it made.
    pub fn request(&self) -> Option<(&Idempotency, &str)> {
        match self {
            Self::KeyIssued { key, idempotency } => Some((idempotency.as_ref()?, &key.key_id)),
            Self::SecretCreated { secret, idempotency } => Some((idempotency.as_ref()?, &secret.kid)),
            _ => None,
        }
    }

    /// Alters the record of [`Change::altered_key`].
    pub fn alter(&self, key: &mut KeyRecord) {
        match self {
            Self::KeyRevoked { revocation, .. } => key.revoked = Some(revocation.clone()),
            Self::KeySuspended { suspension, .. } => key.suspended = Some(suspension.clone()),
            Self::KeyResumed { .. } => key.suspended = None,
            _ => {}
        }
    }
}

/// What of a change is personal data.
#[derive(Debug)]
pub struct Personal<'c> {
    /// Whose key it is, or whose keys.
    pub owner: Option<&'c mut String>,
    /// What its creator keeps with it, if that is anything.
    pub metadata: Option<&'c mut serde_json::Map<String, serde_json::Value>>,
    /// The digest of a request that has these: whoever has it can try them out.
    pub body: Option<&'c mut String>,
    /// The limits of owners, by these.
    pub limits: Option<&'c mut BTreeMap<String, Option<Limit>>>,
}

impl<'c> Personal<'c> {
    fn of(owner: &'c mut Option<String>) -> Option<Self> {
        owner.as_mut().map(|owner| Self { owner: Some(owner), metadata: None, body: None, limits: None })
    }
}

/// A request that may come twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Idempotency {
    /// SHA-256 of caller, path and `Idempotency-Key`, base64url.
    pub request_id: String,
    /// SHA-256 of the body, base64url.
    pub body: String,
}
