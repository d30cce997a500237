//! Tokens that nobody issued, in numbers: good keys do not notice, and nothing is kept of them.

use std::time::Duration;

use keygate_e2e::forge::Parts;
use keygate_e2e::load::Answers;
use keygate_e2e::{Key, Load, Request, SOON, Stack, tier, wait_until};

fn chat(token: &str) -> Request {
    Request::get("/api/chat").bearer(token)
}

/// Good traffic, `per_second`: each key meets each worker if their numbers have no common divisor.
fn good(stack: &Stack, keys: &[Key], per_second: u32) -> Load {
    let connections = (0..stack.envoy.workers()).map(|_| stack.envoy.connect()).collect();
    let requests: Vec<Request> = keys.iter().map(|key| chat(&key.token)).collect();
    let mut turn = 0;
    Load::start(connections, per_second, move || {
        turn += 1;
        requests[turn % requests.len()].clone()
    })
}

/// Tokens as well-formed as `model`, each another one, that its key never signed: every second one with ids that are made
/// up, the others with its own, as somebody can who has a key.
fn forged(stack: &Stack, model: &Key, series: &str, per_second: u32) -> Load {
    let connections = (0..stack.envoy.workers()).map(|_| stack.envoy.connect()).collect();
    let parts = Parts::of(&model.token);
    let series = series.to_owned();
    let mut number = 0_u64;
    Load::start(connections, per_second, move || {
        number += 1;
        let mut forged = parts.clone();
        if number.is_multiple_of(2) {
            forged = forged.with_claim("sub", format!("key_{series}_{number}"));
            forged = forged.with_claim("jti", format!("{series}-{number}"));
        }
        // The numbers within still make a signature, but not this token's.
        for (byte, salt) in forged.signature.iter_mut().skip(8).step_by(9).zip(number.to_le_bytes()) {
            *byte ^= salt;
        }
        chat(&forged.token())
    })
}

#[test]
fn forged_tokens_at_the_rate_of_good_traffic() {
    const A_ROUND: u64 = 600;
    const PER_SECOND: u32 = 400;

    let stack = Stack::start();
    let api = stack.api();
    let keys: Vec<Key> = (0..7).map(|_| api.issue("node_operator")).collect();
    good(&stack, &keys, 10 * PER_SECOND).wait_answered(A_ROUND); // Every key is known to every worker.

    let (mut quiet, mut flooded, mut bad) = (Answers::default(), Answers::default(), Answers::default());
    for round in 0..tier::repeats(4, 10) {
        // In turn, so that whatever else this machine does meets both.
        let load = good(&stack, &keys, PER_SECOND);
        load.wait_answered(A_ROUND);
        quiet = quiet.and(load.stop());

        let flood = forged(&stack, &keys[0], &format!("round{round}"), PER_SECOND);
        flood.wait_answered(1);
        let load = good(&stack, &keys, PER_SECOND);
        load.wait_answered(A_ROUND);
        flooded = flooded.and(load.stop());
        bad = bad.and(flood.stop());
    }
    let ratio = flooded.times.at(99).as_secs_f64() / quiet.times.at(99).as_secs_f64();
    println!("good alone: {}", quiet.times);
    println!("good beside as many forged: {}", flooded.times);
    println!("forged: {}", bad.times);
    println!("good p99 beside forged, times that alone: {ratio:.2}");
    quiet.expect_all(200);
    let flooded = flooded.expect_all(200);
    bad.expect_all(401);
    assert!(ratio < 5.0 || flooded.times.at(99) < Duration::from_millis(20), "{ratio:.2}");
    stack.envoy.assert_no_vm_died();
}

#[test]
fn a_flood_of_unknown_tokens_is_not_kept() {
    const HALF: u64 = 40_000;
    const MOST_GROWTH: u64 = 16 << 20;

    let stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let keys: Vec<Key> = (0..7).map(|_| api.issue("node_operator")).collect();
    let looks = || {
        (
            stack.envoy.stat("keygate_token_cache_hits_total"),
            stack.envoy.stat("keygate_token_cache_misses_total"),
        )
    };
    let (hits_before, misses_before) = looks();
    let load = good(&stack, &keys, 400);
    load.wait_answered(100);

    let begun = stack.envoy.resident_bytes();
    let mut flooded = Answers::default();
    let resident = ["first", "second"].map(|half| {
        // As many as the answers let through.
        let flood = forged(&stack, &keys[0], half, u32::MAX);
        flood.wait_answered(HALF);
        flooded = std::mem::take(&mut flooded).and(flood.stop());
        stack.envoy.resident_bytes()
    });
    let good = load.stop();
    let (good_count, bad_count) = (good.times.count() as u64, flooded.times.count() as u64);
    // Counted at the next tick of each worker.
    wait_until(SOON, "the looks to be counted", || {
        let (hits, misses) = looks();
        hits + misses - hits_before - misses_before >= good_count + bad_count
    });
    let (hits, misses) = looks();
    let (hits, misses) = (hits - hits_before, misses - misses_before);
    let rate = hits as f64 / good_count as f64;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("good: {}", good.times);
    println!("unknown: {}", flooded.times);
    println!("token cache: {hits} hits, {misses} misses; {:.3} % of {good_count} good ones", rate * 100.0);
    println!(
        "Envoy's memory: {:.2} MiB, after {HALF} unknown tokens {:.2} MiB, after as many again {:.2} MiB",
        mib(begun),
        mib(resident[0]),
        mib(resident[1])
    );
    good.expect_all(200);
    flooded.expect_all(401);
    // Each key is verified once on each worker, and no forged one drives it out.
    let first_uses = (keys.len() * stack.envoy.workers()) as u64;
    assert!(hits + first_uses >= good_count, "{hits} hits of {good_count}");
    assert!(misses >= bad_count, "{misses} misses of {bad_count}");
    assert!(resident[1].saturating_sub(resident[0]) < MOST_GROWTH, "{resident:?}");
    stack.envoy.assert_no_vm_died();
}
