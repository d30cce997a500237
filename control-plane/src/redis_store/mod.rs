//! Redis, the store that several control planes share and that operators read and edit with redis-cli.
//!
//! It is a copy and a place to meet, never the truth: what was answered stands in the journal. Each control plane
//! appends its changes to a log of its own there, sealed, and takes in those of the others; it writes the keys of
//! the contract; and it looks at the keys that operators edit. A Redis that was emptied or set back is filled
//! again from the journals. Here is what the rest of the control plane sees of it.
//!
//! A [`Target`] is what the operator typed, a [`Link`] is a live connection to it that never reconnects by
//! itself: after a failover a connection that stays open may lead to a replica, so whoever holds a link
//! that failed with [`LinkError::must_reconnect`] drops it and asks the target for a new one.

mod by_hand;
mod edits;
mod error;
mod foreign;
mod health;
mod link;
mod listen;
mod log;
mod names;
mod pass_on;
mod projection;
mod recover;
mod revoked;
mod rollout;
mod scripts;
mod sealed;
mod secrets;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::{Durability, Target};
use crate::metrics::Metrics;
use crate::state::State;

pub use self::error::LinkError;
pub use self::health::{Health, PROBLEMS};
pub use self::link::{Link, Timeouts};
pub use self::listen::{Message, Messages};
pub use self::names::OperatorKey;
pub use self::recover::{RecoverError, Recovered, recover};
pub use self::sealed::Sealer;
pub use self::session::run;

/// What the time of Redis is measured for.
pub const OPERATIONS: [&str; 4] = ["append", "wait", "look", "unite"];
/// What can go wrong, as metrics name it.
pub fn error_kinds() -> impl Iterator<Item = &'static str> {
    LinkError::LABELS.into_iter().chain(session::SessionError::LABELS)
}

/// How long an answer waits for Redis to have its change.
const REPLICATED_WITHIN: Duration = Duration::from_secs(1);
/// For how long a control plane claims what it begins: longer than others need to hear of it.
const CLAIMED_FOR: Duration = Duration::from_secs(5);
/// How long a proxy waits for what others had to be taken in.
const SETTLED_WITHIN: Duration = Duration::from_secs(1);

/// How long Redis may take to take a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

/// How far what others had when this process started was taken in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Intake {
    /// Nobody has looked yet.
    #[default]
    Unknown,
    /// It could not be looked at; what is here is what is known.
    Unreachable,
    /// It was begun: here may be a secret and not yet that a key signed with it was revoked.
    Begun,
    /// All of it.
    Done,
}

/// How it stands with Redis.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    /// Whether there is a connection that answers.
    pub connected: bool,
    /// What is wrong, if anything is: with the connection, or with writing.
    pub error: Option<String>,
    /// The last change of the journal that Redis and its replicas have.
    pub replicated: u64,
    /// The last change that was tried; those after `replicated` are here only.
    #[serde(skip)]
    pub tried: u64,
    /// Each master.
    pub masters: Vec<Health>,
    /// What an operator should change, each with its short name.
    pub problems: Vec<(&'static str, String)>,
    /// The other control planes, by their source in hexadecimal, and how far their logs were taken in.
    pub peers: Vec<Peer>,
    /// How far what others had at the start was taken in.
    #[serde(skip)]
    pub intake: Intake,
    /// The fencing token of the scheduled work, if it is this control plane that does it.
    pub lease: Option<u64>,
}

/// What a control plane says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The last change of its journal.
    pub seq: u64,
    /// The last one of those that was made there.
    pub last_own: u64,
    /// How far it had taken in the others' logs by then.
    pub merged: BTreeMap<u64, u64>,
    /// The signing secrets that each of its live proxies knows.
    #[serde(default)]
    pub known: BTreeSet<String>,
    /// Where it takes questions of proxies that others were asked.
    #[serde(default)]
    pub sync_url: Option<String>,
    /// Differs from that of the report before: so others see that it is alive.
    #[serde(default)]
    pub beat: u64,
}

/// What was seen of the reports of others.
#[derive(Debug, Default)]
struct Heard {
    /// When they were looked at last; `None`: never.
    looked: Option<Instant>,
    /// The last report of each, and when it was seen first.
    reports: BTreeMap<u64, (Report, Instant)>,
}

/// Another control plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// Its line of history, in hexadecimal.
    pub source: String,
    /// The last change of it that was taken in.
    pub merged: u64,
    /// What is wrong with its log, if anything is.
    pub error: Option<String>,
}

/// The copy in Redis.
#[derive(Debug)]
pub struct Mirror {
    /// Where Redis is.
    pub target: Target,
    /// Replicas that must have a change before it counts as replicated.
    pub replicas: u64,
    /// How long Redis may take to answer.
    pub timeout: Duration,
    /// Seals what is told to other control planes.
    pub sealer: Sealer,
    /// The last change that is in the log for certain.
    in_log: AtomicU64,
    /// Of each other control plane, up to which of its changes nothing is lacking here.
    covered: Mutex<BTreeMap<u64, u64>>,
    heard: Mutex<Heard>,
    /// The last report of this one, and when.
    reported: Mutex<Option<(Report, Instant)>>,
    /// The connection for questions that callers ask, while there is one.
    asking: Mutex<Option<Link>>,
    /// The rollout's document.
    rollout: Mutex<rollout::Copy>,
    status: watch::Sender<Status>,
}

/// Shows what an operator should change in Redis.
fn show_problems(metrics: &Metrics, problems: &[(&'static str, String)]) {
    for name in PROBLEMS {
        let there = problems.iter().any(|(problem, _)| *problem == name);
        metrics.redis.setting_problems.with([name]).set_flag(there);
    }
}

/// Makes the series of Redis, with 0.
pub fn begin_metrics(metrics: &Metrics) {
    for operation in OPERATIONS {
        metrics.redis.seconds.with([operation]);
    }
    for problem in PROBLEMS {
        metrics.redis.setting_problems.with([problem]);
    }
    for kind in error_kinds() {
        metrics.redis.errors.with([kind]);
    }
    for key in OperatorKey::ALL.map(OperatorKey::name) {
        for outcome in ["taken", "refused"] {
            metrics.redis.edits.with([key, outcome]);
        }
    }
}

impl Mirror {
    /// One that is not connected yet.
    pub fn new(target: Target, replicas: u64, timeout: Duration, sealer: Sealer) -> Arc<Self> {
        let status = watch::Sender::new(Status::default());
        Arc::new(Self {
            target,
            replicas,
            timeout,
            sealer,
            in_log: AtomicU64::new(0),
            covered: Mutex::default(),
            heard: Mutex::default(),
            reported: Mutex::default(),
            asking: Mutex::default(),
            rollout: Mutex::default(),
            status,
        })
    }

    /// How it stands now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Waits until Redis has change `seq` of the journal, for a moment; not at all when it is known not to come.
    pub async fn durability(&self, seq: u64) -> Durability {
        let mut status = self.status.subscribe();
        let settled = status.wait_for(|status| {
            !status.connected || status.may_lose() || status.replicated >= seq || status.tried >= seq
        });
        match tokio::time::timeout(REPLICATED_WITHIN, settled).await {
            Ok(Ok(status)) if status.replicated >= seq && status.connected && !status.may_lose() => {
                Durability::Replicated
            }
            _ => Durability::Local,
        }
    }

    /// Waits until what is here can be handed out, for a moment; whether it can.
    pub async fn may_be_followed(&self) -> bool {
        let mut status = self.status.subscribe();
        let settled = status.wait_for(|status| matches!(status.intake, Intake::Unreachable | Intake::Done));
        tokio::time::timeout(SETTLED_WITHIN, settled).await.is_ok()
    }

    /// How far what others had at the start was taken in.
    pub fn intake(&self) -> Intake {
        self.status.borrow().intake
    }

    /// Whether a line of history of which nothing is known here is one that nobody knows any more.
    pub fn knows_all(&self) -> bool {
        self.status.borrow().intake == Intake::Done
    }

    /// Up to which change of another control plane nothing is lacking here; `None`: that one is not known.
    pub fn covered(&self, source: u64) -> Option<u64> {
        self.covered.lock().unwrap_or_else(PoisonError::into_inner).get(&source).copied()
    }

    /// Notes what other control planes have said of themselves, now that `merged` of their logs was taken in.
    fn cover(&self, reports: &BTreeMap<u64, Report>, (own, last): (u64, u64), merged: &BTreeMap<u64, u64>) {
        let mut covered = self.covered.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |(source, seq): (&u64, &u64)| {
            if *source == own { *seq <= last } else { merged.get(source).is_some_and(|merged| merged >= seq) }
        };
        for (source, report) in reports.iter().filter(|(source, _)| **source != own) {
            let known = covered.entry(*source).or_default();
            if has((source, &report.last_own)) && report.merged.iter().all(has) {
                *known = (*known).max(report.seq);
            }
        }
        for source in merged.keys() {
            covered.entry(*source).or_default(); // Known, whatever it has not said.
        }
    }

    /// Whether this control plane does the scheduled work.
    pub fn leads(&self) -> bool {
        let status = self.status.borrow();
        status.connected && status.lease.is_some()
    }

    /// The other control planes that may have live proxies, and what they said last: those that were heard of within
    /// the hard age when Redis was looked at last, or that are known at all if it never was.
    pub fn live_peers(&self, state: &State) -> Vec<(u64, Option<Report>)> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let own = |source: &u64| state.is_own(*source);
        let Some(looked) = heard.looked else {
            return state.merged.keys().filter(|source| !own(source)).map(|source| (*source, None)).collect();
        };
        let hard_age = Duration::from_secs(state.rules.hard_age_s);
        let live = heard.reports.iter().filter(|(source, (_, seen))| {
            !own(source) && looked.saturating_duration_since(*seen) <= hard_age
        });
        live.map(|(source, (report, _))| (*source, Some(report.clone()))).collect()
    }

    /// Where another control plane takes questions of proxies, if it ever said that.
    pub fn sync_url(&self, source: u64) -> Option<String> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.reports.get(&source).and_then(|(report, _)| report.sync_url.clone())
    }

    /// Takes note of what others say of themselves.
    fn hear(&self, reports: &BTreeMap<u64, Report>) {
        let now = Instant::now();
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.looked = Some(now);
        for (source, report) in reports {
            let seen = match heard.reports.get(source) {
                Some((before, seen)) if before.beat == report.beat => *seen,
                _ => now,
            };
            heard.reports.insert(*source, (report.clone(), seen));
        }
    }

    /// Claims a work for one control plane for a moment; `None` when Redis cannot be asked.
    pub async fn claim(&self, work: &str, source: u64) -> Option<bool> {
        self.lease(work, source, CLAIMED_FOR).await
    }

    /// Takes or renews the lease of a work for one control plane; `None` when Redis cannot be asked.
    pub async fn lease(&self, work: &str, source: u64, period: Duration) -> Option<bool> {
        let link = self.asking()?;
        session::lease(&link, work, source, period).await.ok().map(|token| token.is_some())
    }

    /// Gives the lease of a work back, if this control plane has it.
    pub async fn release(&self, work: &str, source: u64) {
        let [lease, _] = names::lease(work);
        let mut command = redis::cmd("EVAL");
        command.arg(scripts::RELEASE).arg(1).arg(lease).arg(format!("{source:x}"));
        if let Some(link) = self.asking() {
            let _expires_anyway: Result<u64, _> = link.query(&command).await;
        }
    }

    /// Takes the lease of a work from any control plane that has it.
    pub async fn release_any(&self, work: &str) {
        let [lease, _] = names::lease(work);
        if let Some(link) = self.asking() {
            let _expires_anyway: Result<u64, _> = link.query(redis::cmd("DEL").arg(lease)).await;
        }
    }

    /// Writes a value for a time; whether Redis has it.
    pub async fn put(&self, key: &str, value: &[u8], ttl_s: u64) -> bool {
        let Some(link) = self.asking() else { return false };
        let set = link.query::<String>(redis::cmd("SET").arg(key).arg(value).arg("EX").arg(ttl_s)).await;
        set.is_ok()
    }

    /// Reads a value.
    pub async fn get(&self, key: &str) -> Option<Vec<u8>> {
        let link = self.asking()?;
        link.query::<Option<Vec<u8>>>(redis::cmd("GET").arg(key)).await.ok().flatten()
    }

    fn asking(&self) -> Option<Link> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn timeouts(&self) -> Timeouts {
        Timeouts { connect: CONNECT_WITHIN, response: self.timeout }
    }

    fn in_log(&self) -> u64 {
        self.in_log.load(Ordering::Acquire)
    }

    fn set_in_log(&self, seq: u64) {
        self.in_log.store(seq, Ordering::Release);
    }

    fn update(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }
}

impl Status {
    /// Whether Redis may drop what it took.
    fn may_lose(&self) -> bool {
        self.masters.iter().any(Health::may_evict)
    }
}
