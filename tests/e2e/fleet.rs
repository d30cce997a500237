//! Several proxies at once: what is revoked is dead on the slowest worker of all of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use keygate_e2e::api::Propagation;
use keygate_e2e::envoy::Envoy;
use keygate_e2e::load::Answers;
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Connection, Key, Line, Load, Request, SOON, Stack, Times, wait_until};
use serde_json::{Value, json};

use crate::requests::assert_serves;

/// Good requests a second to each proxy, over all its workers.
const GOOD_PER_SECOND: u32 = 250;

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

/// Issues many keys at a time, as the journal takes them.
pub fn issue_many(api: &Api, count: usize) -> Vec<Key> {
    const AT_A_TIME: usize = 8;
    std::thread::scope(|scope| {
        let issue =
            |share: usize| scope.spawn(move || (0..share).map(|_| api.issue("basic")).collect::<Vec<_>>());
        let shares: Vec<_> = (0..AT_A_TIME).map(|thread| issue((count + thread) / AT_A_TIME)).collect();
        shares.into_iter().flat_map(|share| share.join().expect("keys")).collect()
    })
}

/// Good traffic to every worker of a proxy.
fn good_traffic(envoy: &Envoy, keys: &[Key]) -> Load {
    // Each goes to the worker that has fewest.
    let connections = (0..envoy.workers()).map(|_| envoy.connect()).collect();
    let requests: Vec<Request> = keys.iter().map(chat).collect();
    let mut turn = 0;
    Load::start(connections, GOOD_PER_SECOND, move || {
        turn += 1;
        requests[turn % requests.len()].clone()
    })
}

/// Sends one request over each connection at once; when and how each was answered.
fn send_to_all(connections: &mut [Connection], request: &Request) -> Vec<(Instant, u16)> {
    for connection in connections.iter_mut() {
        connection.begin(request);
    }
    connections
        .iter_mut()
        .map(|connection| {
            let status = connection.receive().status;
            (Instant::now(), status)
        })
        .collect()
}

#[test]
fn three_envoys_under_load() {
    const REVOCATIONS: usize = 2000;

    let stack = Stack::builder().workers(4).start();
    let others = [stack.another_envoy("envoy-2", 4), stack.another_envoy("envoy-3", 4)];
    let envoys = [&stack.envoy, &others[0], &others[1]];
    let api = stack.api();
    wait_until(SOON, "three proxies in the fleet", || api.fleet().len() == envoys.len());
    let mut workers: Vec<Connection> =
        envoys.iter().flat_map(|envoy| envoy.connect_to_all_workers()).collect();
    assert_eq!(workers.len(), 12);

    let good: Vec<Key> = (0..7).map(|_| api.issue("node_operator")).collect();
    let begun = Instant::now();
    let keys = issue_many(&api, REVOCATIONS);
    println!("{} keys issued in {:.1} s", keys.len(), begun.elapsed().as_secs_f64());

    let loads = envoys.map(|envoy| good_traffic(envoy, &good));
    let (mut enforced, mut answered, mut lag) = (Times::default(), Times::default(), Times::default());
    let mut accepted = 0;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let (to_revoke, revoke) = channel::<&Key>();
        let (to_answer, answer) = channel();
        scope.spawn(move || {
            for key in revoke {
                let begun = Instant::now();
                let propagation = api.revoke(&key.id).expect_everywhere(3);
                let _ = to_answer.send((begun, Instant::now(), propagation));
            }
        });
        for key in &keys {
            let request = chat(key);
            // Known to every worker as verified, as a key in use is.
            for (_, status) in send_to_all(&mut workers, &request) {
                assert_eq!(status, 200, "before its revocation");
            }
            to_revoke.send(key).expect("somebody revokes");
            let mut refused: Vec<Option<Instant>> = vec![None; workers.len()];
            let (begun, end, propagation): (_, _, Propagation) = loop {
                // What is sent after the answer came must be refused, by every worker.
                let applied = answer.try_recv().ok();
                for (worker, (at, status)) in send_to_all(&mut workers, &request).into_iter().enumerate() {
                    if status == 401 {
                        refused[worker].get_or_insert(at);
                    } else {
                        assert_eq!(status, 200);
                        accepted += u64::from(applied.is_some());
                        assert_eq!(refused[worker], None, "accepted again by worker {worker}");
                    }
                }
                if let Some(applied) = applied {
                    break applied;
                }
            };
            let slowest = refused.into_iter().max().flatten();
            enforced.add(slowest.expect("every worker refuses it").duration_since(begun));
            answered.add(end.duration_since(begun));
            lag.add(Duration::from_secs_f64(propagation.max_lag_ms / 1000.0));
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    let good = loads.into_iter().map(Load::stop).fold(Answers::default(), Answers::and);

    println!("{REVOCATIONS} revocations in {seconds:.1} s, on the slowest of 12 workers of 3 proxies");
    println!("revoke to enforced: {enforced}");
    println!("revoke to answered (wait=applied): {answered}");
    println!("lag as the answers say: {lag}");
    println!("good requests beside it, {:.0}/s: {}", good.times.count() as f64 / seconds, good.times);
    let metrics = Metrics::of(&stack.api());
    for part in ["journal_append", "store_apply"] {
        let of = |end: &str| metrics.value(&format!("keygate_{part}_seconds{end}"));
        let (all, quick) = (of("_count"), of("_bucket{le=\"0.1\"}"));
        println!("{part}: {all} batches in {:.1} s, {} of more than 100 ms", of("_sum"), all - quick);
    }
    assert_eq!(accepted, 0, "revoked keys accepted after the answer");
    good.expect_all(200);
    assert!(enforced.at(50) < Duration::from_millis(250), "{enforced}");
    for envoy in envoys {
        envoy.assert_no_vm_died();
    }
}

fn revoke(api: &Api, key: &Key, timeout: &str) -> (Propagation, Duration) {
    let path = format!("/api/admin/keys/{}/revoke?wait=applied&timeout={timeout}", key.id);
    let begun = Instant::now();
    let answer = api.post(&path, &json!({ "reason": "compromised" })).expect(200).json();
    (Propagation::from_answer(&answer), begun.elapsed())
}

fn proxy(api: &Api, node: &str) -> Value {
    let fleet = api.fleet();
    fleet.iter().find(|proxy| proxy["id"] == node).unwrap_or_else(|| panic!("no {node} in {fleet:?}")).clone()
}

/// Uses keys on one worker again and again from before a line heals. When the good one was served first.
fn use_until_served(
    connection: &mut Connection,
    good: &Key,
    revoked: &[&Key],
    healed: &AtomicBool,
) -> Instant {
    loop {
        // Known before sending: what is served before the line heals is not what is asked for here.
        let after = healed.load(Ordering::SeqCst);
        for key in revoked {
            let status = connection.send(&chat(key)).status;
            assert!(matches!(status, 401 | 503), "a revoked key got {status}");
        }
        match connection.send(&chat(good)).status {
            200 => {
                assert!(after, "it was served before the line healed");
                return Instant::now();
            }
            503 => {}
            other => panic!("a good key got {other}"),
        }
    }
}

#[test]
fn a_proxy_that_is_cut_off() {
    const HARD_AGE: Duration = Duration::from_secs(4);
    const ROUNDS: usize = 6;

    let stack = Stack::builder().workers(2).config("[fleet]\nmax_staleness = \"4s\"").start();
    let second = stack.another_envoy("envoy-2", 2);
    let (third, mut line) = stack.another_envoy_on_a_line("envoy-3", 4);
    let api = stack.api();
    wait_until(SOON, "three proxies in the fleet", || api.fleet().len() == 3);
    let mut workers = third.connect_to_all_workers();
    let good = api.issue("basic");

    let (mut told, mut safe, mut back) = (Times::default(), Times::default(), Times::default());
    for round in 0..ROUNDS {
        let (first, next) = (api.issue("basic"), api.issue("basic"));
        for key in [&good, &first, &next] {
            assert_serves(&mut workers, &key.token);
        }
        let cut = Instant::now();
        line.cut();

        // Not applied within its time-out: it says where.
        let (propagation, took) = revoke(&api, &first, "700ms");
        assert_eq!((propagation.applied, propagation.total), (2, 3), "{propagation:?}");
        assert_eq!(propagation.missing, [json!("envoy-3")]);
        assert!(took >= Duration::from_millis(700) && took < HARD_AGE, "it took {took:?}");
        told.add(took);
        for envoy in [&stack.envoy, &second] {
            envoy.call(&chat(&first)).expect(401);
        }

        // Given more time, it is applied when the silent proxy must have stopped serving; and it has.
        let (propagation, took) = revoke(&api, &next, "30s");
        propagation.expect_everywhere(3);
        safe.add(cut.elapsed());
        for connection in &mut workers {
            for key in [&first, &next, &good] {
                connection.send(&chat(key)).expect_problem(503, "unavailable");
            }
        }
        assert!(took < 2 * HARD_AGE, "it took {took:?}");
        let view = proxy(&api, "envoy-3");
        assert_eq!((&view["stale"], &view["current"]), (&json!(true), &json!(false)), "{view}");

        // Issued and revoked without it.
        let unseen = api.issue("basic");
        revoke(&api, &unseen, "30s").0.expect_everywhere(2);

        // Each round heals at another moment of the proxy's tries.
        let until =
            cut + HARD_AGE * 3 / 2 + Duration::from_millis(370) * u32::try_from(round).expect("small");
        wait_until(SOON, "the moment to heal", || {
            workers[0].send(&chat(&good)).expect(503);
            Instant::now() >= until
        });
        let healed = AtomicBool::new(false);
        let revoked = [&first, &next, &unseen];
        let (healed_at, served) = std::thread::scope(|scope| {
            let uses: Vec<_> = workers
                .iter_mut()
                .map(|worker| scope.spawn(|| use_until_served(worker, &good, &revoked, &healed)))
                .collect();
            healed.store(true, Ordering::SeqCst);
            let healed_at = Instant::now();
            line.heal();
            let served: Vec<Instant> =
                uses.into_iter().map(|each| each.join().expect("no revoked key is accepted")).collect();
            (healed_at, served)
        });
        let slowest = served.into_iter().max().expect("a worker").duration_since(healed_at);
        println!("round {round}: cut off for {:?}, back {slowest:?} later", healed_at - cut);
        back.add(slowest);
        for connection in &mut workers {
            for key in revoked {
                connection.send(&chat(key)).expect_problem(401, "invalid_token");
            }
        }
        wait_until(SOON, "the proxy to be up to date", || proxy(&api, "envoy-3")["current"] == json!(true));
        assert_eq!(proxy(&api, "envoy-3")["stale"], json!(false));
    }
    println!("revoked with timeout=700ms, answered with its name: {told}");
    println!("cut off to applied, hard age {HARD_AGE:?}: {safe}");
    println!("healed to served by all workers: {back}");
    assert!(back.worst() < Duration::from_secs(2), "{back}");
    for envoy in [&stack.envoy, &second, &third] {
        envoy.assert_no_vm_died();
    }
}

#[test]
fn a_connection_that_is_lost_without_a_word_is_given_up_before_the_state_is_too_old() {
    let stack = Stack::builder().without_envoy().config("[fleet]\nmax_staleness = \"4s\"").start();
    let line = Line::relay(stack.control_plane.sync_port());
    let envoy = stack.another_envoy_through(&line, "envoy-1", 1);
    let api = stack.api();
    let (good, revoked) = (api.issue("basic"), api.issue("basic"));
    let mut worker = envoy.connect();
    worker.send(&chat(&good)).expect(200);

    let begun = Instant::now();
    line.lose_connections();
    api.revoke(&revoked.id);
    let mut unavailable: Option<Instant> = None;
    wait_until(Duration::from_secs(60), "the proxy to enforce what is new", || {
        let status = worker.send(&chat(&good)).status;
        if status != 200 {
            unavailable.get_or_insert_with(Instant::now);
        }
        status == 200 && worker.send(&chat(&revoked)).status == 401
    });
    println!("it enforced what is new after {:?}", begun.elapsed());
    assert!(
        unavailable.is_none_or(|since| since.elapsed() < Duration::from_secs(1)),
        "503 for {:?}",
        unavailable.map(|since| since.elapsed())
    );
}

#[test]
fn how_far_behind_a_proxy_is_and_that_it_is_gone_shows_in_metrics() {
    let stack = Stack::builder().workers(1).config("[fleet]\nmax_staleness = \"6s\"\n").start();
    let api = stack.api();
    let (_other, mut line) = stack.another_envoy_on_a_line("envoy-2", 1);
    let value = |series: &str| Metrics::of(&api).value(series);
    wait_until(SOON, "two proxies that follow", || {
        value("keygate_fleet_proxies") == 2.0 && value("keygate_fleet_behind") == 0.0
    });
    assert_eq!((value("keygate_fleet_lag_seconds"), value("keygate_fleet_stale")), (0.0, 0.0));
    assert_eq!(value("keygate_propagation_timeouts_total"), 0.0);
    let (bytes, seq) = (value("keygate_snapshot_bytes"), value("keygate_state_seq"));
    assert!(bytes > 100.0, "{bytes}");

    line.cut();
    let key = api.issue("basic");
    let (reason, begun) = (json!({ "reason": "user_request" }), Instant::now());
    let revoked = format!("/api/admin/keys/{}/revoke?wait=applied&timeout=100ms", key.id);
    let answer = api.post(&revoked, &reason).expect(200).json();
    assert_eq!(answer["propagation"]["missing"], json!(["envoy-2"]), "{answer}");
    assert_eq!(value("keygate_propagation_timeouts_total"), 1.0);
    assert_eq!(value("keygate_snapshot_bytes"), bytes + 8.0, "a revocation is eight bytes");
    assert!(value("keygate_snapshot_age_seconds") < begun.elapsed().as_secs_f64());
    wait_until(SOON, "it to be behind for a second", || value("keygate_fleet_lag_seconds") > 1.0);
    // A later change is not what it has lacked for longest.
    let other = api.issue("basic");
    api.post(&format!("/api/admin/keys/{}/revoke", other.id), &reason).expect(200);
    let (lag, since) = (value("keygate_fleet_lag_seconds"), begun.elapsed().as_secs_f64());
    assert!(lag > 1.0 && lag < since, "{lag} s, after {since} s");
    assert!(value("keygate_snapshot_age_seconds") < 1.0 && value("keygate_state_seq") > seq);
    wait_until(SOON, "it to be past its hard age", || value("keygate_fleet_stale") == 1.0);
    assert_eq!((value("keygate_fleet_lag_seconds"), value("keygate_fleet_behind")), (0.0, 0.0));
    assert_eq!(value("keygate_fleet_proxies"), 1.0);

    line.heal();
    wait_until(SOON, "it to follow again", || {
        value("keygate_fleet_stale") == 0.0 && value("keygate_fleet_behind") == 0.0
    });
    assert_eq!((value("keygate_fleet_lag_seconds"), value("keygate_fleet_proxies")), (0.0, 2.0));
}
