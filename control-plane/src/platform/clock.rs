//! Time, read in one place and passed down, so that tests can set it.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Tells the time.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::from_fn(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
    }

    /// A clock that says what a function says, in Unix milliseconds.
    pub fn from_fn(now_ms: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now_ms))
    }

    /// Unix milliseconds.
    pub fn now_ms(&self) -> u64 {
        (self.0)()
    }

    /// Unix seconds.
    pub fn now_s(&self) -> u64 {
        self.now_ms() / 1_000
    }
}

/// A clock that follows the machine's when that is set back, but not when it jumps ahead, until that has
/// stood for an hour. By it is judged what may be forgotten, which cannot be undone.
#[derive(Debug)]
pub struct CautiousClock {
    /// Unix milliseconds, and when it was that.
    anchor: (u64, Instant),
    ahead_since: Option<Instant>,
}

impl CautiousClock {
    /// By how much the clock may be adjusted without that being a jump: milliseconds.
    const TOLERANCE_MS: u64 = 10_000;
    /// How long a jump ahead has to stand.
    const BELIEVED_AFTER: Duration = Duration::from_secs(60 * 60);

    /// Begins with what the machine's clock says.
    pub fn new(wall_ms: u64, now: Instant) -> Self {
        Self { anchor: (wall_ms, now), ahead_since: None }
    }

    /// The time in Unix milliseconds, when the machine's clock says `wall_ms`.
    pub fn at(&mut self, wall_ms: u64, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.anchor.1).as_millis();
        let expected_ms = self.anchor.0.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX));
        if wall_ms <= expected_ms.saturating_add(Self::TOLERANCE_MS) {
            self.ahead_since = None;
        } else {
            let since = *self.ahead_since.get_or_insert(now);
            if now.saturating_duration_since(since) < Self::BELIEVED_AFTER {
                return expected_ms;
            }
        }
        *self = Self::new(wall_ms, now);
        wall_ms
    }
}

/// The end of the year 9999, beyond which RFC 3339 has no times.
const LAST_S: u64 = 253_402_300_799;

/// Whether a clock may say this: it is from 2001 to 2999. Unix seconds.
pub fn is_plausible(unix_s: u64) -> bool {
    (978_307_200..32_503_680_000).contains(&unix_s)
}

/// Unix seconds as RFC 3339 UTC; the end of the year 9999 for what is later.
pub fn rfc3339(unix_s: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(unix_s.min(LAST_S))).to_string()
}

/// Unix milliseconds as RFC 3339 UTC; the end of the year 9999 for what is later.
pub fn rfc3339_ms(unix_ms: u64) -> String {
    let last_ms = LAST_S * 1_000 + 999;
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(unix_ms.min(last_ms))).to_string()
}

/// An RFC 3339 UTC time in Unix milliseconds; 0 for what is none.
pub fn unix_ms(rfc3339: &str) -> u64 {
    let since = humantime::parse_rfc3339(rfc3339).ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_ahead_counts_once_it_has_stood_and_one_back_at_once() {
        const YEAR_MS: u64 = 365 * 86_400_000;
        let begun = Instant::now();
        let after = |s: u64| begun + Duration::from_secs(s);
        let mut clock = CautiousClock::new(1_000_000, begun);
        assert_eq!(clock.at(1_060_000, after(60)), 1_060_000);
        assert_eq!(clock.at(1_125_000, after(120)), 1_125_000, "a small adjustment");
        assert_eq!(clock.at(YEAR_MS, after(180)), 1_185_000, "a jump");
        assert_eq!(clock.at(YEAR_MS + 3_539_000, after(180 + 3_539)), 1_185_000 + 3_539_000);
        assert_eq!(clock.at(4_785_000, after(3_780)), 4_785_000, "it was set right");
        assert_eq!(clock.at(YEAR_MS, after(3_840)), 4_845_000);
        assert_eq!(clock.at(YEAR_MS + 3_600_000, after(7_440)), YEAR_MS + 3_600_000, "it stands");
        assert_eq!(clock.at(2_000_000, after(7_500)), 2_000_000, "back at once");
    }
}
