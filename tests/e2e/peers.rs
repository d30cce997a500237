//! Several control planes over one Redis, each with a proxy: what one decides holds at the other, proxies change over
//! between them, and one at a time does what is to be done once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::envoy::{Envoy, Neighbours};
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{
    Api, Cluster, Key, Line, Redis, Request, Response, SOON, Stack, Times, wait_for, wait_until,
};
use serde_json::json;

use crate::redis_loss::{chat, hammer, redis_of, revoke, revoke_unseen};
use crate::requests::assert_serves;

const LOCKDOWN: &str = "/api/admin/emergency/lockdown";
const CUTOFF: &str = "/api/admin/emergency/revoke";

/// Another control plane of the same fleet, running.
fn beside(stack: &Stack, redis: &str, name: &str) -> ControlPlane {
    let mut other = ControlPlane::beside(&stack.control_plane, &stack.directory().join(name));
    other.use_redis(redis);
    other.start();
    other
}

/// An Envoy of that control plane, running and ready.
fn envoy_of(stack: &Stack, control_plane: &ControlPlane, name: &str) -> Envoy {
    let mut envoy = Envoy::new(stack.directory(), name, 2);
    let (api_port, sync_port) = (control_plane.api_port(), control_plane.sync_port());
    envoy.start(&Neighbours { api_port, sync_port, ..stack.neighbours() });
    envoy.wait_ready();
    envoy
}

#[track_caller]
fn wait_known(api: &Api, key: &Key) {
    wait_until(SOON, "the other one to know a key", || {
        api.get(&format!("/api/admin/keys/{}", key.id)).status == 200
    });
}

/// How many revocations a control plane enforces.
fn revoked(api: &Api) -> u64 {
    let stats = api.get("/api/admin/revocations/stats").expect(200).json();
    stats["total_revoked"].as_u64().unwrap_or_else(|| panic!("{stats}"))
}

#[track_caller]
fn delete(api: &Api, path: &str) {
    api.send(Request::new("DELETE", path)).expect(200);
}

#[test]
fn whatever_one_decides_the_proxies_of_the_other_enforce_within_a_second() {
    const ROUNDS: usize = 5;

    let redis = Redis::start();
    let stack = Stack::builder().without_envoy().redis(&redis.url()).start();
    let other = beside(&stack, &redis.url(), "b");
    let (api, there) = (stack.api(), other.api());
    let envoy = envoy_of(&stack, &other, "envoy-b");
    let key = api.issue("basic");
    let mut workers = envoy.connect_to_all_workers();
    let mut times = Times::default();
    let mut holds = |what: &str, request: &Request, status: u16| {
        let since = Instant::now();
        for worker in &mut workers {
            wait_until(SOON, what, || worker.send(request).status == status);
        }
        let took = since.elapsed();
        println!("{what}: {took:?}");
        times.add(took);
    };
    let uses = chat(&key);
    holds("a key", &uses, 200);
    for round in 0..ROUNDS {
        api.post(&format!("/api/admin/keys/{}/suspend", key.id), &json!({})).expect(200);
        holds("a suspension", &uses, 401);
        api.post(&format!("/api/admin/keys/{}/resume", key.id), &json!({})).expect(200);
        holds("its end", &uses, 200);
        api.post(LOCKDOWN, &json!({ "ttl": "1h" })).expect(200);
        holds("a lockdown", &uses, 401);
        // Whoever lifts it may be the other one.
        wait_until(SOON, "the other one to know it", || {
            there.get("/api/admin/emergency").expect(200).json()["active"] == true
        });
        delete(&there, LOCKDOWN);
        wait_until(SOON, "its end here", || {
            api.get("/api/admin/emergency").expect(200).json()["active"] == false
        });
        holds("its end", &uses, 200);
        let cutoff = api.post(CUTOFF, &json!({ "scope": { "role": "basic" } })).expect(200).json();
        holds("a cut-off", &uses, 401);
        delete(&api, &format!("{CUTOFF}/{}", cutoff["cutoff"]["id"].as_str().expect("an id")));
        holds("its end", &uses, 200);
        let mut policy = api.get("/api/admin/policy").expect(200).json();
        let path = format!("/round-{round}");
        let route = json!({ "name": format!("round_{round}"), "path": path, "access": "public" });
        policy["routes"].as_array_mut().expect("routes").push(route);
        api.send(Request::new("PUT", "/api/admin/policy").json(&policy)).expect(200);
        holds("a policy", &Request::get(&path), 200);
    }
    let last = api.issue("basic");
    holds("one more key", &chat(&last), 200);
    revoke(&api, &last);
    holds("its revocation", &chat(&last), 401);
    println!("answered by one control plane to enforced by the other's proxy: {times}");
    assert!(times.at(50) < Duration::from_millis(500), "{times}");
    assert!(times.worst() < Duration::from_secs(3), "{times}");
    envoy.assert_no_vm_died();
}

#[test]
fn a_rollout_set_at_one_is_in_force_at_the_proxies_of_the_other() {
    const FLAGS: &str = "/api/admin/feature_flags";
    const CONFIG: &str = "[rollout]\nv1_cluster = \"upstream_v1\"\n";

    let redis = Redis::start();
    let stack = Stack::builder().without_envoy().config(CONFIG).redis(&redis.url()).start();
    let mut other = ControlPlane::beside(&stack.control_plane, &stack.directory().join("b"));
    other.use_redis(&redis.url());
    std::fs::write(other.config_file(), CONFIG).expect("the configuration");
    other.start();
    let (api, there) = (stack.api(), other.api());
    let envoy = envoy_of(&stack, &other, "envoy-b");
    let keys: Vec<Key> = (0..40).map(|_| api.issue("basic")).collect();
    let mut workers = envoy.connect_to_all_workers();
    let mut at_v2 = || -> BTreeSet<String> {
        let mut goes = |key: &Key| {
            let to = |answer: Response| answer.expect(200).json()["upstream"] == "v2";
            let ways: Vec<bool> = workers.iter_mut().map(|worker| to(worker.send(&chat(key)))).collect();
            ways.iter().all(|v2| *v2)
        };
        keys.iter().filter(|key| goes(key)).map(|key| key.id.clone()).collect()
    };
    let put = |api: &Api, document: &serde_json::Value| {
        api.send(Request::new("PUT", FLAGS).json(document)).expect(200);
    };
    wait_until(SOON, "the other one to be connected", || redis_of(&there)["connected"] == true);

    put(&api, &json!({ "strategy": "percentage", "percentage": 50, "reason": "week 3" }));
    let shown = || there.get(FLAGS).expect(200).json();
    wait_until(SOON, "the other one to know it", || shown()["last_change"]["reason"] == "week 3");
    wait_until(SOON, "half of them at V2", || (1..keys.len()).contains(&at_v2().len()));
    let half = at_v2();
    assert_eq!(shown()["percentage"], 50);

    // Set at the other, with what was set here kept; and the last change of all by hand.
    put(&there, &json!({ "strategy": "off" }));
    wait_until(SOON, "nobody at V2", || at_v2().is_empty());
    wait_until(SOON, "the first to know it", || api.get(FLAGS).expect(200).json()["strategy"] == "off");
    put(&api, &json!({ "strategy": "percentage" }));
    wait_until(SOON, "the same half", || at_v2() == half);
    redis.cli(&["SET", "feature_flags:api_key_v2", "{\"strategy\": \"full\"}"]);
    wait_until(SOON, "all of them at V2", || at_v2().len() == keys.len());
    // One honours an edit, and not both.
    let by_hand = |api: &Api| {
        let taken = ["feature_flags:api_key_v2", "taken"];
        Metrics::of(api).sum("keygate_redis_edits_total{", &taken)
    };
    assert_eq!(by_hand(&api) + by_hand(&there), 1);

    // What both count is in Redis, and as much at either.
    let counted = |api: &Api| {
        let counts = api.get(&format!("{FLAGS}/metrics")).expect(200).json();
        (counts["v1_requests"].as_u64(), counts["v2_requests"].as_u64())
    };
    wait_until(SOON, "both to show the same", || {
        counted(&api) == counted(&there) && counted(&api).1 > Some(0)
    });
    envoy.assert_no_vm_died();
}

#[test]
fn a_proxy_changes_over_and_takes_only_what_differs_and_never_less() {
    const REVOCATIONS: usize = 50_000;

    let redis = Redis::start();
    let to_redis = Line::relay(redis.port());
    let stack = Stack::builder().without_envoy().redis(&redis.url()).start();
    let other = beside(&stack, &format!("redis://127.0.0.1:{}", to_redis.port()), "b");
    let mut to_redis = to_redis;
    let (api, there) = (stack.api(), other.api());
    let ports = [stack.control_plane.sync_port(), other.sync_port()];
    let line = Line::relay(ports[0]);

    let keys: Vec<Key> = (0..6).map(|_| api.issue("basic")).collect();
    let [good, dead, second, third, fourth, fifth] = &keys[..] else { panic!("six keys") };
    let begun = Instant::now();
    revoke_unseen(&api, REVOCATIONS);
    revoke(&api, dead);
    let all = REVOCATIONS as u64 + 1;
    println!("{REVOCATIONS} revoked in {:?}", begun.elapsed());
    wait_until(SOON * 3, "the other one to have all", || revoked(&there) == all);
    println!("and at the other after {:?}", begun.elapsed());

    let envoy = stack.another_envoy_through(&line, "envoy-1", 2);
    let hammered = hammer(envoy.connect_to_all_workers(), dead);
    let shards = |api: &Api| Metrics::of(api).value("keygate_sync_response_bytes_total{kind=\"shards\"}");
    let snapshots = |api: &Api| Metrics::of(api).value("keygate_sync_responses_total{kind=\"snapshot\"}");
    let follows = |api: &Api| {
        wait_until(SOON, "the proxy to follow", || {
            api.fleet().iter().any(|proxy| proxy["current"] == true && proxy["connected"] == true)
        });
    };
    let whole = shards(&api);
    println!("at its start it took {whole} bytes of shards");
    assert!(whole >= 8.0 * all as f64, "{whole}");

    // Equal sets.
    let change_over = |what: &str, port: u16, api: &Api| {
        let (taken, since) = (shards(api), Instant::now());
        line.lead_to(port);
        follows(api);
        let taken = shards(api) - taken;
        println!("{what}: {taken} bytes of shards, after {:?}", since.elapsed());
        taken
    };
    assert_eq!(change_over("to the other with the same", ports[1], &there), 0.0);
    assert_eq!(snapshots(&there), 1.0);
    // It is the other's now.
    there.revoke(&second.id).expect_everywhere(1);
    envoy.call(&chat(second)).expect(401);
    envoy.call(&chat(good)).expect(200);
    assert_eq!(shards(&there), 0.0, "one revocation is a delta");

    // While it is nobody's, one more.
    line.lead_to(1);
    revoke(&there, third);
    wait_until(SOON, "the first to have it", || revoked(&api) == all + 2);
    let taken = change_over("to the first with one more", ports[0], &api);
    assert!(taken > 0.0 && taken < whole / 4.0, "{taken} of {whole}");
    envoy.call(&chat(third)).expect(401);

    // To one that lacks what the proxy enforces.
    to_redis.cut();
    wait_until(SOON, "the other to miss Redis", || redis_of(&there)["connected"] == false);
    api.revoke(&fourth.id).expect_everywhere(1);
    let in_vain = hammer(vec![envoy.connect()], fourth);
    line.lead_to(ports[1]);
    let ahead = || Metrics::of(&there).value("keygate_sync_conflicts_total");
    wait_until(SOON, "the proxy to be refused some times", || ahead() >= 3.0);
    assert_eq!(there.fleet()[0]["ahead"], true, "{:?}", there.fleet());
    envoy.call(&chat(good)).expect(200);
    envoy.call(&chat(fourth)).expect(401);
    // A revocation there cannot reach it, and nobody is told that it does.
    let path = format!("/api/admin/keys/{}/revoke?wait=applied&timeout=500ms", fifth.id);
    let answer = there.post(&path, &json!({ "reason": "compromised" })).expect(200).json();
    assert_eq!(answer["propagation"]["missing"], json!(["envoy-1"]), "{answer}");
    envoy.call(&chat(fifth)).expect(200);
    let healed = Instant::now();
    to_redis.heal();
    wait_until(SOON, "the proxy to take the other's state", || envoy.call(&chat(fifth)).status == 401);
    println!("healed to enforced: {:?}", healed.elapsed());
    follows(&there);
    assert_eq!(there.fleet()[0]["ahead"], false, "{:?}", there.fleet());

    wait_until(SOON, "the first to have it", || revoked(&api) == all + 4);
    assert_eq!(change_over("back to the first with the same", ports[0], &api), 0.0);
    for answers in [hammered, in_vain].map(keygate_e2e::Load::stop) {
        println!("a revoked key was refused {} times meanwhile", answers.times.count());
        answers.expect_all(401);
    }
    for key in [dead, second, third, fourth, fifth] {
        envoy.call(&chat(key)).expect(401);
    }
    assert_serves(&mut envoy.connect_to_all_workers(), &good.token);
    envoy.assert_no_vm_died();
}

#[test]
fn a_control_plane_with_another_master_key_is_of_another_fleet_and_says_so() {
    let redis = Redis::start();
    let stack = Stack::builder().workers(2).redis(&redis.url()).start();
    let api = stack.api();
    let (good, dead) = (api.issue("basic"), api.issue("basic"));
    revoke(&api, &dead);
    api.post(LOCKDOWN, &json!({ "ttl": "1h", "exempt_roles": ["admin", "basic"] })).expect(200);
    let stands = |api: &Api| {
        let mut emergency = api.get("/api/admin/emergency").expect(200).json();
        emergency["lockdown"]["remaining_s"] = json!(0);
        let keys = api.get("/api/admin/keys?limit=100").expect(200).json();
        (emergency, keys, api.get("/api/admin/policy").expect(200).json())
    };
    let before = stands(&api);

    let mut stranger = ControlPlane::new(&stack.directory().join("stranger"));
    std::fs::create_dir_all(stranger.data()).expect("a directory");
    stranger.use_redis(&redis.url());
    stranger.start();
    let there = stranger.api();
    let complains = |api: &Api| {
        let answer = api.call(&Request::get("/readyz?verbose")).expect(200).json();
        let reasons = answer["reasons"].to_string();
        answer["status"] == "degraded" && reasons.contains("another master key")
    };
    wait_until(SOON, "both to say that they cannot read each other", || complains(&api) && complains(&there));
    for log in [stack.control_plane.log(), stranger.log()] {
        let log = std::fs::read_to_string(log).expect("a log");
        assert!(log.contains("changes of another control plane are not taken in"), "{log}");
    }
    // It goes on by itself, and so does the first.
    let theirs = there.issue("basic");
    let ours = api.issue("basic");
    there
        .send(Request::new("PUT", "/api/admin/policy?allow_warnings=true").json(&json!({ "routes": [] })))
        .expect(200);
    there.post(LOCKDOWN, &json!({ "ttl": "1h" })).expect(200);
    delete(&there, LOCKDOWN);
    revoke(&api, &ours);
    wait_until(SOON, "what the first revoked to be in Redis", || {
        redis.cli(&["SISMEMBER", "revoked_bloom", &ours.jti]) == "1"
    });
    for key in [&good, &dead, &ours] {
        assert_eq!(there.get(&format!("/api/admin/keys/{}", key.id)).status, 404);
        there.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(401);
    }
    assert_eq!(api.get(&format!("/api/admin/keys/{}", theirs.id)).status, 404);
    stack.get("/api/chat", &theirs.token).expect(401);
    stack.get("/api/chat", &dead.token).expect(401);
    stack.get("/api/chat", &ours.token).expect(401);
    stack.get("/api/chat", &good.token).expect(200);
    let (mut now, mut before) = (stands(&api), before);
    for (_, keys, _) in [&mut now, &mut before] {
        let keys = keys["keys"].as_array_mut().expect("keys");
        keys.retain(|key| key["key_id"] != ours.id.as_str());
    }
    assert_eq!(now, before);
    stranger.stop();
}

/// The fencing token of a control plane that has the lease.
fn lease(api: &Api) -> Option<u64> {
    redis_of(api)["lease"].as_u64()
}

#[test]
fn one_at_a_time_has_the_lease_and_another_takes_over_from_one_that_died() {
    let redis = Redis::start();
    let mut stack = Stack::builder().without_envoy().redis(&redis.url()).start();
    let api = stack.api();
    let first = wait_for(SOON, "the only one to take the lease", || lease(&api));
    let other = beside(&stack, &redis.url(), "b");
    let there = other.api();
    wait_until(SOON, "the other one to be connected", || redis_of(&there)["connected"] == true);
    // Longer than it is taken for: it is renewed.
    let begun = Instant::now();
    wait_until(SOON, "a while", || {
        assert_eq!((lease(&api), lease(&there)), (Some(first), None));
        begun.elapsed() > Duration::from_secs(12)
    });
    stack.control_plane.kill();
    let died = Instant::now();
    let second = wait_for(Duration::from_secs(15), "the other one to take over", || lease(&there));
    println!("fencing token {first}, then {second} after {:?}", died.elapsed());
    assert!(second > first, "{second}");
    stack.control_plane.start();
    wait_until(SOON, "it to be back", || redis_of(&stack.api())["connected"] == true);
    assert_eq!((lease(&stack.api()), lease(&there)), (None, Some(second)));
}

/// The members of a set in a Cluster, sorted.
fn members(cluster: &Cluster, set: &str) -> Vec<String> {
    let mut members: Vec<String> = cluster.cli(&["SMEMBERS", set]).lines().map(str::to_owned).collect();
    members.sort();
    members
}

#[test]
fn a_cluster_is_as_good_as_one_redis() {
    let cluster = Cluster::start(3);
    let stack = Stack::builder().workers(2).redis(&cluster.url()).start();
    let other = beside(&stack, &cluster.url(), "b");
    let (api, there) = (stack.api(), other.api());
    let envoy = envoy_of(&stack, &other, "envoy-b");
    let keys: Vec<Key> = (0..30).map(|_| api.issue("basic")).collect();
    let good = there.issue("basic");
    for key in &keys {
        wait_known(&there, key);
    }
    let (ours, theirs) = keys.split_at(15);
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(revoke(&api, ours), "replicated");
        assert_eq!(revoke(&there, theirs), "replicated");
    }
    let refused = |key: &Key| [&stack.envoy, &envoy].iter().all(|envoy| envoy.call(&chat(key)).status == 401);
    wait_until(SOON, "both proxies to refuse all", || keys.iter().all(refused));
    let mut jtis: Vec<String> = keys.iter().map(|key| key.jti.clone()).collect();
    jtis.sort();
    wait_until(SOON, "all in the set", || members(&cluster, "revoked_bloom") == jtis);
    for key in &keys {
        assert_eq!(cluster.cli(&["EXISTS", &format!("revoked:{}", key.jti)]), "1");
        assert_eq!(cluster.cli(&["EXISTS", &format!("api_key:v2:{}", key.id)]), "1");
    }

    // An operator's hand.
    wait_until(SOON, "the key to pass", || stack.get("/api/chat", &good.token).status == 200);
    assert_eq!(cluster.cli(&["SETEX", "emergency_revocation", "3600", "{\"active\": true}"]), "OK");
    let set = Instant::now();
    wait_until(SOON, "both proxies to be locked down", || refused(&good));
    println!("set by redis-cli to refused by both proxies: {:?}", set.elapsed());
    assert_eq!(cluster.cli(&["DEL", "emergency_revocation"]), "1");
    let passes = |envoy: &Envoy| envoy.call(&chat(&good)).status == 200;
    wait_until(SOON, "it to be lifted", || passes(&stack.envoy) && passes(&envoy));

    // One master after the other loses all it has: what decides is there again, and so are the logs.
    let logs = || -> Vec<u64> {
        let length = |log: &String| cluster.cli(&["XLEN", log]).parse().expect("a number");
        members(&cluster, "keygate:sources").iter().map(|s| length(&format!("keygate:log:{s}"))).collect()
    };
    for index in 0..3 {
        let before = logs();
        cluster.node(index).cli(&["FLUSHALL"]);
        let flushed = Instant::now();
        wait_until(SOON, "all to be there again", || {
            let again = logs();
            members(&cluster, "revoked_bloom") == jtis
                && again.len() == before.len()
                && again.iter().zip(&before).all(|(again, before)| again >= before)
        });
        println!("master {index} flushed, all there again after {:?}", flushed.elapsed());
        let late = there.issue("basic");
        wait_known(&api, &late);
        revoke(&there, &late);
        wait_until(SOON, "both proxies to refuse it", || refused(&late));
        jtis.push(late.jti);
        jtis.sort();
    }
    assert!(keys.iter().all(refused));
    assert!(passes(&stack.envoy) && passes(&envoy));
    for api in [&api, &there] {
        wait_until(SOON, "it to be content", || {
            let status = redis_of(api);
            status["connected"] == true && status["error"].is_null()
        });
    }
}
