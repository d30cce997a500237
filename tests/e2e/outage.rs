//! What is lost when something is lost: nothing that was answered, and no request that could be decided.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use keygate_e2e::fake_sync::{Behaviour, FakeSync};
use keygate_e2e::{Api, Key, Request, SOON, Stack, tier, wait_until};
use serde_json::json;

use crate::requests::assert_serves;

/// How long something misbehaves: a few polls' worth.
const A_WHILE: Duration = Duration::from_secs(15);

#[test]
fn without_a_control_plane_everything_stays_as_it_was() {
    let mut stack = Stack::start();
    let (good, dead) = (stack.api().issue("basic"), stack.api().issue("basic"));
    stack.api().revoke(&dead.id);
    let mut workers = stack.envoy.connect_to_all_workers();
    stack.control_plane.stop();

    for _ in 0..20 {
        assert_serves(&mut workers, &good.token);
        for connection in &mut workers {
            let refused = connection.send(&Request::get("/api/chat").bearer(&dead.token));
            refused.expect_problem(401, "invalid_token");
            connection.send(&Request::get("/.keygate/ready")).expect(200);
        }
    }

    stack.control_plane.start();
    // It catches up by itself: what is new is enforced.
    let api = stack.api();
    wait_until(SOON, "the proxy to be back", || {
        let late = api.issue("basic");
        api.revoke(&late.id).applied == 1
    });
    api.revoke(&good.id).expect_everywhere(1);
    for connection in &mut workers {
        connection.send(&Request::get("/api/chat").bearer(&good.token)).expect(401);
    }
    assert_serves(&mut workers, &api.issue("basic").token);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn envoy_may_come_first() {
    let mut stack = Stack::builder().without_control_plane().start();
    let mut workers = stack.envoy.connect_to_all_workers();
    for connection in &mut workers {
        connection.send(&Request::get("/.keygate/ready")).expect(503);
        for request in [
            Request::get("/api/chat"),
            Request::get("/api/chat").bearer("a.b.c"),
            Request::get("/"),
            Request::get("/nothing"),
        ] {
            let answer = connection.send(&request).expect_problem(503, "unavailable");
            assert!(answer.header("retry-after").is_some(), "{:?}", answer.headers);
        }
    }
    assert_eq!(stack.upstream.seen(), 0);

    stack.control_plane.start();
    stack.envoy.wait_ready();
    assert_serves(&mut workers, &stack.api().issue("basic").token);
    workers[0].send(&Request::get("/")).expect(200);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn a_killed_control_plane_loses_nothing_that_was_answered() {
    let rounds: u64 = tier::repeats(8, 20);
    let mut stack = Stack::start();
    let (mut good, mut dead): (Vec<Key>, Vec<Key>) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let api = stack.api();
        // Calls go on until the kill, which comes after another number of answers each round, in the
        // midst of the next call; what was answered by then counts.
        let (over, answers) = (AtomicBool::new(false), AtomicU64::new(0));
        let (issued, revoked) = std::thread::scope(|scope| {
            let calls = scope.spawn(|| issue_and_revoke(&api, &over, &answers));
            wait_until(SOON, "answers", || answers.load(Ordering::Relaxed) >= 3 + round % 5);
            stack.control_plane.kill();
            over.store(true, Ordering::Relaxed);
            calls.join().expect("the calls")
        });
        good.extend(issued);
        dead.extend(revoked);
        stack.control_plane.start();
        let api = stack.api();
        for key in &good {
            let answer = api.call(&Request::get("/api/auth/validate").bearer(&key.token));
            assert_eq!(answer.status, 200, "round {round}: a key that was issued is gone");
        }
        for key in &dead {
            let answer = api.call(&Request::get("/api/auth/validate").bearer(&key.token));
            assert_eq!(answer.status, 401, "round {round}: a key that was revoked is back");
        }
    }
    println!("{} issued and {} revoked over {rounds} kills", good.len(), dead.len());
    assert!(dead.len() as u64 >= rounds, "hardly anything was answered before the kills");

    // And the proxy is of the same mind.
    let last = stack.api().issue("basic");
    wait_until(SOON, "the proxy to be back", || stack.get("/api/chat", &last.token).status == 200);
    for key in &good {
        stack.get("/api/chat", &key.token).expect(200);
    }
    for key in &dead {
        stack.get("/api/chat", &key.token).expect(401);
    }
}

/// Issues two keys and revokes one of them, again and again; returns those of which that was answered.
fn issue_and_revoke(api: &Api, over: &AtomicBool, answers: &AtomicU64) -> (Vec<Key>, Vec<Key>) {
    let (mut issued, mut revoked) = (Vec::new(), Vec::new());
    let issue = || {
        let request = Request::post("/api/auth/register", &json!({ "name": "k", "role": "basic" }));
        let answer = api.try_send(request).ok()?.expect(201);
        answers.fetch_add(1, Ordering::Relaxed);
        Some(Key::from_answer(&answer.json()))
    };
    while !over.load(Ordering::Relaxed) {
        issued.extend(issue());
        let Some(key) = issue() else { continue };
        let path = format!("/api/admin/keys/{}/revoke", key.id);
        let request = Request::post(path, &json!({ "reason": "compromised" }));
        // Not answered: it may be revoked or not, and counts for neither.
        if let Ok(answer) = api.try_send(request) {
            answer.expect(200);
            answers.fetch_add(1, Ordering::Relaxed);
            revoked.push(key);
        }
    }
    (issued, revoked)
}

fn misbehaviours() -> Vec<(&'static str, Behaviour)> {
    let huge = b"HTTP/1.1 200 OK\r\ncontent-length: 9999999\r\n\r\nKG".to_vec();
    let chunks = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec();
    let moved = b"HTTP/1.1 307 Moved\r\nlocation: /x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    vec![
        ("a closed connection", Behaviour::Close),
        ("bytes that are no HTTP", Behaviour::Answer(b"\x00\xff\x16\x03\x01 garbage\r\n\r\n".to_vec())),
        ("a body that ends early", Behaviour::Answer(huge)),
        ("bad chunks", Behaviour::Answer(chunks)),
        ("a redirect", Behaviour::Answer(moved.to_vec())),
        ("500", Behaviour::http("500 Oops", b"no")),
        ("401", Behaviour::http("401 Unauthorized", b"{}")),
        ("204", Behaviour::Answer(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n".to_vec())),
        ("an empty body", Behaviour::http("200 OK", b"")),
        ("JSON", Behaviour::http("200 OK", br#"{"version": 1, "revoked": []}"#)),
        ("zeroes", Behaviour::http("200 OK", &[0; 4096])),
        ("ones", Behaviour::http("200 OK", &[0xff; 4096])),
        ("9 MiB", Behaviour::http("200 OK", &vec![b'K'; 9 << 20])),
        ("silence", Behaviour::Silence),
    ]
}

#[test]
fn a_poll_that_fails_in_any_way_changes_nothing() {
    let mut stack = Stack::start();
    let (good, dead) = (stack.api().issue("basic"), stack.api().issue("basic"));
    stack.api().revoke(&dead.id);
    let mut workers = stack.envoy.connect_to_all_workers();
    stack.control_plane.stop();

    for (what, behaviour) in misbehaviours() {
        let patient = matches!(behaviour, Behaviour::Silence);
        let fake = FakeSync::start(stack.control_plane.sync_port(), behaviour);
        let polls = if patient { 1 } else { 2 };
        wait_until(A_WHILE, &format!("polls answered with {what}"), || {
            assert_serves(&mut workers, &good.token);
            for connection in &mut workers {
                let answer = connection.send(&Request::get("/api/chat").bearer(&dead.token));
                assert_eq!(answer.status, 401, "with {what}");
            }
            fake.polls() >= polls
        });
        assert_serves(&mut workers, &good.token);
    }

    stack.control_plane.start();
    let api = stack.api();
    // The last poll was met with silence and is given up only after its time-out.
    wait_until(Duration::from_secs(60), "the proxy to be back", || {
        api.fleet().iter().any(|proxy| proxy.to_string().contains("envoy-1"))
    });
    api.revoke(&good.id).expect_everywhere(1);
    stack.get("/api/chat", &good.token).expect(401);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn nonsense_is_no_first_state() {
    let mut stack = Stack::builder().without_control_plane().without_envoy().start();
    let mut behaviours = misbehaviours().into_iter();
    let (_, first) = behaviours.next().expect("one");
    let mut fake = FakeSync::start(stack.control_plane.sync_port(), first);
    stack.start_envoy();
    let mut workers = stack.envoy.connect_to_all_workers();
    loop {
        let met = fake.polls();
        wait_until(A_WHILE, "a poll", || fake.polls() > met);
        for connection in &mut workers {
            connection.send(&Request::get("/.keygate/ready")).expect(503);
            connection.send(&Request::get("/api/chat")).expect_problem(503, "unavailable");
            connection.send(&Request::get("/")).expect_problem(503, "unavailable");
        }
        drop(fake);
        let Some((_, next)) = behaviours.next() else { break };
        if matches!(next, Behaviour::Silence) {
            break;
        }
        fake = FakeSync::start(stack.control_plane.sync_port(), next);
    }
    assert_eq!(stack.upstream.seen(), 0);

    stack.control_plane.start();
    stack.envoy.wait_ready();
    assert_serves(&mut workers, &stack.api().issue("basic").token);
    stack.envoy.assert_no_vm_died();
}

#[test]
fn a_proxy_with_a_wrong_fleet_token_learns_nothing() {
    let stack = Stack::builder().without_envoy().start();
    let mut neighbours = stack.neighbours();
    neighbours.fleet_token = "0".repeat(64);
    let mut stranger = keygate_e2e::envoy::Envoy::new(stack.directory(), "stranger", 1);
    stranger.start(&neighbours);
    let key = stack.api().issue("basic");
    wait_until(A_WHILE, "a poll that is refused", || {
        let stats = stranger.stats();
        stats.iter().any(|(name, count)| name == "cluster.keygate_sync.upstream_rq_4xx" && *count > 0)
            || stats.iter().any(|(name, count)| name == "cluster.keygate_sync.upstream_rq_401" && *count > 0)
    });
    stranger.call(&Request::get("/.keygate/ready")).expect(503);
    stranger.call(&Request::get("/api/chat").bearer(&key.token)).expect_problem(503, "unavailable");
    assert!(stack.api().fleet().is_empty(), "a stranger is no part of the fleet");
}

#[test]
fn out_of_touch_for_too_long_a_proxy_stops_deciding() {
    let mut stack = Stack::builder().config("[fleet]\nmax_staleness = \"2s\"").start();
    let api = stack.api();
    // One route that says otherwise.
    let policy = api.get("/api/admin/policy").expect(200);
    let tag = policy.header("etag").expect("an ETag").to_owned();
    let mut policy = policy.json();
    let routes = policy["routes"].as_array_mut().expect("routes");
    let chat = routes.iter_mut().find(|route| route["name"] == "chat_read").expect("the route");
    chat["stale"] = json!("allow");
    let put = Request::new("PUT", "/api/admin/policy?wait=applied&timeout=10s").json(&policy);
    api.send(put.header("if-match", tag)).expect(200);

    let (key, dead) = (api.issue("contributor"), api.issue("contributor"));
    api.revoke(&dead.id).expect_everywhere(1);
    let mut workers = stack.envoy.connect_to_all_workers();
    let dataset = Request::get("/api/dataset").bearer(&key.token);

    // In touch, nothing ever gets old.
    let begun = Instant::now();
    wait_until(SOON, "some time to pass", || {
        for connection in &mut workers {
            connection.send(&dataset).expect(200);
        }
        begun.elapsed() > Duration::from_secs(6)
    });

    stack.control_plane.stop();
    for connection in &mut workers {
        wait_until(SOON, "the state to be too old", || connection.send(&dataset).status != 200);
        let answer = connection.send(&dataset).expect_problem(503, "unavailable");
        assert!(answer.header("retry-after").is_some());
        connection.send(&Request::get("/")).expect_problem(503, "unavailable");
        connection.send(&Request::get("/api/chat").bearer(&key.token)).expect(200);
        connection.send(&Request::get("/api/chat").bearer(&dead.token)).expect(401);
    }

    stack.control_plane.start();
    for connection in &mut workers {
        wait_until(SOON, "the proxy to be back", || connection.send(&dataset).status == 200);
    }
    stack.envoy.assert_no_vm_died();
}

#[test]
fn a_proxy_that_must_have_stopped_deciding_holds_no_revocation_up() {
    let stack = Stack::builder().workers(1).config("[fleet]\nmax_staleness = \"2s\"").start();
    let api = stack.api();
    let mut second = stack.another_envoy("envoy-2", 1);
    wait_until(SOON, "two proxies in the fleet", || api.fleet().len() == 2);
    second.kill();
    // It was in touch a moment ago, so at first it might still serve the key; not for longer than 2 s.
    let key = api.issue("basic");
    let propagation = api.revoke(&key.id);
    assert!(propagation.missing.is_empty(), "{propagation:?}");
    assert_eq!(propagation.applied, propagation.total, "{propagation:?}");
    stack.get("/api/chat", &key.token).expect(401);
}
