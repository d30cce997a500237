//! The rollout from V1 to V2 as the control plane keeps it: what is set, by whom and why, and what it was before. What it
//! means for a request is decided by [`keygate_core::decide::rollout`].

pub mod document;

use std::collections::VecDeque;
use std::time::Duration;

use keygate_core::decide::rollout::{ApiVersion, FULL_SHARE, Plan, Rollout, Strategy};
use serde::{Deserialize, Serialize};

use crate::model::canary;

/// How many changes of the rollout are remembered beside the journal.
const REMEMBERED: usize = 100;

/// The rollout that is set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flags {
    /// What proxies get.
    pub rollout: Rollout,
    /// Whether the guard may roll it back.
    pub guard: bool,
    /// Why it was set, if somebody said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
}

impl Default for Flags {
    /// No migration.
    fn default() -> Self {
        Self { rollout: Rollout::default(), guard: true, cause: None }
    }
}

impl Flags {
    /// The share of subjects that goes to V2 at a time, in 10,000ths, canary users and overrides apart.
    pub fn share_at(&self, now_s: u64) -> u32 {
        match (self.rollout.strategy, &self.rollout.gradual) {
            (Strategy::Off | Strategy::Canary, _) | (Strategy::Gradual, None) => 0,
            (Strategy::Percentage, _) => self.rollout.share.min(FULL_SHARE),
            (Strategy::Gradual, Some(gradual)) => gradual.share_at(now_s),
            (Strategy::Full, _) => FULL_SHARE,
        }
    }

    /// Whether anybody may go to V2 who would not be there if V2 were off.
    pub fn uses_v2(&self, now_s: u64) -> bool {
        let canaries = self.rollout.strategy != Strategy::Off && !self.rollout.canary_users.is_empty();
        canaries || self.share_at(now_s) > 0
    }

    /// What proxies get: the canary tests what Keygate enforces, so its keys go to V2 whoever else does.
    pub fn in_force(&self) -> Rollout {
        let mut rollout = self.rollout.clone();
        if !rollout.is_settled() {
            rollout.override_users.entry(canary::OWNER.into()).or_insert(ApiVersion::V2);
        }
        rollout
    }

    /// When the share changes next, Unix seconds, and to what.
    pub fn next_step(&self, now_s: u64) -> Option<(u64, u32)> {
        Plan::new(&self.rollout).next_step(now_s)
    }
}

/// A change of the rollout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// When it was made, Unix milliseconds.
    pub at_ms: u64,
    /// The number of the change.
    pub seq: u64,
    /// Whose key did it, or `system`, `redis`, `guard`.
    pub actor: String,
    /// What was set.
    pub flags: Flags,
}

/// Changes of the rollout, the last one first.
#[derive(Debug, Clone, Default)]
pub struct Pasts(VecDeque<Past>);

impl Pasts {
    /// Adds the newest.
    pub fn push(&mut self, past: Past) {
        self.0.push_front(past);
        self.0.truncate(REMEMBERED);
    }

    /// All of them, the last one first.
    pub fn iter(&self) -> impl Iterator<Item = &Past> {
        self.0.iter()
    }

    /// The last one.
    pub fn last(&self) -> Option<&Past> {
        self.0.front()
    }

    /// The rollout after a breach at `now_s`; `None`: it stays as it is.
    pub fn after_breach(
        &self,
        current: &Flags,
        now_s: u64,
        stable_after: Duration,
        on_breach: OnBreach,
    ) -> Option<Flags> {
        match on_breach {
            OnBreach::Previous => Some(self.last_good(current, now_s, stable_after)),
            OnBreach::Off => {
                let rollout = Rollout { strategy: Strategy::Off, gradual: None, ..current.rollout.clone() };
                Some(Flags { rollout, guard: current.guard, cause: None })
            }
            OnBreach::Hold => {
                let mut rollout = current.rollout.clone();
                let gradual = rollout.gradual.as_mut().filter(|gradual| gradual.paused_at.is_none())?;
                gradual.pause(now_s);
                Some(Flags { rollout, guard: current.guard, cause: None })
            }
        }
    }

    /// The rollout to roll back to at `now_s`: the share that was in force `stable_after` ago, if it is a smaller one, else
    /// nothing. What was held for longer and is bad all the same leaves no step to trust.
    pub fn last_good(&self, current: &Flags, now_s: u64, stable_after: Duration) -> Flags {
        let then_s = now_s.saturating_sub(stable_after.as_secs());
        let then = self.0.iter().find(|past| past.at_ms / 1_000 <= then_s);
        let share = then.map_or(0, |past| past.flags.share_at(then_s));
        let is_smaller = share > 0 && share < current.share_at(now_s);
        let strategy = if is_smaller { Strategy::Percentage } else { Strategy::Off };
        let rollout = Rollout { strategy, share, gradual: None, ..current.rollout.clone() };
        Flags { rollout, guard: current.guard, cause: None }
    }
}

/// The guard's reaction when V2 fares worse than V1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBreach {
    /// It returns to the last stable step, or to `off` if there is none.
    Previous,
    /// It sets `off`: everything goes to V1, where Keygate enforces nothing.
    Off,
    /// It pauses a gradual rollout, changes nothing else, and notifies.
    Hold,
}

#[cfg(test)]
mod tests {
    use keygate_core::decide::rollout::Gradual;

    use super::*;

    fn flags(strategy: Strategy, share: u32) -> Flags {
        Flags {
            rollout: Rollout { strategy, share, v1_retired: false, ..Rollout::default() },
            ..Flags::default()
        }
    }

    fn pasts(all: &[(u64, Flags)]) -> Pasts {
        let mut pasts = Pasts::default();
        for (at_s, flags) in all {
            pasts.push(Past { at_ms: at_s * 1_000, seq: 1, actor: "a".into(), flags: flags.clone() });
        }
        pasts
    }

    const GOOD_AFTER: Duration = Duration::from_secs(600);

    fn back(all: &[(u64, Flags)], now_s: u64) -> (Strategy, u32) {
        let current = &all.last().unwrap().1;
        let good = pasts(all).last_good(current, now_s, GOOD_AFTER).rollout;
        (good.strategy, good.share)
    }

    #[test]
    fn it_goes_back_to_what_was_held_long_enough_or_to_nothing() {
        use Strategy::{Canary, Full, Off, Percentage};
        let (five, quarter) = (flags(Percentage, 500), flags(Percentage, 2_500));
        let steps = [(0, flags(Off, 0)), (1_000, five.clone()), (2_000, quarter.clone())];
        assert_eq!(back(&steps, 2_100), (Percentage, 500), "five percent were good for a while");
        assert_eq!(back(&steps, 2_600), (Off, 2_500), "a quarter was good, and is no more");
        let hasty = [(0, flags(Off, 0)), (1_000, five), (1_100, quarter)];
        assert_eq!(back(&hasty, 1_200), (Off, 0), "nothing was held");
        assert_eq!(back(&[(0, flags(Canary, 0)), (900, flags(Full, 0))], 1_000).0, Off);
        assert_eq!(back(&[(0, flags(Full, 0))], 1_000).0, Off);
    }

    #[test]
    fn a_ramp_goes_back_to_where_it_was() {
        let mut ramp = flags(Strategy::Gradual, 0);
        let gradual = Gradual { start: 1_000, ramp_s: Some(10_000), steps: Vec::new(), paused_at: None };
        ramp.rollout.gradual = Some(gradual);
        assert_eq!(back(&[(1_000, ramp.clone())], 1_600), (Strategy::Off, 0));
        let (strategy, share) = back(&[(1_000, ramp)], 6_000);
        assert_eq!((strategy, share), (Strategy::Percentage, 4_400));
    }
}
