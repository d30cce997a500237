//! Limits over the whole fleet: never more than the limit in any window, hardly ever less, and no hop per request.

use std::time::{Duration, Instant};

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::metrics::Metrics;
use keygate_e2e::overload::admitted;
use keygate_e2e::{Api, Connection, Envoy, Key, Redis, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

const LIMITS: &str = "/api/admin/rate_limits";

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

#[track_caller]
fn put(api: &Api, document: &Value) -> Value {
    api.send(Request::new("PUT", format!("{LIMITS}?wait=applied&timeout=10s")).json(document))
        .expect(200)
        .json()
}

#[test]
fn a_key_is_told_what_is_left_and_refused_beyond_its_limit() {
    let stack = Stack::builder().workers(4).limits().start();
    let api = stack.api();
    put(&api, &json!({ "roles": { "basic": { "requests": 20, "window": "1h" } } }));
    let (key, admin) = (api.issue("basic"), api.issue("admin"));
    let mut workers = stack.envoy.connect_to_all_workers();
    let mut turn = 0;
    let mut ask = || {
        turn += 1;
        let count = workers.len();
        workers[turn % count].send(&chat(&key))
    };
    for left in (0..20).rev() {
        let answer = ask().expect(200);
        assert_eq!(answer.header("x-ratelimit-limit"), Some("20"));
        assert_eq!(answer.header("x-ratelimit-remaining"), Some(left.to_string().as_str()));
    }
    let mut refused = ask().expect_problem(429, "rate_limited");
    for _ in 0..50 {
        refused = ask().expect_problem(429, "rate_limited");
    }
    let header = |name: &str| refused.header(name).and_then(|value| value.parse::<u64>().ok());
    assert_eq!((header("x-ratelimit-limit"), header("x-ratelimit-remaining")), (Some(20), Some(0)));
    let wait = header("retry-after").expect("when to retry");
    assert!((1..=3_600).contains(&wait), "{wait}");
    assert_eq!(header("x-ratelimit-reset"), Some(wait));

    // Another key of the same role has its own, and who has no limit is told of none.
    let other = api.issue("basic");
    workers[0].send(&chat(&other)).expect(200);
    let unlimited = workers[0].send(&Request::get("/api/chat").bearer(&admin.token)).expect(200);
    assert_eq!(unlimited.header("x-ratelimit-limit"), None);
    wait_until(SOON, "it to be counted", || {
        Metrics::of(&api).sum("rate_limit_exceeded_total{", &["role=\"basic\"", "endpoint=\"chat_read\""]) > 0
    });

    wait_until(SOON, "it to be among the busiest", || {
        let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
        usage["keys"][0]["key_id"] == key.id.as_str() && usage["keys"][0]["used"] == 20
    });

    // By key, and as a whole of its own.
    put(&api, &json!({ "keys": { &key.id: -1 } }));
    workers[0].send(&chat(&key)).expect(200);
    put(&api, &json!({ "keys": { &key.id: null } }));
    workers[0].send(&chat(&key)).expect_problem(429, "rate_limited");
}

/// What must be admitted of a limit, at least.
fn least(limit: u32) -> usize {
    limit as usize * 98 / 100
}

#[test]
fn three_proxies_at_five_times_the_limit_admit_it_and_no_more() {
    let stack = Stack::builder().workers(4).limits().start();
    let others = stack.two_more_envoys(4);
    let envoys = [&stack.envoy, &others[0], &others[1]];
    let api = stack.api();
    let questions = || Metrics::of(&api).value("keygate_quota_requests_total");

    for (limit, window_s, during_s, per_second) in
        [(100, 3_600, 4, 250), (1_000, 3_600, 5, 1_000), (10_000, 3_600, 20, 2_500), (50, 1, 10, 250)]
    {
        let key = api.issue("contributor");
        let window = format!("{window_s}s");
        put(&api, &json!({ "keys": { &key.id: { "requests": limit, "window": window } } }));
        let before = questions();
        let during = Duration::from_secs(during_s);
        let admitted = admitted(&envoys, &chat(&key), during, per_second);
        let most = admitted.most_in(Duration::from_secs(window_s));
        let windows = (admitted.took.as_secs_f64() / window_s as f64).max(1.0);
        let share = admitted.times.len() as f64 / (f64::from(limit) * windows);
        let all = admitted.times.len() as u64 + admitted.refused;
        let calls = (questions() - before) * 1_000.0 / all as f64;
        println!(
            "{limit} in {window}: {} of {all} requests admitted, {:.1} % of the limit, at most {most} in a window; {calls:.1} calls for 1,000 requests",
            admitted.times.len(),
            share * 100.0,
        );
        assert!(most <= limit as usize, "{most} of {limit} within a window");
        // Where a window is a second, a unit that is free waits for the next request at its proxy.
        let wanted = if window_s == 1 { f64::from(limit) * 0.95 } else { least(limit) as f64 };
        assert!(share * f64::from(limit) >= wanted, "{share}");
    }
}

#[test]
fn never_more_when_proxies_and_the_control_plane_are_killed() {
    let mut stack = Stack::builder().workers(4).limits().start();
    let mut other = stack.another_envoy("envoy-2", 2);
    let api = stack.api();
    wait_until(SOON, "both proxies in the fleet", || api.fleet().len() == 2);
    let limit = 300;
    let key = api.issue("contributor");
    put(&api, &json!({ "keys": { &key.id: { "requests": limit, "window": "1h" } } }));
    let mut all = 0;
    let mut send = |envoys: &[&Envoy]| {
        all += admitted(envoys, &chat(&key), Duration::from_millis(600), 150).times.len();
        assert!(all <= limit, "{all} of {limit}");
        all
    };
    // What a proxy has reported when it is killed is not admitted once more.
    let reported = |api: &Api, all: usize| {
        wait_until(SOON, "all of it to be reported", || {
            let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
            usage["keys"][0]["used"].as_u64() == Some(all as u64)
        });
    };
    send(&[&stack.envoy, &other]);
    stack.control_plane.kill();
    send(&[&stack.envoy, &other]);
    stack.control_plane.start();
    reported(&api, send(&[&stack.envoy, &other]));
    other.kill();
    other.start(&stack.neighbours());
    other.wait_ready();
    reported(&api, send(&[&stack.envoy, &other]));
    stack.control_plane.kill();
    other.kill();
    stack.control_plane.start();
    other.start(&stack.neighbours());
    other.wait_ready();
    for _ in 0..4 {
        send(&[&stack.envoy, &other]);
    }
    println!("{all} of {limit} were admitted over two kills of a proxy and two of the control plane");
    assert!(all >= least(limit as u32), "{all}");
}

#[test]
fn never_more_when_answers_come_two_seconds_late() {
    let stack = Stack::builder().workers(4).limits().start();
    let other = stack.another_envoy("envoy-2", 2);
    let envoys = [&stack.envoy, &other];
    let api = stack.api();
    wait_until(SOON, "both proxies in the fleet", || api.fleet().len() == 2);
    let limit = 400;
    let key = api.issue("contributor");
    put(&api, &json!({ "keys": { &key.id: { "requests": limit, "window": "1h" } } }));
    let mut all = 0;
    for _ in 0..3 {
        // It stands still for two seconds, and then answers what was asked meanwhile.
        stack.control_plane.pause();
        all += admitted(&envoys, &chat(&key), Duration::from_secs(2), 150).times.len();
        stack.control_plane.resume();
        all += admitted(&envoys, &chat(&key), Duration::from_millis(500), 150).times.len();
        assert!(all <= limit, "{all} of {limit}");
    }
    println!("{all} of {limit} were admitted with answers up to 2 s late");
    // Once they come in time again, the rest is, and no more.
    all += admitted(&envoys, &chat(&key), Duration::from_secs(5), 300).times.len();
    println!("{all} five seconds later");
    assert!((least(limit as u32)..=limit).contains(&all), "{all} of {limit}");
}

#[test]
fn an_override_holds_at_once_and_ends_by_itself() {
    let mut redis = Redis::new();
    redis.run();
    let stack = Stack::builder().workers(4).limits().redis(&redis.url()).start();
    let api = stack.api();
    put(&api, &json!({ "roles": { "basic": 5 } }));
    let key = api.issue("basic");
    let mut worker = stack.envoy.connect();
    let mut limit = || {
        let answer = worker.send(&chat(&key));
        answer.header("x-ratelimit-limit").and_then(|limit| limit.parse::<u32>().ok())
    };
    assert_eq!(limit(), Some(5));
    let body = json!({ "limits": { "basic": 50 }, "ttl": "3s" });
    let answer = api.post(&format!("{LIMITS}/emergency?wait=applied&timeout=5s"), &body).expect(200).json();
    assert_eq!(answer["emergency"]["limits"], json!({ "basic": 50 }), "{answer}");
    assert_eq!(limit(), Some(50));
    wait_until(Duration::from_secs(5), "its end", || limit() == Some(5));

    let key_of = "rate_limits:emergency";
    redis.cli(&["SETEX", key_of, "3", r#"{"basic": 70, "node_operator": -1}"#]);
    wait_until(Duration::from_secs(1), "the edit", || limit() == Some(70));
    wait_until(Duration::from_secs(5), "its end", || limit() == Some(5));
    redis.cli(&["SETEX", key_of, "3600", r#"{"basic": 70}"#]);
    wait_until(Duration::from_secs(1), "the edit", || limit() == Some(70));
    redis.cli(&["DEL", key_of]);
    wait_until(Duration::from_secs(1), "it to be lifted", || limit() == Some(5));
    api.post(&format!("{LIMITS}/emergency"), &json!({ "limits": { "nobody": 1 } }))
        .expect_problem(400, "bad_request");
    api.send(Request::new("PUT", LIMITS).json(&json!({ "roles": { "basic": "many" } })))
        .expect_problem(400, "bad_request");
}

/// How many of some requests, one after the other, are admitted by a proxy.
fn count_admitted(envoy: &Envoy, key: &Key, requests: usize) -> usize {
    let mut workers: Vec<Connection> = (0..envoy.workers()).map(|_| envoy.connect()).collect();
    let count = workers.len();
    (0..requests)
        .filter(|turn| {
            keygate_e2e::wait::pass(Duration::from_millis(2));
            let status = workers[turn % count].send(&chat(key)).status;
            assert!(matches!(status, 200 | 429 | 503), "{status}");
            status == 200
        })
        .count()
}

#[test]
fn proxies_that_are_drained_and_replaced_leave_limits_whole() {
    let stack = Stack::builder().workers(4).limits().start();
    let api = stack.api();
    let key = api.issue("contributor");
    let limit = 1_000;
    put(&api, &json!({ "keys": { &key.id: { "requests": limit, "window": "1h" } } }));
    let mut spent = 0;
    for round in 0..3 {
        let node = format!("pod-{round}");
        let mut envoy = stack.another_envoy(&node, 2);
        spent += count_admitted(&envoy, &key, 5);
        let answer = api.post("/api/admin/fleet/drain", &json!({ "proxy": node })).expect(200).json();
        assert_eq!(answer, json!({ "proxy": node, "drained": true }));
        // What its VMs had drawn counts as spent, and may be. Then it has nothing, says so, and is not ready.
        wait_until(SOON, "nothing to be left", || {
            let status = envoy.call(&chat(&key)).status;
            spent += usize::from(status == 200);
            status == 503
        });
        assert_eq!(envoy.ready_status(), Some(503));
        let fleet = api.fleet();
        let drained = |id: &str| {
            let of_id = |proxy: &&Value| proxy["id"] == id;
            fleet.iter().filter(of_id).all(|proxy| proxy["drained"] == true)
        };
        assert!(drained(&node) && !drained("envoy-1"), "{fleet:?}");
        envoy.kill();
    }
    let begun = Instant::now();
    while spent < least(limit as u32) && begun.elapsed() < Duration::from_secs(20) {
        spent += count_admitted(&stack.envoy, &key, 100);
    }
    println!("{spent} of {limit} after three proxies came and went, in {} ms", begun.elapsed().as_millis());
    assert!((least(limit as u32)..=limit).contains(&spent), "{spent} of {limit}");

    // The same for a pod's preStop hook, with what the proxy has: the fleet token.
    let port = stack.control_plane.sync_port();
    let ask = |token: &str, node: &str| {
        let body = json!({ "format": 1, "proxy": node });
        let request = Request::new("POST", "/sync/v1/drain").bearer(token).json(&body);
        keygate_e2e::http::try_call(port, &request).expect("an answer")
    };
    ask("wrong", "envoy-1").expect_problem(401, "invalid_token");
    ask(&stack.fleet_token(), "nobody").expect_problem(404, "not_found");
    ask(&stack.fleet_token(), "envoy-1").expect(200);
    wait_until(SOON, "nothing to be left", || stack.envoy.call(&chat(&key)).status == 503);
}

#[test]
fn a_limit_is_one_over_two_control_planes_and_outlives_the_one_that_divides_it() {
    let mut redis = Redis::start();
    let mut stack = Stack::builder().limits().workers(2).redis(&redis.url()).start();
    let elsewhere = tempfile::tempdir().expect("a directory");
    let mut other = ControlPlane::beside(&stack.control_plane, elsewhere.path());
    other.use_variable("KEYGATE_LIMITS_ENFORCE", "true");
    other.use_redis(&redis.url());
    other.start();
    let envoy = stack.another_envoy_of(&other, "envoy-b", 2);
    let api = stack.api();
    let there = Api::new(other.api_port(), &stack.control_plane.admin_key());
    let keeps = |api: &Api| Metrics::of(api).value("keygate_quota_owner") > 0.0;
    assert_eq!((keeps(&api), keeps(&there)), (true, false));
    let usage = there.get(&format!("{LIMITS}/usage")).expect(200).json();
    assert_eq!(usage["keeper"]["here"], false, "{usage}");

    let limit = 400;
    let limit_to = |key: &Key| {
        wait_until(SOON, "the other one to know the key", || {
            there.get(&format!("/api/admin/keys/{}", key.id)).status == 200
        });
        for api in [&there, &api] {
            put(api, &json!({ "keys": { &key.id: { "requests": limit, "window": "1h" } } }));
        }
    };

    // What was passed on once is not passed on again.
    let drain = Request::new("POST", "/sync/v1/drain").bearer(stack.fleet_token());
    let drain = drain.json(&json!({ "format": 1, "proxy": "nobody" }));
    let ask = |request: &Request| keygate_e2e::http::try_call(other.sync_port(), request).expect("an answer");
    ask(&drain).expect_problem(404, "not_found");
    ask(&drain.header("keygate-forwarded", "1")).expect_problem(503, "unavailable");

    // Half of the limit with Redis, the rest without.
    let key = api.issue("contributor");
    limit_to(&key);
    let envoys = [&stack.envoy, &envoy];
    let mut all = admitted(&envoys, &chat(&key), Duration::from_secs(1), 150).times.len();
    redis.kill();
    for _ in 0..4 {
        all += admitted(&envoys, &chat(&key), Duration::from_secs(1), 300).times.len();
    }
    println!("{all} of {limit} were admitted at proxies of two control planes");
    assert!((limit * 95 / 100..=limit).contains(&all), "{all} of {limit}");
    redis.run();

    // The one that divides dies, for good: proxies go on with what they have, and the other one takes over.
    let key = api.issue("contributor");
    limit_to(&key);
    let mut all = count_admitted(&envoy, &key, 2);
    let before = all;
    stack.control_plane.kill();
    all += count_admitted(&envoy, &key, 20);
    assert!(all > before, "its fair share");
    wait_until(SOON, "failures to pass questions on", || {
        Metrics::of(&there).value("keygate_quota_forward_failures_total") > 0.0
    });
    there.post(&format!("{LIMITS}/ledger/takeover"), &json!({})).expect(200);
    wait_until(SOON, "the other one to divide limits", || keeps(&there));
    assert_eq!(Metrics::of(&there).value("keygate_quota_recovering"), 1.0);
    wait_until(SOON, "its proxy to be answered by it", || {
        Metrics::of(&there).value("keygate_quota_requests_total") > 0.0
    });
    all += count_admitted(&envoy, &key, 300);

    // The first one comes back, and knows.
    stack.control_plane.start();
    wait_until(SOON, "the first one to pass on", || !keeps(&api));
    all += count_admitted(&stack.envoy, &key, 300);
    println!("{all} of {limit} over a change of who divides it");
    assert!((limit / 2..=limit).contains(&all), "{all} of {limit}");
    assert_eq!((keeps(&api), keeps(&there)), (false, true));
    let taken = there.get("/api/admin/audit?action=quota_owner_changed").expect(200).json();
    assert_eq!(taken["records"].as_array().map(Vec::len), Some(2), "{taken}");
}
