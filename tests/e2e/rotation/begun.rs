//! Beginning a rotation: once, however often and by however many it is asked for.

use std::sync::Barrier;

use keygate_e2e::{Request, Response, SOON, Stack, wait_for, wait_until};
use serde_json::json;

use super::{ROTATE, active, stage, status, text, the_one_active};

/// The answers to callers that all ask at once.
pub fn at_once(callers: usize, ask: impl Fn(usize) -> Response + Sync) -> Vec<Response> {
    let barrier = Barrier::new(callers);
    let (barrier, ask) = (&barrier, &ask);
    std::thread::scope(|scope| {
        let call = |caller| {
            scope.spawn(move || {
                barrier.wait();
                ask(caller)
            })
        };
        let threads: Vec<_> = (0..callers).map(call).collect();
        threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    })
}

#[test]
fn of_sixteen_callers_at_once_one_begins_a_rotation_and_fifteen_are_told_that_one_runs() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let mut kids = vec![active(&api)];
    // The caller's own key is of the first secret, which no immediate one ends here.
    for immediate in [false, false, true, true] {
        let body = json!({ "reason": "all at once", "immediate": immediate });
        let begun = wait_for(SOON, "the moment after the one before to be over", || {
            let answers = at_once(16, |_| api.post(ROTATE, &body));
            let (begun, refused): (Vec<_>, Vec<_>) =
                answers.into_iter().partition(|answer| answer.status == 202);
            assert!(begun.len() <= 1, "{begun:?}");
            for answer in refused {
                answer.expect_problem(409, "rotation_in_progress");
            }
            begun.first().map(Response::json)
        });
        assert_eq!(begun["state"], if immediate { "active" } else { "rotating" }, "{begun}");
        assert_eq!(text(&begun["replaces"]), kids[0], "{begun}");
        let kid = text(&begun["version_id"]);
        wait_until(SOON, "the new secret to sign", || active(&api) == kid);
        let now = status(&api);
        assert_eq!(the_one_active(&now), kid);
        assert_eq!(stage(&api, &kids[0]), if immediate { "expired" } else { "previous" });
        kids.insert(0, kid);
        let versions = now["versions"].as_array().expect("versions");
        let all: Vec<String> = versions.iter().map(|version| text(&version["version_id"])).collect();
        assert_eq!(all, kids, "{now}");
        assert_eq!(versions[0]["reason"], "all at once");
    }
}

#[test]
fn a_rotation_that_is_asked_for_again_with_its_idempotency_key_is_the_same_one() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let body = json!({ "reason": "quarterly" });
    let ask = |key: &str, body: &serde_json::Value| {
        api.send(Request::post(ROTATE, body).header("idempotency-key", key))
    };
    let answers = at_once(8, |_| ask("q3", &body));
    let kid = text(&answers[0].json()["version_id"]);
    let same = |answer: Response| assert_eq!(text(&answer.expect(202).json()["version_id"]), kid);
    answers.into_iter().for_each(same);
    wait_until(SOON, "the new secret to sign", || active(&api) == kid);
    let before = status(&api);
    assert_eq!(before["versions"].as_array().map(Vec::len), Some(2), "{before}");
    same(ask("q3", &body));
    ask("q3", &json!({ "reason": "monthly" })).expect_problem(422, "idempotency_key_reused");
    assert_eq!(status(&api)["versions"], before["versions"]);
    // Another key is another rotation, and the first key's is the first one still.
    let next = text(&ask("q4", &body).expect(202).json()["version_id"]);
    assert_ne!(next, kid);
    same(ask("q3", &body));
    wait_until(SOON, "the next secret to sign", || active(&api) == next);
    assert_eq!(status(&api)["versions"].as_array().map(Vec::len), Some(3));
}
