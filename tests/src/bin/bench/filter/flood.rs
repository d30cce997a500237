//! What good requests notice of others at the same rate, by how busy Envoy is.

use std::time::Duration;

use super::bed::Bed;
use super::client::{Answers, Client, Shot};
use super::speed::{self, Latency, STEADY_CONNECTIONS};
use super::tokens::Tokens;
use super::variant::{ALL, Listener, Load, named};
use crate::estimate::median;

/// What comes beside good requests, and how many of either there are, of what Keygate can do at saturation. As many good
/// ones once more show what of it is just that there are twice as many.
const FLOODS: [(Load, f64); 6] = [
    (Load::Known, 0.05),
    (Load::Forged, 0.05),
    (Load::Altered, 0.05),
    (Load::Known, 0.1),
    (Load::Forged, 0.1),
    (Load::Altered, 0.1),
];
/// Each time first alone, then beside those.
const REPETITIONS: usize = 8;
const EACH_FOR: Duration = Duration::from_secs(2);

/// What they notice at one rate.
#[derive(Debug)]
pub struct Flood {
    /// Of which filter.
    pub listener: Listener,
    /// What the others are.
    pub load: Load,
    /// Of what Keygate can do at saturation.
    pub share: f64,
    /// Good requests a second, and as many others.
    pub rate: f64,
    /// 99 of 100 good requests took no longer, µs, in all repetitions: alone, and beside the others.
    pub p99_us: (u64, u64),
    /// CPU time of one of the others, µs.
    pub cpu_us_per_forged: f64,
    /// How much of a CPU Envoy and the control plane took for both together.
    pub busy: f64,
}

impl Flood {
    /// What the others are.
    pub fn kind(&self) -> &'static str {
        match self.load {
            Load::Altered => "altered",
            Load::Forged => "forged",
            _ => "more good",
        }
    }

    /// Beside the others, how many times as long.
    pub fn ratio(&self) -> f64 {
        self.p99_us.1 as f64 / self.p99_us.0 as f64
    }
}

/// Measures it, where Keygate in WebAssembly can do so many a second.
pub fn measure(bed: &Bed, tokens: &mut Tokens, most: f64) -> Vec<Flood> {
    let mut all = Vec::new();
    for known in ["keygate_known", "module_known"].map(|name| &ALL[named(name)]) {
        let listener = known.listener;
        let mut client = Client::connect(bed.port(listener), STEADY_CONNECTIONS);
        speed::warm(bed, tokens, known, &mut client);
        all.extend(
            FLOODS.map(|(load, share)| at(bed, tokens, &mut client, (listener, load, share), most * share)),
        );
    }
    all
}

fn at(
    bed: &Bed,
    tokens: &Tokens,
    client: &mut Client,
    (listener, load, share): (Listener, Load, f64),
    rate: f64,
) -> Flood {
    let count = (rate * EACH_FOR.as_secs_f64()) as usize;
    let (mut alone, mut beside) = (Answers::new(), Answers::new());
    let (mut costs, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        let good = tokens.draw(Load::Known, count);
        let others = tokens.draw(load, count);
        let unseen = |shot| Shot { timed: false, ..shot };
        let both: Vec<_> = good.iter().zip(others).flat_map(|(good, other)| [*good, unseen(other)]).collect();
        let mut run = |rate, shots: Vec<Shot<'_>>, all: &mut Answers| {
            let before = bed.taken(listener);
            let answers = client.open(rate, shots.into_iter()).expect_right("good and forged keys");
            all.times.add(&answers.times).expect("times of one kind");
            (bed.taken(listener).since(&before) as f64 / 1e3, answers.took)
        };
        let (cpu_alone, _) = run(rate, good, &mut alone);
        let (cpu_beside, took) = run(rate * 2.0, both, &mut beside);
        costs.push((cpu_beside - cpu_alone) / count as f64);
        busy.push(cpu_beside / 1e6 / took.as_secs_f64());
    }
    let p99_us = (Latency::of(&alone).p99_us, Latency::of(&beside).p99_us);
    let flood =
        Flood { listener, load, share, rate, p99_us, cpu_us_per_forged: median(&costs), busy: median(&busy) };
    println!(
        "  {}: {:.0} good keys a second: p99 {:.2} times as long beside as many {} ones",
        listener.name(),
        rate,
        flood.ratio(),
        flood.kind()
    );
    flood
}
