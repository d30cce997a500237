//! Emergency measures: a lockdown holds everywhere at once, spares whom it should, and ends by itself; a cut-off
//! that ends many keys needs two who want it.

use std::time::Duration;

use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Key, Request, Response, Stack, wait_until};
use serde_json::{Value, json};

use crate::requests::assert_serves;

const PATH: &str = "/api/admin/emergency/lockdown";
const REVOKE: &str = "/api/admin/emergency/revoke";
const TWO_APPROVALS: &str = "[emergency]\ntwo_approvals_above = 0.25";

fn let_a_second_pass() {
    let now = || std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    let second = now();
    wait_until(Duration::from_secs(5), "the next second", || now() > second);
}

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
    let_a_second_pass();
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
        let answer = api.post(REVOKE, &json!({ "scope": scope }));
        answer.expect_problem(400, "bad_request");
    }
}

/// Asks for a cut-off that needs a second approval: its answer, and the path of the approval.
#[track_caller]
fn ask(api: &Api, scope: &Value) -> (Value, String) {
    let answer = api.post(&format!("{REVOKE}?wait=applied&timeout=10s"), &json!({ "scope": scope }));
    let answer = answer.expect(202).json();
    assert!(answer.get("propagation").is_none(), "there is nothing to wait for: {answer}");
    let id = answer["approval"]["id"].as_str().expect("an id");
    let path = format!("/api/admin/emergency/approvals/{id}");
    (answer, path)
}

fn approve(api: &Api, path: &str) -> Response {
    api.post(&format!("{path}?wait=applied&timeout=10s"), &json!({}))
}

fn waiting(api: &Api) -> Value {
    api.get("/api/admin/emergency").expect(200).json()["approvals"].clone()
}

#[test]
fn a_large_cutoff_takes_force_when_another_and_older_key_approves_it() {
    let mut stack = Stack::builder().config(TWO_APPROVALS).start();
    let api = stack.api();
    let keys: Vec<Key> = (0..5).map(|_| api.issue("basic")).collect();
    let (contributor, second) = (api.issue("contributor"), api.issue("admin"));
    let_a_second_pass();
    let mut workers = stack.envoy.connect_to_all_workers();

    let scope = json!({ "role": "basic" });
    let dry = api.post(REVOKE, &json!({ "scope": scope, "dry_run": true })).expect(200).json();
    // Five of eight: the key that asks is one of them.
    assert_eq!((&dry["needs_approval"], &dry["share"]), (&json!(true), &json!(0.625)), "{dry}");
    let (asked, path) = ask(&api, &scope);
    assert_eq!((&asked["keys"], &asked["by_role"]), (&json!(5), &json!({ "basic": 5 })), "{asked}");
    assert_eq!(asked["share"], dry["share"]);
    for key in &keys {
        assert_serves(&mut workers, &key.token);
    }
    assert_eq!(waiting(&api)[0]["approval"], asked["approval"]);
    assert_eq!(api.get("/api/admin/emergency").expect(200).json()["cutoffs"], json!([]));

    // Not by whoever asked, nor by a key that whoever asked could have made since.
    let newer = api.with_key(&api.issue("admin").token);
    let second = api.with_key(&second.token);
    let writer =
        api.issue_with(&json!({ "name": "w", "role": "admin", "scopes": ["admin:read", "admin:write"] }));
    approve(&api, &path).expect_problem(403, "own_request");
    approve(&newer, &path).expect_problem(403, "key_too_new");
    approve(&api.with_key(&writer.token), &path).expect_problem(403, "insufficient_scope");
    approve(&second, &format!("{path}x")).expect_problem(404, "not_found");
    assert_serves(&mut workers, &keys[0].token);

    stack.control_plane.kill();
    stack.control_plane.start();
    assert_eq!(waiting(&api)[0]["approval"], asked["approval"], "a restart keeps it");
    let_a_second_pass();
    let younger = api.issue("basic");
    let answer = approve(&second, &path).expect(200).json();
    applied(&answer);
    assert_eq!(answer["cutoff"], asked["cutoff"], "as it was asked for");
    assert_eq!(answer["requested_by"], asked["approval"]["requested_by"]);
    for connection in &mut workers {
        for key in &keys {
            let answer = connection.send(&Request::get("/api/chat").bearer(&key.token));
            answer.expect_problem(401, "invalid_token");
        }
    }
    assert_serves(&mut workers, &contributor.token);
    assert_serves(&mut workers, &younger.token);
    assert_eq!(waiting(&api), json!([]));
    assert_eq!(api.get("/api/admin/emergency").expect(200).json()["cutoffs"], json!([asked["cutoff"]]));
    approve(&second, &path).expect_problem(404, "not_found");
    assert_eq!(Metrics::of(&api).value("keygate_break_glass_total"), 0.0);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn a_cutoff_that_was_withdrawn_or_is_small_needs_nobody() {
    let stack = Stack::builder().workers(1).config(TWO_APPROVALS).start();
    let api = stack.api();
    let keys: Vec<Key> = (0..6).map(|_| api.issue("basic")).collect();
    let owned = api.issue_with(&json!({ "name": "o", "role": "basic", "owner": "acme" }));
    let second = api.with_key(&api.issue("admin").token);
    let_a_second_pass();

    let (_, path) = ask(&api, &json!({}));
    let withdrawn = second.send(Request::new("DELETE", &path)).expect(200).json();
    assert_eq!(withdrawn["withdrawn"]["reason"], "emergency", "{withdrawn}");
    approve(&second, &path).expect_problem(404, "not_found");
    second.send(Request::new("DELETE", &path)).expect_problem(404, "not_found");
    assert_eq!(waiting(&api), json!([]));
    stack.get("/api/chat", &keys[0].token).expect(200);

    // One of nine is not too many; breaking the glass for it breaks nothing.
    let body = json!({ "scope": { "owner": "acme" }, "break_glass": "in a hurry" });
    let answer = api.post(&format!("{REVOKE}?wait=applied&timeout=10s"), &body).expect(200).json();
    applied(&answer);
    assert!(answer.get("approval").is_none() && answer.get("break_glass").is_none(), "{answer}");
    stack.get("/api/chat", &owned.token).expect(401);
    stack.get("/api/chat", &keys[0].token).expect(200);
    assert_eq!(Metrics::of(&api).value("keygate_break_glass_total"), 0.0);
}

#[test]
fn breaking_the_glass_does_without_the_second_approval_and_is_loud() {
    let mut stack = Stack::builder().workers(2).config(TWO_APPROVALS).start();
    let api = stack.api();
    let keys: Vec<Key> = (0..3).map(|_| api.issue("basic")).collect();
    for justification in [String::new(), "  ".into(), "x".repeat(501)] {
        api.post(REVOKE, &json!({ "break_glass": justification })).expect_problem(400, "bad_request");
    }
    assert_eq!(Metrics::of(&api).value("keygate_break_glass_total"), 0.0);

    let body = json!({ "scope": { "role": "basic" }, "break_glass": "keys are on a public page" });
    let answer = api.post(&format!("{REVOKE}?wait=applied&timeout=10s"), &body).expect(200).json();
    applied(&answer);
    assert_eq!((&answer["break_glass"], &answer["keys"]), (&json!(true), &json!(3)), "{answer}");
    for key in &keys {
        stack.get("/api/chat", &key.token).expect_problem(401, "invalid_token");
    }
    assert_eq!(Metrics::of(&api).value("keygate_break_glass_total"), 1.0);
    stack.control_plane.stop();
    let kept = |path: std::path::PathBuf| std::fs::read_to_string(path).expect("a file");
    let log = kept(stack.control_plane.log());
    assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("on a public page")), "{log}");
    let journal = kept(stack.control_plane.data().join("journal.jsonl"));
    assert!(journal.contains(r#""break_glass":"keys are on a public page""#), "the journal has it");
}
