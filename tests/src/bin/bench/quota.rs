//! What a limit costs a request: CPU time of Envoy per request of a known key with a limit, against one without, in the
//! same process and in rounds that take turns.

use keygate_e2e::{Connection, Key, Request, Stack};
use serde_json::json;

use crate::estimate::Estimate;

const ROUNDS: usize = 20;
const REQUESTS: u64 = 20_000;
const CONNECTIONS: usize = 32;

pub fn run() {
    let rounds = std::env::var("KEYGATE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let stack = Stack::builder().limits().start();
    let api = stack.api();
    let limits = json!({ "roles": { "basic": { "requests": 1_000_000_000, "window": "1h" } } });
    api.send(Request::new("PUT", "/api/admin/rate_limits?wait=applied").json(&limits)).expect(200);
    let (limited, free) = (api.issue("basic"), api.issue("admin"));
    let mut connections: Vec<Connection> = (0..CONNECTIONS).map(|_| stack.envoy.connect()).collect();
    // Every worker knows both keys, and the limit is leased.
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
    println!("CPU time of Envoy per request, µs, {rounds} rounds of {REQUESTS} requests:");
    println!("  without a limit  {:7.2}", without);
    println!("  with one         {:7.2}", with);
    println!("  difference       {mean:7.2} ± {ci95:.2} (95 %)");
    crate::write(
        "quota",
        &json!({
            "cpu_us_per_request": { "without": without, "with": with },
            "difference_us": mean,
            "ci95_us": ci95,
            "rounds": rounds,
            "requests_a_round": REQUESTS,
        }),
    );
}

fn send(connections: &mut [Connection], key: &Key, requests: u64) {
    let request = Request::get("/api/chat").bearer(&key.token);
    for _ in 0..requests / connections.len() as u64 {
        for connection in &mut *connections {
            connection.begin(&request);
        }
        for connection in &mut *connections {
            connection.receive().expect(200);
        }
    }
}
