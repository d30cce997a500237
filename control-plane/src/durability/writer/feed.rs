//! The latest entries of the journal, for components that pass them on. One that has fallen behind reads the journal.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use crate::model::change::Entry;

/// Entries that are kept.
const KEPT: usize = 8_192;

/// An entry as it stands in the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct Logged {
    /// Its number.
    pub seq: u64,
    /// Time of writing, RFC 3339 UTC.
    pub at: String,
    /// The entry.
    pub entry: Entry,
}

/// The last entries of the journal.
#[derive(Debug)]
pub struct Feed {
    kept: Mutex<VecDeque<Arc<Logged>>>,
    last: watch::Sender<u64>,
}

impl Feed {
    /// None yet of those after `seq`.
    pub fn after_start(seq: u64) -> Arc<Self> {
        Arc::new(Self { kept: Mutex::default(), last: watch::Sender::new(seq) })
    }

    /// Takes entries that are on disk.
    pub fn push(&self, entries: impl IntoIterator<Item = Logged>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(entries.into_iter().map(Arc::new));
        let surplus = kept.len().saturating_sub(KEPT);
        kept.drain(..surplus);
        let last = kept.back().map(|logged| logged.seq);
        drop(kept);
        if let Some(last) = last {
            self.last.send_replace(last);
        }
    }

    /// The entries after number `seq`, at most `limit`; `None` when they are not all kept any more.
    pub fn after(&self, seq: u64, limit: usize) -> Option<Vec<Arc<Logged>>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if *self.last.borrow() <= seq {
            return Some(Vec::new());
        }
        let start = kept.partition_point(|logged| logged.seq <= seq);
        let follows = kept.get(start).is_some_and(|logged| logged.seq == seq + 1);
        follows.then(|| kept.range(start..).take(limit).cloned().collect())
    }

    /// The number of the last entry, as it changes.
    pub fn last(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::change::Change;

    fn logged(seq: u64) -> Logged {
        let entry = Entry::new("a", 1, Change::RevocationsRebuilt {});
        Logged { seq, at: String::new(), entry }
    }

    #[test]
    fn what_is_kept_is_handed_out_whole_or_not_at_all() {
        let feed = Feed::after_start(10);
        let seqs = |seq, limit| {
            feed.after(seq, limit).map(|found| found.iter().map(|logged| logged.seq).collect::<Vec<_>>())
        };
        assert_eq!(seqs(10, 9), Some(vec![]));
        assert_eq!(seqs(9, 9), None, "that one was before this start");
        feed.push((11..=13).map(logged));
        assert_eq!(seqs(10, 9), Some(vec![11, 12, 13]));
        assert_eq!(seqs(11, 1), Some(vec![12]));
        assert_eq!(seqs(13, 9), Some(vec![]));
        assert_eq!(seqs(9, 9), None);
        feed.push((14..14 + KEPT as u64).map(logged));
        assert_eq!(seqs(12, 9), None, "dropped");
        assert_eq!(seqs(13, 1), Some(vec![14]));
        assert_eq!(*feed.last().borrow(), 13 + KEPT as u64);
    }
}
