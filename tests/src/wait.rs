//! The only way to wait: for a condition, with a deadline.

use std::time::{Duration, Instant};

/// How often a condition is looked at. Short beside what is waited for (a process, a poll).
const INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `find` finds something. Panics when it does not in time; `what` completes "waited in
/// vain for …".
#[track_caller]
pub fn wait_for<T>(within: Duration, what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {within:?} in vain for {what}");
        std::thread::sleep(INTERVAL);
    }
}

/// Waits until `condition` holds. Panics when it does not in time.
#[track_caller]
pub fn wait_until(within: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(within, what, || condition().then_some(()));
}
