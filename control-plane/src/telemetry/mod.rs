//! What proxies report, counted exactly once, over restarts of theirs and of this process.
//!
//! A report says of each series how much of it was acknowledged before and how much there is now. What is beyond the
//! greater of that and of what is known here is new: it is counted, and only when it is on disk, together with how far
//! it goes, is the report acknowledged. Reports that come at the same time share a write.

mod book;
mod shown;
mod times;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keygate_core::decide::Reason;
use keygate_core::decide::policy::Policy;
use keygate_core::decide::refusal::Refusal;
use keygate_core::telemetry::{MAX_REPORTED, MAX_SERIES_BYTES, Receipt, Report, Series, Timing};
use prometheus::IntCounterVec;
use prometheus::core::Collector as _;
use prometheus::proto::{MetricFamily, MetricType};
use tokio::sync::{Notify, watch};

use self::book::{Book, Totals};
pub use self::book::{BookError, Known};
pub use self::shown::Shown;
pub use self::times::Times;
use crate::clock::Clock;
use crate::metrics::{Metrics, V1, V2};
use crate::rollout::tally::Tally;

/// Proxies report again after so long, and later the more of them there are.
const AGAIN: Duration = Duration::from_millis(500);
const AGAIN_PER_PROXY: Duration = Duration::from_millis(2);
/// The shortest time between two writes.
const WRITE_EVERY: Duration = Duration::from_millis(100);
/// What this process counts itself is written as often.
const WRITE_OWN_EVERY: Duration = Duration::from_secs(1);
/// A report waits no longer for the disk.
const WRITTEN_WITHIN: Duration = Duration::from_secs(5);
/// A process that was silent for so long is forgotten, seconds: none runs on for a month and says nothing.
const FORGET_AFTER_S: u64 = 30 * 24 * 3_600;
/// The most processes of proxies that are known.
const MAX_KNOWN: usize = 20_000;
/// More than any proxy counts between two reports; who says so is mistaken.
const MOST_AT_ONCE: u64 = 1_000_000_000_000;

/// The label of a route that this control plane has never heard of.
const OTHER: &str = "other";
/// The label where no route matched.
const NONE: &str = "none";
/// The label of a role where no key was verified.
pub const UNKNOWN: &str = "unknown";
/// What becomes of requests, as a label.
pub const OUTCOMES: [&str; 3] = ["passed", "refused", "unavailable"];

/// Why a report is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// It cannot be right.
    #[error("{0}")]
    Invalid(&'static str),
    /// It is counted and not on disk: it must be sent again, and counts nothing twice.
    #[error("the report could not be kept; send it again")]
    NotKept,
}

/// What all proxies and this process have counted.
pub struct Telemetry {
    metrics: Arc<Metrics>,
    roles: BTreeSet<String>,
    book: Arc<Book>,
    kept: Mutex<Kept>,
    /// For one write at a time.
    writing: tokio::sync::Mutex<()>,
    /// There is something to be written.
    news: Notify,
    /// The number of the last report that is on disk.
    written: watch::Sender<u64>,
}

#[derive(Debug)]
struct Kept {
    /// By incarnation and id.
    known: HashMap<String, Known>,
    /// Those that are not on disk as they are.
    unwritten: BTreeSet<String>,
    /// Names of routes, now and before.
    routes: BTreeSet<String>,
    reports: u64,
    /// Where the rollout's counts for people begin, and since when.
    reset: (Tally, u64),
    on_disk: Totals,
}

impl Telemetry {
    /// Takes up what was counted before, into the metrics.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn open(dir: &Path, metrics: Arc<Metrics>, roles: BTreeSet<String>) -> Result<Self, BookError> {
        let (book, (totals, known)) = Book::open(dir)?;
        let endpoints = totals.counters.values().flatten();
        let routes = endpoints.filter_map(|(labels, _)| labels.get("endpoint").cloned()).collect();
        restore(&metrics, &totals);
        metrics.kept.show(metrics.kept.live());
        let kept = Kept {
            known,
            unwritten: BTreeSet::new(),
            routes,
            reports: 0,
            reset: totals.reset,
            on_disk: totals,
        };
        Ok(Self {
            metrics,
            roles,
            book: Arc::new(book),
            kept: Mutex::new(kept),
            writing: tokio::sync::Mutex::new(()),
            news: Notify::new(),
            written: watch::Sender::new(0),
        })
    }

    /// Where the rollout's counts for people begin, and since when, Unix milliseconds; 0: since ever.
    pub fn rollout_reset(&self) -> (Tally, u64) {
        self.lock().reset
    }

    /// Begins the rollout's counts for people anew.
    pub fn reset_rollout(&self, tally: Tally, now_ms: u64) {
        self.lock().reset = (tally, now_ms);
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
        let names = policy.routes.iter().map(|route| &route.name);
        let unheard: Vec<String> = names.filter(|name| !kept.routes.contains(*name)).cloned().collect();
        kept.routes.extend(unheard);
        for (name, _, more) in grown.iter().filter(|(.., more)| *more > 0) {
            match Series::of(name) {
                Some(series) => self.add(series, *more, &kept.routes),
                None => tracing::debug!(name, "a series of a newer filter is not counted"),
            }
        }
        let known = kept.known.entry(id.clone()).or_default();
        known.heard_s = now_s;
        for (name, now, _) in grown {
            known.counts.raise(name, now);
        }
        kept.unwritten.insert(id);
        kept.reports += 1;
        let live = kept.known.values().filter(|known| now_s.saturating_sub(known.heard_s) < 60).count();
        Ok((kept.reports, u32::try_from(live).unwrap_or(u32::MAX)))
    }

    fn add(&self, series: Series<'_>, more: u64, routes: &BTreeSet<String>) {
        let metrics = &self.metrics;
        match series {
            Series::Decision { reason, route, role } => {
                let endpoint = endpoint(route, routes);
                let refusal = reason.refusal();
                let outcome = match refusal {
                    None => "passed",
                    Some(Refusal::Unavailable) => "unavailable",
                    Some(_) => "refused",
                };
                let version = if reason == Reason::V1 { V1 } else { V2 };
                metrics.requests.with_label_values(&[version, endpoint, outcome]).inc_by(more);
                if refusal.is_some() {
                    metrics.refusals.with_label_values(&[reason.label()]).inc_by(more);
                    metrics.auth_errors.with_label_values(&[reason.label(), V2]).inc_by(more);
                }
                let role = if self.roles.contains(role) { role } else { UNKNOWN };
                if reason == Reason::RateLimited {
                    metrics.rate_limit_exceeded.with_label_values(&[role, endpoint]).inc_by(more);
                }
                if let Some(success) = reason.is_of_key() {
                    let result = if success { "success" } else { "failure" };
                    metrics.validated.with_label_values(&[role, V2, result]).inc_by(more);
                }
            }
            Series::Answer { version, trouble, route } => {
                let labels = [version.label(), endpoint(route, routes), trouble.label()];
                metrics.upstream_answers.with_label_values(&labels).inc_by(more);
            }
            Series::Bucket { timing, bucket } => times_of(metrics, timing).add(bucket, more),
            Series::TimeSum { timing } => times_of(metrics, timing).add_sum(more),
        }
    }

    /// Writes what is new, and shows it; whether that worked.
    pub async fn write(&self, now_s: u64) -> bool {
        let _one_at_a_time = self.writing.lock().await;
        let (number, families, totals, known, forgotten) = {
            let mut kept = self.lock();
            let forgotten = forget(&mut kept, now_s);
            let unwritten = std::mem::take(&mut kept.unwritten);
            let known: Vec<(String, Known)> = unwritten
                .into_iter()
                .filter_map(|id| kept.known.get(&id).cloned().map(|known| (id, known)))
                .collect();
            let families = self.metrics.kept.live();
            let totals = Totals { reset: kept.reset, ..totals_of(&families, &self.metrics) };
            (kept.reports, families, totals, known, forgotten)
        };
        if known.is_empty() && forgotten.is_empty() && totals == self.lock().on_disk {
            self.metrics.kept.show(families); // Of a new route there may be series without a number.
            return true;
        }
        let book = Arc::clone(&self.book);
        let write = move || (book.write(&totals, &known, &forgotten), totals, known);
        match tokio::task::spawn_blocking(write).await {
            Ok((Ok(()), totals, _)) => {
                self.lock().on_disk = totals;
                self.metrics.kept.show(families);
                self.written.send_replace(number);
                true
            }
            Ok((Err(error), _, known)) => {
                tracing::error!(%error, "reports of proxies are not acknowledged; nothing is lost");
                self.metrics.telemetry_failures.inc();
                self.lock().unwritten.extend(known.into_iter().map(|(id, _)| id));
                false
            }
            Err(_) => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
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

fn endpoint<'r>(route: &'r str, routes: &BTreeSet<String>) -> &'r str {
    match route {
        "" => NONE,
        route if routes.contains(route) => route,
        _ => OTHER,
    }
}

fn times_of(metrics: &Metrics, timing: Timing) -> &Times {
    match timing {
        Timing::Validation => &metrics.validation_seconds,
        Timing::Decode => &metrics.decode_seconds,
    }
}

/// The counters that outlive this process.
fn counters(metrics: &Metrics) -> [&IntCounterVec; 6] {
    [
        &metrics.validated,
        &metrics.auth_errors,
        &metrics.requests,
        &metrics.refusals,
        &metrics.upstream_answers,
        &metrics.rate_limit_exceeded,
    ]
}

fn totals_of(families: &[MetricFamily], metrics: &Metrics) -> Totals {
    let mut totals = Totals::default();
    for family in families.iter().filter(|family| family.get_field_type() == MetricType::COUNTER) {
        let series = family.get_metric().iter().filter_map(|metric| {
            // Counts are whole numbers, and floating-point ones are exact up to 2^53.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let count = metric.get_counter().get_value() as u64;
            let labels = metric.get_label().iter();
            let labels = labels.map(|label| (label.name().to_owned(), label.value().to_owned()));
            (count > 0).then(|| (labels.collect::<BTreeMap<_, _>>(), count))
        });
        totals.counters.insert(family.name().to_owned(), series.collect());
    }
    // Read after what is shown: never less than that.
    for timing in Timing::ALL {
        let observed = times_of(metrics, timing).observed();
        totals.times.insert(times::name_of(timing).to_owned(), observed);
    }
    totals
}

fn restore(metrics: &Metrics, totals: &Totals) {
    for counter in counters(metrics) {
        let name = counter.collect().first().map(|family| family.name().to_owned()).unwrap_or_default();
        for (labels, count) in totals.counters.get(&name).into_iter().flatten() {
            let labels: HashMap<&str, &str> =
                labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            // Of a version that had other labels, nothing is taken over.
            if let Ok(counter) = counter.get_metric_with(&labels) {
                counter.inc_by(*count);
            }
        }
    }
    for timing in Timing::ALL {
        if let Some(observed) = totals.times.get(times::name_of(timing)) {
            times_of(metrics, timing).add_all(observed);
        }
    }
}

#[cfg(test)]
mod tests;
