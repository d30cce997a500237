//! A disk that is full: keys can still be ended, and nothing that was answered is lost.

use std::path::Path;
use std::process::Command;

use keygate_e2e::{Key, Request, SOON, Stack, wait_until};
use serde_json::json;

/// A small disk in memory, for as long as this lives.
struct SmallDisk<'p>(&'p Path);

impl<'p> SmallDisk<'p> {
    /// `None` where this machine lets nobody mount anything.
    fn mount(at: &'p Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).expect("a directory");
        let mounted = run(&["mount", "-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "tmpfs"], at);
        mounted.then_some(Self(at))
    }

    fn resize(&self, size: &str) {
        assert!(run(&["mount", "-o", &format!("remount,size={size}")], self.0), "it grows");
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        run(&["umount", "--lazy"], self.0);
    }
}

fn run(command: &[&str], at: &Path) -> bool {
    Command::new(command[0]).args(&command[1..]).arg(at).status().is_ok_and(|status| status.success())
}

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

#[test]
fn on_a_full_disk_keys_can_still_be_ended() {
    let mut stack = Stack::builder().workers(1).without_control_plane().without_envoy().start();
    let data = stack.control_plane.data();
    let Some(disk) = SmallDisk::mount(&data, "20m") else {
        println!("nothing can be mounted here: not tested");
        return;
    };
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let api = stack.api();

    // Keys with much metadata, until the disk is full.
    let padding = "x".repeat(4_000);
    let mut keys = Vec::new();
    let refused = loop {
        let body = json!({ "name": "e2e", "role": "basic", "metadata": { "padding": padding } });
        let answer = api.post("/api/auth/register", &body);
        if answer.status != 201 {
            break answer;
        }
        keys.push(Key::from_answer(&answer.json()));
        assert!(keys.len() < 10_000, "the disk does not get full");
    };
    println!("{} keys until the disk was full: {}", keys.len(), refused.text());
    let problem = refused.expect_problem(503, "unavailable").json();
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("full")), "{problem}");
    let health = api.get("/health").expect(200).json();
    assert_eq!(health["status"], "degraded", "{health}");
    let verbose = Request::get("/readyz?verbose").header("accept", "text/plain");
    let ready = api.call(&verbose).expect(200).text();
    assert!(ready.starts_with("[-]journal failed: ") && ready.ends_with("passed, degraded\n"), "{ready}");

    // All of them can be ended, the last one too, which the store may not have.
    let ended: Vec<&Key> = keys.iter().rev().take(200).collect();
    for key in &ended {
        stack.call(&chat(key)).expect(200);
        api.revoke(&key.id).expect_everywhere(1);
        stack.call(&chat(key)).expect(401);
    }
    let locked = api.change("/api/admin/emergency/lockdown", &json!({ "ttl": "1h" }));
    locked.expect_everywhere(1);
    api.post("/api/auth/register", &json!({ "name": "e2e", "role": "basic" })).expect(503);

    // Space again: everything goes on, without a restart.
    disk.resize("64m");
    wait_until(SOON, "changes to be taken again", || {
        api.send(Request::new("DELETE", "/api/admin/emergency/lockdown")).status == 200
    });
    wait_until(SOON, "the proxy to know", || stack.call(&chat(&keys[0])).status == 200);
    let late = api.issue("basic");
    stack.call(&chat(&late)).expect(200);
    // The proxy enforces a change a moment before it says so. The store's file has to be opened anew once it could not be
    // written, for which a restart is needed; that is said.
    let failed = || {
        let ready = api.call(&verbose).expect(200).text();
        ready.lines().filter(|line| line.starts_with("[-]")).map(str::to_owned).collect::<Vec<_>>()
    };
    wait_until(SOON, "all else to be well", || {
        failed().iter().all(|line| line.starts_with("[-]store failed: "))
    });
    println!("the store: {:?}", failed());
    for key in &ended {
        stack.call(&chat(key)).expect(401);
    }

    // Killed and started again while some of it was only in the journal.
    stack.control_plane.kill();
    stack.control_plane.start();
    let api = stack.api();
    wait_until(SOON, "all to be well", || api.get("/health").expect(200).json()["status"] == "healthy");
    for key in &ended {
        api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(401);
        let show = api.get(&format!("/api/admin/keys/{}", key.id)).expect(200).json();
        assert_eq!(show["state"], "revoked", "{show}");
    }
    stack.call(&chat(&late)).expect(200);
    drop(stack);
    drop(disk);
}
