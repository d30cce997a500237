//! The connection with Redis, as long as one lasts: first what was lost is made good on both sides, then changes
//! go out as they are made, and others' changes and operators' edits come in.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::copies::Copies;
use super::error::LinkError;
use super::foreign;
use super::health::Health;
use super::levers::Orders;
use super::link::Link;
use super::log::{self, Filler, LogError, Patience};
use super::pass_on;
use super::pass_on::{PassOn, PassedOn, journalled};
use super::revoked::{self, Extent, Met, UnionError, United};
use super::sealed::{self, Shipped};
use super::{Intake, OperatorKey, Peer, RedisPeers, Report, names, scripts};
use crate::durability::journal::JournalError;
use crate::durability::writer::CommitError;
use crate::model::View;
use crate::model::author::Author;
use crate::model::change::{Change, Entry};
use crate::model::state::State;
use crate::node::Node;
use crate::services::rotation;

/// How often Redis is looked at, whatever it says by itself: operators' edits are in force within a second.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often its settings are looked at.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// How often revocations are compared with those in its set.
const UNITE_EVERY: Duration = Duration::from_secs(30);
/// How often also with its single keys, which takes a look at every key.
const UNITE_KEYS_EVERY: u32 = 20;
/// So many revocations are compared each time, single keys and all: 20 ms of Redis's time.
const FEW: usize = 20_000;
/// How often the lease of the scheduled work is renewed, and for how long it is taken.
const LEASE_EVERY: Duration = Duration::from_secs(3);
const LEASE_FOR: Duration = Duration::from_secs(10);
/// How often a control plane tells that it is there, whatever else it has to tell.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How long it is waited before another try, the first time and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The word in metrics for what is wrong with the log of another control plane.
const PEER: &str = "peer";

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Union(#[from] UnionError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{0}")]
    NotReady(&'static str),
    /// The same process began another replication history, as when a replica or `redis-cli --rdb` connects for the first
    /// time.
    #[error("Redis began another replication history")]
    Replicated,
}

impl SessionError {
    /// The words for what is not of Redis itself; the last one is of another control plane's log.
    pub const LABELS: [&str; 7] = ["lost", "forked", "sealed", "not_ready", "journal", "local", PEER];

    /// A word for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Link(error) | Self::Log(LogError::Link(error)) | Self::Union(UnionError::Link(error)) => {
                error.label()
            }
            Self::Log(LogError::Lost) => "lost",
            Self::Log(LogError::Forked { .. }) => "forked",
            Self::Log(LogError::Sealed { .. }) => "sealed",
            Self::NotReady(_) | Self::Replicated => "not_ready",
            Self::Log(LogError::Journal(_)) | Self::Journal(_) => "journal",
            Self::Union(_) | Self::Commit(_) => "local",
        }
    }

    /// Whether the connection is still good, so that reading goes on.
    pub fn is_of_writing(&self) -> bool {
        match self {
            Self::Link(error) | Self::Log(LogError::Link(error)) | Self::Union(UnionError::Link(error)) => {
                !error.must_reconnect()
            }
            _ => false,
        }
    }
}

/// Keeps the copy in Redis until the control plane stops.
pub async fn run(node: Arc<Node>, redis: Arc<RedisPeers>) {
    let mut stopping = node.stopping.clone();
    let mut said = String::new();
    let mut stood = BTreeMap::new();
    let mut pause = RETRY.0;
    loop {
        let started = Instant::now();
        let ended = tokio::select! {
            ended = session(&node, &redis, &mut stood) => match ended {
                Ok(never) => match never {},
                Err(error) => Some(error),
            },
            _ = stopping.wait_for(|stop| *stop) => None,
        };
        let Some(error) = ended else { return pass_on::sign_off(&node, &redis).await };
        *redis.asking.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if matches!(error, SessionError::Replicated) {
            tracing::info!(redis = %redis.target, "{error}; its content is compared with the journal again");
            redis.update(|status| status.lease = None);
            continue;
        }
        node.metrics.redis.connection.set_flag(false);
        node.metrics.redis.errors.with([error.label()]).inc();
        let text = error.to_string();
        if text != said {
            tracing::error!(error = text, redis = %redis.target, "no Redis; the journal keeps every change");
            said.clone_from(&text);
        }
        redis.update(|status| {
            if status.intake == Intake::Unknown {
                status.intake = Intake::Unreachable;
            }
            status.connected = false;
            status.error = Some(text);
            status.lease = None;
        });
        if started.elapsed() > RETRY.1 {
            pause = RETRY.0;
        }
        tokio::select! {
            () = sleep(pause) => {}
            _ = stopping.wait_for(|stop| *stop) => return,
        }
        pause = (pause * 2).min(RETRY.1);
    }
}

async fn session(
    node: &Arc<Node>,
    redis: &Arc<RedisPeers>,
    stood: &mut BTreeMap<OperatorKey, Evicted>,
) -> Result<Infallible, SessionError> {
    // `WAIT` holds back what comes after it on its connection, so reading has another.
    let writing = redis.target.connect(redis.timeouts()).await?;
    let reading = redis.target.connect(redis.timeouts()).await?;
    let mut session = Session {
        node,
        redis,
        writing,
        reading,
        patience: Patience::default(),
        seen_last: 0,
        united_at: None,
        met: Met::default(),
        evicted: Evicted::new(),
        stood,
        dealt_with: BTreeMap::new(),
        peer_errors: BTreeMap::new(),
        orders: Orders::default(),
        copies: Copies::default(),
    };
    session.check().await?;
    let passed_on = session.make_good().await?;
    *redis.asking.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.reading.clone());
    node.metrics.redis.connection.set_flag(true);
    redis.update(|status| {
        status.connected = true;
        status.error = None;
    });
    tracing::info!(redis = %redis.target, "connected with Redis");
    let pass_on = PassOn { node, redis, link: session.writing.clone() };
    tokio::select! {
        ended = pass_on.run(passed_on) => ended,
        ended = session.look_after() => ended,
    }
}

/// How many keys each master had dropped for want of memory, by its run id.
pub type Evicted = BTreeMap<String, u64>;

/// Takes in what others write, and keeps an eye on Redis.
pub struct Session<'s> {
    pub(super) node: &'s Arc<Node>,
    pub(super) redis: &'s Arc<RedisPeers>,
    pub(super) writing: Link,
    pub(super) reading: Link,
    pub(super) patience: Patience,
    /// The last change of the journal when Redis was looked at last.
    pub(super) seen_last: u64,
    /// How many revocations there were in Redis and here when they were united last for being different.
    pub(super) united_at: Option<(u64, u64)>,
    met: Met,
    /// How many keys each master had dropped.
    pub(super) evicted: Evicted,
    /// The same when a key that operators edit was last as it should be; also from sessions before.
    pub(super) stood: &'s mut BTreeMap<OperatorKey, Evicted>,
    /// The edits that were dealt with and could not be written over, each with its digest and the stamp before it.
    pub(super) dealt_with: BTreeMap<OperatorKey, (String, Option<u64>)>,
    pub(super) peer_errors: BTreeMap<u64, String>,
    pub(super) orders: Orders,
    pub(super) copies: Copies,
}

impl Session<'_> {
    async fn look_after(&mut self) -> Result<Infallible, SessionError> {
        let told = [names::CHANGED, names::KEY_REVOKED, names::SECRET_ROTATION, names::EMERGENCY_REVOCATION];
        // Where Redis is set up to tell of them (notify-keyspace-events), edits are seen at once.
        let edited = OperatorKey::ALL
            .map(|key| format!("__keyspace@{}__:{}", self.redis.target.database(), key.name()));
        let channels: Vec<&str> = told.into_iter().chain(edited.iter().map(String::as_str)).collect();
        let mut hints = self.redis.target.listen(self.redis.timeouts(), &channels).await?;
        let mut states = self.node.states.clone();
        let every = |period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        let (mut looks, mut checks) = (every(LOOK_EVERY), every(CHECK_EVERY));
        let (mut leases, mut unions) = (every(LEASE_EVERY), every(UNITE_EVERY));
        unions.tick().await; // That has just been done.
        let mut round = 0;
        loop {
            tokio::select! {
                _ = looks.tick() => self.look().await?,
                hint = hints.next() => match hint {
                    Some(_) => self.look().await?,
                    None => return Err(SessionError::NotReady("the subscription ended")),
                },
                _ = states.changed() => self.look_at_edits().await?,
                _ = checks.tick() => {
                    self.check().await?;
                    self.check_secrets().await?;
                    self.share_counts().await?;
                }
                _ = leases.tick() => self.renew_lease().await?,
                _ = unions.tick() => {
                    round += 1;
                    let revoked = self.node.state().revocations.revoked();
                    // Equal numbers are nearly always equal sets, and comparing a million takes a second.
                    if round % UNITE_KEYS_EVERY == 0 {
                        self.unite(Extent::AllKeys).await?;
                    } else if revoked <= FEW {
                        self.unite(Extent::OwnKeys).await?;
                    } else if revoked::count(&self.reading).await? != revoked as u64 {
                        self.unite(Extent::Set).await?;
                    }
                }
            }
        }
    }

    /// Fills Redis where it lacks something, and takes in what is lacking here.
    async fn make_good(&mut self) -> Result<PassedOn, SessionError> {
        let node = self.node;
        let mut state = node.state();
        foreign::remove(&self.writing, state.version.source).await?;
        if log::take_away_if_spoiled(&self.writing, &self.redis.sealer, state.version.source).await? {
            tracing::error!("somebody else has written to the log of this control plane; it is filled again");
        }
        self.check_fork(&state).await?;
        let mut in_log = log::last(&self.writing, state.version.source).await?;
        let was_set_back = in_log > *node.feed.last().borrow();
        if was_set_back {
            // Redis has changes of ours that we do not know: this journal is an older copy.
            tracing::error!("Redis has later changes of this journal than there are here: they are taken in");
            let source = node.clock.now_ms().max(state.version.source + 1);
            let plan = move |_: &View<'_>| Ok((vec![Change::HistoryForked { source }], ()));
            node.writer.commit(&Author::part("system"), plan).await?;
            state = node.state();
            in_log = 0;
        }
        log::join(&self.writing, state.version.source).await?;
        // First what they say, then what is to be taken in for it.
        let reports = self.reports().await?;
        let lacks_all = state.merged.is_empty() || was_set_back;
        let others = reports.keys().any(|source| *source != state.version.source);
        if self.redis.status.borrow().intake != Intake::Done && lacks_all && others {
            self.redis.update(|status| status.intake = Intake::Begun);
        }
        self.fill_up_others().await?;
        self.redis.hear(&reports, node.clock.now_ms());
        while self.take_in().await? {}
        let own = (state.version.source, *node.feed.last().borrow());
        self.redis.cover(&reports, own, &node.state().merged);
        self.redis.update(|status| status.intake = Intake::Done);
        self.redis.set_in_log(in_log);
        let mut passed_on = PassedOn { seq: in_log.max(state.line_start.saturating_sub(1)), in_log };
        let pass_on = PassOn { node, redis: self.redis, link: self.writing.clone() };
        pass_on.go_on(&mut passed_on).await?;
        pass_on.report(passed_on.seq, passed_on.in_log, (*node.state().merged).clone()).await?;
        self.write_secrets().await?;
        pass_on.note(passed_on.seq).await?;
        self.unite(Extent::AllKeys).await?;
        self.look_at_edits().await?;
        Ok(passed_on)
    }

    /// Whether the log in Redis is of this journal. One that was set back and went on while Redis was away has given
    /// numbers again, and neither may be taken for the other.
    async fn check_fork(&self, state: &State) -> Result<(), SessionError> {
        let (node, source) = (self.node, state.version.source);
        let last = *node.feed.last().borrow();
        let there = log::last_until(&self.writing, &self.redis.sealer, source, last).await?;
        let Some((seq, there)) = there else { return Ok(()) };
        let here = journalled(node, seq.saturating_sub(1), seq).await?;
        let here = here.first().filter(|logged| logged.seq == seq && logged.entry.origin.is_none());
        let same = match (here, there) {
            (Some(here), Some(there)) => {
                Shipped { after: BTreeMap::new(), ..there } == Shipped::of(here, BTreeMap::new())
            }
            // One that does not open is for those who take it in.
            (_, None) => true,
            (None, Some(_)) => false,
        };
        if same { Ok(()) } else { Err(LogError::Forked { seq }.into()) }
    }

    /// Fills the logs of others from this journal, where Redis has lost what was taken in from them. Those of
    /// the lines of history that went before in this journal are among them.
    async fn fill_up_others(&mut self) -> Result<(), SessionError> {
        let node = self.node;
        let merged = Arc::clone(&node.state().merged);
        let mut behind = BTreeMap::new();
        for (source, seq) in merged.iter() {
            let last = log::last(&self.writing, *source).await?;
            if last < *seq {
                log::join(&self.writing, *source).await?;
                behind.insert(*source, last);
            }
        }
        if behind.is_empty() {
            return Ok(());
        }
        tracing::warn!(
            logs = behind.len(),
            "Redis has lost changes of other control planes; they are written again"
        );
        let (mut seq, last) = (0, *node.feed.last().borrow());
        let mut line = 0;
        loop {
            let entries = journalled(node, seq, last).await?;
            let Some(to) = entries.last().map(|logged| logged.seq) else { return Ok(()) };
            for (source, mut changes) in log::by_source(&entries, &mut line) {
                let Some(last) = behind.get(&source).copied() else { continue };
                changes.retain(|(seq, _)| *seq > last);
                let mut filler = Filler {
                    link: &self.writing,
                    sealer: &self.redis.sealer,
                    keys: &node.keys,
                    source,
                    last,
                };
                filler.append(&changes, &node.store, node.clock.now_s()).await?;
                behind.insert(source, filler.last);
            }
            seq = to;
        }
    }

    /// Looks whether Redis has lost something, and at what others wrote.
    async fn look(&mut self) -> Result<(), SessionError> {
        let source = self.node.state().version.source;
        let timer = self.node.metrics.redis.seconds.with(["look"]).start_timer();
        let expected = self.redis.in_log();
        let in_log = log::last(&self.reading, source).await?;
        let size = revoked::count(&self.reading).await?;
        timer.observe_duration();
        if in_log < expected {
            return Err(LogError::Lost.into());
        }
        // First what they say, then what is to be taken in for it.
        let reports = self.reports().await?;
        if !reports.contains_key(&source) {
            return Err(LogError::Lost.into());
        }
        self.redis.hear(&reports, self.node.clock.now_ms());
        while self.take_in().await? {}
        self.fetch_data_keys().await?;
        self.tell_again().await?;
        self.redis.cover(&reports, (source, *self.node.feed.last().borrow()), &self.node.state().merged);
        self.look_at_edits().await?;
        self.look_at_orders().await?;
        self.look_at_copies().await?;
        // While changes are on their way the numbers differ by themselves.
        let last = *self.node.feed.last().borrow();
        let is_still = self.seen_last == last && self.redis.status.borrow().tried >= last;
        self.seen_last = last;
        let sizes = (size, self.node.state().revocations.revoked() as u64);
        if is_still && sizes.0 != sizes.1 && self.united_at != Some(sizes) {
            // What cannot be made equal is for the lease's holder.
            let is_settled = !self.unite(Extent::Set).await?;
            self.united_at = is_settled.then_some(sizes);
        }
        Ok(())
    }

    /// What the control planes say of themselves.
    async fn reports(&self) -> Result<BTreeMap<u64, Report>, SessionError> {
        let all: Vec<(String, String)> =
            self.reading.query(redis::cmd("HGETALL").arg(names::REPORTS)).await?;
        let read = |(source, report): (String, String)| {
            let source = u64::from_str_radix(&source, 16).ok()?;
            Some((source, self.redis.sealer.open(&sealed::report_place(source), &report)?))
        };
        Ok(all.into_iter().filter_map(read).collect())
    }

    /// Takes in what is new in the logs of others; whether there may be more at once.
    async fn take_in(&mut self) -> Result<bool, SessionError> {
        let mut command = redis::cmd("SMEMBERS");
        command.arg(names::SOURCES);
        let sources: BTreeSet<String> = self.reading.query(&command).await?;
        let own = self.node.state().version.source;
        if !sources.contains(&format!("{own:x}")) {
            return Err(LogError::Lost.into()); // In a Cluster, by itself.
        }
        let mut more = false;
        let mut peers = Vec::new();
        for source in sources.iter().filter_map(|text| u64::from_str_radix(text, 16).ok()) {
            if source == own {
                continue;
            }
            let merged = Arc::clone(&self.node.state().merged);
            let seq = merged.get(&source).copied().unwrap_or(0);
            let (link, sealer) = (&self.reading, &self.redis.sealer);
            let found = log::news(link, sealer, (source, seq), (own, &merged), &mut self.patience).await;
            let error = match found {
                Ok(news) => {
                    more |= news.more;
                    self.take(news.entries).await?
                }
                Err(error @ LogError::Sealed { .. }) => Some(error.to_string()),
                Err(error) => return Err(error.into()),
            };
            if let Some(error) = &error
                && self.peer_errors.get(&source) != Some(error)
            {
                tracing::error!(
                    peer = format!("{source:x}"),
                    error,
                    "changes of another control plane are not taken in"
                );
                self.node.metrics.redis.errors.with([PEER]).inc();
            }
            match &error {
                Some(error) => drop(self.peer_errors.insert(source, error.clone())),
                None => drop(self.peer_errors.remove(&source)),
            }
            let merged = self.node.state().merged.get(&source).copied().unwrap_or(0);
            peers.push(Peer { source: format!("{source:x}"), merged, error });
        }
        if self.redis.status.borrow().peers != peers {
            self.redis.update(|status| status.peers = peers);
        }
        Ok(more)
    }

    /// Takes changes in; what is wrong with them, if they cannot be.
    async fn take(&self, entries: Vec<Entry>) -> Result<Option<String>, SessionError> {
        if entries.is_empty() {
            return Ok(None);
        }
        let taken = entries.len() as u64;
        let data_keys =
            self.data_keys(entries.iter().filter_map(|entry| entry.change.facts().secret)).await?;
        match self.node.writer.merge(entries, data_keys).await {
            Ok(_) => {
                self.node.metrics.redis.merged.inc_by(taken);
                Ok(None)
            }
            Err(CommitError::Stopped) => Err(CommitError::Stopped.into()),
            Err(error) => Ok(Some(error.to_string())),
        }
    }

    /// Looks how Redis is set up and fares, and whether it is still the one to go to.
    pub(super) async fn check(&mut self) -> Result<(), SessionError> {
        // A master that was cut off from its Sentinels does not know that it was deposed.
        if let Some(master) = self.redis.target.master_by_sentinels(self.redis.timeouts()).await
            && master != self.reading.address()
        {
            return Err(SessionError::NotReady("the Sentinels name another master"));
        }
        let (mut masters, mut evicted) = (Vec::new(), BTreeMap::new());
        for link in self.reading.masters().await? {
            let info: String = link.query(redis::cmd("INFO").arg("everything")).await?;
            let health = Health::read(&info);
            if health.loading {
                return Err(SessionError::NotReady("Redis is still reading its data"));
            }
            if health.role != "master" {
                return Err(SessionError::NotReady("this Redis is a replica; name its master"));
            }
            evicted.insert(health.run_id.clone(), health.evicted_keys);
            masters.push(health);
        }
        let runs = |masters: &[Health]| -> Vec<(String, String)> {
            masters.iter().map(|health| (health.run_id.clone(), health.replication_id.clone())).collect()
        };
        let known = self.redis.status.borrow().masters.clone();
        masters.sort_by(|a: &Health, b| a.run_id.cmp(&b.run_id));
        let is_same = known.is_empty() || runs(&known) == runs(&masters);
        let problems: Vec<_> =
            masters.iter().flat_map(|health| health.problems(self.redis.replicas)).collect();
        super::show_problems(&self.node.metrics, &problems);
        self.evicted = evicted;
        for (_, problem) in
            problems.iter().filter(|problem| !self.redis.status.borrow().problems.contains(problem))
        {
            tracing::warn!(problem, "Redis is not set up as it should be");
        }
        self.redis.update(|status| {
            status.masters = masters;
            status.problems = problems;
        });
        if !is_same && self.redis.status.borrow().connected {
            let processes =
                |masters: &[Health]| masters.iter().map(|health| health.run_id.clone()).collect::<Vec<_>>();
            let same_processes = processes(&known) == processes(&self.redis.status.borrow().masters);
            return Err(if same_processes {
                SessionError::Replicated
            } else {
                SessionError::NotReady("Redis is another process or history than before")
            });
        }
        Ok(())
    }

    /// Tells the others again how this one stands, when it has changed, and now and then.
    async fn tell_again(&self) -> Result<(), SessionError> {
        let reported = self.redis.reported.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some((before, at)) = reported else { return Ok(()) };
        if at.elapsed() < TELL_EVERY && before.known == rotation::known_everywhere(self.node) {
            return Ok(());
        }
        let pass_on = PassOn { node: self.node, redis: self.redis, link: self.reading.clone() };
        match pass_on.report(before.seq, before.last_own, before.merged).await {
            // One that takes no writes can still be looked at.
            Err(error) if error.is_of_writing() => Ok(()),
            told => told,
        }
    }

    async fn renew_lease(&mut self) -> Result<(), SessionError> {
        let token = match lease(&self.reading, "scheduled", self.node.state().version.source, LEASE_FOR).await
        {
            Ok(token) => token,
            Err(error @ LinkError::WrongType) => return Err(error.into()), // Made good by a new session.
            Err(error) if !error.must_reconnect() => None,
            Err(error) => return Err(error.into()),
        };
        if self.redis.status.borrow().lease != token {
            self.redis.update(|status| status.lease = token);
        }
        Ok(())
    }

    /// Whether anything had to be done, as far as is known.
    async fn unite(&mut self, extent: Extent) -> Result<bool, SessionError> {
        let timer = self.node.metrics.redis.seconds.with(["unite"]).start_timer();
        let may_forget = self.redis.status.borrow().lease.is_some();
        // No log is later than an answer of Redis may be.
        let patience = (&mut self.met, self.redis.timeout);
        let united = match revoked::unite(self.node, &self.writing, extent, may_forget, patience).await {
            Err(UnionError::Link(error)) if !error.must_reconnect() => {
                self.node.metrics.redis.errors.with([error.label()]).inc();
                return Ok(true);
            }
            united => united?,
        };
        timer.observe_duration();
        if united.written > 0 {
            tracing::warn!(written = united.written, "Redis lacked revocations; they are there again");
        }
        Ok(united != United::default())
    }
}

/// Takes or renews the lease of a work for the control plane `source`: its fencing token, `None` if another has it.
///
/// # Errors
/// When Redis cannot be asked.
pub async fn lease(link: &Link, work: &str, source: u64, period: Duration) -> Result<Option<u64>, LinkError> {
    let [lease, fence] = names::lease(work);
    let mut command = redis::cmd("EVAL");
    command.arg(scripts::LEASE).arg(2).arg(lease).arg(fence).arg(format!("{source:x}"));
    command.arg(u64::try_from(period.as_millis()).unwrap_or(u64::MAX));
    let token: u64 = link.query(&command).await?;
    Ok(Some(token).filter(|token| *token > 0))
}
