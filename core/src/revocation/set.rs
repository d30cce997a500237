//! The whole set, as the control plane has it.

use std::sync::{Arc, OnceLock};

use super::fingerprint::Fingerprint;
use super::operation::Op;
use super::shard::{MAX_SHARD_BITS, Shard};
use super::{Revocations, Standing};

/// Entries of a shard that the layout aims at, on average: 32 KiB, which is copied in about 10 µs.
const TARGET_SHARD_ENTRIES: usize = 4_096;

/// The whole set, shards shared with whoever holds an older copy of it: changing one entry of a million
/// copies 32 KiB, not 8 MB.
#[derive(Debug, Clone)]
pub struct ExactSet {
    bits: u8,
    shards: Vec<Arc<Shard>>,
    len: usize,
}

impl Default for ExactSet {
    fn default() -> Self {
        Self::with_bits(0)
    }
}

impl ExactSet {
    pub(super) fn with_bits(bits: u8) -> Self {
        let count = 1_u16.checked_shl(u32::from(bits)).unwrap_or(1);
        let shards = (0..count).map(|index| Arc::new(Shard::empty(bits, index))).collect();
        Self { bits, shards, len: 0 }
    }

    /// A set of many at once, laid out for them.
    pub fn of(ops: &[Op]) -> Self {
        let mut set = Self::with_bits(bits_for(ops.len()));
        for op in ops {
            set.apply(*op);
        }
        set
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of revoked keys.
    pub fn revoked(&self) -> usize {
        self.shards.iter().map(|shard| shard.revoked()).fold(0, usize::saturating_add)
    }

    /// The number of shards as a power of two.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// The shards in order.
    pub fn shards(&self) -> &[Arc<Shard>] {
        &self.shards
    }

    /// Applies a change.
    pub fn apply(&mut self, op: Op) {
        if let Some(shard) = self.shards.get_mut(usize::from(op.fingerprint().shard(self.bits))) {
            let before = shard.len();
            let shard = Arc::make_mut(shard);
            shard.apply(op);
            self.len = self.len.saturating_sub(before).saturating_add(shard.len());
        }
    }

    /// Drops all that is known of many, in one pass over each shard that has any of them.
    pub fn forget_all(&mut self, fingerprints: &[Fingerprint]) {
        let mut sorted: Vec<u64> = fingerprints.iter().map(|fingerprint| fingerprint.0).collect();
        sorted.sort_unstable();
        let bits = self.bits;
        for run in sorted.chunk_by(|a, b| Fingerprint(*a).shard(bits) == Fingerprint(*b).shard(bits)) {
            let index = run.first().map_or(0, |value| Fingerprint(*value).shard(bits));
            let Some(shard) = self.shards.get_mut(usize::from(index)).map(Arc::make_mut) else { continue };
            let before = shard.len();
            shard.digest = OnceLock::new();
            shard.revoked.retain(|value| run.binary_search(value).is_err());
            shard.suspended.retain(|value| run.binary_search(value).is_err());
            self.len = self.len.saturating_sub(before).saturating_add(shard.len());
        }
    }

    /// The same set cut anew, when it has grown or shrunk so far that its shards are more than twice or
    /// less than an eighth of what they should be; `None` when the cut is right.
    pub fn relaid(&self) -> Option<Self> {
        let wanted = bits_for(self.len);
        if wanted <= self.bits && self.bits.saturating_sub(wanted) < 3 {
            return None;
        }
        let mut runs = Self::with_bits(wanted);
        for shard in &self.shards {
            for (run, suspended) in [(&shard.revoked, false), (&shard.suspended, true)] {
                for value in run {
                    let index = usize::from(Fingerprint(*value).shard(wanted));
                    if let Some(target) = runs.shards.get_mut(index).map(Arc::make_mut) {
                        // Shards are visited in order and their runs ascend, so pushing keeps order.
                        if suspended {
                            target.suspended.push(*value);
                        } else {
                            target.revoked.push(*value);
                        }
                    }
                }
            }
        }
        runs.len = self.len;
        Some(runs)
    }
}

impl Revocations for &ExactSet {
    fn standing(&mut self, fingerprint: Fingerprint) -> Standing {
        match self.shards.get(usize::from(fingerprint.shard(self.bits))) {
            Some(shard) => shard.standing(fingerprint),
            None => Standing::Unknown,
        }
    }
}

/// The layout for a number of entries: twice the target is the most that a shard has on average.
pub(super) fn bits_for(entries: usize) -> u8 {
    (0..MAX_SHARD_BITS)
        .find(|bits| {
            let room = TARGET_SHARD_ENTRIES.saturating_mul(2).checked_shl(u32::from(*bits));
            entries <= room.unwrap_or(usize::MAX)
        })
        .unwrap_or(MAX_SHARD_BITS)
}
