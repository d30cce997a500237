//! What one VM counts, on the way of every request: no allocation once a route and a role were seen.

use std::collections::HashMap;

use super::{Counts, Series, Times, Timing, Trouble};
use crate::decide::rollout::ApiVersion;
use crate::decide::{Decision, Reason, Trace};

/// Of so many decisions the time of one is taken.
const SAMPLE: u32 = 16;
/// Between two ticks so many answers of upstreams are looked at, each; beyond that one of so many, which counts for all of
/// them. To look at one is a call into the proxy that takes longer than the decision.
const ANSWERS_LOOKED_AT: u32 = 128;
const ANSWERS_SAMPLE: u32 = 16;
/// So many pairs of a route and a role are looked for one after the other, before they are hashed.
const NEAR: usize = 8;
/// The most pairs of a route and a role that are told apart. A policy has fewer routes, and keys fewer roles; what
/// many changes of the policy add up to is not to grow for ever.
const MAX_PAIRS: usize = 4_096;

const ANSWERS: [(ApiVersion, Trouble); 4] = [
    (ApiVersion::V1, Trouble::Error),
    (ApiVersion::V1, Trouble::Denied),
    (ApiVersion::V2, Trouble::Error),
    (ApiVersion::V2, Trouble::Denied),
];
const REASONS: usize = Reason::ALL.len();

/// Decisions of one route and role.
#[derive(Debug)]
struct Cell {
    route: String,
    role: String,
    /// By [`Reason::index`].
    decisions: [u64; REASONS],
    /// By version and trouble, in the order of `ANSWERS`.
    answers: [u64; ANSWERS.len()],
}

type Map<V> = HashMap<String, V, ahash::RandomState>;

/// What one VM has counted.
#[derive(Debug, Default)]
pub struct Tally {
    cells: Vec<Cell>,
    /// The place of each in `cells`, by route, then by role.
    places: Map<Map<usize>>,
    validation: Times,
    decode: Times,
    until_sample: u32,
    /// Answers that were awaited since the last tick.
    awaited: u32,
    changed: bool,
}

/// An answer that is to be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awaited {
    /// The route's name.
    route: String,
    /// The upstream that the request went to.
    version: ApiVersion,
    /// For how many answers it counts.
    weight: u32,
}

impl Tally {
    /// Whether the time of the next decision is to be taken: of the first, and then of one in sixteen.
    pub fn samples(&mut self) -> bool {
        let sample = self.until_sample == 0;
        self.until_sample = self.until_sample.checked_sub(1).unwrap_or(SAMPLE.saturating_sub(1));
        sample
    }

    /// Counts a decision.
    pub fn decided(&mut self, decision: &Decision<'_>) {
        let route = decision.route.map_or("", |route| route.name.as_str());
        let role = decision.key.as_ref().map_or("", |key| key.claims.role.as_str());
        self.changed = true;
        let place = self.place(route, role);
        let cell = self.cells.get_mut(place);
        if let Some(count) = cell.and_then(|cell| cell.decisions.get_mut(decision.reason.index())) {
            *count = count.saturating_add(1);
        }
    }

    /// A request passed on this route: whether its answer is to be looked at.
    pub fn awaits(&mut self, route: &str, version: ApiVersion) -> Option<Awaited> {
        self.awaited = self.awaited.saturating_add(1);
        let weight = match self.awaited.checked_sub(ANSWERS_LOOKED_AT) {
            None | Some(0) => 1,
            Some(more) if more.is_multiple_of(ANSWERS_SAMPLE) => ANSWERS_SAMPLE,
            Some(_) => return None,
        };
        Some(Awaited { route: route.to_owned(), version, weight })
    }

    /// Counts an answer of an upstream that there was trouble with.
    pub fn answered(&mut self, awaited: &Awaited, trouble: Trouble) {
        self.changed = true;
        let place = self.place(&awaited.route, "");
        let cell = self.cells.get_mut(place);
        let answer = ANSWERS.iter().position(|answer| *answer == (awaited.version, trouble));
        if let Some(count) = cell.zip(answer).and_then(|(cell, answer)| cell.answers.get_mut(answer)) {
            *count = count.saturating_add(awaited.weight.into());
        }
    }

    /// To be called at each tick.
    pub fn on_tick(&mut self) {
        self.awaited = 0;
    }

    /// Notes how long a decision took, nanoseconds, and the token's part in it, if there was one.
    pub fn took(&mut self, validation_ns: u64, decode_ns: Option<u64>) {
        self.validation.add(validation_ns);
        if let Some(decode_ns) = decode_ns {
            self.decode.add(decode_ns);
        }
    }

    /// Whether anything was counted since this was asked last.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// All of it by name.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for Cell { route, role, decisions, answers } in &self.cells {
            for ((version, trouble), number) in ANSWERS.into_iter().zip(answers) {
                counts.add(Series::Answer { version, trouble, route }.to_string(), *number);
            }
            let decisions = Reason::ALL.into_iter().zip(decisions);
            for (reason, number) in decisions.filter(|(_, number)| **number > 0) {
                counts.add(Series::Decision { reason, route, role }.to_string(), *number);
            }
        }
        for (timing, times) in [(Timing::Validation, &self.validation), (Timing::Decode, &self.decode)] {
            for (bucket, number) in times.buckets.iter().enumerate().filter(|(_, number)| **number > 0) {
                counts.add(Series::Bucket { timing, bucket }.to_string(), *number);
            }
            counts.add(Series::TimeSum { timing }.to_string(), times.sum_ns);
        }
        counts
    }

    fn place(&mut self, route: &str, role: &str) -> usize {
        let near = self.cells.iter().take(NEAR).position(|cell| cell.route == route && cell.role == role);
        let known = || self.places.get(route).and_then(|roles| roles.get(role)).copied();
        if let Some(place) = near.or_else(known) {
            return place;
        }
        let (route, role) = if self.cells.len() < MAX_PAIRS { (route, role) } else { ("", "") };
        let roles = self.places.entry(route.to_owned()).or_default();
        let place = *roles.entry(role.to_owned()).or_insert(self.cells.len());
        if place == self.cells.len() {
            self.cells.push(Cell {
                route: route.to_owned(),
                role: role.to_owned(),
                decisions: [0; REASONS],
                answers: [0; ANSWERS.len()],
            });
        }
        place
    }
}

/// Takes the time of a token's part in a decision, when it is armed; the clock is the caller's.
#[derive(Debug)]
pub struct Stopwatch<C> {
    clock: Option<C>,
    began: Option<u64>,
    /// How long the token took, nanoseconds, if there was one.
    pub decode_ns: Option<u64>,
}

impl<C: Fn() -> u64> Stopwatch<C> {
    /// Takes the time by `clock`, which gives nanoseconds, if there is one.
    pub fn new(clock: Option<C>) -> Self {
        Self { clock, began: None, decode_ns: None }
    }
}

impl<C: Fn() -> u64> Trace for Stopwatch<C> {
    fn step(&mut self, step: &'static str, _: impl FnOnce() -> String) {
        let Some(clock) = &self.clock else { return };
        match (step, self.began) {
            ("credential", _) => self.began = Some(clock()),
            ("token", Some(began)) if self.decode_ns.is_none() => {
                self.decode_ns = Some(clock().saturating_sub(began));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::decide::Verdict;
    use crate::decide::cache::Verified;
    use crate::decide::policy::Route;
    use crate::decide::rollout::Choice;
    use crate::token::Claims;

    fn key(role: &str) -> Arc<Verified> {
        let claims = Claims {
            iss: "keygate".into(),
            sub: "key_1".into(),
            jti: "j".into(),
            iat: 1,
            exp: 2,
            nbf: None,
            aud: None,
            role: role.into(),
            scope: String::new(),
            own: None,
            lrole: None,
        };
        Arc::new(Verified::new("k".into(), 0, claims, None))
    }

    fn decision<'r>(reason: Reason, route: &'r Route, role: &str) -> Decision<'r> {
        let verdict = reason.refusal().map_or(Verdict::Forward, Verdict::Refuse);
        let choice = Choice::SETTLED;
        Decision {
            verdict,
            reason,
            route: Some(route),
            choice,
            key: Some(key(role)),
            left: None,
            shadowed: false,
        }
    }

    #[test]
    fn decisions_are_counted_by_reason_route_and_role() {
        let (chat, home) = (Route::keyed("chat", &[]), Route::keyed("home", &[]));
        let mut tally = Tally::default();
        assert!(!tally.take_changed());
        for _ in 0..3 {
            tally.decided(&decision(Reason::Allowed, &chat, "basic"));
        }
        tally.decided(&decision(Reason::Allowed, &chat, "admin"));
        tally.decided(&decision(Reason::Revoked, &home, "basic"));
        tally.decided(&Decision { route: None, key: None, ..decision(Reason::NoRoute, &home, "x") });
        let counts = tally.counts();
        for (name, number) in [
            ("decision allowed chat basic", 3),
            ("decision allowed chat admin", 1),
            ("decision revoked home basic", 1),
            ("decision no_route  ", 1),
        ] {
            assert_eq!(counts.get(name), number, "{name}");
        }
        assert_eq!(counts.iter().count(), 4);
        assert!(tally.take_changed() && !tally.take_changed());
    }

    #[test]
    fn answers_are_counted_by_version_and_route() {
        let mut tally = Tally::default();
        let v1 = tally.awaits("chat", ApiVersion::V1).unwrap();
        tally.answered(&v1, Trouble::Denied);
        for _ in 0..2 {
            let v2 = tally.awaits("chat", ApiVersion::V2).unwrap();
            tally.answered(&v2, Trouble::Error);
        }
        let counts = tally.counts();
        assert_eq!(counts.get("answer v1 denied chat"), 1);
        assert_eq!(counts.get("answer v2 error chat"), 2);
        assert_eq!(counts.iter().count(), 2);
    }

    #[test]
    fn of_many_answers_some_count_for_all() {
        let mut tally = Tally::default();
        for (answers, looked_at) in [(20, 20), (128, 128), (128 + 160, 138), (10_128, 128 + 625)] {
            tally.on_tick();
            let before = tally.counts().get("answer v2 error chat");
            let awaited: Vec<Awaited> =
                (0..answers).filter_map(|_| tally.awaits("chat", ApiVersion::V2)).collect();
            assert_eq!(awaited.len(), looked_at);
            awaited.iter().for_each(|awaited| tally.answered(awaited, Trouble::Error));
            assert_eq!(tally.counts().get("answer v2 error chat") - before, answers, "all went wrong");
        }
    }

    #[test]
    fn names_do_not_grow_for_ever() {
        let mut tally = Tally::default();
        for number in 0..MAX_PAIRS + 100 {
            let route = Route::keyed(&format!("route-{number}"), &[]);
            tally.decided(&decision(Reason::Allowed, &route, "basic"));
        }
        assert!(tally.cells.len() <= MAX_PAIRS + 1);
        let all: u64 = tally.counts().iter().map(|(_, number)| number).sum();
        assert_eq!(all, MAX_PAIRS as u64 + 100);
    }

    #[test]
    fn the_first_of_sixteen_is_timed() {
        let mut tally = Tally::default();
        let sampled: Vec<usize> = (0..33).filter(|_| tally.samples()).collect();
        assert_eq!(sampled, [0, 16, 32]);
        tally.took(1_500, None);
        tally.took(900, Some(800));
        let counts = tally.counts();
        assert_eq!((counts.get("time validation 1"), counts.get("time validation sum")), (1, 2_400));
        assert_eq!((counts.get("time decode 0"), counts.get("time decode sum")), (1, 800));
    }

    #[test]
    fn a_stopwatch_takes_the_time_of_the_token_once() {
        let now = std::cell::Cell::new(10);
        let mut watch = Stopwatch::new(Some(|| now.replace(now.get() + 7)));
        for step in ["route", "credential", "token", "token", "permission"] {
            watch.step(step, || unreachable!("nobody asks for details"));
        }
        assert_eq!(watch.decode_ns, Some(7));
    }
}
