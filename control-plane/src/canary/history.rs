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
    /// How often in a row the test failed that did so most often.
    pub consecutive_failures: u32,
    /// Which tests fail, with what did not hold.
    pub failing: BTreeMap<String, String>,
    /// When tests were run last.
    pub last_run: Option<String>,
}

impl Health {
    /// All that the status can be.
    pub const STATUSES: [&str; 5] = ["healthy", "degraded", "unhealthy", "no_data", "stale"];
}

/// Whether somebody is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// A critical test has failed so often that it is no accident.
    Fails(String),
    /// All of them pass again.
    Recovers,
}

/// The last results.
#[derive(Debug, Default)]
pub struct History {
    results: VecDeque<Outcome>,
    /// How often each test failed in a row, at each target, and what did not hold last.
    failing: BTreeMap<(String, String), (u32, String, bool)>,
    last_run_ms: Option<u64>,
    /// Whether somebody was told.
    told: bool,
}

impl History {
    /// Takes the results of a run; whether somebody is to be told, after `alert_after` failures in a row.
    pub fn add(&mut self, results: Vec<Outcome>, at_ms: u64, alert_after: u32) -> Option<Turn> {
        self.last_run_ms = Some(at_ms);
        for result in &results {
            let place = (result.test_id.clone(), result.target.clone());
            match &result.failure {
                None => drop(self.failing.remove(&place)),
                Some(failure) => {
                    let (count, said, critical) = self.failing.entry(place).or_default();
                    *count = count.saturating_add(1);
                    said.clone_from(failure);
                    *critical = result.critical;
                }
            }
        }
        self.results.extend(results);
        let surplus = self.results.len().saturating_sub(KEPT);
        self.results.drain(..surplus);
        let critical = self.failing.iter().filter(|(_, (.., critical))| *critical);
        let again = |(_, (count, ..)): &(&(String, String), &(u32, String, bool))| *count >= alert_after;
        let fails: Vec<String> = critical
            .clone()
            .filter(again)
            .map(|((test, target), (_, said, _))| format!("{test} at {target}: {said}"))
            .collect();
        if !fails.is_empty() && !self.told {
            self.told = true;
            return Some(Turn::Fails(fails.join("; ")));
        }
        if self.told && critical.count() == 0 {
            self.told = false;
            return Some(Turn::Recovers);
        }
        None
    }

    /// Forgets that tests fail which are not there any more.
    pub fn keep_tests(&mut self, is_there: impl Fn(&str) -> bool) {
        self.failing.retain(|(test, _), _| is_there(test));
    }

    /// What they say at `now_ms`, Unix milliseconds, if tests are run every `interval_ms`.
    #[allow(clippy::cast_precision_loss)] // There are some thousands at most.
    pub fn health(&self, now_ms: u64, interval_ms: u64) -> Health {
        let recent = || self.results.iter().filter(|result| now_ms.saturating_sub(result.at_ms) <= RECENT_MS);
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
        let failing = self
            .failing
            .iter()
            .map(|((test, target), (_, said, _))| (format!("{test} at {target}"), said.clone()));
        Health {
            status,
            pass_rate: rate,
            recent_tests: count,
            consecutive_failures: self.failing.values().map(|(count, ..)| *count).max().unwrap_or(0),
            failing: failing.collect(),
            last_run: self.last_run_ms.map(crate::clock::rfc3339_ms),
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
        }
    }

    #[test]
    fn three_failures_in_a_row_are_told_once_and_so_is_the_recovery() {
        let mut history = History::default();
        let mut run = |at, failure| history.add(vec![result("a", at, failure), result("b", at, None)], at, 3);
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
            assert_eq!(history.add(vec![result("minor", at, Some("x"))], at, 3), None);
        }
        assert_eq!(history.health(10, 60_000).consecutive_failures, 10);
        history.keep_tests(|test| test != "minor");
        assert_eq!(history.health(10, 60_000).consecutive_failures, 0);
    }

    #[test]
    fn health_is_of_the_last_five_minutes_and_says_when_nothing_is_known() {
        let mut history = History::default();
        let status = |history: &History, now| history.health(now, 60_000).status;
        assert_eq!(status(&history, 0), "no_data");
        let mut failures = vec![None; 19];
        failures.push(Some("x"));
        let results = |at, failures: &[Option<&str>]| failures.iter().map(|f| result("a", at, *f)).collect();
        history.add(results(0, &failures), 0, 3);
        assert_eq!((status(&history, 0), history.health(0, 1).pass_rate), ("healthy", Some(95.0)));
        history.add(results(1, &[Some("x"), Some("x"), Some("x")]), 1, 3);
        assert_eq!(status(&history, 1), "degraded");
        history.add(results(2, &[Some("x"); 5]), 2, 3);
        assert_eq!(status(&history, 2), "unhealthy");
        assert_eq!(status(&history, 180_002), "unhealthy");
        assert_eq!(status(&history, 180_003), "stale", "three intervals without a run");
        history.add(results(400_000, &[None]), 400_000, 3);
        assert_eq!(history.health(400_000, 60_000).recent_tests, 1, "the others are long ago");
        for at in 0..KEPT as u64 + 10 {
            history.add(results(500_000 + at, &[None]), 500_000 + at, 3);
        }
        assert_eq!(history.results(None, usize::MAX).len(), KEPT);
    }
}
