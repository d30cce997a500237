//! The wall clock, read seldom.

use crate::host;

/// For so long the wall clock is reckoned from the monotonic one, in nanoseconds: as long as a worker trusts its copy of
/// the state. A host's clock that is set is noticed then.
const READ_EVERY_NS: u64 = keygate_core::replica::LOOK_EVERY_NS;

/// What the wall clock said last.
#[derive(Debug, Default)]
pub struct Clock {
    /// Unix milliseconds, and the monotonic clock then, nanoseconds.
    read: Option<(u64, u64)>,
}

impl Clock {
    /// Unix milliseconds.
    pub fn unix_ms(&mut self, now_ns: u64) -> u64 {
        let reckoned = self.read.and_then(|(unix_ms, then_ns)| {
            let since_ns = now_ns.checked_sub(then_ns).filter(|since| *since < READ_EVERY_NS)?;
            Some(unix_ms.saturating_add(since_ns / 1_000_000))
        });
        reckoned.unwrap_or_else(|| {
            let unix_ms = host::unix_ms();
            self.read = Some((unix_ms, now_ns));
            unix_ms
        })
    }
}
