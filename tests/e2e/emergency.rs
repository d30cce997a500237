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
