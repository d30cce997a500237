//! A Redis that fails, in each of the ways it can: what is revoked meanwhile is in force at once, is answered as kept
//! here only, and is in Redis soon after the fault has ended, without a restart.

use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Key, Line, Middleman, Redis, Request, SOON, Stack, wait_for, wait_until};
use serde_json::{Value, json};

use crate::redis_edits::{ready, wait_connected};

const REVOKED: &str = "revoked_bloom";
/// How long an answer waits for a Redis that says nothing: 1 s by design, and a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_millis(2_000);
/// How long it may take, by contract, until all is as if there had been no fault.
const RECOVERED_WITHIN: Duration = Duration::from_secs(10);

/// A control plane that wants every change in Redis, and its Redis.
struct Trial {
    stack: Stack,
    redis: Redis,
    keys: Vec<Key>,
    revoked: Vec<Key>,
}

impl Trial {
    #[track_caller]
    fn start(mut redis: Redis) -> Self {
        redis.run();
        let url = redis.url();
        Self::start_at(redis, &url)
    }

    #[track_caller]
    fn start_at(redis: Redis, url: &str) -> Self {
        Self::start_with(redis, Stack::builder().without_envoy().redis(url))
    }

    #[track_caller]
    fn start_with(redis: Redis, builder: keygate_e2e::stack::Builder) -> Self {
        let stack = builder.config("durability = \"replicated\"").start();
        let api = stack.api();
        wait_connected(&api);
        let keys = (0..16).map(|_| api.issue("basic")).collect();
        let mut trial = Self { stack, redis, keys, revoked: Vec::new() };
        assert_eq!(trial.revoke(), "replicated", "before anything happens");
        trial
    }

    fn api(&self) -> Api {
        self.stack.api()
    }

    /// Revokes a key, which is in force at once; where it is kept.
    #[track_caller]
    fn revoke(&mut self) -> String {
        let (api, key) = (self.api(), self.keys.pop().expect("a key that is left"));
        let begun = Instant::now();
        let path = format!("/api/admin/keys/{}/revoke", key.id);
        let answer = api.post(&path, &json!({ "reason": "compromised" }));
        let took = begun.elapsed();
        let validate = Request::get("/api/auth/validate").bearer(&key.token);
        api.call(&validate).expect_problem(401, "invalid_token");
        assert!(took < ANSWERED_WITHIN, "it took {took:?}");
        let durability = answer.json()["durability"].as_str().expect("where it is kept").to_owned();
        assert_eq!(answer.status, if durability == "replicated" { 200 } else { 202 }, "{}", answer.text());
        println!("revoked in {took:?}: {durability}");
        self.revoked.push(key);
        durability
    }

    /// What is revoked now is kept here only, and that is said, with the reason.
    #[track_caller]
    fn suffers(&mut self, why: &str) {
        for _ in 0..3 {
            assert_eq!(self.revoke(), "local");
        }
        self.says(why);
    }

    #[track_caller]
    fn says(&self, why: &str) {
        let api = self.api();
        let said = wait_for(Duration::from_secs(5), &format!("it to say {why:?}"), || {
            let said = ready(&api);
            (said["status"] == "degraded" && said["reasons"].to_string().contains(why)).then_some(said)
        });
        let shown = Metrics::of(&api).value("redis_connection_status") > 0.5;
        println!("connected: {shown}, {}", said["reasons"]);
        assert_eq!(said["redis"]["connected"], shown);
        api.get("/readyz").expect(200);
    }

    /// All is well again, and what was revoked meanwhile is in Redis too.
    #[track_caller]
    fn recovers(&mut self, ended: Instant) {
        self.waits_for_durability(ended);
        let left = RECOVERED_WITHIN.saturating_sub(ended.elapsed());
        wait_until(left, "all that was revoked meanwhile to be in Redis", || {
            self.revoked.iter().all(|key| self.has(key))
        });
        let api = self.api();
        let left = RECOVERED_WITHIN.saturating_sub(ended.elapsed());
        wait_until(left, "Redis to be well", || {
            let said = ready(&api);
            said["redis"]["connected"] == true && said["redis"]["error"].is_null()
        });
        println!("recovered after {:?}", ended.elapsed());
        assert!(Metrics::of(&api).value("redis_connection_status") > 0.5);
        assert_eq!(self.redis.cli(&["SCARD", REVOKED]), self.revoked.len().to_string());
        assert_eq!(self.revoke(), "replicated");
        assert!(self.has(self.revoked.last().expect("one")), "that was said to be in Redis");
        for key in &self.revoked {
            api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(401);
        }
    }

    #[track_caller]
    fn waits_for_durability(&self, ended: Instant) {
        let left = RECOVERED_WITHIN.saturating_sub(ended.elapsed());
        let api = self.api();
        wait_until(left, "a change to be in Redis when it is answered", || {
            let answer = api.post("/api/auth/register", &json!({ "name": "k", "role": "basic" }));
            answer.status == 201 && answer.json()["durability"] == "replicated"
        });
    }

    fn has(&self, key: &Key) -> bool {
        self.redis.cli(&["SISMEMBER", REVOKED, &key.jti]) == "1"
            && self.redis.cli(&["EXISTS", &format!("revoked:{}", key.jti)]) == "1"
    }
}

/// One fault: how it begins, what is said of it, and how it ends.
#[track_caller]
fn endure<T>(redis: Redis, why: &str, begin: impl FnOnce(&mut Redis) -> T, end: impl FnOnce(&mut Redis, T)) {
    let mut trial = Trial::start(redis);
    let fault = begin(&mut trial.redis);
    trial.suffers(why);
    end(&mut trial.redis, fault);
    trial.recovers(Instant::now());
}

fn set(redis: &Redis, name: &str, value: &str) {
    assert_eq!(redis.cli(&["CONFIG", "SET", name, value]), "OK");
}

#[test]
fn a_redis_that_has_become_a_replica() {
    endure(
        Redis::new().with_append_only(),
        "replica",
        |redis| {
            // What it has is replaced by what the other has: nothing.
            let other = Redis::start();
            redis.cli(&["REPLICAOF", "127.0.0.1", &other.port().to_string()]);
            wait_until(SOON, "it to follow", || redis.info("master_link_status").as_deref() == Some("up"));
            assert!(redis.cli(&["SET", "a", "1"]).starts_with("READONLY"));
            other
        },
        |redis, _other| {
            redis.cli(&["REPLICAOF", "NO", "ONE"]);
        },
    );
}

#[test]
fn a_redis_that_loads() {
    endure(
        Redis::new(),
        "ing its data",
        |redis| {
            let many = "for i = 1, 20000 do redis.call('SET', 'filler:' .. i, i) end";
            redis.cli(&["EVAL", many, "0"]);
            redis.cli(&["SAVE"]);
            redis.stop();
            // 20 s; it answers in between after each KiB.
            *redis = std::mem::take(redis).with_config(&[
                ("key-load-delay", "1000"),
                ("loading-process-events-interval-bytes", "1024"),
            ]);
            redis.launch();
            wait_until(SOON, "it to load", || {
                TcpStream::connect((Ipv4Addr::LOCALHOST, redis.port())).is_ok()
                    && redis.cli(&["GET", "a"]).starts_with("LOADING")
            });
        },
        |redis, ()| set(redis, "key-load-delay", "0"),
    );
}

#[test]
fn a_redis_whose_memory_is_full() {
    endure(
        Redis::new(),
        "OOM",
        |redis| set(redis, "maxmemory", "1"),
        |redis, ()| set(redis, "maxmemory", "0"),
    );
}

#[test]
fn a_redis_that_cannot_persist() {
    let saved = |redis: &Redis, wanted: &str| {
        wait_until(SOON, "the end of a save", || {
            if redis.info("rdb_bgsave_in_progress").as_deref() == Some("0") {
                redis.cli(&["BGSAVE"]);
            }
            redis.info("rdb_last_bgsave_status").as_deref() == Some(wanted)
        });
    };
    let file = |redis: &Redis| redis.directory().join("dump.rdb");
    endure(
        Redis::new().with_config(&[("save", "3600 1000000")]),
        "MISCONF",
        |redis| {
            // A directory in the place of its file: root may write everywhere else.
            std::fs::create_dir(file(redis)).expect("a directory");
            saved(redis, "err");
            assert!(redis.cli(&["SET", "a", "1"]).starts_with("MISCONF"));
        },
        |redis, ()| {
            std::fs::remove_dir(file(redis)).expect("it is empty");
            saved(redis, "ok");
        },
    );
}

#[test]
fn a_redis_that_lacks_replicas() {
    endure(
        Redis::new(),
        "NOREPLICAS",
        |redis| set(redis, "min-replicas-to-write", "1"),
        |redis, ()| set(redis, "min-replicas-to-write", "0"),
    );
}

#[test]
fn a_redis_that_wants_a_password() {
    endure(
        Redis::new(),
        "password",
        |redis| {
            set(redis, "requirepass", "hunter2");
            // Those who are in stay in.
            for kind in ["normal", "pubsub"] {
                redis.cli(&["-a", "hunter2", "CLIENT", "KILL", "TYPE", kind]);
            }
        },
        |redis, ()| {
            redis.cli(&["-a", "hunter2", "CONFIG", "SET", "requirepass", ""]);
        },
    );
}

#[test]
fn a_redis_that_stands_still() {
    endure(Redis::new(), "does not answer", |redis| redis.pause(), |redis, ()| redis.resume());
}

#[test]
fn a_redis_that_is_gone_and_has_forgotten_all() {
    endure(Redis::new(), "cannot be reached", |redis| redis.kill(), |redis, ()| redis.run());
}

#[test]
fn a_replica_that_stands_still() {
    let mut master = Redis::new();
    master.run();
    let mut replica = Redis::new().replica_of(&master);
    replica.run();
    wait_until(SOON, "the replica to follow", || replica.info("master_link_status").as_deref() == Some("up"));
    let url = master.url();
    let stack = Stack::builder().without_envoy().redis(&url);
    let toml = "durability = \"replicated\"\n[redis]\nreplicas = 1";
    let stack = stack.config(toml).start();
    let api = stack.api();
    wait_connected(&api);
    wait_until(SOON, "the replica to confirm", || {
        api.post("/api/admin/revocations/rebuild", &json!({})).json()["durability"] == "replicated"
    });
    let keys = (0..8).map(|_| api.issue("basic")).collect();
    let mut trial = Trial { stack, redis: master, keys, revoked: Vec::new() };
    assert_eq!(trial.revoke(), "replicated");
    replica.pause();
    trial.suffers("replicas");
    replica.resume();
    trial.recovers(Instant::now());
    assert_eq!(replica.cli(&["SCARD", REVOKED]), trial.revoked.len().to_string());
}

#[test]
fn a_line_that_loses_everything() {
    let mut redis = Redis::new();
    redis.run();
    let mut line = Line::relay(redis.port());
    let builder = Stack::builder().workers(2).redis(&format!("redis://127.0.0.1:{}", line.port()));
    let mut trial = Trial::start_with(redis, builder);
    let served = trial.keys[0].clone();
    let enforced = |trial: &Trial| {
        trial.stack.get("/api/chat", &served.token).expect(200);
        let key = trial.revoked.last().expect("one");
        wait_until(SOON, "the proxy to enforce it", || {
            trial.stack.get("/api/chat", &key.token).status == 401
        });
    };
    line.cut();
    let begun = Instant::now();
    assert_eq!(trial.revoke(), "local");
    enforced(&trial);
    println!("enforced by the proxy after {:?}", begun.elapsed());
    trial.suffers("does not answer");
    enforced(&trial);
    line.heal();
    trial.recovers(Instant::now());
    enforced(&trial);
    trial.stack.envoy.assert_no_vm_died();
}

#[test]
fn a_redis_that_is_slow() {
    let mut redis = Redis::new();
    redis.run();
    let middleman = Middleman::before(redis.port());
    let mut trial = Trial::start_at(redis, &format!("redis://127.0.0.1:{}", middleman.port()));
    // Slow is not gone: a change takes four answers.
    middleman.delay(Duration::from_millis(50));
    for _ in 0..3 {
        assert_eq!(trial.revoke(), "replicated");
    }
    // Too slow for an answer to wait for it, and not for a connection.
    middleman.delay(Duration::from_millis(300));
    for _ in 0..3 {
        trial.revoke();
    }
    wait_until(SOON, "all of it to be in Redis", || trial.revoked.iter().all(|key| trial.has(key)));
    // Slower than a connection may be.
    middleman.delay(Duration::from_secs(2));
    trial.suffers("does not answer");
    middleman.delay(Duration::ZERO);
    trial.recovers(Instant::now());
}

#[test]
fn connections_that_are_reset_in_the_middle_of_anything() {
    let mut redis = Redis::new();
    redis.run();
    let middleman = Middleman::before(redis.port());
    let mut trial = Trial::start_at(redis, &format!("redis://127.0.0.1:{}", middleman.port()));
    let directory = trial.stack.directory().join("b");
    middleman.reset(true);
    for round in 1..=8 {
        // Whatever is answered is true.
        if trial.revoke() == "replicated" {
            assert!(trial.has(trial.revoked.last().expect("one")));
        }
        wait_until(SOON, "some more resets", || middleman.cuts() >= 4 * round);
    }
    middleman.reset(false);
    trial.recovers(Instant::now());
    println!("{} connections were reset", middleman.cuts());
    // The log is whole: another control plane learns everything from it.
    let mut other = ControlPlane::beside(&trial.stack.control_plane, &directory);
    other.use_redis(&trial.redis.url());
    other.start();
    let other = other.api();
    wait_connected(&other);
    let status = |key: &Key| other.call(&Request::get("/api/auth/validate").bearer(&key.token)).status;
    for key in &trial.keys {
        wait_until(SOON, "the other to know all keys", || status(key) == 200);
    }
    for key in &trial.revoked {
        assert_eq!(status(key), 401);
    }
}

#[test]
fn something_else_under_a_key_of_the_contract() {
    let mut trial = Trial::start(Redis::new());
    let api = trial.api();
    // The set of the revoked.
    trial.redis.cli(&["SET", REVOKED, "x"]);
    trial.recovers(Instant::now());
    // The record of a key, and a single revocation.
    let key = trial.keys.last().expect("one").clone();
    let names = [format!("api_key:v2:{}", key.id), format!("revoked:{}", key.jti)];
    for name in &names {
        trial.redis.cli(&["DEL", name]);
        trial.redis.cli(&["LPUSH", name, "x"]);
    }
    api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(200);
    assert_eq!(trial.revoke(), "replicated");
    for name in &names {
        assert_eq!(trial.redis.cli(&["TYPE", name]), "string");
    }
    trial.recovers(Instant::now());
}

#[test]
fn something_else_under_a_key_of_keygates_own() {
    let mut trial = Trial::start(Redis::new());
    let log = trial.redis.cli(&["KEYS", "keygate:log:*"]);
    for (name, kind) in [
        (log.as_str(), "stream"),
        ("keygate:sources", "set"),
        ("keygate:reports", "hash"),
        ("keygate:written:{emergency_revocation}", "hash"),
        ("keygate:lease:{scheduled}", "string"),
        ("keygate:lease:{scheduled}:fence", "string"),
    ] {
        trial.redis.cli(&["RPUSH", "mine", "x"]);
        trial.redis.cli(&["RENAME", "mine", name]);
        let begun = Instant::now();
        wait_until(RECOVERED_WITHIN, &format!("{name} to be as it should"), || {
            trial.redis.cli(&["TYPE", name]) == kind
        });
        trial.waits_for_durability(begun);
        assert_eq!(trial.revoke(), "replicated");
        println!("{name} was a {kind} again after {:?}", begun.elapsed());
    }
    trial.recovers(Instant::now());
    wait_until(SOON, "the scheduled work to be somebody's", || {
        ready(&trial.api())["redis"]["lease"].is_u64()
    });
    // Edits are told from what was written all the same.
    let locked = trial.keys.last().expect("one").clone();
    let validate = Request::get("/api/auth/validate").bearer(&locked.token);
    trial.redis.cli(&["SET", "emergency_revocation", "{}"]);
    wait_until(SOON, "the lockdown", || trial.api().call(&validate).status == 401);
}

#[test]
fn a_control_plane_whose_clock_is_a_year_ahead() {
    let mut trial = Trial::start(Redis::new());
    let api = trial.api();
    let directory = trial.stack.directory().join("ahead");
    let mut ahead = ControlPlane::beside(&trial.stack.control_plane, &directory);
    ahead.use_redis(&trial.redis.url());
    ahead.use_clock("+1y");
    ahead.start();
    let other = ahead.api();
    wait_connected(&other);
    let year = |api: &Api| {
        let answer = api.get("/api/admin/audit?action=genesis").expect(200).json();
        answer["records"][0]["at"].as_str().and_then(|at| at[..4].parse::<u32>().ok()).expect("a time")
    };
    assert_eq!(year(&other), year(&api) + 1, "faketime is missing: run scripts/setup");
    // What each of them decides, the other takes in.
    let chat = |path: &str, scope: &str| {
        json!({ "routes": [
            { "name": "admin", "path": "/api/admin/*", "access": "key", "roles": ["admin"] },
            { "name": "auth", "path": "/api/auth/*", "access": "key" },
            { "name": "chat", "path": path, "access": "key", "scopes": [scope] },
        ]})
    };
    let put = |api: &Api, policy: &Value| {
        let request = Request::new("PUT", "/api/admin/policy").json(policy);
        let answer = api.send(request);
        assert!([200, 202].contains(&answer.status), "{}", answer.text());
    };
    let routes = |api: &Api| api.get("/api/admin/policy").expect(200).json()["routes"][2]["path"].clone();
    for round in 0..2 {
        for (from, to, name) in [(&other, &api, "ahead"), (&api, &other, "right")] {
            let path = format!("/{name}/{round}");
            put(from, &chat(&path, "chat:read"));
            wait_until(SOON, "the other to have it", || routes(to) == path.as_str());
            assert_eq!(routes(from), path.as_str());
        }
    }
    // A lockdown of the one is lifted by the other.
    let lockdown = "/api/admin/emergency/lockdown";
    let active = |api: &Api| api.get("/api/admin/emergency").expect(200).json()["active"].clone();
    other.post(lockdown, &json!({ "ttl": "1h" }));
    wait_until(SOON, "the lockdown", || active(&api) == true);
    let lifted = api.send(Request::new("DELETE", lockdown));
    assert!([200, 202].contains(&lifted.status), "{}", lifted.text());
    wait_until(SOON, "it to be lifted", || active(&other) == false && active(&api) == false);

    // Nothing is forgotten where the clock is right, nor in Redis, whoever does the scheduled work.
    let key = trial.keys[0].clone();
    let path = format!("/api/admin/keys/{}/revoke", key.id);
    let answer = other.post(&path, &json!({ "reason": "compromised" }));
    assert!([200, 202].contains(&answer.status), "{}", answer.text());
    wait_until(SOON, "its revocation to be taken in", || {
        api.call(&Request::get("/api/auth/validate").bearer(&key.token)).status == 401
    });
    trial.revoke();
    trial.stack.control_plane.stop();
    wait_until(SOON, "the one ahead to do the scheduled work", || ready(&other)["redis"]["lease"].is_u64());
    let cleaned = other.post("/api/admin/revocations/cleanup", &json!({}));
    assert!([200, 202].contains(&cleaned.status), "{}", cleaned.text());
    // What no token can have makes it compare, and take away what it may.
    trial.redis.cli(&["SADD", REVOKED, "no token's id"]);
    wait_until(SOON, "it to clean up", || trial.redis.cli(&["SISMEMBER", REVOKED, "no token's id"]) == "0");
    for key in &trial.revoked {
        assert!(trial.has(key), "it was taken away");
    }
    trial.stack.control_plane.start();
    let api = trial.api();
    wait_connected(&api);
    for key in &trial.revoked {
        api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(401);
    }
    let records = other.get("/api/admin/audit?actor=redis").expect(200).json();
    assert_eq!(records["records"], json!([]), "nobody edited anything");
    let records = api.get("/api/admin/audit?actor=redis").expect(200).json();
    assert_eq!(records["records"], json!([]), "nobody edited anything");
}
