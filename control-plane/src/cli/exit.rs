//! Exit codes: the same of every command.

use std::fmt;
use std::process::ExitCode;

/// The result of a command, for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It failed.
    Failed = 1,
    /// The arguments are wrong, or the server does not understand them.
    Usage = 2,
    /// A proxy did not enforce the change in time, or what was waited for did not happen in time.
    NotInForce = 3,
    /// The change waits for another admin's approval.
    WaitsForApproval = 4,
    /// It would lose changes, and that was not accepted.
    WouldLose = 5,
    /// No proxy is connected, so nothing enforces the change.
    NoProxy = 6,
    /// The key is not accepted, or its scopes do not permit it.
    Refused = 7,
}

/// The codes, for help.
pub const HELP: &str = "Exit status:
  0  done
  1  failed
  2  wrong arguments
  3  not in force everywhere in time (--wait)
  4  waits for another admin's approval
  5  would lose changes, which was not accepted
  6  no proxy is connected (--wait)
  7  the key is not accepted or not permitted to do it";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error with its exit code.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    text: String,
}

impl Failure {
    /// The error with this text.
    pub fn error(exit: Exit, text: impl Into<String>) -> anyhow::Error {
        Self { exit, text: text.into() }.into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Failure {}

/// The exit code of an error.
pub fn code_of(error: &anyhow::Error) -> ExitCode {
    error.downcast_ref::<Failure>().map_or(Exit::Failed, |failure| failure.exit).into()
}
