//! The only way to wait: for a condition, with a deadline.

use std::time::{Duration, Instant};

/// How often a condition is looked at. Short beside what is waited for (a process, a poll).
const INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `find` finds something. Panics when it does not in time; `what` completes "waited in
/// vain for …".
#[track_caller]
pub fn wait_for<T>(within: Duration, what: &str, find: impl FnMut() -> Option<T>) -> T {
    try_wait_for(within, find).unwrap_or_else(|| panic!("waited {within:?} in vain for {what}"))
}

/// Waits until `find` finds something; `None` when it does not in time.
pub fn try_wait_for<T>(within: Duration, mut find: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + within;
    loop {
        let found = find();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Waits until `condition` holds. Panics when it does not in time.
#[track_caller]
pub fn wait_until(within: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(within, what, || condition().then_some(()));
}

/// Lets a moment come that was chosen at random to do something at. Never for something to have happened by then:
/// that is what the others wait for.
pub fn pass(moment: Duration) {
    std::thread::sleep(moment);
}
