//! Exit codes: the same of every command.

use std::process::ExitCode;

/// The result of a command, for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It failed.
    Failed = 1,
    /// It would lose changes, and that was not accepted.
    WouldLose = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
