//! What proxies count arrives at the control plane exactly once, whatever ends in between.

use std::collections::BTreeMap;

use keygate_e2e::durability::Dice;
use keygate_e2e::forge::Parts;
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Connection, Envoy, Request, SOON, Stack, tier, wait_until};
use serde_json::json;

/// What was sent, by the precise reason of its answer.
type Sent = BTreeMap<&'static str, u64>;

/// Requests of every kind, and what becomes of them.
struct Kinds(Vec<(&'static str, Request, u16)>);

impl Kinds {
    fn new(api: &Api) -> Self {
        let (good, revoked, suspended) = (api.issue("basic"), api.issue("basic"), api.issue("basic"));
        let cut = api.issue_with(&json!({ "name": "cut", "role": "basic", "owner": "cut-owner" }));
        api.revoke(&revoked.id).expect_everywhere(1);
        api.change(&format!("/api/admin/keys/{}/suspend", suspended.id), &json!({ "reason": "x" }));
        let scope = json!({ "scope": { "owner": "cut-owner" } });
        api.change("/api/admin/emergency/revoke", &scope);
        let parts = Parts::of(&good.token);
        let mut other_signature = parts.clone();
        other_signature.signature.reverse();
        let chat = |token: &str| Request::get("/api/chat").bearer(token);
        Self(vec![
            ("allowed", chat(&good.token), 200),
            ("public", Request::get("/"), 200),
            ("no_route", Request::get("/nowhere"), 403),
            ("missing_credential", Request::get("/api/chat"), 401),
            ("too_many_credentials", chat(&good.token).header("x-api-key", &good.token), 400),
            ("malformed", chat("no.key.at-all"), 401),
            ("unknown_kid", chat(&parts.with_header("kid", "nobody").token()), 401),
            ("forged_id", chat(&parts.with_claim("jti", "made-up").token()), 401),
            ("bad_signature", chat(&other_signature.token()), 401),
            ("revoked", chat(&revoked.token), 401),
            ("suspended", chat(&suspended.token), 401),
            ("cutoff", chat(&cut.token), 401),
            ("missing_scope", Request::get("/api/dataset").bearer(&good.token), 403),
            ("wrong_role", Request::get("/api/admin/keys").bearer(&good.token), 403),
        ])
    }

    /// Sends some of each kind to every worker.
    fn send(&self, envoy: &Envoy, workers: &mut [Connection], dice: &mut Dice, sent: &mut Sent) {
        for connection in workers {
            for (reason, request, status) in &self.0 {
                for _ in 0..1 + dice.below(4) {
                    // Envoy closes the connection of a bad request.
                    let answer = if *status == 400 { envoy.call(request) } else { connection.send(request) };
                    answer.expect(*status);
                    *sent.entry(reason).or_default() += 1;
                }
            }
        }
    }
}

/// Waits until all that was sent is counted, and shows that nothing more is.
#[track_caller]
fn assert_counted(api: &Api, sent: &Sent) {
    let passed = |reason: &str| matches!(reason, "allowed" | "public");
    let sum = |wanted: bool| {
        sent.iter().filter(|(reason, _)| passed(reason) == wanted).map(|(_, count)| count).sum::<u64>()
    };
    let outcome = |metrics: &Metrics, wanted: &str| {
        metrics.sum("keygate_requests_total{", &[&format!("outcome=\"{wanted}\"")])
    };
    wait_until(SOON, "every request to be counted", || {
        Metrics::try_of(api).is_some_and(|metrics| {
            outcome(&metrics, "passed") + outcome(&metrics, "refused") >= sum(true) + sum(false)
        })
    });
    let metrics = Metrics::of(api);
    assert_eq!(outcome(&metrics, "passed"), sum(true));
    assert_eq!(outcome(&metrics, "refused"), sum(false));
    for (reason, count) in sent.iter().filter(|(reason, _)| !passed(reason)) {
        let series = format!("auth_errors_total{{error_type=\"{reason}\",version=\"v2\"}}");
        assert_eq!(metrics.value(&series) as u64, *count, "{series}");
    }
    let validated = |result: &str| {
        metrics.sum("api_key_validated_total{", &[&format!("result=\"{result}\""), "version=\"v2\""])
    };
    assert_eq!(validated("success"), sent["allowed"]);
    let of_no_key = ["no_route", "missing_credential", "too_many_credentials"];
    let without_key: u64 = of_no_key.iter().map(|reason| sent[reason]).sum();
    let limited: u64 = ["rate_limited", "limit_pending"].iter().filter_map(|reason| sent.get(reason)).sum();
    assert_eq!((validated("failure"), validated("limited")), (sum(false) - without_key - limited, limited));
}

#[test]
fn totals_are_the_requests_that_were_sent_over_restarts_of_all() {
    let mut stack = Stack::start();
    let mut api = stack.api();
    let kinds = Kinds::new(&api);
    let (mut sent, mut dice) = (Sent::new(), Dice::new(7));
    let mut workers = stack.envoy.connect_to_all_workers();

    kinds.send(&stack.envoy, &mut workers, &mut dice, &mut sent);
    assert_counted(&api, &sent);

    // Killed with reports under way, and more requests while it is gone.
    for _ in 0..5 {
        kinds.send(&stack.envoy, &mut workers, &mut dice, &mut sent);
        stack.control_plane.kill();
        kinds.send(&stack.envoy, &mut workers, &mut dice, &mut sent);
        stack.control_plane.start();
        api = stack.api();
    }
    assert_counted(&api, &sent);

    // Stopped as an operator does.
    kinds.send(&stack.envoy, &mut workers, &mut dice, &mut sent);
    stack.control_plane.stop();
    stack.control_plane.start();
    api = stack.api();
    assert_counted(&api, &sent);

    // A proxy that is killed begins with nothing, and what it had told before stays.
    for _ in 0..2 {
        stack.envoy.kill();
        stack.start_envoy();
        stack.envoy.wait_ready();
        workers = stack.envoy.connect_to_all_workers();
        kinds.send(&stack.envoy, &mut workers, &mut dice, &mut sent);
        assert_counted(&api, &sent);
    }

    // Both at once.
    stack.control_plane.kill();
    stack.envoy.kill();
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    workers = stack.envoy.connect_to_all_workers();
    api = stack.api();
    kinds.send(&stack.envoy, &mut workers, &mut dice, &mut sent);
    assert_counted(&api, &sent);
    let all: u64 = sent.values().sum();
    println!("{all} requests of {} kinds, each counted once", sent.len());

    let metrics = Metrics::of(&api);
    for series in
        ["key_validation_duration_seconds_count{version=\"v2\"}", "jwt_decode_duration_seconds_count"]
    {
        assert!(metrics.value(series) > 0.0, "{series}");
    }
}

#[test]
fn a_worker_that_traps_takes_no_counts_along_that_were_written_down() {
    let stack = Stack::builder().workers(2).trap_filter().start();
    let api = stack.api();
    let key = api.issue("basic");
    let request = Request::get("/api/chat").bearer(&key.token);
    let passed = |metrics: &Metrics| metrics.sum("keygate_requests_total{", &["outcome=\"passed\""]);
    let mut sent = 0;
    for _ in 0..3 {
        for connection in &mut stack.envoy.connect_to_all_workers() {
            for _ in 0..5 {
                connection.send(&request).expect(200);
                sent += 1;
            }
        }
        wait_until(SOON, "them to be counted", || passed(&Metrics::of(&api)) >= sent);
        let trap = stack.envoy.connect().send(&Request::get("/api/chat").header("x-trap", "worker"));
        assert_eq!(trap.status, 503);
        wait_until(SOON, "every worker to serve again", || {
            let mut workers = stack.envoy.connect_to_all_workers();
            workers.iter_mut().all(|worker| worker.send(&Request::get("/.keygate/ready")).status == 200)
        });
    }
    assert_eq!(passed(&Metrics::of(&api)), sent);
}

/// How many series there are, here and at the proxy.
fn series(stack: &Stack) -> (usize, usize) {
    let lines = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    let stats = stack.envoy.admin("/stats/prometheus?filter=keygate").expect(200).text();
    (lines(&stack.api().get("/metrics").expect(200).text()), lines(&stats))
}

#[test]
fn a_million_keys_and_paths_make_no_series() {
    const THREADS: u64 = 2;
    const AT_A_TIME: u64 = 50;
    let requests: u64 = tier::repeats(100_000, 1_000_000);

    let stack = Stack::start();
    let api = stack.api();
    let key = api.issue("basic");
    // One of each, so that what grows with the first is there.
    let kinds = Kinds::new(&api);
    let mut sent = Sent::new();
    kinds.send(&stack.envoy, &mut stack.envoy.connect_to_all_workers(), &mut Dice::new(1), &mut sent);
    assert_counted(&api, &sent);
    let before = series(&stack);
    let refused = |metrics: &Metrics| metrics.sum("keygate_requests_total{", &["outcome=\"refused\""]);
    let refused_before = refused(&Metrics::of(&api));

    let begun = std::time::Instant::now();
    let parts = Parts::of(&key.token);
    std::thread::scope(|scope| {
        for number in 0..THREADS {
            let mut connections: Vec<_> = (0..AT_A_TIME).map(|_| stack.envoy.connect()).collect();
            let parts = &parts;
            scope.spawn(move || {
                let mut dice = Dice::new(number);
                for _ in 0..requests / THREADS / AT_A_TIME {
                    for connection in &mut connections {
                        connection.begin(&random(&mut dice, parts));
                    }
                    for connection in &mut connections {
                        let status = connection.receive().status;
                        assert!(matches!(status, 401 | 403), "{status}");
                    }
                }
            });
        }
    });
    println!("{requests} requests in {:.0} s", begun.elapsed().as_secs_f64());
    wait_until(SOON, "them to be counted", || refused(&Metrics::of(&api)) >= refused_before + requests);
    assert_eq!(refused(&Metrics::of(&api)), refused_before + requests);
    assert_eq!(series(&stack), before);
}

/// A request with a path, and a key if any, that were never there before.
fn random(dice: &mut Dice, parts: &Parts) -> Request {
    let number = dice.below(usize::MAX);
    match dice.below(4) {
        0 => Request::get(format!("/{number:x}")),
        1 => Request::get(format!("/api/auth/{number:x}")),
        2 => Request::get("/api/chat").bearer(format!("{number:x}.{number:x}.{number:x}")),
        _ => {
            let named = parts.with_claim("sub", format!("key_{number:x}"));
            let other = named.with_claim("role", format!("role-{number:x}"));
            Request::get("/api/chat").bearer(other.with_header("kid", format!("{number:x}")).token())
        }
    }
}
