//! Metrics of the journal and the store.

use std::sync::Arc;
use std::time::Duration;

use super::Metrics;
use super::write_only::{Gauge, Histogram, MICROSECONDS, Total, component};
use crate::durability::writer::{WriterObserver, WriterStatus};

component! {
    /// Metrics of the journal and the store.
    DurabilityMetrics {
        journal_append: Histogram = (
            "keygate_journal_append_seconds",
            "Time to write a batch of changes to the journal and sync it.",
            MICROSECONDS
        );
        journal_failures: Total = (
            "keygate_journal_failures_total",
            "Batches of changes that could not be written; changes are refused until a restart."
        );
        journal_reserve: Gauge = (
            "keygate_journal_reserve",
            "1: there is space in reserve; 0: the disk is full, only changes that end keys are taken."
        );
        store_apply: Histogram = (
            "keygate_store_apply_seconds",
            "Time for the store to take a batch of changes, after they were published.",
            MICROSECONDS
        );
        store_failures: Total = (
            "keygate_store_failures_total",
            "Batches of changes that the store could not take; they are in the journal and tried again."
        );
        store_backlog: Gauge = (
            "keygate_store_backlog",
            "Changes that are in the journal and that the store has not taken: it failed, or the disk is full."
        );
    }
}

impl DurabilityMetrics {
    /// Shows the state of the journal and the store.
    pub fn show(&self, status: WriterStatus) {
        self.journal_failures.raise_to(status.journal_failures);
        self.journal_reserve.set_flag(status.reserve_ok);
        self.store_failures.raise_to(status.store_failures);
        self.store_backlog.set_count(status.store_backlog as u64);
    }
}

impl WriterObserver for Arc<Metrics> {
    fn journal_appended(&self, took: Duration) {
        self.durability.journal_append.observe(took);
    }

    fn store_applied(&self, took: Duration) {
        self.durability.store_apply.observe(took);
    }
}
