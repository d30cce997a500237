//! What can change, as it stands in the journal. Applying the changes of a journal in order gives the
//! state; nothing else does.
//!
//! Several control planes may serve one fleet, each with a journal of its own that takes in the others' changes.
//! They come in another order there, so applying them must give the same: what ends keys is united, and of two
//! changes to the same thing the one with the later [`Mark`] counts.

mod facts;
mod fingerprints;

use std::cmp::Reverse;
use std::collections::BTreeMap;

use keygate_core::decide::cutoff::{Cutoff, Lockdown};
use keygate_core::decide::limits::{Limit, Override};
use keygate_core::decide::policy::Policy;
use serde::{Deserialize, Serialize};

pub use self::facts::{Alteration, Facts};
pub use self::fingerprints::Fingerprints;
use crate::model::approval::Proposal;
use crate::model::canary::Test;
use crate::model::key::{Ended, KeyRecord, RevocationReason};
use crate::model::limits;
use crate::model::rollout::Flags;
use crate::model::state::Settings;
use crate::platform::hlc::{Mark, Origin};
use crate::secrets::record::SecretRecord;

/// A change to be written to the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Whose key did it, or `system`, `redis`.
    pub actor: String,
    /// Its [`Mark::stamp`].
    pub stamp: u64,
    /// Where it was made, if not here.
    pub origin: Option<Origin>,
    /// The reason that was given for it, where the change itself has none.
    pub reason: Option<String>,
    /// The change that would undo it, where it takes the place of something: for readers of the journal. The writer finds
    /// it as it commits the entry.
    pub before: Option<Box<Change>>,
    /// What it is.
    pub change: Change,
}

impl Entry {
    /// A change that is made here, without a reason.
    pub fn new(actor: impl Into<String>, stamp: u64, change: Change) -> Self {
        Self { actor: actor.into(), stamp, origin: None, reason: None, before: None, change }
    }

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
    HistoryForked {
        /// Its number.
        source: u64,
    },
    /// A proxy enforced changes of a line of history that are lacking here, and returned what it knew: all that ended
    /// keys is here from now on, so proxies may go on from that version.
    StateReturned {
        /// The line of history.
        source: u64,
        /// The number of the last change that the proxy enforced.
        seq: u64,
        /// The ids of the secrets that verified there. Older ones that are not among them had ended.
        kids: Vec<String>,
    },
    /// A proxy that returned its state knew of revoked and suspended tokens that are unknown here.
    FingerprintsEnded {
        /// The revoked ones.
        revoked: Fingerprints,
        /// The suspended ones.
        suspended: Fingerprints,
        /// Until when that is kept: no key issued before lives longer. Unix seconds.
        expires_at: u64,
        /// When the proxy returned them. Unix seconds.
        at: u64,
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
    QuotaOwnerChanged {
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

    /// What other control planes take in: the change itself, unless it is a matter of this one alone. When keys
    /// have expired each judges by its own clock.
    pub fn for_peers(&self) -> Self {
        match self {
            Self::SettingsChanged { settings } => Self::PeerChanged { max_life_s: settings.max_life_s() },
            Self::Genesis { .. }
            | Self::HistoryForked { .. }
            | Self::StateReturned { .. }
            | Self::RevocationsRebuilt {}
            | Self::ExpiredForgotten { .. }
            | Self::SecretsOpened {}
            | Self::EditRefused { .. } => Self::PeerChanged { max_life_s: 0 },
            change => change.clone(),
        }
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
            | Self::HistoryForked { .. }
            | Self::StateReturned { .. }
            | Self::FingerprintsEnded { .. }
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
            | Self::QuotaOwnerChanged { .. }
            | Self::RolloutChanged { .. } => None,
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
