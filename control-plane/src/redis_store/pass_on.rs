//! What is changed here goes into the log of this control plane in Redis and its keys there, and how far that has got.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::error::LinkError;
use super::link::Link;
use super::log::{self, Filler};
use super::sealed::{self, Shipped};
use super::session::SessionError;
use super::{RedisPeers, Report, names};
use crate::durability::writer::{CommitError, Logged};
use crate::node::Node;
use crate::services::rotation;

/// Changes that are passed on at a time.
const AT_A_TIME: usize = 1_000;
/// The part of the time that Redis may take to answer which `WAIT` may take.
const WAIT_SHARE: f64 = 0.6;
/// How long it is waited when Redis takes no writes.
const RETRY: Duration = Duration::from_millis(250);

/// Where passing on stands: the last change of the journal that was dealt with, and the last one in the log.
#[derive(Debug, Clone, Copy)]
pub struct PassedOn {
    /// The first.
    pub seq: u64,
    /// The second.
    pub in_log: u64,
}

/// Passes changes on as they are made.
pub struct PassOn<'s> {
    /// Whose.
    pub node: &'s Arc<Node>,
    /// Where to.
    pub redis: &'s Arc<RedisPeers>,
    /// A connection of its own.
    pub link: Link,
}

impl PassOn<'_> {
    /// Passes changes on until the connection is of no use any more.
    pub async fn run(&self, mut passed_on: PassedOn) -> Result<Infallible, SessionError> {
        let mut last = self.node.feed.last();
        loop {
            match self.go_on(&mut passed_on).await {
                Ok(()) => {
                    let _closed = last.changed().await;
                    continue;
                }
                // What Redis does not explain is looked at from the beginning: the log may not be as it was left.
                Err(error) if error.is_of_writing() && error.label() != LinkError::UNEXPLAINED => {
                    self.node.metrics.redis.errors.with([error.label()]).inc();
                    self.redis.update(|status| {
                        status.tried = *last.borrow();
                        status.error = Some(error.to_string());
                    });
                    sleep(RETRY).await;
                    // What of it came through is found out anew.
                    passed_on.in_log = log::last(&self.link, self.node.state().version.source).await?;
                    passed_on.seq = passed_on.in_log.max(self.node.state().line_start.saturating_sub(1));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Passes on what there is.
    pub async fn go_on(&self, passed_on: &mut PassedOn) -> Result<(), SessionError> {
        let (node, redis) = (self.node, self.redis);
        let mut said: BTreeMap<u64, u64> = BTreeMap::new();
        loop {
            let last = *node.feed.last().borrow();
            let state = node.state();
            let source = state.version.source;
            let mut filler = Filler {
                link: &self.link,
                sealer: &redis.sealer,
                keys: &node.keys,
                source,
                last: passed_on.in_log,
            };
            let (entries, live) = match node.feed.after(passed_on.seq, AT_A_TIME) {
                Some(entries) => (entries, true),
                None => (journalled(node, passed_on.seq, last).await?, false),
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
            let timer = node.metrics.redis.seconds.with(["append"]).start_timer();
            filler.append(&changes, &node.store, node.clock.now_s()).await?;
            timer.observe_duration();
            *passed_on = PassedOn { seq: to, in_log: filler.last };
            redis.set_in_log(filler.last);
            // A state that is later than its seq says too much, which asks more of others than it must.
            self.report(to, filler.last, (*state.merged).clone()).await?;
            self.note(to).await?;
        }
    }

    /// Tells the others where this one stands: the last change of its journal, the last one of those that was made
    /// here, and how far it had taken in the others' by then.
    pub async fn report(
        &self,
        seq: u64,
        last_own: u64,
        merged: BTreeMap<u64, u64>,
    ) -> Result<(), SessionError> {
        let known = rotation::known_everywhere(self.node);
        let sync_url = Some(self.node.sync_url.clone());
        let beat = self.node.clock.now_ms();
        let report = Report { seq, last_own, merged, known, sync_url, beat, left: None };
        *self.redis.reported.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((report.clone(), Instant::now()));
        let source = self.node.state().version.source;
        Ok(write_report(self.redis, &self.link, source, &report).await?)
    }

    /// Notes that Redis has all changes up to `seq`, once its replicas have too.
    pub async fn note(&self, seq: u64) -> Result<(), SessionError> {
        let redis = self.redis;
        let have = if redis.replicas == 0 {
            0
        } else {
            let _timer = self.node.metrics.redis.seconds.with(["wait"]).start_timer();
            let source = self.node.state().version.source;
            let wait = log::wait(redis.replicas, redis.timeout.mul_f64(WAIT_SHARE));
            self.link.query_at::<u64>(&names::log(source), &wait).await?
        };
        redis.update(|status| {
            status.tried = seq;
            if have >= redis.replicas {
                status.replicated = seq;
                status.error = None;
            } else {
                let wanted = redis.replicas;
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

/// Entries of the journal after number `seq`, up to `last`.
pub async fn journalled(node: &Node, seq: u64, last: u64) -> Result<Vec<Arc<Logged>>, SessionError> {
    let (dir, privacy) = (node.config.journal_dir(), node.privacy.clone());
    let read = tokio::task::spawn_blocking(move || log::read_journal(&dir, &privacy, seq, last));
    Ok(read.await.map_err(|_| CommitError::Stopped)??)
}

/// Writes the report of this control plane.
async fn write_report(
    redis: &RedisPeers,
    link: &Link,
    source: u64,
    report: &Report,
) -> Result<(), LinkError> {
    let sealed = redis.sealer.seal(&sealed::report_place(source), report);
    let mut set = redis::cmd("HSET");
    set.arg(names::REPORTS).arg(format!("{source:x}")).arg(sealed);
    link.query::<()>(&set).await
}

/// Says that this control plane ends, and which proxies it leaves: others need not wait for it.
pub async fn sign_off(node: &Node, redis: &RedisPeers) {
    let link = redis.asking.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let report = redis.reported.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (Some(link), Some((report, _))) = (link, report) else { return };
    let state = node.state();
    let report = Report { beat: node.clock.now_ms(), left: Some(node.fleet.live(&state)), ..report };
    if let Err(error) = write_report(redis, &link, state.version.source, &report).await {
        tracing::warn!(%error, "other control planes do not hear that this one ends; they wait for it for the hard age");
    }
}
