//! The main figure: CPU time that a request takes, in rounds in which the variants take turns.

use std::collections::HashSet;

use keygate_e2e::durability::Dice;

use super::bed::Bed;
use super::client::{Client, Shot};
use super::tokens::Tokens;
use super::variant::{ALL, Load, Variant};
use crate::estimate::{Estimate, lower_quartile};

/// As many requests at a time.
pub const CONNECTIONS: usize = 16;
/// Before each turn, so that what the other variants pushed out of the CPU's caches is there again.
const WARM_UP: usize = 500;

/// What a request takes, of each variant.
#[derive(Debug)]
pub struct Costs {
    /// Microseconds a request, by variant and round.
    taken: Vec<Vec<f64>>,
    /// Of these, of Envoy alone.
    of_envoy: Vec<Vec<f64>>,
    /// Of how many requests of `keygate_known` the key was known.
    pub known_share: f64,
    pub requests: u64,
}

impl Costs {
    /// Microseconds of CPU time a request, of all that takes part in it.
    pub fn of(&self, variant: usize) -> Estimate {
        self.estimate(|rounds| self.taken_in(variant, rounds))
    }

    /// The same of each round, in their order.
    pub fn by_round(&self, variant: usize) -> &[f64] {
        &self.taken[variant]
    }

    /// The same of Envoy alone.
    pub fn of_envoy(&self, variant: usize) -> f64 {
        lower_quartile(self.of_envoy[variant].iter().copied())
    }

    /// How much more that is than of the first variant.
    pub fn added(&self, variant: usize) -> Estimate {
        self.estimate(|rounds| self.added_in(variant, rounds))
    }

    /// How many times what another one adds.
    pub fn ratio(&self, variant: usize, other: usize) -> Estimate {
        self.estimate(|rounds| self.added_in(variant, rounds) / self.added_in(other, rounds))
    }

    fn estimate(&self, figure: impl Fn(&[usize]) -> f64) -> Estimate {
        Estimate::of_rounds(self.taken[0].len(), figure)
    }

    fn taken_in(&self, variant: usize, rounds: &[usize]) -> f64 {
        lower_quartile(rounds.iter().map(|round| self.taken[variant][*round]))
    }

    fn added_in(&self, variant: usize, rounds: &[usize]) -> f64 {
        self.taken_in(variant, rounds) - self.taken_in(0, rounds)
    }
}

/// Measures it.
pub fn measure(bed: &Bed, tokens: &mut Tokens, dice: &mut Dice, rounds: usize, requests: usize) -> Costs {
    let new = |variant: &Variant| match variant.load {
        Load::New(of_hundred) => rounds * (turn(variant, requests) + WARM_UP) * (of_hundred + 2) / 100,
        _ => 0,
    };
    tokens.have_new(&bed.api(), ALL.iter().map(new).sum());
    let mut clients: Vec<Client> =
        ALL.iter().map(|variant| Client::connect(bed.port(variant.listener), CONNECTIONS)).collect();
    for (client, variant) in clients.iter_mut().zip(&ALL) {
        if variant.load == Load::Known {
            client.closed(tokens.every_known()).expect_right(variant.name);
        }
    }
    let none = vec![Vec::new(); ALL.len()];
    let mut costs = Costs { taken: none.clone(), of_envoy: none, known_share: 0.0, requests: 0 };
    let (mut hits, mut looks) = (0, 0);
    for round in 1..=rounds {
        for place in shuffled(ALL.len(), dice) {
            let (variant, client) = (&ALL[place], &mut clients[place]);
            let shots = tokens.draw(variant.load, turn(variant, requests));
            warm_up(client, variant, tokens, &shots);
            let before = bed.looks();
            let (all, envoy) = (bed.taken(variant.listener), bed.taken_by_envoy());
            let answers = client.closed(shots.into_iter()).expect_right(variant.name);
            let (envoy, all) = (bed.taken_by_envoy().since(&envoy), bed.taken(variant.listener).since(&all));
            costs.taken[place].push(all as f64 / 1e3 / answers.right as f64);
            costs.of_envoy[place].push(envoy as f64 / 1e3 / answers.right as f64);
            costs.requests += answers.right;
            if variant.name == "keygate_known" {
                let after = bed.looks();
                hits += after.0 - before.0;
                looks += after.0 + after.1 - before.0 - before.1;
            }
        }
        println!("  round {round} of {rounds}: {} µs bare", costs.taken[0][round - 1].round());
    }
    costs.known_share = hits as f64 / looks as f64;
    costs
}

/// How many requests a turn has.
fn turn(variant: &Variant, requests: usize) -> usize {
    requests * variant.share / 100
}

/// Has those keys known that are to be, whatever others pushed out of the filter's memory.
fn warm_up(client: &mut Client, variant: &Variant, tokens: &Tokens, next: &[Shot<'_>]) {
    if variant.listener.is_keygate() {
        let of = |shot: &Shot<'_>| shot.request.as_ptr();
        let wanted: HashSet<*const u8> = next.iter().map(of).collect();
        let known = tokens.every_known().filter(|shot| wanted.contains(&of(shot)));
        client.closed(known).check(variant.name);
    }
    if matches!(variant.load, Load::Lean | Load::Unlimited) {
        client.closed(next.iter().copied()).check(variant.name);
    }
    let shots = tokens.draw(variant.load, WARM_UP);
    client.closed(shots.into_iter()).expect_right(variant.name);
}

/// So many places in a random order (Fisher and Yates).
pub fn shuffled(count: usize, dice: &mut Dice) -> Vec<usize> {
    let mut places: Vec<usize> = (0..count).collect();
    for last in (1..places.len()).rev() {
        places.swap(last, dice.below(last + 1));
    }
    places
}
