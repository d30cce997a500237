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
mod copies;
mod edits;
mod error;
mod foreign;
mod health;
mod levers;
mod link;
mod listen;
mod log;
mod names;
mod pace;
mod pass_on;
mod peers;
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
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::Target;
use crate::observe::metrics::Metrics;
use crate::peers::Intake;

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

/// How long Redis may take to take a connection.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);

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
    /// When it was made, Unix milliseconds. Differs from that of the report before: so others see that it is alive.
    #[serde(default)]
    pub beat: u64,
    /// In the last report of a control plane that ended in good order: the ids of the proxies that it leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<BTreeSet<String>>,
}

/// What was seen of the reports of others.
#[derive(Debug, Default)]
struct Heard {
    /// When they were looked at first; `None`: never.
    first: Option<Instant>,
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
pub struct RedisPeers {
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
    for key in OperatorKey::ALL.map(OperatorKey::name).into_iter().chain([levers::METRIC, copies::METRIC]) {
        for outcome in ["taken", "refused"] {
            metrics.redis.edits.with([key, outcome]);
        }
    }
}

impl RedisPeers {
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
