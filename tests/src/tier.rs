//! The tier of the tests: the quick one, or the full one, which repeats more where rare faults are looked for.

use std::env;

/// The `quick` count, or in the full tier, with `KEYGATE_TEST_TIER=full`, the `full` one.
pub fn repeats<T>(quick: T, full: T) -> T {
    match env::var("KEYGATE_TEST_TIER").as_deref() {
        Ok("full") => full,
        Ok("quick") | Err(_) => quick,
        Ok(other) => panic!("KEYGATE_TEST_TIER is {other:?}; it may be quick or full"),
    }
}
