//! Only with feature `trap`: lets a test make a VM trap, to see that the others go on and that nothing gets
//! through meanwhile.

use keygate_core::header_map::HeaderMap;
use keygate_core::shared::SharedData as _;

use crate::host;

#[cfg(not(debug_assertions))]
compile_error!("feature `trap` is for tests: it must not be in a release build");

const HEADER: &str = "x-trap";
const LEADER: &str = "keygate/trap-leader";

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
