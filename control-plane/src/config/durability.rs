//! The durability that a change has when it is answered.

use serde::Serialize;

/// The place of a change when it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// In the journal of this control plane.
    Local,
    /// In Redis too, and in as many of its replicas as are asked for.
    Replicated,
}
