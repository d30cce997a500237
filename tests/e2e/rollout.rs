//! The rollout from V1 to V2, through real Envoys: who goes where, and that nobody notices.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Connection, Key, Load, Receiver, Redis, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

const FLAGS: &str = "/api/admin/feature_flags";
/// Operators are promised this.
const WITHIN: Duration = Duration::from_secs(1);

fn start(more: &str) -> Stack {
    Stack::builder().config(&format!("[rollout]\nv1_cluster = \"upstream_v1\"\n{more}")).start()
}

/// Changes the rollout; every proxy has it then.
#[track_caller]
fn set(api: &Api, document: &Value) -> Value {
    let request = Request::new("PUT", format!("{FLAGS}?wait=applied&timeout=10s")).json(document);
    let answer = api.send(request).expect(200).json();
    assert_eq!(answer["propagation"]["missing"], json!([]), "{answer}");
    answer
}

fn chat(token: &str) -> Request {
    Request::get("/api/chat").bearer(token)
}

/// The upstream that answered.
#[track_caller]
fn version(connection: &mut Connection, request: &Request) -> String {
    let answer = connection.send(request).expect(200).json();
    answer["upstream"].as_str().expect("an upstream").to_owned()
}

/// Where each key goes; the same on every worker.
#[track_caller]
fn ways(workers: &mut [Connection], keys: &[Key]) -> BTreeMap<String, String> {
    settled_ways(workers, keys).expect("the same on every worker")
}

/// The same, while a change may be on its way; `None`: workers differ.
#[track_caller]
fn settled_ways(workers: &mut [Connection], keys: &[Key]) -> Option<BTreeMap<String, String>> {
    keys.iter()
        .map(|key| {
            let ways: Vec<String> =
                workers.iter_mut().map(|worker| version(worker, &chat(&key.token))).collect();
            ways.iter().all(|way| *way == ways[0]).then(|| (key.id.clone(), ways[0].clone()))
        })
        .collect()
}

/// How many keys go to V2; `None`: workers differ.
fn v2(workers: &mut [Connection], keys: &[Key]) -> Option<usize> {
    settled_ways(workers, keys).map(|ways| count(&ways, "v2"))
}

fn count(ways: &BTreeMap<String, String>, version: &str) -> usize {
    ways.values().filter(|way| *way == version).count()
}

#[test]
fn from_off_to_full_and_back_without_one_failed_request() {
    let mut stack = start("");
    let api = stack.api();
    let another = stack.another_envoy("envoy-2", 2);
    wait_until(SOON, "both proxies", || api.fleet().len() == 2);
    let keys: Vec<Key> = (0..60)
        .map(|n| {
            api.issue_with(&json!({ "name": "k", "role": "contributor", "owner": format!("owner-{n}") }))
        })
        .collect();
    let mut workers = stack.envoy.connect_to_all_workers();
    workers.extend(another.connect_to_all_workers());

    assert_eq!(
        count(&ways(&mut workers, &keys), "v2"),
        60,
        "until somebody sets up a migration, all is V2's"
    );
    let legacy = chat("legacy-4711");
    workers[0].send(&legacy).expect_problem(401, "invalid_token");

    let loads: Vec<Load> = [&stack.envoy, &another]
        .iter()
        .map(|envoy| {
            let connections = (0..envoy.workers()).map(|_| envoy.connect()).collect();
            let requests: Vec<Request> = keys.iter().map(|key| chat(&key.token)).collect();
            let mut turn = 0;
            Load::start(connections, 300, move || {
                turn += 1;
                requests[turn % requests.len()].clone()
            })
        })
        .collect();

    set(&api, &json!({ "strategy": "off", "reason": "the migration begins" }));
    assert_eq!(count(&ways(&mut workers, &keys), "v1"), 60);
    assert_eq!(version(&mut workers[0], &legacy), "v1", "V1's own keys are good where a migration begins");

    set(&api, &json!({ "strategy": "canary", "canary_users": ["owner-7", keys[9].id] }));
    let canary = ways(&mut workers, &keys);
    assert_eq!((&*canary[&keys[7].id], &*canary[&keys[9].id], count(&canary, "v2")), ("v2", "v2", 2));

    let mut before = canary;
    for percentage in [5, 25, 50, 100] {
        let answer = set(&api, &json!({ "strategy": "percentage", "percentage": percentage }));
        assert_eq!(answer["percentage"], percentage, "{answer}");
        let now = ways(&mut workers, &keys);
        for key in &keys {
            assert!(before[&key.id] == "v1" || now[&key.id] == "v2", "{} went back at {percentage}", key.id);
        }
        println!("{percentage} %: {} of 60 keys go to V2", count(&now, "v2"));
        before = now;
    }
    assert_eq!(count(&before, "v2"), 60);
    assert_eq!(version(&mut workers[0], &legacy), "v1", "until V1 is retired");

    // A key that is revoked is dead where V2 decides.
    let revoked = api.issue("contributor");
    api.revoke(&revoked.id).expect_everywhere(2);
    workers[0].send(&chat(&revoked.token)).expect_problem(401, "invalid_token");

    set(&api, &json!({ "strategy": "percentage", "percentage": 50 }));
    let half = ways(&mut workers, &keys);
    set(&api, &json!({ "strategy": "off" }));
    assert_eq!(count(&ways(&mut workers, &keys), "v1"), 60);
    set(&api, &json!({ "strategy": "percentage" }));
    assert_eq!(ways(&mut workers, &keys), half, "the same half as before");
    let mut sent = 0;
    for load in loads {
        sent += load.answered();
        load.stop().expect_all(200);
    }
    println!("{sent} requests beside that, each answered with 200");

    // And after restarts of all.
    drop(workers);
    stack.control_plane.kill();
    stack.envoy.kill();
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    assert_eq!(ways(&mut stack.envoy.connect_to_all_workers(), &keys), half);

    let history = stack.api().get(&format!("{FLAGS}/history")).expect(200).json();
    let changes = history["changes"].as_array().expect("changes");
    assert_eq!((changes.len(), &changes[0]["percentage"]), (9, &json!(50)), "{history}");
    assert_eq!(changes[8]["reason"], "the migration begins");
}

#[test]
fn an_upstream_gets_what_v1_got_before_and_no_forged_version() {
    let stack = start("");
    let api = stack.api();
    let key = api.issue("basic");
    let mut worker = stack.envoy.connect();
    let forged = |version: &str| chat(&key.token).header("x-keygate-version", version);
    assert_eq!(version(&mut worker, &forged("v1")), "v2", "a client does not choose");

    set(&api, &json!({ "strategy": "percentage", "percentage": 0, "override_users": { &key.id: "v2" } }));
    assert_eq!(version(&mut worker, &forged("v1")), "v2");
    set(&api, &json!({ "override_users": { &key.id: "v1" } }));
    let answer = worker.send(&forged("v2").header("x-keygate-role", "admin")).expect(200).json();
    let headers = &answer["headers"];
    assert_eq!((&answer["upstream"], &headers["x-keygate-version"]), (&json!("v1"), &json!("v1")));
    assert_eq!(headers["authorization"], format!("Bearer {}", key.token), "untouched");
    assert_eq!((&headers["x-keygate-role"], &headers["x-keygate-key-id"]), (&Value::Null, &Value::Null));

    // By endpoint, also of who shows no key.
    set(&api, &json!({ "strategy": "full", "override_users": {}, "enabled_endpoints": ["chat_read"] }));
    assert_eq!(version(&mut worker, &chat(&key.token)), "v2");
    assert_eq!(version(&mut worker, &Request::get("/")), "v1");
    set(&api, &json!({ "enabled_endpoints": ["/api"] }));
    assert_eq!(version(&mut worker, &Request::get("/")), "v1");

    let explained =
        api.post("/api/admin/explain", &json!({ "method": "GET", "path": "/" })).expect(200).json();
    assert_eq!((&explained["upstream"], &explained["rollout"]), (&json!("v1"), &json!("endpoint")));
    set(&api, &json!({ "enabled_endpoints": [], "v1_retired": true }));
    worker.send(&chat("legacy-1")).expect_problem(401, "invalid_token");
    let question = json!({ "method": "GET", "path": "/api/chat", "token": key.token });
    let explained = api.post("/api/admin/explain", &question).expect(200).json();
    assert_eq!(
        (&explained["upstream"], &explained["rollout"]),
        (&json!("v2"), &json!("full")),
        "{explained}"
    );
}

#[test]
fn off_by_redis_cli_is_in_force_within_a_second_and_the_canary_set_too() {
    let mut redis = Redis::new();
    redis.run();
    let stack =
        Stack::builder().config("[rollout]\nv1_cluster = \"upstream_v1\"\n").redis(&redis.url()).start();
    let api = stack.api();
    let another = stack.another_envoy("envoy-2", 2);
    let keys: Vec<Key> = (0..20).map(|_| api.issue("contributor")).collect();
    let mut workers = stack.envoy.connect_to_all_workers();
    workers.extend(another.connect_to_all_workers());
    let strategy = || {
        let text = redis.cli(&["GET", "feature_flags:api_key_v2"]);
        serde_json::from_str::<Value>(&text)
            .ok()
            .and_then(|flags| flags["strategy"].as_str().map(str::to_owned))
    };
    wait_until(SOON, "the document in Redis", || strategy().as_deref() == Some("full"));
    set(&api, &json!({ "strategy": "percentage", "percentage": 50 }));
    wait_until(WITHIN, "the document in Redis", || strategy().as_deref() == Some("percentage"));

    for edit in [r#"{"strategy":"off"}"#, r#"{"strategy":"full"}"#, r#"{"strategy": "off"}"#] {
        let begun = Instant::now();
        redis.cli(&["SET", "feature_flags:api_key_v2", edit]);
        let wanted = if edit.contains("off") { "v1" } else { "v2" };
        let mut last_other = begun;
        while begun.elapsed() < WITHIN + WITHIN / 2 {
            for worker in &mut workers {
                for key in &keys[..4] {
                    if version(worker, &chat(&key.token)) != wanted {
                        last_other = Instant::now();
                    }
                }
            }
        }
        let took = last_other - begun;
        println!("{edit}: the last answer of another version came after {took:?}");
        assert!(took < WITHIN, "{took:?}");
        assert_eq!(count(&ways(&mut workers, &keys), wanted), 20);
    }

    redis.cli(&["SET", "feature_flags:api_key_v2", r#"{"strategy":"canary"}"#]);
    redis.cli(&["SADD", "feature_flags:canary_users", &keys[0].id, &keys[1].id]);
    wait_until(WITHIN, "the canary users", || v2(&mut workers, &keys) == Some(2));
    redis.cli(&["SREM", "feature_flags:canary_users", &keys[0].id]);
    wait_until(WITHIN, "one canary user", || v2(&mut workers, &keys) == Some(1));
    assert_eq!(api.get(FLAGS).expect(200).json()["canary_users"], json!([keys[1].id]));
    redis.cli(&["DEL", "feature_flags:canary_users"]);
    wait_until(WITHIN, "no canary user", || v2(&mut workers, &keys) == Some(0));

    // What says nothing sensible changes nothing, and is written over.
    set(&api, &json!({ "strategy": "percentage", "percentage": 50 }));
    let half = ways(&mut workers, &keys);
    let refused =
        || Metrics::of(&api).sum("keygate_redis_edits_total{", &["feature_flags:api_key_v2", "refused"]);
    for (number, bad) in
        ["off", "[]", r#"{"strategy":"on"}"#, r#"{"percentage":101}"#, r#"{"percentage":"ten"}"#]
            .iter()
            .enumerate()
    {
        redis.cli(&["SET", "feature_flags:api_key_v2", bad]);
        wait_until(SOON, "it to be refused", || refused() == number as u64 + 1);
        wait_until(WITHIN, "what is so", || strategy().as_deref() == Some("percentage"));
    }
    assert_eq!(ways(&mut workers, &keys), half);
    let audit = api.get("/api/admin/audit?limit=200").expect(200).text();
    assert!(audit.contains("rollout_changed") && audit.contains("\"redis\""), "{audit}");

    // An emptied Redis is filled again, and nothing changes.
    redis.cli(&["FLUSHALL"]);
    wait_until(SOON, "the document to be back", || strategy().as_deref() == Some("percentage"));
    assert_eq!(ways(&mut workers, &keys), half);
    let adoption = || {
        let text = redis.cli(&["GET", "feature_flags:api_key_v2"]);
        serde_json::from_str::<Value>(&text)
            .map(|flags| flags["metrics"]["v2_requests"].as_u64())
            .ok()
            .flatten()
    };
    wait_until(SOON, "the counts in Redis", || {
        adoption() == api.get(&format!("{FLAGS}/metrics")).expect(200).json()["v2_requests"].as_u64()
    });
}

#[test]
fn a_v2_that_fails_is_rolled_back_by_itself() {
    let receiver = Receiver::start(&[200]);
    let config = format!(
        "guard = {{ window = \"10s\", min_requests = 20, stable_after = \"8s\" }}\n[notify]\nwebhook_url = \"{}\"\n",
        receiver.url("/hook")
    );
    let config = format!("[rollout]\nv1_cluster = \"upstream_v1\"\n{config}");
    let mut stack = Stack::builder().config(&config).without_control_plane().start();
    stack.control_plane.use_variable("KEYGATE_NOTIFY_WEBHOOK_SECRET", "a secret of the tests");
    stack.control_plane.start();
    stack.envoy.wait_ready();
    let api = stack.api();
    let keys: Vec<Key> = (0..80).map(|_| api.issue("contributor")).collect();
    set(&api, &json!({ "strategy": "percentage", "percentage": 5 }));
    let requests: Vec<Request> = keys.iter().map(|key| chat(&key.token)).collect();
    let connections = (0..4).map(|_| stack.envoy.connect()).collect();
    let mut turn = 0;
    let load = Load::start(connections, 400, move || {
        turn += 1;
        requests[turn % requests.len()].clone()
    });
    load.wait_answered(4_000); // Ten seconds: five percent are good for longer than stable_after.
    set(&api, &json!({ "strategy": "percentage", "percentage": 25 }));
    load.wait_answered(4_300);

    stack.upstream.fail(true);
    let failed_from = Instant::now();
    let shown = || api.get(FLAGS).expect(200).json();
    wait_until(SOON, "the guard", || shown()["last_change"]["by"] == "guard");
    let took = failed_from.elapsed();
    let flags = shown();
    assert_eq!((&flags["strategy"], &flags["percentage"]), (&json!("percentage"), &json!(5)), "{flags}");
    assert!(flags["last_change"]["reason"].as_str().is_some_and(|why| why.contains("to V2")), "{flags}");
    // Five percent are as bad, and there is nothing below that was good.
    wait_until(SOON, "it to be off", || shown()["strategy"] == "off");
    let all = load.stop();
    let failed = Metrics::of(&api).sum("keygate_upstream_responses_total{", &["error", "v2"]);
    println!("rolled back {took:.1?} after the first failure, {failed} failed requests until it was off");
    assert!(took < Duration::from_secs(10), "{took:?}");
    drop(all);

    assert_eq!(Metrics::of(&api).value("keygate_rollout_rollbacks_total") as u64, 2);
    wait_until(SOON, "two notifications", || {
        receiver.posted().iter().filter(|posted| posted.json()["kind"] == "rolled_back").count() == 2
    });

    // Somebody insists, and the guard stands by.
    stack.upstream.fail(true);
    set(&api, &json!({ "strategy": "percentage", "percentage": 100, "guard": false, "reason": "INC-7" }));
    let mut worker = stack.envoy.connect();
    for round in 1..=2 {
        // Fewer at one go than a worker looks at one by one: beyond, counts are an estimate.
        for key in &keys {
            worker.send(&chat(&key.token)).expect(500);
        }
        wait_until(SOON, "them to be counted", || {
            let errors = Metrics::of(&api).sum("keygate_upstream_responses_total{", &["error", "v2"]);
            errors >= failed + 80 * round
        });
    }
    assert_eq!((&shown()["percentage"], &shown()["guard"]), (&json!(100), &json!(false)));
    assert_eq!(shown()["last_change"]["reason"], "INC-7");
}

/// A stack whose proxy is tested every second, with a V1, where the guard judges by canaries alone: of requests there are
/// never enough.
fn with_canaries(more: &str) -> Stack {
    let mut stack = Stack::builder().workers(1).without_control_plane().without_envoy().start();
    let config = format!(
        "[canary]\nurls = [\"http://127.0.0.1:{}\"]\ninterval = \"1s\"\n{more}\
         [rollout]\nv1_cluster = \"upstream_v1\"\nguard = {{ min_requests = 1000000 }}\n",
        stack.envoy.port()
    );
    std::fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    stack
}

#[test]
fn canaries_test_v2_alone_and_the_guard_rolls_back_when_they_are_unhealthy() {
    let stack = with_canaries("probe_interval = \"1s\"\n");
    let api = stack.api();
    let ran = |test: &str| {
        let path = format!("/api/admin/canary/results?test_id={test}&limit=1000");
        let results = api.get(&path).expect(200).json()["results"].clone();
        results.as_array().expect("results").len()
    };
    let run = || api.post("/api/admin/canary/run", &json!({})).expect(200).json();
    let names = |run: &Value| -> Vec<String> {
        let results = run["results"].as_array().expect("results").iter();
        results.map(|result| result["test_id"].as_str().expect("an id").to_owned()).collect()
    };
    wait_until(SOON, "the probe", || ran("revocation_probe") >= 1);
    let all = ["seed_app", "seed_no_key", "seed_refresh_too_early", "seed_validate", "revocation_probe"];
    assert_eq!(names(&run()), all);

    // V1 would let a revoked key pass, and answers differently to who has none.
    let of_v2 = vec![all[0], all[2], all[3], all[4]];
    let to_v1 = json!({ "strategy": "off", "override_users": { "keygate-canary": "v1" } });
    for (document, wanted) in [
        (to_v1.clone(), vec![all[2], all[3]]),
        (json!({ "strategy": "full", "override_users": {} }), all.to_vec()),
        (json!({ "enabled_endpoints": ["home"] }), vec![all[2], all[3]]),
        (json!({ "strategy": "off", "enabled_endpoints": [] }), of_v2.clone()),
        (json!({ "strategy": "percentage", "percentage": 5, "canary_users": ["acme"] }), of_v2),
    ] {
        set(&api, &document);
        let run = run();
        assert_eq!(names(&run), wanted, "{document}");
        assert_eq!(run["statistics"]["failed"], 0, "{run}");
    }
    assert_eq!(
        api.get(FLAGS).expect(200).json()["last_change"]["by"].as_str().map(|by| by == "guard"),
        Some(false)
    );

    stack.upstream.fail(true);
    let flags = || api.get(FLAGS).expect(200).json();
    wait_until(3 * SOON, "the guard", || flags()["strategy"] == "off");
    let last = flags()["last_change"].clone();
    assert_eq!((&last["by"], &last["reason"]), (&json!("guard"), &json!("the canary tests are unhealthy")));
    assert_eq!(flags()["canary_users"], json!(["acme"]), "for when it is well again");
    // What failed and goes to V1 now is forgotten.
    assert_ne!(api.get("/api/admin/canary/health").expect(200).json()["failing"], json!({}));
    set(&api, &to_v1);
    wait_until(SOON, "nothing to fail", || {
        api.get("/api/admin/canary/health").expect(200).json()["failing"] == json!({})
    });
}

#[test]
fn counts_add_up_over_restarts_and_can_be_begun_anew() {
    let mut stack = start("");
    let mut api = stack.api();
    let keys: Vec<Key> = (0..16).map(|_| api.issue("contributor")).collect();
    set(&api, &json!({ "strategy": "percentage", "percentage": 50 }));
    let (mut v1, mut v2) = (0, 0);
    let send = |stack: &Stack, v1: &mut u64, v2: &mut u64| {
        for worker in &mut stack.envoy.connect_to_all_workers() {
            for key in &keys {
                let count = if version(worker, &chat(&key.token)) == "v1" { &mut *v1 } else { &mut *v2 };
                *count += 1;
            }
            *v1 += u64::from(version(worker, &chat("legacy-1")) == "v1");
        }
    };
    let counted = |api: &Api| {
        let counts = api.get(&format!("{FLAGS}/metrics")).expect(200).json();
        (counts["v1_requests"].as_u64().unwrap_or(0), counts["v2_requests"].as_u64().unwrap_or(0))
    };
    let assert_counted = |api: &Api, v1: u64, v2: u64| {
        wait_until(SOON, "them to be counted", || counted(api) >= (v1, v2));
        assert_eq!(counted(api), (v1, v2));
    };
    send(&stack, &mut v1, &mut v2);
    stack.control_plane.kill();
    send(&stack, &mut v1, &mut v2);
    stack.control_plane.start();
    api = stack.api();
    assert_counted(&api, v1, v2);
    stack.envoy.kill();
    stack.start_envoy();
    stack.envoy.wait_ready();
    send(&stack, &mut v1, &mut v2);
    assert_counted(&api, v1, v2);
    assert!(v1 > 0 && v2 > 0);

    let counts = api.get(&format!("{FLAGS}/metrics")).expect(200).json();
    let of_chat = counts["by_endpoint"].as_array().expect("rows").iter();
    let chat_v2 = of_chat.clone().find(|row| row["endpoint"] == "chat_read" && row["version"] == "v2");
    assert_eq!(chat_v2.expect("a row")["passed"], v2, "{counts}");
    api.post(&format!("{FLAGS}/metrics/reset"), &json!({})).expect(200);
    assert_eq!(counted(&api), (0, 0));
    stack.control_plane.kill();
    stack.control_plane.start();
    api = stack.api();
    assert_eq!(counted(&api), (0, 0), "also after a restart");
    send(&stack, &mut v1, &mut v2);
    assert!(Metrics::of(&api).sum("keygate_requests_total{", &["version=\"v1\""]) > 0);
}

#[test]
fn a_document_that_is_wrong_is_refused_and_the_one_before_stays() {
    let stack = start("");
    let api = stack.api();
    let good = set(&api, &json!({ "strategy": "percentage", "percentage": 12.5 }));
    let put = |document: &Value| api.send(Request::new("PUT", FLAGS).json(document));
    for (document, says) in [
        (json!({ "strategy": "on" }), "strategy"),
        (json!({ "percentage": 101 }), "percentage"),
        (json!({ "percentage": "ten" }), "percentage"),
        (json!({ "percentage": 0.001 }), "percentage"),
        (json!({ "percent": 5 }), "percent"),
        (json!({ "enabled_endpoints": ["nowhere"] }), "enabled_endpoints"),
        (json!([1]), "JSON object"),
    ] {
        let answer = put(&document).expect_problem(400, "bad_request").json();
        assert!(answer["detail"].as_str().is_some_and(|detail| detail.contains(says)), "{answer}");
    }
    let shown = api.get(FLAGS).expect(200);
    let tag = shown.header("etag").expect("a tag").to_owned();
    assert_eq!(shown.json()["percentage"], good["percentage"]);

    // Who read an older one is told.
    let conditional = |tag: &str, percentage: u32| {
        api.send(
            Request::new("PUT", FLAGS).header("if-match", tag).json(&json!({ "percentage": percentage })),
        )
    };
    conditional(&tag, 20).expect(200);
    conditional(&tag, 30).expect_problem(412, "version_mismatch");
    assert_eq!(api.get(FLAGS).expect(200).json()["percentage"], 20);

    // Step by step, with pauses.
    let begun = set(&api, &json!({ "strategy": "gradual", "steps": "weekly" }));
    assert_eq!((&begun["percentage"], &begun["next_step"]["percentage"]), (&json!(5), &json!(25)), "{begun}");
    let paused = set(&api, &json!({ "paused": true }));
    assert_eq!((&paused["paused"], &paused["next_step"]), (&json!(true), &Value::Null));
    assert_eq!(set(&api, &json!({ "paused": false }))["next_step"]["percentage"], 25);
}

#[test]
fn without_a_v1_nothing_is_sent_there() {
    let stack = Stack::start();
    let api = stack.api();
    for document in [json!({ "strategy": "off" }), json!({ "strategy": "percentage", "percentage": 10 })] {
        let answer = api.send(Request::new("PUT", FLAGS).json(&document)).expect_problem(400, "bad_request");
        assert!(answer.text().contains("no V1 upstream is configured"), "{}", answer.text());
    }
    assert_eq!(api.get(FLAGS).expect(200).json()["strategy"], "full");
}

#[test]
fn the_canary_tests_v2_whoever_else_goes_there() {
    let mut stack = Stack::builder().without_control_plane().start();
    let url = format!("http://127.0.0.1:{}", stack.envoy.port());
    let config =
        format!("[rollout]\nv1_cluster = \"upstream_v1\"\n[canary]\nurls = [\"{url}\"]\ninterval = \"1s\"\n");
    std::fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    stack.control_plane.start();
    stack.envoy.wait_ready();
    let api = stack.api();
    let run = || {
        let results = api.post("/api/admin/canary/run", &json!({})).expect(200).json();
        let health = api.get("/api/admin/canary/health").expect(200).json();
        assert_eq!(health["failing"], json!({}), "{results}");
    };
    for document in [
        json!({ "strategy": "percentage", "percentage": 0 }),
        json!({ "strategy": "off" }),
        json!({ "strategy": "full", "enabled_endpoints": ["home"] }),
        json!({ "strategy": "canary", "enabled_endpoints": [], "override_users": { "keygate-canary": "v1" } }),
    ] {
        set(&api, &document);
        run();
    }
    // Which is not shown as if somebody had set it.
    set(&api, &json!({ "override_users": {} }));
    assert_eq!(api.get(FLAGS).expect(200).json()["override_users"], json!({}));
}

#[test]
fn what_the_control_plane_serves_itself_moves_no_rollout() {
    let stack = with_canaries("");
    let api = stack.api();
    set(&api, &json!({ "strategy": "full" }));
    // As under a flood.
    for n in 0..12 {
        let test =
            json!({ "id": format!("own{n}"), "endpoint": "/api/auth/validate", "expected_status": 299 });
        api.post("/api/admin/canary/tests", &test).expect(201);
    }
    let health = || api.get("/api/admin/canary/health").expect(200).json();
    wait_until(SOON, "bad health", || health()["status"] == "unhealthy");
    let results = || {
        let all = api.get("/api/admin/canary/results?test_id=own0&limit=1000").expect(200).json();
        all["results"].as_array().expect("results").len()
    };
    let before = results();
    // The guard looks each second, too.
    wait_until(SOON, "five more runs", || results() >= before + 5);
    let flags = api.get(FLAGS).expect(200).json();
    assert_eq!((&flags["strategy"], &health()["status"]), (&json!("full"), &json!("unhealthy")), "{flags}");
}

#[test]
fn a_guard_that_holds_pauses_a_gradual_rollout_and_says_so_once() {
    let receiver = Receiver::start(&[200]);
    let config = format!(
        "[rollout]\nv1_cluster = \"upstream_v1\"\nguard = {{ window = \"10s\", min_requests = 20, on_breach = \"hold\" }}\n\
         [notify]\nwebhook_url = \"{}\"\n",
        receiver.url("/hook")
    );
    let mut stack = Stack::builder().workers(1).config(&config).without_control_plane().start();
    stack.control_plane.use_variable("KEYGATE_NOTIFY_WEBHOOK_SECRET", "a secret of the tests");
    stack.control_plane.start();
    stack.envoy.wait_ready();
    let api = stack.api();
    let keys: Vec<Key> = (0..40).map(|_| api.issue("contributor")).collect();
    let steps = json!([{ "percentage": 60, "hold_hours": 24 }, { "percentage": 100, "hold_hours": 24 }]);
    set(&api, &json!({ "strategy": "gradual", "steps": steps }));
    stack.upstream.fail(true);
    let requests: Vec<Request> = keys.iter().map(|key| chat(&key.token)).collect();
    let mut turn = 0;
    let load = Load::start(vec![stack.envoy.connect()], 100, move || {
        turn += 1;
        requests[turn % requests.len()].clone()
    });
    let flags = || api.get(FLAGS).expect(200).json();
    wait_until(SOON, "the guard", || flags()["last_change"]["by"] == "guard");
    let held = flags();
    assert_eq!(
        (&held["strategy"], &held["percentage"], &held["paused"]),
        (&json!("gradual"), &json!(60), &json!(true)),
        "{held}"
    );
    let told = || receiver.posted().iter().filter(|posted| posted.json()["kind"] == "rolled_back").count();
    wait_until(SOON, "a notification", || told() == 1);
    // As many failures again change nothing, and are not said again.
    load.wait_answered(1_500);
    drop(load.stop());
    assert_eq!((told(), flags()["last_change"]["at"].clone()), (1, held["last_change"]["at"].clone()));
    assert_eq!(Metrics::of(&api).value("keygate_rollout_rollbacks_total") as u64, 0);
}
