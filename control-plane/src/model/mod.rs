//! The commands of operators: what each may do and what it changes, as functions of the state. HTTP, edits in Redis, the
//! canary and the command line call the same ones.

pub mod commands;
mod signing;
mod view;

pub use self::signing::SigningKeyPolicy;
pub use self::view::{Records, RecordsError, Seen, View};
