//! Attackers lock no admin out, exhaust nothing, and do nothing with a key that was ended.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use keygate_e2e::{Api, Connection, Key, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

const POLICY: &str = "/api/admin/policy";
const LOCKDOWN: &str = "/api/admin/emergency/lockdown";
const CUTOFF: &str = "/api/admin/emergency/revoke";
/// A control plane has stopped by then.
const STOPS_WITHIN: Duration = Duration::from_secs(12);

fn open_policy() -> Value {
    json!({ "routes": [{ "name": "open", "path": "/*", "access": "public" }] })
}

/// Every change that an admin may order, with a body.
fn changes(victim: &Key) -> Vec<Request> {
    let put = |path: &str, body: Value| Request::new("PUT", path).json(&body);
    let post = |path: &str, body: Value| Request::post(path, &body);
    let key = |verb: &str, body: Value| post(&format!("/api/admin/keys/{}/{verb}", victim.id), body);
    vec![
        put(POLICY, open_policy()),
        put("/api/admin/rate_limits", json!({ "roles": { "basic": 1 } })),
        put("/api/admin/feature_flags", json!({ "strategy": "full", "reason": "stolen" })),
        post("/api/admin/rate_limits/emergency", json!({ "limits": { "basic": 1 }, "ttl": "1h" })),
        post("/api/admin/canary/tests", json!({ "id": "mine", "endpoint": "/api/chat" })),
        post("/api/admin/revocations", json!({ "jtis": ["foreign"], "reason": "compromised" })),
        post("/api/admin/secrets/rotate", json!({ "reason": "stolen" })),
        post(LOCKDOWN, json!({ "ttl": "1h" })),
        post(CUTOFF, json!({ "scope": { "role": "basic" } })),
        key("suspend", json!({ "reason": "stolen" })),
        key("resume", json!({ "reason": "stolen" })),
        key("revoke", json!({ "reason": "compromised" })),
        post("/api/auth/register", json!({ "name": "mine", "role": "basic" })),
        post("/api/admin/revocations/rebuild", json!({ "reason": "stolen" })),
        post("/api/admin/fleet/drain", json!({ "proxy": "nowhere" })),
    ]
}

/// The records of the journal that a key is the author of.
fn made_by(api: &Api, key_id: &str) -> Vec<Value> {
    let answer = api.get(&format!("/api/admin/audit?actor={key_id}&limit=1000")).expect(200).json();
    answer["records"].as_array().expect("records").clone()
}

#[test]
fn a_key_that_is_ended_while_its_request_is_on_the_way_changes_nothing() {
    let stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let victim = api.issue("basic");
    let end = |how: &str, thief: &Key, owner: &str| {
        let path = match how {
            "cut off" => format!("{CUTOFF}?wait=applied"),
            how => format!("/api/admin/keys/{}/{how}?wait=applied", thief.id),
        };
        let body = if how == "cut off" { json!({ "scope": { "owner": owner } }) } else { json!({}) };
        api.post(&path, &body).expect(200);
    };
    for how in ["revoke", "suspend", "cut off"] {
        let owner = format!("thief-{}", how.replace(' ', "-"));
        let thief = api.issue_with(&json!({ "name": "t", "role": "admin", "owner": owner }));
        let parked = park(&stack, &thief.token, &victim);
        end(how, &thief, &owner);
        assert_nothing_done(&api, parked, &thief, how);
    }
    stack.get("/api/chat", &victim.token).expect(200);
}

/// Requests of which a byte is missing, at the API and through Envoy.
fn park(stack: &Stack, token: &str, victim: &Key) -> Vec<(Connection, Vec<u8>, String)> {
    let ports = [stack.control_plane.api_port(), stack.envoy.port()];
    let begun = ports.into_iter().flat_map(|port| {
        changes(victim).into_iter().map(move |request| {
            let name = format!("{request:?}").chars().take(80).collect();
            let mut connection = Connection::open(port).expect("it listens");
            let rest = connection.begin_without(&request.bearer(token), 1);
            (connection, rest, name)
        })
    });
    begun.collect()
}

fn assert_nothing_done(api: &Api, parked: Vec<(Connection, Vec<u8>, String)>, thief: &Key, how: &str) {
    for (mut connection, rest, what) in parked {
        let answer = connection.send_rest(&rest).expect("an answer");
        assert_eq!(answer.status, 401, "{how}: {what}: {}", answer.text());
    }
    assert_eq!(made_by(api, &thief.id), Vec::<Value>::new(), "{how}");
}

#[test]
fn of_a_thousand_changes_none_is_made_after_their_author_was_revoked() {
    const ROUNDS: usize = 10;
    const CLIENTS: usize = 5;
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let (mut done, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let thief = api.issue("admin");
        let victim = api.issue("basic");
        let is_over = AtomicBool::new(false);
        let counts = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|client| {
                    let (thief, victim, is_over) = (&thief, &victim, &is_over);
                    let port = stack.control_plane.api_port();
                    scope.spawn(move || {
                        let mut connection = Connection::open(port).expect("it listens");
                        let (mut done, mut refused, mut n) = (0, 0, 0);
                        while refused < 10 {
                            n += 1;
                            let verb = if (client + n) % 2 == 0 { "suspend" } else { "resume" };
                            let path = format!("/api/admin/keys/{}/{verb}", victim.id);
                            let request =
                                Request::post(path, &json!({ "reason": "race" })).bearer(&thief.token);
                            let before = is_over.load(Ordering::SeqCst);
                            match connection.send(&request).status {
                                200 if before => panic!("done although its author was revoked before"),
                                200 => done += 1,
                                401 => refused += 1,
                                other => panic!("{other}"),
                            }
                        }
                        (done, refused)
                    })
                })
                .collect();
            keygate_e2e::wait::pass(Duration::from_millis(20 + 7 * round as u64));
            let path = format!("/api/admin/keys/{}/revoke", thief.id);
            api.post(&path, &json!({ "reason": "compromised" })).expect(200);
            is_over.store(true, Ordering::SeqCst);
            clients.into_iter().map(|client| client.join().expect("it ends")).collect::<Vec<_>>()
        });
        done += counts.iter().map(|(done, _)| done).sum::<usize>();
        refused += counts.iter().map(|(_, refused)| refused).sum::<usize>();
        let path = format!("/api/admin/audit?target={}&action=key_revoked", thief.id);
        let revoked = api.get(&path).expect(200).json()["records"][0]["seq"].as_u64().expect("a number");
        let last = made_by(&api, &thief.id).first().and_then(|record| record["seq"].as_u64());
        assert!(last.is_none_or(|last| last < revoked), "{last:?} after {revoked}");
    }
    println!("{done} changes made, {refused} refused");
    assert!(done + refused >= 1_000 && done >= 100, "{done} {refused}");
}

#[test]
fn whatever_is_parked_a_control_plane_stops_in_time() {
    let mut stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let victim = api.issue("basic");
    let token = api.key();
    let mut parked = Vec::new();
    for port in [stack.control_plane.api_port(), stack.control_plane.sync_port()] {
        let mut half = Connection::open(port).expect("it listens");
        half.begin_without(&Request::get("/health").header("x-a", "b"), 3);
        parked.push(half);
        let mut upload = Connection::open(port).expect("it listens");
        upload.begin_without(&Request::new("PUT", POLICY).json(&open_policy()).bearer(&token), 5);
        parked.push(upload);
    }
    // A proxy that is stopped enforces nothing, so that this waits for it.
    stack.envoy.kill();
    let mut waits = Connection::open(stack.control_plane.api_port()).expect("it listens");
    let path = format!("/api/admin/keys/{}/suspend?wait=applied&timeout=2m", victim.id);
    waits.begin(&Request::post(path, &json!({})).bearer(&token));
    wait_until(SOON, "the suspension", || {
        api.get(&format!("/api/admin/keys/{}", victim.id)).json()["state"] == "suspended"
    });
    let started = Instant::now();
    let status = stack.control_plane.stop();
    assert!(status.success() && started.elapsed() < STOPS_WITHIN, "{status} after {:?}", started.elapsed());
    stack.control_plane.start();
    let state = api.get(&format!("/api/admin/keys/{}", victim.id)).expect(200).json();
    assert_eq!(state["state"], "suspended");
    drop((parked, waits));
}

#[test]
fn idle_connections_beyond_the_open_files_keep_out_neither_proxies_nor_admins() {
    let mut stack = Stack::builder().workers(1).without_control_plane().without_envoy().start();
    stack.control_plane.start_with_files(256);
    stack.start_envoy();
    stack.envoy.wait_ready();
    let api = stack.api();
    let mut idle = Vec::new();
    for n in 0..400 {
        for port in [stack.control_plane.api_port(), stack.control_plane.sync_port()] {
            let mut connection = Connection::open(port).expect("it listens");
            if n % 2 == 0 {
                connection.begin_without(&Request::get("/health"), 2);
            }
            idle.push(connection);
        }
    }
    for _ in 0..3 {
        let key = api.issue("basic");
        stack.get("/api/chat", &key.token).expect(200);
        api.revoke(&key.id).expect_everywhere(1);
        stack.get("/api/chat", &key.token).expect(401);
    }
    // Those that gave way were closed at once, and of the others a head must come within 10 s.
    assert!(idle[0].is_closed_within(Duration::from_secs(1)));
    let mut late = Connection::open(stack.control_plane.api_port()).expect("it listens");
    late.begin_without(&Request::get("/health"), 2);
    let begun = Instant::now();
    assert!(late.is_closed_within(Duration::from_secs(15)));
    assert!(begun.elapsed() > Duration::from_secs(9), "{:?}", begun.elapsed());
}

#[test]
fn a_key_that_parks_uploads_keeps_nobody_out() {
    let stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let greedy = api.issue("node_operator");
    let good = api.issue("basic");
    let upload =
        Request::post("/api/auth/register", &json!({ "name": "n", "role": "basic" })).bearer(&greedy.token);
    let mut parked = Vec::new();
    for _ in 0..1_100 {
        let mut connection = stack.envoy.connect();
        connection.begin_without(&upload, 3);
        parked.push(connection);
    }
    // Through Envoy, as everybody else.
    let through = Api::new(stack.envoy.port(), &api.key());
    let validated = Request::get("/api/auth/validate").bearer(&good.token);
    wait_until(SOON, "the surplus of uploads to be refused", || stack.call(&validated).status == 200);
    for _ in 0..20 {
        stack.call(&validated).expect(200);
        stack.get("/api/chat", &good.token).expect(200);
        through.get("/api/admin/fleet").expect(200);
    }
    let revoked = api.issue("basic");
    api.revoke(&revoked.id).expect_everywhere(1);
    drop(parked);
}

#[test]
fn no_rule_ends_keys_that_are_not_issued_yet() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let future = |scope: Value| json!({ "scope": scope });
    api.post(CUTOFF, &future(json!({ "created_before": "9999-01-01T00:00:00Z" })))
        .expect_problem(400, "bad_request");
    let after =
        future(json!({ "created_after": "2999-01-01T00:00:00Z", "created_before": "9999-01-01T00:00:00Z" }));
    api.post(CUTOFF, &after).expect_problem(400, "bad_request");
    for body in [
        json!({ "ttl": "30d" }),
        json!({ "ttl": "25h" }),
        json!({ "ttl": "1h", "exempt_roles": [] }),
        json!({ "ttl": "1h", "exempt_roles": ["basic"] }),
    ] {
        api.post(LOCKDOWN, &body).expect_problem(400, "bad_request");
    }
    assert_eq!(api.get("/api/admin/emergency").expect(200).json()["active"], false);
}

#[test]
fn whoever_may_start_the_control_plane_can_come_back() {
    let mut stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let body = json!({ "ttl": "24h", "exempt_roles": [], "lock_out_admins": true, "reason": "mine" });
    api.post(LOCKDOWN, &body).expect(200);
    api.get("/api/admin/emergency").expect_problem(401, "invalid_token");
    stack.control_plane.stop();
    stack.control_plane.want_new_admin_key();
    stack.control_plane.start();
    let back = stack.api();
    let shown = back.get("/api/admin/emergency").expect(200).json();
    assert_eq!(shown["lockdown"]["exempt_roles"], json!(["admin"]), "{shown}");
    back.send(Request::new("DELETE", LOCKDOWN).json(&json!({ "reason": "INC-7" }))).expect(200);

    back.post(LOCKDOWN, &body).expect(200);
    stack.control_plane.stop();
    let data = stack.control_plane.data().to_owned();
    let lifts = |arguments: &[&str]| {
        let output = std::process::Command::new(keygate_e2e::binaries::keygate())
            .args(["emergency", "lift", "--offline"])
            .args(arguments)
            .arg("--data-dir")
            .arg(&data)
            .output()
            .expect("keygate runs");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (status, said) = lifts(&["all"]);
    assert!(status == Some(0) && said.contains("next start"), "{said}");
    stack.control_plane.start();
    let shown = back.get("/api/admin/emergency").expect(200).json();
    assert_eq!((&shown["active"], &shown["lockdown"]), (&json!(false), &Value::Null), "{shown}");
    let lifted = back.get("/api/admin/audit?action=lockdown_changed&limit=1").expect(200).json();
    assert_eq!(lifted["records"][0]["actor"], "system", "{lifted}");
    assert_eq!(lifts(&["all"]).0, Some(1), "it runs");
}

#[test]
fn policy_and_lists_leave_room_for_emergencies() {
    let stack = Stack::builder().without_envoy().config("[rollout]\nv1_cluster = \"upstream_v1\"\n").start();
    let api = stack.api();
    let put = |path: &str, body: &Value| api.send(Request::new("PUT", path).json(body)).status;
    // As long as they are taken.
    let routes = |count: usize| {
        let route =
            |n: usize| json!({ "name": format!("r{n}"), "path": format!("/{n:0>100}"), "access": "key" });
        json!({ "routes": (0..count).map(route).collect::<Vec<_>>() })
    };
    let mut taken = 0;
    for count in (50..2_000).step_by(50) {
        if put(POLICY, &routes(count)) != 200 {
            break;
        }
        taken = count;
    }
    assert!(taken > 500, "{taken}");
    let mut users = 0;
    for count in (100..20_000).step_by(100) {
        let names: Vec<String> = (0..count).map(|n| format!("{n:0>60}")).collect();
        let body = json!({ "strategy": "canary", "canary_users": names });
        if put("/api/admin/feature_flags", &body) != 200 {
            break;
        }
        users = count;
    }
    println!("{taken} routes, {users} users");
    for n in 0..40 {
        let scope = json!({ "scope": { "owner": format!("{n:0>64}") } });
        api.post(CUTOFF, &scope).expect(200);
    }
    api.post(LOCKDOWN, &json!({ "ttl": "1h" })).expect(200);
    api.send(Request::new("DELETE", LOCKDOWN)).expect(200);
    let rotate = api.post("/api/admin/secrets/rotate", &json!({ "reason": "leaked", "immediate": true }));
    assert_eq!(rotate.status, 202, "{}", rotate.text());
}

#[test]
fn the_holder_of_the_fleet_token_fills_neither_memory_nor_terminals() {
    let stack = Stack::builder().without_envoy().start();
    let send = |path: &str, body: &Value| {
        let request = Request::post(path, body).bearer(stack.fleet_token());
        keygate_e2e::http::call(stack.control_plane.sync_port(), &request)
    };
    let file = stack.control_plane.data().join("telemetry.redb");
    let size = || std::fs::metadata(&file).map_or(0, |file| file.len());
    let before = size();
    for report in 0..40 {
        let counts: serde_json::Map<String, Value> =
            (0..1_300).map(|n| (format!("{report}-{n:0>380}"), json!([0, 1]))).collect();
        let body =
            json!({ "format": 1, "proxy": format!("p{report}"), "incarnation": "1", "counts": counts });
        send("/sync/v1/report", &body).expect(200);
    }
    assert!(size() < before + 4_000_000, "{} bytes, {before} before", size());
    for bad in ["a\u{1b}[31m", "a\nb", "a\u{0}", "a\u{202e}b", "ü"] {
        let report = json!({ "format": 1, "proxy": bad, "incarnation": "1", "counts": {} });
        assert_eq!(send("/sync/v1/report", &report).status, 400, "{bad:?}");
    }
    // Without the token no body is waited for.
    let mut upload = Connection::open(stack.control_plane.sync_port()).expect("it listens");
    let report = json!({ "format": 1, "proxy": "p", "incarnation": "1", "counts": {} });
    upload.begin_without(&Request::post("/sync/v1/report", &report).bearer("wrong"), 5);
    assert_eq!(upload.receive().status, 401);
    let mut upload = Connection::open(stack.control_plane.api_port()).expect("it listens");
    upload.begin_without(
        &Request::post("/api/auth/register", &json!({ "name": "n" })).bearer("no.key.atall"),
        5,
    );
    assert_eq!(upload.receive().status, 401);
}

#[test]
fn series_of_routes_that_are_gone_go() {
    let stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let lines = || api.get("/metrics").expect(200).text().lines().count();
    let before = lines();
    let original = api.get(POLICY).expect(200).json();
    let replace = |routes: Value| {
        let body = json!({ "routes": routes });
        api.send(Request::new("PUT", format!("{POLICY}?wait=applied")).json(&body)).expect(200);
    };
    for round in 0..3 {
        let route = |n: usize| json!({ "name": format!("r{round}-{n}"), "path": format!("/r{n}"), "access": "public" });
        replace((0..300).map(route).collect());
        stack.call(&Request::get("/r7")).expect(200);
        wait_until(SOON, "it to be counted", || {
            let counted = format!("endpoint=\"r{round}-7\",outcome=\"passed\",version=\"v2\"}} 1");
            api.get("/metrics").expect(200).text().contains(&counted)
        });
    }
    replace(original["routes"].clone());
    assert!(lines() <= before + 20, "{} lines, {before} before", lines());
}
