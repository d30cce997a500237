//! The operator's commands, as they are typed.

use std::process::{Command, Stdio};

use keygate_e2e::{Request, SOON, Stack, binaries, wait_until};
use serde_json::{Value, json};

/// `keygate ARGUMENTS…` with the bootstrap admin's key: its status, and what it prints.
fn keygate(stack: &Stack, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(binaries::keygate())
        .args(arguments)
        .env("KEYGATE_URL", format!("http://127.0.0.1:{}", stack.control_plane.api_port()))
        .env("KEYGATE_ADMIN_KEY", stack.control_plane.admin_key())
        .output()
        .expect("keygate runs");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    println!("$ keygate {}\n{text}", arguments.join(" "));
    (output.status.code(), text)
}

#[track_caller]
fn said(stack: &Stack, arguments: &[&str], wanted: &[&str]) -> String {
    let (status, text) = keygate(stack, arguments);
    assert_eq!(status, Some(0), "{text}");
    for wanted in wanted {
        assert!(text.contains(wanted), "no {wanted:?} in {text}");
    }
    text
}

#[test]
fn a_rollout_from_the_command_line() {
    let stack = Stack::builder().workers(1).config("[rollout]\nv1_cluster = \"upstream_v1\"\n").start();
    let key = stack.api().issue("basic");
    let upstream = || {
        let answer = stack.call(&Request::get("/api/chat").bearer(&key.token)).expect(200).json();
        answer["upstream"].as_str().expect("an upstream").to_owned()
    };
    let rollout =
        |arguments: &[&str], wanted: &[&str]| said(&stack, &[&["rollout"], arguments].concat(), wanted);

    rollout(&["status"], &["strategy      full  (V1 is retired)", "100 % of all users", "guard         on"]);
    rollout(&["off", "--reason", "INC-7", "--wait"], &["strategy      off", "INC-7", "enforced by 1 of 1"]);
    assert_eq!(upstream(), "v1");
    let canary = ["set", "--strategy", "canary", "--canary-user", "acme", "--canary-user", &key.id, "--wait"];
    rollout(&canary, &["strategy      canary", "0 % of all users", &format!("acme {}", key.id)]);
    assert_eq!(upstream(), "v2");
    rollout(&["set", "--canary-user", "", "--wait"], &["strategy      canary"]);
    assert_eq!(upstream(), "v1");
    let share = ["set", "--strategy", "percentage", "--percentage", "12.5", "--guard", "off"];
    rollout(&share, &["12.5 % of all users", "guard         off"]);
    rollout(
        &["set", "--strategy", "gradual", "--weekly"],
        &["strategy      gradual", "next          25 % at 20"],
    );
    let paused = rollout(&["pause"], &["strategy      gradual, paused", "5 % of all users"]);
    assert!(!paused.contains("next"), "{paused}");
    rollout(&["resume"], &["next          25 % at"]);
    rollout(&["set", "--ramp-hours", "0.001", "--endpoint", "chat_read"], &["endpoints     chat_read"]);
    wait_until(SOON, "the ramp to end", || upstream() == "v2");

    let shown = rollout(&["status", "--json"], &[]);
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!((&shown["strategy"], &shown["guard"]), (&json!("gradual"), &json!(false)), "{shown}");
    let history = rollout(&["history"], &["INC-7", "12.5 %"]);
    assert_eq!(history.lines().count(), 1 + 8, "{history}");
    wait_until(SOON, "requests to be counted", || {
        let counts: Value = serde_json::from_str(&rollout(&["metrics", "--json"], &[])).expect("JSON");
        counts["v1_requests"].as_u64() >= Some(2) && counts["v2_requests"].as_u64() >= Some(2)
    });
    rollout(&["metrics"], &["VERSION", "v1 chat_read: passed ", "v2 chat_read: passed "]);

    for (arguments, says) in [
        (&["set"][..], "say what to change"),
        (&["set", "--percentage", "101"], "percentage: must be a number from 0 to 100"),
        (&["set", "--endpoint", "nowhere", "--percentage", "0.001"], "percentage"),
        (&["set", "--strategy", "on"], "invalid value 'on'"),
        (&["set", "--weekly", "--ramp-hours", "1"], "cannot be used with"),
    ] {
        let (status, text) = keygate(&stack, &[&["rollout"], arguments].concat());
        assert!(status != Some(0) && text.contains(says), "{arguments:?}: {text}");
    }
}

#[test]
fn an_emergency_from_the_command_line() {
    let stack = Stack::builder().workers(1).start();
    let keys: Vec<_> = (0..3).map(|_| stack.api().issue("basic")).collect();
    let chat = |key: usize| stack.call(&Request::get("/api/chat").bearer(&keys[key].token)).status;

    let revoke = ["emergency", "revoke"];
    let (status, text) = keygate(&stack, &revoke);
    assert_eq!(status, Some(2));
    assert!(text.contains("--all"), "it says what is missing: {text}");
    said(
        &stack,
        &[&revoke[..], &["--role", "basic", "--dry-run"]].concat(),
        &["3 keys: basic 3", "nothing was changed"],
    );
    assert_eq!(chat(0), 200);
    let text = said(
        &stack,
        &[&revoke[..], &["--role", "basic", "--wait"]].concat(),
        &["3 keys", "enforced by 1 of 1 proxies"],
    );
    assert_eq!((chat(0), chat(1)), (401, 401));
    let id = text.split_whitespace().find(|word| word.starts_with("cutoff_")).expect("an id").to_owned();
    said(&stack, &["emergency", "show"], &[&id]);
    said(&stack, &["emergency", "lift", &id, "--wait"], &["lifted", "enforced by 1 of 1"]);
    assert_eq!(chat(0), 200);

    said(&stack, &["emergency", "lockdown", "--ttl", "5m", "--wait"], &["locked down"]);
    assert_eq!(chat(0), 401);
    said(&stack, &["emergency", "unlock", "--wait"], &["unlocked"]);
    assert_eq!(chat(0), 200);

    said(&stack, &["keys", "revoke", "--reason", "compromised", "--wait", &keys[2].id], &["is revoked"]);
    said(&stack, &["revocations", "list"], &[&keys[2].id, "compromised"]);
    let listed = said(&stack, &["revocations", "list", "--json", "--reason", "compromised"], &[]);
    let revocation: Value = serde_json::from_str(listed.trim()).expect("JSON, one line each");
    assert_eq!(revocation["jti"], keys[2].jti.as_str());
    said(&stack, &["revocations", "stats"], &["\"total_revoked\": 1"]);
    said(&stack, &["revocations", "cleanup"], &["0 forgotten, 1 left"]);
    said(&stack, &["revocations", "rebuild", "--wait"], &["rebuilt", "enforced by 1 of 1"]);
    assert_eq!((chat(0), chat(2)), (200, 401));
    said(&stack, &["fleet"], &["current"]);
    assert_eq!(keygate(&stack, &["emergency", "lift", "../keys"]).0, Some(2));
}

#[test]
fn an_exit_code_says_what_became_of_it() {
    let mut stack =
        Stack::builder().workers(1).config("[emergency]\nsecond_approval_threshold = 0.25\n").start();
    let api = stack.api();
    let (first, second) = (api.issue("basic"), api.issue("basic"));
    let reader = api.issue("contributor");
    let code = |stack: &Stack, arguments: &[&str]| keygate(stack, arguments).0;

    assert_eq!(code(&stack, &["keys", "revoke", "--wait", &first.id]), Some(0));
    assert_eq!(code(&stack, &["keys", "revoke", "key_nowhere"]), Some(1));
    assert_eq!(code(&stack, &["keys", "revoke", "--reason", "boredom", &second.id]), Some(2));
    assert_eq!(code(&stack, &["keys", "revoke"]), Some(2));
    assert_eq!(code(&stack, &["--url", "localhost", "fleet"]), Some(2), "no URL");
    assert_eq!(code(&stack, &["emergency", "revoke", "--role", "basic", "--wait"]), Some(4));
    let as_reader = Command::new(binaries::keygate())
        .args(["keys", "revoke", &second.id, "--url"])
        .arg(format!("http://127.0.0.1:{}", stack.control_plane.api_port()))
        .env("KEYGATE_ADMIN_KEY", &reader.token)
        .output()
        .expect("keygate runs");
    assert_eq!(as_reader.status.code(), Some(7));

    // A proxy that is gone without a word is waited for until its hard age has passed.
    stack.envoy.kill();
    assert_eq!(code(&stack, &["keys", "suspend", "--wait", "--timeout", "100ms", &second.id]), Some(3));

    let alone = Stack::builder().without_envoy().start();
    let key = alone.api().issue("basic");
    let (status, text) = keygate(&alone, &["keys", "revoke", "--wait", &key.id]);
    assert_eq!(status, Some(6));
    assert!(text.contains("no proxy is connected"), "{text}");
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    let stack = Stack::builder().without_envoy().start();
    (0..5).for_each(|_| drop(stack.api().issue("basic")));
    let mut listing = Command::new(binaries::keygate())
        .args(["keys", "list"])
        .env("KEYGATE_URL", format!("http://127.0.0.1:{}", stack.control_plane.api_port()))
        .env("KEYGATE_ADMIN_KEY", stack.control_plane.admin_key())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("keygate runs");
    drop(listing.stdout.take());
    let output = listing.wait_with_output().expect("it ends");
    // 128 + SIGPIPE, or all was written before.
    assert!([Some(0), Some(141)].contains(&output.status.code()), "{output:?}");
    assert_eq!(output.stderr, b"", "no backtrace");
}
