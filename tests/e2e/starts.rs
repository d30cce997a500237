//! A start destroys nothing: what is missing, changed or empty is named, and left as it is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use keygate_e2e::{Request, Stack};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Rewrites a journal's segment without the records that `drop` names, as a writer of the file could.
fn chain_anew(segment: &Path, drop: impl Fn(&Value) -> bool) {
    let text = std::fs::read_to_string(segment).expect("the segment");
    let (mut lines, mut prev, mut seq) = (String::new(), "0".repeat(64), 0);
    for line in text.lines() {
        let record: Value = serde_json::from_str(line).expect("a record");
        if drop(&record) {
            continue;
        }
        seq += 1;
        let body = line.split(",\"hash\":\"").next().expect("a hash");
        let (start, rest) = body.split_once(",\"at\":").expect("a time");
        assert!(start.starts_with("{\"seq\":"));
        let (rest, _) = rest.rsplit_once(",\"prev\":\"").expect("the one before");
        let body = format!("{{\"seq\":{seq},\"at\":{rest},\"prev\":\"{prev}\"");
        prev = Sha256::digest(body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        lines.push_str(&format!("{body},\"hash\":\"{prev}\"}}\n"));
    }
    std::fs::write(segment, lines).expect("written");
}

#[test]
fn a_journal_that_is_chained_anew_is_found_also_without_its_checkpoints() {
    let mut stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let key = api.issue("basic");
    api.post(&format!("/api/admin/keys/{}/revoke", key.id), &json!({ "reason": "compromised" })).expect(200);
    stack.control_plane.stop();
    let data = stack.control_plane.data();
    let segment = data.join("journal/00000000000000000001.jsonl");
    let is_revocation = |record: &Value| record["action"] == "key_revoked";
    let verified = || {
        let mut command = std::process::Command::new(keygate_e2e::binaries::keygate());
        let output = command.args(["audit", "verify"]).arg(&data).output().expect("keygate runs");
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let (well, said) = verified();
    assert!(well && !said.contains("Compare the key"), "the keyring names the key: {said}");
    chain_anew(&segment, is_revocation);
    for file in ["store.redb", "journal/checkpoints"] {
        std::fs::remove_file(data.join(file)).expect("there is one");
        let (well, said) = verified();
        assert!(!well && said.contains("checkpoints"), "{file}: {said}");
        stack.control_plane.launch();
        assert!(!stack.control_plane.wait_end().success(), "{file}");
        let log = stack.control_plane.log_tail();
        assert!(log.contains("checkpoints"), "{file}: {log}");
    }
}

#[test]
fn a_journal_that_is_missing_at_one_start_is_taken_up_at_the_next() {
    let mut stack = Stack::builder().without_envoy().start();
    let key = stack.api().issue("basic");
    stack.control_plane.stop();
    let data = stack.control_plane.data();
    let files = || {
        let entries = std::fs::read_dir(&data).expect("the data directory").filter_map(Result::ok);
        let files = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
        let read = |path: PathBuf| std::fs::read(path).unwrap_or_default();
        files.map(|entry| (entry.file_name(), read(entry.path()))).collect::<BTreeMap<_, _>>()
    };
    let (journal, away) = (data.join("journal"), data.join("away"));
    let secrets = |files: &BTreeMap<std::ffi::OsString, Vec<u8>>| {
        let names = ["keyring.json", "master.key", "fleet.token", "admin.key"];
        names.map(|name| files.get(std::ffi::OsStr::new(name)).cloned())
    };
    let before = files();
    std::fs::rename(&journal, &away).expect("moved");
    for is_mounted in [false, true] {
        if is_mounted {
            std::fs::create_dir(&journal).expect("an empty directory");
        }
        for store in [true, false] {
            if !store {
                let _none = std::fs::remove_file(data.join("store.redb"));
            }
            stack.control_plane.launch();
            assert!(!stack.control_plane.wait_end().success());
            let log = stack.control_plane.log_tail();
            assert!(log.contains("keyring.json") && log.contains("not mounted"), "{log}");
            assert_eq!(secrets(&files()), secrets(&before), "nothing was changed");
            let is_new = |name: &&std::ffi::OsString| !before.contains_key(*name);
            assert_eq!(files().keys().filter(is_new).count(), 0, "nothing was made: {:?}", files().keys());
        }
        if is_mounted {
            std::fs::remove_dir_all(&journal).expect("gone");
        }
    }
    std::fs::rename(&away, &journal).expect("moved back");
    stack.control_plane.start();
    stack.api().call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(200);
}

#[test]
fn a_store_that_is_empty_or_garbled_is_made_anew() {
    let mut stack = Stack::builder().without_envoy().start();
    let key = stack.api().issue("basic");
    stack.control_plane.stop();
    let store = stack.control_plane.data().join("store.redb");
    let whole = std::fs::read(&store).expect("the store");
    let mut bent = whole.clone();
    bent.iter_mut().step_by(7).for_each(|byte| *byte ^= 0x5a);
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("text", b"not a store at all".to_vec()),
        ("cut", whole[..whole.len() / 3].to_vec()),
        ("bent", bent),
        ("zeros", vec![0; 8_192]),
    ] {
        println!("{what}");
        std::fs::write(&store, bytes).expect("written");
        stack.control_plane.start();
        let shown = stack.api().get(&format!("/api/admin/keys/{}", key.id)).expect(200).json();
        assert_eq!(shown["state"], "active", "{what}");
        stack.control_plane.stop();
    }
}

#[test]
fn what_a_start_finds_wrong_it_says_in_a_line_and_changes_nothing() {
    let mut stack = Stack::builder().without_envoy().start();
    stack.control_plane.stop();
    let token = stack.control_plane.fleet_token_file();
    let kept = std::fs::read(&token).expect("the fleet token");
    std::fs::write(&token, "").expect("emptied");
    stack.control_plane.launch();
    assert!(!stack.control_plane.wait_end().success());
    let log = stack.control_plane.log_tail();
    assert!(log.contains("fleet_token_file") && log.contains("empty"), "{log}");
    assert_eq!(std::fs::read(&token).expect("it is there"), b"");
    std::fs::write(&token, kept).expect("put back");
    for when in ["1966-01-01 00:00:00", "@9999-12-31 23:00:00"] {
        stack.control_plane.use_clock(when);
        stack.control_plane.launch();
        assert!(!stack.control_plane.wait_end().success(), "{when}");
        let log = stack.control_plane.log_tail();
        assert!(log.contains("clock is before the year 2001 or after 2999"), "{when}: {log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}
