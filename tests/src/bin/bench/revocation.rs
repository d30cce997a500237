//! What a million revoked keys cost a proxy, and how fast one more is enforced.

use std::io::Write as _;
use std::time::{Duration, Instant};

use keygate_e2e::metrics::{Metrics, peak};
use keygate_e2e::{Api, Envoy, Request, Stack, wait_until};
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
        metrics.value(&format!("keygate_sync_bytes_total{{kind=\"{kind}\"}}"))
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

    let begun = Instant::now();
    stack.control_plane.stop();
    stack.control_plane.launch();
    wait_until(LONG, "the control plane", || stack.control_plane.is_ready());
    let restarted_in = begun.elapsed();
    wait_until(LONG, "the proxy", || api.fleet().iter().any(|proxy| proxy["current"] == true));
    stack.envoy.call(&Request::get("/api/chat").bearer(&key.token)).expect(401);

    let rows = [
        ("revocations held", held["total_revoked"].as_u64().unwrap_or(0) as f64, ""),
        ("loaded by the API in", loaded_in.as_secs_f64(), "s"),
        ("control plane's stop and start to ready", restarted_in.as_secs_f64(), "s"),
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
    write(
        "revocation",
        &Value::from_iter(rows.map(|(what, value, unit)| (format!("{what}, {unit}"), json!(value)))),
    );
    stack.envoy.assert_no_vm_died();
}

/// Revokes a million tokens' ids; how long that took.
fn load(api: &Api) -> Duration {
    let begun = Instant::now();
    for batch in 0..REVOKED / BATCH {
        let jtis: Vec<String> = (0..BATCH).map(|n| format!("01J{batch:011}{n:012}")).collect();
        let body = json!({ "jtis": jtis, "reason": "compromised" });
        api.post("/api/admin/revocations", &body).expect(200);
        eprint!("\rrevoking: {} of {REVOKED}", (batch + 1) * BATCH);
        let _shown = std::io::stderr().flush();
    }
    eprintln!();
    begun.elapsed()
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
        let longest_slice_ms = peak(envoy, "keygate_slice_us") / 1_000.0;
        Self {
            vm_bytes: envoy.stat("keygate_vm_memory_bytes") as f64,
            gate_bytes: envoy.stat("keygate_gate_bytes") as f64,
            resident: envoy.resident_bytes() as f64,
            longest_slice_ms,
        }
    }
}

fn write(name: &str, figures: &Value) {
    let directory = keygate_e2e::binaries::root().join("target/bench");
    std::fs::create_dir_all(&directory).expect("a directory for figures");
    let file = directory.join(format!("{name}.json"));
    std::fs::write(&file, format!("{figures:#}\n")).expect("the figures");
    println!("\nwritten to {}", file.strip_prefix(keygate_e2e::binaries::root()).unwrap_or(&file).display());
}
