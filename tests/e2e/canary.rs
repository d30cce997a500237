//! Canaries: tests through Envoy that know of trouble before users do.

use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Receiver, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

const SECRET: &str = "a-secret-of-the-receiver";

/// A stack whose proxy is tested every second.
fn start(more: &str) -> Stack {
    let mut stack = Stack::builder().workers(1).without_control_plane().without_envoy().start();
    let config = format!(
        "[canary]\nurls = [\"http://127.0.0.1:{}\"]\ninterval = \"1s\"\nprobe_interval = \"1s\"\n{more}",
        stack.envoy.port()
    );
    std::fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    if more.contains("webhook_url") {
        stack.control_plane.use_variable("KEYGATE_NOTIFY_WEBHOOK_SECRET", SECRET);
    }
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    stack
}

fn health(api: &Api) -> Value {
    api.get("/api/admin/canary/health").expect(200).json()
}

#[test]
fn what_a_holder_of_a_key_does_is_tested_and_a_revocation_is_measured() {
    let stack = start("");
    let api = stack.api();
    let run = api.post("/api/admin/canary/run", &json!({})).expect(200).json();
    let failed: Vec<_> =
        run["results"].as_array().expect("results").iter().filter(|one| one["passed"] != true).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(run["statistics"]["pass_rate"], 100.0);
    assert!(run["statistics"]["total"].as_u64() >= Some(5), "{}", run["statistics"]);
    wait_until(SOON, "it to be healthy", || health(&api)["status"] == "healthy");

    // The probe's key was issued, used, revoked and refused, in the canary's name; and that was measured.
    let records = api.get("/api/admin/audit?actor=canary&action=key_revoked").expect(200).json();
    assert!(!records["records"].as_array().expect("records").is_empty());
    assert!(Metrics::of(&api).value("keygate_canary_revocation_seconds_count") >= 1.0);

    // With a key of its own, which follows a rotation.
    let keys = || {
        let all = api.get("/api/admin/keys?state=active&role=basic").expect(200).json()["keys"].clone();
        let of = |key: &&Value| key["name"] == "keygate canary";
        all.as_array().expect("keys").iter().filter(of).cloned().collect::<Vec<_>>()
    };
    assert_eq!(keys().len(), 1);
    let kid = crate::rotation::rotated_with(&api, &json!({}));
    wait_until(SOON, "a key of the new secret", || {
        let keys = keys();
        keys.len() == 1 && keys[0]["kid"] == kid.as_str()
    });
    assert!(api.post("/api/admin/canary/run", &json!({})).expect(200).json()["statistics"]["failed"] == 0);
}

#[test]
fn the_first_run_waits_for_the_proxy_and_a_rotation_has_them_run_at_once() {
    let mut stack = Stack::builder().workers(1).without_control_plane().without_envoy().start();
    let config = format!(
        "[canary]\nurls = [\"http://127.0.0.1:{}\"]\ninterval = \"1h\"\nprobe_interval = \"1d\"\n",
        stack.envoy.port()
    );
    std::fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    stack.control_plane.start();
    let api = stack.api();
    assert_eq!(health(&api)["status"], "no_data");
    stack.start_envoy();
    // An hour lies between two runs, so this is the first one.
    wait_until(SOON, "the first run", || health(&api)["status"] != "no_data");
    let now = health(&api);
    assert_eq!((&now["status"], &now["pass_rate"]), (&json!("healthy"), &json!(100.0)), "{now}");

    let probes = |api: &Api| {
        let shown = api.get("/api/admin/canary/results?test_id=revocation_probe").expect(200).json();
        shown["results"].as_array().expect("results").clone()
    };
    assert_eq!(probes(&api).len(), 1);
    // The second one ends every key of the secret before; if the caller has one, they get another.
    crate::rotation::rotated_with(&api, &json!({}));
    wait_until(SOON, "the probe of a key of the new secret", || probes(&api).len() == 2);
    let answer = api.post("/api/admin/secrets/rotate", &json!({ "immediate": true })).expect(202).json();
    let api = api.with_key(answer["api_key"].as_str().unwrap_or(&api.key()));
    wait_until(SOON, "the same after an immediate rotation", || probes(&api).len() == 3);
    let all = api.get("/api/admin/canary/results").expect(200).json();
    let results = all["results"].as_array().expect("results");
    assert!(results.iter().all(|result| result["passed"] == true), "{all}");
}

#[test]
fn a_proxy_that_is_gone_turns_health_bad_is_told_of_once_and_so_is_its_return() {
    let receiver = Receiver::start(&[]);
    let mut stack = start(&format!("[notify]\nwebhook_url = \"{}\"\n", receiver.url("/hook")));
    let api = stack.api();
    wait_until(SOON, "it to be healthy for a while", || {
        health(&api)["status"] == "healthy" && health(&api)["recent_tests"].as_u64() >= Some(25)
    });
    // Of 25 that passed and five that fail 83 % passed, of ten that fail 71 %.
    stack.envoy.kill();
    let mut seen = vec![json!("healthy")];
    wait_until(3 * SOON, "it to be unhealthy", || {
        let status = health(&api)["status"].clone();
        if seen.last() != Some(&status) {
            seen.push(status);
        }
        seen.last() == Some(&json!("unhealthy")) && health(&api)["consecutive_failures"].as_u64() >= Some(5)
    });
    assert_eq!(seen, [json!("healthy"), json!("degraded"), json!("unhealthy")]);
    let reasons = api.call(&Request::get("/health")).json()["reasons"].to_string();
    assert!(reasons.contains("canaries: unhealthy"), "{reasons}");
    assert_eq!(receiver.posted().len(), 1, "after three failures, and not again");
    let said = Metrics::of(&api).value("keygate_canary_alerting");
    assert_eq!((&health(&api)["alerting"], said), (&json!(true), 1.0));

    stack.start_envoy();
    wait_until(3 * SOON, "somebody to be told that it is over", || receiver.posted().len() == 2);
    let told: Vec<_> = receiver
        .posted()
        .iter()
        .map(|one| (one.json()["kind"].clone(), one.json()["status"].clone()))
        .collect();
    let kind = json!("canary_failing");
    assert_eq!(told, [(kind.clone(), json!("firing")), (kind, json!("resolved"))]);
    let health = health(&api);
    assert_eq!(
        (&health["consecutive_failures"], &health["alerting"]),
        (&json!(0), &json!(false)),
        "{health}"
    );
}

#[test]
fn a_test_that_comes_and_goes_is_told_of_once_if_that_is_asked_for() {
    // Answers 200, and each second time 500: three of five, and never two in a row.
    let statuses: Vec<u16> = (0..60).map(|n| if n % 2 == 0 { 200 } else { 500 }).collect();
    let flaky = Receiver::start(&statuses);
    let receiver = Receiver::start(&[]);
    let stack = start(&format!(
        "allowed_hosts = [\"127.0.0.1:{}\"]\nalert = {{ failures = 3, window = 6 }}\n[notify]\nwebhook_url = \"{}\"\n",
        flaky.port(),
        receiver.url("/hook")
    ));
    let api = stack.api();
    let put = |id: &str, critical: bool| {
        let test =
            json!({ "id": id, "endpoint": flaky.url("/x"), "expected_status": 200, "critical": critical });
        api.post("/api/admin/canary/tests", &test).expect(201);
    };
    let runs = |id: &str| {
        let shown = api.get(&format!("/api/admin/canary/results?test_id={id}")).expect(200).json();
        shown["results"].as_array().expect("results").len()
    };
    // One that is not critical wakes nobody and does not count.
    put("flaky", false);
    wait_until(2 * SOON, "six runs", || runs("flaky") >= 6);
    assert_eq!((&health(&api)["alerting"], receiver.posted().len()), (&json!(false), 0));
    assert_eq!(Metrics::of(&api).value("keygate_canary_consecutive_failures"), 0.0);
    put("flaky", true);
    wait_until(SOON, "somebody to be told", || receiver.posted().len() == 1);
    let before = runs("flaky");
    wait_until(2 * SOON, "six more runs", || runs("flaky") >= before + 6);
    assert_eq!((&health(&api)["alerting"], receiver.posted().len()), (&json!(true), 1));
    api.send(Request::new("DELETE", "/api/admin/canary/tests/flaky")).expect(200);
    wait_until(SOON, "somebody to be told that it is over", || receiver.posted().len() == 2);
    assert_eq!(receiver.posted()[1].json()["status"], "resolved");
}

#[test]
fn tests_are_defined_kept_over_restarts_and_removed() {
    let mut stack = start("");
    let api = stack.api();
    let test = json!({
        "id": "chat_says_who", "name": "The upstream is told", "endpoint": "/api/chat", "method": "GET",
        "expected_status": 200, "timeout": 5.0, "critical": true,
        "assertions": [{ "json": "/headers/x-keygate-role", "equals": "basic" }, { "header": "content-type", "contains": "json" }],
    });
    api.post("/api/admin/canary/tests", &test).expect(201);
    let mut wrong = test.clone();
    wrong["id"] = json!("chat_is_wrong");
    wrong["critical"] = json!(false);
    wrong["assertions"][0]["equals"] = json!("admin");
    api.post("/api/admin/canary/tests", &wrong).expect(201);
    api.send(Request::new("DELETE", "/api/admin/canary/tests/seed_refresh_too_early")).expect(200);
    api.send(Request::new("DELETE", "/api/admin/canary/tests/nothing")).expect(404);
    stack.control_plane.kill();
    stack.control_plane.start();
    let ids: Vec<Value> = api.get("/api/admin/canary/tests").expect(200).json()["tests"]
        .as_array()
        .expect("tests")
        .iter()
        .map(|test| test["id"].clone())
        .collect();
    assert!(
        ids.contains(&json!("chat_says_who")) && !ids.contains(&json!("seed_refresh_too_early")),
        "{ids:?}"
    );
    wait_until(SOON, "the proxy to follow", || api.fleet().iter().any(|proxy| proxy["current"] == true));
    let run = api.post("/api/admin/canary/run", &json!({})).expect(200).json();
    let of = |id: &str| {
        let all = run["results"].as_array().expect("results");
        all.iter().find(|one| one["test_id"] == id).unwrap_or_else(|| panic!("no {id} in {run}")).clone()
    };
    assert_eq!(of("chat_says_who")["passed"], true, "{}", of("chat_says_who"));
    let failure = of("chat_is_wrong")["failure"].clone();
    assert_eq!(failure, "JSON at \"/headers/x-keygate-role\" is not as wanted");
    let shown = api.get("/api/admin/canary/results?test_id=chat_is_wrong&limit=1").expect(200).json();
    assert_eq!(shown["results"][0]["failure"], failure);
}

#[test]
fn a_test_calls_nothing_but_what_is_allowed_however_it_is_written() {
    // What only the control plane could reach: its own sync port, Envoy's admin, a receiver that must see nothing.
    let inner = Receiver::start(&[]);
    let redirects = Receiver::redirecting(&inner.url("/inner"));
    let stack = start(&format!("allowed_hosts = [\"127.0.0.1:{}\"]\n", redirects.port()));
    let api = stack.api();
    let put = |id: &str, endpoint: &str| {
        let test = json!({ "id": id, "endpoint": endpoint, "expected_status": 200, "timeout": "2s" });
        api.post("/api/admin/canary/tests", &test)
    };
    for endpoint in [
        inner.url("/x"),
        format!("http://127.0.0.1:{}/stats", stack.envoy.admin_port()),
        "http://169.254.169.254/latest/meta-data".into(),
        "http://[::ffff:127.0.0.1]/".into(),
        "http://localhost:1/".into(),
        "http://2130706433/".into(),
        "//127.0.0.1/".into(),
        "file:///etc/passwd".into(),
        format!("http://127.0.0.1:{}@127.0.0.1:1/", redirects.port()),
    ] {
        let refused = put("hostile", &endpoint).expect_problem(400, "bad_request");
        assert!(refused.json()["errors"].is_array(), "{endpoint}");
    }
    // A redirect is an answer, and nobody follows it.
    put("redirected", &redirects.url("/x")).expect(201);
    let run = api.post("/api/admin/canary/run", &json!({})).expect(200).json();
    let results = run["results"].as_array().expect("results");
    let redirected = results.iter().find(|one| one["test_id"] == "redirected").expect("a result");
    assert_eq!((&redirected["status"], &redirected["passed"]), (&json!(302), &json!(false)), "{redirected}");
    assert!(!redirects.posted().is_empty() && inner.posted().is_empty());
}

#[test]
fn without_proxies_there_is_nothing_to_run() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let health = health(&api);
    assert_eq!((&health["status"], &health["recent_tests"]), (&json!("no_data"), &json!(0)), "{health}");
    api.post("/api/admin/canary/run", &json!({})).expect_problem(409, "no_proxies");
}

#[test]
fn a_failing_test_that_is_deleted_says_nothing_any_more() {
    let stack = start("");
    let api = stack.api();
    wait_until(SOON, "it to be healthy", || health(&api)["status"] == "healthy");
    let test = json!({ "id": "custom_test", "endpoint": "/api/chat", "expected_status": 299 });
    api.post("/api/admin/canary/tests", &test).expect(201);
    wait_until(SOON, "it to fail", || health(&api)["failing"].to_string().contains("custom_test"));
    wait_until(SOON, "health to be bad", || health(&api)["status"] != "healthy");
    api.send(Request::new("DELETE", "/api/admin/canary/tests/custom_test")).expect(200);
    let health = health(&api);
    assert_eq!((&health["status"], &health["pass_rate"]), (&json!("healthy"), &json!(100.0)), "{health}");
    let ready = api.call(&Request::get("/readyz?verbose")).expect(200).json();
    assert!(!ready["reasons"].to_string().contains("canaries"), "{ready}");
}
