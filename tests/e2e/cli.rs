//! The operator's commands, as they are typed.

use std::path::Path;
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

/// A server that answers each request with this, and keeps what it was sent.
fn listener(answer: &'static str) -> (u16, std::sync::Arc<std::sync::Mutex<String>>) {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let heard = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let hears = std::sync::Arc::clone(&heard);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().filter_map(Result::ok) {
            let mut bytes = [0; 16 * 1024];
            let read = stream.read(&mut bytes).unwrap_or(0);
            hears.lock().expect("no panic").push_str(&String::from_utf8_lossy(&bytes[..read]));
            let _gone = stream.write_all(answer.as_bytes());
        }
    });
    (port, heard)
}

/// `keygate fleet` in a directory, with this key and these variables: its status, and what it prints on either.
fn fleet_in(directory: &Path, key: &str, variables: &[(&str, String)], url: Option<&str>) -> (i32, String) {
    let mut command = Command::new(binaries::keygate());
    command.current_dir(directory).arg("fleet").env_remove("KEYGATE_URL").env("KEYGATE_ADMIN_KEY", key);
    command.envs(variables.iter().map(|(name, value)| (*name, value)));
    command.args(url.into_iter().flat_map(|url| ["--url", url]));
    let output = command.output().expect("keygate runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().expect("a code"), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn a_key_is_sent_to_the_control_plane_that_issued_it_and_to_no_other() {
    let (here, other) = (Stack::builder().without_envoy().start(), Stack::builder().without_envoy().start());
    let url = |stack: &Stack| format!("http://127.0.0.1:{}", stack.control_plane.api_port());
    let key = here.control_plane.admin_key();
    let directory = tempfile::tempdir().expect("a directory");
    let run = |url: Option<&str>| fleet_in(directory.path(), &key, &[], url);

    // It is said which control plane is meant, or what is missing.
    let (status, said) = run(None);
    assert_eq!(status, 2, "{said}");
    for way in ["--url", "KEYGATE_URL", ".keygate/context.toml"] {
        assert!(said.contains(way), "{said}");
    }
    assert_eq!(run(Some(&url(&here))).0, 0);
    let there = [("KEYGATE_URL", url(&here))];
    assert_eq!(fleet_in(directory.path(), &key, &there, None).0, 0);
    assert_eq!(fleet_in(directory.path(), &key, &[("KEYGATE_URL", url(&other))], Some(&url(&here))).0, 0);

    let (status, said) = run(Some(&url(&other)));
    assert!(status == 7 && said.contains(&url(&other)) && said.contains("did not issue"), "{status} {said}");
    let unauthorized = other.api().get("/metrics").expect(200).text();
    let refused = unauthorized.lines().filter(|line| line.starts_with("auth_errors_total"));
    assert!(refused.clone().all(|line| line.ends_with(" 0")), "the other one saw no key: {refused:?}");
    let log = std::fs::read_to_string(other.control_plane.log()).expect("a log");
    assert!(!log.contains(&key));

    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}",
        "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        "SSH-2.0-OpenSSH\r\n",
    ] {
        let (port, heard) = listener(answer);
        let (status, said) = run(Some(&format!("http://127.0.0.1:{port}")));
        assert_eq!(status, 1, "{answer}: {said}");
        assert!(said.contains(&format!("127.0.0.1:{port}")), "{said}");
        let heard = heard.lock().expect("no panic").clone();
        assert!(heard.starts_with("GET /.well-known/keygate"), "{heard}");
        assert!(!heard.to_lowercase().contains("authorization") && !heard.contains(&key), "{heard}");
    }
    let (status, said) = fleet_in(directory.path(), "not-a-key", &there, None);
    assert!(status == 7 && said.contains("no key of Keygate"), "{status} {said}");
}

#[test]
fn a_context_file_names_the_control_plane_and_its_fleet() {
    let stack = Stack::builder().without_envoy().start();
    let other = Stack::builder().without_envoy().start();
    let fleet_of = |stack: &Stack| {
        let identity = stack.api().call(&Request::get("/.well-known/keygate")).expect(200).json();
        identity["fleet"].as_str().expect("an id").to_owned()
    };
    assert_ne!(fleet_of(&stack), fleet_of(&other));
    let directory = tempfile::tempdir().expect("a directory");
    let below = directory.path().join("deeper/still");
    std::fs::create_dir_all(&below).expect("a directory");
    std::fs::create_dir(directory.path().join(".keygate")).expect("a directory");
    let write = |url: &Stack, fleet: &str| {
        let text =
            format!("url = \"http://127.0.0.1:{}\"\nfleet = \"{fleet}\"\n", url.control_plane.api_port());
        std::fs::write(directory.path().join(".keygate/context.toml"), text).expect("a file");
    };
    let key = stack.control_plane.admin_key();
    write(&stack, &fleet_of(&stack));
    assert_eq!(fleet_in(&below, &key, &[], None).0, 0);
    // The same address, and another control plane behind it.
    write(&other, &fleet_of(&stack));
    let (status, said) = fleet_in(&below, &other.control_plane.admin_key(), &[], None);
    assert!(status == 7 && said.contains("another control plane"), "{status} {said}");
    std::fs::write(directory.path().join(".keygate/context.toml"), "url = 1").expect("a file");
    let (status, said) = fleet_in(&below, &key, &[], None);
    assert!(status == 2 && said.contains("context.toml"), "{status} {said}");
}

#[test]
fn what_was_changed_is_shown_with_who_and_why() {
    let stack = Stack::builder().without_envoy().start();
    said(&stack, &["emergency", "lockdown", "--ttl", "1h", "--reason", "INC-1"], &["locked down"]);
    let shown = said(
        &stack,
        &["emergency", "show"],
        &["lockdown until 20", "but for: admin", "reason: INC-1", "by key_"],
    );
    assert!(shown.contains("since 20"), "{shown}");
    said(&stack, &["emergency", "unlock", "--reason", "INC-1 over"], &["unlocked"]);
    said(&stack, &["emergency", "show"], &["nothing is in force"]);
    let audit = said(
        &stack,
        &["audit", "list", "--action", "lockdown_changed"],
        &["INC-1 over", "active: true -> false"],
    );
    assert!(audit.contains("active: false -> true"), "{audit}");
    let records = said(&stack, &["audit", "list", "--json", "--limit", "1"], &[]);
    let record: Value = serde_json::from_str(records.trim()).expect("JSON, one line each");
    assert_eq!(record["reason"], "INC-1 over");
}
