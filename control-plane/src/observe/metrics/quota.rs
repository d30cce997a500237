//! Metrics of the ledger of rate limits.

use std::time::Duration;

use keygate_core::quota::SilentProxy;

use super::write_only::{Counter, Gauge, Total, component};

/// Gaps in what the ledger knows, and their consequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Doubts {
    /// Proxies that were not heard of for 3 s.
    pub silent: Vec<SilentProxy>,
    /// Time until limits grow again at proxies; 0: they do.
    pub recovers_in: Duration,
    /// Nothing is granted, since another control plane may keep the ledger.
    pub suspended: bool,
    /// Proxies that were released without a word since the ledger was opened.
    pub released_proxies: u64,
    /// Units granted to them that they had not reported as spent: as many may have been admitted once more.
    pub released_units: u64,
}

component! {
    /// Metrics of the ledger of rate limits.
    QuotaMetrics {
        requests: Counter = (
            "keygate_quota_requests_total",
            "Requests of proxies for units of limits that were answered."
        );
        recovering: Gauge = (
            "keygate_quota_recovering",
            "1: caps of limits do not grow for 15 s, until proxies have told what another ledger granted them."
        );
        suspended: Gauge = (
            "keygate_quota_suspended",
            "1: nothing is granted of limits, since another control plane may keep the ledger; proxies go by their shares."
        );
        silent_proxies: Gauge = (
            "keygate_quota_silent_proxies",
            "Proxies that the ledger of limits has not heard of for 3 s, and not released yet."
        );
        released_proxies: Total = (
            "keygate_quota_released_proxies_total",
            "Proxies that ended or were lost without reporting what they spent of limits."
        );
        released_units: Total = (
            "keygate_quota_released_units_total",
            "Units of limits granted to those proxies and not reported as spent: as many may have been admitted once more."
        );
        owner: Gauge = (
            "keygate_quota_owner",
            "1: this control plane divides the limits of the fleet among its proxies."
        );
        forward_failures: Counter = (
            "keygate_quota_forward_failures_total",
            "Requests of proxies for units of limits that did not reach the control plane that divides them."
        );
    }
}

impl QuotaMetrics {
    /// Shows what the ledger does not know, if it is kept here.
    pub fn show(&self, doubts: Option<&Doubts>) {
        self.owner.set_flag(doubts.is_some_and(|doubts| !doubts.suspended));
        self.recovering.set_flag(doubts.is_some_and(|doubts| !doubts.recovers_in.is_zero()));
        self.suspended.set_flag(doubts.is_some_and(|doubts| doubts.suspended));
        self.silent_proxies.set_count(doubts.map_or(0, |doubts| doubts.silent.len() as u64));
        let Some(doubts) = doubts else { return };
        self.released_proxies.raise_to(doubts.released_proxies);
        self.released_units.raise_to(doubts.released_units);
    }
}
