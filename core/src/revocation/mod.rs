//! Who is revoked or suspended: an exact set of fingerprints, cut into shards.
//!
//! The set is exact, so nothing good is ever refused. It is cut by the fingerprint's leading bits into
//! 2^n shards of a few thousand entries; a shard is the unit that is copied on write in the control
//! plane, content-addressed on the wire, and one shared-data value in Envoy.
//!
//! ```text
//! shard on the wire and in shared data, little-endian
//!  0  4  magic "KGX1"
//!  4  1  bits: the set has 2^bits shards, 0 to 12
//!  5  1  zero
//!  6  2  index of this shard
//!  8  4  r: how many are revoked
//! 12  4  s: how many are suspended
//! 16 8r  revoked fingerprints, strictly ascending
//!    8s  suspended fingerprints, strictly ascending
//! ```

pub mod gate;

use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::bytes::{self, Reader, WireError};

/// The most shards: 2^12.
pub const MAX_SHARD_BITS: u8 = 12;
/// The most entries of a shard: its bytes stay below the 256 KiB that one shared-data value may have,
/// since Envoy holds one lock for all of it while it copies.
pub const MAX_SHARD_ENTRIES: usize = 32_000;
/// Entries of a shard that the layout aims at, on average: 32 KiB, which is copied in about 10 µs.
const TARGET_SHARD_ENTRIES: usize = 4_096;
/// The most changes of one delta; a proxy further behind takes a snapshot.
pub const MAX_DELTA_OPS: usize = 65_536;

const SHARD_MAGIC: &[u8; 4] = b"KGX1";
const SHARD_HEADER_BYTES: usize = 16;

/// The first eight bytes of SHA-256 of a `jti`, big-endian: the only thing about a token that crosses
/// the wire. Among 10 million keys and 1 million revocations the chance that any two collide is 5e-7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub u64);

impl Fingerprint {
    /// The fingerprint of a `jti`.
    pub fn of(jti: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(jti).into();
        let mut first = [0; 8];
        first.copy_from_slice(digest.first_chunk::<8>().unwrap_or(&[0; 8]));
        Self(u64::from_be_bytes(first))
    }

    /// Which of 2^`bits` shards it belongs to.
    pub fn shard(self, bits: u8) -> u16 {
        let shift = 64_u32.saturating_sub(u32::from(bits.min(MAX_SHARD_BITS)));
        // bits ≤ 12, so what is left fits sixteen bits.
        u16::try_from(self.0.checked_shr(shift).unwrap_or(0)).unwrap_or(u16::MAX)
    }
}

/// What revocation says of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Neither revoked nor suspended.
    Clear,
    /// Revoked, for good.
    Revoked,
    /// Suspended until resumed.
    Suspended,
    /// The answer cannot be had: the set is being replaced or is damaged. Never a yes.
    Unknown,
}

/// Something that can say how a key stands.
pub trait Revocations {
    /// How the key of this fingerprint stands.
    fn standing(&mut self, fingerprint: Fingerprint) -> Standing;
}

/// One change of the set. Applying one again, or an older one before a newer one again, ends the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Revoke.
    Revoke(Fingerprint),
    /// Suspend.
    Suspend(Fingerprint),
    /// End a suspension; a revocation stays.
    Resume(Fingerprint),
    /// Drop all that is known, once the key itself has expired.
    Forget(Fingerprint),
}

impl Op {
    /// Whom it is about.
    pub fn fingerprint(self) -> Fingerprint {
        match self {
            Self::Revoke(f) | Self::Suspend(f) | Self::Resume(f) | Self::Forget(f) => f,
        }
    }
}

/// A list of changes: their number, then each.
pub fn encode_ops(ops: &[Op]) -> Vec<u8> {
    let mut out = bytes::count(ops.len()).to_vec();
    for op in ops {
        out.push(match op {
            Op::Revoke(_) => 1,
            Op::Suspend(_) => 2,
            Op::Resume(_) => 3,
            Op::Forget(_) => 4,
        });
        out.extend_from_slice(&op.fingerprint().0.to_le_bytes());
    }
    out
}

/// Reads a list of changes.
///
/// # Errors
/// When it is cut short, too long or has an unknown kind of change.
pub fn decode_ops(reader: &mut Reader<'_>) -> Result<Vec<Op>, WireError> {
    let number = reader.capped(MAX_DELTA_OPS)?;
    let mut entries = Reader::new(reader.take(number.saturating_mul(9))?);
    let mut ops = Vec::with_capacity(number);
    for _ in 0..number {
        let kind = entries.u8()?;
        let fingerprint = Fingerprint(entries.u64()?);
        ops.push(match kind {
            1 => Op::Revoke(fingerprint),
            2 => Op::Suspend(fingerprint),
            3 => Op::Resume(fingerprint),
            4 => Op::Forget(fingerprint),
            _ => return Err(WireError::UnknownFormat),
        });
    }
    Ok(ops)
}

/// One shard.
#[derive(Debug, Clone)]
pub struct Shard {
    bits: u8,
    index: u16,
    revoked: Vec<u64>,
    suspended: Vec<u64>,
    /// Worked out when it is first asked for, once for all versions that share this shard.
    digest: OnceLock<[u8; 32]>,
}

impl PartialEq for Shard {
    fn eq(&self, other: &Self) -> bool {
        (self.bits, self.index) == (other.bits, other.index)
            && self.revoked == other.revoked
            && self.suspended == other.suspended
    }
}

impl Eq for Shard {}

/// Bytes that are no shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a revocation shard: {0}")]
pub struct ShardError(&'static str);

impl Shard {
    /// An empty shard.
    pub fn empty(bits: u8, index: u16) -> Self {
        Self { bits, index, revoked: Vec::new(), suspended: Vec::new(), digest: OnceLock::new() }
    }

    /// How many entries it has.
    pub fn len(&self) -> usize {
        self.revoked.len().saturating_add(self.suspended.len())
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many of them are revoked.
    pub fn revoked(&self) -> usize {
        self.revoked.len()
    }

    /// Its place among the 2^bits shards.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many shards the set has, as a power of two.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Applies a change; one that belongs to another shard changes nothing.
    pub fn apply(&mut self, op: Op) {
        let fingerprint = op.fingerprint();
        if fingerprint.shard(self.bits) != self.index {
            return;
        }
        self.digest = OnceLock::new();
        let value = fingerprint.0;
        match op {
            Op::Revoke(_) => insert(&mut self.revoked, value),
            Op::Suspend(_) => insert(&mut self.suspended, value),
            Op::Resume(_) => remove(&mut self.suspended, value),
            Op::Forget(_) => {
                remove(&mut self.revoked, value);
                remove(&mut self.suspended, value);
            }
        }
    }

    /// Every fingerprint in it.
    pub fn fingerprints(&self) -> impl Iterator<Item = Fingerprint> + '_ {
        self.revoked.iter().chain(&self.suspended).copied().map(Fingerprint)
    }

    /// How a key stands.
    pub fn standing(&self, fingerprint: Fingerprint) -> Standing {
        if self.revoked.binary_search(&fingerprint.0).is_ok() {
            Standing::Revoked
        } else if self.suspended.binary_search(&fingerprint.0).is_ok() {
            Standing::Suspended
        } else {
            Standing::Clear
        }
    }

    /// How many bytes it is encoded.
    pub fn encoded_bytes(&self) -> usize {
        SHARD_HEADER_BYTES.saturating_add(self.len().saturating_mul(size_of::<u64>()))
    }

    /// The bytes; equal shards have equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_bytes());
        out.extend_from_slice(SHARD_MAGIC);
        out.extend_from_slice(&[self.bits, 0]);
        out.extend_from_slice(&self.index.to_le_bytes());
        out.extend_from_slice(&bytes::count(self.revoked.len()));
        out.extend_from_slice(&bytes::count(self.suspended.len()));
        for value in self.revoked.iter().chain(&self.suspended) {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out
    }

    /// Its content address: SHA-256 of its bytes.
    pub fn digest(&self) -> [u8; 32] {
        *self.digest.get_or_init(|| digest(&self.encode()))
    }

    /// Reads and checks every byte.
    ///
    /// # Errors
    /// When anything is not as [`Shard::encode`] writes it.
    pub fn decode(bytes: &[u8]) -> Result<Self, ShardError> {
        let view = ShardView::new(bytes)?;
        let shard = Self {
            bits: view.bits,
            index: view.index,
            revoked: view.revoked.iter().map(|value| u64::from_le_bytes(*value)).collect(),
            suspended: view.suspended.iter().map(|value| u64::from_le_bytes(*value)).collect(),
            digest: OnceLock::new(),
        };
        let ascending = |run: &[u64]| run.is_sorted_by(|a, b| a < b);
        if !ascending(&shard.revoked) || !ascending(&shard.suspended) {
            return Err(ShardError("entries do not ascend"));
        }
        if shard.fingerprints().any(|f| f.shard(shard.bits) != shard.index) {
            return Err(ShardError("an entry belongs to another shard"));
        }
        Ok(shard)
    }
}

fn insert(run: &mut Vec<u64>, value: u64) {
    if let Err(position) = run.binary_search(&value) {
        run.insert(position, value);
    }
}

fn remove(run: &mut Vec<u64>, value: u64) {
    if let Ok(position) = run.binary_search(&value) {
        run.remove(position);
    }
}

/// A shard's bytes, looked into without copying. Checks the frame, not the order of the entries: for
/// bytes that this process decoded once before it kept them.
#[derive(Debug, Clone, Copy)]
pub struct ShardView<'b> {
    bits: u8,
    index: u16,
    revoked: &'b [[u8; 8]],
    suspended: &'b [[u8; 8]],
}

impl<'b> ShardView<'b> {
    /// # Errors
    /// When the frame is not that of a shard.
    pub fn new(bytes: &'b [u8]) -> Result<Self, ShardError> {
        let mut reader = Reader::new(bytes);
        let frame = |_| ShardError("cut short");
        if reader.take(4).map_err(frame)? != SHARD_MAGIC {
            return Err(ShardError("another magic"));
        }
        let bits = reader.u8().map_err(frame)?;
        if bits > MAX_SHARD_BITS || reader.u8().map_err(frame)? != 0 {
            return Err(ShardError("too many shards"));
        }
        let index = reader.u16().map_err(frame)?;
        if index.checked_shr(u32::from(bits)) != Some(0) {
            return Err(ShardError("index beyond the last shard"));
        }
        let revoked = usize::try_from(reader.u32().map_err(frame)?).unwrap_or(usize::MAX);
        let suspended = usize::try_from(reader.u32().map_err(frame)?).unwrap_or(usize::MAX);
        if revoked.saturating_add(suspended) > MAX_SHARD_ENTRIES {
            return Err(ShardError("too many entries"));
        }
        let (entries, rest) = reader.rest().as_chunks::<8>();
        if !rest.is_empty() || entries.len() != revoked.saturating_add(suspended) {
            return Err(ShardError("length does not fit the counts"));
        }
        let (revoked, suspended) =
            entries.split_at_checked(revoked).ok_or(ShardError("length does not fit the counts"))?;
        Ok(Self { bits, index, revoked, suspended })
    }

    /// Whether it is shard `index` of 2^`bits`.
    pub fn is(&self, bits: u8, index: u16) -> bool {
        self.bits == bits && self.index == index
    }

    /// How many entries it has.
    pub fn len(&self) -> usize {
        self.revoked.len().saturating_add(self.suspended.len())
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every fingerprint in it.
    pub fn fingerprints(&self) -> impl Iterator<Item = Fingerprint> + 'b {
        self.revoked.iter().chain(self.suspended).map(|value| Fingerprint(u64::from_le_bytes(*value)))
    }

    /// How a key stands.
    pub fn standing(&self, fingerprint: Fingerprint) -> Standing {
        let find = |run: &[[u8; 8]]| {
            run.binary_search_by_key(&fingerprint.0, |value| u64::from_le_bytes(*value)).is_ok()
        };
        if find(self.revoked) {
            Standing::Revoked
        } else if find(self.suspended) {
            Standing::Suspended
        } else {
            Standing::Clear
        }
    }
}

/// A shard's content address: SHA-256 of its bytes.
pub fn digest(shard_bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(shard_bytes).into()
}

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
    fn with_bits(bits: u8) -> Self {
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

    /// How many are revoked.
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
fn bits_for(entries: usize) -> u8 {
    (0..MAX_SHARD_BITS)
        .find(|bits| {
            let room = TARGET_SHARD_ENTRIES.saturating_mul(2).checked_shl(u32::from(*bits));
            entries <= room.unwrap_or(usize::MAX)
        })
        .unwrap_or(MAX_SHARD_BITS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_fingerprint_is_the_head_of_sha_256() {
        // printf abc | sha256sum
        assert_eq!(Fingerprint::of("abc"), Fingerprint(0xba78_16bf_8f01_cfea));
        assert_eq!(Fingerprint::of("abc").shard(0), 0);
        assert_eq!(Fingerprint::of("abc").shard(4), 0xb);
        assert_eq!(Fingerprint::of("abc").shard(12), 0xba7);
    }

    #[test]
    fn golden_bytes() {
        let mut shard = Shard::empty(4, 0xb);
        shard.apply(Op::Revoke(Fingerprint(0xb000_0000_0000_0002)));
        shard.apply(Op::Revoke(Fingerprint(0xb000_0000_0000_0001)));
        shard.apply(Op::Suspend(Fingerprint(0xb000_0000_0000_0003)));
        shard.apply(Op::Revoke(Fingerprint(0xa000_0000_0000_0001))); // another shard's
        let want = [
            b"KGX1".as_slice(),
            &[4, 0, 0x0b, 0, 2, 0, 0, 0, 1, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0xb0],
            &[2, 0, 0, 0, 0, 0, 0, 0xb0],
            &[3, 0, 0, 0, 0, 0, 0, 0xb0],
        ]
        .concat();
        assert_eq!(shard.encode(), want);
        assert_eq!(shard.encoded_bytes(), want.len());
        assert_eq!(Shard::decode(&want).unwrap(), shard);
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let mut shard = Shard::empty(1, 1);
        for value in [3, 5, 9] {
            shard.apply(Op::Revoke(Fingerprint(1 << 63 | value)));
        }
        let good = shard.encode();
        for cut in 0..good.len() {
            assert!(Shard::decode(&good[..cut]).is_err());
        }
        assert!(Shard::decode(&[good.as_slice(), &[0]].concat()).is_err());
        for (position, value) in
            [(0, b'L'), (4, 13), (4, 0), (5, 1), (6, 0), (6, 2), (8, 4), (12, 1), (16, 9)]
        {
            let mut bad = good.clone();
            bad[position] = value;
            assert!(Shard::decode(&bad).is_err(), "byte {position} = {value}");
        }
    }

    #[test]
    fn a_revocation_is_terminal() {
        let (mut shard, f) = (Shard::empty(0, 0), Fingerprint(7));
        shard.apply(Op::Suspend(f));
        assert_eq!(shard.standing(f), Standing::Suspended);
        shard.apply(Op::Revoke(f));
        shard.apply(Op::Resume(f));
        shard.apply(Op::Suspend(f));
        assert_eq!(shard.standing(f), Standing::Revoked);
        shard.apply(Op::Forget(f));
        assert_eq!(shard.standing(f), Standing::Clear);
    }

    #[test]
    fn the_layout_follows_the_count() {
        assert_eq!(bits_for(0), 0);
        assert_eq!(bits_for(8_192), 0);
        assert_eq!(bits_for(8_193), 1);
        assert_eq!(bits_for(1_000_000), 7);
        assert_eq!(bits_for(usize::MAX), 12);

        let many: Vec<Op> = (0..50_000).map(|n| Op::Revoke(Fingerprint::of(&format!("jti-{n}")))).collect();
        let mut set = ExactSet::default();
        for op in &many {
            set.apply(*op);
        }
        set.apply(Op::Suspend(Fingerprint::of("s")));
        let relaid = set.relaid().unwrap();
        assert_eq!((relaid.bits(), relaid.len()), (3, 50_001));
        assert!(relaid.relaid().is_none());
        for op in &many {
            assert_eq!((&relaid).standing(op.fingerprint()), Standing::Revoked);
        }
        assert_eq!((&relaid).standing(Fingerprint::of("s")), Standing::Suspended);
        for shard in relaid.shards() {
            assert_eq!(Shard::decode(&shard.encode()).unwrap(), **shard);
        }
        assert_eq!(ExactSet::of(&many).bits(), 3);
    }

    fn op(choice: u8, value: u64) -> Op {
        let fingerprint = Fingerprint(value.rotate_right(2));
        match choice % 4 {
            0 => Op::Revoke(fingerprint),
            1 => Op::Suspend(fingerprint),
            2 => Op::Resume(fingerprint),
            _ => Op::Forget(fingerprint),
        }
    }

    proptest! {
        /// The set agrees with a plain map, whatever the order, in every form that it takes.
        #[test]
        fn the_set_is_exact(ops in prop::collection::vec((any::<u8>(), 0u64..64), 0..200), bits in 0u8..4) {
            let mut set = ExactSet::with_bits(bits);
            let mut model: BTreeMap<u64, (bool, bool)> = BTreeMap::new();
            for (choice, value) in ops {
                let op = op(choice, value);
                set.apply(op);
                let entry = model.entry(op.fingerprint().0).or_default();
                match op {
                    Op::Revoke(_) => entry.0 = true,
                    Op::Suspend(_) => entry.1 = true,
                    Op::Resume(_) => entry.1 = false,
                    Op::Forget(_) => *entry = (false, false),
                }
            }
            for value in 0u64..64 {
                let fingerprint = Fingerprint(value.rotate_right(2));
                let want = match model.get(&fingerprint.0) {
                    Some((true, _)) => Standing::Revoked,
                    Some((_, true)) => Standing::Suspended,
                    _ => Standing::Clear,
                };
                prop_assert_eq!((&set).standing(fingerprint), want);
                let bytes = set.shards()[usize::from(fingerprint.shard(bits))].encode();
                prop_assert_eq!(ShardView::new(&bytes).unwrap().standing(fingerprint), want);
            }
            let revoked = model.values().filter(|(revoked, _)| *revoked).count();
            let suspended = model.values().filter(|(_, suspended)| *suspended).count();
            prop_assert_eq!((set.len(), set.revoked()), (revoked + suspended, revoked));
        }

        #[test]
        fn forgetting_many_is_forgetting_each(
            have in prop::collection::vec((any::<bool>(), 0u64..64), 0..60),
            gone in prop::collection::vec(0u64..64, 0..60),
            bits in 0u8..4,
        ) {
            let mut one_by_one = ExactSet::with_bits(bits);
            for (suspend, value) in have {
                one_by_one.apply(op(u8::from(suspend), value));
            }
            let _digests: Vec<_> = one_by_one.shards().iter().map(|shard| shard.digest()).collect();
            let mut at_once = one_by_one.clone();
            let gone: Vec<_> = gone.into_iter().map(|value| Fingerprint(value.rotate_right(2))).collect();
            at_once.forget_all(&gone);
            gone.iter().for_each(|fingerprint| one_by_one.apply(Op::Forget(*fingerprint)));
            prop_assert_eq!(at_once.len(), one_by_one.len());
            for (a, b) in at_once.shards().iter().zip(one_by_one.shards()) {
                prop_assert_eq!(a, b);
                prop_assert_eq!(a.digest(), digest(&b.encode()));
            }
        }

        #[test]
        fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            if let Ok(shard) = Shard::decode(&bytes) {
                prop_assert_eq!(shard.encode(), bytes);
            }
        }

        #[test]
        fn bytes_like_a_shard_decode_or_are_refused(mut tail in prop::collection::vec(any::<u8>(), 0..120)) {
            let mut bytes = b"KGX1".to_vec();
            bytes.append(&mut tail);
            if let Ok(shard) = Shard::decode(&bytes) {
                prop_assert_eq!(shard.encode(), bytes);
            }
        }
    }
}
