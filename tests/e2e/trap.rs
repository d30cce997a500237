//! VMs that trap: the others go on, nothing gets through meanwhile, and what was enforced stays so.

use std::time::Duration;

use keygate_e2e::{Request, SOON, Stack, wait_until};
use serde_json::json;

/// Longer than a lease, after which another VM leads.
const TAKEOVER: Duration = Duration::from_secs(10);

fn stack() -> Stack {
    Stack::builder().workers(2).trap_filter().start()
}

/// A VM that trapped is made anew by a request to its worker, and until then it cannot lead. So each worker gets one
/// that it answers, or the last VM that is left could be the one that traps next.
fn revive_all_workers(stack: &Stack, good: &str) {
    for worker in &mut stack.envoy.connect_to_all_workers() {
        wait_until(SOON, "the worker to serve", || {
            worker.send(&Request::get("/api/chat").bearer(good)).status == 200
        });
    }
}

#[test]
fn a_leader_that_dies_is_replaced_and_revocations_go_on() {
    let stack = stack();
    let api = stack.api();
    let (revoked, good) = (api.issue("basic"), api.issue("basic"));
    api.post(&format!("/api/admin/keys/{}/revoke?wait=applied", revoked.id), &json!({})).expect(200);
    for _ in 0..3 {
        revive_all_workers(&stack, &good.token);
        let takeovers = stack.envoy.stat("keygate_leader_takeovers_total");
        stack.call(&Request::get("/").header("x-trap", "leader")).expect(200);
        wait_until(TAKEOVER, "another VM to lead", || {
            stack.envoy.stat("keygate_leader_takeovers_total") > takeovers
        });

        let next = api.issue("basic");
        stack.get("/api/chat", &next.token).expect(200);
        api.revoke(&next.id).expect_everywhere(1);
        stack.get("/api/chat", &next.token).expect(401);
        stack.get("/api/chat", &revoked.token).expect(401);
        stack.get("/api/chat", &good.token).expect(200);
    }
}

#[test]
fn a_worker_that_traps_lets_nothing_through_and_comes_back_with_its_state() {
    let mut stack = stack();
    let api = stack.api();
    let (revoked, good) = (api.issue("basic"), api.issue("basic"));
    api.post(&format!("/api/admin/keys/{}/revoke?wait=applied", revoked.id), &json!({})).expect(200);
    // What comes back has its state from the other VMs, not from the control plane.
    stack.control_plane.kill();
    for _ in 0..5 {
        let answer = stack.call(&Request::get("/api/chat").bearer(&good.token).header("x-trap", "worker"));
        assert_eq!(answer.status, 503, "{}", answer.text());
        let seen = stack.upstream.seen();
        wait_until(SOON, "the worker's VM to be made anew", || {
            // Never a 200 for the one, whatever the worker's state; 503 or 200 for the other.
            let answer = stack.get("/api/chat", &revoked.token);
            assert!(matches!(answer.status, 401 | 503), "{} {}", answer.status, answer.text());
            stack.get("/api/chat", &good.token).status == 200
        });
        assert_eq!(stack.upstream.seen(), seen + 1, "only the good key's request got through");
    }
}
