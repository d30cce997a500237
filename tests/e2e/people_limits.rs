//! Limits of people rather than of single keys: keys of one owner share one, and making keys is no way round it.

use keygate_e2e::{Api, Connection, Key, Redis, Request, Response, SOON, Stack, wait_until};
use serde_json::{Value, json};

use crate::redis_edits::wait_connected;

const LIMITS: &str = "/api/admin/rate_limits";
const POLICY: &str = "/api/admin/policy";

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

fn register(key: &Key) -> Request {
    Request::post("/api/auth/register", &json!({ "name": "e2e", "role": "basic" })).bearer(&key.token)
}

#[test]
fn an_override_in_redis_below_the_cost_of_a_route_is_refused() {
    let mut redis = Redis::new();
    redis.run();
    let stack = Stack::builder().limits().without_envoy().redis(&redis.url()).start();
    let api = stack.api();
    wait_connected(&api);
    let route = json!({ "name": "report", "path": "/report", "access": "key", "cost": 50 });
    api.send(Request::new("PUT", POLICY).json(&json!({ "routes": [route] }))).expect(200);
    redis.cli(&["SETEX", "rate_limits:emergency", "600", r#"{"basic": 49}"#]);
    wait_until(SOON, "the edit to be refused", || {
        let records = api.get("/api/admin/audit?action=edit_refused").expect(200).json();
        records["records"][0]["reason"]
            .as_str()
            .is_some_and(|why| why.contains("report") && why.contains("49"))
    });
    assert_eq!(api.get(LIMITS).expect(200).json()["emergency"], Value::Null);
    redis.cli(&["SETEX", "rate_limits:emergency", "600", r#"{"basic": 50}"#]);
    wait_until(SOON, "the next edit to be in force", || {
        api.get(LIMITS).expect(200).json()["emergency"]["limits"] == json!({ "basic": 50 })
    });
}

/// Makes a key through Envoy.
#[track_caller]
fn register_through(stack: &Stack, key: &Key) -> Key {
    let mut made = None;
    wait_until(SOON, "a key to be made", || {
        let answer = stack.call(&register(key));
        assert!(matches!(answer.status, 201 | 429), "{}", answer.text());
        made = (answer.status == 201).then(|| Key::from_answer(&answer.json()));
        made.is_some()
    });
    made.expect("a key")
}

#[track_caller]
fn put(api: &Api, path: &str, document: &Value) -> Value {
    api.send(Request::new("PUT", format!("{path}?wait=applied&timeout=10s")).json(document))
        .expect(200)
        .json()
}

/// Sends requests of all keys in turn until `most` have passed, then more, of which none may.
#[track_caller]
fn assert_share(workers: &mut [Connection], keys: &[&Key], most: usize) {
    let (mut passed, mut turn) = (0, 0);
    let count = workers.len();
    let mut ask = || {
        turn += 1;
        workers[turn % count].send(&chat(keys[turn % keys.len()])).status
    };
    // A burst may be refused a few milliseconds too early, until the proxy has asked for more.
    wait_until(SOON, "the limit to be spent", || {
        match ask() {
            200 => passed += 1,
            429 => {}
            other => panic!("{other}"),
        }
        passed >= most
    });
    for _ in 0..50 {
        assert_eq!(ask(), 429, "more than {most}");
    }
}

fn retry_after(answer: &Response) -> u64 {
    let wait = answer.header("retry-after").and_then(|seconds| seconds.parse().ok());
    wait.unwrap_or_else(|| panic!("no Retry-After: {}", answer.text()))
}

#[test]
fn keys_that_a_key_makes_or_that_renew_it_share_its_limit() {
    let stack = Stack::builder().limits().start();
    let api = stack.api();
    put(&api, LIMITS, &json!({ "roles": { "basic": { "requests": 20, "window": "1h" } } }));
    let first = api.issue_with(&json!({ "name": "first", "role": "basic", "expires_in": "1h" }));
    let mut workers = stack.envoy.connect_to_all_workers();
    // Each registration is a request of the limit, too.
    let made: Vec<Key> = (0..5).map(|_| register_through(&stack, &first)).collect();
    assert!(made.iter().all(|key| key.answer["owner"] == first.id.as_str()));
    let keys: Vec<&Key> = made.iter().chain([&first]).collect();
    assert_share(&mut workers, &keys, 15);

    // At the control plane's own port renewing costs nothing, and gives nothing.
    let renewed = api.call(&Request::post("/api/auth/refresh", &json!({})).bearer(&first.token)).expect(200);
    let renewed = Key::from_answer(&renewed.json());
    workers[0].send(&chat(&renewed)).expect_problem(429, "rate_limited");
    // Another one of the same role is not concerned.
    workers[0].send(&chat(&api.issue("basic"))).expect(200);
    wait_until(SOON, "it to be among the busiest", || {
        let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
        let busiest = &usage["keys"][0];
        busiest["key_id"] == first.id.as_str() && busiest["role"] == "basic" && busiest["used"] == 20
    });
}

#[test]
fn an_owner_has_a_limit_of_its_own_that_its_keys_share() {
    let stack = Stack::builder().limits().start();
    let api = stack.api();
    let owned = |role: &str| api.issue_with(&json!({ "name": "o", "role": role, "owner": "acme" }));
    let (one, other) = (owned("basic"), owned("contributor"));
    let shown = put(&api, LIMITS, &json!({ "owners": { "acme": 30, "free": -1 } }));
    let owners = json!({ "acme": { "requests": 30, "window": "1h" }, "free": { "requests": -1 } });
    assert_eq!(shown["owners"], owners);
    let mut workers = stack.envoy.connect_to_all_workers();
    assert_share(&mut workers, &[&one, &other], 30);
    wait_until(SOON, "it to be among the busiest", || {
        let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
        let busiest = &usage["keys"][0];
        let names = (&busiest["key_id"], &busiest["role"], &busiest["owner"]);
        names == (&Value::Null, &Value::Null, &json!("acme")) && busiest["used"] == 30
    });
    // A key's own limit counts before; without any, those of the roles do again.
    put(&api, LIMITS, &json!({ "keys": { &one.id: -1 } }));
    workers[0].send(&chat(&one)).expect(200);
    workers[0].send(&chat(&other)).expect_problem(429, "rate_limited");
    put(&api, LIMITS, &json!({ "owners": { "acme": null } }));
    workers[0].send(&chat(&other)).expect(200);
}

#[test]
fn making_keys_is_limited_at_the_api_and_through_envoy_alike() {
    let mut stack = Stack::builder().limits().start();
    let api = stack.api();
    put(&api, LIMITS, &json!({ "roles": { "basic": 4 } }));
    let maker = api.issue("basic");
    let child = Key::from_answer(&api.call(&register(&maker)).expect(201).json());
    for _ in 0..2 {
        api.call(&register(&child)).expect(201);
    }
    register_through(&stack, &maker);
    for key in [&maker, &child] {
        let wait = retry_after(&api.call(&register(key)).expect_problem(429, "rate_limited"));
        assert!((3_000..=3_600).contains(&wait), "{wait}");
    }
    stack.call(&register(&child)).expect_problem(429, "rate_limited");
    stack.control_plane.kill();
    stack.control_plane.start();
    let api = stack.api();
    api.call(&register(&child)).expect_problem(429, "rate_limited");
    // Administrators make as many as they like, and others within their own limit.
    for _ in 0..6 {
        api.issue("basic");
    }
    api.call(&register(&api.issue("basic"))).expect(201);
}

#[test]
fn a_route_that_costs_nothing_is_not_counted() {
    let stack = Stack::builder().limits().start();
    let api = stack.api();
    let mut policy = api.get(POLICY).expect(200).json();
    let routes = policy["routes"].as_array_mut().expect("routes");
    let read = routes.iter_mut().find(|route| route["name"] == "chat_read").expect("a route");
    read["cost"] = 0.into();
    put(&api, POLICY, &json!({ "routes": routes }));
    put(&api, LIMITS, &json!({ "roles": { "basic": 5 } }));
    let key = api.issue("basic");
    let mut workers = stack.envoy.connect_to_all_workers();
    let count = workers.len();
    for turn in 0..40 {
        let answer = workers[turn % count].send(&chat(&key)).expect(200);
        assert_eq!(answer.header("x-ratelimit-limit"), None);
    }
    let write = Request::post("/api/chat", &json!({})).bearer(&key.token);
    let mut passed = 0;
    wait_until(SOON, "what costs something to pass", || {
        passed += u32::from(stack.call(&write).status == 200);
        passed == 5
    });
    stack.call(&write).expect_problem(429, "rate_limited");
    workers[0].send(&chat(&key)).expect(200);
}

#[test]
fn a_cost_above_a_limit_is_refused_from_both_sides() {
    let stack = Stack::builder().limits().without_envoy().start();
    let api = stack.api();
    let with_cost = |cost: u32| {
        let route = json!({ "name": "chat_read", "path": "/api/chat", "access": "key", "scopes": ["chat:read"], "cost": cost });
        json!({ "routes": [route] })
    };
    let send =
        |method: &str, path: &str, document: &Value| api.send(Request::new(method, path).json(document));
    #[track_caller]
    fn assert_refused(answer: &Response, limit: &str) {
        let problem = answer.json();
        let error = &problem["errors"][0];
        assert_eq!((&error["route"], &error["code"]), (&json!("chat_read"), &json!("cost_above_limit")));
        for detail in [&problem["detail"], &error["detail"]] {
            assert!(detail.as_str().is_some_and(|detail| detail.contains(limit)), "{problem}");
        }
    }
    let before = api.get(POLICY).expect(200).json();
    assert_refused(&send("PUT", POLICY, &with_cost(101)).expect(400), "role \"basic\" is 100");
    assert_eq!(api.get(POLICY).expect(200).json(), before);
    send("PUT", POLICY, &with_cost(100)).expect(200);
    assert_refused(
        &send("PUT", LIMITS, &json!({ "roles": { "basic": 99 } })).expect(400),
        "role \"basic\" is 99",
    );
    assert_refused(
        &send("PUT", LIMITS, &json!({ "owners": { "acme": 9 } })).expect(400),
        "owner \"acme\" is 9",
    );
    let emergency = format!("{LIMITS}/emergency");
    assert_refused(
        &send("POST", &emergency, &json!({ "limits": { "basic": 10 } })).expect(400),
        "override, is 10",
    );
    send("PUT", LIMITS, &json!({ "roles": { "basic": 0 } })).expect(200);
}
