//! What operators do with redis-cli: their edits are in force on every proxy within a second, or refused for all
//! to see; and whatever becomes of what is in Redis, nothing that ended is back.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use keygate_core::sync::wire::{Answer, FORMAT, NewRules};
use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Connection, Key, Middleman, Redis, Request, SOON, Stack, Times, http, wait_until};
use serde_json::{Value, json};

const LOCKDOWN: &str = "emergency_revocation";
const FLAGS: &str = "feature_flags:api_key_v2";
const LIMITS: &str = "rate_limits:emergency";
const REVOKED: &str = "revoked_bloom";
const EMERGENCY: &str = "/api/admin/emergency/lockdown";

/// How soon edits are in force by contract; [`Edits`] holds most of them to it.
const CONTRACT: Duration = Duration::from_secs(1);
/// How soon each must be on a machine that does something else, too.
const WITHIN: Duration = Duration::from_secs(2);

/// A Keygate with a Redis; the Redis ends last.
struct Shared {
    stack: Stack,
    redis: Redis,
}

impl Shared {
    #[track_caller]
    fn start(redis: Redis) -> Self {
        Self::start_with(redis, "")
    }

    #[track_caller]
    fn start_with(mut redis: Redis, config: &str) -> Self {
        redis.run();
        let stack = Stack::builder().workers(2).redis(&redis.url()).config(config).start();
        wait_connected(&stack.api());
        Self { stack, redis }
    }

    /// What a shell prints for a line of the playbook, which knows nothing of the port.
    #[track_caller]
    fn typed(&self, line: &str) -> String {
        typed(&self.redis, line)
    }

    #[track_caller]
    fn lock_down(&self, exempt_roles: &[&str]) -> String {
        let body = json!({ "ttl": "1h", "exempt_roles": exempt_roles });
        self.stack.api().change(EMERGENCY, &body);
        let wanted = json!(exempt_roles);
        wait_until(SOON, "the lockdown to be in Redis", || {
            serde_json::from_str::<Value>(&self.redis.cli(&["GET", LOCKDOWN]))
                .is_ok_and(|value| value["exempt_roles"] == wanted)
        });
        self.redis.cli(&["GET", LOCKDOWN])
    }
}

#[track_caller]
fn typed(redis: &Redis, line: &str) -> String {
    let line = line.replace("redis-cli", &format!("redis-cli -p {}", redis.port()));
    let output = Command::new("bash").args(["-c", &line]).output().expect("bash runs");
    let text = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    assert!(output.status.success(), "{line}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// What the control plane says of itself and its Redis.
#[track_caller]
pub fn ready(api: &Api) -> Value {
    api.get("/readyz?verbose").expect(200).json()
}

#[track_caller]
pub fn wait_connected(api: &Api) {
    wait_until(SOON, "the control plane to be connected with Redis", || {
        ready(api)["redis"]["connected"] == true
    });
}

#[track_caller]
fn records(api: &Api, query: &str) -> Vec<Value> {
    let answer = api.get(&format!("/api/admin/audit?limit=1000&{query}")).expect(200).json();
    answer["records"].as_array().unwrap_or_else(|| panic!("no records in {answer}")).clone()
}

#[track_caller]
fn edits(api: &Api, key: &str, outcome: &str) -> f64 {
    Metrics::of(api).value(&format!("keygate_redis_edits_total{{key=\"{key}\",outcome=\"{outcome}\"}}"))
}

fn chat(token: &str) -> Request {
    Request::get("/api/chat").bearer(token)
}

/// Edits, and how long each took until every worker of every proxy was of that mind.
struct Edits {
    workers: Vec<Connection>,
    times: Times,
}

impl Edits {
    fn new(workers: Vec<Connection>) -> Self {
        Self { workers, times: Times::default() }
    }

    /// Makes an edit, which for each of these keys must mean this status everywhere.
    #[track_caller]
    fn make(&mut self, redis: &Redis, words: &[&str], wanted: &[(&Key, u16)]) {
        let begun = Instant::now();
        redis.cli(words);
        for (key, status) in wanted {
            for worker in &mut self.workers {
                wait_until(WITHIN, &format!("{status} after {words:?}"), || {
                    worker.send(&chat(&key.token)).status == *status
                });
            }
        }
        let took = begun.elapsed();
        assert!(took < WITHIN, "{words:?} took {took:?}");
        self.times.add(took);
    }

    fn finish(self, what: &str) {
        println!("{what}: from redis-cli to every worker: {}", self.times);
        assert!(self.times.at(75) <= CONTRACT, "{}", self.times);
    }
}

fn lockdowns_by_hand(redis: Redis, what: &str) {
    let Shared { stack, redis } = &Shared::start(redis);
    let api = stack.api();
    let (basic, contributor, admin) = (api.issue("basic"), api.issue("contributor"), api.issue("admin"));
    let another = stack.another_envoy("envoy-2", 1);
    let mut workers = stack.envoy.connect_to_all_workers();
    workers.extend(another.connect_to_all_workers());
    let mut edits_ = Edits::new(workers);
    let mut make = |words: &[&str], wanted: [u16; 3]| {
        let keys = [&basic, &contributor, &admin];
        edits_.make(redis, words, &keys.into_iter().zip(wanted).collect::<Vec<_>>());
    };
    let ttl = || redis.cli(&["TTL", LOCKDOWN]).parse::<i64>().expect("a number");

    make(&["SETEX", LOCKDOWN, "1800", r#"{"reason": "breach", "by": "security_team"}"#], [401, 401, 200]);
    assert!((1790..=1800).contains(&ttl()), "{}", ttl());
    make(&["DEL", LOCKDOWN], [200, 200, 200]);
    // Again and at once, to the letter.
    for _ in 0..4 {
        make(&["SETEX", LOCKDOWN, "1800", "{}"], [401, 401, 200]);
        make(&["DEL", LOCKDOWN], [200, 200, 200]);
    }
    make(&["SET", LOCKDOWN, r#"{"exempt_roles": ["contributor", "admin"]}"#], [401, 200, 200]);
    wait_until(WITHIN, "an end, where none was named", || (3590..=3600).contains(&ttl()));
    make(&["SET", LOCKDOWN, r#"{"exempt_roles": ["basic", "admin"]}"#], [200, 401, 200]);
    let shown = redis.cli(&["GET", LOCKDOWN]);
    let shown: Value = serde_json::from_str(&shown).unwrap_or_else(|_| panic!("{shown}"));
    assert_eq!(shown["exempt_roles"], json!(["admin", "basic"]));
    make(&["DEL", LOCKDOWN], [200, 200, 200]);

    let begun = Instant::now();
    make(&["SETEX", LOCKDOWN, "2", "{}"], [401, 401, 200]);
    let until = Duration::from_secs(5);
    wait_until(until, "it to end by itself", || stack.get("/api/chat", &basic.token).status == 200);
    assert!(begun.elapsed() > Duration::from_secs(1), "it ended after {:?}", begun.elapsed());
    wait_until(until, "its key to be gone", || redis.cli(&["EXISTS", LOCKDOWN]) == "0");

    edits_.finish(what);
    let made = 2 + 8 + 3 + 1;
    let records = records(&api, "actor=redis");
    assert_eq!(records.len(), made, "{records:#?}");
    for record in &records {
        assert_eq!((&record["action"], &record["outcome"]), (&json!("lockdown_changed"), &json!("done")));
    }
    assert!((edits(&api, LOCKDOWN, "taken") - made as f64).abs() < 0.1);
    assert!(edits(&api, LOCKDOWN, "refused") < 0.1);
    another.assert_no_vm_died();
}

#[test]
fn a_lockdown_by_hand_holds_everywhere_within_a_second() {
    lockdowns_by_hand(Redis::new().with_append_only(), "without notifications");
}

#[test]
fn a_lockdown_by_hand_holds_everywhere_within_a_second_with_notifications() {
    let redis = Redis::new().with_config(&[("notify-keyspace-events", "KEA")]);
    lockdowns_by_hand(redis, "with notifications");
}

#[test]
fn an_edit_that_says_nothing_sensible_is_refused_and_the_last_good_one_stays() {
    let shared = Shared::start(Redis::new().with_append_only());
    let Shared { stack, redis } = &shared;
    let api = stack.api();
    let (basic, contributor) = (api.issue("basic"), api.issue("contributor"));
    let good = shared.lock_down(&["admin", "contributor"]);
    let mut refused = 0;
    for text in [
        "",
        "lock it all down",
        "{",
        "42",
        "null",
        "true",
        "\"admin\"",
        "[]",
        "[null, null]",
        r#"[null, ["basic"]]"#,
        r#"{"exempt_roles": "basic"}"#,
        r#"{"exempt_roles": [1]}"#,
        r#"{"exempt_roles": ["nobody"]}"#,
        r#"{"exempt_roles": ["basic", "Admin"]}"#,
        r#"{"until": "soon"}"#,
        r#"{"until": 4102444800}"#,
        r#"{"until": "2001-01-01T00:00:00Z"}"#,
        r#"{"until": "2101-01-01T00:00:00Z"}"#,
    ] {
        redis.cli(&["SET", LOCKDOWN, text]);
        refused += 1;
        good_again(&shared, &good, refused, text);
    }
    // Of other types, and with an end that is too far.
    redis.cli(&["RPUSH", "mine", "admin"]);
    redis.cli(&["RENAME", "mine", LOCKDOWN]);
    good_again(&shared, &good, refused + 1, "a list");
    redis.cli(&["HSET", "mine", "exempt_roles", "basic"]);
    redis.cli(&["RENAME", "mine", LOCKDOWN]);
    good_again(&shared, &good, refused + 2, "a hash");
    redis.cli(&["SETEX", LOCKDOWN, "3000000", "{}"]);
    good_again(&shared, &good, refused + 3, "30 days and more");
    refused += 3;

    stack.get("/api/chat", &basic.token).expect_problem(401, "invalid_token");
    stack.get("/api/chat", &contributor.token).expect(200);
    let records = records(&api, "actor=redis");
    assert_eq!(records.len(), refused, "nothing else was done: {records:#?}");
    for record in &records {
        assert_eq!(
            (&record["action"], &record["outcome"], &record["target"]),
            (&json!("edit_refused"), &json!("refused"), &json!(LOCKDOWN)),
        );
        assert!(record["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{record}");
    }
    assert!((edits(&api, LOCKDOWN, "refused") - refused as f64).abs() < 0.1);
    let log = std::fs::read_to_string(stack.control_plane.log()).expect("its log");
    let lines = log.lines().filter(|line| line.contains("an edit in Redis is refused"));
    assert_eq!(lines.filter(|line| line.contains(LOCKDOWN)).count(), refused);

    // Where there was none, there is none.
    redis.cli(&["DEL", LOCKDOWN]);
    wait_until(WITHIN, "it to be lifted", || stack.get("/api/chat", &basic.token).status == 200);
    redis.cli(&["SET", LOCKDOWN, "lock it all down"]);
    wait_until(WITHIN, "it to be gone", || redis.cli(&["EXISTS", LOCKDOWN]) == "0");
    stack.get("/api/chat", &basic.token).expect(200);
    // And what is sensible counts again.
    redis.cli(&["SET", LOCKDOWN, "{}"]);
    wait_until(WITHIN, "the lockdown", || stack.get("/api/chat", &contributor.token).status == 401);
}

/// Waits until the good value stands in Redis again, as it stood; `refused` edits must have been refused by then.
#[track_caller]
fn good_again(shared: &Shared, good: &str, refused: usize, what: &str) {
    let redis = &shared.redis;
    wait_until(WITHIN, &format!("the good value to be back after {what:?}"), || {
        redis.cli(&["TYPE", LOCKDOWN]) == "string" && redis.cli(&["GET", LOCKDOWN]) == good
    });
    let ttl: u64 = redis.cli(&["TTL", LOCKDOWN]).parse().expect("an end");
    assert!((3000..=3600).contains(&ttl), "{ttl} after {what}");
    assert_eq!(records(&shared.stack.api(), "action=edit_refused").len(), refused, "after {what:?}");
}

#[test]
fn each_line_of_the_playbook_does_what_it_says_or_says_why_not() {
    let shared = Shared::start(Redis::new().with_append_only());
    let Shared { stack, redis } = &shared;
    let api = stack.api();
    let (kept, revoked) = (api.issue("basic"), api.issue("contributor"));
    api.revoke(&revoked.id).expect_everywhere(1);
    let serves = || {
        stack.get("/api/chat", &kept.token).expect(200);
        stack.get("/api/chat", &revoked.token).expect(401);
    };
    let strategy = || shared.typed(r#"redis-cli GET "feature_flags:api_key_v2" | jq -r .strategy"#);

    assert_eq!(shared.typed("redis-cli PING"), "PONG");
    assert_eq!(strategy(), "full");
    shared.typed(r#"redis-cli GET "feature_flags:api_key_v2" | jq ."#);
    shared.typed(r#"redis-cli GET "feature_flags:api_key_v2" | jq '.metrics.v2_percentage'"#);

    // There is no V1 to go back to, and it is better told than tried.
    assert_eq!(shared.typed(r#"redis-cli SET "feature_flags:api_key_v2" '{"strategy": "off"}'"#), "OK");
    wait_until(WITHIN, "the flags to say again what is so", || strategy() == "full");
    let refused = records(&api, "actor=redis&action=edit_refused");
    assert_eq!((refused.len(), &refused[0]["target"]), (1, &json!(FLAGS)), "{refused:?}");
    assert!(refused[0]["reason"].as_str().is_some_and(|why| why.contains("V1")), "{refused:?}");
    assert!((edits(&api, FLAGS, "refused") - 1.0).abs() < 0.1);
    // A second time at once, as one does who does not believe it.
    shared.typed(r#"redis-cli SET "feature_flags:api_key_v2" '{"strategy": "off"}'"#);
    wait_until(WITHIN, "the flags to say again what is so", || strategy() == "full");
    assert!((edits(&api, FLAGS, "refused") - 2.0).abs() < 0.1);
    redis.cli(&["DEL", FLAGS]);
    wait_until(WITHIN, "the flags to be back", || {
        redis.cli(&["EXISTS", FLAGS]) == "1" && strategy() == "full"
    });
    serves();

    let line = r#"redis-cli SETEX "rate_limits:emergency" 3600 '{"basic": 1000, "node_operator": -1}'"#;
    assert_eq!(shared.typed(line), "OK");
    wait_until(WITHIN, "the limits to be taken", || (edits(&api, LIMITS, "taken") - 1.0).abs() < 0.1);
    assert_eq!(records(&api, "actor=redis&action=limits_overridden").len(), 1);
    let ttl: i64 = redis.cli(&["TTL", LIMITS]).parse().expect("a number");
    assert!((3_590..=3_600).contains(&ttl), "{ttl}");
    assert_eq!(redis.cli(&["GET", LIMITS]), r#"{"basic":1000,"node_operator":-1}"#);

    // What it looks at.
    let ttls =
        shared.typed(r#"redis-cli --scan --pattern "api_key:*" | head -10 | xargs -I {} redis-cli TTL {}"#);
    let ttls: Vec<i64> = ttls.lines().map(|line| line.parse().expect("a number")).collect();
    assert!(ttls.len() >= 2 && ttls.iter().all(|ttl| *ttl > 0), "{ttls:?}");
    assert_eq!(shared.typed(r#"redis-cli --scan --pattern "api_key:*" | wc -l"#), ttls.len().to_string());
    assert_eq!(shared.typed("redis-cli SCARD revoked_bloom"), "1");
    assert_eq!(shared.typed(r#"redis-cli --scan --pattern "revocation_audit:*" | wc -l"#), "1");
    let audit = shared.typed(r#"redis-cli --scan --pattern "revocation_audit:*" | tail -10"#);
    assert!(audit.starts_with(&format!("revocation_audit:{}:", revoked.id)), "{audit}");
    let ttl: i64 = redis.cli(&["TTL", &audit]).parse().expect("a number");
    assert!((2_591_900..=2_592_000).contains(&ttl), "30 days: {ttl}");
    let told: Value = serde_json::from_str(&redis.cli(&["GET", &audit])).expect("JSON");
    assert_eq!((&told["jti"], &told["reason"]), (&json!(revoked.jti), &json!("compromised")));
    assert_eq!(shared.typed(r#"redis-cli GET "emergency_revocation""#), "");
    let good = shared.lock_down(&["admin"]);
    assert_eq!(shared.typed(r#"redis-cli GET "emergency_revocation""#), good);
    stack.get("/api/chat", &kept.token).expect(401);
    redis.cli(&["DEL", LOCKDOWN]);
    wait_until(WITHIN, "it to be lifted", || stack.get("/api/chat", &kept.token).status == 200);
    assert!(shared.typed("redis-cli DBSIZE").parse::<u64>().is_ok_and(|size| size > 5));
    assert!(shared.typed("redis-cli INFO stats | grep keyspace_hits").contains("keyspace_hits:"));
    assert!(shared.typed("redis-cli --bigkeys").contains("Biggest"));

    // A record is a copy: without it the key counts all the same, and can be ended.
    let record = format!("api_key:v2:{}", kept.id);
    assert_eq!(redis.cli(&["EXISTS", &record]), "1");
    assert_eq!(shared.typed(&format!(r#"redis-cli DEL "api_key:v2:{}""#, kept.id)), "1");
    serves();
    shared.typed(r#"redis-cli --scan --pattern "api_key:v2:*" | xargs redis-cli DEL"#);
    serves();
    let later = api.issue("basic");
    stack.get("/api/chat", &later.token).expect(200);
    api.revoke(&kept.id).expect_everywhere(1);
    stack.get("/api/chat", &kept.token).expect(401);
    wait_until(SOON, "it to be in Redis", || redis.cli(&["SISMEMBER", REVOKED, &kept.jti]) == "1");
    assert_eq!(shared.typed("redis-cli SCARD revoked_bloom"), "2");
}

#[test]
fn a_redis_that_may_drop_keys_is_told_of_until_it_is_set_right() {
    let shared = Shared::start(Redis::new().with_append_only());
    let api = shared.stack.api();
    let durability = || {
        let answer = api.post("/api/auth/register", &json!({ "name": "k", "role": "basic" })).expect(201);
        answer.json()["durability"].clone()
    };
    let problem =
        || Metrics::of(&api).value("keygate_redis_setting_problem{setting=\"maxmemory_policy\"}") > 0.5;
    wait_until(SOON, "all to be well", || ready(&api)["status"] == "ready");
    assert!(!problem());
    assert_eq!(durability(), "replicated");

    shared.typed("redis-cli CONFIG SET maxmemory-policy allkeys-lru");
    assert!(shared.typed("redis-cli BGREWRITEAOF").contains("append only file rewriting started"));
    wait_until(SOON, "it to be noticed", problem);
    let said = ready(&api);
    assert_eq!(said["status"], "degraded");
    let reasons = said["reasons"].to_string();
    assert!(reasons.contains("allkeys-lru") && reasons.contains("noeviction"), "{reasons}");
    assert_eq!(durability(), "local");

    shared.redis.cli(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    wait_until(SOON, "it to be noticed", || !problem() && ready(&api)["status"] == "ready");
    assert_eq!(durability(), "replicated");
}

/// Whatever happens to Redis meanwhile: the lockdown and the revocations are in force, and soon there again.
#[track_caller]
fn wait_restored(shared: &Shared, good: &str, locked: &Key, revoked: &[Key]) {
    let Shared { stack, redis } = shared;
    wait_until(SOON, "Redis to have everything again", || {
        stack.get("/api/chat", &locked.token).expect(401);
        for key in revoked {
            stack.get("/api/chat", &key.token).expect(401);
        }
        let stands = |name: String| redis.cli(&["EXISTS", &name]) == "1";
        redis.cli(&["GET", LOCKDOWN]) == good
            && redis.cli(&["SCARD", REVOKED]) == revoked.len().to_string()
            && stands(FLAGS.to_owned())
            && stands(format!("api_key:v2:{}", locked.id))
            && !redis.cli(&["KEYS", "jwt_secret:*"]).is_empty()
            && revoked.iter().all(|key| {
                stands(format!("revoked:{}", key.jti))
                    && redis.cli(&["SISMEMBER", REVOKED, &key.jti]) == "1"
                    && !redis.cli(&["KEYS", &format!("revocation_audit:{}:*", key.id)]).is_empty()
            })
    });
}

#[test]
fn an_emptied_redis_lifts_nothing_and_is_filled_again() {
    let shared = Shared::start(Redis::new());
    let Shared { stack, redis } = &shared;
    let api = stack.api();
    let (locked, admin) = (api.issue("basic"), api.issue("admin"));
    let revoked: Vec<Key> = (0..3).map(|_| api.issue("contributor")).collect();
    for key in &revoked {
        api.revoke(&key.id).expect_everywhere(1);
    }
    let good = shared.lock_down(&["admin", "contributor"]);
    wait_restored(&shared, &good, &locked, &revoked);
    for _ in 0..3 {
        let begun = Instant::now();
        redis.cli(&["FLUSHALL"]);
        wait_restored(&shared, &good, &locked, &revoked);
        println!("filled again after {:?}", begun.elapsed());
    }
    stack.get("/api/chat", &admin.token).expect(200);
    assert_eq!(records(&api, "actor=redis"), [] as [Value; 0], "nobody edited anything");
    // Edits count as before.
    redis.cli(&["DEL", LOCKDOWN]);
    wait_until(WITHIN, "it to be lifted", || stack.get("/api/chat", &locked.token).status == 200);
}

#[test]
fn a_redis_restored_from_a_backup_is_never_obeyed() {
    let mut shared = Shared::start(Redis::new().with_config(&[("save", "\"\"")]));
    let api = shared.stack.api();
    let locked = api.issue("basic");
    let revoked: Vec<Key> = (0..3).map(|_| api.issue("contributor")).collect();
    let dump = shared.redis.directory().join("dump.rdb");
    let backup = |shared: &Shared, name: &str| {
        shared.redis.cli(&["SAVE"]);
        std::fs::copy(&dump, dump.with_file_name(name)).expect("a backup");
    };
    let restore = |shared: &mut Shared, name: &str| {
        shared.redis.stop();
        std::fs::copy(dump.with_file_name(name), &dump).expect("it is put back");
        shared.redis.run();
    };
    // One backup without a lockdown and revocations, one with another lockdown and a part of them.
    backup(&shared, "before.rdb");
    shared.lock_down(&["admin", "basic"]);
    api.revoke(&revoked[0].id).expect_everywhere(1);
    wait_until(SOON, "it to be in Redis", || shared.redis.cli(&["SCARD", REVOKED]) == "1");
    backup(&shared, "between.rdb");
    for key in &revoked[1..] {
        api.revoke(&key.id).expect_everywhere(1);
    }
    let good = shared.lock_down(&["admin"]);
    wait_restored(&shared, &good, &locked, &revoked);
    for name in ["before.rdb", "between.rdb"] {
        let begun = Instant::now();
        restore(&mut shared, name);
        wait_restored(&shared, &good, &locked, &revoked);
        println!("made good after {:?}", begun.elapsed());
    }
    // A lockdown that was lifted does not come back either.
    shared.redis.cli(&["DEL", LOCKDOWN]);
    wait_until(WITHIN, "it to be lifted", || shared.stack.get("/api/chat", &locked.token).status == 200);
    restore(&mut shared, "between.rdb");
    wait_until(SOON, "the old lockdown to be gone", || {
        shared.stack.get("/api/chat", &locked.token).expect(200);
        shared.redis.cli(&["EXISTS", LOCKDOWN]) == "0"
    });
    wait_until(SOON, "the revocations to be back", || shared.redis.cli(&["SCARD", REVOKED]) == "3");
    assert_eq!(records(&api, "actor=redis").len(), 1, "that was the DEL");
}

#[test]
fn a_lockdown_that_redis_dropped_for_want_of_memory_is_not_lifted() {
    let shared = Shared::start(Redis::new());
    let Shared { stack, redis } = &shared;
    let api = stack.api();
    let (locked, revoked) = (api.issue("basic"), api.issue("basic"));
    api.revoke(&revoked.id).expect_everywhere(1);
    let good = shared.lock_down(&["admin"]);
    redis.cli(&["CONFIG", "SET", "maxmemory-policy", "volatile-ttl"]);
    wait_until(SOON, "it to be noticed", || ready(&api)["status"] == "degraded");
    for _ in 0..3 {
        redis.cli(&["CONFIG", "SET", "maxmemory", "1"]);
        // All that has an end goes, the lockdown among it, and nothing can be written for a while.
        wait_until(SOON, "the lockdown to be dropped", || redis.cli(&["EXISTS", LOCKDOWN]) == "0");
        wait_for_looks(&api);
        stack.get("/api/chat", &locked.token).expect(401);
        redis.cli(&["CONFIG", "SET", "maxmemory", "0"]);
        wait_until(SOON, "the lockdown to be back", || {
            stack.get("/api/chat", &locked.token).expect(401);
            redis.cli(&["GET", LOCKDOWN]) == good
        });
    }
    assert_eq!(records(&api, "actor=redis"), [] as [Value; 0]);
    // Nothing is dropped any more: then it is an edit.
    redis.cli(&["DEL", LOCKDOWN]);
    wait_until(SOON, "it to be lifted", || stack.get("/api/chat", &locked.token).status == 200);
    stack.get("/api/chat", &revoked.token).expect(401);
}

#[test]
fn an_edit_is_taken_once_also_when_redis_takes_no_writes() {
    let shared = Shared::start(Redis::new().with_append_only());
    let Shared { stack, redis } = &shared;
    let api = stack.api();
    let locked = api.issue("basic");
    shared.lock_down(&["admin"]);
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    redis.cli(&["DEL", LOCKDOWN]);
    wait_until(WITHIN, "it to be lifted", || stack.get("/api/chat", &locked.token).status == 200);
    wait_for_looks(&api);
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    wait_for_looks(&api);
    assert_eq!(records(&api, "actor=redis").len(), 1, "it was noted once");
    // And the next one.
    redis.cli(&["SET", LOCKDOWN, "{}"]);
    wait_until(WITHIN, "the lockdown", || stack.get("/api/chat", &locked.token).status == 401);
}

#[track_caller]
fn wait_for_looks(api: &Api) {
    let looks = || Metrics::of(api).value("redis_operation_duration_seconds_count{operation=\"look\"}");
    let before = looks();
    wait_until(SOON, "Keygate to look some times", || looks() > before + 4.0);
}

#[test]
fn a_token_put_among_the_revoked_is_revoked_and_none_is_taken_from_them() {
    let shared = Shared::start(Redis::new().with_append_only());
    let Shared { stack, redis } = &shared;
    let api = stack.api();
    let keys: Vec<Key> = (0..9).map(|_| api.issue("basic")).collect();
    let bystander = api.issue("basic");
    let mut edits_ = Edits::new(stack.envoy.connect_to_all_workers());
    for key in &keys {
        stack.get("/api/chat", &key.token).expect(200);
    }
    for key in &keys {
        edits_.make(redis, &["SADD", REVOKED, &key.jti], &[(key, 401)]);
    }
    edits_.finish("revocations by SADD");
    let done = records(&api, "actor=redis&action=key_revoked");
    let targets: BTreeSet<&str> = done.iter().filter_map(|record| record["target"].as_str()).collect();
    assert_eq!(targets, keys.iter().map(|key| key.id.as_str()).collect());
    assert_eq!(done.len(), keys.len());
    let single = |key: &Key| redis.cli(&["EXISTS", &format!("revoked:{}", key.jti)]) == "1";
    wait_until(SOON, "their single keys", || keys.iter().all(single));
    // One that no key here has, and something that no token can have.
    redis.cli(&["SADD", REVOKED, "of-another-system", "not a token's id"]);
    wait_until(WITHIN, "it to be revoked", || records(&api, "action=jti_revoked").len() == 1);
    assert_eq!(records(&api, "action=jti_revoked")[0]["target"], "of-another-system");

    let first = &keys[0];
    for words in [
        &["SREM", REVOKED, &first.jti][..],
        &["DEL", REVOKED],
        &["SREM", REVOKED, &first.jti, &keys[1].jti, &keys[2].jti],
    ] {
        let begun = Instant::now();
        redis.cli(words);
        wait_until(WITHIN, &format!("all to be there again after {words:?}"), || {
            stack.get("/api/chat", &first.token).expect(401);
            keys.iter().all(|key| redis.cli(&["SISMEMBER", REVOKED, &key.jti]) == "1")
        });
        println!("there again after {words:?} and {:?}", begun.elapsed());
    }
    redis.cli(&["DEL", &format!("revoked:{}", first.jti)]);
    wait_until(Duration::from_secs(45), "the single key to be there again", || {
        stack.get("/api/chat", &first.token).expect(401);
        single(first)
    });
    for key in &keys {
        stack.get("/api/chat", &key.token).expect(401);
    }
    stack.get("/api/chat", &bystander.token).expect(200);
}

/// The secret that signs, as a proxy gets it.
fn hmac_secret(stack: &Stack) -> Vec<u8> {
    let body = json!({
        "format": FORMAT,
        "proxy": { "id": "listener", "incarnation": "1", "filter": "none" },
        "wait_ms": 0,
    });
    let request = Request::post("/sync/v1/poll", &body).bearer(stack.fleet_token());
    let answer = http::call(stack.control_plane.sync_port(), &request).expect(200);
    let NewRules::Whole(rules) = Answer::decode(&answer.body).expect("an answer to a poll").rules else {
        panic!("no rules");
    };
    let rules: keygate_core::decide::rules::Rules = serde_json::from_slice(&rules).expect("rules");
    rules.keys[0].material.expose().to_vec()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn nothing_secret_stands_in_redis() {
    use base64::Engine as _;
    use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as BASE64URL};

    // Uncompressed, so that all of it can be searched.
    let redis = Redis::new().with_config(&[("rdbcompression", "no")]);
    let shared = Shared::start_with(redis, "[secrets]\nalgorithm = \"HS256\"");
    let Shared { stack, redis } = &shared;
    let api = stack.api();
    let keys: Vec<Key> = (0..3).map(|_| api.issue("basic")).collect();
    api.revoke(&keys[0].id).expect_everywhere(1);
    let renewed = api.post(&format!("/api/admin/keys/{}/suspend", keys[1].id), &json!({}));
    renewed.expect(200);
    shared.lock_down(&["admin"]);
    wait_until(SOON, "all of it to be in Redis", || {
        redis.cli(&["EXISTS", &format!("revoked:{}", keys[0].jti)]) == "1"
    });

    let file = redis.directory().join("copy.rdb");
    let path = file.display().to_string();
    typed(redis, &format!("redis-cli --rdb {path}"));
    let copy = std::fs::read(&file).expect("the copy");
    assert!(contains(&copy, keys[0].jti.as_bytes()), "what is no secret is found");
    assert!(contains(&copy, b"jwt_secret:") && contains(&copy, b"keygate:log:"));

    let master =
        std::fs::read_to_string(stack.control_plane.data().join("master.key")).expect("the master key");
    let master = BASE64URL.decode(master.trim()).expect("base64url");
    let secret = hmac_secret(stack);
    assert_eq!((master.len(), secret.len()), (32, 32));
    let mut private = Vec::new();
    for (name, bytes) in [("the master key", master), ("the secret", secret)] {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        private.push((name, BASE64URL.encode(&bytes).into_bytes()));
        private.push((name, STANDARD.encode(&bytes).into_bytes()));
        private.push((name, hex.clone().into_bytes()));
        private.push((name, hex.to_uppercase().into_bytes()));
        private.push((name, bytes));
    }
    for key in keys.iter().map(|key| key.token.clone()).chain([api.key()]) {
        let (claims, signature) = key.rsplit_once('.').expect("a token");
        private.push(("a token's signature", signature.as_bytes().to_vec()));
        private.push(("a token's claims", claims.as_bytes().to_vec()));
    }
    private.push(("the proxies' token", stack.fleet_token().into_bytes()));
    for (name, bytes) in &private {
        assert!(!contains(&copy, bytes), "{name} is in Redis");
    }
}

#[test]
fn a_forged_entry_of_a_log_is_refused_and_the_fleet_goes_on() {
    let mut redis = Redis::new().with_append_only();
    redis.run();
    let stack = Stack::builder().workers(2).redis(&redis.url()).start();
    let directory = stack.directory().join("b");
    let mut other = ControlPlane::beside(&stack.control_plane, &directory);
    other.use_redis(&redis.url());
    other.start();
    let (api, other_api) = (stack.api(), other.api());
    wait_connected(&api);
    wait_connected(&other_api);
    let key = other_api.issue("basic");
    wait_until(SOON, "the other's key to count here", || stack.get("/api/chat", &key.token).status == 200);

    let peers = || ready(&api)["redis"]["peers"].as_array().expect("peers").clone();
    let source = peers()[0]["source"].as_str().expect("a source").to_owned();
    let log = format!("keygate:log:{source}");
    let lines = redis.cli(&["XREVRANGE", &log, "+", "-", "COUNT", "1"]);
    let entry: Vec<&str> = lines.lines().collect();
    let last: u64 = entry[0].trim_end_matches("-0").parse().expect("a number");
    // A valid one in another place, and garbage.
    for (id, text) in [(last + 1, entry[2]), (last + 2, "garbage")] {
        let begun = Instant::now();
        redis.cli(&["XADD", &log, &format!("{id}-0"), entry[1], text]);
        wait_until(SOON, "it to be refused", || {
            peers().iter().any(|peer| {
                peer["source"] == source.as_str()
                    && peer["error"].as_str().is_some_and(|why| why.contains("does not open"))
            })
        });
        println!("refused after {:?}", begun.elapsed());
        let said = ready(&api);
        assert_eq!(said["status"], "degraded");
        assert!(said["reasons"].to_string().contains(&source), "{said}");
    }
    assert!(Metrics::of(&api).value("keygate_redis_errors_total{kind=\"peer\"}") >= 1.0);
    let log_text = std::fs::read_to_string(stack.control_plane.log()).expect("its log");
    assert!(log_text.contains("changes of another control plane are not taken in"), "{log_text}");

    // Nothing of it was taken in; what both decide from now on is.
    assert!(peers().iter().any(|peer| peer["source"] == source.as_str() && peer["merged"] == last));
    let answer =
        other_api.post(&format!("/api/admin/keys/{}/revoke", key.id), &json!({ "reason": "compromised" }));
    answer.expect(200);
    wait_until(SOON, "the other's revocation", || stack.get("/api/chat", &key.token).status == 401);
    // What comes by the log alone, also with the numbers that were taken there.
    let suspended = other_api.issue("basic");
    other_api.post(&format!("/api/admin/keys/{}/suspend", suspended.id), &json!({})).expect(200);
    wait_until(SOON, "the other's suspension", || stack.get("/api/chat", &suspended.token).status == 401);
    let mine = api.issue("basic");
    let validate = Request::get("/api/auth/validate").bearer(&mine.token);
    wait_until(SOON, "the other to know a key", || other_api.call(&validate).status == 200);

    // Cleaned up, all is well.
    redis.cli(&["XDEL", &log, &format!("{}-0", last + 1), &format!("{}-0", last + 2)]);
    wait_until(SOON, "all to be well", || {
        [&api, &other_api].iter().all(|api| ready(api)["status"] == "ready")
    });
}

#[test]
fn what_another_control_plane_revokes_is_not_taken_for_an_edit() {
    let redis = Redis::start();
    let middleman = Middleman::before(redis.port());
    let url = format!("redis://127.0.0.1:{}", middleman.port());
    let stack = Stack::builder().without_envoy().redis(&url).start();
    let directory = stack.directory().join("b");
    let mut other = ControlPlane::beside(&stack.control_plane, &directory);
    other.use_redis(&redis.url());
    other.start();
    let (api, other) = (stack.api(), other.api());
    wait_connected(&api);
    wait_connected(&other);
    let keys: Vec<Key> = (0..12).map(|_| api.issue("basic")).collect();
    // Between a revocation in Redis and its change in the log there is an answer of Redis.
    middleman.delay(Duration::from_millis(100));
    for key in &keys {
        api.post(&format!("/api/admin/keys/{}/revoke", key.id), &json!({ "reason": "compromised" }))
            .expect(200);
        let validate = Request::get("/api/auth/validate").bearer(&key.token);
        wait_until(SOON, "the other to know of it", || other.call(&validate).status == 401);
    }
    assert_eq!(records(&other, "actor=redis"), [] as [Value; 0], "nobody edited anything");
    assert_eq!(records(&other, "action=key_revoked").len(), keys.len());
}

#[test]
fn a_key_is_revoked_by_its_id() {
    let shared = Shared::start(Redis::new());
    let (stack, api) = (&shared.stack, shared.stack.api());
    let keys: Vec<Key> = (0..3).map(|_| api.issue("basic")).collect();
    let chat = |key: &Key| stack.get("/api/chat", &key.token).status;
    assert_eq!(chat(&keys[0]), 200);
    for (key, reason, wanted) in
        [(&keys[0], "compromised", "compromised"), (&keys[1], "\"INC-7, leaked\"", "admin_action")]
    {
        let begun = Instant::now();
        assert_eq!(shared.typed(&format!("redis-cli SET revoke:{} {reason}", key.id)), "OK");
        wait_until(SOON, "the key to be refused", || chat(key) == 401);
        println!("revoked after {} ms", begun.elapsed().as_millis());
        let shown = api.get(&format!("/api/admin/keys/{}", key.id)).expect(200).json();
        assert_eq!(shown["revoked"]["reason"], wanted, "{shown}");
        assert_eq!(shown["revoked"]["by"], "redis", "{shown}");
        wait_until(SOON, "the order to be taken away", || {
            shared.typed(&format!("redis-cli EXISTS revoke:{}", key.id)) == "0"
        });
    }
    assert_eq!(chat(&keys[2]), 200);

    // What is no order is refused for all to see, and does not stay.
    shared.typed("redis-cli SET revoke:key_nowhere compromised");
    shared.typed(&format!("redis-cli SADD revoke:{} compromised", keys[2].id));
    wait_until(SOON, "both to be refused", || {
        shared.typed("redis-cli --scan --pattern revoke:* | wc -l") == "0"
    });
    let refused = api.get("/api/admin/audit?action=edit_refused").expect(200).json();
    assert_eq!(refused["records"].as_array().map(Vec::len), Some(2), "{refused}");
    assert_eq!(chat(&keys[2]), 200);
    let metrics = Metrics::of(&api);
    for (outcome, wanted) in [("taken", 2.0), ("refused", 2.0)] {
        let series = format!("keygate_redis_edits_total{{key=\"revoke:<key id>\",outcome=\"{outcome}\"}}");
        assert!((metrics.value(&series) - wanted).abs() < 0.5, "{series}");
    }
}

#[test]
fn a_copy_that_was_deleted_is_back_and_the_deletion_is_refused() {
    let shared = Shared::start(Redis::new());
    let (stack, api) = (&shared.stack, shared.stack.api());
    let keys: Vec<Key> = (0..3).map(|_| api.issue("basic")).collect();
    let copies = || {
        shared.typed("redis-cli --scan --pattern 'api_key:v2:*' | wc -l").parse::<usize>().expect("a number")
    };
    wait_until(SOON, "the copies", || copies() >= 4);
    let all = copies();
    assert_eq!(shared.typed(&format!("redis-cli DEL api_key:v2:{}", keys[0].id)), "1");
    wait_until(SOON, "the copy to be back", || copies() == all);
    assert_eq!(stack.get("/api/chat", &keys[0].token).status, 200, "it revokes nothing");
    wait_until(SOON, "the deletion in the audit log", || {
        let refused = api.get("/api/admin/audit?action=edit_refused").expect(200).json();
        let refused = refused["records"].as_array().cloned().unwrap_or_default();
        refused.len() == 1 && refused[0]["target"] == json!(format!("api_key:v2:{}", keys[0].id))
    });
    // As the playbook's rollback does.
    shared.typed("redis-cli --scan --pattern 'api_key:v2:*' | xargs redis-cli DEL");
    wait_until(SOON, "all copies to be back", || copies() == all);
}
