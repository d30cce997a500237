//! State of the journal and the store, as health, upkeep and metrics read it.

use std::time::Duration;

/// State of the journal and the store after the last batch of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriterStatus {
    /// Batches of changes that the journal could not take. The first one seals the journal until a restart; batches
    /// that were refused because the disk is full are not counted.
    pub journal_failures: u64,
    /// Whether the journal's reserve is there. If not, the disk is full and only changes that end keys are taken.
    pub reserve_ok: bool,
    /// Changes that are in the journal and that the store has not taken yet.
    pub store_backlog: usize,
    /// Batches of changes that the store could not take. They are tried again.
    pub store_failures: u64,
}

impl WriterStatus {
    /// Whether nothing can be written until a restart.
    pub const fn is_sealed(self) -> bool {
        self.journal_failures > 0
    }
}

/// Receiver of the durations of writes; called on the writer's thread.
pub trait WriterObserver: Send {
    /// The journal took a batch of changes and synced it in `took`.
    fn journal_appended(&self, took: Duration);
    /// The store took a batch of changes, or failed to, in `took`.
    fn store_applied(&self, took: Duration);
}
