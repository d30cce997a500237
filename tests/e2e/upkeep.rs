//! The revocation set over time: what was revoked can be looked up, what has expired leaves, and the set is cut
//! anew as it grows, with proxies that go on meanwhile.

use std::time::{SystemTime, UNIX_EPOCH};

use keygate_e2e::{Api, Key, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

use crate::requests::assert_serves;

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

fn stats(api: &Api) -> Value {
    api.get("/api/admin/revocations/stats").expect(200).json()
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

#[test]
fn what_has_expired_leaves_and_can_never_come_back() {
    let mut stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let brief = json!({ "name": "brief", "role": "basic", "expires_in": "2s" });
    let (revoked, suspended) = (api.issue_with(&brief), api.issue_with(&brief));
    let expires_at = unix_seconds() + 2;
    let lasting = api.issue("basic");
    api.change(&format!("/api/admin/keys/{}/suspend", suspended.id), &json!({}));
    api.revoke(&revoked.id);
    api.revoke(&lasting.id);
    assert_eq!((&stats(&api)["total_revoked"], &stats(&api)["total_suspended"]), (&json!(2), &json!(1)));

    // Not before the keys have expired.
    let cleanup = "/api/admin/revocations/cleanup?wait=applied&timeout=10s";
    if unix_seconds() < expires_at - 1 {
        let answer = api.post(cleanup, &json!({})).expect(200).json();
        assert!(unix_seconds() >= expires_at || answer["removed"] == 0, "{answer}");
    }
    wait_until(SOON, "the keys to have expired", || unix_seconds() > expires_at);
    let answer = api.post(cleanup, &json!({})).expect(200).json();
    assert_eq!((&answer["removed"], &answer["remaining"]), (&json!(2), &json!(1)), "{answer}");
    assert_eq!(answer["propagation"]["missing"], json!([]), "{answer}");
    assert_eq!((&stats(&api)["total_revoked"], &stats(&api)["total_suspended"]), (&json!(1), &json!(0)));
    for key in [&revoked, &suspended, &lasting] {
        stack.call(&chat(key)).expect_problem(401, "invalid_token");
    }
    let again = api.post(cleanup, &json!({})).expect(200).json();
    assert_eq!((&again["removed"], &again["version"]), (&json!(0), &answer["version"]), "nothing was due");

    // The proxies have a time by which such keys are over, whatever their clock says; also after a restart.
    stack.control_plane.stop();
    stack.control_plane.start();
    let api = stack.api();
    assert_eq!(stats(&api)["expired_until"], answer["expired_until"]);
    assert_eq!(stats(&api)["total_revoked"], 1);
    stack.call(&chat(&lasting)).expect(401);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn what_was_revoked_can_be_looked_up_page_by_page() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let keys: Vec<Key> = (0..5).map(|_| api.issue("basic")).collect();
    for key in &keys {
        api.post(&format!("/api/admin/keys/{}/revoke", key.id), &json!({ "reason": "compromised" }))
            .expect(200);
    }
    let foreign = json!({ "jtis": ["seen-elsewhere"], "reason": "suspicious_activity" });
    api.post("/api/admin/revocations", &foreign).expect(200);

    let (mut found, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = api.get(&format!("/api/admin/revocations?limit=2{cursor}")).expect(200).json();
        found.extend(page["revocations"].as_array().expect("revocations").clone());
        match page["next_cursor"].as_u64() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    let jtis: Vec<&str> = found.iter().filter_map(|revocation| revocation["jti"].as_str()).collect();
    let mut want: Vec<&str> = keys.iter().map(|key| key.jti.as_str()).collect();
    want.push("seen-elsewhere");
    want.reverse();
    assert_eq!(jtis, want, "the last one first");
    assert_eq!((&found[0]["key_id"], &found[0]["role"]), (&Value::Null, &Value::Null));
    assert_eq!((&found[5]["key_id"], &found[5]["role"]), (&json!(keys[0].id), &json!("basic")));
    assert!(
        found.iter().all(|revocation| revocation["by"].as_str().is_some_and(|by| by.starts_with("key_")))
    );

    let count = |query: &str| {
        let answer = api.get(&format!("/api/admin/revocations?{query}")).expect(200).json();
        answer["revocations"].as_array().expect("revocations").len()
    };
    assert_eq!((count("reason=compromised"), count("reason=emergency")), (5, 0));
    assert_eq!((count(&format!("key_id={}", keys[3].id)), count("jti=seen-elsewhere")), (1, 1));
    for bad in ["limit=0", "limit=1001", "reason=because", "cursor=x", "colour=red"] {
        api.get(&format!("/api/admin/revocations?{bad}")).expect_problem(400, "bad_request");
    }
}

#[test]
fn a_set_that_grows_is_cut_anew_and_taken_over_while_the_proxy_serves() {
    const BATCHES: usize = 4;
    const BATCH: usize = 10_000;

    let stack = Stack::start();
    let api = stack.api();
    let (good, dead) = (api.issue("basic"), api.issue("basic"));
    let mut workers = stack.envoy.connect_to_all_workers();
    api.revoke(&dead.id);
    for batch in 0..BATCHES {
        let jtis: Vec<String> = (0..BATCH).map(|n| format!("elsewhere-{batch}-{n}")).collect();
        let body = json!({ "jtis": jtis, "reason": "compromised" });
        let answer = api.post("/api/admin/revocations?wait=applied&timeout=20s", &body).expect(200).json();
        assert_eq!(answer["propagation"]["missing"], json!([]), "{}", answer["propagation"]);
        assert_serves(&mut workers, &good.token);
        for connection in &mut workers {
            connection.send(&chat(&dead)).expect(401);
        }
    }
    let held = stats(&api);
    assert_eq!(held["total_revoked"], json!(1 + BATCHES * BATCH));
    assert_eq!(held["shards"], 8, "{held}");
    assert!(held["bloom_fp_rate"].as_f64().is_some_and(|rate| rate < 1e-4), "{held}");

    // By hand it is a version like any other, too.
    let before = stack.envoy.stat("keygate_publications_total");
    let rebuilt = api.change("/api/admin/revocations/rebuild", &json!({})).expect_everywhere(1);
    assert!(stack.envoy.stat("keygate_publications_total") > before);
    assert_eq!(api.fleet()[0]["version"], rebuilt.version);
    assert_serves(&mut workers, &good.token);
    for connection in &mut workers {
        connection.send(&chat(&dead)).expect(401);
    }
    let late = api.issue("basic");
    assert_serves(&mut workers, &late.token);
    api.revoke(&late.id).expect_everywhere(1);
    for connection in &mut workers {
        connection.send(&chat(&late)).expect(401);
    }
    // Growing was no trouble: no delta that did not fit, no snapshot that was refused.
    assert_eq!(stack.envoy.stat("keygate_sync_failures_total"), 0);
    stack.envoy.assert_no_vm_died();
}
