//! Metrics of the port that proxies poll.

use super::write_only::{Counter, Counters, component};

component! {
    /// Metrics of the port that proxies poll.
    SyncMetrics {
        answers: Counters<1> = ("keygate_sync_answers_total", "Answers to proxies.", ["kind"]);
        bytes: Counters<1> = ("keygate_sync_bytes_total", "Bytes of answers to proxies.", ["kind"]);
        unauthorized: Counter = (
            "keygate_sync_unauthorized_total",
            "Polls without the right fleet token."
        );
        ahead: Counter = (
            "keygate_sync_ahead_total",
            "Polls of proxies that enforce a newer version than this control plane has."
        );
    }
}

impl SyncMetrics {
    /// Makes every series, with 0.
    pub(super) fn begin(&self) {
        for kind in ["current", "delta", "snapshot", "shards"] {
            self.answers.with([kind]);
            self.bytes.with([kind]);
        }
    }

    /// Counts an answer to a proxy.
    pub fn answered(&self, kind: &'static str, bytes: usize) {
        self.answers.with([kind]).inc();
        self.bytes.with([kind]).inc_by(bytes as u64);
    }
}
