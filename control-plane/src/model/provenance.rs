//! The provenance of a rule in force: who ordered it, when and why.

use crate::model::approval::Warrant;
use crate::model::change::Entry;
use crate::model::key::RevocationReason;

/// Who ordered a rule, when and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// The id of the key, or `system`, `redis`.
    pub by: String,
    /// Unix milliseconds.
    pub at_ms: u64,
    /// The reason, if one was given.
    pub reason: Option<String>,
}

impl Provenance {
    /// That of an entry of the journal.
    pub fn of(entry: &Entry) -> Self {
        Self { by: entry.actor.clone(), at_ms: entry.stamp, reason: entry.reason.clone() }
    }
}

/// The order of a cut-off in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutoffOrder {
    /// Who put it in force.
    pub provenance: Provenance,
    /// The reason that the revocations have.
    pub reason: RevocationReason,
    /// The id of the key that asked for it, where another one approved it.
    pub requested_by: Option<String>,
    /// How it took force, if it needed a second approval.
    pub warrant: Option<Warrant>,
}
