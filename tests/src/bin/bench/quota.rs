//! Limits in both hosts of the filter: what a limit costs a request of a known key, bursts of new keys at first contact, and
//! how much of a limit is admitted under steady overload.

use std::time::Duration;

use keygate_e2e::burst::burst;
use keygate_e2e::overload::admitted;
use keygate_e2e::{Api, Key, Request, Stack};
use serde_json::{Value, json};

const LIMITS: &str = "/api/admin/rate_limits";

pub fn run() {
    println!("CPU time of Envoy a request");
    let cost = crate::filter::limits::measure();
    let hosts: Vec<Value> = ["WebAssembly", "module"]
        .into_iter()
        .map(|host| {
            println!("{host}");
            let figures = json!({
                "bursts": bursts(&stack(host)),
                "overload": overload(&stack(host)),
            });
            json!({ "host": host, "figures": figures })
        })
        .collect();
    crate::write("quota", &json!({ "cost": cost, "hosts": hosts }));
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
    let others = stack.two_more_envoys(2);
    all.push(measure("one of three, 10 keys, 150 requests", "basic", 100, 150, 6, 10));
    drop(others);
    json!(all)
}

/// Three proxies at five times the limit: what is admitted of it, and the most in any window.
fn overload(stack: &Stack) -> Value {
    let api = stack.api();
    let others = stack.two_more_envoys(4);
    let envoys = [&stack.envoy, &others[0], &others[1]];
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
