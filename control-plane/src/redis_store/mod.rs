//! The shared store: Redis, alone, behind Sentinels, or as a Cluster.
//!
//! A [`Target`] is what the operator typed, a [`Link`] is a live connection to it that never reconnects by
//! itself: after a failover a connection that stays open may lead to a replica, so whoever holds a link
//! that failed with [`LinkError::must_reconnect`] drops it and asks the target for a new one.

mod error;
mod link;
mod listen;
mod target;

pub use error::LinkError;
pub use link::{Link, Timeouts};
pub use listen::{Message, Messages};
pub use target::{Target, TargetError};
