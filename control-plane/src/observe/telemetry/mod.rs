//! Counts that proxies report, each event exactly once over restarts of proxies and of this process.
//!
//! A report gives for each series the number that was acknowledged before and the number now. The excess over the
//! greater of the former and of the number known here is new: it is counted, and the report is acknowledged once the
//! counts and the proxy's numbers are on disk together. Reports that come at the same time share a write.

pub mod counts;
mod disk;
pub mod tally;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keygate_core::decide::Reason;
use keygate_core::decide::policy::Policy;
use keygate_core::telemetry::{MAX_REPORTED, MAX_SERIES_BYTES, Receipt, Report, Series, Timing};
use tokio::sync::{Notify, watch};

use self::counts::Counts;
pub use self::disk::{Known, TelemetryStoreError};
use self::disk::{TelemetryStore, Totals};
use self::tally::Tally;
use crate::platform::clock::Clock;

/// Pause of a proxy between two reports, without the part that grows with the number of proxies.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_PER_PROXY: Duration = Duration::from_millis(2);
/// The shortest time between two writes.
const WRITE_EVERY: Duration = Duration::from_millis(100);
/// Time between two writes of what this process counts itself, and pause after a failed write.
const WRITE_OWN_EVERY: Duration = Duration::from_secs(1);
/// The longest time that a report waits for the disk.
const WRITTEN_WITHIN: Duration = Duration::from_secs(5);
/// Silence after which a process of a proxy is forgotten, seconds: none is silent for a month and still runs.
const FORGET_AFTER_S: u64 = 30 * 24 * 3_600;
/// The most processes of proxies that are known.
const MAX_KNOWN: usize = 20_000;
/// The most that a series may grow between two reports; no proxy counts more, so the report is wrong.
const MOST_AT_ONCE: u64 = 1_000_000_000_000;

/// Refusal of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// It cannot be right.
    #[error("{0}")]
    Invalid(&'static str),
    /// It is counted and not on disk: it must be sent again, and counts nothing twice.
    #[error("the report could not be kept; send it again")]
    NotKept,
}

/// Counts of all proxies and of this process's API.
pub struct Telemetry {
    roles: BTreeSet<String>,
    store: Arc<TelemetryStore>,
    kept: Mutex<Kept>,
    /// Held for the duration of a write.
    writing: tokio::sync::Mutex<()>,
    /// Signals that there is something to be written.
    news: Notify,
    /// The number of the last report that is on disk.
    written: watch::Sender<u64>,
}

#[derive(Debug)]
struct Kept {
    /// Counts, also those that are not on disk yet.
    counts: Counts,
    /// By incarnation and id.
    known: HashMap<String, Known>,
    /// Processes whose numbers are not on disk yet.
    unwritten: BTreeSet<String>,
    /// Names of the policy's routes.
    routes_now: BTreeSet<String>,
    /// The same, and those of former ones that something was counted of.
    routes: BTreeSet<String>,
    reports: u64,
    /// Counts of the rollout when an operator last reset them, and when that was.
    reset: (Tally, u64),
    on_disk: Arc<Totals>,
    /// Writes that failed.
    failures: u64,
}

/// Counts as they are exported: not more than is on disk. A counter that went back at a restart would be taken for one
/// that was reset, and all of it would be counted again.
#[derive(Debug, Clone)]
pub struct Exported {
    totals: Arc<Totals>,
    /// Names of the policy's routes; of others nothing is exported.
    pub routes: BTreeSet<String>,
    /// Writes that failed.
    pub failures: u64,
}

impl Exported {
    /// Counts that are on disk.
    pub fn counts(&self) -> &Counts {
        &self.totals.counts
    }
}

impl Telemetry {
    /// Reads what was counted before. `roles` are the labels that keys may have.
    ///
    /// # Errors
    /// When counts cannot be saved.
    pub fn open(dir: &Path, roles: BTreeSet<String>) -> Result<Self, TelemetryStoreError> {
        let (store, (totals, known)) = TelemetryStore::open(dir)?;
        let kept = Kept {
            counts: totals.counts.clone(),
            known,
            unwritten: BTreeSet::new(),
            routes_now: BTreeSet::new(),
            routes: totals.counts.routes().map(str::to_owned).collect(),
            reports: 0,
            reset: totals.reset,
            on_disk: Arc::new(totals),
            failures: 0,
        };
        Ok(Self {
            roles,
            store: Arc::new(store),
            kept: Mutex::new(kept),
            writing: tokio::sync::Mutex::new(()),
            news: Notify::new(),
            written: watch::Sender::new(0),
        })
    }

    /// Roles that keys may have, as labels.
    pub const fn roles(&self) -> &BTreeSet<String> {
        &self.roles
    }

    /// Makes the routes of a policy known, so that their series exist before the first request.
    pub fn note_routes(&self, policy: &Policy) {
        self.lock().note_routes(policy);
    }

    /// Counts a key that this process's API validated.
    pub fn key_validated(&self, role: &str, success: bool) {
        self.lock().counts.add_validation(role, success, &self.roles);
    }

    /// Counts a request that this process's API refused.
    pub fn request_refused(&self, reason: Reason) {
        self.lock().counts.add_refusal(reason);
    }

    /// Adds a duration that this process's API measured.
    pub fn observe(&self, timing: Timing, time: Duration) {
        self.lock().counts.add_time(timing, time);
    }

    /// Counts as they are exported.
    pub fn exported(&self) -> Exported {
        let kept = self.lock();
        Exported {
            totals: Arc::clone(&kept.on_disk),
            routes: kept.routes_now.clone(),
            failures: kept.failures,
        }
    }

    /// Requests of the rollout since the first start.
    pub fn tally(&self) -> Tally {
        Tally::of(&self.lock().counts)
    }

    /// Requests of the rollout by route, version and outcome.
    pub fn by_endpoint(&self) -> Vec<serde_json::Value> {
        tally::by_endpoint(&self.lock().counts)
    }

    /// Counts of the rollout when they were last reset, and when that was, Unix milliseconds; 0: never.
    pub fn rollout_reset(&self) -> (Tally, u64) {
        self.lock().reset
    }

    /// Resets the counts of the rollout that operators see.
    pub fn reset_rollout(&self, now_ms: u64) {
        let mut kept = self.lock();
        kept.reset = (Tally::of(&kept.counts), now_ms);
    }

    /// Counts what is new in a report and waits until it is on disk.
    ///
    /// # Errors
    /// See [`ReportError`].
    pub async fn take(&self, report: &Report, policy: &Policy, now_s: u64) -> Result<Receipt, ReportError> {
        let mut written = self.written.subscribe();
        let (number, proxies) = self.count(report, policy, now_s)?;
        self.news.notify_one();
        match tokio::time::timeout(WRITTEN_WITHIN, written.wait_for(|written| *written >= number)).await {
            Ok(Ok(_)) => {
                let again = AGAIN.max(AGAIN_PER_PROXY.saturating_mul(proxies));
                Ok(Receipt { again_ms: u64::try_from(again.as_millis()).unwrap_or(u64::MAX) })
            }
            _ => Err(ReportError::NotKept),
        }
    }

    /// The report's number, and how many proxies report.
    fn count(&self, report: &Report, policy: &Policy, now_s: u64) -> Result<(u64, u32), ReportError> {
        if report.counts.len() > MAX_REPORTED {
            return Err(ReportError::Invalid("a report has at most 2000 series"));
        }
        if report.counts.keys().any(|name| name.len() > MAX_SERIES_BYTES) {
            return Err(ReportError::Invalid("the name of a series is too long"));
        }
        let mut kept = self.lock();
        let id = format!("{} {}", report.incarnation, report.proxy);
        let known = kept.known.get(&id);
        let grown: Vec<(&String, u64, u64)> = report
            .counts
            .iter()
            .map(|(name, (acknowledged, now))| {
                let counted = known.map_or(0, |known| known.counts.get(name));
                (name, *now, now.saturating_sub(counted.max(*acknowledged)))
            })
            .collect();
        let is_time = |name: &str| matches!(Series::of(name), Some(Series::TimeSum { .. }));
        if grown.iter().any(|(name, _, more)| *more > MOST_AT_ONCE && !is_time(name)) {
            return Err(ReportError::Invalid("no proxy counts that much between two reports"));
        }
        let kept = &mut *kept;
        kept.note_routes(policy);
        for (name, _, more) in grown.iter().filter(|(.., more)| *more > 0) {
            match Series::of(name) {
                Some(series) => kept.counts.add(series, *more, &kept.routes, &self.roles),
                None => tracing::debug!(name, "a series of a newer filter is not counted"),
            }
        }
        let known = kept.known.entry(id.clone()).or_default();
        known.heard_s = now_s;
        // Of what is not known here nothing is kept: who reports could make it up without end.
        let routes = &kept.routes;
        for (name, now, _) in grown.into_iter().filter(|(name, ..)| is_known(name, routes)) {
            known.counts.raise(name, now);
        }
        kept.unwritten.insert(id);
        kept.reports += 1;
        let live = kept.known.values().filter(|known| now_s.saturating_sub(known.heard_s) < 60).count();
        Ok((kept.reports, u32::try_from(live).unwrap_or(u32::MAX)))
    }

    /// Writes what is new; whether that worked. From then on it is exported.
    pub async fn write(&self, now_s: u64) -> bool {
        let _one_at_a_time = self.writing.lock().await;
        let (number, totals, known, forgotten) = {
            let mut kept = self.lock();
            let forgotten = forget(&mut kept, now_s);
            let unwritten = std::mem::take(&mut kept.unwritten);
            let known: Vec<(String, Known)> = unwritten
                .into_iter()
                .filter_map(|id| kept.known.get(&id).cloned().map(|known| (id, known)))
                .collect();
            let is_same = kept.counts == kept.on_disk.counts && kept.reset == kept.on_disk.reset;
            if known.is_empty() && forgotten.is_empty() && is_same {
                return true;
            }
            (kept.reports, Totals::new(kept.counts.clone(), kept.reset), known, forgotten)
        };
        let store = Arc::clone(&self.store);
        let write = move || (store.write(&totals, &known, &forgotten), totals, known);
        match tokio::task::spawn_blocking(write).await {
            Ok((Ok(()), totals, _)) => {
                self.lock().on_disk = Arc::new(totals);
                self.written.send_replace(number);
                true
            }
            Ok((Err(error), _, known)) => {
                tracing::error!(%error, "reports of proxies are not acknowledged; nothing is lost");
                let mut kept = self.lock();
                kept.failures = kept.failures.saturating_add(1);
                kept.unwritten.extend(known.into_iter().map(|(id, _)| id));
                false
            }
            Err(_) => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn note_routes(&mut self, policy: &Policy) {
        let is_same = policy.routes.len() == self.routes_now.len()
            && policy.routes.iter().all(|route| self.routes_now.contains(&route.name));
        if is_same {
            return;
        }
        self.routes_now = policy.routes.iter().map(|route| route.name.clone()).collect();
        // Of routes that were never called nothing is left when they go.
        let counted: BTreeSet<&str> = self.counts.routes().collect();
        let (now, former) = (&self.routes_now, std::mem::take(&mut self.routes));
        self.routes = former.into_iter().filter(|name| counted.contains(name.as_str())).collect();
        self.routes.extend(now.iter().cloned());
    }
}

/// Whether a series is one that a proxy of this fleet has: of a route that a policy had.
fn is_known(name: &str, routes: &BTreeSet<String>) -> bool {
    let is_route = |route: &str| route.is_empty() || routes.contains(route);
    match Series::of(name) {
        None => false,
        Some(Series::Decision { route, .. } | Series::Answer { route, .. }) => is_route(route),
        Some(Series::Bucket { .. } | Series::TimeSum { .. }) => true,
    }
}

/// Writes what is counted, until the control plane stops.
pub async fn run(telemetry: Arc<Telemetry>, clock: Clock, mut stopping: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = telemetry.news.notified() => {}
            () = tokio::time::sleep(WRITE_OWN_EVERY) => {}
            _ = stopping.wait_for(|stop| *stop) => break,
        }
        let pause = if telemetry.write(clock.now_s()).await { WRITE_EVERY } else { WRITE_OWN_EVERY };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stopping.wait_for(|stop| *stop) => break,
        }
    }
    // Reports that came before the port was closed wait for it.
    let _last = telemetry.write(clock.now_s()).await;
}

/// Forgets who was silent for very long, and those longest silent when there are too many.
fn forget(kept: &mut Kept, now_s: u64) -> Vec<String> {
    let mut silent: Vec<(u64, String)> = kept
        .known
        .iter()
        .filter(|(_, known)| now_s.saturating_sub(known.heard_s) > FORGET_AFTER_S)
        .map(|(id, known)| (known.heard_s, id.clone()))
        .collect();
    let left = kept.known.len() - silent.len();
    if left > MAX_KNOWN {
        silent = kept.known.iter().map(|(id, known)| (known.heard_s, id.clone())).collect();
        silent.sort();
        silent.truncate(kept.known.len() - MAX_KNOWN);
    }
    let forgotten: Vec<String> = silent.into_iter().map(|(_, id)| id).collect();
    for id in &forgotten {
        kept.known.remove(id);
        kept.unwritten.remove(id);
    }
    forgotten
}

#[cfg(test)]
mod tests;
