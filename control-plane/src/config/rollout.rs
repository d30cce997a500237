//! Settings of the rollout and of its guard.

use std::time::Duration;

use super::raw::RawConfig;
use super::value::{between, count, identifier, on_breach, share};
use crate::model::rollout::OnBreach;

/// The configuration of the rollout.
#[derive(Debug, Clone)]
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
    /// Time in force after which a step counts as stable.
    pub stable_after: Duration,
    /// The reaction to a breach.
    pub on_breach: OnBreach,
}

impl RolloutSettings {
    pub(super) fn read(raw: &mut RawConfig) -> Self {
        let guard = GuardSettings {
            window: raw.get("rollout.guard.window", between(5, 3_600)),
            min_requests: raw.get("rollout.guard.min_requests", count),
            margin: raw.get("rollout.guard.margin", share),
            stable_after: raw.get("rollout.guard.stable_after", between(1, 30 * 86_400)),
            on_breach: raw.get("rollout.guard.on_breach", on_breach),
        };
        Self { v1_cluster: raw.take("rollout.v1_cluster", identifier), guard }
    }
}
