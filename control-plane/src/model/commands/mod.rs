//! Commands: pure functions of a [`View`](crate::model::View) that return the changes to journal and a receipt, or refuse.
//! No rule of operators stands anywhere else.

pub mod canary;
pub mod emergency;
pub mod keys;
pub mod limits;
pub mod policy;
pub mod recovery;
pub mod revocations;
pub mod rollout;
pub mod rotation;

use crate::model::change::Change;

/// The changes and the receipt of a command, or the reason why it is refused.
pub type Plan<T, E> = Result<(Vec<Change>, T), E>;

/// The revision of a document that a command was written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Any.
    Any,
    /// The one of this journal entry.
    Revision(u64),
    /// One that never was.
    Unknown,
}

impl Expected {
    /// Whether a command may be applied to revision `current`.
    ///
    /// # Errors
    /// When it was written for another one.
    pub fn check(self, current: u64) -> Result<(), RevisionMismatch> {
        match self {
            Self::Any => Ok(()),
            Self::Revision(expected) if expected == current => Ok(()),
            Self::Revision(_) | Self::Unknown => Err(RevisionMismatch { current }),
        }
    }
}

/// The document was changed since it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it was changed since it was read; read it again")]
pub struct RevisionMismatch {
    /// Its revision now.
    pub current: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_for_another_revision_is_refused() {
        assert_eq!(Expected::Any.check(3), Ok(()));
        assert_eq!(Expected::Revision(3).check(3), Ok(()));
        for expected in [Expected::Revision(2), Expected::Unknown] {
            assert_eq!(expected.check(3), Err(RevisionMismatch { current: 3 }));
        }
    }
}
