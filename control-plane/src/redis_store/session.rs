//! The connection with Redis, as long as one lasts: first what was lost is made good on both sides, then changes
//! go out as they are made, and others' changes and operators' edits come in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::edits::{self, Ours, Seen, Value, Verdict, Written};
use super::error::LinkError;
use super::foreign;
use super::health::Health;
use super::link::Link;
use super::log::{self, Filler, LogError, Patience};
use super::revoked::{self, ACTOR, Extent, Met, UnionError, United};
use super::sealed::{self, Shipped};
use super::{Mirror, Peer, Report, names, scripts};
use crate::app::App;
use crate::change::{Change, Entry};
use crate::journal::JournalError;
use crate::problem::Problem;
use crate::writer::{CommitError, Logged, View};

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
/// For how long one control plane has an edit to itself.
const CLAIM_FOR: Duration = Duration::from_secs(2);
/// How long it is waited before another try, the first time and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Changes that are passed on at a time.
const PASS_ON: usize = 1_000;
/// The part of the time that Redis may take to answer which `WAIT` may take.
const WAIT_SHARE: f64 = 0.6;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
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
}

impl SessionError {
    /// A word for metrics.
    fn label(&self) -> &'static str {
        match self {
            Self::Link(error) | Self::Log(LogError::Link(error)) | Self::Union(UnionError::Link(error)) => {
                error.label()
            }
            Self::Log(LogError::Lost) => "lost",
            Self::Log(LogError::Sealed { .. }) => "sealed",
            Self::NotReady(_) => "not_ready",
            Self::Log(LogError::Journal(_)) | Self::Journal(_) => "journal",
            Self::Union(_) | Self::Commit(_) => "local",
        }
    }

    /// Whether the connection is still good, so that reading goes on.
    fn is_of_writing(&self) -> bool {
        match self {
            Self::Link(error) | Self::Log(LogError::Link(error)) | Self::Union(UnionError::Link(error)) => {
                !error.must_reconnect()
            }
            _ => false,
        }
    }
}

/// Keeps the copy in Redis until the control plane stops.
pub async fn run(app: Arc<App>, mirror: Arc<Mirror>) {
    let mut stopping = app.stopping.clone();
    let mut said = String::new();
    let mut stood = BTreeMap::new();
    let mut pause = RETRY.0;
    loop {
        let started = Instant::now();
        let error = tokio::select! {
            ended = session(&app, &mirror, &mut stood) => match ended {
                Ok(never) => match never {},
                Err(error) => error,
            },
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        app.metrics.redis_connection.set(0.0);
        app.metrics.redis_errors.with_label_values(&[error.label()]).inc();
        let text = error.to_string();
        if text != said {
            tracing::error!(error = text, redis = %mirror.target, "no Redis; the journal keeps every change");
            said.clone_from(&text);
        }
        mirror.update(|status| {
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

enum Never {}

async fn session(
    app: &Arc<App>,
    mirror: &Arc<Mirror>,
    stood: &mut BTreeMap<&'static str, Evicted>,
) -> Result<Never, SessionError> {
    // `WAIT` holds back what comes after it on its connection, so reading has another.
    let writing = mirror.target.connect(mirror.timeouts()).await?;
    let reading = mirror.target.connect(mirror.timeouts()).await?;
    let mut session = Session {
        app,
        mirror,
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
    };
    session.check().await?;
    let passed_on = session.make_good().await?;
    app.metrics.redis_connection.set(1.0);
    mirror.update(|status| {
        status.connected = true;
        status.error = None;
    });
    tracing::info!(redis = %mirror.target, "connected with Redis");
    let pass_on = PassOn { app, mirror, link: session.writing.clone() };
    tokio::select! {
        ended = pass_on.run(passed_on) => ended,
        ended = session.look_after() => ended,
    }
}

/// Where passing on stands: the last change of the journal that was dealt with, and the last one in the log.
#[derive(Debug, Clone, Copy)]
struct PassedOn {
    seq: u64,
    in_log: u64,
}

/// Passes changes on as they are made.
struct PassOn<'s> {
    app: &'s Arc<App>,
    mirror: &'s Arc<Mirror>,
    link: Link,
}

impl PassOn<'_> {
    async fn run(&self, mut passed_on: PassedOn) -> Result<Never, SessionError> {
        let mut last = self.app.feed.last();
        loop {
            match self.go_on(&mut passed_on).await {
                Ok(()) => {
                    let _closed = last.changed().await;
                    continue;
                }
                Err(error) if error.is_of_writing() => {
                    self.app.metrics.redis_errors.with_label_values(&[error.label()]).inc();
                    self.mirror.update(|status| {
                        status.tried = *last.borrow();
                        status.error = Some(error.to_string());
                    });
                    sleep(RETRY.1 / 4).await;
                    // What of it came through is found out anew.
                    passed_on.in_log = log::last(&self.link, self.app.state().version.source).await?;
                    passed_on.seq = passed_on.in_log.max(self.app.state().line_start.saturating_sub(1));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Passes on what there is.
    async fn go_on(&self, passed_on: &mut PassedOn) -> Result<(), SessionError> {
        let (app, mirror) = (self.app, self.mirror);
        let mut said: BTreeMap<u64, u64> = BTreeMap::new();
        loop {
            let last = *app.feed.last().borrow();
            let state = app.state();
            let source = state.version.source;
            let mut filler =
                Filler { link: &self.link, sealer: &mirror.sealer, source, last: passed_on.in_log };
            let (entries, live) = match app.feed.after(passed_on.seq, PASS_ON) {
                Some(entries) => (entries, true),
                None => (journalled(app, passed_on.seq, last).await?, false),
            };
            let Some(to) = entries.last().map(|logged| logged.seq) else { return Ok(()) };
            let mut changes = Vec::new();
            for logged in &entries {
                if logged.entry.origin.is_some() || logged.seq < state.line_start {
                    continue;
                }
                // What the first of them was made in knowledge of, all were.
                let after = if live { news_of(&state.merged, &mut said) } else { BTreeMap::new() };
                changes.push((logged.seq, Shipped::of(logged, after)));
            }
            let timer = app.metrics.redis_seconds.with_label_values(&["append"]).start_timer();
            filler.append(&changes, &app.store, app.clock.now_s()).await?;
            timer.observe_duration();
            *passed_on = PassedOn { seq: to, in_log: filler.last };
            mirror.set_in_log(filler.last);
            // A state that is later than its seq says too much, which asks more of others than it must.
            self.report(Report { seq: to, last_own: filler.last, merged: (*state.merged).clone() }).await?;
            self.note(to).await?;
        }
    }

    /// Tells the others where this one stands.
    async fn report(&self, report: Report) -> Result<(), SessionError> {
        let source = self.app.state().version.source;
        let sealed = self.mirror.sealer.seal(&sealed::report_place(source), &report);
        let mut set = redis::cmd("HSET");
        set.arg(names::REPORTS).arg(format!("{source:x}")).arg(sealed);
        Ok(self.link.query::<()>(&set).await?)
    }

    /// Notes that Redis has all changes up to `seq`, once its replicas have too.
    async fn note(&self, seq: u64) -> Result<(), SessionError> {
        let mirror = self.mirror;
        let have = if mirror.replicas == 0 {
            0
        } else {
            let _timer = self.app.metrics.redis_seconds.with_label_values(&["wait"]).start_timer();
            let source = self.app.state().version.source;
            let wait = log::wait(mirror.replicas, mirror.timeout.mul_f64(WAIT_SHARE));
            self.link.query_at::<u64>(&names::log(source), &wait).await?
        };
        mirror.update(|status| {
            status.tried = seq;
            if have >= mirror.replicas {
                status.replicated = seq;
                status.error = None;
            } else {
                let wanted = mirror.replicas;
                status.error = Some(format!("only {have} of {wanted} replicas have the latest changes"));
            }
        });
        Ok(())
    }
}

/// What is merged and was not said yet.
fn news_of(merged: &BTreeMap<u64, u64>, said: &mut BTreeMap<u64, u64>) -> BTreeMap<u64, u64> {
    let news: BTreeMap<u64, u64> =
        merged.iter().filter(|(source, seq)| said.get(source) != Some(seq)).map(|(s, q)| (*s, *q)).collect();
    said.extend(&news);
    news
}

async fn journalled(app: &App, seq: u64, last: u64) -> Result<Vec<Arc<Logged>>, SessionError> {
    let (dir, privacy) = (app.config.journal_dir(), app.privacy.clone());
    let read = tokio::task::spawn_blocking(move || log::read_journal(&dir, &privacy, seq, last));
    Ok(read.await.map_err(|_| CommitError::Stopped)??)
}

/// How many keys each master had dropped for want of memory, by its run id.
type Evicted = BTreeMap<String, u64>;

/// Takes in what others write, and keeps an eye on Redis.
struct Session<'s> {
    app: &'s Arc<App>,
    mirror: &'s Arc<Mirror>,
    writing: Link,
    reading: Link,
    patience: Patience,
    /// The last change of the journal when Redis was looked at last.
    seen_last: u64,
    /// How many revocations there were in Redis and here when they were united last for being different.
    united_at: Option<(u64, u64)>,
    met: Met,
    /// How many keys each master had dropped.
    evicted: Evicted,
    /// The same when a key that operators edit was last as it should be; also from sessions before.
    stood: &'s mut BTreeMap<&'static str, Evicted>,
    /// The edits that were dealt with and could not be written over, each with its digest and the stamp before it.
    dealt_with: BTreeMap<&'static str, (String, Option<u64>)>,
    peer_errors: BTreeMap<u64, String>,
}

impl Session<'_> {
    async fn look_after(&mut self) -> Result<Never, SessionError> {
        let told = [names::CHANGED, names::KEY_REVOKED, names::SECRET_ROTATION, names::EMERGENCY_REVOCATION];
        // Where Redis is set up to tell of them (notify-keyspace-events), edits are seen at once.
        let edited = names::EDITED.map(|key| format!("__keyspace@{}__:{key}", self.mirror.target.database()));
        let channels: Vec<&str> = told.into_iter().chain(edited.iter().map(String::as_str)).collect();
        let mut hints = self.mirror.target.listen(self.mirror.timeouts(), &channels).await?;
        let mut states = self.app.states.clone();
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
                _ = checks.tick() => self.check().await?,
                _ = leases.tick() => self.renew_lease().await?,
                _ = unions.tick() => {
                    round += 1;
                    let revoked = self.app.state().revocations.revoked();
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
        let app = self.app;
        let mut state = app.state();
        foreign::remove(&self.writing, state.version.source).await?;
        let mut in_log = log::last(&self.writing, state.version.source).await?;
        if in_log > *app.feed.last().borrow() {
            // Redis has changes of ours that we do not know: this journal is an older copy.
            tracing::error!("Redis has later changes of this journal than there are here: they are taken in");
            let source = app.clock.now_ms().max(state.version.source + 1);
            let plan = move |_: &View<'_>| {
                Ok::<_, Problem>((vec![Change::LineBegun { source, accepts_loss: false }], ()))
            };
            app.writer.submit("system", plan).await?.map_err(|_| CommitError::Stopped)?;
            state = app.state();
            in_log = 0;
        }
        let mut join = redis::cmd("SADD");
        join.arg(names::SOURCES).arg(format!("{:x}", state.version.source));
        self.writing.query::<redis::Value>(&join).await?;
        self.fill_up_others().await?;
        while self.take_in().await? {}
        self.mirror.set_in_log(in_log);
        let mut passed_on = PassedOn { seq: in_log.max(state.line_start.saturating_sub(1)), in_log };
        let pass_on = PassOn { app, mirror: self.mirror, link: self.writing.clone() };
        pass_on.go_on(&mut passed_on).await?;
        let merged = (*app.state().merged).clone();
        pass_on.report(Report { seq: passed_on.seq, last_own: passed_on.in_log, merged }).await?;
        pass_on.note(passed_on.seq).await?;
        self.unite(Extent::AllKeys).await?;
        self.look_at_edits().await?;
        Ok(passed_on)
    }

    /// Fills the logs of others from this journal, where Redis has lost what was taken in from them. Those of
    /// the lines of history that went before in this journal are among them.
    async fn fill_up_others(&mut self) -> Result<(), SessionError> {
        let app = self.app;
        let merged = Arc::clone(&app.state().merged);
        let mut behind = BTreeMap::new();
        for (source, seq) in merged.iter() {
            let last = log::last(&self.writing, *source).await?;
            if last < *seq {
                let mut join = redis::cmd("SADD");
                join.arg(names::SOURCES).arg(format!("{source:x}"));
                self.writing.query::<redis::Value>(&join).await?;
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
        let (mut seq, last) = (0, *app.feed.last().borrow());
        let mut line = 0;
        loop {
            let entries = journalled(app, seq, last).await?;
            let Some(to) = entries.last().map(|logged| logged.seq) else { return Ok(()) };
            let mut changes: BTreeMap<u64, Vec<(u64, Shipped)>> = BTreeMap::new();
            for logged in &entries {
                if let Change::Genesis { source } | Change::LineBegun { source, .. } = logged.entry.change
                    && logged.entry.origin.is_none()
                {
                    line = source;
                }
                let (source, seq) = logged
                    .entry
                    .origin
                    .as_ref()
                    .map_or((line, logged.seq), |origin| (origin.source, origin.seq));
                if behind.get(&source).is_some_and(|last| seq > *last) {
                    changes.entry(source).or_default().push((seq, Shipped::of(logged, BTreeMap::new())));
                }
            }
            for (source, changes) in changes {
                let last = behind.get(&source).copied().unwrap_or_default();
                let mut filler = Filler { link: &self.writing, sealer: &self.mirror.sealer, source, last };
                filler.append(&changes, &app.store, app.clock.now_s()).await?;
                behind.insert(source, filler.last);
            }
            seq = to;
        }
    }

    /// Looks whether Redis has lost something, and at what others wrote.
    async fn look(&mut self) -> Result<(), SessionError> {
        let source = self.app.state().version.source;
        let timer = self.app.metrics.redis_seconds.with_label_values(&["look"]).start_timer();
        let expected = self.mirror.in_log();
        let in_log = log::last(&self.reading, source).await?;
        let size = revoked::count(&self.reading).await?;
        timer.observe_duration();
        if in_log < expected {
            return Err(LogError::Lost.into());
        }
        // First what they say, then what is to be taken in for it.
        let reports = self.reports().await?;
        while self.take_in().await? {}
        self.mirror.cover(&reports, (source, *self.app.feed.last().borrow()), &self.app.state().merged);
        self.look_at_edits().await?;
        // While changes are on their way the numbers differ by themselves.
        let last = *self.app.feed.last().borrow();
        let is_still = self.seen_last == last && self.mirror.status.borrow().tried >= last;
        self.seen_last = last;
        let sizes = (size, self.app.state().revocations.revoked() as u64);
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
            Some((source, self.mirror.sealer.open(&sealed::report_place(source), &report)?))
        };
        Ok(all.into_iter().filter_map(read).collect())
    }

    /// Takes in what is new in the logs of others; whether there may be more at once.
    async fn take_in(&mut self) -> Result<bool, SessionError> {
        let mut command = redis::cmd("SMEMBERS");
        command.arg(names::SOURCES);
        let sources: BTreeSet<String> = self.reading.query(&command).await?;
        let own = self.app.state().version.source;
        let mut more = false;
        let mut peers = Vec::new();
        for source in sources.iter().filter_map(|text| u64::from_str_radix(text, 16).ok()) {
            if source == own {
                continue;
            }
            let merged = Arc::clone(&self.app.state().merged);
            let seq = merged.get(&source).copied().unwrap_or(0);
            let (link, sealer) = (&self.reading, &self.mirror.sealer);
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
                self.app.metrics.redis_errors.with_label_values(&["peer"]).inc();
            }
            match &error {
                Some(error) => drop(self.peer_errors.insert(source, error.clone())),
                None => drop(self.peer_errors.remove(&source)),
            }
            let merged = self.app.state().merged.get(&source).copied().unwrap_or(0);
            peers.push(Peer { source: format!("{source:x}"), merged, error });
        }
        if self.mirror.status.borrow().peers != peers {
            self.mirror.update(|status| status.peers = peers);
        }
        Ok(more)
    }

    /// Takes changes in; what is wrong with them, if they cannot be.
    async fn take(&self, entries: Vec<Entry>) -> Result<Option<String>, SessionError> {
        if entries.is_empty() {
            return Ok(None);
        }
        let taken = entries.len() as u64;
        match self.app.writer.merge(entries).await {
            Ok(_) => {
                self.app.metrics.merged.inc_by(taken);
                Ok(None)
            }
            Err(CommitError::Stopped) => Err(CommitError::Stopped.into()),
            Err(error) => Ok(Some(error.to_string())),
        }
    }

    /// Looks at the keys that operators edit.
    async fn look_at_edits(&mut self) -> Result<(), SessionError> {
        for key in names::EDITED {
            let seen = self.see(key).await?;
            let ours = self.ours(key);
            match seen.judge(&ours) {
                Verdict::Same => self.note_standing(key),
                Verdict::Newer => {}
                Verdict::Write => drop(self.put(key, &seen, &ours).await?),
                Verdict::Edited if seen.value == Value::None && self.was_evicted(key).await? => {
                    if self.put(key, &seen, &ours).await? {
                        self.note_standing(key);
                    }
                }
                Verdict::Edited => {
                    // Also in vain: one that cannot be written over now is dealt with once all the same.
                    let edit = (seen.digest.clone(), seen.written.as_ref().map(|written| written.stamp));
                    if self.dealt_with.get(key) != Some(&edit) {
                        if !self.claim(key, &seen).await? {
                            continue;
                        }
                        self.honour(key, &seen).await?;
                    }
                    let ours = self.ours(key);
                    if self.put(key, &seen, &ours).await? {
                        self.dealt_with.remove(key);
                    } else {
                        self.dealt_with.insert(key, edit);
                    }
                }
            }
        }
        Ok(())
    }

    fn ours(&self, key: &str) -> Ours {
        let state = self.app.state();
        match key {
            names::LOCKDOWN => edits::ours_lockdown(
                state.rules.lockdown.as_ref(),
                state.lockdown_stamp,
                self.app.clock.now_s(),
            ),
            names::FLAGS => edits::ours_flags(),
            _ => Ours { stamp: 0, text: None, until_ms: 0 },
        }
    }

    async fn see(&self, key: &str) -> Result<Seen, SessionError> {
        let mut look = redis::cmd("EVAL");
        look.arg(scripts::LOOK).arg(2).arg(key).arg(names::written(key));
        let (kind, text, ttl, digest, stamp, written, until, now_ms): (
            String,
            Vec<u8>,
            i64,
            String,
            String,
            String,
            String,
            u64,
        ) = self.reading.query(&look).await?;
        Ok(Seen {
            value: match kind.as_str() {
                "none" => Value::None,
                "string" => Value::Text(String::from_utf8_lossy(&text).into_owned()),
                _ => Value::Other(kind),
            },
            ttl_ms: u64::try_from(ttl).ok(),
            digest,
            written: stamp.parse().ok().map(|stamp| Written {
                stamp,
                digest: written,
                until_ms: until.parse().unwrap_or(0),
            }),
            now_ms,
        })
    }

    /// Writes what should stand there, unless somebody was faster; whether it was written.
    async fn put(&self, key: &str, seen: &Seen, ours: &Ours) -> Result<bool, SessionError> {
        let mut put = redis::cmd("EVAL");
        put.arg(scripts::PUT).arg(3).arg(key).arg(names::written(key)).arg(names::claim(key));
        put.arg(&seen.digest).arg(ours.text.as_deref().unwrap_or("")).arg(ours.until_ms).arg(ours.stamp);
        put.arg(format!("{:x}", self.app.state().version.source));
        match self.reading.query::<u64>(&put).await {
            Ok(written) => Ok(written == 1),
            Err(error @ LinkError::WrongType) => Err(error.into()), // Made good by a new session.
            // It reads all the same; what cannot be written now is written when it can be.
            Err(error) if !error.must_reconnect() => {
                self.app.metrics.redis_errors.with_label_values(&[error.label()]).inc();
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it is for this control plane to deal with an edit; one does at a time.
    async fn claim(&self, key: &str, seen: &Seen) -> Result<bool, SessionError> {
        let mut claim = redis::cmd("EVAL");
        claim.arg(scripts::CLAIM).arg(3).arg(key).arg(names::written(key)).arg(names::claim(key));
        claim.arg(&seen.digest);
        claim.arg(seen.written.as_ref().map_or_else(String::new, |written| written.stamp.to_string()));
        claim.arg(format!("{:x}", self.app.state().version.source));
        claim.arg(u64::try_from(CLAIM_FOR.as_millis()).unwrap_or(u64::MAX));
        match self.reading.query::<u64>(&claim).await {
            Ok(taken) => Ok(taken == 1),
            // Redis takes no writes, so nobody can claim it: better twice than not at all.
            Err(error) if !error.must_reconnect() => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts an edit in force, or refuses it.
    async fn honour(&self, key: &str, seen: &Seen) -> Result<(), SessionError> {
        let now = self.app.clock.now_s();
        let roles = &self.app.config.roles;
        let change = match key {
            names::LOCKDOWN => {
                edits::lockdown(&seen.value, seen.ttl_ms, now, |role| roles.contains_key(role))
                    .map(|lockdown| Some(Change::LockdownChanged { lockdown }))
            }
            key => edits::refusal(key, &seen.value).map_or(Ok(None), Err),
        };
        let (change, outcome) = match change {
            Ok(None) => return Ok(()),
            Ok(Some(change)) => {
                tracing::warn!(key, "an edit in Redis is in force");
                (change, "taken")
            }
            Err(problem) => {
                tracing::error!(
                    key,
                    problem,
                    "an edit in Redis is refused; the last good value stays in force"
                );
                (Change::EditRefused { key: key.to_owned(), problem }, "refused")
            }
        };
        self.app.metrics.redis_edits.with_label_values(&[key, outcome]).inc();
        let plan = move |_: &View<'_>| Ok::<_, Problem>((vec![change], ()));
        self.app.writer.submit(ACTOR, plan).await?.map_err(|_| CommitError::Stopped)?;
        Ok(())
    }

    fn note_standing(&mut self, key: &'static str) {
        if self.stood.get(key) != Some(&self.evicted) {
            self.stood.insert(key, self.evicted.clone());
        }
    }

    /// Whether Redis may have dropped a key that is missing: it has dropped some since that one was last as it
    /// should be. Then that it is missing says nothing.
    async fn was_evicted(&mut self, key: &str) -> Result<bool, SessionError> {
        self.check().await?;
        Ok(match self.stood.get(key) {
            Some(before) => *before != self.evicted,
            None => self.evicted.values().any(|dropped| *dropped > 0),
        })
    }

    /// Looks how Redis is set up and fares, and whether it is still the one to go to.
    async fn check(&mut self) -> Result<(), SessionError> {
        // A master that was cut off from its Sentinels does not know that it was deposed.
        if let Some(master) = self.mirror.target.master_by_sentinels(self.mirror.timeouts()).await
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
        let known = self.mirror.status.borrow().masters.clone();
        masters.sort_by(|a: &Health, b| a.run_id.cmp(&b.run_id));
        let is_same = known.is_empty() || runs(&known) == runs(&masters);
        let problems: Vec<_> =
            masters.iter().flat_map(|health| health.problems(self.mirror.replicas)).collect();
        self.app.metrics.show_redis_problems(&problems);
        self.evicted = evicted;
        for (_, problem) in
            problems.iter().filter(|problem| !self.mirror.status.borrow().problems.contains(problem))
        {
            tracing::warn!(problem, "Redis is not set up as it should be");
        }
        self.mirror.update(|status| {
            status.masters = masters;
            status.problems = problems;
        });
        if !is_same && self.mirror.status.borrow().connected {
            return Err(SessionError::NotReady("Redis is another process or history than before"));
        }
        Ok(())
    }

    async fn renew_lease(&mut self) -> Result<(), SessionError> {
        let [lease, fence] = names::lease("scheduled");
        let mut command = redis::cmd("EVAL");
        command.arg(scripts::LEASE).arg(2).arg(lease).arg(fence);
        command.arg(format!("{:x}", self.app.state().version.source));
        command.arg(u64::try_from(LEASE_FOR.as_millis()).unwrap_or(u64::MAX));
        let token = match self.reading.query::<u64>(&command).await {
            Ok(token) => Some(token).filter(|token| *token > 0),
            Err(error @ LinkError::WrongType) => return Err(error.into()), // Made good by a new session.
            Err(error) if !error.must_reconnect() => None,
            Err(error) => return Err(error.into()),
        };
        if self.mirror.status.borrow().lease != token {
            self.mirror.update(|status| status.lease = token);
        }
        Ok(())
    }

    /// Whether anything had to be done, as far as is known.
    async fn unite(&mut self, extent: Extent) -> Result<bool, SessionError> {
        let timer = self.app.metrics.redis_seconds.with_label_values(&["unite"]).start_timer();
        let may_forget = self.mirror.status.borrow().lease.is_some();
        // No log is later than an answer of Redis may be.
        let patience = (&mut self.met, self.mirror.timeout);
        let united = match revoked::unite(self.app, &self.writing, extent, may_forget, patience).await {
            Err(UnionError::Link(error)) if !error.must_reconnect() => {
                self.app.metrics.redis_errors.with_label_values(&[error.label()]).inc();
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
