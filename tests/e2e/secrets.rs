//! What must never be seen, is not, and what was tampered with is refused.

mod at_rest;

use std::collections::HashSet;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as BASE64URL};
use keygate_e2e::{Redis, Request, SOON, Stack, binaries, wait_for, wait_until};
use serde_json::{Value, json};

use self::at_rest::DataKeys;
use crate::rotation::rotated_with;

/// The shortest part of a secret that must not be seen.
const WINDOW: usize = 12;

#[test]
fn no_secret_shows_anywhere() {
    let stack = Stack::start();
    let api = stack.api();
    let key = api.issue("basic");
    stack.get("/api/chat", &key.token).expect(200);
    stack.get("/api/chat", &format!("{}x", key.token)).expect(401);
    api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(200);
    api.post(
        "/api/admin/explain",
        &serde_json::json!({ "token": key.token, "method": "GET", "path": "/api/chat" }),
    )
    .expect(200);
    api.revoke(&key.id);

    let secrets = [
        ("the fleet token", stack.fleet_token()),
        ("the admin key", stack.control_plane.admin_key()),
        ("a key", key.token.clone()),
    ];
    let mut places = vec![
        ("Envoy's configuration", stack.envoy.admin("/config_dump?include_eds").expect(200).text()),
        ("Envoy's metrics", stack.envoy.admin("/stats/prometheus").expect(200).text()),
        ("Envoy's log", stack.envoy.log_text()),
        ("the control plane's log", fs::read_to_string(stack.control_plane.log()).expect("the log")),
    ];
    for path in ["/metrics", "/health", "/livez", "/readyz", "/openapi.json", "/.well-known/jwks.json"] {
        places.push((path, api.call(&Request::get(path)).expect(200).text()));
    }
    for path in ["/api/admin/keys", "/api/admin/fleet", "/api/admin/secrets/status"] {
        places.push((path, api.get(path).expect(200).text()));
    }
    let one = format!("/api/admin/keys/{}", key.id);
    places.push((&one, api.get(&one).expect(200).text()));
    let access_log = fs::read_to_string(stack.envoy.access_log_file()).expect("the log");
    places.push(("the access log", access_log));
    for (secret, value) in &secrets {
        // A signature is as good as the key to whoever has the rest.
        let part = value.rsplit('.').next().expect("a part");
        for (place, text) in &places {
            assert!(!text.contains(part), "{secret} shows in {place}");
        }
        let files = files_under(&stack.control_plane.data());
        let holder = files.iter().find(|(_, bytes)| contains(bytes, part.as_bytes()));
        assert!(holder.is_none(), "{secret} is kept in clear in {}", holder.expect("one").0);
    }
    // What the public may know of a signing key is its public half.
    let jwks = api.call(&Request::get("/.well-known/jwks.json")).json();
    for jwk in jwks["keys"].as_array().expect("keys") {
        assert!(jwk["d"].is_null() && jwk["k"].is_null(), "a private key in the key set");
    }
}

/// Every signing secret of a history with rotations of all kinds, as only the master key's holder can have it: and then
/// no twelve bytes of any of them anywhere, in whatever encoding.
#[test]
fn no_twelve_bytes_of_a_signing_secret_are_anywhere() {
    let mut redis = Redis::new().with_append_only();
    redis.run();
    let mut stack = Stack::builder()
        .workers(1)
        .redis(&redis.url())
        .config("[secrets]\nalgorithm = \"HS256\"\noverlap = \"1h\"\n")
        .without_control_plane()
        .without_envoy()
        .start();
    stack.control_plane.use_variable("KEYGATE_LOG", "trace");
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let api = stack.api();

    let mut secrets: Vec<Vec<u8>> = open_secrets(&stack);
    let imported: Vec<u8> = (0..40_u32).map(|n| (n * n * 7 + n * 31 + 5).to_le_bytes()[0] ^ 0x5a).collect();
    let import = json!({ "reason": "import", "secret": BASE64URL.encode(&imported) });
    for body in [
        json!({ "algorithm": "HS256" }),
        import,
        json!({ "algorithm": "ES256" }),
        json!({ "algorithm": "EdDSA" }),
    ] {
        rotated_with(&api, &body);
        secrets.extend(open_secrets(&stack));
    }
    // What is refused is not told either.
    let short = json!({ "secret": BASE64URL.encode(&imported[..20]) });
    let refused = api.post("/api/admin/secrets/rotate", &short).expect(400);
    let mut places = vec![("an error".to_owned(), refused.body)];
    assert!(secrets.contains(&imported), "the search is for what there is");
    assert!(secrets.len() >= 5, "{}", secrets.len());

    let key = api.issue("basic");
    stack.get("/api/chat", &key.token).expect(200);
    for path in ["/metrics", "/health", "/readyz?verbose", "/.well-known/jwks.json"] {
        places.push((path.to_owned(), api.call(&Request::get(path)).expect(200).body));
    }
    for path in ["/api/admin/secrets/status", "/api/admin/audit", "/api/admin/fleet"] {
        places.push((path.to_owned(), api.get(path).expect(200).body));
    }
    places.push(("config_dump".into(), stack.envoy.admin("/config_dump?include_eds").expect(200).body));
    places.push(("Envoy's stats".into(), stack.envoy.admin("/stats?format=json").expect(200).body));
    places.push(("Envoy's log".into(), stack.envoy.log_text().into_bytes()));

    // A crash: no core is dumped, though this shell would allow it.
    let limits = fs::read_to_string(format!("/proc/{}/limits", stack.control_plane.id())).expect("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a line");
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    let ended = stack.control_plane.abort();
    assert_eq!((ended.signal(), ended.core_dumped()), (Some(6), false));
    places.push(("the control plane's log".into(), fs::read(stack.control_plane.log()).expect("the log")));

    // What a stop leaves of Redis: its append-only file and its snapshot.
    redis.cli(&["SAVE"]);
    places.extend(files_under(redis.directory()));
    places.extend(files_under(stack.directory()));
    let windows = Windows::of(&secrets);
    for (place, bytes) in &places {
        assert!(!windows.any_in(bytes), "a part of a secret is in {place}");
    }
    // The search finds what is there.
    let shown = format!("text {} text", BASE64URL.encode(&secrets[0][3..]));
    assert!(windows.any_in(shown.as_bytes()) && windows.any_in(&imported));
}

/// Parts of secrets: raw, in hexadecimal, and in base64 at each of its three alignments.
struct Windows {
    all: HashSet<Vec<u8>>,
}

impl Windows {
    fn of(secrets: &[Vec<u8>]) -> Self {
        let mut all = HashSet::new();
        for part in secrets.iter().flat_map(|secret| secret.windows(WINDOW)) {
            let hex: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
            // Twelve bytes are sixteen characters, of which those stand that depend on these bytes alone.
            let base64 = |skip: usize, text: String| text.as_bytes()[skip..skip + 12].to_vec();
            for shift in 0..3 {
                let shifted = [vec![0; shift], part.to_vec(), vec![0; 3]].concat();
                let skip = [0, 2, 3][shift];
                all.insert(base64(skip, BASE64URL.encode(&shifted)));
                all.insert(base64(skip, STANDARD.encode(&shifted)));
            }
            all.insert(hex.to_uppercase().as_bytes()[..WINDOW].to_vec());
            all.insert(hex.as_bytes()[..WINDOW].to_vec());
            all.insert(part.to_vec());
        }
        Self { all }
    }

    fn any_in(&self, bytes: &[u8]) -> bool {
        bytes.windows(WINDOW).any(|window| self.all.contains(window))
    }
}

/// The secrets that can be opened now, with the master key and by the format that the journal has.
fn open_secrets(stack: &Stack) -> Vec<Vec<u8>> {
    let keys = DataKeys::of(&stack.control_plane.data());
    let mut found = Vec::new();
    for record in records(stack) {
        let id = record["sealed"]["data_key"].as_str().unwrap_or_default();
        let Some(data_key) = keys.get(id) else { continue };
        let text = |member: &str| record[member].as_str().expect("a text").to_owned();
        let place = format!("keygate secret {} {} {}", text("kid"), text("alg"), text("state"));
        let sealed = record["sealed"]["secret"].as_str().expect("a text");
        found.push(at_rest::open(&data_key, &place, sealed));
    }
    assert!(!found.is_empty());
    found
}

/// The records of secrets in the journal, oldest first.
fn records(stack: &Stack) -> Vec<Value> {
    let mut lines: Vec<(u64, Value)> = Vec::new();
    for (_, bytes) in files_under(&stack.control_plane.data().join("journal")) {
        for line in String::from_utf8_lossy(&bytes).lines() {
            let Ok(record) = serde_json::from_str::<Value>(line) else { continue };
            if record["change"]["secret"].is_object() {
                lines.push((record["seq"].as_u64().expect("a number"), record["change"]["secret"].clone()));
            }
        }
    }
    lines.sort_by_key(|(seq, _)| *seq);
    lines.into_iter().map(|(_, record)| record).collect()
}

fn files_under(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(files_under(&path));
        } else if let Ok(bytes) = fs::read(&path) {
            files.push((path.display().to_string(), bytes));
        }
    }
    files
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// Starts a control plane that must refuse to, and what it says.
#[track_caller]
fn refuses_to_start(stack: &mut Stack) -> String {
    let before = fs::read_to_string(stack.control_plane.log()).unwrap_or_default().len();
    stack.control_plane.launch();
    let status = stack.control_plane.wait_end();
    assert!(!status.success(), "it starts");
    fs::read_to_string(stack.control_plane.log()).expect("the log")[before..].to_owned()
}

#[test]
fn a_journal_that_was_set_back_to_when_an_ended_secret_signed_is_refused() {
    let mut stack = Stack::builder().without_envoy().start();
    let data = stack.control_plane.data();
    stack.control_plane.stop();
    let (journal, aside) = (data.join("journal"), stack.directory().join("journal.aside"));
    copy_all(&journal, &aside);
    stack.control_plane.start();
    let api = stack.api();
    let old = api.issue("basic");
    api.post("/api/admin/secrets/rotate", &json!({ "immediate": true })).expect(202);
    api.call(&Request::get("/api/auth/validate").bearer(&old.token)).expect(401);
    stack.control_plane.stop();

    let current = stack.directory().join("journal.current");
    fs::rename(&journal, &current).expect("it is moved");
    copy_all(&aside, &journal);
    fs::remove_file(data.join("store.redb")).expect("the store, which would tell too, is taken away");
    let said = refuses_to_start(&mut stack);
    assert!(said.contains("its data key is not in the keyring"), "{said}");
    assert!(said.contains("restore both from one backup"), "{said}");

    fs::remove_dir_all(&journal).expect("it is removed");
    fs::rename(&current, &journal).expect("it is moved");
    stack.control_plane.start();
    let request = Request::get("/api/auth/validate").bearer(&old.token);
    stack.control_plane.api().call(&request).expect(401);
}

#[test]
fn a_keyring_that_was_edited_swapped_or_lost_is_refused_with_what_to_do() {
    let mut stack = Stack::builder().without_envoy().start();
    rotated_with(&stack.api(), &json!({ "algorithm": "HS256" }));
    rotated_with(&stack.api(), &json!({ "algorithm": "HS256" }));
    stack.control_plane.stop();
    let file = stack.control_plane.data().join(at_rest::KEYRING);
    let whole = at_rest::wraps(&file);
    let ids: Vec<&String> = whole.keys().filter(|id| *id != "root").collect();
    assert!(ids.len() >= 2, "{ids:?}");

    let mut swapped = whole.clone();
    swapped.insert(ids[0].clone(), whole[ids[1]].clone());
    at_rest::write(&file, &swapped);
    let said = refuses_to_start(&mut stack);
    assert!(said.contains("does not open: it was changed; restore the keyring from a backup"), "{said}");

    fs::write(&file, "{}").expect("it is written");
    assert!(refuses_to_start(&mut stack).contains("restore it from a backup"));

    fs::remove_file(&file).expect("it is removed");
    let said = refuses_to_start(&mut stack);
    assert!(said.contains("is missing, and the journal beside it is not empty"), "{said}");

    at_rest::write(&file, &whole);
    stack.control_plane.start();
    stack.control_plane.api().issue("basic");
}

#[test]
fn a_new_master_key_takes_over_while_it_is_killed_again_and_again() {
    let mut stack = Stack::builder().workers(1).start();
    let key = stack.api().issue("basic");
    let data = stack.control_plane.data();
    let file = data.join(at_rest::KEYRING);
    stack.control_plane.stop();
    let new = stack.directory().join("new.key");
    fs::write(&new, BASE64URL.encode([9_u8; 32])).expect("it is written");

    // The new one alone does not open what is there, and changes nothing.
    let before = fs::read(&file).expect("the keyring");
    stack.control_plane.use_variable("KEYGATE_MASTER_KEY_FILE", &new.display().to_string());
    let said = refuses_to_start(&mut stack);
    assert!(said.contains("previous_master_key_file"), "{said}");
    assert_eq!(fs::read(&file).expect("the keyring"), before);

    // With both, killed at each step of the writing: whatever stands there opens.
    stack
        .control_plane
        .use_variable("KEYGATE_PREVIOUS_MASTER_KEY_FILE", &data.join("master.key").display().to_string());
    let trace = stack.directory().join("strace.log");
    let mut killed = 0;
    for call in ["openat", "write", "fsync", "rename"] {
        for nth in 1..=3 {
            fs::write(&file, &before).expect("it is as it was");
            let inject = format!("inject={call}:signal=KILL:when={nth}");
            let options = [
                "-D",
                "-f",
                "-P",
                &file.display().to_string(),
                "-P",
                &format!("{}.new", file.display()),
                "-e",
                &inject,
            ]
            .map(ToOwned::to_owned);
            stack.control_plane.launch_traced(options.iter().map(String::as_str), &trace);
            wait_until(SOON, "its end, or its readiness", || {
                stack.control_plane.ended().is_some() || stack.control_plane.answers()
            });
            killed += usize::from(stack.control_plane.ended().is_some());
            stack.control_plane.kill();
            let wraps = at_rest::wraps(&file);
            assert!(wraps.values().all(|wraps| !wraps.is_empty()));
        }
    }
    assert!(killed >= 4, "once at each call, at the least: {killed}");
    stack.control_plane.start();
    let with_both = at_rest::wraps(&file);
    assert!(with_both.values().all(|wraps| wraps.len() == 2), "{with_both:?}");
    stack.control_plane.stop();

    // Then the new one alone; the old one opens nothing any more.
    stack.control_plane.drop_variable("KEYGATE_PREVIOUS_MASTER_KEY_FILE");
    stack.control_plane.start();
    let api = stack.control_plane.api();
    rotated_with(&api, &json!({}));
    wait_for(SOON, "the key to pass", || (stack.get("/api/chat", &key.token).status == 200).then_some(()));
    stack.get("/api/chat", &api.issue("basic").token).expect(200);
    api.get("/api/admin/audit/verify").expect(200);
    stack.control_plane.stop();
    stack.control_plane.drop_variable("KEYGATE_MASTER_KEY_FILE");
    assert!(refuses_to_start(&mut stack).contains("was sealed with master key"));
    // From the environment as well as from a file.
    stack.control_plane.use_variable("KEYGATE_MASTER_KEY", &BASE64URL.encode([9_u8; 32]));
    stack.control_plane.start();
    stack.control_plane.api().issue("basic");
}

#[test]
fn a_backup_has_the_keyring_and_opens_with_the_master_key_alone() {
    let mut stack = Stack::builder().without_envoy().start();
    rotated_with(&stack.api(), &json!({ "algorithm": "HS256" }));
    let key = stack.api().issue("basic");
    let data = stack.control_plane.data();
    let file = stack.directory().join("backup.kgb");
    backup("create", &file, &data);
    stack.control_plane.stop();
    let master = fs::read(data.join("master.key")).expect("the master key");
    fs::remove_dir_all(&data).expect("all is lost");
    backup("restore", &file, &data);
    fs::write(data.join("master.key"), master).expect("it is put back");
    stack.control_plane.start();
    let api = stack.control_plane.api();
    api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(200);
    api.issue("basic");
}

/// One that is locked out needs the data directory and the master key, and nothing else.
#[test]
fn who_may_start_it_gets_an_admin_key() {
    let mut stack = Stack::builder().without_envoy().start();
    let first = stack.control_plane.admin_key();
    let api = stack.api();
    api.post("/api/admin/secrets/rotate", &json!({ "immediate": true })).expect(202);
    api.get("/api/admin/secrets/status").expect(401);
    stack.control_plane.stop();
    stack.control_plane.use_argument("--new-admin-key");
    stack.control_plane.start();
    wait_until(SOON, "another key", || stack.control_plane.admin_key() != first);
    stack.api().get("/api/admin/secrets/status").expect(200);
}

/// `keygate backup`, which must succeed.
#[track_caller]
fn backup(action: &str, file: &Path, data: &Path) {
    let mut command = Command::new(binaries::keygate());
    command.args(["backup", action]).arg(file).arg("--data-dir").arg(data);
    let output = command.output().expect("keygate runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for (path, bytes) in files_under(from) {
        let name = Path::new(&path).file_name().expect("a name").to_owned();
        fs::write(to.join(name), bytes).expect("it is written");
    }
}
