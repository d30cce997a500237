//! The state that proxies enforce: one immutable [`State`], built by the writer with every change and read through a
//! `watch` channel.

mod apply;
mod before;
mod counts;
mod delta_log;
mod settings;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use keygate_core::decide::cutoff::{Cutoff, Lockdown};
use keygate_core::decide::limits::{Limits, Override};
use keygate_core::decide::policy::Policy;
use keygate_core::decide::rollout::Rollout;
use keygate_core::decide::rules::{self, Rules, RulesError, Ruleset};
use keygate_core::revocation::{ExactSet, Fingerprint, Op, Revocations as _, Standing};
use keygate_core::secret::Secret;
use keygate_core::version::Version;

pub use self::counts::{Census, Recent};
pub use self::delta_log::Deltas;
pub use self::settings::Settings;
use crate::model::approval::Proposal;
use crate::model::canary::Test;
use crate::model::expiry::Expiries;
use crate::model::limits;
use crate::model::provenance::{CutoffOrder, Provenance};
use crate::model::registrations::Registrations;
use crate::model::rollout::Flags;
use crate::model::rollout::Pasts;
use crate::platform::hlc::Mark;
use crate::secrets::keyring::Keyring;
use crate::secrets::record::{Ring, SecretError};

/// What names a shard in a snapshot.
const SHA256_BYTES: usize = 32;

/// Canary tests by their ids; `None`: removed.
pub type CanaryTests = BTreeMap<String, Option<Test>>;

/// The state, as one version of it.
#[derive(Debug)]
pub struct State {
    /// Its version.
    pub version: Version,
    /// When it was published.
    pub published: Instant,
    /// The rules, ready to decide with.
    pub rules: Ruleset,
    /// The rules' bytes. With HS256 the secret is among them.
    pub rules_bytes: Secret<Vec<u8>>,
    /// The revoked and the suspended.
    pub revocations: ExactSet,
    /// The version of the last change of the policy, for `If-Match`.
    pub policy_seq: u64,
    /// The rollout that is set; of it proxies have what the rules say.
    pub flags: Arc<Flags>,
    /// Whether there is a V1, without which no rollout is in force.
    pub has_v1: bool,
    /// Former states of the rollout.
    pub pasts: Arc<Pasts>,
    /// The stamp of the last change of the rollout. Not for proxies.
    pub rollout_stamp: u64,
    /// The override of limits, also one that has ended.
    pub limits_override: Option<Override>,
    /// The stamp of its last change. Not for proxies.
    pub override_stamp: u64,
    /// Owner of the ledger of limits, if that was decided. Not for proxies.
    pub limits_keeper: Option<Keeper>,
    /// The secrets.
    pub secrets: Arc<Ring>,
    /// Canary tests by their ids; `None`: removed. Not for proxies.
    pub canary_tests: Arc<CanaryTests>,
    /// Keys that are neither revoked nor expired, by role and the minute of their expiry.
    pub census: Census,
    /// The revocations of the last day.
    pub recent: Recent,
    /// Cut-offs that wait for a second approval, also those whose time is over. Not for proxies.
    pub proposals: Vec<Proposal>,
    /// Who ordered each cut-off in force, by its id. Not for proxies.
    pub cutoff_orders: Arc<BTreeMap<String, CutoffOrder>>,
    /// Who ordered or lifted the lockdown last. Not for proxies.
    pub lockdown_order: Option<Provenance>,
    /// Who ordered or lifted the override of limits last. Not for proxies.
    pub override_order: Option<Provenance>,
    /// The stamp of the last change of the lockdown. Not for proxies.
    pub lockdown_stamp: u64,
    /// Last change of each other control plane that was taken in, by its source. Not for proxies.
    pub merged: Arc<BTreeMap<u64, u64>>,
    /// The number of the first change of this line of history. Not for proxies.
    pub line_start: u64,
    /// The lines that went before in this journal, and up to which change of each nothing is lacking. Not for
    /// proxies.
    pub lines: Arc<BTreeMap<u64, u64>>,
    /// Of lines of history whose changes are lacking here, the last one of which proxies returned what ended keys. Not for
    /// proxies.
    pub returned: Arc<BTreeMap<u64, u64>>,
}

/// The control plane that keeps the ledger of limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeper {
    /// Its line of history.
    pub source: u64,
    /// The stamp of the change that made it so.
    pub since: u64,
}

/// The state as the writer changes it. [`State`] is a picture of it.
#[derive(Debug, Clone, Default)]
pub struct Model {
    settings: Arc<Settings>,
    source: u64,
    /// The number of the first change of this line of history.
    line_start: u64,
    /// The lines that went before in this journal, and up to which change of each nothing is lacking.
    lines: Arc<BTreeMap<u64, u64>>,
    /// Of lines whose changes are lacking here, the last one of which proxies returned what ended keys.
    returned: Arc<BTreeMap<u64, u64>>,
    /// The number of the last change that was made here.
    last_own_seq: u64,
    seq: u64,
    policy: Arc<Policy>,
    policy_seq: u64,
    policy_mark: Mark,
    limits: Arc<limits::Set>,
    limits_mark: Mark,
    limits_override: Option<Override>,
    override_mark: Mark,
    override_order: Option<Provenance>,
    limits_keeper: Option<(Keeper, Mark)>,
    flags: Arc<Flags>,
    rollout_mark: Mark,
    pasts: Arc<Pasts>,
    secrets: Arc<Ring>,
    canary_tests: Arc<CanaryTests>,
    /// The last change of each.
    canary_marks: Arc<BTreeMap<String, Mark>>,
    revocations: ExactSet,
    expiries: Expiries,
    expired_until: u64,
    /// The latest second at which anything was issued or revoked.
    latest_s: u64,
    longest_life_s: u64,
    cutoffs: Vec<Cutoff>,
    /// Cut-offs that were lifted, so that one which comes late from another control plane does not come back.
    lifted: Arc<BTreeSet<String>>,
    proposals: Vec<Proposal>,
    cutoff_orders: Arc<BTreeMap<String, CutoffOrder>>,
    lockdown: Option<Lockdown>,
    lockdown_order: Option<Provenance>,
    lockdown_mark: Mark,
    /// The last suspension or resumption of each key that had one.
    suspension_marks: Arc<BTreeMap<Fingerprint, Mark>>,
    recent: Recent,
    census: Census,
    registrations: Registrations,
    /// Last change of each other control plane that was taken in, by its source.
    merged: Arc<BTreeMap<u64, u64>>,
    /// The latest stamp of a change made here.
    latest_own_stamp: u64,
    /// The latest stamp of a change taken in.
    latest_peer_stamp: u64,
}

/// The effect of a change on proxies.
#[derive(Debug, Default)]
pub struct Effect {
    /// Changes of the revocation set.
    pub ops: Vec<Op>,
    /// Whether the rules changed.
    pub rules: bool,
    /// Changed members of the rules; found when they are published.
    pub members: BTreeSet<String>,
    /// Whether proxies take a snapshot, however little changed.
    pub rebuilt: bool,
    /// Whether secrets changed, so that they are to be opened.
    pub secrets: bool,
    /// Whether another change to the same thing counts more, so that this one does nothing.
    pub superseded: bool,
}

impl Effect {
    /// Whether proxies need not know.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty() && !self.rules && !self.rebuilt
    }
}

impl Model {
    /// Whether there is a history at all.
    pub fn is_empty(&self) -> bool {
        self.source == 0
    }

    /// The last change that proxies must know.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// The line of history.
    pub fn source(&self) -> u64 {
        self.source
    }

    /// When a line of history of this journal ended, Unix milliseconds: at the beginning of the next one. `None`: it is the
    /// present one, or none of this journal.
    pub fn end_of_line(&self, source: u64) -> Option<u64> {
        self.lines.get(&source)?;
        let later = self.lines.keys().copied().filter(|line| *line > source).min();
        Some(later.unwrap_or(self.source))
    }

    /// The stamp of the next change that is made here.
    pub fn next_stamp(&self, now_ms: u64) -> u64 {
        now_ms.max(self.latest_own_stamp).max(self.latest_peer_stamp.saturating_add(1))
    }

    /// Last change of each other control plane that was taken in, by its source.
    pub fn merged(&self) -> &Arc<BTreeMap<u64, u64>> {
        &self.merged
    }

    /// The settings as the configuration had them last.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The longest life that was ever issued, in seconds. Not only the one of now: were it shortened and
    /// lengthened again, what ended the keys of before must still be there.
    pub fn longest_life_s(&self) -> u64 {
        self.longest_life_s
    }

    /// Number of revoked or suspended keys that had expired at `until`, Unix seconds, and are not forgotten yet.
    pub fn due(&self, until: u64) -> usize {
        self.expiries.due(until)
    }

    /// Keys whose `exp` is not later have expired, whatever any clock says. Unix seconds.
    pub fn expired_until(&self) -> u64 {
        self.expired_until
    }

    /// `now`, Unix seconds, unless the history says that it was later already: then the clock was set back.
    pub fn latest_s(&self, now: u64) -> u64 {
        now.max(self.latest_s)
    }

    /// The revoked and the suspended.
    pub fn revocations(&self) -> &ExactSet {
        &self.revocations
    }

    /// Whether a token's id is revoked.
    pub fn is_revoked(&self, jti: &str) -> bool {
        (&self.revocations).standing(Fingerprint::of(jti)) == Standing::Revoked
    }

    /// The cut-offs whose every key has expired by itself at `now`, Unix seconds: they say nothing any more.
    pub fn spent_cutoffs(&self, now: u64) -> impl Iterator<Item = &Cutoff> {
        self.cutoffs.iter().filter(move |cutoff| cutoff.is_spent(self.longest_life_s, now))
    }

    /// The cut-offs in force.
    pub fn cutoffs(&self) -> &[Cutoff] {
        &self.cutoffs
    }

    /// Whether a cut-off was lifted.
    pub fn is_lifted(&self, id: &str) -> bool {
        self.lifted.contains(id)
    }

    /// The cut-offs that wait for a second approval, also those whose time is over.
    pub fn proposals(&self) -> &[Proposal] {
        &self.proposals
    }

    /// Owner of the ledger of limits, if that was decided.
    pub fn limits_keeper(&self) -> Option<Keeper> {
        self.limits_keeper.map(|(keeper, _)| keeper)
    }

    /// The lockdown that was set last, also when its end has passed.
    pub fn lockdown(&self) -> Option<&Lockdown> {
        self.lockdown.as_ref()
    }

    /// The policy and the number of its last change.
    pub fn policy(&self) -> (&Policy, u64) {
        (&self.policy, self.policy_seq)
    }

    /// The canary tests that were defined or removed.
    pub fn canary_tests(&self) -> &CanaryTests {
        &self.canary_tests
    }

    /// The secrets.
    pub fn secrets(&self) -> &Ring {
        &self.secrets
    }

    /// Opens the secrets that changed. Those of other control planes whose data key is not here stay locked.
    ///
    /// # Errors
    /// When one does not open.
    pub fn open_secrets(&mut self, keys: &Keyring) -> Result<(), SecretError> {
        let seq = self.seq;
        Arc::make_mut(&mut self.secrets).open(keys, seq)
    }

    /// The limits that are set in place of the configuration's.
    pub fn limits(&self) -> &limits::Set {
        &self.limits
    }

    /// The override of limits, also one that has ended.
    pub fn limits_override(&self) -> Option<&Override> {
        self.limits_override.as_ref()
    }

    /// The limits that proxies would get, were these set and overridden so.
    pub fn limits_with(&self, set: &limits::Set, emergency: Option<&Override>) -> Limits {
        if self.settings.without_limits {
            return Limits::default();
        }
        set.in_force(&self.settings.role_limits, emergency)
    }

    /// The limits that proxies have.
    pub fn limits_in_force(&self) -> Limits {
        self.limits_with(&self.limits, self.limits_override.as_ref())
    }

    /// Registrations of the last hour by keys that are no administrator's.
    pub fn registrations(&self) -> &Registrations {
        &self.registrations
    }

    /// The rollout that is set.
    pub fn flags(&self) -> &Flags {
        &self.flags
    }

    /// Former states of the rollout, and the one in force.
    pub fn pasts(&self) -> &Pasts {
        &self.pasts
    }

    /// Whether there is a V1.
    pub fn has_v1(&self) -> bool {
        self.settings.has_v1
    }

    /// The `iss` and `aud` of keys.
    pub fn issuer(&self) -> (&str, Option<&str>) {
        (&self.settings.issuer, self.settings.audience.as_deref())
    }

    /// The rules that proxies would get.
    pub fn rules(&self) -> Rules {
        let settings = &self.settings;
        let mut cutoffs = self.cutoffs.clone();
        cutoffs.sort_by(|a, b| a.id.cmp(&b.id)); // The same bytes in whatever order they came.
        Rules {
            format: rules::FORMAT,
            issuer: settings.issuer.clone(),
            audience: settings.audience.clone(),
            realm: settings.realm.clone(),
            leeway_s: settings.leeway_s,
            max_life_s: settings.max_life_s,
            hard_age_s: settings.hard_age_s,
            keys: self.secrets.verification_keys(),
            policy: (*self.policy).clone(),
            cutoffs,
            lockdown: self.lockdown.clone(),
            limits: self.limits_in_force(),
            // Where there is no V1, nothing is sent there, whatever was set when there was one.
            rollout: if settings.has_v1 { self.flags.in_force() } else { Rollout::default() },
            expired_until: self.expired_until,
        }
    }

    /// The bytes of the rules without cut-offs and lockdown.
    pub fn document_bytes(&self) -> usize {
        Rules { cutoffs: Vec::new(), lockdown: None, ..self.rules() }.encode().len()
    }

    /// A picture of it at an instant, `rules` taken over from `before` if they did not change.
    ///
    /// # Errors
    /// When the rules do not hold.
    pub fn picture(&self, before: Option<&State>, at: Instant) -> Result<State, RulesError> {
        let (rules, rules_bytes) = match before {
            Some(before) => (before.rules.clone(), before.rules_bytes.clone()),
            None => {
                let bytes = Secret::new(self.rules().encode());
                // Through the bytes, as proxies read them.
                (Ruleset::try_from(Rules::decode(bytes.expose())?)?, bytes)
            }
        };
        Ok(State {
            version: Version { source: self.source, seq: self.seq },
            published: at,
            rules,
            rules_bytes,
            revocations: self.revocations.clone(),
            policy_seq: self.policy_seq,
            flags: Arc::clone(&self.flags),
            has_v1: self.settings.has_v1,
            pasts: Arc::clone(&self.pasts),
            rollout_stamp: self.rollout_mark.stamp,
            limits_override: self.limits_override.clone(),
            override_stamp: self.override_mark.stamp,
            limits_keeper: self.limits_keeper.map(|(keeper, _)| keeper),
            secrets: Arc::clone(&self.secrets),
            canary_tests: Arc::clone(&self.canary_tests),
            census: self.census.clone(),
            recent: self.recent.clone(),
            proposals: self.proposals.clone(),
            cutoff_orders: self.cutoff_orders.clone(),
            lockdown_order: self.lockdown_order.clone(),
            override_order: self.override_order.clone(),
            lockdown_stamp: self.lockdown_mark.stamp,
            merged: self.merged.clone(),
            line_start: self.line_start,
            lines: self.lines.clone(),
            returned: self.returned.clone(),
        })
    }
}

impl State {
    /// Whether a line of history is that of this control plane, or went before it in its journal.
    pub fn is_own(&self, source: u64) -> bool {
        source == self.version.source || self.lines.contains_key(&source)
    }

    /// Whether another control plane was ever heard of.
    pub fn has_peers(&self) -> bool {
        self.merged.keys().any(|source| !self.is_own(*source))
    }

    /// Number of bytes that a proxy without any state loads: rules, digests and shards, but for some bytes around them.
    pub fn snapshot_bytes(&self) -> usize {
        let shards = self.revocations.shards().iter();
        self.rules_bytes.expose().len()
            + shards.map(|shard| shard.encoded_bytes() + SHA256_BYTES).sum::<usize>()
    }
}
