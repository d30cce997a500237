//! What good requests notice of forged ones at the same rate, by how busy Envoy is.

use std::time::Duration;

use super::bed::Bed;
use super::client::{Client, Shot};
use super::speed::{self, Latency, STEADY_CONNECTIONS};
use super::tokens::Tokens;
use super::variant::{ALL, Load, named};
use crate::estimate::median;

/// Good requests, of what Keygate can do at saturation.
pub const SHARES: [f64; 3] = [0.1, 0.2, 0.3];
/// Each time first alone, then beside forged ones.
const REPETITIONS: usize = 5;
const EACH_FOR: Duration = Duration::from_secs(2);

/// What they notice at one rate.
#[derive(Debug)]
pub struct Flood {
    /// Of what Keygate can do at saturation.
    pub share: f64,
    /// Good requests a second, and as many forged ones.
    pub rate: f64,
    /// 99 of 100 good requests took no longer, µs: alone, and beside forged ones.
    pub p99_us: Vec<(u64, u64)>,
    /// CPU time of a forged token, µs.
    pub cpu_us_per_forged: f64,
    /// How much of a CPU Envoy and the control plane took for both together.
    pub busy: f64,
}

impl Flood {
    /// Beside forged ones, how many times as long.
    pub fn ratio(&self) -> f64 {
        median(&self.p99_us.iter().map(|(alone, beside)| *beside as f64 / *alone as f64).collect::<Vec<_>>())
    }
}

/// Measures it, where Keygate can do so many a second.
pub fn measure(bed: &Bed, tokens: &mut Tokens, most: f64) -> Vec<Flood> {
    let known = &ALL[named("keygate_known")];
    let mut client = Client::connect(bed.port(known.listener), STEADY_CONNECTIONS);
    speed::warm(bed, tokens, known, &mut client);
    SHARES.into_iter().map(|share| at(bed, tokens, &mut client, share, most * share)).collect()
}

fn at(bed: &Bed, tokens: &Tokens, client: &mut Client, share: f64, rate: f64) -> Flood {
    let listener = ALL[named("keygate_known")].listener;
    let count = (rate * EACH_FOR.as_secs_f64()) as usize;
    let (mut p99_us, mut costs, mut busy) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        let good = tokens.draw(Load::Known, count);
        let forged = tokens.draw(Load::Forged, count);
        let unseen = |shot| Shot { timed: false, ..shot };
        let both = good.iter().zip(forged).flat_map(|(good, forged)| [*good, unseen(forged)]).collect();
        let mut run = |rate, shots: Vec<Shot<'_>>| {
            let before = bed.taken(listener);
            let answers = client.open(rate, shots.into_iter()).expect_right("good and forged keys");
            (Latency::of(&answers).p99_us, bed.taken(listener).since(&before) as f64 / 1e3, answers.took)
        };
        let (alone, cpu_alone, _) = run(rate, good.clone());
        let (beside, cpu_beside, took) = run(rate * 2.0, both);
        p99_us.push((alone, beside));
        costs.push((cpu_beside - cpu_alone) / count as f64);
        busy.push(cpu_beside / 1e6 / took.as_secs_f64());
    }
    let flood = Flood { share, rate, p99_us, cpu_us_per_forged: median(&costs), busy: median(&busy) };
    println!(
        "  {:.0} good keys a second: p99 {:.2} times as long beside as many forged ones",
        rate,
        flood.ratio()
    );
    flood
}
