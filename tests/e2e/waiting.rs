//! Requests whose limit is not reached, but whose units are elsewhere in the fleet: in the dynamic module they wait for
//! them, in WebAssembly they are told to come back in a second.

use std::time::Instant;

use keygate_e2e::{Connection, Envoy, Request, SOON, Stack, wait_until};
use serde_json::json;

/// A stack whose requests are pending when they say so, see the filter's feature `trap`.
fn stack(workers: usize) -> Stack {
    Stack::builder().workers(workers).module().trap_filter().start()
}

fn decisions(envoy: &Envoy, reason: &str) -> u64 {
    envoy.stat(&format!("keygate_decisions_total.reason.{reason}"))
}

fn waits(envoy: &Envoy) -> u64 {
    envoy.stat("keygate_limit_waits_total")
}

#[test]
fn a_request_goes_on_with_its_body_when_units_come_and_is_counted_once() {
    let stack = stack(2);
    let key = stack.api().issue("basic");
    let body = vec![b'x'; 300_000];
    let request = Request::new("POST", "/api/chat").bearer(&key.token).body(&body);
    for (round, request) in [request, Request::get("/api/chat").bearer(&key.token)].iter().enumerate() {
        let (seen, allowed) = (stack.upstream.seen(), decisions(&stack.envoy, "allowed"));
        let agent = format!("waits-{round}");
        let request = request.clone().header("x-trap", "pending").header("user-agent", &agent);
        let answer = stack.call(&request.header("x-keygate-role", "admin")).expect(200).json();
        let told = &answer["headers"];
        assert_eq!((&told["x-keygate-role"], &told["x-keygate-key-id"]), (&json!("basic"), &json!(key.id)));
        assert_eq!(stack.upstream.seen(), seen + 1);
        assert_eq!(stack.envoy.logged(&agent)["outcome"], "allowed");
        wait_until(SOON, "the decision", || decisions(&stack.envoy, "allowed") == allowed + 1);
    }
    assert_eq!((waits(&stack.envoy), decisions(&stack.envoy, "limit_pending")), (2, 0));
}

#[test]
fn one_whose_units_do_not_come_is_answered_in_a_fifth_of_a_second() {
    let stack = stack(2);
    let key = stack.api().issue("basic");
    let seen = stack.upstream.seen();
    let request = Request::new("POST", "/api/chat").bearer(&key.token).body(vec![b'x'; 300_000]);
    let request = request.header("x-trap", "pending-always").header("user-agent", "never");
    let begun = Instant::now();
    let answer = stack.call(&request).expect_problem(429, "rate_limited");
    let took = begun.elapsed();
    assert!((150..1_000).contains(&took.as_millis()), "{took:?}");
    assert_eq!(
        (answer.header("retry-after"), answer.header("x-ratelimit-remaining")),
        (Some("1"), Some("7"))
    );
    assert_eq!(stack.envoy.logged("never")["outcome"], "limit_pending");
    assert_eq!((waits(&stack.envoy), decisions(&stack.envoy, "limit_pending")), (1, 1));
    assert_eq!(stack.upstream.seen(), seen);
}

#[test]
fn clients_that_go_away_are_not_waited_for() {
    let stack = stack(1);
    let key = stack.api().issue("basic");
    let request = Request::get("/api/chat").bearer(&key.token).header("x-trap", "pending-always");
    for _ in 0..20 {
        stack.envoy.connect().begin(&request);
    }
    wait_until(SOON, "them to wait", || waits(&stack.envoy) == 20);
    // They came before this one, and nothing is decided on them any more.
    stack.call(&request).expect(429);
    assert_eq!(decisions(&stack.envoy, "limit_pending"), 1);
}

#[test]
fn no_more_than_so_many_wait_at_a_worker() {
    let stack = stack(1);
    let key = stack.api().issue("basic");
    let request = Request::get("/api/chat").bearer(&key.token).header("x-trap", "pending-always");
    let mut connections: Vec<Connection> = (0..400).map(|_| stack.envoy.connect()).collect();
    for connection in &mut connections {
        connection.begin(&request);
    }
    for connection in &mut connections {
        let answer = connection.receive().expect_problem(429, "rate_limited");
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
    let waited = waits(&stack.envoy);
    assert!((256..400).contains(&waited), "{waited}");
    wait_until(SOON, "all to be counted, once", || decisions(&stack.envoy, "limit_pending") == 400);
    // Their places are free again.
    stack.call(&request).expect(429);
    assert_eq!(waits(&stack.envoy), waited + 1);
}

#[test]
fn a_panic_over_one_that_waits_refuses_it() {
    let stack = stack(1);
    let key = stack.api().issue("basic");
    let seen = stack.upstream.seen();
    let request = Request::get("/api/chat").bearer(&key.token);
    let mut other = stack.envoy.connect();
    other.begin(&request.clone().header("x-trap", "pending-always"));
    stack.call(&request.clone().header("x-trap", "pending-worker")).expect_problem(503, "unavailable");
    assert_eq!((stack.envoy.stat("keygate_panics_total"), stack.upstream.seen()), (1, seen));
    // So is another one that waits at the worker.
    other.receive().expect_problem(503, "unavailable");
    wait_until(SOON, "another plugin", || stack.envoy.stat("keygate_vm_starts_total") == 3);
    stack.call(&request.header("x-trap", "pending")).expect(200);
}

#[test]
fn those_that_wait_outlive_the_configuration() {
    let mut stack = Stack::builder().workers(2).module().trap_filter().without_envoy().start();
    stack.envoy.use_listeners_of_a_file();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let key = stack.api().issue("basic");
    let request = Request::get("/api/chat").bearer(&key.token);
    for round in 0..4 {
        let starts = stack.envoy.stat("keygate_vm_starts_total");
        let mut connections: Vec<Connection> = (0..40).map(|_| stack.envoy.connect()).collect();
        for (connection, asked) in connections.iter_mut().zip(["pending", "pending-always"].iter().cycle()) {
            connection.begin(&request.clone().header("x-trap", asked));
        }
        stack.envoy.change_listeners(9_000 + round);
        for (connection, wanted) in connections.iter_mut().zip([200, 429].iter().cycle()) {
            connection.receive().expect(*wanted);
        }
        wait_until(SOON, "the new configuration", || {
            stack.envoy.stat("keygate_vm_starts_total") == starts + 3
        });
    }
    stack.call(&request.header("x-trap", "pending")).expect(200);
}

#[test]
fn a_proxy_that_stops_while_requests_wait_exits_cleanly() {
    let mut stack = stack(2);
    let key = stack.api().issue("basic");
    let request = Request::get("/api/chat").bearer(&key.token).header("x-trap", "pending-always");
    for _ in 0..3 {
        let mut connections: Vec<Connection> = (0..100).map(|_| stack.envoy.connect()).collect();
        connections.iter_mut().for_each(|connection| connection.begin(&request));
        let status = stack.envoy.stop();
        assert!(status.success(), "{status}");
        stack.start_envoy();
        stack.envoy.wait_ready();
    }
}

#[test]
fn in_webassembly_none_waits() {
    let stack = Stack::builder().workers(2).trap_filter().start();
    if stack.envoy.has_module() {
        return;
    }
    let key = stack.api().issue("basic");
    let request = Request::get("/api/chat").bearer(&key.token).header("x-trap", "pending-always");
    let answer = stack.call(&request).expect_problem(429, "rate_limited");
    let header = |name| answer.header(name);
    assert_eq!((header("retry-after"), header("x-ratelimit-remaining")), (Some("1"), Some("7")));
    assert_eq!(stack.envoy.stat("wasmcustom.keygate_limit_waits_total"), 0);
}
