//! The model: a change in, a state out, and the commands of operators as functions of the state. It knows no clock, no
//! disk and no network. HTTP, edits in Redis, the canary and the command line call the same commands.

pub mod approval;
pub mod author;
pub mod canary;
pub mod change;
pub mod commands;
pub mod expiry;
pub mod key;
pub mod limits;
pub mod lockdown;
pub mod provenance;
pub mod registrations;
pub mod roles;
pub mod rollout;
pub mod route_cost;
pub mod schedule;
mod signing;
pub mod state;
mod view;

pub use self::signing::SigningKeyPolicy;
pub use self::view::{Records, RecordsError, Seen, View};
