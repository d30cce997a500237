//! The other control planes by way of Redis.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

use super::{Link, RedisPeers, Report, names, scripts, session};
use crate::config::Durability;
use crate::model::state::State;
use crate::peers::{Intake, LivePeer, Peers};

/// Time for which an answer waits until Redis has its change.
const REPLICATED_WITHIN: Duration = Duration::from_secs(1);
/// A control plane that is alive reports more often than this.
const SHOWS_ITSELF_WITHIN: Duration = Duration::from_secs(5);
/// Time for which a proxy waits until the others' changes were taken in.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(1);

impl RedisPeers {
    /// The connection for questions that callers ask.
    fn asking(&self) -> Option<Link> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes what other control planes have said of themselves, now that `merged` of their logs was taken in.
    pub(super) fn cover(
        &self,
        reports: &BTreeMap<u64, Report>,
        (own, last): (u64, u64),
        merged: &BTreeMap<u64, u64>,
    ) {
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

    /// Notes the reports that others left in Redis. How old one is that is met for the first time, its own time says.
    pub(super) fn hear(&self, reports: &BTreeMap<u64, Report>, now_ms: u64) {
        let now = Instant::now();
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.first.get_or_insert(now);
        heard.looked = Some(now);
        for (source, report) in reports {
            let age = Duration::from_millis(now_ms.saturating_sub(report.beat));
            let seen = match heard.reports.get(source) {
                Some((before, seen)) if before.beat == report.beat => *seen,
                Some(_) => now,
                None => now.checked_sub(age).unwrap_or(now),
            };
            heard.reports.insert(*source, (report.clone(), seen));
        }
    }
}

impl Peers for RedisPeers {
    fn is_alone(&self) -> bool {
        false
    }

    fn is_connected(&self) -> bool {
        self.status.borrow().connected
    }

    fn holds_lease(&self) -> bool {
        let status = self.status.borrow();
        status.connected && status.lease.is_some()
    }

    fn intake(&self) -> Intake {
        self.status.borrow().intake
    }

    fn wait_caught_up(&self) -> BoxFuture<'_, bool> {
        Box::pin(async {
            let mut status = self.status.subscribe();
            let settled =
                status.wait_for(|status| matches!(status.intake, Intake::Unreachable | Intake::Done));
            tokio::time::timeout(CAUGHT_UP_WITHIN, settled).await.is_ok()
        })
    }

    fn covered(&self, source: u64) -> Option<u64> {
        self.covered.lock().unwrap_or_else(PoisonError::into_inner).get(&source).copied()
    }

    fn live(&self, state: &State) -> Vec<LivePeer> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let is_own = |source: &u64| state.is_own(*source);
        let Some(looked) = heard.looked else {
            let known = state.merged.keys().filter(|source| !is_own(source));
            return known
                .map(|source| LivePeer { source: *source, known_secrets: None, left: None })
                .collect();
        };
        let hard_age = Duration::from_secs(state.rules.hard_age_s);
        // Clocks may differ: each has time to show that it is alive.
        let is_early = heard.first.is_some_and(|first| looked.duration_since(first) < SHOWS_ITSELF_WITHIN);
        let live = heard.reports.iter().filter(|(source, (report, seen))| {
            let is_over = report.left.as_ref().is_some_and(BTreeSet::is_empty);
            !is_own(source) && !is_over && (is_early || looked.saturating_duration_since(*seen) <= hard_age)
        });
        live.map(|(source, (report, _))| LivePeer {
            source: *source,
            known_secrets: Some(report.known.clone()),
            left: report.left.clone(),
        })
        .collect()
    }

    fn sync_url(&self, source: u64) -> Option<String> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.reports.get(&source).and_then(|(report, _)| report.sync_url.clone())
    }

    /// Does not wait when the change is known not to come.
    fn durability(&self, seq: u64) -> BoxFuture<'_, Durability> {
        Box::pin(async move {
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
        })
    }

    fn lease<'a>(&'a self, work: &'a str, source: u64, period: Duration) -> BoxFuture<'a, Option<bool>> {
        Box::pin(async move {
            let link = self.asking()?;
            session::lease(&link, work, source, period).await.ok().map(|token| token.is_some())
        })
    }

    fn release<'a>(&'a self, work: &'a str, source: u64) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let [lease, _] = names::lease(work);
            let mut command = redis::cmd("EVAL");
            command.arg(scripts::RELEASE).arg(1).arg(lease).arg(format!("{source:x}"));
            if let Some(link) = self.asking() {
                let _expires_anyway: Result<u64, _> = link.query(&command).await;
            }
        })
    }

    fn release_any<'a>(&'a self, work: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let [lease, _] = names::lease(work);
            if let Some(link) = self.asking() {
                let _expires_anyway: Result<u64, _> = link.query(redis::cmd("DEL").arg(lease)).await;
            }
        })
    }

    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], ttl_s: u64) -> BoxFuture<'a, bool> {
        Box::pin(async move {
            let Some(link) = self.asking() else { return false };
            let set = link.query::<String>(redis::cmd("SET").arg(key).arg(value).arg("EX").arg(ttl_s)).await;
            set.is_ok()
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Option<Vec<u8>>> {
        Box::pin(async move {
            let link = self.asking()?;
            link.query::<Option<Vec<u8>>>(redis::cmd("GET").arg(key)).await.ok().flatten()
        })
    }
}
