//! Metrics of the proxies as a fleet, and of the state that they load.

use super::write_only::{Counter, Gauge, Histogram, MILLISECONDS, component};
use crate::model::state::State;
use crate::observe::fleet::Summary;

component! {
    /// Metrics of the proxies as a fleet.
    FleetMetrics {
        proxies: Gauge = ("keygate_fleet_proxies", "Proxies heard of within the hard age.");
        behind: Gauge = (
            "keygate_fleet_behind",
            "Proxies that do not enforce the newest version yet."
        );
        lag: Gauge = (
            "keygate_fleet_lag_seconds",
            "Time since the proxy that is furthest behind enforced the newest version; 0 when none is behind."
        );
        stale: Gauge = (
            "keygate_fleet_stale",
            "Proxies silent for longer than the hard age, which answer 503 unless they are gone; forgotten in time."
        );
        propagation: Histogram = (
            "keygate_propagation_seconds",
            "From a change to its acknowledgement by the slowest proxy, for calls with wait=applied.",
            MILLISECONDS
        );
        propagation_timeouts: Counter = (
            "keygate_propagation_timeouts_total",
            "Calls with wait=applied whose time was up before every proxy enforced the change."
        );
        snapshot_bytes: Gauge = (
            "keygate_snapshot_bytes",
            "Bytes that a proxy loads which has nothing yet: rules and revocation set."
        );
        snapshot_age: Gauge = (
            "keygate_snapshot_age_seconds",
            "Time since the newest version was published, by this process."
        );
        revocations: Gauge = ("keygate_revocations", "Revoked and suspended keys that proxies know.");
        state_seq: Gauge = ("keygate_state_seq", "Sequence number of the newest version.");
    }
}

impl FleetMetrics {
    /// Shows the proxies and the newest state.
    pub fn show(&self, fleet: Summary, state: &State) {
        self.proxies.set_count(fleet.live as u64);
        self.behind.set_count(fleet.behind as u64);
        self.lag.set(fleet.lag.as_secs_f64());
        self.stale.set_count(fleet.stale as u64);
        self.snapshot_bytes.set_count(state.snapshot_bytes() as u64);
        self.snapshot_age.set(state.published.elapsed().as_secs_f64());
        self.revocations.set_count(state.revocations.len() as u64);
        self.state_seq.set_count(state.version.seq);
    }
}
