//! A change is on disk before a byte of its answer leaves, as the control plane's system calls show; and a first
//! start that ends at any of them is begun again.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::trace::{self, Change, STRACE, on_disk_before_answered};
use keygate_e2e::{Api, Connection, Key, Request, SOON, wait_until};
use serde_json::{Value, json};

/// Sends a change over a connection of its own; the answer, and where it went.
fn send(control_plane: &ControlPlane, request: Request) -> (Value, u16) {
    let mut connection = Connection::open(control_plane.api_port()).expect("it listens");
    let answer = connection.send(&request.bearer(control_plane.admin_key()));
    assert!((200..300).contains(&answer.status), "{}", answer.text());
    (answer.json(), connection.local_port())
}

/// How a member of a record looks in a trace.
fn member(name: &str, value: &str) -> String {
    format!(r#"\"{name}\":\"{value}\""#)
}

fn register(control_plane: &ControlPlane, name: &str) -> (Key, Change) {
    let body = json!({ "name": name, "role": "basic" });
    let (answer, client_port) = send(control_plane, Request::post("/api/auth/register", &body));
    let key = Key::from_answer(&answer);
    let record = vec![member("action", "key_issued"), member("target", &key.id)];
    (key, Change { record, client_port })
}

fn change_key(control_plane: &ControlPlane, key: &Key, verb: &str, action: &str) -> Change {
    let path = format!("/api/admin/keys/{}/{verb}", key.id);
    let (_, client_port) = send(control_plane, Request::post(path, &json!({})));
    Change { record: vec![member("action", action), member("target", &key.id)], client_port }
}

/// Every kind of change, one after the other.
fn one_by_one(control_plane: &ControlPlane) -> Vec<Change> {
    let mut changes = Vec::new();
    let (key, registered) = register(control_plane, "one");
    changes.push(registered);
    for (verb, action) in [("suspend", "key_suspended"), ("resume", "key_resumed"), ("revoke", "key_revoked")]
    {
        changes.push(change_key(control_plane, &key, verb, action));
    }
    let batch = json!({ "jtis": ["foreign-1", "foreign-2"], "reason": "compromised" });
    let (_, client_port) = send(control_plane, Request::post("/api/admin/revocations", &batch));
    changes.push(Change { record: vec![member("target", "foreign-2")], client_port });
    let scope = json!({ "scope": { "owner": "somebody" } });
    let (answer, client_port) = send(control_plane, Request::post("/api/admin/emergency/revoke", &scope));
    let id = answer["cutoff"]["id"].as_str().expect("an id");
    let of_cutoff = |action| vec![member("action", action), member("target", id)];
    changes.push(Change { record: of_cutoff("cutoff_added"), client_port });
    let lift = Request::new("DELETE", format!("/api/admin/emergency/revoke/{id}"));
    changes.push(Change { record: of_cutoff("cutoff_lifted"), client_port: send(control_plane, lift).1 });
    let lock = json!({ "ttl": "1h", "exempt_roles": ["admin", "basic"] });
    let (_, client_port) = send(control_plane, Request::post("/api/admin/emergency/lockdown", &lock));
    changes.push(Change { record: vec![member("action", "lockdown_changed"), "until".into()], client_port });
    let policy = json!({ "routes": [{ "name": "only-this", "path": "/only", "access": "public" }] });
    let (_, client_port) = send(control_plane, Request::new("PUT", "/api/admin/policy").json(&policy));
    let record = vec![member("action", "policy_replaced"), member("name", "only-this")];
    changes.push(Change { record, client_port });
    changes
}

/// Keys issued and revoked by many clients together, so that one write is for several.
fn together(control_plane: &ControlPlane) -> Vec<Change> {
    std::thread::scope(|scope| {
        let client = |number: usize| {
            let issue_and_revoke = move |n| {
                let (key, registered) = register(control_plane, &format!("c{number}-{n}"));
                [registered, change_key(control_plane, &key, "revoke", "key_revoked")]
            };
            scope.spawn(move || (0..5).flat_map(issue_and_revoke).collect::<Vec<_>>())
        };
        let clients: Vec<_> = (0..8).map(client).collect();
        clients.into_iter().flat_map(|client| client.join().expect("answers")).collect()
    })
}

fn segments(journal: &Path) -> usize {
    let names = std::fs::read_dir(journal)
        .expect("a journal")
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.ends_with(".jsonl")).count()
}

/// Long token ids, until the segment is full and the next change is the first one of another.
fn fill_a_segment(control_plane: &ControlPlane) -> Vec<Change> {
    let journal = control_plane.data().join("journal");
    let mut changes = Vec::new();
    for batch in 0..40 {
        let first = format!("{batch:0>256}");
        let others = (1..3_500).map(|n| format!("{batch}-{n:0>240}"));
        let jtis: Vec<String> = std::iter::once(first.clone()).chain(others).collect();
        let body = json!({ "jtis": jtis, "reason": "compromised" });
        let (_, client_port) = send(control_plane, Request::post("/api/admin/revocations", &body));
        changes.push(Change { record: vec![member("target", &first)], client_port });
        if segments(&journal) == 2 {
            changes.push(register(control_plane, "first").1);
            return changes;
        }
    }
    panic!("no second segment")
}

#[test]
fn a_change_is_on_disk_before_its_answer_leaves() {
    trace::assert_possible();
    let directory = tempfile::Builder::new().prefix("keygate-e2e.").tempdir().expect("a directory");
    let mut control_plane = ControlPlane::new(directory.path());
    let file = directory.path().join("trace");
    control_plane.launch_traced(STRACE, &file);
    control_plane.wait_ready();
    let mut changes = one_by_one(&control_plane);
    changes.extend(together(&control_plane));
    changes.extend(fill_a_segment(&control_plane));
    control_plane.stop();
    wait_until(SOON, "the end of the trace", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text.trim_end().ends_with("+++ exited with 0 +++"))
    });

    let calls = trace::read(&file);
    let journal = control_plane.data().join("journal").display().to_string();
    for change in &changes {
        let checked = on_disk_before_answered(&calls, &journal, control_plane.api_port(), change);
        checked.unwrap_or_else(|wrong| panic!("{}", wrong.chars().take(1_000).collect::<String>()));
    }
    let syncs = calls.iter().filter(|call| call.is_sync() && call.target().ends_with(".jsonl")).count();
    println!("{} changes, all on disk before their answers; {syncs} syncs of the journal", changes.len());
}

/// Kills a control plane when it enters a system call for the `nth` time during its first start. `false` when it
/// does not get to that.
fn killed_at(control_plane: &mut ControlPlane, call: &str, nth: usize) -> bool {
    let kill = format!("inject={call}:signal=KILL:when={nth}");
    control_plane
        .launch_traced(["-f", "-D", "-e", &format!("trace={call}"), "-e", &kill], Path::new("/dev/null"));
    let mut killed = None;
    wait_until(SOON, "its end or its readiness", || {
        killed = control_plane.ended().map(|status| status.signal());
        killed.is_some() || control_plane.answers()
    });
    match killed {
        Some(signal) => {
            assert_eq!(signal, Some(9), "{}", control_plane.log_tail());
            control_plane.wait_end();
            true
        }
        None => {
            control_plane.kill();
            false
        }
    }
}

#[test]
fn a_first_start_that_ends_at_any_system_call_is_begun_again() {
    trace::assert_possible();
    let mut cut_short = 0;
    for call in ["mkdir", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename"] {
        for nth in 1.. {
            let directory = tempfile::Builder::new().prefix("keygate-e2e.").tempdir().expect("a directory");
            let mut control_plane = ControlPlane::new(directory.path());
            if !killed_at(&mut control_plane, call, nth) {
                break;
            }
            cut_short += 1;
            println!("killed at {call} {nth}");
            control_plane.start();
            let api = control_plane.api();
            let key = api.issue("basic");
            assert_valid(&api, &api.key());
            assert_valid(&api, &key.token);
        }
    }
    println!("{cut_short} starts cut short");
    assert!(cut_short > 20, "{cut_short}");
}

fn assert_valid(api: &Api, token: &str) {
    api.call(&Request::get("/api/auth/validate").bearer(token)).expect(200);
}
