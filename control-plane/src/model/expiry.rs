//! Until when the revocation of each key has to be kept: until the key itself has expired. Proxies do not
//! know these times; the control plane tells them what to forget.

use std::sync::Arc;

use keygate_core::revocation::Fingerprint;

/// The entries are cut into 2^10 runs: noting one of a million copies 16 KiB, not 16 MB, while an older copy
/// of the whole is held.
const BITS: u8 = 10;

/// The end of each revoked or suspended key.
#[derive(Debug, Clone)]
pub struct Expiries(Arc<Vec<Arc<Vec<Entry>>>>);

#[derive(Debug, Clone, Copy)]
struct Entry {
    fingerprint: Fingerprint,
    /// Unix seconds.
    expires_at: u64,
}

impl Default for Expiries {
    fn default() -> Self {
        Self(Arc::new(vec![Arc::default(); 1 << BITS]))
    }
}

impl Expiries {
    /// Notes that a fingerprint is kept until its key expires; the later time of two counts.
    pub fn note(&mut self, fingerprint: Fingerprint, expires_at: u64) {
        let run = self.run(fingerprint);
        match run.binary_search_by_key(&fingerprint, |entry| entry.fingerprint) {
            Ok(position) => run[position].expires_at = run[position].expires_at.max(expires_at),
            Err(position) => run.insert(position, Entry { fingerprint, expires_at }),
        }
    }

    /// Drops a fingerprint that is neither revoked nor suspended any more.
    pub fn drop_one(&mut self, fingerprint: Fingerprint) {
        let run = self.run(fingerprint);
        if let Ok(position) = run.binary_search_by_key(&fingerprint, |entry| entry.fingerprint) {
            run.remove(position);
        }
    }

    /// How many have expired at `until`, Unix seconds.
    pub fn due(&self, until: u64) -> usize {
        self.0.iter().flat_map(|run| run.iter()).filter(|entry| entry.expires_at <= until).count()
    }

    /// Takes out those that have expired at `until`, Unix seconds.
    pub fn take_due(&mut self, until: u64) -> Vec<Fingerprint> {
        let mut due = Vec::new();
        for run in Arc::make_mut(&mut self.0) {
            if run.iter().any(|entry| entry.expires_at <= until) {
                Arc::make_mut(run).retain(|entry| {
                    let expired = entry.expires_at <= until;
                    if expired {
                        due.push(entry.fingerprint);
                    }
                    !expired
                });
            }
        }
        due
    }

    fn run(&mut self, fingerprint: Fingerprint) -> &mut Vec<Entry> {
        Arc::make_mut(&mut Arc::make_mut(&mut self.0)[usize::from(fingerprint.shard(BITS))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_expired_is_taken_once_and_the_later_time_counts() {
        let f = |n: u64| Fingerprint(n.rotate_right(12));
        let mut expiries = Expiries::default();
        for n in 0..5_000 {
            expiries.note(f(n), 100 + n % 10);
        }
        expiries.note(f(0), 500);
        expiries.note(f(0), 200);
        expiries.drop_one(f(10));
        let before = expiries.clone();
        assert_eq!(expiries.due(99), 0);
        assert_eq!(expiries.due(100), 498, "500 end first; one has a later end, one is dropped");
        let due = expiries.take_due(100);
        assert_eq!(due.len(), 498);
        assert!(!due.contains(&f(0)) && !due.contains(&f(10)) && due.contains(&f(20)));
        assert_eq!((expiries.due(100), before.due(100)), (0, 498), "an older copy stays as it was");
        assert_eq!(expiries.take_due(u64::MAX).len(), 4_501);
    }
}
