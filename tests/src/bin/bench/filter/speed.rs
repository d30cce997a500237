//! How many requests a second there are when Envoy is kept busy, and how long a request takes when it is not.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bed::Bed;
use super::client::{Answers, Client};
use super::tokens::Tokens;
use super::variant::{ALL, Listener, Load, Variant};

/// Enough to keep Envoy busy.
const BUSY_CONNECTIONS: usize = 64;
/// How long and how often: the variants take turns, so that what changes on the machine meanwhile hurts all.
const BUSY_FOR: Duration = Duration::from_secs(1);
const PASSES: usize = 3;
/// So that a request that is late delays no other: at ten thousand a second they last for 25 ms without an answer.
pub const STEADY_CONNECTIONS: usize = 256;
const STEADY_FOR: Duration = Duration::from_secs(2);
/// Shares of the slowest variant's saturation, in hundredths.
pub const RATES: [u32; 3] = [30, 50, 70];
/// The one of which p50 and p99 are quoted.
pub const QUOTED: usize = 1;

/// One variant at saturation.
#[derive(Debug, Clone, Copy)]
pub struct Saturation {
    /// Requests a second.
    pub rate: f64,
    /// How much of Envoy's CPU it took. Below 1 something else was what limits.
    pub envoy_busy: f64,
}

/// One variant at one rate.
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    pub p50_us: u64,
    pub p99_us: u64,
    /// How many requests waited for a connection.
    pub crowded: u64,
}

impl Latency {
    pub fn of(answers: &Answers) -> Self {
        let at = |quantile| answers.times.value_at_quantile(quantile);
        Self { p50_us: at(0.5), p99_us: at(0.99), crowded: answers.crowded }
    }

    pub fn json(self) -> Value {
        json!({ "p50_us": self.p50_us, "p99_us": self.p99_us, "waited_for_a_connection": self.crowded })
    }
}

/// Measures requests per second of each variant but those aside.
pub fn saturation(bed: &Bed, tokens: &mut Tokens) -> Vec<Option<Saturation>> {
    let mut seen = [Busy::default(); ALL.len()];
    for _ in 0..PASSES {
        for (variant, seen) in ALL.iter().zip(&mut seen) {
            if !variant.aside {
                seen.add(bed, tokens, variant);
            }
        }
    }
    ALL.iter()
        .zip(seen)
        .map(|(variant, seen)| {
            let found = (!variant.aside).then(|| seen.saturation())?;
            println!("  {:<18} {:6.0} a second", variant.name, found.rate);
            Some(found)
        })
        .collect()
}

/// What was seen of one variant at saturation.
#[derive(Debug, Clone, Copy, Default)]
struct Busy {
    answers: u64,
    seconds: f64,
    envoy_seconds: f64,
}

impl Busy {
    fn add(&mut self, bed: &Bed, tokens: &mut Tokens, variant: &Variant) {
        let mut client = Client::connect(bed.port(variant.listener), BUSY_CONNECTIONS);
        let most = supply(bed, tokens, variant, &mut client);
        let shots = tokens.draw(variant.load, most);
        let (taken, begun) = (bed.taken_by_envoy(), Instant::now());
        let shots = shots.into_iter().take_while(|_| begun.elapsed() < BUSY_FOR);
        let answers = client.closed(shots).expect_right(variant.name);
        self.envoy_seconds += bed.taken_by_envoy().since(&taken) as f64 / 1e9;
        self.answers += answers.right;
        self.seconds += answers.took.as_secs_f64();
    }

    fn saturation(self) -> Saturation {
        Saturation { rate: self.answers as f64 / self.seconds, envoy_busy: self.envoy_seconds / self.seconds }
    }
}

/// Has more requests than a variant can answer, and says how many. Warms up, too.
fn supply(bed: &Bed, tokens: &mut Tokens, variant: &Variant, client: &mut Client) -> usize {
    const TRIED: usize = 1_000;
    warm(bed, tokens, variant, client);
    if matches!(variant.load, Load::New(_)) {
        tokens.have_new(&bed.api(), TRIED);
    }
    let shots = tokens.draw(variant.load, TRIED);
    let answers = client.closed(shots.into_iter()).expect_right(variant.name);
    let most = (answers.rate() * BUSY_FOR.as_secs_f64() * 1.5) as usize;
    if matches!(variant.load, Load::New(_)) {
        tokens.have_new(&bed.api(), most);
    }
    most
}

/// Measures latencies at steady rates, shares of `slowest` a second.
pub fn latencies(bed: &Bed, tokens: &mut Tokens, slowest: f64) -> Vec<Option<[Latency; RATES.len()]>> {
    ALL.iter()
        .map(|variant| {
            if variant.aside {
                return None;
            }
            let mut client = Client::connect(bed.port(variant.listener), STEADY_CONNECTIONS);
            warm(bed, tokens, variant, &mut client);
            let found = RATES.map(|share| {
                let rate = slowest * f64::from(share) / 100.0;
                let count = (rate * STEADY_FOR.as_secs_f64()) as usize;
                if matches!(variant.load, Load::New(_)) {
                    tokens.have_new(&bed.api(), count);
                }
                let shots = tokens.draw(variant.load, count);
                Latency::of(&client.open(rate, shots.into_iter()).expect_right(variant.name))
            });
            let quoted = found[QUOTED];
            println!("  {:<18} p50 {:5} µs, p99 {:6} µs", variant.name, quoted.p50_us, quoted.p99_us);
            Some(found)
        })
        .collect()
}

/// Has known keys known, and each connection used once.
pub fn warm(bed: &Bed, tokens: &mut Tokens, variant: &Variant, client: &mut Client) {
    let keygate = variant.listener.is_keygate();
    if variant.load == Load::Known && (keygate || variant.listener == Listener::JwtCached) {
        client.closed(tokens.every_known()).expect_right(variant.name);
    }
    if matches!(variant.load, Load::New(_)) {
        tokens.have_new(&bed.api(), STEADY_CONNECTIONS);
    }
    let shots = tokens.draw(variant.load, STEADY_CONNECTIONS);
    client.closed(shots.into_iter()).expect_right(variant.name);
}
