//! Counts of keys and of revocations by the minute.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Counts live keys by role and by the minute in which they expire.
#[derive(Debug, Clone, Default)]
pub struct Census(Arc<BTreeMap<String, BTreeMap<u64, u64>>>);

impl Census {
    pub(super) fn change(&mut self, role: &str, expires_at: u64, by: i64) {
        let minutes = Arc::make_mut(&mut self.0).entry(role.to_owned()).or_default();
        let count = minutes.entry(expires_at / 60).or_default();
        *count = count.saturating_add_signed(by);
    }

    /// Drops what had expired at `until`, Unix seconds.
    pub(super) fn forget(&mut self, until: u64) {
        for minutes in Arc::make_mut(&mut self.0).values_mut() {
            *minutes = minutes.split_off(&(until / 60));
        }
    }

    /// Keys of each role that count at `now`, Unix seconds; to the minute.
    pub fn live(&self, now: u64) -> impl Iterator<Item = (&str, u64)> {
        self.0
            .iter()
            .map(move |(role, minutes)| (role.as_str(), minutes.range(now / 60..).map(|(_, n)| n).sum()))
    }
}

/// Counts revocations of the last day by the minute.
#[derive(Debug, Clone, Default)]
pub struct Recent(pub(super) Arc<BTreeMap<u64, u64>>);

impl Recent {
    const MINUTES: u64 = 24 * 60;

    pub(super) fn add(&mut self, at: u64) {
        let minutes = Arc::make_mut(&mut self.0);
        if let Some(count) = minutes.get_mut(&(at / 60)) {
            *count += 1;
            return;
        }
        minutes.insert(at / 60, 1);
        *minutes = minutes.split_off(&(at / 60).saturating_sub(Self::MINUTES));
    }

    /// Their number in the day before `now`, Unix seconds; to the minute.
    pub fn last_24h(&self, now: u64) -> u64 {
        self.0.range((now / 60).saturating_sub(Self::MINUTES)..).map(|(_, count)| count).sum()
    }
}
