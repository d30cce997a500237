//! One shard of the set, as values and as bytes.
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

use std::sync::OnceLock;

use sha2::{Digest as _, Sha256};

use super::Standing;
use super::fingerprint::Fingerprint;
use super::operation::Op;
use crate::bytes::{self, Reader};

/// The most shards: 2^12.
pub const MAX_SHARD_BITS: u8 = 12;
/// The most entries of a shard: its bytes stay below the 256 KiB that one shared-data value may have,
/// since Envoy holds one lock for all of it while it copies.
pub const MAX_SHARD_ENTRIES: usize = 32_000;

const SHARD_MAGIC: &[u8; 4] = b"KGX1";
const SHARD_HEADER_BYTES: usize = 16;

/// One shard.
#[derive(Debug, Clone)]
pub struct Shard {
    bits: u8,
    index: u16,
    pub(super) revoked: Vec<u64>,
    pub(super) suspended: Vec<u64>,
    /// Worked out when it is first asked for, once for all versions that share this shard.
    pub(super) digest: OnceLock<[u8; 32]>,
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

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.revoked.len().saturating_add(self.suspended.len())
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of entries that are revoked.
    pub fn revoked(&self) -> usize {
        self.revoked.len()
    }

    /// Its place among the 2^bits shards.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of shards of the set, as a power of two.
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

    /// Every fingerprint in it with its standing, the suspended first; one may be suspended and revoked.
    pub fn entries(&self) -> impl Iterator<Item = (Fingerprint, Standing)> + '_ {
        let suspended = self.suspended.iter().map(|value| (Fingerprint(*value), Standing::Suspended));
        suspended.chain(self.revoked.iter().map(|value| (Fingerprint(*value), Standing::Revoked)))
    }

    /// The standing of a key.
    pub fn standing(&self, fingerprint: Fingerprint) -> Standing {
        if self.revoked.binary_search(&fingerprint.0).is_ok() {
            Standing::Revoked
        } else if self.suspended.binary_search(&fingerprint.0).is_ok() {
            Standing::Suspended
        } else {
            Standing::Clear
        }
    }

    /// Number of encoded bytes.
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
        // The runs ascend: what holds for the ends of a run holds for all between them.
        let ends = [&shard.revoked, &shard.suspended].into_iter().flat_map(|run| [run.first(), run.last()]);
        if ends.flatten().any(|value| Fingerprint(*value).shard(shard.bits) != shard.index) {
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

    /// Number of entries.
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

    /// The standing of a key.
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
