//! What the filter costs a request, beside nothing at all and beside Envoy's own filters: CPU time, requests per second
//! and latency, side by side in one Envoy on one CPU.

pub mod awake;
mod bed;
mod chart;
mod client;
mod config;
mod cost;
mod cpu;
mod flood;
pub mod limits;
pub mod profile;
mod report;
pub mod server;
mod speed;
mod tokens;
mod variant;
mod zipf;

use std::time::Instant;

use keygate_e2e::durability::Dice;

use awake::Awake;
use bed::{Bed, Under};
use cpu::Cpus;
use report::Report;
use tokens::Tokens;

/// Many short rounds: what changes on the machine meanwhile is then the same for all variants.
const ROUNDS: usize = 40;
/// A round and variant.
const REQUESTS: usize = 2_000;
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
    let (bed, prepared) = Bed::start(cpus, &mut dice, Under::Nothing);
    let mut tokens =
        Tokens::new(&bed.api(), dice.split(), prepared.owners, &prepared.signer, &prepared.eddsa);
    println!("  {:.0} s", begun.elapsed().as_secs_f64());
    cpu::pin_this_thread(cpus.rest);
    cpu::prefer(None);
    let background = bed.background();

    println!(
        "CPU time: {rounds} rounds of up to {requests} requests of each of {} variants",
        variant::ALL.len()
    );
    let costs = cost::measure(&bed, &mut tokens, &mut dice, rounds, requests);
    println!("requests per second");
    let saturations = speed::saturation(&bed, &mut tokens);
    let slowest = saturations.iter().flatten().map(|of| of.rate).fold(f64::INFINITY, f64::min);
    let awake = Awake::start(cpus, bed.directory());
    println!("latency at {} % of {slowest:.0} requests a second", speed::RATES[speed::QUOTED]);
    let latencies = speed::latencies(&bed, &mut tokens, slowest);
    println!("forged keys beside good ones, for Keygate in WebAssembly and as a module");
    let known = saturations[variant::named("keygate_known")].expect("it was measured").rate;
    let flood = flood::measure(&bed, &mut tokens, known);
    drop(awake);

    bed.assert_no_vm_died();
    let report = Report {
        costs,
        saturations,
        latencies,
        flood,
        background,
        slowest,
        token_bytes: tokens.sizes(),
        one_cpu: cpus.is_one(),
        rounds,
        requests,
        seed,
        took: begun.elapsed(),
    };
    report.print();
    crate::write("filter", &report.json());
    crate::write_text("filter.svg", &report.chart());
}

fn number(variable: &str) -> Option<usize> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is '{text}'; it must be a number")))
}
