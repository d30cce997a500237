//! What was lost comes back: from the journal, from a backup, from Redis; and nothing that was revoked does.

use std::fs;
use std::path::Path;
use std::process::Command;

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::{Api, Key, Redis, Request, SOON, Stack, binaries, wait_until};
use serde_json::json;

/// A `keygate` command; whether it succeeded, and what it printed.
fn keygate(arguments: &[&str], data: Option<&Path>, redis: Option<&str>) -> (bool, String) {
    let mut command = Command::new(binaries::keygate());
    command.args(arguments);
    if let Some(data) = data {
        command.arg("--data-dir").arg(data);
    }
    if let Some(redis) = redis {
        command.env("KEYGATE_REDIS_URL", redis);
    }
    let output = command.output().expect("keygate runs");
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&printed).into_owned())
}

#[track_caller]
fn done(arguments: &[&str], data: Option<&Path>, redis: Option<&str>) -> String {
    let (done, printed) = keygate(arguments, data, redis);
    assert!(done, "{arguments:?}: {printed}");
    printed
}

fn status(api: &Api, key: &Key) -> u16 {
    api.call(&Request::get("/api/auth/validate").bearer(&key.token)).status
}

#[track_caller]
fn revoke(api: &Api, key: &Key) {
    api.post(&format!("/api/admin/keys/{}/revoke", key.id), &json!({ "reason": "compromised" })).expect(200);
}

/// Everything in the data directory but what every restore needs: the keys of the fleet.
fn lose(control_plane: &ControlPlane) {
    let data = control_plane.data();
    fs::remove_dir_all(data.join("journal")).expect("the journal");
    fs::remove_file(data.join("store.redb")).expect("the store");
}

#[test]
fn what_a_damaged_journal_says_of_ended_keys_outlives_its_replacement() {
    let mut stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let owned = json!({ "name": "a", "role": "basic", "owner": "team-7" });
    let keys: Vec<Key> = (0..3).map(|_| api.issue("basic")).chain([api.issue_with(&owned)]).collect();
    let data = stack.control_plane.data();
    let backup = stack.directory().join("b.kgb");
    let file = backup.to_str().expect("a name");
    done(&["backup", "create", file], Some(&data), None);
    revoke(&api, &keys[0]);
    revoke(&api, &keys[1]);
    api.post("/api/admin/emergency/revoke", &json!({ "scope": { "owner": "team-7" } })).expect(200);
    stack.control_plane.stop();

    let journal = fs::read_dir(data.join("journal")).expect("the journal");
    let segment = journal
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .expect("a segment");
    let text = fs::read_to_string(&segment).expect("the segment");
    fs::write(&segment, text.replacen("\"name\":\"e2e\"", "\"name\":\"E2E\"", 1)).expect("damage");
    stack.control_plane.launch();
    assert!(!stack.control_plane.wait_end().success(), "it does not start on a damaged journal");

    let printed = done(&["backup", "restore", file], Some(&data), None);
    assert!(printed.contains("taken over   3 changes"), "{printed}");
    stack.control_plane.start();
    let standing: Vec<u16> = keys.iter().map(|key| status(&api, key)).collect();
    assert_eq!(standing, [401, 401, 200, 401]);
    // Not again at the next start.
    stack.control_plane.stop();
    stack.control_plane.start();
    let lines = api.get("/api/admin/audit?action=history_forked").expect(200).json();
    assert_eq!(lines["records"].as_array().map(Vec::len), Some(1), "{lines}");
}

#[test]
fn what_is_no_backup_is_refused_and_nothing_is_touched() {
    let mut stack = Stack::builder().without_envoy().start();
    let (api, data) = (stack.api(), stack.control_plane.data());
    let key = api.issue("basic");
    let backup = stack.directory().join("b.kgb");
    let file = backup.to_str().expect("a name");
    done(&["backup", "create", file], Some(&data), None);
    stack.control_plane.stop();
    let whole = fs::read(&backup).expect("the backup");
    lose(&stack.control_plane);
    let mut bent = whole.clone();
    let middle = bent.len() / 2;
    bent[middle] ^= 1;
    for bad in [&whole[..whole.len() - 9], &whole[..40], b"nonsense", &bent] {
        fs::write(&backup, bad).expect("a file");
        let (done, printed) = keygate(&["backup", "restore", file], Some(&data), None);
        assert!(!done && printed.contains("b.kgb"), "{printed}");
    }
    fs::write(&backup, whole).expect("a file");
    done(&["backup", "restore", file], Some(&data), None);
    stack.control_plane.start();
    assert_eq!(status(&api, &key), 200);
}

#[test]
fn a_redis_is_filled_from_a_journal_and_a_new_control_plane_from_that_redis() {
    let mut stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let keys: Vec<Key> = (0..20).map(|_| api.issue("basic")).collect();
    keys[..10].iter().for_each(|key| revoke(&api, key));
    api.post("/api/admin/emergency/lockdown", &json!({ "ttl": "1h", "exempt_roles": ["admin", "basic"] }))
        .expect(200);
    stack.control_plane.stop();

    let redis = Redis::start();
    let from = stack.control_plane.data();
    let from = from.to_str().expect("a name");
    let fill = || done(&["recover", "--from-journal", from], None, Some(&redis.url()));
    assert!(fill().contains("10 revocations"));
    assert_eq!(redis.cli(&["SCARD", "revoked_bloom"]).trim(), "10");
    for (position, key) in keys.iter().enumerate() {
        let there = redis.cli(&["EXISTS", &format!("revoked:{}", key.jti)]);
        assert_eq!(there.trim(), if position < 10 { "1" } else { "0" });
        assert_eq!(redis.cli(&["EXISTS", &format!("api_key:v2:{}", key.id)]).trim(), "1");
    }
    assert!(fill().contains("0 changes were missing"), "again is harmless");

    // Only the keys of the fleet are left of the first one.
    let elsewhere = tempfile::tempdir().expect("a directory");
    let mut second = ControlPlane::beside(&stack.control_plane, elsewhere.path());
    second.use_redis(&redis.url());
    second.start();
    let api = second.api();
    wait_until(SOON, "the keys", || keys[10..].iter().all(|key| status(&api, key) == 200));
    assert!(keys[..10].iter().all(|key| status(&api, key) == 401), "no key before its revocation");
    let locked = api.get("/api/admin/emergency").expect(200).json();
    assert!(locked["lockdown"].is_object(), "{locked}");
    assert!(redis.cli(&["GET", "emergency_revocation"]).contains("basic"));
}
