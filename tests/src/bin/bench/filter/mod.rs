//! What the filter costs a request, beside nothing at all and beside Envoy's own filters: CPU time, requests per second
//! and latency, side by side in one Envoy on one CPU.

mod bed;
mod client;
mod config;
mod cost;
mod cpu;
mod estimate;
mod flood;
pub mod server;
mod speed;
mod tokens;
mod variant;
mod zipf;

use std::time::Instant;

use keygate_e2e::durability::Dice;
use serde_json::json;

use bed::Bed;
use cpu::Cpus;
use tokens::Tokens;

const ROUNDS: usize = 12;
/// A round and variant.
const REQUESTS: usize = 20_000;
const SEED: usize = 1;

pub fn run() {
    let begun = Instant::now();
    let [rounds, requests, seed] =
        [("KEYGATE_ROUNDS", ROUNDS), ("KEYGATE_REQUESTS", REQUESTS), ("KEYGATE_SEED", SEED)]
            .map(|(name, usual)| number(name).unwrap_or(usual));
    assert!(rounds >= 2, "KEYGATE_ROUNDS: at least 2, or there is no interval");
    let mut dice = Dice::new(seed as u64);
    let cpus = Cpus::find();
    if cpus.is_one() {
        println!("There is only one CPU: Envoy shares it with client and upstream.");
    }
    println!("setting up");
    let (bed, prepared) = Bed::start(cpus, &mut dice);
    let mut tokens = Tokens::new(&bed.api(), dice.split(), prepared.owners, &prepared.signer, &prepared.eddsa);
    println!("  {:.0} s", begun.elapsed().as_secs_f64());
    cpu::pin_this_thread(cpus.rest);
    println!("CPU time");
    let costs = cost::measure(&bed, &mut tokens, &mut dice, rounds, requests);
    for (place, variant) in variant::ALL.iter().enumerate() {
        let (cost, added) = (costs.of(place), costs.added(place));
        println!("{:<18} {:8.2} ± {:5.2} {:8.2} ± {:5.2}", variant.name, cost.mean, cost.ci95, added.mean, added.ci95);
    }
    println!("{:?} {:?} {:.4} {}", tokens.sizes(), begun.elapsed(), costs.known_share, costs.requests);
    crate::write("filter", &json!({}));
    bed.assert_no_vm_died();
}

fn number(variable: &str) -> Option<usize> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is '{text}'; it must be a number")))
}
