//! Metrics of the port that proxies poll.

use super::write_only::{Counter, Counters, component};

component! {
    /// Metrics of the port that proxies poll.
    SyncMetrics {
        responses: Counters<1> = ("keygate_sync_responses_total", "Responses to proxies.", ["kind"]);
        response_bytes: Counters<1> = ("keygate_sync_response_bytes_total", "Bytes of responses to proxies.", ["kind"]);
        unauthorized: Counter = (
            "keygate_sync_unauthorized_total",
            "Polls without the right fleet token."
        );
        conflicts: Counter = (
            "keygate_sync_conflicts_total",
            "Polls of proxies that enforce a newer version than this control plane has."
        );
    }
}

impl SyncMetrics {
    /// Makes every series, with 0.
    pub(super) fn begin(&self) {
        for kind in ["current", "delta", "snapshot", "shards"] {
            self.responses.with([kind]);
            self.response_bytes.with([kind]);
        }
    }

    /// Counts an answer to a proxy.
    pub fn answered(&self, kind: &'static str, bytes: usize) {
        self.responses.with([kind]).inc();
        self.response_bytes.with([kind]).inc_by(bytes as u64);
    }
}
