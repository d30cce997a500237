//! Limits in both hosts of the filter: what a limit costs a request of a known key, bursts of new keys at first contact, and
//! how much of a limit is admitted under steady overload.

use std::time::Duration;

use keygate_e2e::burst::burst;
use keygate_e2e::overload::admitted;
use keygate_e2e::{Api, Connection, Key, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

use crate::estimate::Estimate;

const ROUNDS: usize = 20;
const REQUESTS: u64 = 20_000;
const CONNECTIONS: usize = 32;
const LIMITS: &str = "/api/admin/rate_limits";

pub fn run() {
    let rounds = std::env::var("KEYGATE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let hosts: Vec<Value> = ["WebAssembly", "module"]
        .into_iter()
        .map(|host| {
            println!("{host}");
            let figures = json!({
                "cost": cost(&stack(host), rounds),
                "bursts": bursts(&stack(host)),
                "overload": overload(&stack(host)),
            });
            json!({ "host": host, "figures": figures })
        })
        .collect();
    crate::write("quota", &json!({ "rounds": rounds, "requests_a_round": REQUESTS, "hosts": hosts }));
}

fn stack(host: &str) -> Stack {
    let builder = Stack::builder().limits();
    if host == "module" { builder.module().start() } else { builder.start() }
}

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

fn put(api: &Api, limits: &Value) {
    api.send(Request::new("PUT", format!("{LIMITS}?wait=applied&timeout=10s")).json(limits)).expect(200);
}

/// CPU time of Envoy per request of a known key with a limit, against one without, in the same process and in rounds that
/// take turns.
fn cost(stack: &Stack, rounds: usize) -> Value {
    let api = stack.api();
    put(&api, &json!({ "roles": { "basic": { "requests": 1_000_000_000, "window": "1h" } } }));
    let (limited, free) = (api.issue("basic"), api.issue("admin"));
    let mut connections: Vec<Connection> = (0..CONNECTIONS).map(|_| stack.envoy.connect()).collect();
    // Every worker knows both keys, and the cap is granted.
    for key in [&limited, &free] {
        send(&mut connections, key, REQUESTS);
    }
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // Either goes first as often as the other.
        let mut turns = [(&limited, &mut with), (&free, &mut without)];
        if round % 2 == 1 {
            turns.reverse();
        }
        for (key, times) in turns {
            let before = stack.envoy.cpu_seconds();
            send(&mut connections, key, REQUESTS);
            times.push((stack.envoy.cpu_seconds() - before) * 1e6 / REQUESTS as f64);
        }
    }
    let Estimate { mean, ci95 } = Estimate::of_differences(&with, &without);
    let (with, without) = (Estimate::of(&with).mean, Estimate::of(&without).mean);
    println!(
        "  CPU time a request, known key         {without:6.2} µs without a limit, {with:6.2} µs with one"
    );
    println!("  a limit costs                         {mean:6.2} ± {ci95:.2} µs (95 %)");
    json!({ "cpu_us": { "without": without, "with": with }, "difference_us": mean, "ci95_us": ci95 })
}

/// Bursts of new keys at one proxy alone, and at one of three.
fn bursts(stack: &Stack) -> Value {
    let api = stack.api();
    let measure = |name: &str, role: &str, limit: usize, requests: usize, connections: usize, keys: usize| {
        let mut least = usize::MAX;
        let (mut pending, mut slowest) = (0, Duration::ZERO);
        for _ in 0..keys {
            let key = api.issue(role);
            let got = burst(&stack.envoy, &chat(&key), requests, connections);
            least = least.min(got.admitted);
            pending = pending.max(got.pending);
            slowest = slowest.max(got.took);
        }
        println!(
            "  {name:37} {least:4} of {limit} admitted at least, {pending} pending at most, {} ms at most",
            slowest.as_millis()
        );
        json!({ "burst": name, "limit": limit, "requests": requests, "keys": keys, "admitted_least": least,
            "pending_most": pending, "slowest_ms": slowest.as_secs_f64() * 1e3 })
    };
    let mut all = vec![
        measure("10 keys, 160 requests, 1 connection", "basic", 100, 160, 1, 10),
        measure("10 keys, 160 requests, 6 connections", "basic", 100, 160, 6, 10),
        measure("3 keys, 1,600 requests, 6 connections", "contributor", 1_000, 1_600, 6, 3),
    ];
    let others = [stack.another_envoy("envoy-2", 2), stack.another_envoy("envoy-3", 2)];
    wait_until(SOON, "three proxies in the fleet", || api.fleet().len() == 3);
    all.push(measure("one of three, 10 keys, 150 requests", "basic", 100, 150, 6, 10));
    drop(others);
    json!(all)
}

/// Three proxies at five times the limit: what is admitted of it, and the most in any window.
fn overload(stack: &Stack) -> Value {
    let api = stack.api();
    let others = [stack.another_envoy("envoy-2", 4), stack.another_envoy("envoy-3", 4)];
    let envoys = [&stack.envoy, &others[0], &others[1]];
    wait_until(SOON, "three proxies in the fleet", || api.fleet().len() == 3);
    let mut all = Vec::new();
    for (limit, window_s, during_s, per_second) in
        [(100_u32, 3_600_u64, 4, 250), (1_000, 3_600, 5, 1_000), (10_000, 3_600, 20, 2_500), (50, 1, 10, 250)]
    {
        let key = api.issue("contributor");
        put(&api, &json!({ "keys": { &key.id: { "requests": limit, "window": format!("{window_s}s") } } }));
        let got = admitted(&envoys, &chat(&key), Duration::from_secs(during_s), per_second);
        let most = got.most_in(Duration::from_secs(window_s));
        let windows = (got.took.as_secs_f64() / window_s as f64).max(1.0);
        let share = got.times.len() as f64 / (f64::from(limit) * windows);
        let name = format!("three proxies, {limit} in {window_s} s");
        println!("  {name:37} {:6.1} % admitted, at most {most} in a window", share * 100.0);
        all.push(json!({ "limit": limit, "window_s": window_s, "admitted_ratio": share, "most_in_a_window": most }));
    }
    json!(all)
}

fn send(connections: &mut [Connection], key: &Key, requests: u64) {
    let request = chat(key);
    for _ in 0..requests / connections.len() as u64 {
        for connection in &mut *connections {
            connection.begin(&request);
        }
        for connection in &mut *connections {
            connection.receive().expect(200);
        }
    }
}
