//! CPU time that a limit adds to a request: requests with a limit against requests without one, in short turns of one
//! Envoy on a CPU of its own.

use keygate_e2e::durability::Dice;
use serde_json::{Value, json};

use super::bed::{Bed, Under};
use super::client::{Client, Shot};
use super::cost::{CONNECTIONS, shuffled};
use super::cpu::{self, Cpus};
use super::tokens::Tokens;
use super::variant::{Listener, Load};
use super::{SEED, number};
use crate::estimate::{Estimate, lower_quartile};

const ROUNDS: usize = 100;
/// Requests of a turn.
const REQUESTS: usize = 2_000;
/// Requests before a turn, which are not measured.
const WARM_UP: usize = 500;

/// The keys of a turn.
#[derive(Debug, Clone, Copy)]
enum Keys {
    /// One, with all requests.
    One,
    /// Ten thousand, of which most come rarely (Zipf).
    Many,
}

/// Requests with a limit, or without one.
struct Turn {
    listener: Listener,
    keys: Keys,
    limited: bool,
}

impl Turn {
    fn draw<'a>(&self, tokens: &'a Tokens, count: usize) -> Vec<Shot<'a>> {
        match (self.keys, self.limited) {
            (Keys::One, true) => vec![tokens.every_known().next().expect("a key"); count],
            (Keys::One, false) => vec![tokens.every_unlimited().next().expect("a key"); count],
            (Keys::Many, true) => tokens.draw(Load::Known, count),
            (Keys::Many, false) => tokens.draw(Load::Unlimited, count),
        }
    }
}

/// Measures it, and says it; for both hosts and both kinds of keys.
pub fn measure() -> Value {
    let rounds = number("KEYGATE_ROUNDS").unwrap_or(ROUNDS);
    let mut dice = Dice::new(SEED as u64);
    let cpus = Cpus::find();
    let (bed, prepared) = Bed::start(cpus, &mut dice, Under::Nothing);
    let tokens = Tokens::new(&bed.api(), dice.split(), prepared.owners, &prepared.signer, &prepared.eddsa);
    cpu::pin_this_thread(cpus.rest);
    cpu::prefer(None);
    let mut turns = Vec::new();
    for listener in [Listener::Keygate, Listener::Module] {
        for keys in [Keys::One, Keys::Many] {
            for limited in [true, false] {
                turns.push(Turn { listener, keys, limited });
            }
        }
    }
    let mut clients: Vec<Client> =
        turns.iter().map(|turn| Client::connect(bed.port(turn.listener), CONNECTIONS)).collect();
    let mut taken: Vec<Vec<f64>> = vec![Vec::new(); turns.len()];
    for _ in 0..rounds {
        for place in shuffled(turns.len(), &mut dice) {
            let (turn, client) = (&turns[place], &mut clients[place]);
            let shots = turn.draw(&tokens, REQUESTS);
            // Keys that are verified already: a turn measures what follows.
            let before = if matches!(turn.keys, Keys::Many) { shots.len() } else { WARM_UP };
            client.closed(shots.iter().copied().take(before)).expect_right("requests before a turn");
            let before = bed.taken_by_envoy();
            let answers = client.closed(shots.into_iter()).expect_right("requests");
            taken[place].push(bed.taken_by_envoy().since(&before) as f64 / 1e3 / answers.right as f64);
        }
    }
    bed.assert_no_vm_died();
    let pairs = turns.chunks(2).zip(taken.chunks(2));
    json!(pairs.map(|(turns, taken)| figures(&turns[0], &taken[0], &taken[1])).collect::<Vec<_>>())
}

fn figures(turn: &Turn, with: &[f64], without: &[f64]) -> Value {
    let host = if turn.listener == Listener::Module { "module" } else { "WebAssembly" };
    let keys = match turn.keys {
        Keys::One => "one key",
        Keys::Many => "10,000 keys (Zipf)",
    };
    let of = |taken: &[f64], rounds: &[usize]| lower_quartile(rounds.iter().map(|round| taken[*round]));
    let added = Estimate::of_rounds(with.len(), |rounds| of(with, rounds) - of(without, rounds));
    let [with, without] = [with, without].map(|taken| lower_quartile(taken.iter().copied()));
    println!(
        "  {host:<12} {keys:<19} {without:6.2} µs without a limit, {with:6.2} with one: {:5.2} ± {:.2} µs (95 %)",
        added.mean, added.ci95
    );
    json!({ "host": host, "keys": keys, "cpu_us": { "without": without, "with": with },
        "difference_us": added.mean, "ci95_us": added.ci95 })
}
