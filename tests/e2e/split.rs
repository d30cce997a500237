//! Several control planes over one Redis, and a Redis with Sentinels, when they lose sight of each other: nothing that
//! was answered is lost, and all of it is everywhere afterwards.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::{Api, Connection, Key, Line, Redis, Request, SOON, Sentinels, Stack, wait_until};
use serde_json::json;

const CLIENTS: usize = 8;

/// Issues keys from several clients at once.
fn issue(api: &Api, count: usize) -> Vec<Key> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| scope.spawn(|| (0..count / CLIENTS).map(|_| api.issue("basic")).collect::<Vec<_>>()))
            .collect();
        clients.into_iter().flat_map(|client| client.join().expect("keys")).collect()
    })
}

/// Revokes keys from several clients at once; how many were answered as replicated. `done` counts them as they come.
fn revoke(api: &Api, keys: &[Key], done: &AtomicUsize) -> usize {
    let replicated = AtomicUsize::new(0);
    let counted = &replicated;
    std::thread::scope(|scope| {
        for keys in keys.chunks(keys.len().div_ceil(CLIENTS)) {
            scope.spawn(move || {
                for key in keys {
                    let path = format!("/api/admin/keys/{}/revoke", key.id);
                    let answer = api.post(&path, &json!({ "reason": "compromised" })).expect(200).json();
                    assert_eq!(answer["state"], "revoked", "{answer}");
                    if answer["durability"] == "replicated" {
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    replicated.into_inner()
}

/// How many of these keys pass on any worker of a proxy.
fn passing(workers: &mut [Connection], keys: &[Key]) -> usize {
    let mut passes = |key: &Key| {
        let request = Request::get("/api/chat").bearer(&key.token);
        workers.iter_mut().any(|worker| {
            let status = worker.send(&request).status;
            assert!(matches!(status, 200 | 401), "{status}");
            status == 200
        })
    };
    keys.iter().filter(|key| passes(key)).count()
}

#[test]
fn a_thousand_revocations_on_each_side_of_a_split_are_two_thousand_on_every_proxy() {
    let redis = Redis::start();
    let mut lines = [Line::relay(redis.port()), Line::relay(redis.port())];
    let url = |line: &Line| format!("redis://127.0.0.1:{}", line.port());
    let stack = Stack::builder().workers(2).redis(&url(&lines[0])).start();
    let elsewhere = tempfile::tempdir().expect("a directory");
    let mut other = ControlPlane::beside(&stack.control_plane, elsewhere.path());
    other.use_redis(&url(&lines[1]));
    other.start();
    let envoy = stack.another_envoy_of(&other, "envoy-b", 2);

    let api = stack.api();
    let keys = issue(&api, 2_000);
    let there = Api::new(other.api_port(), &stack.control_plane.admin_key());
    wait_until(SOON, "the other one to know all keys", || {
        keys.iter()
            .rev()
            .take(CLIENTS)
            .all(|key| there.get(&format!("/api/admin/keys/{}", key.id)).status == 200)
    });
    let mut workers = [stack.envoy.connect_to_all_workers(), envoy.connect_to_all_workers()];
    for workers in &mut workers {
        assert_eq!(passing(workers, &keys), keys.len());
    }

    lines.iter_mut().for_each(Line::cut);
    let (left, right) = keys.split_at(1_000);
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let sides = [scope.spawn(|| revoke(&api, left, &done)), scope.spawn(|| revoke(&there, right, &done))];
        for side in sides {
            assert_eq!(side.join().expect("revoked"), 0, "nothing can be replicated");
        }
    });
    wait_until(SOON, "each side to enforce its own", || {
        passing(&mut workers[0], left) == 0 && passing(&mut workers[1], right) == 0
    });
    assert_eq!(passing(&mut workers[0], right), 1_000, "they are split");

    let healed = Instant::now();
    lines.iter_mut().for_each(Line::heal);
    wait_until(Duration::from_secs(10), "all revocations on both sides", || {
        [&api, &there].iter().all(|api| {
            let stats = api.get("/api/admin/revocations/stats").expect(200).json();
            stats["total_revoked"] == 2_000
        })
    });
    println!("healed after {} ms", healed.elapsed().as_millis());
    for workers in &mut workers {
        wait_until(SOON, "every proxy to refuse all", || passing(workers, &keys) == 0);
    }
    println!("2,000 refused on every worker, asked until {} ms", healed.elapsed().as_millis());
    wait_until(SOON, "Redis to have all", || redis.cli(&["SCARD", "revoked_bloom"]).trim() == "2000");
    for api in [&api, &there] {
        assert_eq!(api.get("/api/admin/audit/verify").expect(200).json()["valid"], true);
    }
}

#[test]
fn a_thousand_revocations_outlive_the_failover_in_their_midst() {
    let mut master = Redis::start();
    let replicas: Vec<Redis> = (0..2)
        .map(|_| {
            let mut replica = Redis::new().replica_of(&master);
            replica.run();
            replica
        })
        .collect();
    wait_until(SOON, "the replicas", || master.info("connected_slaves").as_deref() == Some("2"));
    let sentinels = Sentinels::start(&master, 3, 2);
    let stack = Stack::builder().workers(2).redis(&sentinels.url()).start();
    let api = stack.api();
    let keys = issue(&api, 1_000);
    wait_until(SOON, "Redis to have the keys", || {
        api.post("/api/admin/revocations/rebuild", &json!({})).expect(200).json()["durability"]
            == "replicated"
    });

    let done = AtomicUsize::new(0);
    let replicated = std::thread::scope(|scope| {
        let revoking = scope.spawn(|| revoke(&api, &keys, &done));
        wait_until(SOON, "a third of the revocations", || done.load(Ordering::Relaxed) >= 333);
        master.pause(); // It answers nobody, and does not know.
        revoking.join().expect("revoked")
    });
    assert!((300..1_000).contains(&replicated), "{replicated} replicated");
    wait_until(SOON, "another master", || sentinels.master_port() != master.port());
    let failed_over = Instant::now();
    let new = replicas.iter().find(|replica| replica.port() == sentinels.master_port()).expect("a replica");
    wait_until(SOON, "the new master to have all", || new.cli(&["SCARD", "revoked_bloom"]).trim() == "1000");
    println!(
        "{replicated} replicated, {} local; all in the new master {} ms after the Sentinels named it",
        keys.len() - replicated,
        failed_over.elapsed().as_millis()
    );
    for key in &keys {
        assert_eq!(new.cli(&["SISMEMBER", "revoked_bloom", &key.jti]).trim(), "1");
    }
    assert_eq!(passing(&mut stack.envoy.connect_to_all_workers(), &keys), 0);

    // The old one comes back, and is told.
    master.resume();
    wait_until(SOON, "the old master to follow", || master.info("role").as_deref() == Some("slave"));
    wait_until(SOON, "changes to be replicated again", || {
        api.post("/api/admin/revocations/rebuild", &json!({})).expect(200).json()["durability"]
            == "replicated"
    });
    wait_until(SOON, "the old master to have all", || {
        master.cli(&["SCARD", "revoked_bloom"]).trim() == "1000"
    });
    assert_eq!(passing(&mut stack.envoy.connect_to_all_workers(), &keys), 0);
    master.stop();
}

#[test]
fn control_planes_hear_of_each_others_changes_within_a_second() {
    let redis = Redis::start();
    let stack = Stack::builder().workers(2).redis(&redis.url()).start();
    let elsewhere = tempfile::tempdir().expect("a directory");
    let mut other = ControlPlane::beside(&stack.control_plane, elsewhere.path());
    other.use_redis(&redis.url());
    other.start();
    let there = Api::new(other.api_port(), &stack.control_plane.admin_key());
    wait_until(SOON, "the other one to know the admin", || there.get("/api/admin/emergency").status == 200);
    let mut worker = stack.envoy.connect_to_all_workers().remove(0);
    let mut times = keygate_e2e::Times::default();
    for _ in 0..40 {
        let key = there.issue("basic");
        let request = Request::get("/api/chat").bearer(&key.token);
        wait_until(SOON, "the key to pass", || worker.send(&request).status == 200);
        let path = format!("/api/admin/keys/{}/revoke", key.id);
        there.post(&path, &json!({ "reason": "compromised" })).expect(200);
        let revoked = Instant::now();
        wait_until(Duration::from_secs(1), "the other's proxy to refuse it", || {
            worker.send(&request).status == 401
        });
        times.add(revoked.elapsed());
    }
    println!("from one control plane's answer to the other's proxy: {times}");

    // Who decides the same thing at the same time decides it once.
    for round in 0..20 {
        let key = stack.api().issue("basic");
        let path = |verb: &str| format!("/api/admin/keys/{}/{verb}", key.id);
        wait_until(SOON, "the other one to know the key", || {
            there.get(&format!("/api/admin/keys/{}", key.id)).status == 200
        });
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let name = format!("a{round}");
                let routes = json!([{ "name": name, "path": "/api/chat", "access": "public" }]);
                stack
                    .api()
                    .send(Request::new("PUT", "/api/admin/policy").json(&json!({ "routes": routes })))
                    .expect(200);
                stack.api().post("/api/admin/emergency/lockdown", &json!({ "ttl": "1h" })).expect(200);
                stack.api().post(&path("suspend"), &json!({})).expect(200);
            });
            scope.spawn(|| {
                let name = format!("b{round}");
                let routes = json!([{ "name": name, "path": "/api/chat", "access": "public" }]);
                there
                    .send(Request::new("PUT", "/api/admin/policy").json(&json!({ "routes": routes })))
                    .expect(200);
                there.send(Request::new("DELETE", "/api/admin/emergency/lockdown")).expect(200);
                there.post(&path("suspend"), &json!({})).expect(200);
                there.post(&path("resume"), &json!({})).expect(200);
            });
        });
        let stands = |api: &Api| {
            let mut emergency = api.get("/api/admin/emergency").expect(200).json();
            emergency["lockdown"]["remaining_s"] = json!(0);
            let key = api.get(&format!("/api/admin/keys/{}", key.id)).expect(200).json();
            (api.get("/api/admin/policy").expect(200).json(), emergency, key)
        };
        wait_until(SOON, "both to say the same", || stands(&stack.api()) == stands(&there));
    }
}
