//! The figures: for people, for programs, as a picture.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::chart::{self, Bar};
use super::cost::Costs;
use super::flood::Flood;
use super::speed::{Latency, QUOTED, RATES, Saturation};
use super::variant::{ALL, Listener, named};
use crate::estimate::Estimate;

/// From this share of its CPU on Envoy is what limits.
const BUSY: f64 = 0.95;

/// All that was found.
#[derive(Debug)]
pub struct Report {
    pub costs: Costs,
    pub saturations: Vec<Option<Saturation>>,
    pub latencies: Vec<Option<[Latency; RATES.len()]>>,
    pub flood: Vec<Flood>,
    /// Shares of a CPU that Envoy and the control plane take without requests.
    pub background: (f64, f64),
    /// Requests a second of the slowest at saturation.
    pub slowest: f64,
    /// Shortest, mean and longest.
    pub token_bytes: (usize, usize, usize),
    pub one_cpu: bool,
    pub rounds: usize,
    pub requests: usize,
    pub seed: usize,
    pub took: Duration,
}

impl Report {
    /// What one costs beside another, each above bare Envoy.
    fn ratios(&self) -> [(&'static str, Estimate); 7] {
        let of = |one, other| self.costs.ratio(named(one), named(other));
        [
            ("keygate_known / jwt_authn_hs256, added CPU", of("keygate_known", "jwt_authn_hs256")),
            ("keygate_known / jwt_authn_cached, added CPU", of("keygate_known", "jwt_authn_cached")),
            ("keygate_new / jwt_authn_es256, added CPU", of("keygate_new", "jwt_authn_es256")),
            ("keygate_known / wasm_empty, added CPU", of("keygate_known", "wasm_empty")),
            ("module_known / jwt_authn_hs256, added CPU", of("module_known", "jwt_authn_hs256")),
            ("module_known / jwt_authn_cached, added CPU", of("module_known", "jwt_authn_cached")),
            ("module_new / jwt_authn_es256, added CPU", of("module_new", "jwt_authn_es256")),
        ]
    }

    /// Requests per second of a variant, of those of bare Envoy.
    fn rate_share(&self, variant: usize) -> Option<f64> {
        Some(self.saturations[variant]?.rate / self.saturations[0]?.rate)
    }

    /// What differs between two listeners that are the same.
    fn noise(&self) -> Estimate {
        self.costs.added(named("bare_again"))
    }

    /// For people.
    pub fn print(&self) {
        let rates = RATES.map(|share| format!("{share} %: {:.0}/s", self.slowest * f64::from(share) / 100.0));
        println!(
            "\nCPU time per request of Envoy and all that it asks, µs ± 95 %, lower quartile of {} rounds of up to {} requests",
            self.rounds, self.requests
        );
        println!(
            "a variant. Requests per second with Envoy on one CPU. Latency p50/p99, µs, at {}.\n",
            rates.join(", ")
        );
        println!(
            "{:<17} {:>15} {:>15} {:>7} {:>5} {:>6}  {:>38}",
            "", "CPU", "above bare", "req/s", "", "Envoy", "p50/p99"
        );
        for (place, variant) in ALL.iter().enumerate() {
            let (cost, added) = (self.costs.of(place), self.costs.added(place));
            let mut line = format!(
                "{:<17} {:>7.2} ± {:>5.2} {:>7.2} ± {:>5.2}",
                variant.name, cost.mean, cost.ci95, added.mean, added.ci95
            );
            if let (Some(of), Some(share)) = (self.saturations[place], self.rate_share(place)) {
                line +=
                    &format!(" {:>7.0} {:>4.0}% {:>5.0}%  ", of.rate, share * 100.0, of.envoy_busy * 100.0);
            }
            for at in self.latencies[place].iter().flatten() {
                line += &format!(" {:>12}", format!("{}/{}", at.p50_us, at.p99_us));
            }
            println!("{}", line.trim_end());
        }
        println!();
        for (name, ratio) in self.ratios() {
            println!("{name:<45} {:6.2} ± {:.2}", ratio.mean, ratio.ci95);
        }
        for name in ["keygate_known", "module_known"] {
            let share = self.rate_share(named(name)).unwrap_or(f64::NAN);
            println!("{:<45} {share:6.2}", format!("{name} / bare, requests per second"));
        }
        for flood in &self.flood {
            println!(
                "{:<45} {:6.2}   at {:.0}/s each, {:.0} % of the CPU; {:.1} µs CPU one of those",
                format!("{}: good keys' p99 beside {} ones / alone", flood.listener.name(), flood.kind()),
                flood.ratio(),
                flood.rate,
                flood.busy * 100.0,
                flood.cpu_us_per_forged
            );
        }
        self.print_caveats();
    }

    /// What to know of this run before its figures are believed.
    fn print_caveats(&self) {
        let noise = self.noise();
        let says = if noise.contains_zero() {
            "no difference, as it must be"
        } else {
            "A DIFFERENCE: machine or method is biased"
        };
        println!("\nbare twice: {:+.2} ± {:.2} µs, {says}", noise.mean, noise.ci95);
        println!(
            "without requests Envoy takes {:.2} % of a CPU, the control plane {:.2} %",
            self.background.0 * 100.0,
            self.background.1 * 100.0
        );
        println!("keygate_known: {:.2} % of its keys were remembered", self.costs.known_share * 100.0);
        let limited: Vec<&str> = self.limited_elsewhere().collect();
        if !limited.is_empty() {
            println!(
                "the other CPU, of client, upstream and services, limited the requests per second of: {}",
                limited.join(", ")
            );
        }
        let crowded: u64 = self.latencies.iter().flatten().flatten().map(|at| at.crowded).sum();
        if crowded > 0 {
            println!(
                "{crowded} requests waited for a connection of the client; their time counts from when they were due"
            );
        }
        let (shortest, mean, longest) = self.token_bytes;
        println!(
            "keys of {shortest} to {longest} bytes, {mean} on average; seed {}; {:.0} s",
            self.seed,
            self.took.as_secs_f64()
        );
        if self.one_cpu {
            println!("ONE CPU for all: requests per second and latencies are not Envoy's alone");
        }
    }

    /// The variants of which Envoy was not what limited.
    fn limited_elsewhere(&self) -> impl Iterator<Item = &'static str> {
        ALL.iter()
            .zip(&self.saturations)
            .filter_map(|(variant, of)| of.filter(|of| of.envoy_busy < BUSY).map(|_| variant.name))
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let (mut variants, mut further) = (Map::new(), Map::new());
        for (place, variant) in ALL.iter().enumerate() {
            let (cost, added) = (self.costs.of(place), self.costs.added(place));
            let mut figures = json!({
                "cpu_us_per_request": cost.mean,
                "ci95": cost.ci95,
                "of_which_envoy_us": self.costs.of_envoy(place),
                "added_us": added.mean,
                "added_ci95": added.ci95,
                "by_round_us": self.costs.by_round(place),
            });
            if let (Some(of), Some(latencies)) = (self.saturations[place], self.latencies[place]) {
                figures["rps"] = of.rate.into();
                figures["rps_share_of_bare"] = self.rate_share(place).into();
                figures["envoy_busy"] = of.envoy_busy.into();
                figures["p50_us"] = latencies[QUOTED].p50_us.into();
                figures["p99_us"] = latencies[QUOTED].p99_us.into();
                let by_rate = RATES.iter().zip(latencies).map(|(rate, at)| (rate.to_string(), at.json()));
                figures["latency_by_rate_percent"] = Value::from_iter(by_rate);
            }
            let aside = variant.aside || variant.listener == Listener::Module;
            let to = if aside { &mut further } else { &mut variants };
            to.insert(variant.name.to_owned(), figures);
        }
        let ratios =
            self.ratios().map(|(name, of)| (name.to_owned(), json!({ "ratio": of.mean, "ci95": of.ci95 })));
        let noise = self.noise();
        json!({
            "variants": variants,
            "further_variants": further,
            "ratios": Value::from_iter(ratios),
            "rps_share_of_bare": self.rate_share(named("keygate_known")),
            "forged": self.flood.iter().map(|flood| json!({
                "filter": flood.listener.name(),
                "kind": flood.kind(),
                "share_of_saturation": flood.share,
                "good_per_second": flood.rate,
                "p99_us": { "alone": flood.p99_us.0, "beside": flood.p99_us.1 },
                "p99_ratio": flood.ratio(),
                "cpu_us_per_forged": flood.cpu_us_per_forged,
                "busy": flood.busy,
            })).collect::<Vec<_>>(),
            "a_a": { "difference_us": noise.mean, "ci95": noise.ci95, "contains_zero": noise.contains_zero() },
            "background_cpu_share": { "envoy": self.background.0, "control_plane": self.background.1 },
            "known_share": self.costs.known_share,
            "limited_by_the_other_cpu": self.limited_elsewhere().collect::<Vec<_>>(),
            "slowest_rps": self.slowest,
            "rates_percent_of_slowest": RATES,
            "quoted_rate_percent": RATES[QUOTED],
            "token_bytes": { "shortest": self.token_bytes.0, "mean": self.token_bytes.1, "longest": self.token_bytes.2 },
            "one_cpu": self.one_cpu,
            "rounds": self.rounds,
            "requests_a_round": self.requests,
            "requests_measured": self.costs.requests,
            "seed": self.seed,
            "seconds": self.took.as_secs_f64(),
        })
    }

    /// As a picture.
    pub fn chart(&self) -> String {
        let bars: Vec<Bar> = ALL
            .iter()
            .enumerate()
            .skip(1)
            .map(|(place, variant)| Bar {
                name: variant.name,
                value: self.costs.added(place),
                ours: variant.listener.is_keygate(),
            })
            .collect();
        chart::svg("CPU time added to a request, µs (95 %)", &bars)
    }
}
