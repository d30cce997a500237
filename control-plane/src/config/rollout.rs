//! Settings of the rollout and of its guard.

use std::time::Duration;

/// The configuration of the rollout.
#[derive(Debug, Clone, Default)]
pub struct RolloutSettings {
    /// The Envoy cluster of the V1 upstream; `None`: there is no V1.
    pub v1_cluster: Option<String>,
    /// Settings of the guard.
    pub guard: GuardSettings,
}

/// Settings of the guard: the conditions under which it rolls back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuardSettings {
    /// Time over which requests are counted.
    pub window: Duration,
    /// Least number of requests to V2 within the window; with fewer, the guard does not judge.
    pub min_requests: u64,
    /// Most by which V2's share of bad requests may exceed V1's, from 0 to 1.
    pub margin: f64,
    /// Time in force after which a step counts as good.
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
