//! Nothing that was answered is lost, whenever the control plane is killed; `scripts/bench durability` does the same
//! for longer.

use std::hash::{BuildHasher, RandomState};

use keygate_e2e::durability::{Dice, Drill, KillControlPlane, LoseRedis, killed_at_birth};
use keygate_e2e::{Redis, Stack};

const CLIENTS: usize = 6;
const ROUNDS: u64 = 25;
const REDIS_ROUNDS: u64 = 8;
const FIRST_STARTS: u64 = 5;

/// Another one each time, printed with what it led to.
fn seed() -> u64 {
    let seed = std::env::var("KEYGATE_SEED").ok().map(|text| text.parse().expect("KEYGATE_SEED is a number"));
    let seed = seed.unwrap_or_else(|| RandomState::new().hash_one(0));
    println!("KEYGATE_SEED={seed}");
    seed
}

#[test]
fn nothing_answered_is_lost_when_the_control_plane_is_killed_at_any_moment() {
    let mut drill = Drill::new(Stack::builder().workers(2).start(), CLIENTS, seed());
    let mut kill = KillControlPlane::new();
    for _ in 0..ROUNDS {
        drill.round(&mut kill);
    }
    let report = drill.finish();
    println!("{report}");
    report.assert_nothing_lost();
    let total = report.total();
    assert!(total.answered > 10 * ROUNDS, "there was load");
    assert!(total.unanswered > 0, "it was killed under load");
}

#[test]
fn nothing_answered_is_lost_when_redis_is_emptied_or_killed() {
    let seed = seed();
    let mut redis = Redis::new().with_config(&[("appendonly", "yes"), ("appendfsync", "everysec")]);
    redis.run();
    let stack = Stack::builder().workers(2).redis(&redis.url()).start();
    let mut drill = Drill::new(stack, CLIENTS, seed);
    let mut lose = LoseRedis::new(redis, Dice::new(seed));
    for _ in 0..REDIS_ROUNDS {
        drill.round(&mut lose);
    }
    let report = drill.finish();
    println!("{report}");
    report.assert_nothing_lost();
    assert!(report.total().answered > 10 * REDIS_ROUNDS, "there was load");
}

#[test]
fn a_first_start_that_was_cut_short_is_begun_again() {
    let cut_short = killed_at_birth(FIRST_STARTS, &mut Dice::new(seed()));
    println!("{cut_short} first starts cut short");
}
