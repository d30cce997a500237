//! With an HSM: SoftHSM, by PKCS#11 as any other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use keygate_e2e::{Request, SOON, Stack, wait_until};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::rotation::rotated_with;

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
const PIN: &str = "7391-a-pin-of-the-tests";
const TOKEN: &str = "keygate";

/// A token of its own.
struct Token {
    directory: TempDir,
}

impl Token {
    fn new() -> Self {
        assert!(Path::new(MODULE).exists(), "scripts/setup installs SoftHSM");
        let directory = tempfile::Builder::new().prefix("keygate-hsm.").tempdir().expect("a directory");
        let token = Self { directory };
        fs::create_dir(token.tokens()).expect("a directory");
        fs::write(token.config(), format!("directories.tokendir = {}\n", token.tokens().display()))
            .expect("a file");
        let made = Command::new("softhsm2-util")
            .env("SOFTHSM2_CONF", token.config())
            .args(["--init-token", "--free", "--label", TOKEN, "--so-pin", "12345678", "--pin", PIN])
            .output()
            .expect("scripts/setup installs SoftHSM");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        token
    }

    fn config(&self) -> PathBuf {
        self.directory.path().join("softhsm2.conf")
    }

    fn tokens(&self) -> PathBuf {
        self.directory.path().join("tokens")
    }

    fn take_away(&self) {
        fs::rename(self.tokens(), self.directory.path().join("away")).expect("it is moved");
    }

    fn put_back(&self) {
        fs::rename(self.directory.path().join("away"), self.tokens()).expect("it is moved");
    }

    /// The labels of what is in it that begin with `prefix`.
    fn stack(&self, more: &str) -> Stack {
        let config = format!("[hsm]\nmodule = \"{MODULE}\"\ntoken = \"{TOKEN}\"\n{more}");
        let mut stack =
            Stack::builder().workers(1).config(&config).without_control_plane().without_envoy().start();
        stack.control_plane.use_variable("SOFTHSM2_CONF", &self.config().display().to_string());
        stack.control_plane.use_variable("KEYGATE_HSM_PIN", PIN);
        stack
    }
}

fn start(stack: &mut Stack) {
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
}

fn active(stack: &Stack) -> Value {
    stack.api().get("/api/admin/secrets/status").expect(200).json()["active"].clone()
}

/// Starts a control plane that must refuse to, and what it says.
#[track_caller]
fn refuses_to_start(stack: &mut Stack) -> String {
    let before = fs::read_to_string(stack.control_plane.log()).unwrap_or_default().len();
    stack.control_plane.launch();
    assert!(!stack.control_plane.wait_end().success(), "it starts");
    fs::read_to_string(stack.control_plane.log()).expect("the log")[before..].to_owned()
}

#[test]
fn a_signing_key_never_leaves_the_hsm_and_its_keys_pass() {
    let token = Token::new();
    let mut stack = token.stack("master_key = \"master\"\nsigning = true\n");
    start(&mut stack);
    assert_eq!(active(&stack)["in_hsm"], true);
    assert!(!stack.control_plane.data().join("master.key").exists(), "the master key is in the HSM");
    let first = stack.api().issue("basic");
    stack.get("/api/chat", &first.token).expect(200);

    // The next one too, and what signs no more is destroyed there.
    let old = active(&stack)["version_id"].as_str().expect("an id").to_owned();
    assert_eq!(objects(&token, &old), 2, "a private and a public half");
    let new = rotated_with(&stack.api(), &json!({}));
    let second = stack.api().issue("basic");
    for key in [&first, &second] {
        stack.get("/api/chat", &key.token).expect(200);
    }
    wait_until(SOON, "the old key to be destroyed", || objects(&token, &old) == 0);
    assert_eq!(objects(&token, &new), 2);

    // A restart finds all again; without the HSM it does not start.
    stack.control_plane.stop();
    stack.control_plane.start();
    let third = stack.api().issue("basic");
    wait_until(SOON, "the key to pass", || stack.get("/api/chat", &third.token).status == 200);
    // From the HSM to a secret that is sealed here, and with a master key in it all the same.
    rotated_with(&stack.api(), &json!({ "secret": "b2Zf3xM1s0Q9pLk7Vt5Yw8Ee6Rr4Uu2Ii1Oo0Pp9Aa8" }));
    let fourth = stack.api().issue("basic");
    stack.get("/api/chat", &fourth.token).expect(200);
    stack.control_plane.stop();
    stack.control_plane.start();
    stack.api().issue("basic");
    stack.envoy.assert_no_vm_died();
}

#[test]
fn a_token_that_is_gone_stops_what_it_does_and_nothing_else() {
    let token = Token::new();
    let mut stack = token.stack("master_key = \"master\"\nsigning = true\n");
    start(&mut stack);
    let api = stack.api();
    let key = api.issue("basic");
    token.take_away();

    // What is known goes on; what it is needed for is refused with the reason, and comes to no harm.
    stack.get("/api/chat", &key.token).expect(200);
    api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(200);
    let refused = api.post("/api/auth/register", &json!({ "name": "a", "role": "basic" }));
    let problem = refused.expect_problem(503, "unavailable").json();
    assert!(problem["detail"].as_str().expect("a text").contains("HSM token \"keygate\""), "{problem}");
    let refused = api.post("/api/admin/secrets/rotate", &json!({})).expect_problem(503, "unavailable");
    assert!(refused.text().contains("HSM token"), "{}", refused.text());
    assert!(!refused.text().contains(PIN));
    let metrics = api.call(&Request::get("/metrics")).expect(200).text();
    assert!(metrics.contains("secret_rotation_failures 1"), "it is counted");
    api.revoke(&key.id).expect_everywhere(1);
    stack.get("/api/chat", &key.token).expect(401);

    // Back again, the next call works; no rotation was left behind.
    token.put_back();
    let another = api.issue("basic");
    stack.get("/api/chat", &another.token).expect(200);
    rotated_with(&api, &json!({}));
    stack.get("/api/chat", &api.issue("basic").token).expect(200);
}

#[test]
fn a_wrong_pin_a_missing_token_and_a_missing_module_are_told_of_at_the_start() {
    let token = Token::new();
    let mut stack = token.stack("master_key = \"master\"\n");
    stack.control_plane.use_variable("KEYGATE_HSM_PIN", "a-wrong-pin-4711");
    let said = refuses_to_start(&mut stack);
    assert!(said.contains("refuses the PIN") && said.contains("CKR_PIN_INCORRECT"), "{said}");
    assert!(!said.contains("a-wrong-pin-4711"), "{said}");

    stack.control_plane.drop_variable("KEYGATE_HSM_PIN");
    assert!(refuses_to_start(&mut stack).contains("hsm.pin_file"));
    stack.control_plane.use_variable("KEYGATE_HSM_PIN", PIN);

    stack.control_plane.use_variable("KEYGATE_HSM_TOKEN", "another");
    let said = refuses_to_start(&mut stack);
    assert!(said.contains("no HSM token has the label \"another\"; there are [\"keygate\"]"), "{said}");
    stack.control_plane.drop_variable("KEYGATE_HSM_TOKEN");

    stack.control_plane.use_variable("KEYGATE_HSM_MODULE", "/nowhere/module.so");
    assert!(refuses_to_start(&mut stack).contains("/nowhere/module.so cannot be loaded"));
    stack.control_plane.drop_variable("KEYGATE_HSM_MODULE");

    stack.control_plane.start();
    stack.control_plane.stop();
    // Started once, it does not make another master key in place of one that is gone.
    token.take_away();
    fs::create_dir(token.tokens()).expect("a directory");
    assert!(refuses_to_start(&mut stack).contains("no HSM token has the label"));
}

#[test]
fn a_master_key_goes_from_a_file_into_the_hsm() {
    let token = Token::new();
    let mut stack = token.stack("");
    start(&mut stack);
    let key = stack.api().issue("basic");
    stack.control_plane.stop();
    let file = stack.control_plane.data().join("master.key");
    stack.control_plane.use_variable("KEYGATE_HSM_MASTER_KEY", "master");
    stack.control_plane.use_variable("KEYGATE_PREVIOUS_MASTER_KEY_FILE", &file.display().to_string());
    stack.control_plane.start();
    stack.control_plane.stop();
    stack.control_plane.drop_variable("KEYGATE_PREVIOUS_MASTER_KEY_FILE");
    fs::remove_file(&file).expect("nobody needs it any more");
    stack.control_plane.start();
    let another = stack.api().issue("basic");
    for key in [&key, &another] {
        wait_until(SOON, "the key to pass", || stack.get("/api/chat", &key.token).status == 200);
    }
    assert!(!file.exists());
}

/// How many objects with that label are in the token.
fn objects(token: &Token, label: &str) -> usize {
    let listed = Command::new("pkcs11-tool")
        .env("SOFTHSM2_CONF", token.config())
        .args(["--module", MODULE, "--login", "--pin", PIN, "--token-label", TOKEN, "--list-objects"])
        .output()
        .expect("scripts/setup installs opensc");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    text.lines().filter(|line| line.trim() == format!("label:      {label}")).count()
}
