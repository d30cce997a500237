//! Emergency measures: a lockdown holds everywhere at once, spares whom it should, and ends by itself.

use std::time::Duration;

use keygate_e2e::{Request, Stack, wait_until};
use serde_json::{Value, json};

const PATH: &str = "/api/admin/emergency/lockdown";

fn applied(answer: &Value) {
    assert_eq!(answer["propagation"]["missing"], json!([]), "{answer}");
}

#[test]
fn a_lockdown_holds_until_it_is_lifted_also_over_a_restart() {
    let mut stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let (basic, admin) = (api.issue("basic"), api.issue("admin"));
    stack.get("/api/chat", &basic.token).expect(200);
    assert_eq!(api.get("/api/admin/emergency").expect(200).json()["active"], false);

    let wait = format!("{PATH}?wait=applied&timeout=10s");
    let answer = api.post(&wait, &json!({})).expect(200).json();
    applied(&answer);
    assert_eq!(answer["lockdown"]["exempt_roles"], json!(["admin"]));
    for _ in 0..4 {
        stack.get("/api/chat", &basic.token).expect_problem(401, "invalid_token");
        stack.get("/api/chat", &admin.token).expect(200);
    }
    let validate = |token: &str| api.call(&Request::get("/api/auth/validate").bearer(token)).status;
    assert_eq!((validate(&basic.token), validate(&admin.token)), (401, 200));

    stack.control_plane.kill();
    stack.control_plane.start();
    let api = stack.api();
    assert_eq!(api.get("/api/admin/emergency").expect(200).json()["active"], true);
    applied(&api.send(Request::new("DELETE", &wait)).expect(200).json());
    stack.get("/api/chat", &basic.token).expect(200);
}

#[test]
fn a_lockdown_ends_by_itself_also_without_the_control_plane() {
    let mut stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let basic = api.issue("basic");
    applied(
        &api.post(&format!("{PATH}?wait=applied&timeout=10s"), &json!({ "ttl": "2s" })).expect(200).json(),
    );
    stack.get("/api/chat", &basic.token).expect(401);
    stack.control_plane.kill();
    wait_until(Duration::from_secs(10), "the lockdown to end", || {
        stack.get("/api/chat", &basic.token).status == 200
    });
}

#[test]
fn who_may_lock_down_and_how_long() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    for bad in [
        json!({ "ttl": "0s" }),
        json!({ "ttl": "31d" }),
        json!({ "ttl": "soon" }),
        json!({ "exempt_roles": ["nobody"] }),
        json!({ "minutes": 5 }),
    ] {
        api.post(PATH, &bad).expect_problem(400, "bad_request");
    }
    let writer =
        api.issue_with(&json!({ "name": "w", "role": "admin", "scopes": ["admin:read", "admin:write"] }));
    let request = Request::post(PATH, &json!({})).bearer(&writer.token);
    api.call(&request).expect_problem(403, "insufficient_scope");
    assert_eq!(api.get("/api/admin/emergency").expect(200).json()["active"], false);
}

#[test]
fn a_cutoff_ends_what_it_says_at_once_and_one_that_is_lifted_ends_nothing() {
    const REVOKE: &str = "/api/admin/emergency/revoke";
    let mut stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let keys: Vec<_> = (0..20).map(|_| api.issue("basic")).collect();
    let owned = api.issue_with(&json!({ "name": "o", "role": "basic", "owner": "acme" }));
    let contributor = api.issue("contributor");
    let status = |stack: &Stack, token: &str| stack.get("/api/chat", token).status;

    let dry = api.post(REVOKE, &json!({ "scope": { "role": "basic" }, "dry_run": true })).expect(200).json();
    assert_eq!((&dry["keys"], &dry["by_role"]), (&json!(21), &json!({ "basic": 21 })), "{dry}");
    assert_eq!(status(&stack, &owned.token), 200, "a dry run ends nothing");

    let order = |scope: Value| {
        let answer = api.post(&format!("{REVOKE}?wait=applied&timeout=10s"), &json!({ "scope": scope }));
        let answer = answer.expect(200).json();
        applied(&answer);
        answer
    };
    order(json!({ "owner": "acme" }));
    assert_eq!((status(&stack, &owned.token), status(&stack, &keys[0].token)), (401, 200));
    let basic = order(json!({ "role": "basic" }));
    assert_eq!(basic["keys"], 21);
    for key in &keys {
        assert_eq!(status(&stack, &key.token), 401);
    }
    assert_eq!(status(&stack, &contributor.token), 200);
    let all = order(json!({}));
    assert_eq!(status(&stack, &contributor.token), 401);
    assert_eq!(status(&stack, &api.key()), 200, "whoever orders it goes on");

    // What is issued after it counts; it hits keys of the same second too.
    let now = || std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    let second = now();
    wait_until(Duration::from_secs(5), "the next second", || now() > second);
    let newer = api.issue("basic");
    assert_eq!(status(&stack, &newer.token), 200);

    stack.control_plane.kill();
    stack.control_plane.start();
    let api = stack.api();
    let cutoffs = api.get("/api/admin/emergency").expect(200).json()["cutoffs"].clone();
    assert_eq!(cutoffs.as_array().map(Vec::len), Some(3), "{cutoffs}");
    for answer in [&all, &basic] {
        let id = answer["cutoff"]["id"].as_str().expect("an id");
        applied(
            &api.send(Request::new("DELETE", format!("{REVOKE}/{id}?wait=applied&timeout=10s")))
                .expect(200)
                .json(),
        );
        api.send(Request::new("DELETE", format!("{REVOKE}/{id}"))).expect_problem(404, "not_found");
    }
    assert_eq!((status(&stack, &keys[0].token), status(&stack, &owned.token)), (200, 401));
}

#[test]
fn a_cutoff_that_says_nothing_sensible_is_refused() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    for scope in [
        json!({ "role": "nobody" }),
        json!({ "kid": "nothing" }),
        json!({ "created_before": "yesterday" }),
        json!({ "created_before": "2026-01-01T00:00:00Z", "created_after": "2026-01-01T00:00:00Z" }),
        json!({ "color": "red" }),
    ] {
        let answer = api.post("/api/admin/emergency/revoke", &json!({ "scope": scope }));
        answer.expect_problem(400, "bad_request");
    }
}
