//! The operator's commands, as they are typed.

use std::process::Command;

use keygate_e2e::{Request, Stack, binaries};
use serde_json::Value;

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
fn an_emergency_from_the_command_line() {
    let stack = Stack::builder().workers(1).start();
    let keys: Vec<_> = (0..3).map(|_| stack.api().issue("basic")).collect();
    let chat = |key: usize| stack.call(&Request::get("/api/chat").bearer(&keys[key].token)).status;

    let revoke = ["emergency", "revoke"];
    let (status, text) = keygate(&stack, &revoke);
    assert_eq!(status, Some(1));
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
    assert_eq!(keygate(&stack, &["emergency", "lift", "../keys"]).0, Some(1));
}
