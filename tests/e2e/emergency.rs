//! Emergency measures: a lockdown holds everywhere at once, spares whom it should, and ends by itself; a cut-off
//! that ends many keys needs two who want it.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use keygate_core::sync::wire::{Answer, Body, FORMAT};
use keygate_core::version::Version;
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Key, Request, Response, SOON, Stack, Times, http, wait_until};
use serde_json::{Value, json};

use crate::requests::assert_serves;

const PATH: &str = "/api/admin/emergency/lockdown";
const REVOKE: &str = "/api/admin/emergency/revoke";
const TWO_APPROVALS: &str = "[emergency]\nsecond_approval_threshold = 0.25";

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
        json!({ "owner": "o".repeat(129) }),
        json!({ "owner": "with space" }),
    ] {
        let answer = api.post(REVOKE, &json!({ "scope": scope }));
        answer.expect_problem(400, "bad_request");
    }
}

#[test]
fn rules_that_no_proxy_could_take_are_refused_before_they_are_journalled() {
    let mut stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let key = api.issue("basic");
    // As large a policy as there may be, and cut-offs until both together are too much.
    let policy = api.get("/api/admin/policy").expect(200).json();
    let mut routes = policy["routes"].as_array().expect("routes").clone();
    let padding = "x".repeat(200);
    let size = |routes: &Vec<Value>| json!(routes).to_string().len();
    while size(&routes) < 170 * 1024 {
        let number = routes.len();
        routes.push(json!({ "name": format!("r{number}"), "path": format!("/{padding}/{number}"), "access": "public" }));
    }
    let put = Request::new("PUT", "/api/admin/policy?wait=applied&timeout=10s")
        .header("content-type", "application/json")
        .body(json!({ "routes": routes }).to_string());
    applied(&api.send(put).expect(200).json());
    let refused = (0..256)
        .map(|number| {
            let owner = format!("{number:0128}");
            api.post(REVOKE, &json!({ "scope": { "owner": owner, "role": "basic" } }))
        })
        .find(|answer| answer.status != 200)
        .expect("it gets too much");
    refused.expect_problem(409, "rules_do_not_hold");

    // All that was answered is in force, and a restart finds nothing wrong.
    stack.get("/api/chat", &key.token).expect(200);
    api.revoke(&key.id).expect_everywhere(1);
    stack.get("/api/chat", &key.token).expect(401);
    stack.control_plane.stop();
    stack.control_plane.start();
    stack.api().get("/api/admin/emergency").expect(200);
}

/// Asks for news as a proxy does; the answer and its bytes.
fn poll(stack: &Stack, applied: Option<Version>, wait_ms: u64) -> (Answer, usize) {
    let mut body = json!({
        "format": FORMAT,
        "proxy": { "id": "listener", "incarnation": "1", "filter": "none" },
        "wait_ms": wait_ms,
    });
    if let Some(applied) = applied {
        body["applied"] = serde_json::to_value(applied).expect("JSON");
    }
    let request = Request::post("/sync/v1/poll", &body).bearer(stack.fleet_token());
    let answer = http::call(stack.control_plane.sync_port(), &request).expect(200);
    (Answer::decode(&answer.body).expect("an answer to a poll"), answer.body.len())
}

#[test]
fn a_cutoff_of_many_keys_costs_what_one_key_costs() {
    const OWNERS: usize = 8;
    const KEYS_EACH: usize = 50;

    let stack = Stack::start();
    let api = stack.api();
    let owned = |owner: usize| -> Vec<Key> {
        let body = json!({ "name": "k", "role": "basic", "owner": format!("owner-{owner}") });
        (0..KEYS_EACH).map(|_| api.issue_with(&body)).collect()
    };
    let owners: Vec<Vec<Key>> = (0..OWNERS).map(owned).collect();
    let mut workers = stack.envoy.connect_to_all_workers();
    let (first, first_bytes) = poll(&stack, None, 0);
    println!("the whole state: {first_bytes} bytes");
    poll(&stack, Some(first.version), 0);

    let (mut single, mut many) = (Times::default(), Times::default());
    let (mut single_bytes, mut many_bytes) = (Vec::new(), Vec::new());
    let version = std::cell::Cell::new(first.version);
    // Makes a change while a poll waits for it: how long until all enforce it, and the poll's answer.
    let change = |path: &str, body: &Value| {
        std::thread::scope(|scope| {
            let (to_ask, asked) = channel();
            let before = version.get();
            let (stack, api) = (&stack, &api);
            let waiting = scope.spawn(move || {
                to_ask.send(()).expect("the test waits");
                let (answer, bytes) = poll(stack, Some(before), 20_000);
                poll(stack, Some(answer.version), 0);
                (answer, bytes)
            });
            asked.recv_timeout(SOON).expect("a thread");
            let begun = Instant::now();
            applied(&api.post(&format!("{path}?wait=applied&timeout=10s"), body).expect(200).json());
            let took = begun.elapsed();
            let (answer, bytes) = waiting.join().expect("an answer");
            version.set(answer.version);
            (took, answer, bytes)
        })
    };

    for keys in &owners {
        let key = &keys[0];
        workers[0].send(&Request::get("/api/chat").bearer(&key.token)).expect(200);
        let path = format!("/api/admin/keys/{}/revoke", key.id);
        let (took, answer, bytes) = change(&path, &json!({ "reason": "compromised" }));
        assert!(matches!(answer.body, Body::Delta { ref ops, .. } if ops.len() == 1), "{answer:?}");
        single.add(took);
        single_bytes.push(bytes);
    }
    for (owner, keys) in owners.iter().enumerate() {
        for key in &keys[1..] {
            workers[0].send(&Request::get("/api/chat").bearer(&key.token)).expect(200);
        }
        let scope = json!({ "scope": { "owner": format!("owner-{owner}") } });
        let before = version.get();
        let (took, answer, bytes) = change("/api/admin/emergency/revoke", &scope);
        // One version for all of them.
        assert_eq!((answer.version.source, answer.version.seq), (before.source, before.seq + 1));
        assert!(matches!(answer.body, Body::Delta { ref ops, .. } if ops.is_empty()), "{answer:?}");
        for key in keys {
            for connection in &mut workers {
                connection.send(&Request::get("/api/chat").bearer(&key.token)).expect(401);
            }
        }
        many.add(took);
        many_bytes.push(bytes);
    }
    println!("one key, to applied: {single}; answers of {single_bytes:?} bytes");
    println!("{KEYS_EACH} keys by a cut-off, to applied: {many}; answers of {many_bytes:?} bytes");
    assert!(single_bytes.iter().all(|bytes| *bytes <= 100), "{single_bytes:?}");
    // The rules as a whole, whatever the number of keys, with this cut-off and those before it.
    for (number, bytes) in many_bytes.iter().enumerate() {
        assert!(*bytes < first_bytes + 200 * (number + 1), "{many_bytes:?}");
    }
    assert!(many.at(50) < single.at(50) + Duration::from_millis(250), "{many} and {single}");
}

#[test]
fn a_cutoff_is_an_answer_below_a_kilobyte() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    api.issue_with(&json!({ "name": "k", "role": "basic", "owner": "acme" }));
    let (before, _) = poll(&stack, None, 0);
    let scope = json!({ "scope": { "owner": "acme" } });
    api.post("/api/admin/emergency/revoke", &scope).expect(200);
    let (_, bytes) = poll(&stack, Some(before.version), 0);
    assert!(bytes < 1024, "{bytes} bytes");
}

/// Asks for a cut-off that needs a second approval: its answer, and the path of the approval.
#[track_caller]
fn ask(api: &Api, scope: &Value) -> (Value, String) {
    let answer = api.post(&format!("{REVOKE}?wait=applied&timeout=10s"), &json!({ "scope": scope }));
    let answer = answer.expect(202).json();
    assert!(answer.get("propagation").is_none(), "there is nothing to wait for: {answer}");
    let id = answer["approval"]["id"].as_str().expect("an id");
    let path = format!("/api/admin/emergency/approvals/{id}");
    assert_eq!(answer["approval"]["approve"], format!("POST {path}"));
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
    assert_eq!(answer["ends_approver"], false, "{answer}");
    stack.control_plane.kill();
    stack.control_plane.start();
    let shown = api.get("/api/admin/emergency").expect(200).json();
    let in_force = &shown["cutoffs"][0];
    assert_eq!(
        (shown["cutoffs"].as_array().map(Vec::len), &shown["active"]),
        (Some(1), &json!(true)),
        "{shown}"
    );
    for (member, value) in asked["cutoff"].as_object().expect("members") {
        assert_eq!(&in_force[member], value, "{member}");
    }
    for (member, value) in [
        ("approved_by", &answer["approved_by"]),
        ("by", &answer["approved_by"]),
        ("requested_by", &answer["requested_by"]),
        ("reason", &json!("emergency")),
    ] {
        assert_eq!(&in_force[member], value, "{member}");
    }
    assert!(in_force["since"].as_str().is_some_and(|since| since.ends_with('Z')), "{in_force}");
    approve(&second, &path).expect_problem(404, "not_found");
    assert_eq!(Metrics::of(&api).value("keygate_break_glass_total"), 0.0);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn whoever_approves_falls_under_it_like_others_and_whoever_asked_lifts_it() {
    let stack = Stack::builder().workers(1).config(TWO_APPROVALS).start();
    let api = stack.api();
    let (basic, second) = (api.issue("basic"), api.with_key(&api.issue("admin").token));
    let_a_second_pass();
    let (_, path) = ask(&api, &json!({}));
    let answer = approve(&second, &path).expect(200).json();
    applied(&answer);
    assert_eq!(answer["ends_approver"], true, "{answer}");
    stack.get("/api/chat", &basic.token).expect(401);
    second.get("/api/admin/emergency").expect_problem(401, "invalid_token");

    let id = answer["cutoff"]["id"].as_str().expect("an id");
    let lift = Request::new("DELETE", format!("{REVOKE}/{id}?wait=applied&timeout=10s"));
    applied(&api.send(lift).expect(200).json());
    stack.get("/api/chat", &basic.token).expect(200);
    assert_eq!(second.get("/api/admin/emergency").expect(200).json()["cutoffs"], json!([]));
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
    let in_force = api.get("/api/admin/emergency").expect(200).json()["cutoffs"].clone();
    assert_eq!(in_force[0]["break_glass"], "keys are on a public page", "{in_force}");
    stack.control_plane.stop();
    let kept = |path: std::path::PathBuf| std::fs::read_to_string(path).expect("a file");
    let log = kept(stack.control_plane.log());
    assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("on a public page")), "{log}");
    let journal = kept(stack.control_plane.data().join("journal/00000000000000000001.jsonl"));
    assert!(journal.contains(r#""break_glass":"keys are on a public page""#), "the journal has it");
}

#[test]
fn a_key_issued_right_after_a_mass_revocation_lives_and_one_right_before_does_not() {
    let stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let chat = |key: &Key| stack.get("/api/chat", &key.token).status;
    for _ in 0..5 {
        let before: Vec<Key> = (0..2).map(|_| api.issue("basic")).collect();
        let other = api.issue("contributor");
        let cut =
            api.post("/api/admin/emergency/revoke?wait=applied", &json!({ "scope": { "role": "basic" } }));
        let cut = cut.expect(200).json();
        let after = api.issue("basic");
        assert_eq!(before.iter().map(chat).collect::<Vec<_>>(), [401, 401], "{cut}");
        assert_eq!((chat(&after), chat(&other)), (200, 200), "{cut}");
        assert!(cut["by_role"]["basic"].as_u64() >= Some(2), "{cut}");
        // Once it is lifted, the earlier keys are valid again.
        let lift = format!("{REVOKE}/{}?wait=applied", cut["cutoff"]["id"].as_str().expect("an id"));
        api.send(Request::new("DELETE", &lift)).expect(200);
        assert_eq!(before.iter().map(chat).collect::<Vec<_>>(), [200, 200]);
    }
}
