//! The wall clock, read seldom: to read it is a call into the proxy.

use crate::worker::replica::LOOK_EVERY_NS;

/// What the wall clock said last. Until [`LOOK_EVERY_NS`] later, as long as a worker trusts its copy of the state, the time
/// is reckoned from there by the monotonic clock. A host's clock that is set is noticed then.
#[derive(Debug, Default)]
pub struct WallClock {
    /// Unix milliseconds, and the monotonic clock then, nanoseconds.
    read: Option<(u64, u64)>,
}

impl WallClock {
    /// Unix milliseconds at `now_ns` of the monotonic clock; `read` reads the wall clock.
    pub fn unix_ms(&mut self, now_ns: u64, read: impl FnOnce() -> u64) -> u64 {
        let reckoned = self.read.and_then(|(unix_ms, then_ns)| {
            // A clock that went backwards is a reason to read, too.
            let since_ns = now_ns.checked_sub(then_ns).filter(|since| *since < LOOK_EVERY_NS)?;
            Some(unix_ms.saturating_add(since_ns / 1_000_000))
        });
        reckoned.unwrap_or_else(|| {
            let unix_ms = read();
            self.read = Some((unix_ms, now_ns));
            unix_ms
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn it_is_read_when_the_state_would_be_looked_at_and_reckoned_between() {
        let mut clock = WallClock::default();
        let at = |clock: &mut WallClock, now_ns, says: Option<u64>| {
            clock.unix_ms(now_ns, || says.expect("it need not be read"))
        };
        assert_eq!(at(&mut clock, 100 * MS, Some(5_000)), 5_000);
        assert_eq!(at(&mut clock, 100 * MS, None), 5_000);
        assert_eq!(at(&mut clock, 101 * MS, None), 5_001);
        assert_eq!(at(&mut clock, 100 * MS + LOOK_EVERY_NS - 1, None), 5_001);
        // It was set meanwhile, ahead and back again: both hold at once.
        assert_eq!(at(&mut clock, 100 * MS + LOOK_EVERY_NS, Some(9_000)), 9_000);
        assert_eq!(at(&mut clock, 100 * MS + 2 * LOOK_EVERY_NS, Some(4_000)), 4_000);
        assert_eq!(at(&mut clock, 7 * MS, Some(4_001)), 4_001, "the monotonic clock went back");
        assert_eq!(at(&mut clock, u64::MAX, Some(u64::MAX)), u64::MAX);
    }
}
