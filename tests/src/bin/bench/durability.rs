//! Whether anything that was answered is lost when the control plane is killed, hundreds of times at random moments,
//! and when its Redis is emptied or killed.

use std::hash::{BuildHasher, RandomState};
use std::io::{IsTerminal as _, Write as _};

use keygate_e2e::durability::{Dice, Drill, KillControlPlane, LoseRedis, killed_at_birth};
use keygate_e2e::{Redis, Stack};

const ROUNDS: u64 = 500;
const REDIS_ROUNDS: u64 = 20;
const CLIENTS: usize = 6;
/// Control planes whose first start is cut short: one for so many rounds.
const ROUNDS_FOR_A_BIRTH: u64 = 10;
/// Where nobody watches, a line for so many rounds.
const ROUNDS_FOR_A_LINE: u64 = 50;

pub fn run() {
    let number = |variable: &str| {
        let text = std::env::var(variable).ok()?;
        Some(text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, which is no number")))
    };
    let rounds = number("KEYGATE_ROUNDS").unwrap_or(ROUNDS);
    let seed = number("KEYGATE_SEED").unwrap_or_else(|| RandomState::new().hash_one(0));
    eprintln!("KEYGATE_SEED={seed}");

    let births = killed_at_birth(rounds / ROUNDS_FOR_A_BIRTH, &mut Dice::new(seed));
    eprintln!("killed {births} times during a first start");
    let mut drill = Drill::new(Stack::builder().workers(2).start(), CLIENTS, seed);
    let mut kill = KillControlPlane::new();
    for round in 1..=rounds {
        drill.round(&mut kill);
        let report = drill.report();
        let progress = || {
            let (at, lost) = (report.ready.at(50).as_secs_f64() * 1_000.0, report.lost.len());
            format!("killed: {round} of {rounds}; lost: {lost}; ready again in {at:.0} ms at the median")
        };
        if std::io::stderr().is_terminal() {
            eprint!("\r{}", progress());
            let _shown = std::io::stderr().flush();
        } else if round % ROUNDS_FOR_A_LINE == 0 {
            eprintln!("{}", progress());
        }
    }
    eprintln!();
    let mut report = drill.finish();
    report.births = births;
    println!("\n{report}");
    crate::write("durability", &report.figures());
    report.assert_nothing_lost();
    lose_redis(number("KEYGATE_REDIS_ROUNDS").unwrap_or(REDIS_ROUNDS), seed);
}

/// The same with a Redis that is emptied or killed.
fn lose_redis(rounds: u64, seed: u64) {
    let mut redis = Redis::new().with_config(&[("appendonly", "yes"), ("appendfsync", "everysec")]);
    redis.run();
    let stack = Stack::builder().workers(2).redis(&redis.url()).start();
    let mut drill = Drill::new(stack, CLIENTS, seed);
    let mut lose = LoseRedis::new(redis, Dice::new(seed));
    for _ in 0..rounds {
        drill.round(&mut lose);
    }
    let report = drill.finish();
    println!("\n{report}");
    crate::write("durability-redis", &report.figures());
    report.assert_nothing_lost();
}
