//! Immediate rotations: the old secret and all its keys end in one version, and nothing is signed with the new one that
//! a proxy would refuse.

use keygate_e2e::api::Propagation;
use keygate_e2e::{Connection, Key, Request, SOON, Stack, trace, wait_until};
use serde_json::json;

use super::{
    ROTATE, active, all_workers, assert_all_answer, begin, begin_at, chat, kid_of, rotated, stage, status,
    text, the_one_active,
};

#[test]
fn once_applied_every_worker_refuses_the_old_secrets_keys_and_takes_the_new_ones() {
    const ROUNDS: usize = 5;

    let stack = Stack::builder().workers(2).start();
    let second = stack.another_envoy("envoy-2", 2);
    let mut api = stack.api();
    wait_until(SOON, "two proxies in the fleet", || api.fleet().len() == 2);
    let mut workers = all_workers(&[&stack.envoy, &second]);
    for _ in 0..ROUNDS {
        let old = api.issue("basic");
        assert_all_answer(&mut workers, &old, 200);
        let answer =
            begin_at(&api, &format!("{ROTATE}?wait=applied&timeout=10s"), &json!({ "immediate": true }));
        Propagation::from_answer(&answer).expect_everywhere(2);
        assert_all_answer(&mut workers, &old, 401);
        // The caller would have locked themselves out.
        let (locked_out, kid) = (api.clone(), text(&answer["version_id"]));
        locked_out.call(&Request::get("/api/auth/validate").bearer(locked_out.key())).expect(401);
        api = api.with_key(&text(&answer["api_key"]));
        assert_eq!((stage(&api, &kid), stage(&api, &kid_of(&old))), ("active".into(), "expired".into()));
        assert_eq!(answer["ends"]["retire"], "at_once", "{answer}");
        let new = api.issue("basic");
        assert_eq!(kid_of(&new), kid);
        assert_all_answer(&mut workers, &new, 200);
    }
}

#[test]
fn a_key_issued_right_after_the_answer_is_good_on_every_worker_at_its_first_use() {
    const ROUNDS: usize = 5;

    let stack = Stack::builder().workers(2).start();
    let second = stack.another_envoy("envoy-2", 2);
    let api = stack.api();
    wait_until(SOON, "two proxies in the fleet", || api.fleet().len() == 2);
    // The caller's key is of a secret that is not ended below, so its renewal is not waited for either.
    rotated(&api);
    let mut workers = all_workers(&[&stack.envoy, &second]);
    for _ in 0..ROUNDS {
        let old = api.issue("basic");
        let kid = text(&begin(&api, &json!({ "immediate": true }))["version_id"]);
        let new = api.issue("basic");
        assert_eq!(kid_of(&new), kid);
        assert_all_answer(&mut workers, &new, 200);
        // Who knows the new secret knows that the old one has ended.
        assert_all_answer(&mut workers, &old, 401);
    }
}

#[test]
fn no_key_is_issued_that_a_proxy_would_refuse_which_is_cut_off() {
    let stack = Stack::builder().workers(2).start();
    let (second, mut line) = stack.another_envoy_on_a_line("envoy-2", 2);
    let api = stack.api();
    wait_until(SOON, "two proxies in the fleet", || api.fleet().len() == 2);
    rotated(&api);
    let old = api.issue("basic");
    let mut workers = all_workers(&[&stack.envoy, &second]);
    assert_all_answer(&mut workers, &old, 200);

    line.cut();
    let kid = text(&begin(&api, &json!({ "immediate": true }))["version_id"]);
    let register = Request::post("/api/auth/register", &json!({ "name": "e2e", "role": "basic" }));
    // It waits for a moment, then says so; the caller may try again.
    api.send(register.clone()).expect_problem(503, "unavailable");
    let now = status(&api);
    assert_eq!(
        (&now["rotation"]["version_id"], &now["rotation"]["waiting_for"]),
        (&json!(kid), &json!(["envoy-2"])),
        "{now}"
    );
    stack.envoy.call(&chat(&old)).expect(401);

    // One who waits gets a key as soon as the line is whole.
    let mut waiting = Connection::open(stack.control_plane.api_port()).expect("it listens");
    waiting.begin(&register.bearer(api.key()));
    assert_eq!(status(&api)["rotation"]["waiting_for"], json!(["envoy-2"]));
    line.heal();
    let new = Key::from_answer(&waiting.receive().expect(201).json());
    assert_eq!(kid_of(&new), kid);
    assert_all_answer(&mut workers, &new, 200);
    assert_all_answer(&mut workers, &old, 401);
    assert!(status(&api)["rotation"].is_null());
}

#[test]
fn an_admin_who_never_got_the_answer_gets_in_with_a_new_key_from_the_next_start() {
    trace::assert_possible();
    let mut stack = Stack::builder().workers(1).start();
    let api = stack.api();
    let old = active(&api);
    // Written to the journal, and not answered.
    let killer = stack.control_plane.kill_at("fdatasync", 1);
    let answer = api.try_send(Request::post(ROTATE, &json!({ "immediate": true })));
    assert!(answer.is_err(), "{answer:?}");
    stack.control_plane.wait_end();
    killer.wait(SOON);
    stack.control_plane.start();
    api.get("/api/admin/secrets/status").expect(401);

    stack.control_plane.stop();
    stack.control_plane.want_new_admin_key();
    stack.control_plane.start();
    let api = stack.api();
    let now = status(&api);
    assert_ne!(the_one_active(&now), old);
    let key = api.issue("basic");
    stack.get("/api/chat", &key.token).expect(200);
    stack.get("/api/admin/secrets/status", &api.key()).expect(200);
}
