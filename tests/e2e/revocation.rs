//! A revoked key is dead on every worker once the answer is there, and a good one never suffers.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use keygate_e2e::api::Propagation;
use keygate_e2e::{Connection, Key, Request, SOON, Stack, Times, wait_until};
use serde_json::{Value, json};

use crate::requests::assert_serves;

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

#[test]
fn once_applied_the_next_request_on_any_worker_is_refused() {
    let stack = Stack::start();
    let api = stack.api();
    let mut workers = stack.envoy.connect_to_all_workers();
    for _ in 0..20 {
        let key = api.issue("basic");
        assert_serves(&mut workers, &key.token);
        let propagation = api.revoke(&key.id).expect_everywhere(1);
        for (worker, connection) in workers.iter_mut().enumerate() {
            let answer = connection.send(&chat(&key));
            assert_eq!(answer.status, 401, "worker {worker} after {propagation:?}");
            answer.expect_problem(401, "invalid_token");
        }
        assert!(propagation.max_lag_ms < 5000.0, "{propagation:?}");
    }
}

#[test]
fn a_thousand_revocations_under_traffic_refuse_exactly_the_revoked() {
    const REVOCATIONS: usize = 1000;

    let stack = Stack::start();
    let api = stack.api();
    let mut workers = stack.envoy.connect_to_all_workers();
    let good: Vec<Key> = (0..8).map(|_| api.issue("node_operator")).collect();
    let keys: Vec<Key> = (0..REVOCATIONS).map(|_| api.issue("basic")).collect();

    let stop = AtomicBool::new(false);
    let passed = AtomicU64::new(0);
    let (mut answered, mut enforced, mut accepted) = (Times::default(), Times::default(), 0);
    std::thread::scope(|scope| {
        // If this thread panics, the others must end for the scope to end.
        let _stop = StopOnDrop(&stop);
        // Good traffic, on a worker each.
        for pair in good.chunks(4) {
            let mut connection = stack.envoy.connect();
            let (stop, passed) = (&stop, &passed);
            scope.spawn(move || {
                for key in pair.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let answer = connection.send(&chat(key));
                    assert_eq!(answer.status, 200, "a good key was refused: {}", answer.text());
                    passed.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Uses the key that is being revoked until it is refused for the first time.
        let (to_watch, watched) = channel::<&Key>();
        let (to_report, report) = channel::<Instant>();
        let mut watching = stack.envoy.connect();
        scope.spawn(move || {
            for key in watched {
                while watching.send(&chat(key)).status == 200 {}
                if to_report.send(Instant::now()).is_err() {
                    return;
                }
            }
        });

        for (number, key) in keys.iter().enumerate() {
            // Known to a worker as verified, as a key in use is.
            let worker = number % workers.len();
            workers[worker].send(&chat(key)).expect(200);
            to_watch.send(key).expect("the watcher lives");
            let begun = Instant::now();
            api.revoke(&key.id).expect_everywhere(1);
            answered.add(begun.elapsed());
            for connection in &mut workers {
                accepted += usize::from(connection.send(&chat(key)).status != 401);
            }
            enforced.add(report.recv_timeout(SOON).expect("a refusal").duration_since(begun));
        }
    });

    println!("revoke to enforced: {enforced}");
    println!("revoke to answered (wait=applied): {answered}");
    println!("good requests beside it: {}", passed.load(Ordering::Relaxed));
    assert_eq!(accepted, 0, "revoked keys accepted after the answer");
    assert!(passed.load(Ordering::Relaxed) >= REVOCATIONS as u64, "there was hardly any traffic");
    assert_serves(&mut workers, &good[0].token);
    stack.envoy.assert_no_vm_died();
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_revocation_is_for_ever_and_a_suspension_is_not() {
    let stack = Stack::start();
    let api = stack.api();
    let mut workers = stack.envoy.connect_to_all_workers();

    let key = api.issue("basic");
    for _ in 0..3 {
        assert_serves(&mut workers, &key.token);
        api.change(&format!("/api/admin/keys/{}/suspend", key.id), &json!({})).expect_everywhere(1);
        for connection in &mut workers {
            connection.send(&chat(&key)).expect_problem(401, "invalid_token");
        }
        api.change(&format!("/api/admin/keys/{}/resume", key.id), &json!({})).expect_everywhere(1);
    }
    assert_serves(&mut workers, &key.token);

    api.revoke(&key.id);
    // Once more is no error, and resuming is no way back.
    api.revoke(&key.id);
    let resumed = api.post(&format!("/api/admin/keys/{}/resume", key.id), &json!({}));
    assert_eq!(resumed.status, 409, "{}", resumed.text());
    for connection in &mut workers {
        connection.send(&chat(&key)).expect(401);
    }
    api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(401);
}

#[test]
fn the_holder_of_a_key_can_end_it() {
    let stack = Stack::start();
    let key = stack.api().issue("basic");
    let path = "/api/auth/revoke?wait=applied&timeout=5s";
    let answer = stack.call(&Request::post(path, &json!({})).bearer(&key.token)).expect(200);
    Propagation::from_answer(&answer.json()).expect_everywhere(1);
    stack.get("/api/chat", &key.token).expect(401);
    stack.call(&Request::post(path, &json!({})).bearer(&key.token)).expect(401);
}

#[test]
fn what_was_revoked_stays_so_over_every_restart() {
    let mut stack = Stack::start();
    let dead = stack.api().issue("basic");
    let good = stack.api().issue("basic");
    stack.api().revoke(&dead.id);

    stack.envoy.kill();
    stack.start_envoy();
    stack.envoy.wait_ready();
    stack.get("/api/chat", &dead.token).expect(401);
    stack.get("/api/chat", &good.token).expect(200);

    stack.envoy.stop();
    stack.control_plane.stop();
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    stack.get("/api/chat", &dead.token).expect(401);
    stack.get("/api/chat", &good.token).expect(200);
}

#[test]
fn the_answer_counts_every_proxy_and_names_those_that_are_silent() {
    let stack = Stack::start();
    let api = stack.api();
    let mut second = stack.another_envoy("envoy-2", 1);
    wait_until(SOON, "two proxies in the fleet", || api.fleet().len() == 2);

    let key = api.issue("basic");
    api.revoke(&key.id).expect_everywhere(2);
    second.call(&chat(&key)).expect(401);
    stack.call(&chat(&key)).expect(401);

    // It does not enforce what comes now, so nobody may be told that it does.
    second.kill();
    let key = api.issue("basic");
    let path = format!("/api/admin/keys/{}/revoke?wait=applied&timeout=500ms", key.id);
    let begun = Instant::now();
    let answer = api.post(&path, &json!({ "reason": "compromised" })).json();
    assert!(begun.elapsed() < Duration::from_secs(5), "it waits no longer than it was told to");
    let propagation = Propagation::from_answer(&answer);
    assert_eq!((propagation.applied, propagation.total), (1, 2), "{answer}");
    assert_eq!(propagation.missing.len(), 1, "{answer}");
    assert!(propagation.missing[0].to_string().contains("envoy-2"), "{answer}");
    stack.call(&chat(&key)).expect(401);
}

#[test]
fn a_key_is_good_on_every_worker_as_soon_as_it_is_issued() {
    let stack = Stack::start();
    let mut workers: Vec<Connection> = stack.envoy.connect_to_all_workers();
    for _ in 0..50 {
        assert_serves(&mut workers, &stack.api().issue("basic").token);
    }
}

#[test]
fn a_batch_is_revoked_as_one_with_a_result_for_each() {
    let stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let keys: Vec<Key> = (0..50).map(|_| api.issue("basic")).collect();
    let spared = api.issue("basic");
    for key in keys.iter().chain([&spared]) {
        stack.call(&chat(key)).expect(200);
    }
    let body = json!({
        "key_ids": keys[..30].iter().map(|key| &key.id).chain([&keys[0].id, &"key_unknown".to_owned()]).collect::<Vec<_>>(),
        "jtis": keys[29..].iter().map(|key| key.jti.as_str()).chain(["never-seen"]).collect::<Vec<_>>(),
        "reason": "compromised",
    });
    let path = "/api/admin/revocations?wait=applied&timeout=10s";
    let answer = api.post(path, &body).expect(200).json();
    assert_eq!(answer["propagation"]["missing"], json!([]), "{answer}");
    assert_eq!(
        (&answer["revoked"], &answer["already_revoked"], &answer["unknown"]),
        (&json!(51), &json!(2), &json!(1)),
        "{answer}"
    );
    let results = answer["results"].as_array().expect("results");
    assert_eq!(results.len(), 54);
    assert_eq!(results[31], json!({ "key_id": "key_unknown", "result": "unknown_key" }));
    assert_eq!(results[53], json!({ "jti": "never-seen", "result": "revoked_unseen" }));
    for key in &keys {
        stack.call(&chat(key)).expect(401);
    }
    stack.call(&chat(&spared)).expect(200);
    let show = api.get(&format!("/api/admin/keys/{}", keys[40].id)).expect(200).json();
    assert_eq!((&show["state"], &show["revoked"]["reason"]), (&json!("revoked"), &json!("compromised")));

    let stats = api.get("/api/admin/revocations/stats").expect(200).json();
    assert_eq!(
        (&stats["total_revoked"], &stats["revoked_last_24h"], &stats["emergency_active"]),
        (&json!(51), &json!(51), &json!(false)),
        "{stats}"
    );
    assert_eq!(stats["exact_bytes"], 16 + 8 * 51);
    assert!(stats["bloom_bits"].as_u64().is_some_and(|bits| bits >= 51 * 20), "{stats}");
    assert!(stats["bloom_fp_rate"].as_f64().is_some_and(|rate| rate < 1e-4), "{stats}");

    // The same again changes nothing, so it is no new version.
    let again = api.post(path, &body).expect(200).json();
    assert_eq!((&again["revoked"], &again["version"]), (&json!(0), &answer["version"]));
    for bad in [
        json!({ "reason": "compromised" }),
        json!({ "jtis": ["a"] }),
        json!({ "jtis": [""], "reason": "emergency" }),
    ] {
        api.post(path, &bad).expect_problem(400, "bad_request");
    }
}

/// Copies the control plane's data, which does not run.
fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("--archive").args([from, to]).status().expect("cp");
    assert!(copied.success(), "{copied}");
}

#[test]
fn a_key_revoked_before_its_first_use() {
    let mut stack = Stack::builder().without_envoy().start();
    let kept = stack.directory().join("kept");
    stack.control_plane.stop();
    copy(&stack.control_plane.data(), &kept);
    stack.control_plane.start();
    // Forgotten below, but good: what they are signed with is not.
    let (dead, spared) = (stack.api().issue("basic"), stack.api().issue("basic"));
    stack.control_plane.stop();
    std::fs::remove_dir_all(stack.control_plane.data()).expect("the data");
    copy(&kept, &stack.control_plane.data());
    stack.control_plane.start();
    let api = stack.api();
    let known = api.issue("basic");

    stack.start_envoy();
    stack.envoy.wait_ready();
    let mut workers = stack.envoy.connect_to_all_workers();
    let body = json!({ "jtis": [&dead.jti, &known.jti], "reason": "compromised" });
    let answer = api.post("/api/admin/revocations?wait=applied&timeout=10s", &body).expect(200).json();
    assert_eq!(
        answer["results"],
        json!([
            { "jti": dead.jti, "result": "revoked_unseen" },
            { "jti": known.jti, "result": "revoked", "key_id": known.id },
        ]),
        "{answer}"
    );
    Propagation::from_answer(&answer).expect_everywhere(1);
    for connection in &mut workers {
        for key in [&dead, &known] {
            connection.send(&chat(key)).expect_problem(401, "invalid_token");
        }
    }
    assert_serves(&mut workers, &spared.token);
    for (key, status) in [(&dead, 401), (&known, 401)] {
        api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(status);
    }
}

#[test]
fn a_stolen_key_that_was_renewed_takes_its_successors_along() {
    let stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let refresh = |token: &str| {
        let request = Request::post("/api/auth/refresh", &json!({})).bearer(token);
        Key::from_answer(&api.call(&request).expect(200).json())
    };
    let short = || api.issue_with(&json!({ "name": "short", "role": "basic", "expires_in": "2h" }));
    let revoke = |id: &str, body: Value| {
        api.post(&format!("/api/admin/keys/{id}/revoke?wait=applied"), &body).expect(200).json()
    };
    for batch in [false, true] {
        let stolen = short();
        let second = refresh(&stolen.token);
        let third = refresh(&second.token);
        stack.get("/api/chat", &third.token).expect(200);
        let shown = api.get(&format!("/api/admin/keys/{}", stolen.id)).expect(200).json();
        assert_eq!(shown["renewed_by"], second.id.as_str(), "{shown}");
        if batch {
            let body = json!({ "key_ids": [stolen.id], "reason": "compromised" });
            let answer = api.post("/api/admin/revocations?wait=applied", &body).expect(200).json();
            assert_eq!((&answer["revoked"], &answer["already_revoked"]), (&json!(1), &json!(1)), "{answer}");
        } else {
            let answer = revoke(&stolen.id, json!({ "reason": "compromised" }));
            let ids = [&second.id, &third.id].map(|id| json!(id));
            let named: Vec<_> = answer["successors"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|one| one["key_id"].clone())
                .collect();
            assert_eq!(named, ids, "{answer}");
            assert_eq!(answer["successors"][1]["changed"], true, "{answer}");
        }
        stack.get("/api/chat", &third.token).expect(401);
    }
    // For another reason they are named, and stay, unless told otherwise.
    let key = short();
    let renewed = refresh(&key.token);
    let answer = revoke(&key.id, json!({ "reason": "admin_action" }));
    assert_eq!(
        (&answer["changed"], &answer["successors"][0]["state"]),
        (&json!(false), &json!("active")),
        "{answer}"
    );
    stack.get("/api/chat", &renewed.token).expect(200);
    revoke(&key.id, json!({ "reason": "admin_action", "with_successors": true }));
    stack.get("/api/chat", &renewed.token).expect(401);
}
