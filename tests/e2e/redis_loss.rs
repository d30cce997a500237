//! A Redis that is deposed or emptied, a journal that is set back or lost: each gets what it lacks from the other, and
//! no proxy ever takes a revocation back.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::envoy::Envoy;
use keygate_e2e::line::{self, Line};
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Connection, Key, Load, Redis, Request, SOON, Sentinels, Stack, wait_until};
use serde_json::{Value, json};

use crate::fleet::issue_many;
use crate::requests::assert_serves;

/// How often a second a key is tried on each worker.
const TRIES_PER_SECOND: u32 = 200;

pub fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

/// What a control plane says of its Redis.
#[track_caller]
pub fn redis_of(api: &Api) -> Value {
    api.call(&Request::get("/readyz?verbose")).expect(200).json()["redis"].clone()
}

/// Revokes a key, and waits for no proxy; how durable it was answered to be.
#[track_caller]
pub fn revoke(api: &Api, key: &Key) -> String {
    let path = format!("/api/admin/keys/{}/revoke", key.id);
    let answer = api.post(&path, &json!({ "reason": "compromised" })).expect(200).json();
    answer["durability"].as_str().unwrap_or_else(|| panic!("no durability in {answer}")).to_owned()
}

/// Revokes tokens that nobody has seen, a thousand at a time.
#[track_caller]
pub fn revoke_unseen(api: &Api, count: usize) {
    let jtis: Vec<String> = (0..count).map(|number| format!("unseen-{number}")).collect();
    for jtis in jtis.chunks(1000) {
        let body = json!({ "jtis": jtis, "reason": "compromised" });
        let answer = api.post("/api/admin/revocations", &body).expect(200).json();
        assert_eq!(answer["revoked"], jtis.len(), "{}", answer["version"]);
    }
}

/// The ids of the revoked tokens, as Redis has them.
#[track_caller]
pub fn revoked_in(redis: &Redis) -> HashSet<String> {
    redis.cli(&["SMEMBERS", "revoked_bloom"]).lines().map(str::to_owned).collect()
}

/// Uses a key on each of these workers again and again.
pub fn hammer(workers: Vec<Connection>, key: &Key) -> Load {
    let request = chat(key);
    Load::start(workers, TRIES_PER_SECOND, move || request.clone())
}

fn validate(api: &Api, token: &str) -> u16 {
    api.call(&Request::get("/api/auth/validate").bearer(token)).status
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("--archive").args([from, to]).status().expect("cp");
    assert!(copied.success(), "{copied}");
}

/// A master and two replicas with Sentinels, which reach each other from an address of their own; so the line between
/// them and the master can be cut, while others still reach it.
fn replicated() -> (Redis, [Redis; 2], Sentinels) {
    let server = || Redis::new().with_append_only().with_source(line::SOURCE);
    let mut master = server();
    master.run();
    let replicas = [(); 2].map(|()| {
        let mut replica = server().replica_of(&master);
        replica.run();
        replica
    });
    let sentinels = Sentinels::start(&master, 3, 2);
    (master, replicas, sentinels)
}

#[derive(Debug, Clone)]
struct Answered {
    jti: String,
    replicated: bool,
    at: Instant,
}

#[test]
fn a_master_is_cut_off_during_a_thousand_revocations() {
    const REVOCATIONS: usize = 1000;
    const THREADS: usize = 8;

    let (master, replicas, sentinels) = replicated();
    let stack = Stack::builder().workers(2).redis(&sentinels.url()).start();
    let api = stack.api();
    let good = api.issue("node_operator");
    let keys = issue_many(&api, REVOCATIONS);
    let traffic = hammer(stack.envoy.connect_to_all_workers(), &good);
    wait_until(SOON, "both replicas to be counted", || redis_of(&api)["masters"][0]["replicas"] == 2);

    let mut line = Line::to(master.port());
    let (next, answers) = (AtomicUsize::new(0), Mutex::new(Vec::<Answered>::new()));
    // The last third is kept for afterwards.
    let allowed = AtomicUsize::new(REVOCATIONS * 2 / 3);
    let answered = || answers.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut copies: Vec<HashSet<String>> = Vec::new();
    let (mut promoted, mut back, mut new_master) = (Instant::now(), Instant::now(), 0);
    let mut cut = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let turn = next.fetch_add(1, Ordering::Relaxed);
                    let Some(key) = keys.get(turn) else { return };
                    wait_until(SOON * 3, "its turn", || turn < allowed.load(Ordering::Relaxed));
                    let replicated = revoke(&api, key) == "replicated";
                    let answer = Answered { jti: key.jti.clone(), replicated, at: Instant::now() };
                    answers.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
                }
            });
        }
        wait_until(SOON, "revocations", || answered().len() >= REVOCATIONS / 3);
        cut = Instant::now();
        match line {
            // The control plane still reaches the master, which does not know that it was deposed.
            Line::Kernel { .. } => line.cut(),
            Line::Relay(_) => master.pause(),
        }
        copies = replicas.iter().map(revoked_in).collect();
        wait_until(SOON, "another master", || sentinels.master_port() != master.port());
        promoted = Instant::now();
        new_master = sentinels.master_port();
        sentinels.wait_for_master(new_master);
        wait_until(SOON, "the control plane to go over", || {
            let again = api.post("/api/admin/revocations/rebuild", &json!({})).expect(200).json();
            again["durability"] == "replicated"
        });
        back = Instant::now();
        allowed.store(REVOCATIONS, Ordering::Relaxed);
        wait_until(SOON, "revocations", || answered().len() >= REVOCATIONS * 5 / 6);
        match line {
            Line::Kernel { .. } => line.heal(),
            Line::Relay(_) => master.resume(),
        }
    });
    let answers = answered();
    assert_eq!(answers.len(), REVOCATIONS);
    let index = replicas.iter().position(|replica| replica.port() == new_master).expect("a replica");
    let (new, copy) = (&replicas[index], &copies[index]);
    let replicated = answers.iter().filter(|answer| answer.replicated).count();
    let between = answers.iter().filter(|answer| answer.at > cut && answer.at < promoted);
    println!("{replicated} replicated, {} local", REVOCATIONS - replicated);
    println!("answered while the master was cut off and not replaced: {}", between.count());
    println!("cut off to another master {:?}, to replicated again {:?}", promoted - cut, back - cut);
    // Whoever was told so must find it in the one that took over.
    for answer in answers.iter().filter(|answer| answer.replicated && answer.at < promoted) {
        assert!(copy.contains(&answer.jti), "replicated, {:?} after the cut, and lost", answer.at - cut);
    }
    assert!(replicated < REVOCATIONS, "nothing was answered while nothing could be replicated");

    let all: HashSet<String> = keys.iter().map(|key| key.jti.clone()).collect();
    wait_until(SOON, "all of it in the new master", || revoked_in(new) == all);
    wait_until(SOON, "the old master to follow", || master.info("role").as_deref() == Some("slave"));
    wait_until(SOON, "the old master to have it too", || revoked_in(&master) == all);
    assert_eq!(new.info("role").as_deref(), Some("master"));
    assert_eq!(new.cli(&["SCARD", "revoked_bloom"]), REVOCATIONS.to_string());
    traffic.stop().expect_all(200);
    let mut workers = stack.envoy.connect_to_all_workers();
    for (number, key) in keys.iter().enumerate() {
        workers[number % 2].send(&chat(key)).expect_problem(401, "invalid_token");
    }
    assert_serves(&mut workers, &good.token);
}

#[test]
fn twenty_thousand_revocations_are_written_again() {
    const REVOCATIONS: usize = 20_000;

    let redis = Redis::start();
    let stack = Stack::builder().without_envoy().redis(&redis.url()).start();
    let api = stack.api();
    let begun = Instant::now();
    revoke_unseen(&api, REVOCATIONS);
    println!("{REVOCATIONS} revoked in {:?}", begun.elapsed());
    let count = || redis.cli(&["SCARD", "revoked_bloom"]);
    wait_until(SOON, "all of them in Redis", || count() == REVOCATIONS.to_string());
    let log = redis.cli(&["--scan", "--pattern", "keygate:log:*"]);
    let changes = redis.cli(&["XLEN", &log]);

    redis.cli(&["FLUSHALL"]);
    let flushed = Instant::now();
    wait_until(SOON, "the set to be there again", || count() == REVOCATIONS.to_string());
    let set = flushed.elapsed();
    wait_until(SOON, "the log to be there again", || redis.cli(&["XLEN", &log]) == changes);
    println!("after FLUSHALL: {REVOCATIONS} in the set again after {set:?}, the log {:?}", flushed.elapsed());
    wait_until(SOON, "the control plane to be content", || {
        let status = redis_of(&api);
        status["connected"] == true && status["error"].is_null()
    });
    assert!(redis.cli(&["TTL", "revoked:unseen-777"]).parse::<i64>().is_ok_and(|ttl| ttl > 0));
}

#[test]
fn a_journal_that_is_set_back_gets_what_it_lacks_from_redis() {
    let redis = Redis::start();
    let mut stack = Stack::builder().workers(2).redis(&redis.url()).start();
    let api = stack.api();
    let (good, late) = (api.issue("basic"), api.issue("basic"));
    let keys: Vec<Key> = (0..50).map(|_| api.issue("basic")).collect();
    let data = stack.control_plane.data();
    let kept = stack.directory().join("kept");
    stack.control_plane.stop();
    copy(&data, &kept);
    stack.control_plane.start();

    let api = stack.api();
    for key in &keys {
        api.revoke(&key.id).expect_everywhere(1);
    }
    let unknown = api.issue("basic");
    wait_until(SOON, "all of it in Redis", || redis.cli(&["SCARD", "revoked_bloom"]) == "50");
    let mut workers = stack.envoy.connect_to_all_workers();
    assert_serves(&mut workers, &unknown.token);
    let hammer = hammer(workers, &keys[0]);

    stack.control_plane.stop();
    fs::remove_dir_all(&data).expect("its data");
    copy(&kept, &data);
    let begun = Instant::now();
    stack.control_plane.start();
    let api = stack.api();
    wait_until(SOON, "the later revocations to be back", || {
        keys.iter().all(|key| validate(&api, &key.token) == 401)
    });
    println!("50 later revocations in force again after {:?}", begun.elapsed());
    assert_eq!((validate(&api, &unknown.token), validate(&api, &good.token)), (200, 200));
    takes_changes(&stack, &late, 1, begun);
    hammer.wait_answered(200);
    let answers = hammer.stop().expect_all(401);
    println!("a revoked key was refused {} times meanwhile", answers.times.count());
    for key in &keys {
        stack.get("/api/chat", &key.token).expect(401);
    }
    for key in [&good, &unknown] {
        stack.get("/api/chat", &key.token).expect(200);
    }
    // Once and for all: the next start knows it by its own journal.
    stack.control_plane.stop();
    redis.cli(&["FLUSHALL"]);
    stack.control_plane.start();
    assert_eq!(validate(&stack.api(), &keys[49].token), 401);
    wait_until(SOON, "all of it in Redis", || redis.cli(&["SCARD", "revoked_bloom"]) == "51");
}

/// All proxies must enforce another revocation within seconds.
#[track_caller]
fn takes_changes(stack: &Stack, key: &Key, proxies: u64, begun: Instant) {
    let api = stack.api();
    stack.get("/api/chat", &key.token).expect(200);
    api.revoke(&key.id).expect_everywhere(proxies);
    println!("what is new is enforced {:?} after the start", begun.elapsed());
    stack.get("/api/chat", &key.token).expect_problem(401, "invalid_token");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// Takes everything from a control plane but what an operator keeps elsewhere.
fn lose_data(control_plane: &ControlPlane) {
    let data = control_plane.data();
    let master = data.join("master.key");
    let kept = fs::read(&master).expect("the master key");
    fs::remove_dir_all(&data).expect("its data");
    fs::create_dir(&data).expect("a directory");
    fs::write(&master, kept).expect("the master key");
}

#[test]
fn a_control_plane_that_lost_its_data_gets_it_from_redis() {
    // More than are taken in at a time, and the revocations last: then a key is good for a while that was revoked.
    const KEYS: usize = 1000;

    let redis = Redis::start();
    let mut line = Line::relay(redis.port());
    let url = format!("redis://127.0.0.1:{}", line.port());
    let mut stack = Stack::builder().workers(2).redis(&url).start();
    let api = stack.api();
    let (good, late) = (api.issue("basic"), api.issue("basic"));
    let keys = issue_many(&api, KEYS);
    let revoked = &keys[..50];
    for key in revoked {
        api.revoke(&key.id).expect_everywhere(1);
    }
    wait_until(SOON, "all of it in Redis", || redis.cli(&["SCARD", "revoked_bloom"]) == "50");
    let mut workers = stack.envoy.connect_to_all_workers();
    assert_serves(&mut workers, &good.token);
    let hammered = hammer(workers, &revoked[0]);
    let served = hammer(vec![stack.envoy.connect()], &good);

    let old_admin = api.key();
    stack.control_plane.stop();
    lose_data(&stack.control_plane);
    line.cut();
    stack.control_plane.start();
    let api = stack.api();
    // What it has is not what the proxy has, and it knows that it does not know why.
    let refused = || Metrics::of(&api).value("keygate_sync_conflicts_total");
    wait_until(SOON, "the proxy to be refused some times", || refused() >= 3.0);
    let mut fresh = Envoy::new(stack.directory(), "envoy-2", 1);
    fresh.start(&stack.neighbours());
    let hammered_fresh = hammer(vec![fresh.connect()], &revoked[49]);

    let begun = Instant::now();
    line.heal();
    wait_until(SOON, "the keys and their revocations to be back", || {
        validate(&api, &good.token) == 200 && revoked.iter().all(|key| validate(&api, &key.token) == 401)
    });
    println!("50 revocations of {KEYS} keys in force again after {:?}", begun.elapsed());
    let key = api.get(&format!("/api/admin/keys/{}", keys[7].id)).expect(200).json();
    assert_eq!((&key["state"], &key["jti"]), (&json!("revoked"), &json!(keys[7].jti)), "{key}");
    // The operator's key of before, too.
    assert_eq!(validate(&api, &old_admin), 200);
    fresh.wait_ready();
    wait_until(SOON, "both proxies to follow", || {
        api.fleet().iter().filter(|proxy| proxy["current"] == true).count() == 2
    });
    takes_changes(&stack, &late, 2, begun);
    hammered.wait_answered(200);
    hammered.stop().expect_all(401);
    served.stop().expect_all(200);
    let statuses = hammered_fresh.stop().statuses;
    assert!(!statuses.contains_key(&200), "a new proxy let a revoked key pass: {statuses:?}");
    for key in revoked {
        stack.get("/api/chat", &key.token).expect(401);
        fresh.call(&chat(key)).expect(401);
    }
    for key in [&good, &api.issue("basic")] {
        stack.get("/api/chat", &key.token).expect(200);
        fresh.call(&chat(key)).expect(200);
    }
}

#[test]
fn a_journal_that_was_set_back_and_went_on_is_not_taken_for_the_one_in_redis() {
    for made in [0, 2, 5] {
        let redis = Redis::start();
        let mut line = Line::relay(redis.port());
        let url = format!("redis://127.0.0.1:{}", line.port());
        let mut stack = Stack::builder().without_envoy().redis(&url).start();
        let api = stack.api();
        let owned = api.issue_with(&json!({ "name": "o", "role": "basic", "owner": "acme" }));
        let suspended = api.issue("basic");
        let data = stack.control_plane.data();
        let kept = stack.directory().join("kept");
        stack.control_plane.stop();
        copy(&data, &kept);
        stack.control_plane.start();
        let api = stack.api();
        api.post("/api/admin/emergency/revoke", &json!({ "scope": { "owner": "acme" } })).expect(200);
        api.post(&format!("/api/admin/keys/{}/suspend", suspended.id), &json!({})).expect(200);
        let last = api.issue("basic");
        let record = format!("api_key:v2:{}", last.id);
        wait_until(SOON, "all of it in Redis", || redis.cli(&["EXISTS", &record]).trim() == "1");

        stack.control_plane.stop();
        fs::remove_dir_all(&data).expect("its data");
        copy(&kept, &data);
        line.cut();
        stack.control_plane.start();
        let api = stack.api();
        for _ in 0..made {
            api.issue("basic"); // By the numbers that Redis has other changes for.
        }
        line.heal();
        if made > 0 {
            // It says so and takes no part, rather than lose either.
            wait_until(SOON, "it to say so", || {
                let ready = api.get("/readyz?verbose").json();
                ready["reasons"].to_string().contains("have different changes")
            });
            assert_eq!(api.issue("basic").answer["durability"], "local");
            // As it says: what Redis has is taken in from nothing.
            stack.control_plane.stop();
            for gone in ["journal", "store.redb", "keyring.json"] {
                let path = data.join(gone);
                if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.expect("gone");
            }
            stack.control_plane.start();
        }
        wait_until(SOON, "what was lost to be back", || {
            [&owned, &suspended]
                .iter()
                .all(|key| api.call(&Request::get("/api/auth/validate").bearer(&key.token)).status == 401)
                && api.get(&format!("/api/admin/keys/{}", last.id)).status == 200
        });
    }
}
