//! The state on its way from the control plane to a proxy: its bytes, and what the proxy does with them.

mod follower;
pub mod wire;

pub use self::follower::{Ask, Follower, Outcome, Step, SyncError};
