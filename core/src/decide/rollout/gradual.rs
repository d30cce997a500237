//! How a share grows with time.

use serde::{Deserialize, Serialize};

use super::FULL_SHARE;
use crate::token;

/// The most steps of a gradual rollout.
pub const MAX_STEPS: usize = 100;
/// The longest ramp or hold, in seconds: ten years of 365 days. What is longer was typed in milliseconds.
pub const MAX_SPAN_S: u64 = 10 * 365 * 86_400;
/// The steps that the operators' handbook recommends: 5, 25, 50 and 100 %, each for a week.
pub const WEEKLY_STEPS: [Step; 4] = [
    Step { share: 500, hold_s: WEEK_S },
    Step { share: 2_500, hold_s: WEEK_S },
    Step { share: 5_000, hold_s: WEEK_S },
    Step { share: FULL_SHARE, hold_s: WEEK_S },
];

const WEEK_S: u64 = 7 * 86_400;
/// One percent, in 10,000ths.
const PERCENT: u32 = 100;

/// How a share grows with time: as a ramp or in steps, one of the two.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gradual {
    /// When it begins, Unix seconds. Before, the share is 0.
    pub start: u64,
    /// Seconds in which the share grows evenly from nothing to everybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramp_s: Option<u64>,
    /// The steps, the first of them at `start`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// Since when it is paused, Unix seconds: the share stays what it was then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_at: Option<u64>,
}

/// A share that is held for a time. The last one is held for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The share, in 10,000ths.
    pub share: u32,
    /// For how long, in seconds.
    pub hold_s: u64,
}

impl Gradual {
    /// The share at a time, in 10,000ths. It never falls as time goes on.
    pub fn share_at(&self, now_s: u64) -> u32 {
        // A pause in the future is none yet: the share is never more than what the time alone gives.
        let at = self.paused_at.map_or(now_s, |paused_at| paused_at.min(now_s));
        let Some(elapsed) = at.checked_sub(self.start) else { return 0 };
        match self.ramp_s {
            Some(ramp_s) => ramped(elapsed, ramp_s),
            None => self.stepped(elapsed),
        }
    }

    /// When the share next changes, Unix seconds, and to what; of a ramp, when it next reaches a whole
    /// percent. `None` when it changes no more, or is paused before.
    pub fn next_step(&self, now_s: u64) -> Option<(u64, u32)> {
        let when = match self.ramp_s {
            Some(ramp_s) => {
                let elapsed = now_s.saturating_sub(self.start);
                let percent = ramped(elapsed, ramp_s).checked_div(PERCENT)?.saturating_add(1);
                if percent > 100 {
                    return None;
                }
                // The first second at which elapsed / ramp_s ≥ percent / 100.
                let needed = u128::from(percent).saturating_mul(u128::from(ramp_s)).div_ceil(100);
                self.start.checked_add(u64::try_from(needed).ok()?)?
            }
            None => self.next_begin(now_s)?,
        };
        match self.paused_at {
            Some(paused_at) if when > paused_at => None,
            _ => Some((when, self.share_at(when))),
        }
    }

    /// Pauses it. A pause that holds already goes on.
    pub fn pause(&mut self, now_s: u64) {
        self.paused_at = Some(self.paused_at.map_or(now_s, |paused_at| paused_at.min(now_s)));
    }

    /// Ends a pause: everything to come is later by its length, so the share goes on from where it stayed.
    pub fn resume(&mut self, now_s: u64) {
        if let Some(paused_at) = self.paused_at.take() {
            self.start = self.start.saturating_add(now_s.saturating_sub(paused_at));
        }
    }

    fn stepped(&self, elapsed: u64) -> u32 {
        let (mut share, mut left) = (0, elapsed);
        for step in &self.steps {
            share = step.share;
            let Some(rest) = left.checked_sub(step.hold_s) else { break };
            left = rest;
        }
        share.min(FULL_SHARE)
    }

    /// When the next step begins.
    fn next_begin(&self, now_s: u64) -> Option<u64> {
        let mut begin = self.start;
        for step in &self.steps {
            if begin > now_s {
                return Some(begin);
            }
            begin = begin.checked_add(step.hold_s)?;
        }
        None
    }

    /// Everything that is wrong with it, each with its member and what would be right.
    pub(super) fn check(&self, errors: &mut Vec<String>) {
        let mut wrong = |member: &str, problem: String| errors.push(format!("gradual.{member}: {problem}"));
        let span = 1..=MAX_SPAN_S;
        let times = [("start", Some(self.start)), ("paused_at", self.paused_at)];
        for (member, _) in times.into_iter().filter(|(_, time)| *time > Some(token::MAX_TIME)) {
            wrong(member, "must be Unix seconds before the year 10000".into());
        }
        match (self.ramp_s, self.steps.is_empty()) {
            (Some(_), false) => wrong("steps", "must not stand beside ramp_s; drop one of them".into()),
            (None, true) => wrong("steps", "must not be empty, or ramp_s must be set".into()),
            _ => {}
        }
        if self.ramp_s.is_some_and(|ramp_s| !span.contains(&ramp_s)) {
            wrong("ramp_s", format!("must be 1 to {MAX_SPAN_S} seconds"));
        }
        if self.steps.len() > MAX_STEPS {
            wrong("steps", format!("{} steps; at most {MAX_STEPS}", self.steps.len()));
        }
        let mut before = 0;
        for (index, step) in self.steps.iter().take(MAX_STEPS).enumerate() {
            if step.share <= before || step.share > FULL_SHARE {
                let problem = format!("must be more than {before} and at most {FULL_SHARE} ten-thousandths");
                wrong(&format!("steps[{index}].share"), problem);
            }
            if !span.contains(&step.hold_s) {
                wrong(&format!("steps[{index}].hold_s"), format!("must be 1 to {MAX_SPAN_S} seconds"));
            }
            before = step.share;
        }
    }
}

/// The share of a ramp, in 10,000ths, rounded down.
fn ramped(elapsed: u64, ramp_s: u64) -> u32 {
    if elapsed >= ramp_s {
        return FULL_SHARE;
    }
    let share = u128::from(elapsed)
        .saturating_mul(u128::from(FULL_SHARE))
        .checked_div(u128::from(ramp_s))
        .unwrap_or(0);
    // Below FULL_SHARE, as elapsed is below ramp_s.
    u32::try_from(share).unwrap_or(FULL_SHARE)
}
