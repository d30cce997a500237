//! Limits at first contact: bursts of new keys, small limits over several proxies, costs, restarts in every order, and the
//! loss of the control plane that keeps the ledger. A request is never refused for a window while units are left.

use std::time::{Duration, Instant};

use keygate_e2e::burst::{burst, retry_after};
use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Envoy, Key, Redis, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

const LIMITS: &str = "/api/admin/rate_limits";

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

#[track_caller]
fn put(api: &Api, path: &str, document: &Value) {
    api.send(Request::new("PUT", format!("{path}?wait=applied&timeout=10s")).json(document)).expect(200);
}

#[track_caller]
fn limit_key(api: &Api, key: &Key, limit: usize) {
    put(api, LIMITS, &json!({ "keys": { &key.id: { "requests": limit, "window": "1h" } } }));
}

/// At least 98 % of a limit.
fn least(limit: usize) -> usize {
    (limit * 98).div_ceil(100)
}

#[test]
fn alone_a_proxy_admits_a_whole_limit_in_a_burst() {
    let stack = Stack::builder().workers(4).limits().start();
    let api = stack.api();
    for turn in 0..10 {
        let key = api.issue("basic");
        for connections in [1, 6] {
            let key = if connections == 1 { &key } else { &api.issue("basic") };
            let got = burst(&stack.envoy, &chat(key), 160, connections);
            println!(
                "key {turn}, {connections} connections: {} of 100 admitted, {} pending, {} exhausted, in {} ms",
                got.admitted,
                got.pending,
                got.exhausted,
                got.took.as_millis()
            );
            assert!((98..=100).contains(&got.admitted), "{} admitted", got.admitted);
            // Answers on other connections may be on their way.
            assert!(got.before_exhausted + connections > 98, "{} before a refusal", got.before_exhausted);
        }
    }
    let key = api.issue("contributor");
    let got = burst(&stack.envoy, &chat(&key), 1_100, 6);
    println!("{} of 1,000 admitted, {} pending", got.admitted, got.pending);
    assert!((980..=1_000).contains(&got.admitted), "{}", got.admitted);
}

#[test]
fn small_limits_and_dear_requests_are_admitted_at_once() {
    let stack = Stack::builder().workers(4).limits().start();
    let api = stack.api();
    put(
        &api,
        "/api/admin/policy",
        &json!({ "routes": [
            { "name": "report", "path": "/report", "access": "key", "cost": 50 },
            { "name": "open", "path": "/open", "access": "public" },
            { "name": "chat_read", "path": "/api/chat", "access": "key" },
        ] }),
    );
    put(&api, LIMITS, &json!({ "public": { "requests": 3, "window": "1m" } }));
    let key = api.issue("basic");
    let report = Request::get("/report").bearer(&key.token);
    for _ in 0..2 {
        stack.call(&report).expect(200);
    }
    let refused = stack.call(&report).expect_problem(429, "rate_limited");
    assert!(retry_after(&refused) > 3_000, "an hour later");
    let mut worker = stack.envoy.connect();
    for left in ["2", "1", "0"] {
        let answer = worker.send(&Request::get("/open")).expect(200);
        assert_eq!(answer.header("x-ratelimit-remaining"), Some(left));
    }
    let refused = worker.send(&Request::get("/open")).expect_problem(429, "rate_limited");
    assert!((50..=60).contains(&retry_after(&refused)));
}

#[test]
fn a_burst_at_one_of_three_proxies_gets_what_the_idle_ones_have() {
    let stack = Stack::builder().workers(4).limits().start();
    let others = stack.two_more_envoys(2);
    let api = stack.api();
    for _ in 0..3 {
        let key = api.issue("basic");
        let mut got = burst(&stack.envoy, &chat(&key), 150, 6);
        println!(
            "{} of 100 admitted, {} pending, {} exhausted, in {} ms",
            got.admitted,
            got.pending,
            got.exhausted,
            got.took.as_millis()
        );
        let mut all = got.admitted;
        assert!(got.exhausted == 0 || got.before_exhausted + 6 > 98, "{}", got.before_exhausted);
        if stack.envoy.has_module() {
            assert!(all >= 98, "{all} without a retry");
        } else {
            // Each that was told so comes again, once.
            keygate_e2e::wait::pass(Duration::from_secs(1));
            got = burst(&stack.envoy, &chat(&key), got.pending, 6);
            println!("{} more after a second, {} pending", got.admitted, got.pending);
            all += got.admitted;
        }
        assert!((98..=100).contains(&all), "{all}");
    }
    drop(others);
}

/// What a client that heeds `Retry-After: 1` does until it passes; how many tries it took.
#[track_caller]
fn patiently(envoy: &Envoy, request: &Request) -> usize {
    for tries in 1..=3 {
        let answer = envoy.call(request);
        match answer.status {
            200 => return tries,
            429 => assert_eq!(retry_after(&answer), 1, "before the limit is reached"),
            other => panic!("{other}: {}", answer.text()),
        }
        keygate_e2e::wait::pass(Duration::from_secs(1));
    }
    panic!("units are left, and three tries did not get one");
}

#[test]
fn small_limits_over_three_proxies_are_admitted_whole() {
    let stack = Stack::builder().workers(4).limits().start();
    let others = stack.two_more_envoys(2);
    let envoys = [&stack.envoy, &others[0], &others[1]];
    let api = stack.api();
    let most_tries = if stack.envoy.has_module() { 1 } else { 2 };
    for limit in [1, 2, 5, 8] {
        let key = api.issue("basic");
        limit_key(&api, &key, limit);
        for turn in 0..limit {
            println!("limit {limit}, turn {turn}");
            let tries = patiently(envoys[turn % 3], &chat(&key));
            assert!(turn > 0 || tries <= most_tries, "{tries} tries for the first request of {limit}");
        }
        // Once all know that it is spent, all say until when.
        wait_until(SOON, "every proxy to know", || {
            let mut answers = envoys.iter().map(|envoy| envoy.call(&chat(&key)));
            answers.all(|answer| {
                assert_eq!(answer.status, 429, "more than {limit}");
                retry_after(&answer) > 3_000
            })
        });
    }
}

/// Waits until the ledger knows that a key was used so often.
#[track_caller]
fn wait_reported(api: &Api, key: &Key, used: usize) {
    wait_until(SOON, "its requests to be reported", || {
        let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
        let keys = usage["keys"].as_array().cloned().unwrap_or_default();
        let reported = keys.iter().find(|entry| entry["key_id"] == key.id.as_str());
        reported.and_then(|entry| entry["used"].as_u64()) == Some(used as u64)
    });
}

/// The ways in which an operator or a bad day restarts an Envoy and a control plane.
#[derive(Debug, Clone, Copy)]
enum Restart {
    Orderly,
    EnvoyKilled,
    ControlPlaneKilledFirst,
    EnvoyKilledFirst,
    ControlPlaneStoppedFirst,
    ControlPlaneAlone,
}

#[track_caller]
fn restart(stack: &mut Stack, how: Restart) {
    match how {
        Restart::Orderly => {
            stack.envoy.stop();
            stack.control_plane.stop();
        }
        Restart::EnvoyKilled => stack.envoy.kill(),
        Restart::ControlPlaneKilledFirst => {
            stack.control_plane.kill();
            stack.envoy.kill();
        }
        Restart::EnvoyKilledFirst => {
            stack.envoy.kill();
            stack.control_plane.kill();
        }
        Restart::ControlPlaneStoppedFirst => {
            stack.control_plane.stop();
            stack.envoy.stop();
        }
        Restart::ControlPlaneAlone => stack.control_plane.kill(),
    }
    if !stack.control_plane.is_running() {
        stack.control_plane.start();
    }
    if !stack.envoy.is_running() {
        stack.start_envoy();
        stack.envoy.wait_ready();
    }
}

#[test]
fn restarts_in_every_order_leave_limits_whole() {
    let mut stack = Stack::builder().limits().workers(2).start();
    let api = stack.api();
    let used = api.issue("contributor");
    let limit = 700;
    limit_key(&api, &used, limit);
    let mut all = 0;
    for how in [
        Restart::Orderly,
        Restart::EnvoyKilled,
        Restart::ControlPlaneKilledFirst,
        Restart::EnvoyKilledFirst,
        Restart::ControlPlaneStoppedFirst,
        Restart::ControlPlaneAlone,
    ] {
        for turn in 1..=3 {
            all += burst(&stack.envoy, &chat(&used), 20, 2).admitted;
            wait_reported(&api, &used, all);
            restart(&mut stack, how);
            let key = api.issue("basic");
            let got = burst(&stack.envoy, &chat(&key), 110, 6);
            println!("{how:?} {turn}: {} of 100 of a new key", got.admitted);
            assert!((98..=100).contains(&got.admitted), "{how:?} {turn}: {}", got.admitted);
        }
    }
    // All of it was reported before each restart: nothing is admitted twice, and nothing is lost.
    while all < limit {
        let got = burst(&stack.envoy, &chat(&used), 50, 2);
        assert!(got.admitted > 0, "{all} of {limit}");
        all += got.admitted;
    }
    assert_eq!(all, limit);
    assert_eq!(burst(&stack.envoy, &chat(&used), 20, 2).admitted, 0);
}

/// The greatest number of requests that surely fall into one window, of those sent and answered at these times.
fn admitted_by(envoys: &[Envoy], request: &Request, each: usize) -> usize {
    std::thread::scope(|scope| {
        let bursts: Vec<_> =
            envoys.iter().map(|envoy| scope.spawn(move || burst(envoy, request, each, 2).admitted)).collect();
        bursts.into_iter().map(|burst| burst.join().expect("a burst")).sum()
    })
}

#[test]
fn six_proxies_replaced_under_load_leave_a_limit_whole() {
    let stack = Stack::builder().limits().without_envoy().start();
    let api = stack.api();
    let mut envoys: Vec<Envoy> = (0..6).map(|at| stack.another_envoy(&format!("pod-{at}"), 1)).collect();
    let key = api.issue("contributor");
    let limit = 1_000;
    limit_key(&api, &key, limit);
    let mut all = 0;
    let released = || Metrics::of(&api).value("keygate_quota_released_units_total");
    for turn in 0..6 {
        all += admitted_by(&envoys, &chat(&key), 15);
        let at = turn % 6;
        // Every third one without a word.
        if turn % 3 == 2 {
            envoys[at].kill();
        } else {
            let answer = api.post("/api/admin/fleet/drain", &json!({ "proxy": format!("pod-{at}") }));
            assert_eq!(answer.expect(200).json()["drained"], true);
            envoys[at].stop();
        }
        envoys[at] = stack.another_envoy(&format!("pod-{}", turn + 6), 1);
    }
    let begun = Instant::now();
    while all < least(limit) && begun.elapsed() < Duration::from_secs(45) {
        all += admitted_by(&envoys, &chat(&key), 40);
    }
    wait_until(Duration::from_secs(45), "the killed ones to be released", || {
        Metrics::of(&api).value("keygate_quota_released_proxies_total") >= 2.0
    });
    for _ in 0..5 {
        all += admitted_by(&envoys, &chat(&key), 40);
    }
    println!(
        "{all} of {limit} admitted; {} units of killed proxies were granted and not reported",
        released()
    );
    assert!(all >= least(limit), "{all} of {limit}");
    assert!(all as f64 <= limit as f64 + released(), "{all} of {limit}, {} released", released());
}

#[test]
fn another_control_plane_takes_the_ledger_over_by_itself() {
    let redis = Redis::start();
    let mut stack = Stack::builder().limits().workers(2).redis(&redis.url()).start();
    let elsewhere = tempfile::tempdir().expect("a directory");
    let mut other = ControlPlane::beside(&stack.control_plane, elsewhere.path());
    other.use_variable("KEYGATE_LIMITS_ENFORCE", "true");
    other.use_redis(&redis.url());
    other.start();
    let envoy = stack.another_envoy_of(&other, "envoy-b", 2);
    let (api, there) = (stack.api(), Api::new(other.api_port(), &stack.control_plane.admin_key()));
    let keeps = |api: &Api| Metrics::of(api).value("keygate_quota_owner") > 0.0;
    let limited = |limit: usize| {
        let key = api.issue("contributor");
        wait_until(SOON, "the other one to know the key", || {
            there.get(&format!("/api/admin/keys/{}", key.id)).status == 200
        });
        for api in [&there, &api] {
            limit_key(api, &key, limit);
        }
        key
    };

    // One that is stopped hands the ledger over: units that its proxy has spent stay spent.
    let key = limited(200);
    let mut all = burst(&stack.envoy, &chat(&key), 60, 2).admitted;
    let mut next = limited(300);
    let mut of_next = burst(&envoy, &chat(&next), 50, 2).admitted;
    stack.control_plane.stop();
    let begun = Instant::now();
    wait_until(Duration::from_secs(30), "the ledger to be taken over", || keeps(&there));
    println!("a stopped one handed over after {} ms", begun.elapsed().as_millis());
    // 30 s later, what the proxy of the stopped one had and did not spend is free.
    wait_until(Duration::from_secs(45), "what is left of the limit", || {
        all += burst(&envoy, &chat(&key), 20, 2).admitted;
        all >= 140
    });
    assert!(all <= 200, "{all}");
    wait_until(SOON, "the rest of another key", || {
        of_next += burst(&envoy, &chat(&next), 20, 2).admitted;
        of_next >= least(200)
    });
    assert!(of_next <= 300, "{of_next}");

    // It comes back, and the other one is killed under load.
    stack.control_plane.start();
    wait_until(SOON, "the first one to know", || {
        let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
        usage["keeper"]["here"] == false
    });
    next = limited(400);
    all = burst(&stack.envoy, &chat(&next), 50, 2).admitted;
    other.kill();
    let begun = Instant::now();
    all += burst(&stack.envoy, &chat(&next), 20, 2).admitted;
    wait_until(Duration::from_secs(30), "the ledger to be taken over", || keeps(&api));
    let taken_after = begun.elapsed();
    let fresh = api.issue("basic");
    wait_until(Duration::from_secs(30), "limits to grow again", || {
        let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
        usage["in_doubt"] == false
    });
    println!(
        "a killed one was succeeded after {} ms; limits grew again after {} ms",
        taken_after.as_millis(),
        begun.elapsed().as_millis()
    );
    assert!(begun.elapsed() <= Duration::from_secs(30));
    wait_until(SOON, "a new key to pass", || burst(&stack.envoy, &chat(&fresh), 10, 2).admitted > 0);
    wait_until(Duration::from_secs(35), "the whole limit", || {
        all += burst(&stack.envoy, &chat(&next), 40, 2).admitted;
        all >= least(400)
    });
    assert!(all <= 400, "{all}");

    // An operator's take-over at the one that has it changes nothing.
    let before = api.get("/api/admin/audit?action=quota_owner_changed").expect(200).json();
    api.post(&format!("{LIMITS}/ledger/takeover"), &json!({})).expect(200);
    let after = api.get("/api/admin/audit?action=quota_owner_changed").expect(200).json();
    assert_eq!(before["records"].as_array().map(Vec::len), after["records"].as_array().map(Vec::len));
    assert!(keeps(&api));
    all += burst(&stack.envoy, &chat(&next), 20, 2).admitted;
    assert!(all <= 400, "what was spent stays spent: {all}");
}

#[test]
fn a_take_over_at_the_only_control_plane_changes_nothing() {
    let mut stack = Stack::builder().limits().workers(2).start();
    let api = stack.api();
    let key = api.issue("basic");
    assert_eq!(burst(&stack.envoy, &chat(&key), 60, 2).admitted, 60);
    wait_reported(&api, &key, 60);
    api.post(&format!("{LIMITS}/ledger/takeover"), &json!({ "any": "body" })).expect(200);
    let usage = api.get(&format!("{LIMITS}/usage")).expect(200).json();
    assert_eq!((&usage["in_doubt"], &usage["suspended"]), (&json!(false), &json!(false)), "{usage}");
    stack.envoy.stop();
    stack.start_envoy();
    stack.envoy.wait_ready();
    assert_eq!(burst(&stack.envoy, &chat(&key), 60, 2).admitted, 40);
}

#[test]
fn a_proxy_that_is_cut_off_goes_by_its_share_and_is_seen() {
    let stack = Stack::builder().limits().workers(2).start();
    let (other, mut line) = stack.another_envoy_on_a_line("envoy-2", 2);
    let api = stack.api();
    let usage = || api.get(&format!("{LIMITS}/usage")).expect(200).json();
    patiently(&other, &chat(&api.issue("basic")));
    let key = api.issue("basic");
    line.cut();
    wait_until(SOON, "it to be missed", || {
        usage()["silent_proxies"].as_array().is_some_and(|silent| silent.len() == 1)
    });
    let silent = usage()["silent_proxies"][0].clone();
    assert_eq!(silent["proxy"], "envoy-2", "{silent}");
    assert_eq!(silent["share"], 0.5);
    let ready = api.call(&Request::get("/readyz?verbose").header("accept", "text/plain")).text();
    assert!(ready.contains("[+]limits ok: 1 proxies not heard of"), "{ready}");
    // Its share of a new key, and no more; in touch, the other one has the rest.
    let fair = burst(&other, &chat(&key), 80, 2);
    assert_eq!(fair.admitted, 50);
    assert!(fair.exhausted == 0, "units are left at the other one");
    wait_until(SOON, "the metric", || other.stat("keygate_fair_share_total") > 0);
    line.heal();
    wait_until(SOON, "it to be back", || usage()["silent_proxies"].as_array().is_some_and(Vec::is_empty));
    wait_reported(&api, &key, 50);
    let mut rest = 0;
    wait_until(SOON, "the rest", || {
        rest += burst(&stack.envoy, &chat(&key), 20, 2).admitted;
        rest >= 48
    });
    assert!(rest <= 50, "{rest}");
}
