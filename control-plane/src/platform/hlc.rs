//! The order of changes of several control planes: a hybrid logical clock.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

/// Orders changes to the same thing, also those of different control planes: the greatest counts.
///
/// A hybrid logical clock (Kulkarni et al., "Logical Physical Clocks", OPODIS 2014): the stamp is the time of its
/// control plane, but always later than every stamp that it had seen, so that a change made in knowledge of another
/// counts more, whatever the clocks say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Unix milliseconds; 0 for what a new history begins with, which gives way to what anybody decided.
    pub stamp: u64,
    /// Whose. Of two beginnings that of the older history counts.
    pub source: Reverse<u64>,
}

impl Default for Mark {
    /// Of what was never changed: anything counts more.
    fn default() -> Self {
        Self { stamp: 0, source: Reverse(u64::MAX) }
    }
}

/// Where a change was made that this control plane took in from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The other's line of history.
    pub source: u64,
    /// The number in its journal.
    pub seq: u64,
    /// When it was made there, RFC 3339 UTC.
    pub at: String,
}
