//! Services: loops that act without being asked, each with its own state.

pub mod admin_key;
pub mod canary;
pub mod issuing;
pub mod lift;
pub mod quota;
pub mod recovery;
pub mod rollout_guard;
pub mod rotation;
pub mod upkeep;
