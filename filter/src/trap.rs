//! Only with feature `trap`: lets a test make a VM trap, to see that the others go on and that nothing gets
//! through meanwhile; and lets it say how long the units of a
//! limit are elsewhere.

use keygate_core::decide::header_map::HeaderMap;
use keygate_core::decide::limits::{Left, Limit};
use keygate_core::decide::refusal::Refusal;
use keygate_core::decide::{Decision, Reason, Verdict};
use keygate_core::shm::SharedData as _;

use crate::host;

#[cfg(not(debug_assertions))]
compile_error!("feature `trap` is for tests: it must not be in a release build");

const HEADER: &str = "x-trap";
const LEADER: &str = "keygate/trap-leader";
/// So many times in a row a request is pending that a test says it of.
const LOOKS: u8 = 3;

/// A request with `x-trap: worker` traps its worker; one with `x-trap: leader` whichever VM leads.
pub fn on_request(headers: &HeaderMap) {
    match headers.value(HEADER) {
        b"worker" => trap(),
        b"leader" => {
            let _raced = host::Shared.set(LEADER, &[1], None);
        }
        _ => {}
    }
}

/// The first times that a request with `x-trap: pending` is decided on, the units of its limit are elsewhere; with
/// `x-trap: pending-worker` its worker traps after that, with `x-trap: pending-always` they never come.
pub fn on_decision(decision: Decision<'_>) -> Decision<'_> {
    let Some(headers) = host::request_headers() else { return decision };
    let asked = headers.value(HEADER);
    if !asked.starts_with(b"pending") {
        return decision;
    }
    // Envoy gives each request an id of its own.
    let key = format!("keygate/trap-pending/{}", String::from_utf8_lossy(headers.value("x-request-id")));
    let looks = host::Shared.get(&key).and_then(|(value, _)| value.first().copied()).unwrap_or(0);
    let _raced = host::Shared.set(&key, &[looks.saturating_add(1)], None);
    if looks < LOOKS || asked == b"pending-always" {
        let left = Left { limit: Limit { units: 10, window_s: 60 }, remaining: 7, reset_s: 1 };
        let (verdict, reason) = (Verdict::Refuse(Refusal::RateLimited), Reason::LimitPending);
        return Decision { verdict, reason, left: Some(left), ..decision };
    }
    if asked == b"pending-worker" {
        trap();
    }
    decision
}

/// The leader's turn.
pub fn on_leader_tick() {
    if host::Shared.get(LEADER).is_some_and(|(value, _)| value == [1]) {
        let _raced = host::Shared.set(LEADER, &[0], None);
        trap();
    }
}

#[allow(clippy::panic)]
fn trap() {
    panic!("a test asked for this trap");
}
