//! Metrics of canary tests.

use super::write_only::{Counters, Gauge, Gauges, Histogram, MILLISECONDS, component};
use crate::model::canary::Health;
use crate::model::canary::History;

component! {
    /// Metrics of canary tests.
    CanaryMetrics {
        configured: Gauge = (
            "keygate_canary_configured",
            "1: proxies are configured that canaries test; 0: none are, and nothing is run."
        );
        runs: Counters<1> = ("keygate_canary_runs_total", "Canary tests that were run.", ["result"]);
        seconds: Histogram = (
            "keygate_canary_duration_seconds",
            "Duration of a canary test.",
            MILLISECONDS
        );
        revocation_seconds: Histogram = (
            "keygate_canary_revocation_seconds",
            "From the revocation of the probe's key to its first refusal at a proxy.",
            MILLISECONDS
        );
        status: Gauges<1> = (
            "keygate_canary_status",
            "Canary health: 1 for the current status, else 0.",
            ["status"]
        );
        pass_ratio: Gauge = (
            "keygate_canary_pass_ratio",
            "Canary tests of the last five minutes that passed, from 0 to 1; NaN without any."
        );
        consecutive_failures: Gauge = (
            "keygate_canary_consecutive_failures",
            "Longest run of failures of a critical canary test at one proxy until now; as in canary/health."
        );
        alerting: Gauge = (
            "keygate_canary_alerting",
            "1: critical canary tests failed as often as canary.alert says, and it is not over yet."
        );
        last_run: Gauge = (
            "keygate_canary_last_run_timestamp_seconds",
            "Last run of canary tests, Unix seconds; 0: never."
        );
    }
}

impl CanaryMetrics {
    /// Makes every series, with 0.
    pub(super) fn begin(&self) {
        for result in ["pass", "fail"] {
            self.runs.with([result]);
        }
        self.show(&History::default().health(0, 1), None);
    }

    /// Shows the health of canaries, and when they were run last, Unix milliseconds.
    #[allow(clippy::cast_precision_loss)] // Milliseconds are far below 2^53.
    pub fn show(&self, health: &Health, last_run_ms: Option<u64>) {
        for status in Health::STATUSES {
            self.status.with([status]).set_flag(status == health.status);
        }
        self.pass_ratio.set(health.pass_rate.map_or(f64::NAN, |percent| percent / 100.0));
        self.consecutive_failures.set_count(health.consecutive_failures.into());
        self.alerting.set_flag(health.alerting);
        self.last_run.set(last_run_ms.map_or(0.0, |last| last as f64 / 1_000.0));
    }
}
