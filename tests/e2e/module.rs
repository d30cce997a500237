//! The filter as a dynamic module of Envoy's: what is different from WebAssembly. That it decides the same is what other
//! tests say, which `scripts/test` runs with it once more, as `e2e-module`.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use keygate_e2e::{Request, SOON, Stack, binaries, wait_until};
use serde_json::json;

fn stack() -> Stack {
    Stack::builder().workers(2).module().start()
}

#[test]
fn a_panic_costs_one_request_and_is_counted() {
    let stack = Stack::builder().workers(1).module().trap_filter().start();
    let key = stack.api().issue("basic");
    stack.get("/api/chat", &key.token).expect(200);
    let undecided = || stack.envoy.stat("keygate_decisions_total.reason.no_state");
    let (before, seen) = (undecided(), stack.upstream.seen());
    // With a body that comes after it: nothing of it goes on.
    let request = Request::new("POST", "/api/chat").bearer(&key.token).body(vec![b'x'; 300_000]);
    stack.call(&request.clone().header("x-trap", "worker")).expect_problem(503, "unavailable");
    assert_eq!((stack.envoy.stat("keygate_panics_total"), undecided()), (1, before + 1));
    // Nobody has to ask: another plugin is made for the worker by the next tick after the pause.
    wait_until(SOON, "another plugin", || stack.envoy.stat("keygate_vm_starts_total") == 3);
    assert_eq!(stack.upstream.seen(), seen);
    stack.get("/api/chat", &key.token).expect(200);
    stack.call(&request.header("x-api-key", "another")).expect(400);
    assert_eq!(stack.upstream.seen(), seen + 1, "the one that was let pass");
    assert_eq!((stack.envoy.stat("keygate_panics_total"), undecided()), (1, before + 1));
}

#[test]
fn workers_that_panic_all_the_time_hold_up_no_revocation() {
    let stack = Stack::builder().workers(2).module().trap_filter().start();
    let api = stack.api();
    let (revoked, good) = (api.issue("basic"), api.issue("basic"));
    let begun = Instant::now();
    // For longer than a lease.
    while begun.elapsed() < Duration::from_secs(3) {
        stack.call(&Request::get("/api/chat").bearer(&good.token).header("x-trap", "worker")).expect(503);
    }
    assert!(stack.envoy.stat("keygate_panics_total") > 10);
    assert_eq!(
        stack.envoy.stat("keygate_leader_takeovers_total"),
        1,
        "the main thread's plugin leads, and no other"
    );
    api.revoke(&revoked.id).expect_everywhere(1);
    for connection in &mut stack.envoy.connect_to_all_workers() {
        wait_until(SOON, "the worker's plugin", || {
            let refused = connection.send(&Request::get("/api/chat").bearer(&revoked.token)).status;
            assert!(matches!(refused, 401 | 503), "{refused}");
            connection.send(&Request::get("/api/chat").bearer(&good.token)).status == 200
        });
        connection.send(&Request::get("/api/chat").bearer(&revoked.token)).expect(401);
    }
}

#[test]
fn a_configuration_that_replaces_another_has_its_state_and_nobody_is_refused() {
    let mut stack = Stack::builder().workers(2).module().without_envoy().start();
    stack.envoy.use_listeners_of_a_file();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let api = stack.api();
    let (good, revoked) = (api.issue("basic"), api.issue("basic"));
    api.revoke(&revoked.id).expect_everywhere(1);
    for round in 0..4 {
        let starts = stack.envoy.stat("keygate_vm_starts_total");
        // From now on whatever is known was known before.
        stack.control_plane.kill();
        stack.envoy.change_listeners(9_000 + round);
        wait_until(SOON, "the new configuration alone", || {
            stack.get("/api/chat", &good.token).expect(200);
            stack.get("/api/chat", &revoked.token).expect(401);
            let draining =
                ["listeners", "filter_chains"].map(|of| format!("listener_manager.total_{of}_draining"));
            let draining: u64 = draining.iter().map(|name| stack.envoy.stat(name)).sum();
            stack.envoy.stat("keygate_vm_starts_total") == starts + 3 && draining == 0
        });
        // The old one's plugin that led has resigned, so the new one leads without waiting for the end of a lease.
        wait_until(Duration::from_secs(1), "another leader", || {
            stack.envoy.stat("keygate_leader_takeovers_total") == 2 + round
        });
        stack.control_plane.start();
        let next = api.issue("basic");
        stack.get("/api/chat", &next.token).expect(200);
        api.revoke(&next.id).expect_everywhere(1);
        stack.get("/api/chat", &next.token).expect(401);
    }
}

#[test]
fn a_wrong_configuration_is_refused_with_what_to_write() {
    let stack = stack();
    let config = fs::read_to_string(stack.envoy.config_file()).expect("the configuration");
    let validate = |text: &str| {
        let file = stack.directory().join("wrong.yaml");
        fs::write(&file, text).expect("a file");
        let output = Command::new(binaries::envoy())
            .args(["--mode", "validate", "--config-path"])
            .arg(&file)
            .args(["--component-log-level", "dynamic_modules:info"])
            .output()
            .expect("Envoy");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (valid, said) = validate(&config);
    assert!(valid && said.contains("ABI version v0.2.0 matched"), "{said}");
    let (valid, said) = validate(&config.replace("sync_cluster", "sink_cluster"));
    assert!(
        !valid && said.contains("unknown field `sink_cluster`") && said.contains("an Envoy cluster"),
        "{said}"
    );
}

#[test]
fn a_proxy_says_who_it_is_and_ends_in_peace() {
    let mut stack = stack();
    let fleet = stack.api().fleet();
    let (proxy, version) = (&fleet[0], fleet[0]["filter"].as_str().unwrap_or_default());
    assert_eq!(
        (&proxy["id"], &proxy["cluster"], version.ends_with("+module")),
        (&json!("envoy-1"), &json!("e2e"), true)
    );
    // Both workers' and the main thread's, from the first question on.
    assert_eq!(proxy["workers"], 3, "{proxy}");
    let status = stack.envoy.stop();
    assert!(status.success(), "{status}: {}", stack.envoy.log_text());

    // Where the command line does not say, or not so, the environment does; nothing in it says nothing.
    stack.envoy.use_variable("KEYGATE_PROXY_ID", "by-variable");
    stack.envoy.use_variable("KEYGATE_PROXY_CLUSTER", "");
    stack.start_envoy();
    stack.envoy.wait_ready();
    let fleet = stack.api().fleet();
    let named = fleet.iter().find(|proxy| proxy["id"] == "by-variable");
    assert_eq!(named.map(|proxy| &proxy["cluster"]), Some(&json!("e2e")), "{fleet:?}");
}

/// Names of Envoy's dynamic module ABI among the dynamic symbols of a file.
fn abi_symbols(file: &std::path::Path, which: &str) -> BTreeSet<String> {
    let output = Command::new("nm").args(["-D", "--format=just-symbols", which]).arg(file).output();
    let output = output.expect("nm, which comes with the linker");
    assert!(output.status.success(), "nm: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("names");
    text.lines().filter(|name| name.starts_with("envoy_dynamic_module_")).map(ToOwned::to_owned).collect()
}

#[test]
fn envoy_has_every_function_that_the_module_declares() {
    let declared = abi_symbols(&binaries::module(), "--undefined-only");
    assert!(declared.len() > 20, "{declared:?}");
    let exported = abi_symbols(&binaries::envoy(), "--defined-only");
    let missing: Vec<_> = declared.difference(&exported).collect();
    assert!(missing.is_empty(), "Envoy does not export {missing:?}");
}

#[test]
fn envoy_looks_up_every_hook_that_the_module_exports() {
    let hooks = abi_symbols(&binaries::module(), "--defined-only");
    assert!(hooks.len() > 20, "{hooks:?}");
    // Envoy finds hooks by name, so each name is a string in it.
    let envoy = fs::read(binaries::envoy()).expect("Envoy");
    let is_of_abi = |name: &&[u8]| name.starts_with(b"envoy_dynamic_module_");
    let names: BTreeSet<&[u8]> = envoy.split(|byte| *byte == 0).filter(is_of_abi).collect();
    let unknown: Vec<_> = hooks.iter().filter(|hook| !names.contains(hook.as_bytes())).collect();
    assert!(unknown.is_empty(), "Envoy does not look up {unknown:?}");
}
