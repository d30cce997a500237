//! What a million revoked keys cost a proxy, and how fast one more is enforced.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use keygate_e2e::metrics::{Metrics, peak};
use keygate_e2e::{Api, Envoy, Request, Stack, Times, wait_until};
use serde_json::{Value, json};

const REVOKED: usize = 1_000_000;
const BATCH: usize = 10_000;
/// To load the set, and to take it over, on a slow machine.
const LONG: Duration = Duration::from_secs(300);

pub fn run() {
    let mut stack = Stack::builder().workers(4).start();
    let api = stack.api();
    let empty = Proxy::of(&stack.envoy);
    stack.envoy.stop();

    let loaded_in = load(&api);
    let before = Metrics::of(&api);
    let begun = Instant::now();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let ready_in = begun.elapsed();
    let after = Metrics::of(&api);
    let sent = |metrics: &Metrics, kind: &str| {
        metrics.value(&format!("keygate_sync_response_bytes_total{{kind=\"{kind}\"}}"))
    };
    let snapshot_bytes =
        ["snapshot", "shards"].map(|kind| sent(&after, kind) - sent(&before, kind)).iter().sum::<f64>();

    let held = api.get("/api/admin/revocations/stats").expect(200).json();
    wait_until(LONG, "every worker's gates", || {
        let gate_bits = stack.envoy.stat("keygate_gate_bytes") * 8;
        Some(gate_bits) >= held["bloom_bits"].as_u64()
    });
    let full = Proxy::of(&stack.envoy);

    let before = Metrics::of(&api);
    let key = api.issue("basic");
    api.revoke(&key.id).expect_everywhere(1);
    stack.envoy.call(&Request::get("/api/chat").bearer(&key.token)).expect(401);
    let one_more = sent(&Metrics::of(&api), "delta") - sent(&before, "delta");

    let (one_key, one_key_bytes) = revoke_one_by_one(&api);
    let cutoff = cut_off_many(&stack);

    let begun = Instant::now();
    stack.control_plane.stop();
    stack.control_plane.launch();
    wait_until(LONG, "the control plane", || stack.control_plane.is_ready());
    let restarted_in = begun.elapsed();
    let begun = Instant::now();
    let audit = api.get("/api/admin/audit/verify").expect(200).json();
    assert_eq!(audit["valid"], true, "{audit}");
    let verified_in = begun.elapsed();
    wait_until(LONG, "the proxy", || api.fleet().iter().any(|proxy| proxy["current"] == true));
    stack.envoy.call(&Request::get("/api/chat").bearer(&key.token)).expect(401);

    let rows = [
        ("revocations held", held["total_revoked"].as_u64().unwrap_or(0) as f64, ""),
        ("loaded by the API in", loaded_in.as_secs_f64(), "s"),
        ("control plane's stop and start to ready", restarted_in.as_secs_f64(), "s"),
        ("records of the audit log", audit["journal"]["records"].as_f64().unwrap_or(0.0), ""),
        ("audit log verified in", verified_in.as_secs_f64(), "s"),
        ("one key revoked and applied, median", millis(one_key.at(50)), "ms"),
        ("its answer to a proxy", one_key_bytes, "bytes"),
        ("keys ended by one cut-off", cutoff.keys as f64, ""),
        ("issued in", cutoff.issued_in.as_secs_f64(), "s"),
        ("cut off and applied", millis(cutoff.applied_in), "ms"),
        ("its answer to a proxy, whole", cutoff.bytes, "bytes"),
        ("Envoy's start to ready", ready_in.as_secs_f64(), "s"),
        ("snapshot on the wire", snapshot_bytes / 1e6, "MB"),
        ("one more revocation on the wire", one_more, "bytes"),
        ("exact set, shared by the workers", held["exact_bytes"].as_f64().unwrap_or(0.0) / 1e6, "MB"),
        ("gates of one worker", full.gate_bytes / 1e6, "MB"),
        ("memory of the largest VM, empty set", empty.vm_bytes / 1e6, "MB"),
        ("memory of the largest VM", full.vm_bytes / 1e6, "MB"),
        ("Envoy's memory, empty set", empty.resident / 1e6, "MB"),
        ("Envoy's memory", full.resident / 1e6, "MB"),
        ("longest slice of a VM", full.longest_slice_ms, "ms"),
        (
            "false positives of the gate, expected",
            held["bloom_fp_rate"].as_f64().unwrap_or(0.0) * 1e6,
            "in a million",
        ),
    ];
    println!();
    for (what, value, unit) in &rows {
        println!("{what:<42} {value:>12.2} {unit}");
    }
    crate::write(
        "revocation",
        &Value::from_iter(rows.map(|(what, value, unit)| (format!("{what}, {unit}"), json!(value)))),
    );
    stack.envoy.assert_no_vm_died();
}

/// Revokes a million tokens' ids; how long that took.
pub fn load(api: &Api) -> Duration {
    let begun = Instant::now();
    for batch in 0..REVOKED / BATCH {
        let jtis: Vec<String> = (0..BATCH).map(|n| format!("01J{batch:011}{n:012}")).collect();
        let body = json!({ "jtis": jtis, "reason": "compromised" });
        api.post("/api/admin/revocations", &body).expect(200);
        if std::io::stderr().is_terminal() {
            eprint!("\rrevoking: {} of {REVOKED}", (batch + 1) * BATCH);
            let _shown = std::io::stderr().flush();
        }
    }
    eprintln!("revoked {REVOKED}");
    begun.elapsed()
}

/// Revokes keys one after another; how long each took until every proxy enforced it, and its bytes on the wire.
fn revoke_one_by_one(api: &Api) -> (Times, f64) {
    const KEYS: u32 = 100;
    let mut times = Times::default();
    let keys: Vec<_> = (0..KEYS).map(|_| api.issue("basic")).collect();
    let before = delta_bytes(api);
    for key in keys {
        let begun = Instant::now();
        api.revoke(&key.id).expect_everywhere(1);
        times.add(begun.elapsed());
    }
    (times, (delta_bytes(api) - before) / f64::from(KEYS))
}

struct CutOff {
    keys: u64,
    issued_in: Duration,
    applied_in: Duration,
    bytes: f64,
}

/// Ends a hundred thousand keys by one rule.
fn cut_off_many(stack: &Stack) -> CutOff {
    const KEYS: usize = 100_000;
    const AT_A_TIME: usize = 8;
    let begun = Instant::now();
    let body = json!({ "name": "one of many", "role": "basic", "owner": "many" });
    let some: Vec<_> = std::thread::scope(|scope| {
        let issue = || {
            let (api, body) = (stack.api(), &body);
            scope.spawn(move || (1..KEYS / AT_A_TIME).fold(api.issue_with(body), |_, _| api.issue_with(body)))
        };
        let threads: Vec<_> = (0..AT_A_TIME).map(|_| issue()).collect();
        threads.into_iter().map(|thread| thread.join().expect("keys")).collect()
    });
    let issued_in = begun.elapsed();
    let api = stack.api();
    let chat = |token: &str| stack.envoy.call(&Request::get("/api/chat").bearer(token));
    some.iter().for_each(|key| drop(chat(&key.token).expect(200)));

    // Counting the keys reads all of them; the time that counts is from the change on.
    let before = delta_bytes(&api);
    let scope = json!({ "scope": { "owner": "many" } });
    let answer = api.post("/api/admin/emergency/revoke?wait=applied&timeout=60s", &scope).expect(200).json();
    assert_eq!(answer["propagation"]["missing"], json!([]), "{}", answer["propagation"]);
    some.iter().for_each(|key| drop(chat(&key.token).expect(401)));
    CutOff {
        keys: answer["keys"].as_u64().unwrap_or(0),
        issued_in,
        applied_in: Duration::from_millis(answer["propagation"]["max_lag_ms"].as_u64().unwrap_or(0)),
        bytes: delta_bytes(&api) - before,
    }
}

fn delta_bytes(api: &Api) -> f64 {
    Metrics::of(api).value("keygate_sync_response_bytes_total{kind=\"delta\"}")
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

/// What one Envoy uses.
struct Proxy {
    vm_bytes: f64,
    gate_bytes: f64,
    resident: f64,
    longest_slice_ms: f64,
}

impl Proxy {
    fn of(envoy: &Envoy) -> Self {
        // First what takes a while, in which every VM says again how much memory it has.
        let longest_slice_ms = peak(envoy, "keygate_slice_microseconds") / 1_000.0;
        Self {
            vm_bytes: envoy.stat("keygate_vm_memory_bytes") as f64,
            gate_bytes: envoy.stat("keygate_gate_bytes") as f64,
            resident: envoy.resident_bytes() as f64,
            longest_slice_ms,
        }
    }
}
