//! The guard: rolls a rollout back when V2 fares worse than V1. The judgement is pure; a task applies it every second.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use keygate_core::decide::rollout::Strategy;
use tokio::time::{MissedTickBehavior, interval};

use crate::config::GuardSettings;
use crate::model::View;
use crate::model::author::Author;
use crate::model::commands::rollout::{self as commands, RolledBack};
use crate::model::rollout::OnBreach;
use crate::model::rollout::document::percent;
use crate::node::Node;
use crate::observe::notify::Kind;
use crate::observe::telemetry::tally::{OfVersion, Tally};
use crate::services::canary::runner::{self, Canary};

/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Bad looks in a row that make a breach: a single burst is none.
const LOOKS: u32 = 2;
/// Actor of its changes in the journal.
pub const ACTOR: &str = "guard";

/// Cause of a rollback.
#[derive(Debug, Clone, PartialEq)]
pub enum Breach {
    /// V2 ends worse than V1.
    Worse {
        /// Within the window.
        seen: Tally,
    },
    /// The canary tests say so.
    Canary,
}

impl Breach {
    /// One sentence.
    pub fn text(&self, limits: &GuardSettings) -> String {
        match self {
            Self::Worse { seen } => format!(
                "{:.1} % of {} requests to V2 failed or were refused within {}, {:.1} % of {} to V1",
                seen.v2.bad_share() * 100.0,
                seen.v2.requests,
                humantime::format_duration(limits.window),
                seen.v1.bad_share() * 100.0,
                seen.v1.requests,
            ),
            Self::Canary => "the canary tests are unhealthy".into(),
        }
    }
}

/// Counts of a while.
#[derive(Debug, Default)]
pub struct Guard {
    /// Time in Unix milliseconds and counts, the oldest first.
    seen: VecDeque<(u64, Tally)>,
    /// The change that they follow.
    since: u64,
    bad_looks: u32,
}

impl Guard {
    /// Looks at the counts of now, since change `seq`; whether it is bad.
    pub fn look(&mut self, now_ms: u64, tally: Tally, seq: u64, limits: &GuardSettings) -> Option<Breach> {
        if seq != self.since {
            // What was before says nothing of what is.
            *self = Self { since: seq, ..Self::default() };
        }
        let window_ms = u64::try_from(limits.window.as_millis()).unwrap_or(u64::MAX);
        self.seen.push_back((now_ms, tally));
        // One from before the window stays, to count from.
        while self.seen.get(1).is_some_and(|(at, _)| now_ms.saturating_sub(*at) >= window_ms) {
            self.seen.pop_front();
        }
        let before = self.seen.front().map_or(tally, |(_, before)| *before);
        let seen = tally.since(before);
        // Refusals of V1 are no excuse for errors of V2.
        let is_worse = |share: fn(OfVersion) -> f64| share(seen.v2) > share(seen.v1) + limits.margin;
        let is_bad = seen.v2.requests >= limits.min_requests
            && (is_worse(OfVersion::error_share) || is_worse(OfVersion::bad_share));
        self.bad_looks = if is_bad { self.bad_looks.saturating_add(1) } else { 0 };
        (self.bad_looks >= LOOKS).then_some(Breach::Worse { seen })
    }
}

/// Watches until the control plane stops.
pub async fn run(node: Arc<Node>, canary: Arc<Canary>) {
    let mut stopping = node.stopping.clone();
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut guard = Guard::default();
    // The change of the rollout that is held as it is.
    let mut held = None;
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            _ = stopping.wait_for(|stop| *stop) => return,
        }
        let state = node.state();
        let now_s = node.clock.now_s();
        node.metrics.rollout.show(&state.flags, state.has_v1, now_s);
        let is_watched = state.flags.guard
            && state.has_v1
            && !state.flags.rollout.is_settled()
            && state.flags.rollout.strategy != Strategy::Off
            && state.flags.uses_v2(now_s);
        if !is_watched {
            continue;
        }
        let seq = state.pasts.last().map_or(0, |past| past.seq);
        let limits = &node.config.rollout.guard;
        let mut breach = guard.look(node.clock.now_ms(), node.telemetry.tally(), seq, limits);
        if runner::health(&canary).status == "unhealthy" && runner::is_application_unhealthy(&canary) {
            breach = breach.or(Some(Breach::Canary));
        }
        let Some(breach) = breach else { continue };
        if held == Some(seq) {
            continue; // It was said, and nothing is to be changed.
        }
        match roll_back(&node, seq, &breach).await {
            Ok(()) if limits.on_breach == OnBreach::Hold => {
                held = node.state().pasts.last().map(|past| past.seq);
            }
            Ok(()) => {}
            Err(error) => {
                tracing::error!(%error, "the rollout should be rolled back and cannot be; it is tried again");
            }
        }
    }
}

/// Rolls back to the last good step, unless the rollout was changed meanwhile.
async fn roll_back(
    node: &Arc<Node>,
    seq: u64,
    breach: &Breach,
) -> Result<(), crate::durability::writer::CommitError> {
    let limits = node.config.rollout.guard;
    let cause = breach.text(&limits);
    let said = cause.clone();
    let command =
        move |view: &View<'_>| commands::roll_back(view, seq, (limits.on_breach, limits.stable_after), said);
    let (Some(RolledBack { from, flags }), _) = node.writer.commit(&Author::part(ACTOR), command).await?
    else {
        return Ok(());
    };
    if limits.on_breach == OnBreach::Hold {
        tracing::error!(cause, "V2 fares worse; the rollout is held as it is");
        let text = format!(
            "V2 fares worse than V1; the rollout is held as it is (rollout.guard.on_breach): {cause}."
        );
        node.notifier.tell(
            Kind::RolledBack,
            text,
            vec![("strategy", flags.rollout.strategy.label().to_owned())],
        );
        return Ok(());
    }
    node.metrics.rollout.rollbacks.inc();
    let (from, to) = (percent(from), percent(flags.share_at(node.clock.now_s())));
    tracing::error!(cause, %from, %to, "the rollout was rolled back");
    let strategy = flags.rollout.strategy.label();
    node.notifier.tell(
        Kind::RolledBack,
        format!("The rollout of V2 was rolled back from {from} % to {to} % (strategy {strategy}): {cause}."),
        vec![("from", from.to_string()), ("to", to.to_string()), ("strategy", strategy.to_owned())],
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(v1: (u64, u64), v2: (u64, u64)) -> Tally {
        let of = |(requests, errors)| OfVersion { requests, errors, refused: 0 };
        Tally { v1: of(v1), v2: of(v2) }
    }

    const LIMITS: GuardSettings = GuardSettings {
        window: Duration::from_secs(60),
        min_requests: 50,
        margin: 0.05,
        stable_after: Duration::from_secs(600),
        on_breach: OnBreach::Previous,
    };

    /// Looks every second at these; the first look that finds a breach.
    fn first_breach(tallies: impl Iterator<Item = Tally>) -> Option<usize> {
        let mut guard = Guard::default();
        tallies
            .enumerate()
            .find_map(|(second, tally)| guard.look(second as u64 * 1_000, tally, 7, &LIMITS).map(|_| second))
    }

    #[test]
    fn it_says_nothing_of_few_requests_or_of_what_v1_does_too() {
        let each = |v1: (u64, u64), v2: (u64, u64)| {
            first_breach(
                (0..120).map(|second| tally((v1.0 * second, v1.1 * second), (v2.0 * second, v2.1 * second))),
            )
        };
        assert_eq!(each((100, 0), (10, 0)), None, "all is well");
        assert_eq!(each((100, 30), (10, 3)), None, "V1 is as bad");
        assert_eq!(each((100, 0), (100, 4)), None, "within the margin");
        assert_eq!(each((100, 0), (100, 10)), Some(2), "two looks with enough requests");
        assert_eq!(each((100, 0), (10, 10)), Some(6));
        assert_eq!(each((0, 0), (100, 100)), Some(2), "also without V1");
    }

    #[test]
    fn what_was_before_a_change_does_not_count() {
        let mut guard = Guard::default();
        assert_eq!(guard.look(0, tally((0, 0), (1_000, 1_000)), 1, &LIMITS), None);
        for second in 1..10 {
            assert_eq!(guard.look(second * 1_000, tally((0, 0), (1_000, 1_000)), 2, &LIMITS), None);
        }
    }

    #[test]
    fn what_left_the_window_does_not_count() {
        let well = |second: u64| tally((0, 0), (100 * second.min(30), 0));
        let mut guard = Guard::default();
        for second in 0..100 {
            assert_eq!(guard.look(second * 1_000, well(second), 1, &LIMITS), None);
        }
        // Of 60 requests that are in the window, six fail: those 3,000 before are of no help.
        let bad = |second: u64| tally((0, 0), (3_000 + 60 * (second - 99), 6 * (second - 99)));
        let found = (100..110).find(|second| guard.look(second * 1_000, bad(*second), 1, &LIMITS).is_some());
        assert_eq!(found, Some(101));
    }
}
