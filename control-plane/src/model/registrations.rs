//! Counts of the keys that each owner registered within the last hour. A key that is no administrator's may make no more
//! keys in an hour than its limit has units. They are made again from the journal at a start; nothing else has them.

use std::collections::BTreeMap;
use std::sync::Arc;

use keygate_core::decide::limits::Limit;
use keygate_core::revocation::Fingerprint;

/// The time within which registrations are counted, in seconds.
pub const WINDOW_S: u64 = 3_600;
/// The most registrations within it where no limit applies.
pub const MOST_UNLIMITED: u32 = 1_000;

/// The owners are cut into 2^10 runs: noting a registration copies the run of its owner, while an older copy of the whole
/// is held.
const BITS: u8 = 10;

/// Registrations by owner and second.
#[derive(Debug, Clone)]
pub struct Registrations(Arc<Vec<Arc<Run>>>);

/// Owners, each with the seconds in which it registered keys, ascending: at most two windows of them.
type Run = BTreeMap<Fingerprint, Vec<Second>>;

#[derive(Debug, Clone, Copy)]
struct Second {
    /// Unix seconds.
    at: u64,
    count: u32,
}

impl Default for Registrations {
    fn default() -> Self {
        Self(Arc::new(vec![Arc::default(); 1 << BITS]))
    }
}

impl Registrations {
    /// Notes a registration at `at` for an owner, and forgets what is out of the window at `now`; both in Unix seconds.
    pub fn note(&mut self, owner: &str, at: u64, now: u64) {
        let fingerprint = Fingerprint::of(owner);
        let run = Arc::make_mut(&mut Arc::make_mut(&mut self.0)[usize::from(fingerprint.shard(BITS))]);
        let counts = |second: &Second| second.at.saturating_add(WINDOW_S) > now;
        run.retain(|_, seconds| {
            if seconds.first().is_some_and(|first| !counts(first)) {
                seconds.retain(counts);
            }
            !seconds.is_empty()
        });
        if !counts(&Second { at, count: 1 }) {
            return;
        }
        let seconds = run.entry(fingerprint).or_default();
        match seconds.binary_search_by_key(&at, |second| second.at) {
            Ok(place) => seconds[place].count = seconds[place].count.saturating_add(1),
            Err(place) => seconds.insert(place, Second { at, count: 1 }),
        }
    }

    /// Whether an owner may register another key at `at`, Unix seconds, within a limit; `None`: it has none.
    ///
    /// # Errors
    /// The Unix second from which on it may.
    pub fn check(&self, owner: &str, limit: Option<Limit>, at: u64) -> Result<(), u64> {
        let most = limit.map_or(MOST_UNLIMITED, |limit| limit.units);
        if most == 0 {
            return Err(at.saturating_add(WINDOW_S));
        }
        let fingerprint = Fingerprint::of(owner);
        let run = &self.0[usize::from(fingerprint.shard(BITS))];
        let seconds = run.get(&fingerprint).map_or(&[][..], Vec::as_slice);
        let mut count = 0_u32;
        // From the latest on: the one that leaves the window first of those that are as many as the limit. Those far
        // ahead are of a clock that was wrong.
        let counts = |second: &&Second| {
            second.at.saturating_add(WINDOW_S) > at && second.at <= at.saturating_add(WINDOW_S)
        };
        for second in seconds.iter().rev().filter(counts) {
            count = count.saturating_add(second.count);
            if count >= most {
                return Err(second.at.saturating_add(WINDOW_S));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(units: u32) -> Option<Limit> {
        Some(Limit { units, window_s: 60 })
    }

    #[test]
    fn no_hour_has_more_registrations_than_the_limit_and_the_time_told_is_true() {
        let mut registrations = Registrations::default();
        for at in [1_000, 1_000, 1_010, 2_000] {
            assert_eq!(registrations.check("acme", limit(4), at), Ok(()));
            registrations.note("acme", at, at);
        }
        assert_eq!(registrations.check("acme", limit(4), 2_000), Err(4_600));
        assert_eq!(registrations.check("acme", limit(4), 4_599), Err(4_600));
        assert_eq!(registrations.check("acme", limit(4), 4_600), Ok(()));
        // Of a lower limit, more have to leave.
        assert_eq!(registrations.check("acme", limit(2), 4_599), Err(4_610));
        assert_eq!(registrations.check("acme", limit(1), 4_609), Err(5_600));
        assert_eq!(registrations.check("acme", limit(5), 2_000), Ok(()));
        assert_eq!(registrations.check("acme", limit(0), 9_000), Err(12_600), "nothing is allowed");
        assert_eq!(registrations.check("other", limit(1), 2_000), Ok(()));
    }

    #[test]
    fn without_a_limit_a_thousand_are_registered_in_an_hour() {
        let mut registrations = Registrations::default();
        for _ in 0..MOST_UNLIMITED {
            assert_eq!(registrations.check("acme", None, 5), Ok(()));
            registrations.note("acme", 5, 5);
        }
        assert_eq!(registrations.check("acme", None, 5), Err(3_605));
        assert_eq!(registrations.check("acme", limit(10_000), 5), Ok(()));
    }

    #[test]
    fn what_is_out_of_the_window_is_forgotten_and_an_older_copy_stays_as_it_was() {
        let mut registrations = Registrations::default();
        for n in 0..5_000 {
            registrations.note(&format!("owner-{n}"), 1_000, 1_000);
        }
        let before = registrations.clone();
        for n in 0..5_000 {
            registrations.note(&format!("late-{n}"), 9_000, 9_000);
        }
        registrations.note("never", 1, 9_000);
        let owners =
            |registrations: &Registrations| registrations.0.iter().map(|run| run.len()).sum::<usize>();
        // Of each run that was noted in; a run has some five owners, so hardly any was not.
        let kept = owners(&registrations);
        assert!((5_000..5_200).contains(&kept), "{kept}");
        assert_eq!(owners(&before), 5_000);
        assert_eq!(before.check("owner-7", limit(1), 1_000), Err(4_600));
    }

    #[test]
    fn clocks_that_are_set_back_or_far_ahead_lock_nobody_out_for_long() {
        let mut registrations = Registrations::default();
        // Taken in from a control plane that is a year ahead, and one that is a little behind.
        registrations.note("acme", 31_536_000, 10_000);
        registrations.note("acme", 9_990, 10_000);
        assert_eq!(registrations.check("acme", limit(1), 10_000), Err(13_590));
        assert_eq!(registrations.check("acme", limit(2), 10_000), Ok(()));
        // Set back by a minute, what was registered since still counts.
        registrations.note("acme", 10_000, 10_000);
        assert_eq!(registrations.check("acme", limit(1), 9_940), Err(13_600));
        assert_eq!(registrations.check("acme", limit(1), 1_000), Ok(()), "by hours");
    }

    #[test]
    fn order_does_not_matter_within_the_window() {
        let times = [500, 100, 300, 100, 400];
        let of = |times: &[u64]| {
            let mut registrations = Registrations::default();
            times.iter().for_each(|at| registrations.note("acme", *at, 500));
            (1..7).map(|units| registrations.check("acme", limit(units), 500)).collect::<Vec<_>>()
        };
        let mut sorted = times;
        sorted.sort_unstable();
        assert_eq!(of(&times), of(&sorted));
    }
}
