//! Metrics of the rollout.

use keygate_core::decide::rollout::{FULL_SHARE, Strategy};

use super::write_only::{Counter, Gauge, Gauges, component};
use crate::model::rollout::Flags;

component! {
    /// Metrics of the rollout.
    RolloutMetrics {
        v2_ratio: Gauge = (
            "keygate_rollout_v2_ratio",
            "Share of subjects that goes to V2 now, from 0 to 1, without canary users and overrides."
        );
        strategy: Gauges<1> = (
            "keygate_rollout_strategy",
            "1 for the strategy of the rollout, else 0.",
            ["strategy"]
        );
        rollbacks: Counter = (
            "keygate_rollout_rollbacks_total",
            "Rollbacks by the guard."
        );
    }
}

impl RolloutMetrics {
    /// Shows the rollout at `now`, Unix seconds. Without a V1 everything goes to V2, whatever is set.
    pub fn show(&self, flags: &Flags, has_v1: bool, now: u64) {
        let in_force = if has_v1 { flags.rollout.strategy } else { Strategy::Full };
        for strategy in
            [Strategy::Off, Strategy::Canary, Strategy::Percentage, Strategy::Gradual, Strategy::Full]
        {
            self.strategy.with([strategy.label()]).set_flag(strategy == in_force);
        }
        let share = if has_v1 { flags.share_at(now) } else { FULL_SHARE };
        self.v2_ratio.set(f64::from(share) / f64::from(FULL_SHARE));
    }
}
