//! Who did what can be looked up, and nobody can change that unnoticed.

use std::process::Command;

use keygate_e2e::{Request, Stack, binaries};
use serde_json::{Value, json};

fn records(stack: &Stack, query: &str) -> Vec<Value> {
    let answer = stack.api().get(&format!("/api/admin/audit?{query}")).expect(200).json();
    answer["records"].as_array().unwrap_or_else(|| panic!("no records in {answer}")).clone()
}

#[test]
fn every_change_is_there_with_who_and_why() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let key = api.issue_with(&json!({
        "name": "noted", "role": "basic", "owner": "somebody-in-person", "metadata": { "mail": "a@b.example" }
    }));
    api.call(&Request::get("/api/admin/audit").bearer(&key.token)).expect(403);
    let path = format!("/api/admin/keys/{}/revoke", key.id);
    api.post(&path, &json!({ "reason": "suspicious_activity" })).expect(200);
    api.post("/api/admin/emergency/lockdown", &json!({ "ttl": "1s" })).expect(200);

    let all = records(&stack, "limit=1000");
    let actions: Vec<&str> = all.iter().filter_map(|record| record["action"].as_str()).collect();
    assert_eq!(actions[..3], ["lockdown_changed", "key_revoked", "key_issued"]);
    assert_eq!(actions.last(), Some(&"genesis"));
    let revoked = &all[1];
    assert_eq!(
        (&revoked["target"], &revoked["reason"], &revoked["outcome"]),
        (&json!(key.id), &json!("suspicious_activity"), &json!("done"))
    );
    assert!(revoked["actor"].as_str().is_some_and(|actor| actor.starts_with("key_")), "{revoked}");
    assert_eq!(revoked["prev"], all[2]["hash"]);
    let text = json!(all).to_string();
    for private in ["somebody-in-person", "a@b.example", key.token.as_str(), "sealed"] {
        assert!(!text.contains(private), "{private} is shown");
    }

    assert_eq!(records(&stack, &format!("target={}", key.id)).len(), 2);
    assert_eq!(records(&stack, "action=key_revoked&reason=suspicious_activity").len(), 1);
    assert_eq!(records(&stack, "actor=nobody").len(), 0);
    let at = revoked["at"].as_str().expect("a time");
    assert!(records(&stack, &format!("since={at}")).len() >= 2);
    assert!(records(&stack, &format!("until={at}")).iter().all(|record| record["at"].as_str() < Some(at)));
    let page = api.get("/api/admin/audit?limit=2").expect(200).json();
    let next = page["next_cursor"].as_u64().expect("more");
    assert_eq!(records(&stack, &format!("limit=1&cursor={next}"))[0]["action"], "key_issued");
    for bad in ["limit=0", "since=yesterday", "cursor=-1", "colour=red"] {
        api.get(&format!("/api/admin/audit?{bad}")).expect_problem(400, "bad_request");
    }
}

/// `keygate audit verify`; whether it says that all is well, and what it prints.
fn verify(stack: &Stack, arguments: &[&str]) -> (bool, String) {
    let data = stack.control_plane.data();
    let output = Command::new(binaries::keygate())
        .args(["audit", "verify"])
        .arg(&data)
        .args(arguments)
        .output()
        .expect("keygate runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn a_changed_record_is_named_by_the_server_the_command_and_the_next_start() {
    let mut stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    for _ in 0..5 {
        let key = api.issue("basic");
        api.post(&format!("/api/admin/keys/{}/revoke", key.id), &json!({ "reason": "compromised" }))
            .expect(200);
    }
    let answer = api.get("/api/admin/audit/verify").expect(200).json();
    assert_eq!((&answer["valid"], &answer["journal"]["records"]), (&json!(true), &json!(15)), "{answer}");
    let (well, said) = verify(&stack, &[]);
    assert!(well && said.contains("15 in 1 segments"), "{said}");

    stack.control_plane.stop();
    let (well, said) = verify(&stack, &["--json"]);
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}"));
    assert!(well);
    assert_eq!(report["signed_until"], 15, "it is signed at the end: {report}");
    let key = report["signed_by"][0].as_str().expect("a key").to_owned();
    assert!(verify(&stack, &["--key", &key]).0);
    assert!(!verify(&stack, &["--key", "AAAA"]).0);

    // One revocation less, in a running server's journal.
    stack.control_plane.start();
    let segment = stack.control_plane.data().join("journal/00000000000000000001.jsonl");
    let text = std::fs::read_to_string(&segment).expect("the segment");
    let line = 1 + text.lines().position(|line| line.contains("\"key_revoked\"")).expect("a revocation");
    let bent = text.replacen("\"action\":\"key_revoked\"", "\"action\":\"key_resumed\"", 1);
    std::fs::write(&segment, bent).expect("it is written");
    let answer = stack.api().get("/api/admin/audit/verify").expect(200).json();
    assert_eq!((&answer["valid"], &answer["damage"]["line"]), (&json!(false), &json!(line)), "{answer}");
    let (well, said) = verify(&stack, &[]);
    assert!(!well && said.contains(&format!("00000000000000000001.jsonl, line {line}")), "{said}");
    stack.control_plane.kill();
    stack.control_plane.launch();
    let status = stack.control_plane.wait_end();
    assert!(!status.success());
    let log = stack.control_plane.log_tail();
    assert!(log.contains(&format!("00000000000000000001.jsonl, line {line}")), "{log}");
}
