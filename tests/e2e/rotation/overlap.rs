//! What becomes of the keys of a secret that signs no more: they end with its overlap, or they go on and its private
//! half is gone.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use keygate_e2e::clock::Clock;
use keygate_e2e::envoy::Neighbours;
use keygate_e2e::{Api, Envoy, Key, Line, Request, SOON, Stack, line, wait_until};
use serde_json::{Value, json};

use super::{
    ROTATE, active, all_workers, assert_all_answer, chat, kid_of, rotated, stage, status, wait_tidy,
    with_data_keys,
};

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// An RFC 3339 time in Unix seconds.
#[track_caller]
fn unix_s(time: &Value) -> u64 {
    let time = humantime::parse_rfc3339(time.as_str().expect("a time")).expect("a time");
    time.duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// A secret as the status shows it.
#[track_caller]
fn version(api: &Api, kid: &str) -> Value {
    let status = status(api);
    let mut versions = status["versions"].as_array().expect("versions").iter();
    versions.find(|version| version["version_id"] == kid).unwrap_or_else(|| panic!("no {kid}")).clone()
}

/// What a rotation would end.
#[track_caller]
fn pre_flight(api: &Api, immediate: bool) -> Value {
    let body = json!({ "dry_run": true, "immediate": immediate });
    api.post(ROTATE, &body).expect(200).json()["ends"].clone()
}

/// Rotates, and goes on with an admin's key of the new secret.
fn rotated_with_a_new_admin(api: &Api) -> Api {
    rotated(api);
    api.with_key(&api.issue("admin").token)
}

#[test]
fn keys_of_an_hmac_secret_end_with_its_overlap_as_was_foretold() {
    let config = "[secrets]\nalgorithm = \"HS256\"\noverlap = \"4s\"\n";
    let stack = Stack::builder().workers(2).config(config).start();
    let api = stack.api();
    let mut workers = all_workers(&[&stack.envoy]);
    let keys: Vec<Key> = ["basic", "basic", "node_operator"].iter().map(|role| api.issue(role)).collect();
    // The first admin's key is of that secret, too; one that ends before the secret is not hurt.
    api.issue_with(&json!({ "name": "e2e", "role": "basic", "expires_in": "1s" }));
    let old = active(&api);
    for (immediate, retire) in [(false, "after_overlap"), (true, "at_once")] {
        let mut ends = pre_flight(&api, immediate);
        if immediate {
            // It may have ended by now.
            wait_until(SOON, "the short key to end", || {
                ends = pre_flight(&api, true);
                ends["keys"] == 4
            });
        }
        assert_eq!(ends["retire"], retire, "{ends}");
        let by_role = json!({ "admin": 1, "basic": 2, "node_operator": 1 });
        assert_eq!((&ends["keys"], &ends["by_role"]), (&json!(4), &by_role), "{ends}");
    }
    assert_eq!((active(&api), status(&api)["versions"].as_array().map(Vec::len)), (old.clone(), Some(1)));

    let api = rotated_with_a_new_admin(&api);
    let end = unix_s(&version(&api, &old)["ends_at"]);
    assert_eq!(version(&api, &old)["retire"], "after_overlap");
    let (mut passed, mut last) = (0, 200);
    wait_until(SOON, "the keys to end", || {
        let before = now_s();
        let statuses: Vec<u16> = workers
            .iter_mut()
            .flat_map(|worker| keys.iter().map(|key| worker.send(&chat(key)).status).collect::<Vec<_>>())
            .collect();
        if now_s() < end {
            assert!(statuses.iter().all(|status| *status == 200), "before the end: {statuses:?}");
            passed += 1;
        } else if before >= end {
            assert!(statuses.iter().all(|status| *status == 401), "after the end: {statuses:?}");
            last = 401;
        }
        last == 401
    });
    assert!(passed > 0, "none was tried before the end");
    for key in &keys {
        api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(401);
    }
    wait_until(SOON, "the secret to be called ended", || stage(&api, &old) == "expired");
    assert_all_answer(&mut workers, &api.issue("basic"), 200);
    wait_tidy(&stack.control_plane, &api);
    assert_eq!(with_data_keys(&stack.control_plane), [active(&api)]);
}

#[test]
fn keys_of_a_key_pair_go_on_without_its_private_half() {
    let mut stack = Stack::builder().workers(2).config("[secrets]\nschedule = \"off\"\n").start();
    let api = stack.api();
    let key = api.issue("basic");
    let old = kid_of(&key);
    let ends = pre_flight(&api, false);
    assert_eq!((&ends["retire"], &ends["keys"]), (&json!("with_last_key"), &json!(0)), "{ends}");
    let new = rotated(&api);
    wait_tidy(&stack.control_plane, &api);
    assert_eq!(active(&api), new);
    let shown = version(&api, &old);
    assert_eq!((&shown["state"], &shown["retire"]), (&json!("previous"), &json!("with_last_key")), "{shown}");

    stack.control_plane.stop();
    stack.control_plane.start();
    let mut workers = all_workers(&[&stack.envoy]);
    for key in [&key, &api.issue("basic")] {
        assert_all_answer(&mut workers, key, 200);
        api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(200);
    }
    drop(workers);
}

#[test]
fn a_key_whose_secret_signs_no_more_can_be_renewed_before_its_time() {
    for algorithm in ["ES256", "HS256"] {
        let config = format!("[secrets]\nalgorithm = \"{algorithm}\"\n");
        let stack = Stack::builder().workers(1).config(&config).start();
        let api = stack.api();
        let refresh = |key: &Key| {
            let request = Request::post("/api/auth/refresh?wait=applied&timeout=10s", &json!({}));
            api.call(&request.bearer(&key.token))
        };
        let key = api.issue("basic");
        refresh(&key).expect_problem(400, "too_early");
        let kid = rotated(&api);
        let renewed = Key::from_answer(&refresh(&key).expect(200).json());
        assert_eq!((kid_of(&renewed), &renewed.answer["renews"]), (kid, &json!(key.id)));
        stack.get("/api/chat", &renewed.token).expect(200);
        stack.get("/api/chat", &key.token).expect(401);
        refresh(&renewed).expect_problem(400, "too_early");
    }
}

#[test]
fn a_scheduled_rotation_begins_by_itself_at_its_time() {
    let mut stack = Stack::builder().without_control_plane().without_envoy().start();
    let schedule = "[secrets]\nschedule = \"* * * * *\"\n";
    std::fs::write(stack.control_plane.config_file(), schedule).expect("the configuration");
    // A few seconds before the next full minute.
    stack.control_plane.use_clock(&format!("+{}", 56 - i64::try_from(now_s() % 60).expect("small")));
    stack.control_plane.start();
    let api = stack.api();
    let (old, due) = (active(&api), status(&api)["next_rotation"].clone());
    assert!(due.as_str().is_some_and(|due| due.ends_with(":00Z")), "{due}");
    wait_until(SOON, "another secret to sign", || active(&api) != old);
    let shown = version(&api, &active(&api));
    assert_eq!((&shown["reason"], stage(&api, &old)), (&json!("scheduled"), "previous".into()));
    assert!(shown["created_at"].as_str() >= due.as_str(), "{shown} was due at {due}");
    assert!(status(&api)["next_rotation"].as_str() > due.as_str());
}

/// An Envoy that goes by this clock, running and ready, over a line of its own if there is one.
fn envoy_by(stack: &Stack, clock: &Clock, node: &str, line: Option<&Line>) -> Envoy {
    let mut envoy = Envoy::new(stack.directory(), node, 2);
    envoy.use_moved_clock(clock);
    let mut neighbours = stack.neighbours();
    if let Some(line) = line {
        envoy.use_source(line::SOURCE);
        neighbours = Neighbours { sync_port: line.port(), ..neighbours };
    }
    envoy.start(&neighbours);
    envoy.wait_ready();
    envoy
}

#[test]
fn after_a_day_the_previous_secrets_keys_end_to_the_minute_also_where_nobody_tells() {
    const DAY: u64 = 86_400;

    let mut stack = Stack::builder().without_control_plane().without_envoy().start();
    let config = "[secrets]\nalgorithm = \"HS256\"\n[fleet]\nmax_staleness = \"24h\"\n";
    std::fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    let clock = Clock::new(stack.directory());
    stack.control_plane.use_moved_clock(&clock);
    stack.control_plane.start();
    let mut line = Line::to(stack.control_plane.sync_port());
    let told = envoy_by(&stack, &clock, "envoy-1", None);
    let cut_off = envoy_by(&stack, &clock, "envoy-2", Some(&line));
    let api = stack.api();
    wait_until(SOON, "two proxies in the fleet", || api.fleet().len() == 2);
    let mut policy = api.get("/api/admin/policy").expect(200).json();
    for route in policy["routes"].as_array_mut().expect("routes") {
        route["stale"] = json!("allow");
    }
    let put = Request::new("PUT", "/api/admin/policy?wait=applied&timeout=10s").json(&policy);
    assert_eq!(api.send(put).expect(200).json()["propagation"]["applied"], 2);

    let key = api.issue("basic");
    let old = kid_of(&key);
    let api = rotated_with_a_new_admin(&api);
    let new = api.issue("basic");
    let end = unix_s(&version(&api, &old)["ends_at"]);
    let since = unix_s(&version(&api, &active(&api))["since"]);
    assert_eq!(end, since + DAY);
    let mut workers = all_workers(&[&told, &cut_off]);
    line.cut();
    for (at, wanted) in [(since + 60, 200), (end - 60, 200), (end + 60, 401)] {
        clock.go_ahead_by(i64::try_from(at - now_s()).expect("small"));
        println!("{} s after it began: {wanted}", at - since);
        // A worker goes by the wall clock as it read it last, at most 2 ms ago.
        wait_until(Duration::from_secs(1), "each worker to look at the clock", || {
            workers.iter_mut().all(|worker| worker.send(&chat(&key)).status == wanted)
        });
        assert_all_answer(&mut workers, &key, wanted);
        assert_all_answer(&mut workers, &new, 200);
        let request = Request::get("/api/auth/validate").bearer(&key.token);
        api.call(&request).expect(wanted);
    }
    for envoy in [&told, &cut_off] {
        envoy.assert_no_vm_died();
    }
}
