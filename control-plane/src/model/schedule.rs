//! When rotations are begun by themselves: a cron expression, in UTC.

use std::str::FromStr as _;

use chrono::{DateTime, Utc};
use croner::Cron;

/// At 03:00 UTC on the first day of each quarter.
pub const QUARTERLY: &str = "0 3 1 1,4,7,10 *";

/// Times that come again and again.
#[derive(Debug, Clone)]
pub struct Schedule(Cron);

impl Schedule {
    /// Reads a cron expression of five fields: minute, hour, day of the month, month, day of the week.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.split_whitespace().count() != 5 && !text.starts_with('@') {
            return Err(format!(
                "{text:?} is not a cron expression of five fields, such as \"{QUARTERLY}\", nor \"off\""
            ));
        }
        let schedule = Cron::from_str(text).map(Self).map_err(|error| format!("{text:?}: {error}"))?;
        // One that never comes, as the 30th of February, is a mistake.
        match schedule.next_after(0) {
            Some(_) => Ok(schedule),
            None => Err(format!("{text:?} names no time that ever comes")),
        }
    }

    /// The first time after `at`; both in Unix seconds.
    pub fn next_after(&self, at: u64) -> Option<u64> {
        let at: DateTime<Utc> = DateTime::from_timestamp(i64::try_from(at).ok()?, 0)?;
        let next = self.0.find_next_occurrence(&at, false).ok()?;
        u64::try_from(next.timestamp()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::clock;

    #[test]
    fn a_quarter_follows_on_a_quarter() {
        let schedule = Schedule::parse(QUARTERLY).unwrap();
        let mut at = 1_767_225_600; // 2026-01-01T00:00:00Z
        let mut times = Vec::new();
        for _ in 0..5 {
            at = schedule.next_after(at).unwrap();
            times.push(clock::rfc3339(at));
        }
        assert_eq!(times[..2], ["2026-01-01T03:00:00Z", "2026-04-01T03:00:00Z"]);
        assert_eq!(times[4], "2027-01-01T03:00:00Z");
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_the_reason() {
        for bad in ["", "quarterly", "* * *", "61 * * * *", "0 3 30 2 *", "0 0 3 1 1 * 2026"] {
            assert!(Schedule::parse(bad).is_err(), "{bad}");
        }
        assert!(Schedule::parse("*/5 * * * *").is_ok());
    }
}
