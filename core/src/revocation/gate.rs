//! The gate in front of the exact set: a Bloom filter (Bloom, 1970) per shard, held by each worker, so
//! that a good key is cleared by a few reads of the worker's own memory.
//!
//! A worker derives the gate of a shard from the shard itself, the first time that it needs it. So no
//! Bloom filter crosses the wire, none can be out of step with the set, and taking a snapshot over
//! stalls nobody: until a shard's gate is there, its exact entries answer. A hit in the gate is looked up
//! in the exact shard, so its false positives (about 1 in 10,000) cost time and never refuse anybody.

use crate::revocation::{Fingerprint, Op, Revocations, ShardView, Standing};

/// Bits of the filter for each entry. With [`PROBES`] the false positive rate is (1 - e^(-12/18))^12 = 1.8e-4
/// at full capacity, and 6.4e-5 when derived, since a ninth of the room is free then.
const BITS_PER_ENTRY: usize = 18;
/// Probes of the filter for each look-up; a miss ends at the first zero bit, after two on average.
const PROBES: u32 = 12;
/// The smallest capacity, in entries.
const MIN_CAPACITY: usize = 128;

/// Where a worker finds the exact shards: Envoy's shared data, or memory in a test.
pub trait ShardSource {
    /// The bytes of shard `index`, as [`crate::revocation::Shard::encode`] wrote them.
    fn shard(&mut self, index: u16) -> Option<Vec<u8>>;
}

/// The gates of all shards of one layout.
#[derive(Debug, Default)]
pub struct Gate {
    bits: u8,
    blooms: Vec<Option<Bloom>>,
}

impl Gate {
    /// No gate derived yet, for 2^`bits` shards.
    pub fn new(bits: u8) -> Self {
        let shards = 1_usize.checked_shl(u32::from(bits)).unwrap_or(1);
        Self { bits, blooms: std::iter::repeat_with(|| None).take(shards).collect() }
    }

    /// The layout, as a power of two.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Takes note of a change that the exact set already has. Bits are only ever added: a fingerprint
    /// that left stays a false positive until the gate is derived again.
    pub fn note(&mut self, op: Op) {
        let (Op::Revoke(fingerprint) | Op::Suspend(fingerprint)) = op else { return };
        if let Some(slot) = self.blooms.get_mut(usize::from(fingerprint.shard(self.bits)))
            && let Some(bloom) = slot
        {
            if bloom.is_full() {
                *slot = None; // Derived again, larger, at the next look-up.
            } else {
                bloom.insert(fingerprint);
            }
        }
    }

    /// How a key stands; `source` is asked for a shard whose gate is not derived yet, and on a hit.
    pub fn standing(&mut self, fingerprint: Fingerprint, source: &mut impl ShardSource) -> Standing {
        let index = fingerprint.shard(self.bits);
        let Some(slot) = self.blooms.get_mut(usize::from(index)) else { return Standing::Unknown };
        if let Some(bloom) = slot
            && !bloom.may_contain(fingerprint)
        {
            return Standing::Clear;
        }
        let Some(bytes) = source.shard(index) else { return Standing::Unknown };
        let Ok(shard) = ShardView::new(&bytes) else { return Standing::Unknown };
        if !shard.is(self.bits, index) {
            return Standing::Unknown;
        }
        if slot.is_none() {
            *slot = Some(Bloom::of(shard.fingerprints(), shard.len()));
        }
        shard.standing(fingerprint)
    }

    /// Derives the next gate that is missing; `false` when all are there. For idle moments.
    pub fn derive_next(&mut self, source: &mut impl ShardSource) -> bool {
        let Some(missing) = self.blooms.iter().position(Option::is_none) else { return false };
        let Ok(index) = u16::try_from(missing) else { return false };
        let Some(bytes) = source.shard(index) else { return false };
        match ShardView::new(&bytes) {
            Ok(shard) if shard.is(self.bits, index) => {
                if let Some(slot) = self.blooms.get_mut(missing) {
                    *slot = Some(Bloom::of(shard.fingerprints(), shard.len()));
                }
                true
            }
            _ => false,
        }
    }

    /// Bytes of memory that the filters have.
    pub fn memory_bytes(&self) -> usize {
        self.blooms.iter().flatten().map(|bloom| bloom.words.len().saturating_mul(8)).sum()
    }
}

/// A gate together with where its shards are: what a decision asks.
pub struct Gated<'a, S> {
    /// The gate.
    pub gate: &'a mut Gate,
    /// The exact shards behind it.
    pub source: S,
}

impl<S: ShardSource> Revocations for Gated<'_, S> {
    fn standing(&mut self, fingerprint: Fingerprint) -> Standing {
        self.gate.standing(fingerprint, &mut self.source)
    }
}

/// Bits that a gate over `entries` has, and the false positive rate expected of it.
pub fn size_for(entries: usize) -> (usize, f64) {
    let bits = Bloom::words_for(entries).saturating_mul(64);
    #[allow(clippy::cast_precision_loss)]
    let load = f64::from(PROBES) * entries as f64 / bits as f64;
    (bits, (1.0 - (-load).exp()).powf(f64::from(PROBES)))
}

#[derive(Debug)]
struct Bloom {
    words: Vec<u64>,
    room: usize,
}

impl Bloom {
    fn capacity_for(entries: usize) -> usize {
        // An eighth of room to grow before it is derived again: 2.5 bytes an entry in all.
        entries.saturating_add(entries / 8).max(MIN_CAPACITY)
    }

    fn words_for(entries: usize) -> usize {
        Self::capacity_for(entries).saturating_mul(BITS_PER_ENTRY).div_ceil(64)
    }

    fn of(fingerprints: impl Iterator<Item = Fingerprint>, count: usize) -> Self {
        let mut bloom = Self {
            words: vec![0; Self::words_for(count)],
            room: Self::capacity_for(count).saturating_sub(count),
        };
        for fingerprint in fingerprints {
            bloom.set(fingerprint);
        }
        bloom
    }

    fn is_full(&self) -> bool {
        self.room == 0
    }

    fn insert(&mut self, fingerprint: Fingerprint) {
        self.room = self.room.saturating_sub(1);
        self.set(fingerprint);
    }

    fn set(&mut self, fingerprint: Fingerprint) {
        let words = self.words.len();
        for (word, mask) in probes(fingerprint, words) {
            if let Some(word) = self.words.get_mut(word) {
                *word |= mask;
            }
        }
    }

    fn may_contain(&self, fingerprint: Fingerprint) -> bool {
        probes(fingerprint, self.words.len())
            .all(|(word, mask)| self.words.get(word).is_none_or(|word| word & mask != 0))
    }
}

/// The bits of a fingerprint: double hashing (Kirsch and Mitzenmacher, 2006), both hashes mixed from the
/// fingerprint, whose own leading bits are the same for all of a shard.
fn probes(fingerprint: Fingerprint, words: usize) -> impl Iterator<Item = (usize, u64)> {
    let bits = u64::try_from(words).unwrap_or(u64::MAX).saturating_mul(64);
    let first = mix(fingerprint.0);
    let step = mix(fingerprint.0 ^ 0x9e37_79b9_7f4a_7c15) | 1;
    (0..PROBES).map(move |probe| {
        let hash = first.wrapping_add(u64::from(probe).wrapping_mul(step));
        // The high half of a product spreads evenly over any number of bits (Lemire, 2016).
        let bit = u64::try_from((u128::from(hash).wrapping_mul(u128::from(bits))) >> 64).unwrap_or(0);
        (usize::try_from(bit / 64).unwrap_or(0), 1_u64.wrapping_shl(u32::try_from(bit % 64).unwrap_or(0)))
    })
}

/// The finaliser of MurmurHash3: a bijection that spreads every input bit over the output.
fn mix(mut value: u64) -> u64 {
    value ^= value >> 33;
    value = value.wrapping_mul(0xff51_afd7_ed55_8ccd);
    value ^= value >> 33;
    value = value.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::revocation::{ExactSet, Shard};

    #[derive(Default)]
    struct Memory {
        shards: BTreeMap<u16, Vec<u8>>,
        asked: usize,
    }

    impl Memory {
        fn of(set: &ExactSet) -> Self {
            let shards = set.shards().iter().map(|shard| (shard.index(), shard.encode())).collect();
            Self { shards, asked: 0 }
        }
    }

    impl ShardSource for Memory {
        fn shard(&mut self, index: u16) -> Option<Vec<u8>> {
            self.asked += 1;
            self.shards.get(&index).cloned()
        }
    }

    fn revoke(range: std::ops::Range<u32>) -> Vec<Op> {
        range.map(|n| Op::Revoke(Fingerprint::of(&format!("jti-{n}")))).collect()
    }

    #[test]
    fn no_wrong_answer_and_few_looks_behind_the_gate() {
        let set = ExactSet::of(&revoke(0..20_000));
        let (mut source, mut gate) = (Memory::of(&set), Gate::new(set.bits()));
        while gate.derive_next(&mut source) {}
        source.asked = 0;
        for op in revoke(0..20_000) {
            assert_eq!(gate.standing(op.fingerprint(), &mut source), Standing::Revoked);
        }
        assert_eq!(source.asked, 20_000);
        source.asked = 0;
        for op in revoke(20_000..220_000) {
            assert_eq!(gate.standing(op.fingerprint(), &mut source), Standing::Clear);
        }
        // Expected: 200,000 × 6.4e-5 = 13.
        assert!(source.asked <= 35, "{} false positives in 200,000", source.asked);
        let bytes_per_entry = gate.memory_bytes() / set.len();
        assert!(bytes_per_entry < 3, "{bytes_per_entry}");
    }

    #[test]
    fn a_change_is_seen_with_and_without_a_derived_gate() {
        for derived in [false, true] {
            let mut set = ExactSet::default();
            let (mut source, mut gate) = (Memory::of(&set), Gate::new(0));
            let f = Fingerprint::of("a");
            if derived {
                assert_eq!(gate.standing(f, &mut source), Standing::Clear);
            }
            for (op, want) in [
                (Op::Suspend(f), Standing::Suspended),
                (Op::Resume(f), Standing::Clear),
                (Op::Revoke(f), Standing::Revoked),
                (Op::Forget(f), Standing::Clear),
            ] {
                set.apply(op);
                source.shards = Memory::of(&set).shards;
                gate.note(op);
                assert_eq!(gate.standing(f, &mut source), want, "{op:?}");
            }
        }
    }

    #[test]
    fn a_gate_that_is_full_is_derived_again() {
        let (mut set, mut gate) = (ExactSet::default(), Gate::new(0));
        gate.derive_next(&mut Memory::of(&set));
        let small = gate.memory_bytes();
        for op in revoke(0..1_000) {
            set.apply(op);
            gate.note(op);
        }
        let mut source = Memory::of(&set);
        for op in revoke(0..1_000) {
            assert_eq!(gate.standing(op.fingerprint(), &mut source), Standing::Revoked);
        }
        assert!(gate.memory_bytes() > small * 4);
    }

    #[test]
    fn what_cannot_be_known_is_unknown() {
        let mut gate = Gate::new(1);
        let mut source = Memory::default();
        assert_eq!(gate.standing(Fingerprint(0), &mut source), Standing::Unknown);
        source.shards.insert(0, b"garbage".to_vec());
        assert_eq!(gate.standing(Fingerprint(0), &mut source), Standing::Unknown);
        source.shards.insert(0, Shard::empty(0, 0).encode()); // of another layout
        assert_eq!(gate.standing(Fingerprint(0), &mut source), Standing::Unknown);
        source.shards.insert(0, Shard::empty(1, 0).encode());
        assert_eq!(gate.standing(Fingerprint(0), &mut source), Standing::Clear);
    }

    #[test]
    fn the_size_is_what_the_rate_needs() {
        let (bits, rate) = size_for(1_000_000);
        assert!(bits / 8 <= 3_000_000, "{bits}");
        assert!(rate < 1e-4, "{rate}");
    }

    proptest! {
        #[test]
        fn the_gate_never_hides_an_entry(values in prop::collection::vec(any::<u64>(), 0..300), bits in 0u8..5) {
            let (mut gate, mut set) = (Gate::new(bits), ExactSet::default());
            let mut shards: BTreeMap<u16, Shard> =
                (0..1u16 << bits).map(|index| (index, Shard::empty(bits, index))).collect();
            for (n, value) in values.iter().enumerate() {
                let op = Op::Revoke(Fingerprint(*value));
                set.apply(op);
                shards.get_mut(&op.fingerprint().shard(bits)).unwrap().apply(op);
                gate.note(op);
                let mut source = Memory { shards: shards.iter().map(|(i, s)| (*i, s.encode())).collect(), asked: 0 };
                if n % 7 == 0 {
                    gate.derive_next(&mut source);
                }
                prop_assert_eq!(gate.standing(Fingerprint(*value), &mut source), Standing::Revoked);
            }
        }
    }
}
