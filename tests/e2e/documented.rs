//! The documents' own commands, as they stand there.

use std::fs;
use std::process::Command;

use keygate_e2e::{Redis, Request, SOON, Stack, binaries, wait_until};
use serde_json::json;

/// The commands of the `sh` blocks of a document between two of its lines.
#[track_caller]
fn commands(document: &str, from: &str, to: &str) -> Vec<String> {
    let text = fs::read_to_string(binaries::root().join(document)).expect("the document");
    let part = text.split(from).nth(1).unwrap_or_else(|| panic!("{document} has no {from:?}"));
    let part = part.split(to).next().expect("a part");
    let blocks = part.split("```sh\n").skip(1).filter_map(|block| block.split("\n```").next());
    let found: Vec<String> = blocks.flat_map(str::lines).map(str::to_owned).collect();
    assert!(!found.is_empty(), "{document}: no commands after {from:?}");
    found
}

/// Types a command of a document for a stack, with other places: (as it stands there, here). What it prints.
#[track_caller]
fn typed(stack: &Stack, command: &str, places: &[(&str, &str)]) -> String {
    let replaced = places.iter().fold(command.to_owned(), |text, (there, here)| text.replace(there, here));
    let path = format!(
        "{}:{}",
        binaries::keygate().parent().expect("a directory").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let mut shell = Command::new("bash");
    shell.args(["-euo", "pipefail", "-c", &replaced]).env("PATH", path);
    shell.env("KEYGATE_DATA_DIR", stack.control_plane.data());
    shell.env("KEYGATE_URL", format!("http://127.0.0.1:{}", stack.control_plane.api_port()));
    shell.env("KEYGATE_ADMIN_KEY", stack.control_plane.admin_key());
    let output = shell.output().expect("bash runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    println!("$ {command}\n{said}");
    assert!(output.status.success(), "{command}: {said}");
    said
}

/// A fleet, and a place for its backups.
fn with_backups(stack: &Stack) -> String {
    let place = stack.directory().join("backups");
    fs::create_dir(&place).expect("a directory");
    format!("{}/", place.display())
}

#[test]
fn a_backup_and_its_restore_as_operations_has_them() {
    let mut stack = Stack::builder().workers(1).start();
    let backups = with_backups(&stack);
    let places = [("/backups/", backups.as_str())];
    let (good, dead) = (stack.api().issue("basic"), stack.api().issue("basic"));
    for command in commands("docs/operations.md", "\n## Backups\n", "\n## Upgrading\n") {
        typed(&stack, &command, &places);
    }
    let made = fs::read_dir(&backups).expect("a place").next().expect("a backup").expect("an entry").path();
    fs::rename(made, format!("{backups}keygate-2026-01-31.kgb")).expect("the name that the document has");
    stack.api().revoke(&dead.id);
    stack.control_plane.kill();
    stack.control_plane.lose_data();
    for command in commands("docs/operations.md", "**The only data directory.**", "It works in any order") {
        typed(&stack, &command, &places);
    }
    stack.control_plane.start();
    wait_until(SOON, "the proxy to follow", || {
        let fleet = stack.api().get("/api/admin/fleet");
        fleet.status == 200 && fleet.json()["current"] == 1
    });
    stack.get("/api/chat", &good.token).expect(200);
    stack.get("/api/chat", &dead.token).expect(401);
}

#[test]
fn the_way_back_of_one_whom_nobody_lets_in_as_operations_has_it() {
    let mut stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let lock = json!({ "ttl": "24h", "exempt_roles": [], "lock_out_admins": true });
    api.post("/api/admin/emergency/lockdown", &lock).expect(200);
    api.get("/api/admin/fleet").expect(401);
    stack.control_plane.stop();
    let found = commands("docs/operations.md", "**No admin key is accepted any more.**", "A rule that would");
    let offline = found.iter().find(|command| command.contains("--offline")).expect("the command");
    typed(&stack, offline, &[]);
    stack.control_plane.start();
    api.get("/api/admin/fleet").expect(200);
    // The other one runs a control plane, which the harness does with the same argument.
    assert!(found.iter().any(|command| command.starts_with("keygate serve --new-admin-key ")), "{found:?}");
}

#[test]
fn a_redis_is_filled_from_a_journal_as_operations_has_it() {
    let redis = Redis::start();
    let mut stack = Stack::builder().without_envoy().redis(&redis.url()).start();
    let key = stack.api().issue("basic");
    let copy = format!("api_key:v2:{}", key.id);
    wait_until(SOON, "its copy", || redis.cli(&["EXISTS", &copy]).trim() == "1");
    stack.control_plane.stop();
    redis.cli(&["FLUSHALL"]);
    let data = stack.control_plane.data().display().to_string();
    let places = [(".keygate/data", data.as_str()), ("redis://localhost:6379", &redis.url())];
    for command in
        commands("docs/operations.md", "To fill one without a control plane:", "**The data directory of one")
    {
        typed(&stack, &command, &places);
    }
    assert_eq!(redis.cli(&["EXISTS", &copy]).trim(), "1");
}

#[test]
fn redis_levers_as_the_handbook_types_them() {
    let redis = Redis::start();
    let stack = Stack::builder().workers(1).redis(&redis.url()).start();
    let api = stack.api();
    let keys: Vec<_> = (0..3).map(|_| api.issue("basic")).collect();
    let copies = || redis.cli(&["--scan", "--pattern", "api_key:v2:*"]).lines().count();
    wait_until(SOON, "copies", || copies() >= 4);
    // The rollback's second step, word for word.
    let before = copies();
    let host = redis.url();
    let pipe =
        format!("redis-cli -u {host} --scan --pattern \"api_key:v2:*\" | xargs redis-cli -u {host} DEL");
    typed(&stack, &pipe, &[]);
    wait_until(SOON, "the copies to be back", || copies() >= before);
    for key in &keys {
        stack.get("/api/chat", &key.token).expect(200);
    }
    // A backup of Redis is no loss of it.
    let file = stack.directory().join("dump.rdb").display().to_string();
    typed(&stack, &format!("redis-cli -u {host} --rdb {file}"), &[]);
    let lever = format!("redis-cli -u {host} SET revoke:{} compromised", keys[0].id);
    typed(&stack, &lever, &[]);
    wait_until(SOON, "the key to be refused", || stack.get("/api/chat", &keys[0].token).status == 401);
    let log = fs::read_to_string(stack.control_plane.log()).expect("the log");
    assert!(!log.contains("no Redis"), "{log}");
    let ready = api.call(&Request::get("/readyz")).expect(200).json();
    assert_eq!(ready["redis"], "connected", "{ready}");
}
