//! What tests came to lately, and what that says of the system's health.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

/// Results that are kept.
const KEPT: usize = 2_000;
/// What counts for the health, in milliseconds.
const RECENT_MS: u64 = 5 * 60 * 1_000;
/// The share of passed tests from which on it is healthy, and degraded, in percent.
const HEALTHY: f64 = 95.0;
const DEGRADED: f64 = 80.0;
/// After so many intervals without a run the health is not known any more.
const STALE_AFTER: u64 = 3;

/// What a test came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The test's id.
    pub test_id: String,
    /// Its name.
    pub name: String,
    /// The proxy at which it was run.
    pub target: String,
    /// When, RFC 3339 UTC.
    pub at: String,
    /// The same, Unix milliseconds.
    #[serde(skip)]
    pub at_ms: u64,
    /// Whether all of it held.
    pub passed: bool,
    /// The status, if there was an answer.
    pub status: Option<u16>,
    /// How long it took, in milliseconds.
    pub latency_ms: f64,
    /// What did not hold.
    pub failure: Option<String>,
    /// Whether somebody is told when it fails again and again.
    pub critical: bool,
    /// The trace of its run, which its calls carry.
    pub trace_id: String,
}

/// What they say together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Health {
    /// `healthy`, `degraded`, `unhealthy`, `no_data` or `stale`.
    pub status: &'static str,
    /// The share of the last five minutes' tests that passed, in percent.
    pub pass_rate: Option<f64>,
    /// How many those are.
    pub recent_tests: usize,
    /// How often in a row the critical test failed, at one proxy, that did so most often. Of tests that wake nobody
    /// nothing counts here.
    pub consecutive_failures: u32,
    /// Whether somebody was told that critical tests fail, and it is not over yet.
    pub alerting: bool,
    /// Which tests fail, with what did not hold.
    pub failing: BTreeMap<String, String>,
    /// When tests were run last.
    pub last_run: Option<String>,
}

impl Health {
    /// All that the status can be.
    pub const STATUSES: [&str; 5] = ["healthy", "degraded", "unhealthy", "no_data", "stale"];
}

/// When somebody is told: so many failures of a critical test among its last results at one proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alert {
    /// So many failures.
    pub failures: u32,
    /// Of so many results, at least as many as `failures`. The same number: so many in a row.
    pub of: u32,
}

impl Alert {
    /// How many results in a row must pass until it is over: then too few are left to be `failures`, whatever they were.
    /// One, when failures in a row are asked for.
    fn passes(self) -> usize {
        usize::try_from(self.of.saturating_sub(self.failures)).unwrap_or(usize::MAX).saturating_add(1)
    }
}

impl Default for Alert {
    /// Three in a row.
    fn default() -> Self {
        Self { failures: 3, of: 3 }
    }
}

/// Whether somebody is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// A critical test has failed so often that it is no accident.
    Fails(String),
    /// All of them pass again.
    Recovers,
}

/// A test at a target.
#[derive(Debug, Default)]
struct Place {
    /// Whether it failed, the last time last.
    failed: VecDeque<bool>,
    /// How often in a row.
    in_a_row: u32,
    /// What did not hold the last time that something did not.
    said: String,
    /// Whether somebody is told.
    critical: bool,
}

impl Place {
    fn add(&mut self, result: &Outcome, alert: Alert) {
        self.critical = result.critical;
        self.failed.push_back(result.failure.is_some());
        let surplus = self.failed.len().saturating_sub(alert.of as usize);
        self.failed.drain(..surplus);
        match &result.failure {
            None => self.in_a_row = 0,
            Some(failure) => {
                self.in_a_row = self.in_a_row.saturating_add(1);
                self.said.clone_from(failure);
            }
        }
    }

    fn fires(&self, alert: Alert) -> bool {
        self.critical && self.failed.iter().filter(|failed| **failed).count() >= alert.failures as usize
    }

    fn is_well(&self, alert: Alert) -> bool {
        !self.critical || self.failed.iter().rev().take(alert.passes()).all(|failed| !failed)
    }
}

/// The last results.
#[derive(Debug, Default)]
pub struct History {
    results: VecDeque<Outcome>,
    /// By test and target.
    places: BTreeMap<(String, String), Place>,
    last_run_ms: Option<u64>,
    /// Whether somebody was told.
    told: bool,
}

impl History {
    /// Takes the results of a run; whether somebody is to be told.
    pub fn add(&mut self, results: Vec<Outcome>, at_ms: u64, alert: Alert) -> Option<Turn> {
        self.last_run_ms = Some(at_ms);
        for result in &results {
            let place = (result.test_id.clone(), result.target.clone());
            self.places.entry(place).or_default().add(result, alert);
        }
        self.results.extend(results);
        let surplus = self.results.len().saturating_sub(KEPT);
        self.results.drain(..surplus);
        if self.told {
            let is_over = self.places.values().all(|place| place.is_well(alert));
            self.told = !is_over;
            return is_over.then_some(Turn::Recovers);
        }
        let fire = self.places.iter().filter(|(_, place)| place.fires(alert));
        let fire: Vec<_> =
            fire.map(|((test, target), place)| format!("{test} at {target}: {}", place.said)).collect();
        self.told = !fire.is_empty();
        self.told.then(|| Turn::Fails(fire.join("; ")))
    }

    /// Forgets how tests fare which are not there any more.
    pub fn keep_tests(&mut self, is_there: impl Fn(&str) -> bool) {
        self.places.retain(|(test, _), _| is_there(test));
    }

    /// Forgets how tests fare, and when they were run, since another control plane runs them from now on. Whether somebody
    /// was told, and is to be told that this is not known any more.
    pub fn leave(&mut self) -> bool {
        self.places.clear();
        self.last_run_ms = None;
        std::mem::take(&mut self.told)
    }

    /// Whether so few of the last five minutes' results passed that it is unhealthy, of the tests that `counts` takes.
    #[expect(clippy::cast_precision_loss, reason = "there are some thousands at most")]
    pub fn is_unhealthy(&self, now_ms: u64, counts: impl Fn(&str) -> bool) -> bool {
        let recent = self.results.iter().filter(|result| now_ms.saturating_sub(result.at_ms) <= RECENT_MS);
        let (mut all, mut passed) = (0_usize, 0_usize);
        for result in recent.filter(|result| counts(&result.test_id)) {
            all += 1;
            passed += usize::from(result.passed);
        }
        all > 0 && (passed as f64 / all as f64) * 100.0 < DEGRADED
    }

    /// What they say at `now_ms`, Unix milliseconds, if tests are run every `interval_ms`.
    #[expect(clippy::cast_precision_loss, reason = "there are some thousands at most")]
    pub fn health(&self, now_ms: u64, interval_ms: u64) -> Health {
        // Of tests that are still run: one that was deleted says nothing any more.
        let recent = || {
            let results =
                self.results.iter().filter(|result| now_ms.saturating_sub(result.at_ms) <= RECENT_MS);
            results.filter(|result| self.places.keys().any(|(test, _)| *test == result.test_id))
        };
        let count = recent().count();
        let passed = recent().filter(|result| result.passed).count();
        let rate = (count > 0).then(|| (passed as f64 / count as f64 * 1_000.0).round() / 10.0);
        let is_stale =
            self.last_run_ms.is_some_and(|last| now_ms.saturating_sub(last) > STALE_AFTER * interval_ms);
        let status = match rate {
            None if self.last_run_ms.is_none() => "no_data",
            _ if is_stale => "stale",
            None => "no_data",
            Some(rate) if rate >= HEALTHY => "healthy",
            Some(rate) if rate >= DEGRADED => "degraded",
            Some(_) => "unhealthy",
        };
        let failing = self.places.iter().filter(|(_, place)| place.in_a_row > 0);
        let critical = self.places.values().filter(|place| place.critical);
        Health {
            status,
            pass_rate: rate,
            recent_tests: count,
            consecutive_failures: critical.map(|place| place.in_a_row).max().unwrap_or(0),
            alerting: self.told,
            failing: failing
                .map(|((test, target), place)| (format!("{test} at {target}"), place.said.clone()))
                .collect(),
            last_run: self.last_run_ms.map(crate::platform::clock::rfc3339_ms),
        }
    }

    /// The last results, the last one first, of one test if one is named.
    pub fn results(&self, test: Option<&str>, limit: usize) -> Vec<Outcome> {
        let wanted = |result: &&Outcome| test.is_none_or(|test| result.test_id == test);
        self.results.iter().rev().filter(wanted).take(limit).cloned().collect()
    }

    /// When tests were run last, Unix milliseconds.
    pub fn last_run_ms(&self) -> Option<u64> {
        self.last_run_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(test: &str, at_ms: u64, failure: Option<&str>) -> Outcome {
        Outcome {
            test_id: test.into(),
            name: test.into(),
            target: "p".into(),
            at: String::new(),
            at_ms,
            passed: failure.is_none(),
            status: None,
            latency_ms: 1.0,
            failure: failure.map(Into::into),
            critical: test != "minor",
            trace_id: String::new(),
        }
    }

    #[test]
    fn three_failures_in_a_row_are_told_once_and_so_is_the_recovery() {
        let mut history = History::default();
        let mut run = |at, failure| {
            history.add(vec![result("a", at, failure), result("b", at, None)], at, Alert::default())
        };
        assert_eq!((run(1, Some("x")), run(2, Some("x"))), (None, None));
        assert_eq!(run(3, None), None, "two are an accident");
        assert_eq!((run(4, Some("x")), run(5, Some("x"))), (None, None));
        assert_eq!(run(6, Some("y")), Some(Turn::Fails("a at p: y".into())));
        assert_eq!((run(7, Some("y")), run(8, Some("y"))), (None, None), "once");
        assert_eq!((run(9, None), run(10, None)), (Some(Turn::Recovers), None));
    }

    #[test]
    fn what_is_not_critical_wakes_nobody() {
        let mut history = History::default();
        for at in 0..10 {
            assert_eq!(history.add(vec![result("minor", at, Some("x"))], at, Alert::default()), None);
        }
        let health = history.health(10, 60_000);
        assert_eq!((health.consecutive_failures, health.alerting), (0, false));
        assert_eq!(health.failing.len(), 1, "it is told all the same");
        history.keep_tests(|test| test != "minor");
        assert!(history.health(10, 60_000).failing.is_empty());
    }

    /// What is told when a test comes to this: `x` is a failure, `.` a pass. `F` fires, `R` recovers, `-` says nothing.
    fn told(alert: Alert, results: &str) -> String {
        let mut history = History::default();
        let mut told = String::new();
        for (at, sign) in (0..).zip(results.chars()) {
            let failure = (sign == 'x').then_some("x");
            told.push(match history.add(vec![result("a", at, failure)], at, alert) {
                None => '-',
                Some(Turn::Fails(_)) => 'F',
                Some(Turn::Recovers) => 'R',
            });
        }
        told
    }

    #[test]
    fn so_many_failures_of_so_many_are_told_once_and_over_when_they_cannot_be_any_more() {
        let of = |failures, of| Alert { failures, of };
        for (alert, results, wanted) in [
            (of(3, 3), "xx.xxx.x.xxx.", "-----FR----FR"),
            (of(1, 1), "x.xx.", "FRF-R"),
            // Not in a row, which three in a row would never see.
            (of(3, 3), "x.x.x.x.x.x.", "------------"),
            (of(3, 5), "x.x.x.x.x.x.", "----F-------"),
            (of(3, 5), "x.x.x...", "----F--R"),
            (of(3, 5), "xxx..x...", "--F-----R"),
            (of(3, 5), "x...x...x", "---------"),
            (of(2, 10), "x.........x", "-----------"),
            (of(2, 10), "x........x.........", "---------F--------R"),
        ] {
            assert_eq!(told(alert, results), wanted, "{alert:?}: {results}");
        }
    }

    #[test]
    fn who_does_not_run_them_any_more_knows_nothing_and_says_so_once() {
        let mut history = History::default();
        for at in 0..3 {
            history.add(vec![result("a", at, Some("x"))], at, Alert::default());
        }
        assert!(history.health(3, 60_000).alerting);
        assert_eq!((history.leave(), history.leave()), (true, false));
        let health = history.health(1_000_000, 60_000);
        assert_eq!((health.status, health.alerting, health.consecutive_failures), ("no_data", false, 0));
    }

    #[test]
    fn health_is_of_the_last_five_minutes_and_says_when_nothing_is_known() {
        let mut history = History::default();
        let status = |history: &History, now| history.health(now, 60_000).status;
        assert_eq!(status(&history, 0), "no_data");
        let mut failures = vec![None; 19];
        failures.push(Some("x"));
        let results = |at, failures: &[Option<&str>]| failures.iter().map(|f| result("a", at, *f)).collect();
        history.add(results(0, &failures), 0, Alert::default());
        assert_eq!((status(&history, 0), history.health(0, 1).pass_rate), ("healthy", Some(95.0)));
        history.add(results(1, &[Some("x"), Some("x"), Some("x")]), 1, Alert::default());
        assert_eq!(status(&history, 1), "degraded");
        history.add(results(2, &[Some("x"); 5]), 2, Alert::default());
        assert_eq!(status(&history, 2), "unhealthy");
        assert_eq!(status(&history, 180_002), "unhealthy");
        assert_eq!(status(&history, 180_003), "stale", "three intervals without a run");
        history.add(results(400_000, &[None]), 400_000, Alert::default());
        assert_eq!(history.health(400_000, 60_000).recent_tests, 1, "the others are long ago");
        for at in 0..KEPT as u64 + 10 {
            history.add(results(500_000 + at, &[None]), 500_000 + at, Alert::default());
        }
        assert_eq!(history.results(None, usize::MAX).len(), KEPT);
    }
}
