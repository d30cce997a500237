//! Settings of the rollout and of its guard.

use std::time::Duration;

/// The configuration of the rollout.
#[derive(Debug, Clone, Default)]
pub struct RolloutSettings {
    /// The Envoy cluster of the V1 upstream; `None`: there is no V1.
    pub v1_cluster: Option<String>,
    /// When the guard rolls back.
    pub guard: GuardSettings,
}

/// When the guard rolls back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuardSettings {
    /// Over so long requests are counted.
    pub window: Duration,
    /// With fewer requests to V2 in it nothing is said.
    pub min_requests: u64,
    /// By how much V2's share of bad requests may be greater than V1's, from 0 to 1.
    pub margin: f64,
    /// What was in force for so long counts as good.
    pub good_after: Duration,
}

impl Default for GuardSettings {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(60),
            min_requests: 50,
            margin: 0.05,
            good_after: Duration::from_secs(600),
        }
    }
}
