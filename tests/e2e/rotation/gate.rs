//! The gate: no new secret signs before every proxy that may serve keys knows it; and how to go on without one.

use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Envoy, Line, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

use super::{
    FORCE, ROTATE, active, all_workers, assert_all_answer, begin, chat, kid_of, rotated, stage, status, text,
};

/// An Envoy as usual, and one whose line to the control plane is cut.
#[track_caller]
fn one_cut_off(config: &str) -> (Stack, Envoy, Line) {
    let stack = Stack::builder().workers(1).config(config).start();
    let (second, mut line) = stack.another_envoy_on_a_line("envoy-2", 2);
    wait_until(SOON, "two proxies in the fleet", || stack.api().fleet().len() == 2);
    line.cut();
    (stack, second, line)
}

fn degraded(api: &Api) -> Option<String> {
    let health = api.call(&Request::get("/health")).expect(200).json();
    (health["status"] == "degraded").then(|| health["reasons"].to_string())
}

fn kids_of_jwks(api: &Api) -> Vec<String> {
    let jwks = api.call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    jwks["keys"].as_array().expect("keys").iter().map(|jwk| text(&jwk["kid"])).collect()
}

/// The latest record in the audit log of a secret that became active.
#[track_caller]
fn latest_activation(api: &Api) -> Value {
    api.get("/api/admin/audit?action=secret_activated&limit=1").expect(200).json()["records"][0].clone()
}

#[test]
fn a_proxy_that_is_cut_off_holds_a_rotation_up_until_it_is_back() {
    let (stack, second, mut line) = one_cut_off("[secrets]\npropagation_timeout = \"1s\"\n");
    let api = stack.api();
    let old = active(&api);
    let failures = || Metrics::of(&api).value("secret_rotation_failures");
    assert_eq!(failures(), 0.0);
    let kid = text(&begin(&api, &json!({}))["version_id"]);
    wait_until(SOON, "it to take too long", || status(&api)["rotation"]["stalled"] == true);
    let rotation = status(&api)["rotation"].clone();
    assert_eq!(
        (&rotation["version_id"], &rotation["state"], &rotation["waiting_for"]),
        (&json!(kid), &json!("rotating"), &json!(["envoy-2"])),
        "{rotation}"
    );
    wait_until(SOON, "the failure to be counted", || failures() == 1.0);
    let reasons = degraded(&api).expect("a reason");
    assert!(reasons.contains("rotation") && reasons.contains("envoy-2"), "{reasons}");
    // The old one goes on, so nobody notices.
    let mut workers = second.connect_to_all_workers();
    let key = api.issue("basic");
    assert_eq!(kid_of(&key), old);
    assert_all_answer(&mut workers, &key, 200);

    line.heal();
    wait_until(SOON, "the rotation to go on", || active(&api) == kid);
    let new = api.issue("basic");
    assert_eq!(kid_of(&new), kid);
    for key in [&key, &new] {
        assert_all_answer(&mut workers, key, 200);
    }
    wait_until(SOON, "all to be well", || degraded(&api).is_none());
    assert_eq!(failures(), 1.0, "it failed once");
    assert_eq!(stage(&api, &old), "previous");
}

#[test]
fn a_proxy_that_serves_no_keys_any_more_holds_no_rotation_up() {
    let (stack, second, mut line) = one_cut_off("[fleet]\nmax_staleness = \"2s\"\n");
    let api = stack.api();
    let mut workers = second.connect_to_all_workers();
    rotated(&api);
    let new = api.issue("basic");
    stack.envoy.call(&chat(&new)).expect(200);
    // It is too old to say what it thinks of a secret that it has never heard of.
    assert_all_answer(&mut workers, &new, 503);
    line.heal();
    for worker in &mut workers {
        wait_until(SOON, "the proxy to be back", || {
            let status = worker.send(&chat(&new)).status;
            assert!(matches!(status, 200 | 503), "{status}");
            status == 200
        });
    }
}

#[test]
fn whoever_forces_a_rotation_says_why_and_is_waited_for_by_nobody() {
    let (stack, second, mut line) = one_cut_off("");
    let api = stack.api();
    let refused = api.post(FORCE, &json!({ "justification": "nothing runs" }));
    refused.expect_problem(409, "no_rotation");
    // Of this one alone it is said that it takes long soon.
    let kid = text(&begin(&api, &json!({ "propagation_timeout": "1s" }))["version_id"]);
    wait_until(SOON, "it to take too long", || status(&api)["rotation"]["stalled"] == true);
    api.post(FORCE, &json!({ "justification": "" })).expect_problem(400, "bad_request");
    let answer = api.post(FORCE, &json!({ "justification": "envoy-2 is in the sea" })).expect(200).json();
    assert_eq!(
        (text(&answer["version_id"]), &answer["state"], &answer["without"]),
        (kid.clone(), &json!("active"), &json!(["envoy-2"])),
        "{answer}"
    );
    assert_eq!(active(&api), kid);
    let record = latest_activation(&api);
    assert_eq!(
        (text(&record["target"]), &record["reason"]),
        (kid.clone(), &json!("envoy-2 is in the sea")),
        "{record}"
    );
    assert!(record["actor"].as_str().is_some_and(|actor| actor.starts_with("key_")), "{record}");
    let new = api.issue("basic");
    assert_eq!(kid_of(&new), kid);
    stack.envoy.call(&chat(&new)).expect(200);
    // What was to be expected, and passes by itself.
    second.call(&chat(&new)).expect(401);
    line.heal();
    wait_until(SOON, "the proxy to know it", || second.call(&chat(&new)).status == 200);
}

#[test]
fn a_rotation_that_is_cancelled_leaves_nothing_and_the_next_one_works() {
    let (stack, second, mut line) = one_cut_off("");
    let api = stack.api();
    let cancel = || api.send(Request::new("DELETE", ROTATE));
    cancel().expect_problem(409, "no_rotation");
    let old = active(&api);
    let kid = text(&begin(&api, &json!({}))["version_id"]);
    assert_eq!((stage(&api, &kid).as_str(), kids_of_jwks(&api).contains(&kid)), ("rotating", true));
    let answer = cancel().expect(200).json();
    assert_eq!((text(&answer["version_id"]), &answer["state"]), (kid.clone(), &json!("expired")), "{answer}");
    assert_eq!((active(&api), stage(&api, &kid)), (old.clone(), "expired".into()));
    assert_eq!(kids_of_jwks(&api), std::slice::from_ref(&old));
    cancel().expect_problem(409, "no_rotation");
    let key = api.issue("basic");
    assert_eq!(kid_of(&key), old);
    super::wait_tidy(&stack.control_plane, &api);

    line.heal();
    let next = rotated(&api);
    assert_eq!((stage(&api, &kid), stage(&api, &old)), ("expired".into(), "previous".into()));
    assert_eq!(kids_of_jwks(&api), [next.clone(), old]);
    let new = api.issue("basic");
    assert_eq!(kid_of(&new), next);
    let mut workers = all_workers(&[&stack.envoy, &second]);
    for key in [&key, &new] {
        assert_all_answer(&mut workers, key, 200);
    }
    // What has taken effect cannot be cancelled.
    cancel().expect_problem(409, "no_rotation");
}

#[test]
fn an_immediate_rotation_is_not_cancelled_but_can_be_forced() {
    let (stack, _second, _line) = one_cut_off("");
    let api = stack.api();
    // The caller's key would end with the secret, and its renewal would be waited for.
    let answer = begin(&api, &json!({}));
    api.post(FORCE, &json!({ "justification": "a key for the test" })).expect(200);
    let old = text(&answer["version_id"]);
    let kid = text(&begin(&api, &json!({ "immediate": true }))["version_id"]);
    assert_eq!((active(&api), stage(&api, &old)), (kid.clone(), "expired".into()));
    api.send(Request::new("DELETE", ROTATE)).expect_problem(409, "too_late");
    api.post(FORCE, &json!({ "justification": "the leak is worse" })).expect(200);
    assert!(status(&api)["rotation"].is_null());
    assert_eq!(kid_of(&api.issue("basic")), kid);
}

#[test]
fn a_proxy_that_was_restarted_is_waited_for_once() {
    let stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let mut second = stack.another_envoy("envoy-2", 1);
    wait_until(SOON, "two proxies in the fleet", || api.fleet().len() == 2);
    second.kill();
    let kid = text(&begin(&api, &json!({}))["version_id"]);
    wait_until(SOON, "it to wait", || status(&api)["rotation"]["waiting_for"] == json!(["envoy-2"]));
    second.start(&stack.neighbours());
    wait_until(SOON, "the new secret to sign", || active(&api) == kid);
    second.wait_ready();
    second.call(&chat(&api.issue("basic"))).expect(200);
}

#[test]
fn a_proxy_that_joins_at_any_moment_of_a_rotation_takes_every_key_once_it_is_ready() {
    let stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let mut joined = Vec::new();
    for round in 0..4 {
        let kid = text(&begin(&api, &json!({}))["version_id"]);
        let mut joins = Envoy::new(stack.directory(), &format!("joins-{round}"), 1);
        // It takes about a second to start, as the rotation does to complete.
        joins.launch(&stack.neighbours());
        let mut newest = api.issue("basic");
        wait_until(SOON, "it to be ready", || {
            newest = api.issue("basic");
            joins.ready_status() == Some(200)
        });
        let mut worker = joins.connect();
        let mut used = 0;
        wait_until(SOON, "the new secret to sign", || {
            let key = api.issue("basic");
            for key in [&newest, &key] {
                assert_eq!(worker.send(&chat(key)).status, 200, "a key of {}", kid_of(key));
            }
            used += 1;
            kid_of(&key) == kid
        });
        println!("round {round}: {used} keys until the new secret signed");
        // One that is gone would be waited for by the next round.
        joined.push(joins);
    }
}
