//! The state that proxies enforce: one immutable [`State`], built anew by the writer with every change,
//! and read by everybody through a `watch` channel.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use keygate_core::decide::cutoff::{Cutoff, Lockdown};
use keygate_core::decide::limits::{Limits, Override};
use keygate_core::decide::policy::Policy;
use keygate_core::decide::rollout::Rollout;
use keygate_core::decide::rules::{self, Rules, RulesError, Ruleset};
use keygate_core::revocation::{
    ExactSet, Fingerprint, MAX_DELTA_OPS, Op, Revocations as _, Standing, digest,
};
use keygate_core::sync::wire::{Answer, Body, NewRules};
use keygate_core::version::Version;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::model::approval::{Proposal, Warrant};
use crate::model::canary::Test;
use crate::model::change::{Change, Entry};
use crate::model::expiry::Expiries;
use crate::model::limits;
use crate::model::registrations::Registrations;
use crate::model::rollout::Flags;
use crate::model::rollout::Past;
use crate::model::rollout::Pasts;
use crate::platform::hlc::{Mark, Origin};
use crate::secrets::keyring::Keyring;
use crate::secrets::record::{Ring, SecretError};

/// How many changes back a proxy can follow by delta.
const DELTAS_KEPT: usize = 65_536;

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
    pub rules_bytes: Zeroizing<Vec<u8>>,
    /// The revoked and the suspended.
    pub revocations: ExactSet,
    /// The version of the last change of the policy, for `If-Match`.
    pub policy_seq: u64,
    /// The rollout that is set; of it proxies have what the rules say.
    pub flags: Arc<Flags>,
    /// Whether there is a V1, without which no rollout is in force.
    pub has_v1: bool,
    /// What the rollout was before.
    pub pasts: Arc<Pasts>,
    /// The stamp of the last change of the rollout. Not for proxies.
    pub rollout_stamp: u64,
    /// The override of limits, also one that has ended.
    pub limits_override: Option<Override>,
    /// The stamp of its last change. Not for proxies.
    pub override_stamp: u64,
    /// Which control plane keeps the ledger of limits, if that was decided. Not for proxies.
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
    /// How those in force took force that needed a second approval, by their id. Not for proxies.
    pub warrants: Arc<BTreeMap<String, Warrant>>,
    /// The stamp of the last change of the lockdown. Not for proxies.
    pub lockdown_stamp: u64,
    /// How far the journals of other control planes were taken in, by their source. Not for proxies.
    pub merged: Arc<BTreeMap<u64, u64>>,
    /// The number of the first change of this line of history. Not for proxies.
    pub line_start: u64,
    /// The lines that went before in this journal, and up to which change of each nothing is lacking. Not for
    /// proxies.
    pub lines: Arc<BTreeMap<u64, u64>>,
}

/// The control plane that keeps the ledger of limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeper {
    /// Its line of history.
    pub source: u64,
    /// The stamp of the change that made it so.
    pub since: u64,
}

/// Counts live keys by role and by the minute in which they expire.
#[derive(Debug, Clone, Default)]
pub struct Census(Arc<BTreeMap<String, BTreeMap<u64, u64>>>);

impl Census {
    fn change(&mut self, role: &str, expires_at: u64, by: i64) {
        let minutes = Arc::make_mut(&mut self.0).entry(role.to_owned()).or_default();
        let count = minutes.entry(expires_at / 60).or_default();
        *count = count.saturating_add_signed(by);
    }

    /// Drops what had expired at `until`, Unix seconds.
    fn forget(&mut self, until: u64) {
        for minutes in Arc::make_mut(&mut self.0).values_mut() {
            *minutes = minutes.split_off(&(until / 60));
        }
    }

    /// Keys of each role that count at `now`, Unix seconds; to the minute.
    pub fn live(&self, now: u64) -> impl Iterator<Item = (&str, u64)> {
        self.0
            .iter()
            .map(move |(role, minutes)| (role.as_str(), minutes.range(now / 60..).map(|(_, n)| n).sum()))
    }
}

/// Counts revocations of the last day by the minute.
#[derive(Debug, Clone, Default)]
pub struct Recent(Arc<BTreeMap<u64, u64>>);

impl Recent {
    const MINUTES: u64 = 24 * 60;

    fn add(&mut self, at: u64) {
        let minutes = Arc::make_mut(&mut self.0);
        if let Some(count) = minutes.get_mut(&(at / 60)) {
            *count += 1;
            return;
        }
        minutes.insert(at / 60, 1);
        *minutes = minutes.split_off(&(at / 60).saturating_sub(Self::MINUTES));
    }

    /// How many there were in the day before `now`, Unix seconds; to the minute.
    pub fn last_24h(&self, now: u64) -> u64 {
        self.0.range((now / 60).saturating_sub(Self::MINUTES)..).map(|(_, count)| count).sum()
    }
}

/// What the writer changes. [`State`] is a picture of it.
#[derive(Debug, Clone, Default)]
pub struct Model {
    settings: Arc<Settings>,
    source: u64,
    /// The number of the first change of this line of history.
    line_start: u64,
    /// The lines that went before in this journal, and up to which change of each nothing is lacking.
    lines: Arc<BTreeMap<u64, u64>>,
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
    warrants: Arc<BTreeMap<String, Warrant>>,
    lockdown: Option<Lockdown>,
    lockdown_mark: Mark,
    /// The last suspension or resumption of each key that had one.
    suspension_marks: Arc<BTreeMap<Fingerprint, Mark>>,
    recent: Recent,
    census: Census,
    registrations: Registrations,
    /// How far the journals of other control planes were taken in, by their source.
    merged: Arc<BTreeMap<u64, u64>>,
    /// The latest stamp of a change made here.
    latest_own_stamp: u64,
    /// The latest stamp of a change taken in.
    latest_peer_stamp: u64,
}

/// What the configuration says of the state. Journalled when it changed, so that proxies get a new version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Issuer of keys.
    pub issuer: String,
    /// Audience of keys, if they have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// Realm of challenges.
    pub realm: String,
    /// Tolerance of clocks, seconds.
    pub leeway_s: u64,
    /// Longest life of a key, seconds.
    pub max_life_s: u64,
    /// Age of a state from which proxies refuse, seconds.
    pub hard_age_s: u64,
    /// Whether there is a V1.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_v1: bool,
    /// Requests an hour of each role that has a limit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub role_limits: BTreeMap<String, u32>,
    /// Whether nobody's limits are enforced.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_limits: bool,
}

impl Settings {
    /// The limits that a new history begins with.
    pub fn first_limits(&self) -> Limits {
        if self.without_limits {
            Limits::default()
        } else {
            limits::Set::default().in_force(&self.role_limits, None)
        }
    }

    /// The longest life of a key, in seconds.
    pub const fn max_life_s(&self) -> u64 {
        self.max_life_s
    }
}

/// What a change means for proxies.
#[derive(Debug, Default)]
pub struct Effect {
    /// Changes of the revocation set.
    pub ops: Vec<Op>,
    /// Whether the rules changed.
    pub rules: bool,
    /// Which members of them; found when they are published.
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
    /// Applies a change that is number `seq` of the journal. A secret that it brings is opened by
    /// [`Model::open_secrets`]: one that a later change moves on need not, and may not any more.
    ///
    /// # Errors
    /// When the record of a secret is not as it was written, or would set the secret back.
    pub fn apply(&mut self, seq: u64, entry: &Entry, keys: &Keyring) -> Result<Effect, SecretError> {
        let mut effect = Effect::default();
        let mark = entry.mark(self.source);
        match &entry.origin {
            None => self.latest_own_stamp = self.latest_own_stamp.max(entry.stamp),
            Some(Origin { source, seq, .. }) => {
                self.latest_peer_stamp = self.latest_peer_stamp.max(entry.stamp);
                let merged = Arc::make_mut(&mut self.merged).entry(*source).or_default();
                *merged = (*merged).max(*seq);
            }
        }
        match &entry.change {
            Change::Genesis { source } => {
                self.source = *source;
                self.line_start = seq;
                effect.rules = true;
            }
            Change::HistoryForked { source, accepts_loss } => {
                Arc::make_mut(&mut self.merged).insert(self.source, self.last_own_seq);
                let covered = if *accepts_loss { u64::MAX } else { seq.saturating_sub(1) };
                Arc::make_mut(&mut self.lines).insert(self.source, covered);
                self.source = *source;
                self.line_start = seq;
                effect.rebuilt = true;
            }
            Change::SettingsChanged { settings } => {
                self.longest_life_s = self.longest_life_s.max(settings.max_life_s);
                self.settings = Arc::new(settings.clone());
                effect.rules = true;
            }
            Change::PeerChanged { max_life_s } => self.longest_life_s = self.longest_life_s.max(*max_life_s),
            Change::EditRefused { .. } => {}
            Change::CanaryTestPut { test } => {
                effect.superseded = !self.put_canary_test(&test.id, Some((**test).clone()), mark);
            }
            Change::CanaryTestDeleted { id } => effect.superseded = !self.put_canary_test(id, None, mark),
            Change::SecretCreated { secret, .. } | Change::SecretMoved { secret, .. } => {
                let ring = Arc::make_mut(&mut self.secrets);
                let counts = ring.take(secret, mark, (seq, entry.origin.is_none()), keys)?;
                effect.superseded = !counts;
                effect.secrets = counts;
                effect.rules = counts;
            }
            Change::SecretAnnounced { kid, .. } => {
                Arc::make_mut(&mut self.secrets).announce(kid);
                // Nothing new for proxies, but a version that can be waited for.
                effect.rules = true;
            }
            Change::SecretsOpened {} => {
                effect.secrets = true;
                effect.rules = true;
            }
            Change::CutoffAdded { cutoff, .. } if self.lifted.contains(&cutoff.id) => {
                effect.superseded = true
            }
            Change::CutoffProposed { proposal }
                if self.lifted.contains(&proposal.cutoff.id)
                    || self.cutoffs.iter().any(|cutoff| cutoff.id == proposal.cutoff.id) =>
            {
                effect.superseded = true;
            }
            Change::LockdownChanged { .. } if mark < self.lockdown_mark => effect.superseded = true,
            Change::RolloutChanged { .. } if mark < self.rollout_mark => effect.superseded = true,
            Change::LimitsChanged { .. } if mark < self.limits_mark => effect.superseded = true,
            Change::LimitsOverridden { .. } if mark < self.override_mark => effect.superseded = true,
            Change::PolicyReplaced { .. } if mark < self.policy_mark => effect.superseded = true,
            Change::QuotaOwnerChanged { .. } if self.limits_keeper.is_some_and(|(_, last)| mark < last) => {
                effect.superseded = true;
            }
            Change::QuotaOwnerChanged { keeper } => {
                self.limits_keeper = Some((Keeper { source: *keeper, since: entry.stamp }, mark));
            }
            Change::KeySuspended { jti, .. } | Change::KeyResumed { jti, .. }
                if self.suspension_marks.get(&Fingerprint::of(jti)).is_some_and(|last| mark < *last) =>
            {
                effect.superseded = true;
            }
            Change::CutoffAdded { cutoff, approved_by, break_glass, .. } => {
                if let Some(warrant) = Warrant::of(approved_by.as_ref(), break_glass.as_ref()) {
                    Arc::make_mut(&mut self.warrants).insert(cutoff.id.clone(), warrant);
                }
                self.proposals.retain(|proposal| proposal.cutoff.id != cutoff.id);
                self.cutoffs.push(cutoff.clone());
                effect.rules = true;
            }
            // Until it is approved, it is no news for proxies.
            Change::CutoffProposed { proposal } => self.proposals.push(proposal.clone()),
            Change::CutoffWithdrawn { id } => self.proposals.retain(|proposal| proposal.cutoff.id != *id),
            Change::CutoffLifted { id } => {
                self.cutoffs.retain(|cutoff| cutoff.id != *id);
                Arc::make_mut(&mut self.warrants).remove(id);
                Arc::make_mut(&mut self.lifted).insert(id.clone());
                effect.rules = true;
            }
            Change::LockdownChanged { lockdown } => {
                self.lockdown = lockdown.clone();
                self.lockdown_mark = mark;
                effect.rules = true;
            }
            Change::PolicyReplaced { policy } => {
                self.policy = Arc::new(policy.clone());
                self.policy_seq = seq;
                self.policy_mark = mark;
                effect.rules = true;
            }
            Change::LimitsChanged { limits } => {
                self.limits = Arc::from(limits.clone());
                self.limits_mark = mark;
                effect.rules = true;
            }
            Change::LimitsOverridden { emergency } => {
                self.limits_override.clone_from(emergency);
                self.override_mark = mark;
                effect.rules = true;
            }
            Change::RolloutChanged { flags } => {
                self.flags = Arc::from(flags.clone());
                self.rollout_mark = mark;
                let past =
                    Past { at_ms: entry.stamp, seq, actor: entry.actor.clone(), flags: (**flags).clone() };
                Arc::make_mut(&mut self.pasts).push(past);
                effect.rules = true;
            }
            Change::KeyIssued { key, .. } => {
                if entry.origin.is_none() {
                    self.latest_s = self.latest_s.max(key.issued_at);
                }
                self.census.change(&key.role, key.expires_at, 1);
                if let (Some(_), Some(owner)) = (&key.registered_by, &key.owner) {
                    self.registrations.note(owner, key.issued_at, self.latest_s);
                }
                Arc::make_mut(&mut self.secrets).note_key(&key.kid, key.expires_at);
            }
            Change::KeyRevoked { jti, role, expires_at, revocation, .. } => {
                // Of two control planes each may have revoked it.
                if !self.is_revoked(jti) {
                    self.census.change(role, *expires_at, -1);
                }
                self.note_revocation(revocation.at, entry.origin.is_none());
                effect.ops.push(self.keep_until(Op::Revoke(Fingerprint::of(jti)), *expires_at));
            }
            Change::JtiRevoked { jti, expires_at, revocation } => {
                self.note_revocation(revocation.at, entry.origin.is_none());
                effect.ops.push(self.keep_until(Op::Revoke(Fingerprint::of(jti)), *expires_at));
            }
            Change::KeySuspended { jti, expires_at, .. } => {
                Arc::make_mut(&mut self.suspension_marks).insert(Fingerprint::of(jti), mark);
                effect.ops.push(self.keep_until(Op::Suspend(Fingerprint::of(jti)), *expires_at));
            }
            Change::KeyResumed { jti, .. } => {
                let fingerprint = Fingerprint::of(jti);
                Arc::make_mut(&mut self.suspension_marks).insert(fingerprint, mark);
                self.revocations.apply(Op::Resume(fingerprint));
                if (&self.revocations).standing(fingerprint) == Standing::Clear {
                    self.expiries.drop_one(fingerprint);
                }
                effect.ops.push(Op::Resume(fingerprint));
            }
            Change::ExpiredForgotten { until } => {
                self.expired_until = self.expired_until.max(*until);
                self.census.forget(*until);
                let due = self.expiries.take_due(*until);
                if !self.suspension_marks.is_empty() {
                    let marks = Arc::make_mut(&mut self.suspension_marks);
                    marks.retain(|fingerprint, _| !due.contains(fingerprint));
                }
                self.revocations.forget_all(&due);
                effect.ops.extend(due.into_iter().map(Op::Forget));
                effect.rules = true;
            }
            Change::RevocationsRebuilt {} => effect.rebuilt = true,
        }
        if entry.origin.is_none() {
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

    /// Whether it counts more than what was there.
    fn put_canary_test(&mut self, id: &str, test: Option<Test>, mark: Mark) -> bool {
        let marks = Arc::make_mut(&mut self.canary_marks);
        if marks.get(id).is_some_and(|last| mark < *last) {
            return false;
        }
        marks.insert(id.to_owned(), mark);
        Arc::make_mut(&mut self.canary_tests).insert(id.to_owned(), test);
        true
    }

    fn note_revocation(&mut self, at: u64, here: bool) {
        if here {
            self.latest_s = self.latest_s.max(at);
        }
        self.recent.add(at);
    }

    fn keep_until(&mut self, op: Op, expires_at: u64) -> Op {
        self.revocations.apply(op);
        self.expiries.note(op.fingerprint(), expires_at);
        op
    }

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

    /// The stamp of the next change that is made here.
    pub fn next_stamp(&self, now_ms: u64) -> u64 {
        now_ms.max(self.latest_own_stamp).max(self.latest_peer_stamp.saturating_add(1))
    }

    /// How far the journals of other control planes were taken in, by their source.
    pub fn merged(&self) -> &Arc<BTreeMap<u64, u64>> {
        &self.merged
    }

    /// What the configuration said last.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The longest life that was ever issued, in seconds. Not only the one of now: were it shortened and
    /// lengthened again, what ended the keys of before must still be there.
    pub fn longest_life_s(&self) -> u64 {
        self.longest_life_s
    }

    /// How many revoked or suspended keys had expired at `until`, Unix seconds, and are not forgotten yet.
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

    /// The cut-offs that wait for a second approval, also those whose time is over.
    pub fn proposals(&self) -> &[Proposal] {
        &self.proposals
    }

    /// Which control plane keeps the ledger of limits, if that was decided.
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

    /// What the rollout was before, and is.
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

    /// A picture of it at an instant, `rules` taken over from `before` if they did not change.
    ///
    /// # Errors
    /// When the rules do not hold.
    pub fn picture(&self, before: Option<&State>, at: Instant) -> Result<State, RulesError> {
        let (rules, rules_bytes) = match before {
            Some(before) => (before.rules.clone(), before.rules_bytes.clone()),
            None => {
                let bytes = Zeroizing::new(self.rules().encode());
                // Through the bytes, as proxies read them.
                (Ruleset::try_from(Rules::decode(&bytes)?)?, bytes)
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
            warrants: self.warrants.clone(),
            lockdown_stamp: self.lockdown_mark.stamp,
            merged: self.merged.clone(),
            line_start: self.line_start,
            lines: self.lines.clone(),
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

    /// How many bytes a proxy loads that has nothing yet: rules, digests and shards, but for some bytes around them.
    pub fn snapshot_bytes(&self) -> usize {
        let shards = self.revocations.shards().iter();
        self.rules_bytes.len() + shards.map(|shard| shard.encoded_bytes() + SHA256_BYTES).sum::<usize>()
    }
}

/// The latest changes, for proxies that are a little behind.
#[derive(Debug)]
pub struct Deltas(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    /// Everything after this is kept.
    floor: u64,
    /// When that was published, or this process began.
    floor_at: Instant,
    /// By their numbers, with when they were published.
    entries: VecDeque<(u64, Effect, Instant)>,
    ops: usize,
}

impl Kept {
    fn after(floor: u64, at: Instant) -> Self {
        Self { floor, floor_at: at, entries: VecDeque::new(), ops: 0 }
    }
}

impl Deltas {
    /// None yet, all after `seq`, which was published at an instant, will be kept.
    pub fn after(seq: u64, at: Instant) -> Self {
        Self(Mutex::new(Kept::after(seq, at)))
    }

    /// Keeps the effect of change `seq`, published at an instant.
    pub fn push(&self, seq: u64, effect: Effect, at: Instant) {
        let mut kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if effect.rebuilt {
            *kept = Kept::after(seq, at);
            return;
        }
        kept.ops += effect.ops.len();
        kept.entries.push_back((seq, effect, at));
        while kept.entries.len() > DELTAS_KEPT || kept.ops > MAX_DELTA_OPS {
            let Some((seq, effect, at)) = kept.entries.pop_front() else { break };
            kept.floor = seq;
            kept.floor_at = at;
            kept.ops -= effect.ops.len();
        }
    }

    /// What brings a proxy from `applied` to `state`: a delta if that is kept, else a snapshot. `covers` is what it
    /// enforces of another control plane, if `state` is known to lack nothing of that.
    pub fn answer(
        &self,
        state: &State,
        applied: Option<Version>,
        covers: Option<Version>,
        sent_at_ms: u64,
    ) -> Answer {
        let kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let base =
            applied.filter(|applied| applied.source == state.version.source && applied.seq >= kept.floor);
        let Some(base) = base else {
            drop(kept);
            return Self::snapshot(state, covers, sent_at_ms);
        };
        let start = kept.entries.partition_point(|(seq, ..)| *seq <= base.seq);
        let (mut ops, mut members) = (Vec::new(), BTreeSet::new());
        for (_, effect, _) in kept.entries.range(start..).take_while(|(seq, ..)| *seq <= state.version.seq) {
            ops.extend_from_slice(&effect.ops);
            members.extend(effect.members.iter().cloned());
        }
        drop(kept);
        Answer {
            version: state.version,
            sent_at_ms,
            rules: new_rules(state, &members),
            body: Body::Delta { base_seq: base.seq, ops },
        }
    }

    /// When the first change was published that a proxy lacks which enforces `applied`, something else than `state`. Of
    /// what is not kept any more: at the latest then.
    pub fn lacking_since(&self, state: &State, applied: Option<Version>) -> Instant {
        let kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match applied.filter(|applied| applied.source == state.version.source && applied.seq >= kept.floor) {
            None => kept.floor_at,
            Some(applied) => {
                let next = kept.entries.partition_point(|(seq, ..)| *seq <= applied.seq);
                kept.entries.get(next).map_or(state.published, |(.., at)| *at)
            }
        }
    }

    fn snapshot(state: &State, covers: Option<Version>, sent_at_ms: u64) -> Answer {
        let shards = state.revocations.shards();
        Answer {
            version: state.version,
            sent_at_ms,
            rules: NewRules::Whole(state.rules_bytes.to_vec()),
            body: Body::Snapshot {
                covers,
                bits: state.revocations.bits(),
                digests: shards.iter().map(|shard| shard.digest()).collect(),
            },
        }
    }
}

/// The rules for a proxy that has other values of these members.
fn new_rules(state: &State, members: &BTreeSet<String>) -> NewRules {
    if members.is_empty() {
        return NewRules::Same;
    }
    let patch = rules::patch(&state.rules_bytes, members);
    if patch.len() >= state.rules_bytes.len() {
        return NewRules::Whole(state.rules_bytes.to_vec());
    }
    NewRules::Patch { patch, digest: digest(&state.rules_bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::master_key::MasterKey;
    use crate::secrets::record::ring::Held;
    use crate::secrets::record::{NewSecret, Retire, SecretRecord, SecretState};
    use crate::secrets::root_key::RootKey;

    #[test]
    fn the_last_day_is_counted_to_the_minute_and_forgotten_after() {
        let mut recent = Recent::default();
        let day = 86_400;
        for at in [1_000, 1_001, 1_000 + day / 2, 1_000 + day] {
            recent.add(at);
        }
        assert_eq!(recent.last_24h(1_000 + day), 4);
        assert_eq!(recent.last_24h(1_100 + day), 2);
        assert_eq!(recent.last_24h(2_000 + 2 * day), 0);
        recent.add(1_000 + 3 * day);
        assert_eq!(recent.0.len(), 1, "older ones take no room");
    }

    #[test]
    fn the_census_counts_what_is_live() {
        let mut census = Census::default();
        census.change("basic", 6_000, 1);
        census.change("basic", 12_000, 1);
        census.change("admin", 12_000, 1);
        census.change("admin", 12_000, -1);
        let live = |now| census.live(now).map(|(role, n)| (role.to_owned(), n)).collect::<Vec<_>>();
        assert_eq!(live(0), [("admin".to_owned(), 0), ("basic".to_owned(), 2)]);
        assert_eq!(live(6_060)[1].1, 1);
    }

    #[test]
    fn registrations_are_counted_again_from_the_journal_also_those_made_elsewhere() {
        let keys = Keyring::in_memory(MasterKey::of([7; 32]), RootKey::of([7; 32]));
        let issued = |n: u64, owner: Option<&str>, registered_by: Option<&str>, origin| {
            let Change::KeyIssued { mut key, .. } = key_of("k", 900_000 + n) else {
                panic!("another change")
            };
            key.owner = owner.map(Into::into);
            key.registered_by = registered_by.map(Into::into);
            key.issued_at = 1_000 + n;
            let change = Change::KeyIssued { key, idempotency: None };
            Entry { actor: "a".into(), stamp: 1, origin, change }
        };
        let origin = Some(Origin { source: 9, seq: 1, at: String::new() });
        let entries = [
            issued(1, Some("acme"), Some("key_0"), None),
            issued(2, Some("acme"), Some("key_0"), origin),
            issued(3, Some("acme"), None, None),
            issued(4, None, None, None),
        ];
        let mut model = Model::default();
        for (seq, entry) in (1..).zip(&entries) {
            model.apply(seq, entry, &keys).unwrap();
        }
        let limit = |units| Some(keygate_core::decide::limits::Limit { units, window_s: 60 });
        let check = |units| model.registrations().check("acme", limit(units), 1_010);
        assert_eq!(
            (check(2), check(3)),
            (Err(4_601), Ok(())),
            "but for those of administrators, and renewals"
        );
    }

    /// A control plane, as far as its history goes.
    struct Node {
        source: u64,
        model: Model,
        seq: u64,
        clock_ms: u64,
        log: Vec<(u64, Entry)>,
    }

    impl Node {
        fn new(source: u64, clock_ms: u64, secret: SecretRecord, keys: &Keyring) -> Self {
            let model = Model::default();
            let mut node = Self { source, model, seq: 0, clock_ms, log: Vec::new() };
            let policy = Policy { mode: keygate_core::decide::policy::Mode::Shadow, ..Policy::default() };
            for change in [
                Change::Genesis { source },
                Change::SecretCreated { secret, idempotency: None },
                Change::PolicyReplaced { policy: policy.clone() },
            ] {
                node.add(Entry { actor: "system".into(), stamp: 0, origin: None, change }, keys);
            }
            assert_eq!(node.model.policy().0, &policy, "what a history begins with is in force");
            node
        }

        fn add(&mut self, entry: Entry, keys: &Keyring) {
            self.seq += 1;
            self.model.apply(self.seq, &entry, keys).unwrap();
            self.model.open_secrets(keys).unwrap();
            if entry.origin.is_none() {
                let change = entry.change.for_peers();
                self.log.push((self.seq, Entry { change, ..entry }));
            }
        }

        fn change(&mut self, change: Change, keys: &Keyring) {
            self.clock_ms += 1;
            let stamp = self.model.next_stamp(self.clock_ms);
            self.add(Entry { actor: "a".into(), stamp, origin: None, change }, keys);
        }

        /// Takes in the next change of another one; whether there was one.
        fn take_next(&mut self, source: u64, log: &[(u64, Entry)], keys: &Keyring) -> bool {
            let merged = self.model.merged().get(&source).copied().unwrap_or(0);
            let Some((seq, entry)) = log.iter().find(|(seq, _)| *seq > merged) else { return false };
            let origin = Some(Origin { source, seq: *seq, at: String::new() });
            self.add(Entry { origin, ..entry.clone() }, keys);
            true
        }

        fn enforced(&self) -> impl PartialEq + std::fmt::Debug {
            let shards: Vec<_> =
                self.model.revocations().shards().iter().map(|shard| shard.digest()).collect();
            let rules = String::from_utf8(self.model.rules().encode()).unwrap();
            let ring = self.model.secrets();
            let signs = ring.active().map(|held| held.record.kid.clone()).unwrap_or_default();
            let of = |held: &Held| (ring.last_expiry(&held.record.kid), ring.is_announced(held));
            (rules, shards, signs, ring.all().into_iter().map(of).collect::<Vec<_>>())
        }
    }

    /// A generator of numbers (splitmix64), so that a failure can be had again.
    fn draw(state: &mut u64, below: u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }

    fn any_change(seed: &mut u64, known_cutoffs: &mut Vec<String>) -> Change {
        let jti = format!("jti-{}", draw(seed, 12));
        let key_id = format!("key-{jti}");
        let ended = crate::model::key::Ended {
            at: 5,
            reason: crate::model::key::RevocationReason::Compromised,
            by: "a".into(),
        };
        match draw(seed, 8) {
            0 => Change::KeyRevoked { key_id, jti, role: "basic".into(), expires_at: 900, revocation: ended },
            1 => Change::JtiRevoked { jti, expires_at: 900, revocation: ended },
            2 => {
                let suspension = crate::model::key::Ended { at: 5, reason: None, by: "a".into() };
                Change::KeySuspended { key_id, jti, expires_at: 900, suspension }
            }
            3 => Change::KeyResumed { key_id, jti },
            4 => {
                let id = format!("cutoff_{}", draw(seed, 1_000_000));
                known_cutoffs.push(id.clone());
                let cutoff = Cutoff {
                    id,
                    scope: keygate_core::decide::cutoff::Scope::default(),
                    created_before: draw(seed, 100) + 1,
                    created_after: 0,
                    excluded_key: None,
                };
                let reason = crate::model::key::RevocationReason::Emergency;
                Change::CutoffAdded { cutoff, reason, approved_by: None, break_glass: None }
            }
            5 if !known_cutoffs.is_empty() => {
                let position = draw(seed, known_cutoffs.len() as u64) as usize;
                Change::CutoffLifted { id: known_cutoffs[position].clone() }
            }
            6 => {
                let until = draw(seed, 50);
                let lockdown = (until > 9).then(|| Lockdown { until, exempt_roles: Vec::new() });
                Change::LockdownChanged { lockdown }
            }
            _ => {
                let mode = if draw(seed, 2) == 0 { "enforce" } else { "shadow" };
                let policy =
                    serde_json::from_value(serde_json::json!({ "mode": mode, "routes": [] })).unwrap();
                Change::PolicyReplaced { policy }
            }
        }
    }

    /// A rotation begun, gone on with, or a secret ended, by one who may not have heard of the others.
    fn any_secret_change(seed: &mut u64, model: &Model, keys: &Keyring) -> Vec<Change> {
        let ring = model.secrets();
        let moved = |secret| Change::SecretMoved { secret, justification: None };
        let previous = ring.all().into_iter().find(|held| held.record.state == SecretState::Previous);
        if let Some(held) = ring.all().first().filter(|_| draw(seed, 4) == 0) {
            let kid = held.record.kid.clone();
            return vec![
                Change::SecretAnnounced { kid, justification: None },
                key_of(&held.record.kid, draw(seed, 900)),
            ];
        }
        match (ring.rotating(), previous, draw(seed, 3)) {
            (_, Some(held), 0) => vec![moved(held.record.moved(SecretState::Expired, 9, keys).unwrap())],
            (Some(held), ..) => {
                let mut changes = vec![moved(held.record.moved(SecretState::Active, 9, keys).unwrap())];
                changes.extend(ring.active().map(|old| {
                    moved(old.record.retired(Retire::AfterOverlap, Some(draw(seed, 99)), 9, keys).unwrap())
                }));
                changes
            }
            (None, ..) => {
                let new = NewSecret {
                    state: if draw(seed, 4) == 0 { SecretState::Active } else { SecretState::Rotating },
                    ..NewSecret::first(keygate_core::token::crypto::Algorithm::HS256, None)
                };
                vec![Change::SecretCreated {
                    secret: SecretRecord::make(new, keys, 9).unwrap(),
                    idempotency: None,
                }]
            }
        }
    }

    /// That a key was issued.
    fn key_of(kid: &str, expires_at: u64) -> Change {
        let key = serde_json::json!({
            "key_id": format!("key-{expires_at}"), "jti": format!("jti-{expires_at}"), "kid": kid, "name": "n",
            "role": "basic", "scopes": [], "issued_at": 1, "expires_at": expires_at,
        });
        Change::KeyIssued { key: Box::new(serde_json::from_value(key).unwrap()), idempotency: None }
    }

    #[test]
    fn control_planes_agree_in_whatever_order_they_hear_of_each_others_changes() {
        keygate_core::token::crypto::native::install();
        let keys = Keyring::in_memory(MasterKey::of([7; 32]), RootKey::of([7; 32]));
        let algorithm = keygate_core::token::crypto::Algorithm::HS256;
        for round in 0..200 {
            let mut seed = round;
            // Clocks that are far apart, one by a year.
            let clocks = [1_000_000, 1_000_400, 31_536_000_000_000];
            let mut nodes: Vec<Node> = (0..3)
                .map(|n| {
                    let secret = SecretRecord::make(NewSecret::first(algorithm, None), &keys, 1).unwrap();
                    Node::new(100 + n, clocks[n as usize], secret, &keys)
                })
                .collect();
            let mut cutoffs = Vec::new();
            for _ in 0..60 {
                let n = draw(&mut seed, 3) as usize;
                if draw(&mut seed, 8) == 0 {
                    for change in any_secret_change(&mut seed, &nodes[n].model, &keys) {
                        nodes[n].change(change, &keys);
                    }
                } else if draw(&mut seed, 2) == 0 {
                    let change = any_change(&mut seed, &mut cutoffs);
                    nodes[n].change(change, &keys);
                } else {
                    let other = (n + 1 + draw(&mut seed, 2) as usize) % 3;
                    let (source, log) = (nodes[other].source, nodes[other].log.clone());
                    nodes[n].take_next(source, &log, &keys);
                }
            }
            for n in 0..3 {
                for other in [(n + 1) % 3, (n + 2) % 3] {
                    let (source, log) = (nodes[other].source, nodes[other].log.clone());
                    while nodes[n].take_next(source, &log, &keys) {}
                }
            }
            let enforced: Vec<_> = nodes.iter().map(Node::enforced).collect();
            assert_eq!(enforced[0], enforced[1], "round {round}");
            assert_eq!(enforced[0], enforced[2], "round {round}");
        }
    }
}
