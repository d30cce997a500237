//! Rotations of signing secrets under load: whether a good key is ever refused.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use keygate_e2e::{Api, Connection, Request, Stack, wait_for};
use serde_json::{Value, json};

const ROTATIONS: u64 = 100;
const REQUESTS: u64 = 1_000_000;
const ENVOYS: usize = 3;
const WORKERS: usize = 4;
/// For a rotation, on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// What all threads see.
struct Shared {
    keys: Mutex<Vec<String>>,
    stop: AtomicBool,
    sent: AtomicU64,
    refused: AtomicU64,
    other: AtomicU64,
}

pub fn run() {
    let rotations = number("KEYGATE_ROUNDS").unwrap_or(ROTATIONS);
    let requests = number("KEYGATE_REQUESTS").unwrap_or(REQUESTS * rotations / ROTATIONS);
    let stack = Stack::builder().workers(WORKERS).start();
    let others: Vec<_> =
        (1..ENVOYS).map(|n| stack.another_envoy(&format!("envoy-{}", n + 1), WORKERS)).collect();
    let api = stack.api();
    let shared = Arc::new(Shared {
        keys: Mutex::new(vec![api.issue("basic").token]),
        stop: AtomicBool::new(false),
        sent: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        other: AtomicU64::new(0),
    });
    let envoys: Vec<_> = [&stack.envoy].into_iter().chain(&others).collect();
    let clients: Vec<_> = envoys
        .iter()
        .enumerate()
        .map(|(n, envoy)| {
            let (shared, connections) = (Arc::clone(&shared), envoy.connect_to_all_workers());
            thread::spawn(move || send(&shared, connections, n))
        })
        .collect();

    let begun = Instant::now();
    let (mut slowest, mut total) = (Duration::ZERO, Duration::ZERO);
    for rotation in 1..=rotations {
        let took = rotate(&api);
        slowest = slowest.max(took);
        total += took;
        // Signed with the secret that has just begun to sign, and sent from this moment on.
        let key = api.issue("basic").token;
        shared.keys.lock().expect("nobody panics").push(key);
        // Requests are spread over the rotations.
        wait_for(LONG * 10, "requests", || {
            (shared.sent.load(Ordering::Relaxed) >= requests * rotation / rotations).then_some(())
        });
        if rotation % 10 == 0 {
            println!("{rotation} rotations, {} requests", shared.sent.load(Ordering::Relaxed));
        }
    }
    shared.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().expect("every request is answered");
    }
    let took = begun.elapsed();
    let status = api.get("/api/admin/secrets/status").expect(200).json();
    let of = |state: &str| {
        status["versions"].as_array().into_iter().flatten().filter(|secret| secret["state"] == state).count()
    };
    let figures = json!({
        "envoys": ENVOYS,
        "workers_each": WORKERS,
        "rotations": rotations,
        "requests": shared.sent.load(Ordering::Relaxed),
        "good_keys_refused": shared.refused.load(Ordering::Relaxed),
        "other_answers": shared.other.load(Ordering::Relaxed),
        "secrets_that_verify": of("active") + of("previous"),
        "active": of("active"),
        "seconds": took.as_secs_f64(),
        "rotation_seconds_mean": total.as_secs_f64() / rotations as f64,
        "rotation_seconds_slowest": slowest.as_secs_f64(),
    });
    println!();
    for (name, value) in figures.as_object().into_iter().flatten() {
        println!("{name:<26} {value}");
    }
    super::write("rotation", &figures);
    assert_eq!(figures["good_keys_refused"], 0, "good keys were refused");
    assert_eq!(figures["other_answers"], 0, "not every answer was 200");
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Sends keys of every age over the connections in turn: each second request the newest key, the others the rest.
fn send(shared: &Shared, mut connections: Vec<Connection>, start: usize) {
    let mut turn = start;
    while !shared.stop.load(Ordering::Relaxed) {
        let key = {
            let keys = shared.keys.lock().expect("nobody panics");
            let newest = keys.len() - 1;
            keys[if turn.is_multiple_of(2) { newest } else { turn / 2 % keys.len() }].clone()
        };
        let worker = turn / 2 % connections.len();
        let answer = connections[worker].send(&Request::get("/api/chat").bearer(&key));
        let count = match answer.status {
            200 => &shared.sent,
            401 => &shared.refused,
            _ => &shared.other,
        };
        count.fetch_add(1, Ordering::Relaxed);
        turn += 1;
    }
}

/// One rotation, until its secret signs.
fn rotate(api: &Api) -> Duration {
    let begun = Instant::now();
    let answer: Value =
        api.post("/api/admin/secrets/rotate", &json!({ "reason": "bench" })).expect(202).json();
    wait_for(LONG, "the new secret to sign", || {
        let status = api.get("/api/admin/secrets/status").expect(200).json();
        (status["active"]["version_id"] == answer["version_id"]).then_some(())
    });
    begun.elapsed()
}
