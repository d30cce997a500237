//! What a client sees through Envoy, and what the upstream behind it.

use keygate_e2e::{Connection, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

/// Panics unless good requests are served, by every worker.
#[track_caller]
pub fn assert_serves(workers: &mut [Connection], token: &str) {
    for (worker, connection) in workers.iter_mut().enumerate() {
        let answer = connection.send(&Request::get("/api/chat").bearer(token));
        assert_eq!(answer.status, 200, "worker {worker}: {}", answer.text());
    }
}

#[test]
fn without_a_key_the_answer_is_a_bare_challenge() {
    let stack = Stack::start();
    for request in [
        Request::get("/api/chat"),
        Request::get("/api/chat").header("authorization", "Basic dXNlcjpwYXNz"),
        Request::new("POST", "/api/chat"),
        Request::get("/api/admin/keys"),
    ] {
        let answer = stack.call(&request).expect_problem(401, "missing_credential");
        let challenge = answer.header("www-authenticate").expect("a challenge");
        // RFC 6750 section 3.1: no error code for a request without credentials.
        assert!(challenge.starts_with("Bearer realm=\"") && !challenge.contains("error"), "{challenge}");
    }
    assert_eq!(stack.upstream.seen(), 0);
}

#[test]
fn a_good_key_passes_and_the_upstream_learns_whose_it_is() {
    let stack = Stack::start();
    let key = stack
        .api()
        .issue_with(&json!({ "name": "mine", "role": "basic", "scopes": ["chat:read"], "owner": "team-a" }));
    for request in [
        Request::get("/api/chat").bearer(&key.token),
        Request::get("/api/chat").header("authorization", format!("bEaReR {}", key.token)),
        Request::get("/api/chat").header("x-api-key", &key.token),
    ] {
        let answer = stack.call(&request).expect(200).json();
        assert_eq!(answer["upstream"], "v2");
        assert_eq!(answer["path"], "/api/chat");
        let headers = &answer["headers"];
        assert_eq!(headers["x-keygate-version"], "v2");
        assert_eq!(headers["x-keygate-key-id"], key.id.as_str());
        assert_eq!(headers["x-keygate-role"], "basic");
        assert_eq!(headers["x-keygate-scopes"], "chat:read");
        assert_eq!(headers["x-keygate-owner"], "team-a");
    }
}

#[test]
fn what_a_client_forges_never_reaches_the_upstream() {
    let stack = Stack::start();
    let key = stack.api().issue("basic");
    let forged = |request: Request| {
        request
            .header("x-keygate-role", "admin")
            .header("X-Keygate-Role", "admin")
            .header("x_keygate_role", "admin")
            .header("X_KEYGATE-ROLE", "admin")
            .header("x-keygate-key-id", "forged")
            .header("x-keygate-scopes", "system:manage")
            .header("x-keygate-owner", "forged")
            .header("x-keygate-version", "v1")
            .header("x-keygate-anything", "forged")
    };
    let look_alikes = |answer: &Value| -> Vec<(String, Value)> {
        let headers = answer["headers"].as_object().expect("headers").clone();
        headers.into_iter().filter(|(name, _)| name.replace('_', "-").starts_with("x-keygate-")).collect()
    };

    let answer = stack.call(&forged(Request::get("/api/chat").bearer(&key.token))).expect(200).json();
    let headers = &answer["headers"];
    assert_eq!(headers["x-keygate-role"], "basic");
    assert_eq!(headers["x-keygate-key-id"], key.id.as_str());
    assert_eq!(headers["x-keygate-version"], "v2");
    // Modules cannot set empty headers.
    let (nobody, told) = if stack.envoy.has_module() { (Value::Null, 4) } else { (json!(""), 5) };
    assert_eq!(headers["x-keygate-owner"], nobody, "no owner, and not a forged one");
    assert_eq!(look_alikes(&answer).len(), told, "{answer}");

    // On a public route there is nobody to speak for, so nothing but the version.
    let answer = stack.call(&forged(Request::get("/"))).expect(200).json();
    assert_eq!(look_alikes(&answer), vec![("x-keygate-version".to_owned(), json!("v2"))]);
}

#[test]
fn a_key_may_do_what_its_scopes_and_role_say() {
    let stack = Stack::start();
    let api = stack.api();
    let reader = api.issue_with(&json!({ "name": "r", "role": "basic", "scopes": ["chat:read"] }));
    let chatter = api.issue("basic");
    let contributor = api.issue("contributor");
    let admin = stack.control_plane.admin_key();

    let cases = [
        ("GET", "/api/chat", &reader.token, 200),
        ("POST", "/api/chat", &reader.token, 403),
        ("GET", "/api/dataset", &reader.token, 403),
        ("POST", "/api/chat", &chatter.token, 200),
        ("GET", "/api/dataset", &chatter.token, 403),
        ("GET", "/api/dataset", &contributor.token, 200),
        ("DELETE", "/api/dataset", &contributor.token, 200),
        ("GET", "/api/admin/fleet", &contributor.token, 403),
        ("GET", "/api/dataset", &admin, 200),
        ("GET", "/api/admin/fleet", &admin, 200),
        ("GET", "/api/auth/validate", &reader.token, 200),
    ];
    for (method, path, token, status) in cases {
        let answer = stack.call(&Request::new(method, path).bearer(token));
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
        if status == 403 {
            let answer = answer.expect_problem(403, "insufficient_scope");
            let challenge = answer.header("www-authenticate").expect("a challenge");
            assert!(challenge.contains("error=\"insufficient_scope\""), "{challenge}");
        }
    }
    let refused = stack.call(&Request::new("POST", "/api/chat").bearer(&reader.token));
    let challenge = refused.header("www-authenticate").expect("a challenge");
    assert!(challenge.contains("scope=\"chat:write\""), "RFC 6750: the scope it takes: {challenge}");
}

#[test]
fn two_credentials_are_one_too_many() {
    let stack = Stack::start();
    let good = stack.api().issue("basic").token;
    let other = stack.api().issue("basic").token;
    let get = || Request::get("/api/chat");
    for request in [
        get().bearer(&good).header("x-api-key", &good),
        get().bearer(&good).header("x-api-key", &other),
        get().bearer(&good).bearer(&good),
        get().bearer(&good).bearer("x"),
        get().header("x-api-key", &good).header("x-api-key", &good),
        get().header("x-api-key", &good).header("x-api-key", ""),
        get().header("authorization", format!("Bearer {good}, Bearer {other}")),
        get().header("authorization", format!("Basic dXNlcjpwYXNz, Bearer {good}")),
        get().header("x-api-key", format!("{good},{good}")),
    ] {
        stack.call(&request).expect_problem(400, "too_many_credentials");
    }
    assert_eq!(stack.upstream.seen(), 0);
    // Another scheme is no credential of ours.
    let request = get().header("authorization", "Basic dXNlcjpwYXNz").header("x-api-key", &good);
    stack.call(&request).expect(200);
}

#[test]
fn what_the_policy_does_not_name_is_refused() {
    let stack = Stack::start();
    let key = stack.api().issue("contributor").token;
    let admin = stack.control_plane.admin_key();
    for (method, path) in [
        ("GET", "/nothing"),
        ("GET", "/api"),
        ("GET", "/api/chatter"),
        ("GET", "/api/chat/more"),
        ("GET", "/API/chat"),
        ("PUT", "/api/chat"),
        ("PATCH", "/api/chat"),
        ("GET", "/index.html"),
    ] {
        for request in [
            Request::new(method, path),
            Request::new(method, path).bearer(&key),
            Request::new(method, path).bearer(&admin),
        ] {
            let answer = stack.call(&request);
            assert_eq!(answer.status, 403, "{method} {path}: {}", answer.text());
            answer.expect_problem(403, "no_route");
        }
    }
    assert_eq!(stack.upstream.seen(), 0);
}

#[test]
fn a_public_route_needs_nothing() {
    let stack = Stack::start();
    for request in [
        Request::get("/"),
        Request::get("/?a=b"),
        Request::new("POST", "/").body("hello"),
        Request::get("/").bearer("no key at all"),
        Request::get("/").bearer("a").bearer("b"),
    ] {
        let answer = stack.call(&request).expect(200).json();
        assert_eq!(answer["headers"]["x-keygate-key-id"], Value::Null);
    }
}

#[test]
fn no_spelling_of_a_path_gets_around_the_policy() {
    let stack = Stack::start();
    let paths: [&[u8]; 24] = [
        b"//api/chat",
        b"/api//chat",
        b"/./api/chat",
        b"/x/../api/chat",
        b"/api/chat/",
        b"/api/chat/.",
        b"/api/%63hat",
        b"/%61pi/chat",
        b"/api%2fchat",
        b"/api%5cchat",
        b"/api\\chat",
        b"/api/chat;x=1",
        b"/api/chat%00",
        b"/api/chat%3f",
        b"/api/chat%23",
        b"/api/chat#x",
        b"/%2e%2e/api/chat",
        b"/..;/api/chat",
        b"/api/chat%20",
        b"/?/../api/chat",
        b"/api/chat?/../../",
        b"http://localhost/api/chat",
        b"*",
        b"/api/chat\xff",
    ];
    for path in paths {
        let shown = String::from_utf8_lossy(path);
        let Ok(answer) = stack.envoy.connect().try_send(&Request::get(path)) else { continue };
        if answer.status == 200 {
            // The one public route, as the upstream saw it.
            let seen = answer.json()["path"].as_str().expect("a path").to_owned();
            assert!(seen == "/" || seen.starts_with("/?"), "{shown} reached {seen}");
        }
    }
    // And what is the same path to the upstream is the same to the policy.
    let key = stack.api().issue("basic").token;
    for path in ["//api//chat", "/x/../api/chat", "/api/./chat", "/api/chat?a=/../b"] {
        let answer = stack.get(path, &key).expect(200).json();
        let seen = answer["path"].as_str().expect("a path");
        assert_eq!(seen.split('?').next(), Some("/api/chat"), "{path}");
    }
}

#[test]
fn every_byte_in_any_header_leaves_the_proxy_alive() {
    let stack = Stack::start();
    let key = stack.api().issue("basic").token;
    let mut workers = stack.envoy.connect_to_all_workers();
    for byte in 0..=u8::MAX {
        let odd = [b'a', byte, b'b'];
        let mut in_the_bearer = b"Bearer ".to_vec();
        in_the_bearer.push(byte);
        let requests = [
            Request::get("/api/chat").bearer(&key).header("x", [byte]),
            Request::get("/api/chat").bearer(&key).header("x", odd),
            Request::get("/api/chat").header("authorization", &in_the_bearer),
            Request::get("/api/chat").header("authorization", odd),
            Request::get("/api/chat").header("x-api-key", [byte]),
            Request::get("/api/chat").bearer(&key).header(odd, "x"),
            Request::get("/api/chat").header("x-keygate-role", odd),
            Request::get([b"/api/chat?", &odd[..]].concat()).bearer(&key),
            Request::get([b"/api/", &odd[..]].concat()).bearer(&key),
        ];
        for (case, request) in requests.iter().enumerate() {
            // On a worker in turn; Envoy itself may refuse it and close, hence a connection each.
            let answer = stack.envoy.connect().try_send(request);
            if byte >= 0x80 && case < 2 {
                assert_eq!(answer.expect("an answer").status, 200, "x: {byte:#x} beside a good key");
            } else if byte >= 0x80 && case == 2 {
                answer.expect("an answer").expect_problem(401, "invalid_token");
            } else if let Ok(answer) = answer {
                assert_ne!(answer.status, 503, "case {case}, byte {byte:#x}");
            }
        }
        assert_serves(&mut workers, &key);
    }
    // The same again on each worker itself, for the bytes that Envoy lets through.
    for connection in &mut workers {
        for byte in 0x80..=u8::MAX {
            connection.send(&Request::get("/api/chat").bearer(&key).header("x", [byte])).expect(200);
            let refused = Request::get("/api/chat").bearer([byte]);
            connection.send(&refused).expect_problem(401, "invalid_token");
        }
    }
    assert_serves(&mut workers, &key);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn a_thousand_headers_are_no_trouble() {
    let stack = Stack::start();
    let key = stack.api().issue("basic").token;
    let mut workers = stack.envoy.connect_to_all_workers();
    for connection in &mut workers {
        let request = (0..1000)
            .fold(Request::get("/api/chat").bearer(&key), |request, n| request.header(format!("x-{n}"), "v"));
        let answer = connection.send(&request).expect(200).json();
        assert_eq!(answer["headers"]["x-999"], "v");
        // A thousand of one name, and of ours.
        let request = (0..1000)
            .fold(Request::get("/api/chat").bearer(&key), |request, _| request.header("x-same", "v"));
        connection.send(&request).expect(200);
        let request = (0..1000).fold(Request::get("/api/chat").bearer(&key), |request, n| {
            request.header(format!("x-keygate-{n}"), "v")
        });
        let answer = connection.send(&request).expect(200).json();
        assert_eq!(answer["headers"]["x-keygate-999"], Value::Null);
    }
    // More than Envoy takes: it refuses, and goes on.
    let request = (0..3000)
        .fold(Request::get("/api/chat").bearer(&key), |request, n| request.header(format!("x-{n}"), "v"));
    assert_eq!(stack.call(&request).status, 431);
    assert_serves(&mut workers, &key);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn readiness_is_answered_by_every_worker_and_nobody_else() {
    let stack = Stack::start();
    for connection in &mut stack.envoy.connect_to_all_workers() {
        let answer = connection.send(&Request::get("/.keygate/ready")).expect(200);
        assert!(answer.text().chars().any(|c| c.is_ascii_digit()), "no version: {}", answer.text());
    }
    assert_eq!(stack.upstream.seen(), 0);
}

#[test]
fn envoys_own_stats_count_decisions_by_reason() {
    let stack = Stack::builder().workers(1).start();
    let count = |reason: &str| {
        let text = stack.envoy.admin("/stats/prometheus").expect(200).text();
        let series = format!("keygate_decisions_total{{reason=\"{reason}\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(series.as_str()).map(str::to_owned));
        value.unwrap_or_else(|| panic!("no {series} in {text}")).parse::<u64>().expect("a count")
    };
    assert_eq!((count("no_route"), count("revoked")), (0, 0), "every series is there from the start");
    stack.call(&Request::get("/nowhere")).expect(403);
    assert_eq!(count("no_route"), 1);
    // More than the filter tells Envoy of at once: the others come with a tick, and none is lost or told of twice.
    let mut connection = stack.envoy.connect();
    for _ in 0..1_000 {
        connection.send(&Request::get("/nowhere")).expect(403);
    }
    wait_until(SOON, "all decisions in Envoy's stats", || count("no_route") >= 1_001);
    stack.call(&Request::get("/nowhere")).expect(403);
    wait_until(SOON, "one more", || count("no_route") >= 1_002);
    assert_eq!(count("no_route"), 1_002);
}

#[test]
fn the_access_log_says_who_and_why_and_never_the_key() {
    let stack = Stack::start();
    let key = stack.api().issue("basic");
    stack.call(&Request::get("/api/chat").bearer(&key.token).header("user-agent", "good")).expect(200);
    stack.call(&Request::get("/api/dataset").bearer(&key.token).header("user-agent", "scope")).expect(403);
    stack.call(&Request::get("/api/chat").header("user-agent", "none")).expect(401);
    stack.call(&Request::get("/x").header("user-agent", "route")).expect(403);
    stack.call(&Request::get("/").header("user-agent", "public")).expect(200);
    for (agent, outcome, key_id) in [
        ("good", "allowed", json!(key.id)),
        ("scope", "missing_scope", json!(key.id)),
        ("none", "missing_credential", Value::Null),
        ("route", "no_route", Value::Null),
        ("public", "public", Value::Null),
    ] {
        let line = stack.envoy.logged(agent);
        assert_eq!(line["outcome"], outcome, "{line}");
        assert_eq!(line["key_id"], key_id, "{line}");
    }
    stack.api().revoke(&key.id);
    stack.call(&Request::get("/api/chat").bearer(&key.token).header("user-agent", "dead")).expect(401);
    let line = stack.envoy.logged("dead");
    assert_eq!((&line["outcome"], &line["key_id"]), (&json!("revoked"), &json!(key.id)));

    let log = std::fs::read_to_string(stack.envoy.access_log_file()).expect("the log");
    assert!(!log.contains(&key.token));
}

#[test]
fn connections_above_the_limit_are_closed_until_others_end() {
    let mut stack = Stack::builder().workers(2).without_envoy().start();
    stack.envoy.use_connection_limit(3);
    stack.start_envoy();
    stack.envoy.wait_ready();
    let overflows =
        || stack.envoy.stat(&format!("listener.127.0.0.1_{}.downstream_cx_overflow", stack.envoy.port()));
    wait_until(SOON, "earlier connections to be gone", || {
        stack.envoy.stat(&format!("listener.127.0.0.1_{}.downstream_cx_active", stack.envoy.port())) == 0
    });
    let (before, mut connections) = (overflows(), Vec::new());
    for _ in 0..3 {
        let mut connection = stack.envoy.connect();
        connection.send(&Request::get("/")).expect(200);
        connections.push(connection);
    }
    assert!(
        keygate_e2e::http::try_call(stack.envoy.port(), &Request::get("/")).is_err(),
        "the fourth passes"
    );
    // Envoy counts it as it closes it.
    wait_until(SOON, "it to be counted", || overflows() == before + 1);
    connections.pop();
    wait_until(SOON, "a place", || {
        keygate_e2e::http::try_call(stack.envoy.port(), &Request::get("/")).is_ok()
    });
}
