//! The drill: the ten worst days, one after the other, each with a fleet of its own. Prints for each what was lost, how long
//! a good key was refused and how long it took until all was whole, and fails where that is beyond what is promised.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::wait::{pass, try_wait_for};
use keygate_e2e::{Api, Key, Redis, Request, SOON, Stack, binaries, wait_until};
use serde_json::json;

/// The hard age of the drill's proxies: short, so that a day in which it passes is short.
const HARD_AGE: Duration = Duration::from_secs(12);
/// Longer than any day takes to end.
const WITHIN: Duration = Duration::from_secs(40);

/// A day, and what is promised of it.
struct Day {
    name: &'static str,
    /// The longest time for which a good key may be refused.
    refused: Duration,
    /// The longest time until all is whole.
    whole: Duration,
    live: fn() -> Outcome,
}

/// What came of a day.
struct Outcome {
    /// Changes that were answered and are not in force, and good keys that do not count any more.
    lost: Vec<String>,
    refused: Duration,
    whole: Duration,
    note: String,
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const DAYS: [Day; 10] = [
    Day { name: "backup restored", refused: seconds(10), whole: seconds(10), live: restore },
    Day { name: "host rebooted", refused: seconds(15), whole: seconds(15), live: reboot },
    Day { name: "Redis wiped", refused: seconds(1), whole: seconds(10), live: redis_wiped },
    Day { name: "Redis older", refused: seconds(1), whole: seconds(10), live: redis_older },
    Day { name: "secret leaked, a peer dead", refused: seconds(30), whole: seconds(30), live: secret_leaked },
    Day {
        name: "all keys revoked under load",
        refused: seconds(5),
        whole: seconds(5),
        live: mass_revocation,
    },
    Day { name: "disk full", refused: seconds(1), whole: seconds(15), live: disk_full },
    Day { name: "clock a day ahead", refused: seconds(1), whole: seconds(15), live: clock_ahead },
    Day { name: "control plane lost for good", refused: seconds(1), whole: seconds(15), live: lost_for_good },
    Day { name: "a proxy cut off", refused: seconds(1), whole: seconds(10), live: cut_off },
];

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let days: Vec<&Day> = DAYS
        .iter()
        .filter(|day| wanted.is_empty() || wanted.iter().any(|name| day.name.contains(name)))
        .collect();
    if days.is_empty() {
        eprintln!("error: no day has that in its name; there are:");
        DAYS.iter().for_each(|day| eprintln!("  {}", day.name));
        return ExitCode::from(2);
    }
    println!("{:<28} {:>6} {:>14} {:>14}  NOTE", "DAY", "LOST", "REFUSED", "WHOLE AFTER");
    let begun = Instant::now();
    let mut failures = Vec::new();
    for day in days {
        let outcome = (day.live)();
        println!(
            "{:<28} {:>6} {:>14} {:>14}  {}",
            day.name,
            outcome.lost.len(),
            format!("{} ms", outcome.refused.as_millis()),
            format!("{} ms", outcome.whole.as_millis()),
            outcome.note
        );
        failures.extend(outcome.lost.iter().map(|lost| format!("{}: {lost}", day.name)));
        for (what, took, bound) in
            [("refused", outcome.refused, day.refused), ("whole", outcome.whole, day.whole)]
        {
            if took > bound {
                failures.push(format!("{}: {what} after {took:?}, {bound:?} are promised", day.name));
            }
        }
    }
    println!("{} s in all", begun.elapsed().as_secs());
    for failure in &failures {
        eprintln!("error: {failure}");
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Asks a proxy with a good key all the time; the longest time for which it was refused.
struct Probe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Probe {
    fn start(port: u16, key: &Key) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopping, request) = (Arc::clone(&stop), Request::get("/api/chat").bearer(&key.token));
        let thread = std::thread::spawn(move || {
            let (mut longest, mut since) = (Duration::ZERO, None);
            while !stopping.load(Ordering::Relaxed) {
                let passes =
                    keygate_e2e::http::try_call(port, &request).is_ok_and(|answer| answer.status == 200);
                if passes {
                    since = None;
                } else {
                    let refused: Duration = since.get_or_insert_with(Instant::now).elapsed();
                    longest = longest.max(refused);
                }
                pass(Duration::from_millis(5));
            }
            longest
        });
        Self { stop, thread }
    }

    fn end(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the probe ends")
    }
}

/// A fleet with good keys and ended ones.
struct Fleet {
    stack: Stack,
    redis: Option<Redis>,
    good: Key,
    ended: Vec<Key>,
    /// The admin, where the first admin key has ended.
    admin: Option<Api>,
}

impl Fleet {
    fn start(redis: Option<Redis>) -> Self {
        let config = format!("[fleet]\nmax_staleness = \"{}s\"\n", HARD_AGE.as_secs());
        let builder = Stack::builder().workers(2).config(&config);
        let stack = match &redis {
            Some(redis) => builder.redis(&redis.url()).start(),
            None => builder.start(),
        };
        let mut fleet =
            Self { good: stack.api().issue("basic"), stack, redis, ended: Vec::new(), admin: None };
        fleet.end_some();
        fleet
    }

    /// Revokes one key and suspends another.
    fn end_some(&mut self) {
        let api = self.stack.api();
        let (revoked, suspended) = (api.issue("basic"), api.issue("basic"));
        api.revoke(&revoked.id);
        api.change(&format!("/api/admin/keys/{}/suspend", suspended.id), &json!({})).expect_everywhere(1);
        self.ended.extend([revoked, suspended]);
    }

    fn api(&self) -> Api {
        self.admin.clone().unwrap_or_else(|| self.stack.api())
    }

    fn probe(&self) -> Probe {
        Probe::start(self.stack.envoy.port(), &self.good)
    }

    /// Waits until proxies enforce what the control plane has, and a new key passes.
    fn wait_whole(&self, since: Instant) -> Duration {
        let request = Request::post("/api/auth/register", &json!({ "name": "new", "role": "basic" }));
        let is_whole = || {
            let api = self.api();
            let followed =
                api.try_send(Request::get("/api/admin/fleet")).ok().filter(|answer| answer.status == 200)?;
            let fleet = followed.json();
            let current = fleet["total"].as_u64() > Some(0) && fleet["current"] == fleet["total"];
            let issued =
                api.try_send(request.clone()).ok().filter(|answer| current && answer.status == 201)?;
            let token = Key::from_answer(&issued.json()).token;
            (self.stack.get("/api/chat", &token).status == 200).then_some(())
        };
        try_wait_for(WITHIN, is_whole).map_or(WITHIN * 2, |()| since.elapsed())
    }

    /// What was answered and is not so.
    fn lost(&self) -> Vec<String> {
        let mut lost = Vec::new();
        let api = self.api();
        for key in &self.ended {
            if self.stack.get("/api/chat", &key.token).status != 401 {
                lost.push("an ended key passes at the proxy".to_owned());
            }
            if api.call(&Request::get("/api/auth/validate").bearer(&key.token)).status != 401 {
                lost.push("an ended key counts at the control plane".to_owned());
            }
        }
        if self.stack.get("/api/chat", &self.good.token).status != 200 {
            lost.push("the good key is refused".to_owned());
        }
        lost
    }

    fn outcome(&self, probe: Probe, since: Instant, note: impl Into<String>) -> Outcome {
        let whole = self.wait_whole(since);
        let refused = probe.end();
        Outcome { lost: self.lost(), refused, whole, note: note.into() }
    }
}

/// `keygate ARGUMENTS…` for a data directory.
fn keygate(arguments: &[&str], data: &Path) {
    let output = Command::new(binaries::keygate()).args(arguments).arg("--data-dir").arg(data).output();
    let output = output.expect("keygate runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn restore() -> Outcome {
    let mut fleet = Fleet::start(None);
    let file: PathBuf = fleet.stack.directory().join("backup.kgb");
    let (data, name) = (fleet.stack.control_plane.data(), file.to_str().expect("a name").to_owned());
    keygate(&["backup", "create", &name], &data);
    fleet.end_some(); // After the backup.
    let probe = fleet.probe();
    fleet.stack.control_plane.kill();
    fleet.stack.control_plane.lose_data();
    let since = Instant::now();
    keygate(&["backup", "restore", "--yes", &name], &data);
    fleet.stack.control_plane.start();
    fleet.outcome(probe, since, "two keys were ended after the backup")
}

fn reboot() -> Outcome {
    let mut fleet = Fleet::start(None);
    let probe = fleet.probe();
    let since = Instant::now();
    fleet.stack.control_plane.kill();
    fleet.stack.envoy.kill();
    fleet.stack.control_plane.start();
    fleet.stack.start_envoy();
    fleet.stack.envoy.wait_ready();
    fleet.outcome(probe, since, "control plane and Envoy killed, started again")
}

fn redis_wiped() -> Outcome {
    let fleet = Fleet::start(Some(Redis::start()));
    let redis = fleet.redis.as_ref().expect("a Redis");
    let copies = || redis.cli(&["DBSIZE"]).trim().parse::<u64>().unwrap_or(0);
    wait_until(SOON, "copies", || copies() > 5);
    let (before, probe, since) = (copies(), fleet.probe(), Instant::now());
    redis.cli(&["FLUSHALL"]);
    wait_until(WITHIN, "the copies", || copies() >= before);
    let copied = since.elapsed();
    fleet.outcome(probe, since, format!("its copies are back after {} ms", copied.as_millis()))
}

fn redis_older() -> Outcome {
    let mut fleet = Fleet::start(Some(Redis::start()));
    let redis = fleet.redis.as_ref().expect("a Redis");
    assert_eq!(redis.cli(&["SAVE"]).trim(), "OK");
    let dump = redis.directory().join("dump.rdb");
    fs::copy(&dump, dump.with_file_name("older.rdb")).expect("a copy");
    fleet.end_some();
    let probe = fleet.probe();
    let since = Instant::now();
    let redis = fleet.redis.as_mut().expect("a Redis");
    redis.kill();
    fs::copy(dump.with_file_name("older.rdb"), dump).expect("a copy");
    redis.run();
    let redis = fleet.redis.as_ref().expect("a Redis");
    wait_until(WITHIN, "the newer revocation", || redis.cli(&["SCARD", "revoked_bloom"]).trim() == "2");
    let copied = since.elapsed();
    let note = format!("its dump lacked two ended keys; it has them again after {} ms", copied.as_millis());
    fleet.outcome(probe, since, note)
}

fn secret_leaked() -> Outcome {
    let mut fleet = Fleet::start(Some(Redis::start()));
    let url = fleet.redis.as_ref().expect("a Redis").url();
    let directory = fleet.stack.directory().join("peer");
    fs::create_dir(&directory).expect("a directory");
    let mut peer = ControlPlane::beside(&fleet.stack.control_plane, &directory);
    peer.use_redis(&url);
    peer.start();
    peer.kill();
    let old = fleet.good.clone();
    let since = Instant::now();
    let rotate = json!({ "reason": "leaked", "immediate": true });
    let answer = fleet.stack.api().post("/api/admin/secrets/rotate", &rotate).expect(202).json();
    wait_until(SOON, "the old keys to be refused", || fleet.stack.get("/api/chat", &old.token).status == 401);
    let ended = since.elapsed();
    let api = fleet.stack.api().with_key(answer["api_key"].as_str().expect("a key"));
    fleet.good = issued(&api);
    wait_until(SOON, "the new key to pass", || fleet.stack.get("/api/chat", &fleet.good.token).status == 200);
    let refused = since.elapsed();
    fleet.admin = Some(api);
    let probe = fleet.probe();
    let note =
        format!("its keys are refused after {} ms; REFUSED is until a new key passes", ended.as_millis());
    Outcome { refused, ..fleet.outcome(probe, since, note) }
}

/// A key, as soon as one can be issued.
fn issued(api: &Api) -> Key {
    let request = Request::post("/api/auth/register", &json!({ "name": "new", "role": "basic" }));
    let issued =
        try_wait_for(WITHIN, || api.try_send(request.clone()).ok().filter(|answer| answer.status == 201));
    Key::from_answer(&issued.expect("a key is issued").json())
}

fn mass_revocation() -> Outcome {
    let mut fleet = Fleet::start(None);
    let api = fleet.stack.api();
    let keys: Vec<Key> = (0..200).map(|_| api.issue("basic")).collect();
    let load: Vec<Probe> =
        keys.iter().take(8).map(|key| Probe::start(fleet.stack.envoy.port(), key)).collect();
    let since = Instant::now();
    api.change("/api/admin/emergency/revoke", &json!({ "scope": { "role": "basic" } })).expect_everywhere(1);
    let ended = since.elapsed();
    fleet.ended.extend(keys);
    fleet.good = issued(&api);
    wait_until(SOON, "the new key to pass", || fleet.stack.get("/api/chat", &fleet.good.token).status == 200);
    let refused = since.elapsed();
    for probe in load {
        probe.end();
    }
    let probe = fleet.probe();
    let note = format!("enforced after {} ms; REFUSED is until a new key passes", ended.as_millis());
    Outcome { refused, ..fleet.outcome(probe, since, note) }
}

fn disk_full() -> Outcome {
    let mut stack = Stack::builder().workers(2).without_control_plane().without_envoy().start();
    let data = stack.control_plane.data();
    fs::create_dir_all(&data).expect("a directory");
    let mount = |options: &str| {
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&data).status();
        mounted.is_ok_and(|status| status.success())
    };
    if !mount("size=20m,mode=0700") {
        let none = Duration::ZERO;
        return Outcome {
            lost: Vec::new(),
            refused: none,
            whole: none,
            note: "not run: nothing can be mounted".into(),
        };
    }
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let mut fleet =
        Fleet { good: stack.api().issue("basic"), stack, redis: None, ended: Vec::new(), admin: None };
    let probe = fleet.probe();
    let api = fleet.stack.api();
    let body = json!({ "name": "x", "role": "basic", "metadata": { "padding": "x".repeat(4_000) } });
    let victim = api.issue("basic");
    while api.post("/api/auth/register", &body).status == 201 {}
    api.revoke(&victim.id).expect_everywhere(1);
    fleet.ended.push(victim);
    let since = Instant::now();
    let grown = Command::new("mount").args(["-o", "remount,size=64m"]).arg(&data).status();
    assert!(grown.is_ok_and(|status| status.success()), "it grows");
    let outcome = fleet.outcome(probe, since, "a key was revoked while it was full");
    drop(fleet);
    let _unmounted = Command::new("umount").arg("--lazy").arg(&data).status();
    outcome
}

fn clock_ahead() -> Outcome {
    let mut fleet = Fleet::start(None);
    let probe = fleet.probe();
    fleet.stack.control_plane.stop();
    fleet.stack.control_plane.use_clock("+1d");
    fleet.stack.control_plane.start();
    wait_until(SOON, "the proxy", || {
        let fleet = fleet.stack.api().get("/api/admin/fleet").json();
        fleet["current"] == json!(1)
    });
    fleet.end_some();
    fleet.stack.control_plane.stop();
    let since = Instant::now();
    fleet.stack.control_plane.use_clock("+0");
    fleet.stack.control_plane.start();
    fleet.outcome(probe, since, "the control plane's, and put right again")
}

fn lost_for_good() -> Outcome {
    let mut fleet = Fleet::start(Some(Redis::start()));
    let probe = fleet.probe();
    fleet.stack.control_plane.kill();
    fleet.stack.control_plane.lose_data();
    let since = Instant::now();
    // Another machine: with the master key, the fleet token and the Redis.
    fleet.stack.control_plane.start();
    fleet.outcome(probe, since, "another one begins with the master key and Redis")
}

fn cut_off() -> Outcome {
    let mut fleet = Fleet::start(None);
    let (second, mut line) = fleet.stack.another_envoy_on_a_line("envoy-2", 2);
    let api = fleet.stack.api();
    wait_until(SOON, "two proxies", || api.fleet().len() == 2);
    let probe = fleet.probe();
    let victim = api.issue("basic");
    line.cut();
    let begun = Instant::now();
    let revoked = api.change(&format!("/api/admin/keys/{}/revoke", victim.id), &json!({}));
    wait_until(HARD_AGE + SOON, "the one that is cut off to stop serving", || {
        second.call(&Request::get("/api/chat").bearer(&fleet.good.token)).status == 503
    });
    let stopped = begun.elapsed();
    fleet.ended.push(victim);
    line.heal();
    let since = Instant::now();
    wait_until(WITHIN, "it to serve again", || {
        second.call(&Request::get("/api/chat").bearer(&fleet.good.token)).status == 200
    });
    let note = format!(
        "applied by {} of {}; cut off it answered 503 after {} s",
        revoked.applied,
        revoked.total,
        stopped.as_secs()
    );
    fleet.outcome(probe, since, note)
}
