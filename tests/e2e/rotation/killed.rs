//! A control plane that is killed at any step of a rotation: started again, it has exactly one secret that signs, goes
//! on by itself, and no proxy refuses a key that counts.

use std::collections::BTreeSet;

use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Api, Key, Request, SOON, Stack, trace, wait_for, wait_until};
use serde_json::{Value, json};

use super::{
    ROTATE, active, all_workers, assert_all_answer, kid_of, rotated, status, text, the_one_active, wait_tidy,
};

/// What a secret's data key and its records are made durable with.
const CALLS: [&str; 4] = ["rename", "renameat2", "fsync", "fdatasync"];

/// How many rotations this control plane has completed since it was started; `None` when it does not answer.
fn completed(api: &Api) -> Option<f64> {
    let metrics = Metrics::try_of(api)?;
    Some(metrics.value("keygate_secret_rotations_total{outcome=\"completed\"}"))
}

/// What became of a rotation that was to be killed.
struct Outcome {
    /// The new secret, if the call was answered.
    answered: Option<String>,
    /// Whether it was killed before it was all done.
    killed: bool,
}

/// Begins a rotation and has the control plane killed when it enters a system call for the `nth` time from then on.
#[track_caller]
fn begin_and_kill(stack: &mut Stack, api: &Api, body: &Value, call: &str, nth: usize) -> Outcome {
    let before = completed(api).expect("it runs");
    let killer = stack.control_plane.kill_at(call, nth);
    // What is refused, since the one before is a moment ago, writes nothing.
    let answered =
        wait_for(SOON, "an answer or the end", || match api.try_send(Request::post(ROTATE, body)) {
            Ok(answer) if answer.status == 409 => None,
            Ok(answer) => Some(Some(text(&answer.expect(202).json()["version_id"]))),
            Err(_) => Some(None),
        });
    let killed = wait_for(SOON, "its end or the rotation's", || {
        if stack.control_plane.ended().is_some() {
            return Some(true);
        }
        // Counted after everything else that the writer does for it.
        completed(api).filter(|now| *now > before).map(|_| false)
    });
    if killed {
        stack.control_plane.wait_end();
        killer.wait(SOON);
        stack.control_plane.start();
    } else {
        killer.stop();
    }
    Outcome { answered, killed }
}

/// Kills the control plane at every step of rotations, one step a rotation. How often.
fn kill_at_every_step(algorithm: &str, immediate: bool) -> usize {
    trace::assert_possible();
    let config = format!("[secrets]\nalgorithm = \"{algorithm}\"\n");
    let mut stack = Stack::builder().workers(2).config(&config).start();
    let api = stack.api();
    // The admin's key is of a secret that none of the rotations below ends.
    rotated(&api);
    let mut workers = all_workers(&[&stack.envoy]);
    let body = json!({ "immediate": immediate });
    let mut keys: Vec<Key> = Vec::new();
    let mut ended: BTreeSet<String> = BTreeSet::new();
    let (mut kills, mut kept, mut lost) = (0, 0, 0);
    for call in CALLS {
        for nth in 1.. {
            let before = active(&api);
            keys.push(api.issue("basic"));
            let outcome = begin_and_kill(&mut stack, &api, &body, call, nth);
            the_one_active(&status(&api));
            // A key that is issued now passes at once, whatever becomes of the rotation.
            let new = api.issue("basic");
            assert_all_answer(&mut workers, &new, 200);
            keys.push(new);
            wait_until(SOON, "the rotation to be over", || status(&api)["rotation"].is_null());
            let after = the_one_active(&status(&api));
            match &outcome.answered {
                Some(kid) => assert_eq!(&after, kid, "{call} {nth}: what was answered is gone"),
                None if after == before => lost += 1,
                None => kept += 1,
            }
            if immediate && after != before {
                ended.insert(before);
            }
            keys.push(api.issue("basic"));
            for key in &keys {
                let wanted = if ended.contains(&kid_of(key)) { 401 } else { 200 };
                assert_all_answer(&mut workers, key, wanted);
            }
            wait_tidy(&stack.control_plane, &api);
            println!("{call} {nth}: killed {}, answered {}", outcome.killed, outcome.answered.is_some());
            kills += usize::from(outcome.killed);
            if !outcome.killed {
                break;
            }
        }
    }
    println!(
        "{algorithm}: {kills} kills; of the rotations that were not answered {kept} took place, {lost} did not"
    );
    stack.envoy.assert_no_vm_died();
    kills
}

#[test]
fn at_any_step_of_a_rotation_of_an_hmac_secret() {
    assert!(kill_at_every_step("HS256", false) >= 10);
}

#[test]
fn at_any_step_of_a_rotation_of_a_key_pair() {
    assert!(kill_at_every_step("ES256", false) >= 8);
}

#[test]
fn at_any_step_of_an_immediate_rotation() {
    assert!(kill_at_every_step("ES256", true) >= 6);
}
