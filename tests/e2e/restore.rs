//! The bad day: the data directory is lost, a backup is restored, in whatever order a tired person types it. Proxies serve
//! again within ten seconds, and nothing that a proxy or Redis knows as ended is accepted.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use keygate_e2e::{Api, Key, Redis, Request, SOON, Stack, binaries, wait_until};
use serde_json::json;

/// `keygate backup …`; the exit code, and what it printed.
fn backup(arguments: &[&str], data: &Path) -> (i32, String) {
    let mut command = Command::new(binaries::keygate());
    let output = command.arg("backup").args(arguments).env("KEYGATE_DATA_DIR", data).output();
    let output = output.expect("keygate runs");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.code().expect("a code"), String::from_utf8_lossy(&printed).into_owned())
}

#[track_caller]
fn backup_done(arguments: &[&str], data: &Path) -> String {
    let (code, printed) = backup(arguments, data);
    assert_eq!(code, 0, "{arguments:?}: {printed}");
    printed
}

/// When the restore is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    BeforeTheStart,
    AfterAStart,
}

/// The fate of Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shared {
    None,
    Kept,
    Emptied,
    /// It is as it was when the backup was made.
    Older,
}

struct Day {
    stack: Stack,
    redis: Option<Redis>,
    file: PathBuf,
    /// The admin key before the loss.
    admin: String,
    good: Key,
    /// Ended after the backup, or before.
    ended: Vec<Key>,
}

impl Day {
    /// A fleet with a backup, and changes after it that end keys.
    fn begin(shared: Shared, rotates: bool) -> Self {
        let redis = (shared != Shared::None).then(Redis::start);
        let builder = Stack::builder().workers(2);
        let stack = match &redis {
            Some(redis) => builder.redis(&redis.url()).start(),
            None => builder.start(),
        };
        let api = stack.api();
        let good = api.issue("basic");
        let mut ended: Vec<Key> = (0..3).map(|_| api.issue("basic")).collect();
        ended.push(api.issue("contributor"));
        api.revoke(&ended[0].id);
        let file = stack.directory().join("today.kgb");
        backup_done(&["create", file.to_str().expect("a name")], &stack.control_plane.data());
        if let Some(redis) = redis.as_ref().filter(|_| shared == Shared::Older) {
            assert_eq!(redis.cli(&["SAVE"]).trim(), "OK");
            let dump = redis.directory().join("dump.rdb");
            fs::copy(&dump, dump.with_file_name("older.rdb")).expect("a copy");
        }
        api.revoke(&ended[1].id);
        let suspend = format!("/api/admin/keys/{}/suspend", ended[2].id);
        api.change(&suspend, &json!({})).expect_everywhere(1);
        let cut = json!({ "scope": { "role": "contributor" } });
        api.change("/api/admin/emergency/revoke", &cut).expect_everywhere(1);
        // A key that the backup does not know.
        let later = api.issue("basic");
        api.revoke(&later.id);
        ended.push(later);
        if rotates {
            let rotate = json!({ "reason": "leaked", "immediate": true });
            api.post("/api/admin/secrets/rotate", &rotate).expect(202);
            wait_until(SOON, "the old secret to end", || stack.get("/api/chat", &good.token).status == 401);
        }
        let admin = stack.control_plane.admin_key();
        Self { stack, redis, file, admin, good, ended }
    }

    /// The data directory is lost, and what `shared` says of Redis.
    fn break_down(&mut self, shared: Shared) {
        self.stack.control_plane.kill();
        self.stack.control_plane.lose_data();
        let Some(redis) = &mut self.redis else { return };
        match shared {
            Shared::None | Shared::Kept => {}
            Shared::Emptied => drop(redis.cli(&["FLUSHALL"])),
            Shared::Older => {
                redis.kill();
                let dump = redis.directory().join("dump.rdb");
                fs::copy(dump.with_file_name("older.rdb"), dump).expect("a copy");
                redis.run();
            }
        }
    }

    fn restore(&self) -> String {
        let file = self.file.to_str().expect("a name");
        backup_done(&["restore", file], &self.stack.control_plane.data())
    }

    /// Waits until the proxy goes by what is here, and checks that nothing that was ended counts, anywhere.
    fn check(&self, rotates: bool) {
        let Self { stack, admin, good, ended, .. } = self;
        let begun = Instant::now();
        let within = Duration::from_secs(10);
        assert_ne!(stack.control_plane.admin_key(), *admin, "a new admin key");
        // It is another one once proxies or Redis said that the secret had ended which signed it.
        wait_until(within, "a usable admin key, and the proxy to follow", || {
            let api = stack.api();
            api.get("/api/admin/fleet").status == 200 && is_followed(&api)
        });
        let api = stack.api();
        let new = wait_issued(&api, within);
        wait_until(within, "a new key to pass", || stack.get("/api/chat", &new.token).status == 200);
        println!("whole after {} ms", begun.elapsed().as_millis());
        let expected = if rotates { 401 } else { 200 };
        assert_eq!(stack.get("/api/chat", &good.token).status, expected, "the good key");
        for (number, key) in ended.iter().enumerate() {
            assert_eq!(stack.get("/api/chat", &key.token).status, 401, "ended key {number} at the proxy");
            let validate = Request::get("/api/auth/validate").bearer(&key.token);
            assert_eq!(api.call(&validate).status, 401, "ended key {number} at the control plane");
        }
    }
}

/// Whether the one proxy enforces what the control plane has.
fn is_followed(api: &Api) -> bool {
    let fleet = api.fleet();
    fleet.len() == 1 && fleet[0]["current"] == json!(true) && fleet[0]["ahead"] == json!(false)
}

/// A key, once keys can be issued.
fn wait_issued(api: &Api, within: Duration) -> Key {
    let mut issued = None;
    wait_until(within, "a key to be issued", || {
        let answer = api.post("/api/auth/register", &json!({ "name": "new", "role": "basic" }));
        issued = (answer.status == 201).then(|| Key::from_answer(&answer.json()));
        issued.is_some()
    });
    issued.expect("it was issued")
}

/// One bad day, whole.
fn live_through(order: Order, shared: Shared, rotates: bool) {
    println!("{order:?}, Redis {shared:?}, {}", if rotates { "rotated" } else { "not rotated" });
    let mut day = Day::begin(shared, rotates);
    day.break_down(shared);
    if order == Order::AfterAStart {
        day.stack.control_plane.start();
        // The proxy goes by the empty control plane now.
        wait_until(SOON, "the proxy", || is_followed(&day.stack.control_plane.api()));
        day.stack.control_plane.stop();
    }
    let printed = day.restore();
    assert!(printed.contains("admin.key"), "{printed}");
    day.stack.control_plane.start();
    day.check(rotates);
}

#[test]
fn without_redis_before_the_start() {
    live_through(Order::BeforeTheStart, Shared::None, false);
    live_through(Order::BeforeTheStart, Shared::None, true);
}

#[test]
fn without_redis_after_a_start() {
    live_through(Order::AfterAStart, Shared::None, false);
    live_through(Order::AfterAStart, Shared::None, true);
}

#[test]
fn with_redis_before_the_start() {
    live_through(Order::BeforeTheStart, Shared::Kept, false);
    live_through(Order::BeforeTheStart, Shared::Kept, true);
}

#[test]
fn with_redis_after_a_start() {
    live_through(Order::AfterAStart, Shared::Kept, false);
    live_through(Order::AfterAStart, Shared::Kept, true);
}

#[test]
fn with_an_emptied_redis_before_the_start() {
    live_through(Order::BeforeTheStart, Shared::Emptied, false);
    live_through(Order::BeforeTheStart, Shared::Emptied, true);
}

#[test]
fn with_an_emptied_redis_after_a_start() {
    live_through(Order::AfterAStart, Shared::Emptied, false);
    live_through(Order::AfterAStart, Shared::Emptied, true);
}

#[test]
fn with_an_older_redis_before_the_start() {
    live_through(Order::BeforeTheStart, Shared::Older, false);
    live_through(Order::BeforeTheStart, Shared::Older, true);
}

#[test]
fn with_an_older_redis_after_a_start() {
    live_through(Order::AfterAStart, Shared::Older, false);
    live_through(Order::AfterAStart, Shared::Older, true);
}

#[test]
fn typed_again_it_says_what_would_be_lost_and_loses_it_only_when_told() {
    let mut day = Day::begin(Shared::None, false);
    let data = day.stack.control_plane.data();
    let file = day.file.to_str().expect("a name").to_owned();
    let restore = |more: &[&str]| backup(&[&["restore", file.as_str()][..], more].concat(), &data);

    // While it runs.
    let (code, printed) = restore(&[]);
    assert_eq!(code, 1, "{printed}");
    assert!(printed.contains("another keygate process"), "{printed}");
    day.stack.control_plane.stop();

    // There is more than in the backup.
    let (code, printed) = restore(&[]);
    assert_eq!(code, 5, "{printed}");
    for said in ["key_issued", "key_revoked", "key_suspended", "cutoff_added", "--accept-loss"] {
        assert!(printed.contains(said), "{said}: {printed}");
    }
    let (code, printed) = restore(&["--dry-run"]);
    assert_eq!(code, 0, "{printed}");
    assert!(printed.contains("key_issued") && printed.contains("Nothing was changed"), "{printed}");
    day.stack.control_plane.start();
    assert_eq!(day.stack.api().get("/api/admin/fleet").status, 200, "nothing was changed");
    day.stack.control_plane.stop();

    // Accepted, and once more before the start.
    let (code, printed) = restore(&["--accept-loss", "--yes"]);
    assert_eq!(code, 0, "{printed}");
    let (code, printed) = restore(&[]);
    assert_eq!(code, 0, "{printed}");
    assert!(printed.contains("already"), "{printed}");
    day.stack.control_plane.start();
    day.check(false);

    // And after it: the start itself is no loss, the keys since then are.
    let api = day.stack.api();
    api.issue("basic");
    day.stack.control_plane.stop();
    assert_eq!(restore(&[]).0, 5);
    assert_eq!(restore(&["--accept-loss"]).0, 0);
    day.stack.control_plane.start();
    day.check(false);
}

#[test]
fn an_older_copy_of_the_data_directory_gives_way_to_a_newer_backup() {
    let mut stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let data = stack.control_plane.data();
    let good = api.issue("basic");
    let late = api.issue("basic");
    let file = stack.directory().join("b.kgb");
    let older = stack.directory().join("older.kgb");
    let (file, older) = (file.to_str().expect("a name"), older.to_str().expect("a name"));
    backup_done(&["create", older], &data);
    api.revoke(&late.id);
    backup_done(&["create", file], &data);
    let verified = backup_done(&["verify", file], &data);
    assert!(verified.contains("whole and unchanged"), "{verified}");
    stack.control_plane.stop();
    stack.control_plane.lose_data();
    // Twice: the older one first, by mistake.
    backup_done(&["restore", older], &data);
    let printed = backup_done(&["restore", file], &data);
    assert!(printed.contains("nothing of it is lost"), "{printed}");
    stack.control_plane.start();
    wait_until(SOON, "the proxy", || is_followed(&stack.api()));
    assert_eq!(stack.get("/api/chat", &good.token).status, 200);
    assert_eq!(stack.get("/api/chat", &late.token).status, 401);
    assert_ne!(stack.control_plane.admin_key(), api.key(), "a new admin key");
}

#[test]
fn a_backup_that_is_cut_or_changed_is_no_backup() {
    let stack = Stack::builder().without_envoy().start();
    let data = stack.control_plane.data();
    let path = stack.directory().join("b.kgb");
    let file = path.to_str().expect("a name");
    backup_done(&["create", file], &data);
    let whole = fs::read(&path).expect("the backup");
    let mut bent = whole.clone();
    let middle = bent.len() / 2;
    bent[middle] ^= 1;
    for bad in [&whole[..whole.len() - 9], &whole[..40], b"nonsense", b"", &bent] {
        fs::write(&path, bad).expect("a file");
        let (code, printed) = backup(&["verify", file], &data);
        assert!(code == 1 && printed.contains("b.kgb"), "{code}: {printed}");
    }
    assert_eq!(backup(&["verify", "/no/such/file"], &data).0, 1);
    assert_eq!(backup(&["verify"], &data).0, 2, "usage");
}

#[test]
fn a_large_set_of_revocations_is_returned_in_parts() {
    let mut stack = Stack::builder().workers(2).start();
    let (api, data) = (stack.api(), stack.control_plane.data());
    let (good, late) = (api.issue("basic"), api.issue("basic"));
    let file = stack.directory().join("b.kgb");
    let file = file.to_str().expect("a name");
    backup_done(&["create", file], &data);
    // More than one shard holds.
    let revoked = 20_000;
    for batch in 0..20 {
        let jtis: Vec<String> = (0..revoked / 20).map(|n| format!("jti-{batch}-{n}")).collect();
        api.post("/api/admin/revocations", &json!({ "jtis": jtis, "reason": "compromised" })).expect(200);
    }
    api.revoke(&late.id);
    stack.control_plane.kill();
    stack.control_plane.lose_data();
    backup_done(&["restore", file], &data);
    stack.control_plane.start();
    wait_until(SOON, "a new admin key", || stack.api().get("/api/admin/fleet").status == 200);
    let api = stack.api();
    wait_until(SOON, "the proxy to follow", || is_followed(&api));
    let stats = api.get("/api/admin/revocations/stats").expect(200).json();
    assert_eq!(stats["total_revoked"], json!(revoked + 1), "{stats}");
    assert_eq!(stack.get("/api/chat", &good.token).status, 200);
    assert_eq!(stack.get("/api/chat", &late.token).status, 401);
}

#[test]
fn a_proxy_that_had_given_up_serves_again() {
    let mut stack = Stack::builder().workers(2).config("[fleet]\nmax_staleness = \"3s\"").start();
    let (api, data) = (stack.api(), stack.control_plane.data());
    let (good, late) = (api.issue("basic"), api.issue("basic"));
    let file = stack.directory().join("b.kgb");
    let file = file.to_str().expect("a name");
    backup_done(&["create", file], &data);
    api.revoke(&late.id);
    stack.control_plane.kill();
    stack.control_plane.lose_data();
    wait_until(SOON, "the proxy to give up", || stack.get("/api/chat", &good.token).status == 503);
    backup_done(&["restore", file], &data);
    stack.control_plane.start();
    let begun = Instant::now();
    wait_until(Duration::from_secs(10), "the proxy to serve", || {
        stack.get("/api/chat", &good.token).status == 200
    });
    println!("serves after {} ms", begun.elapsed().as_millis());
    assert_eq!(stack.get("/api/chat", &late.token).status, 401);
}
