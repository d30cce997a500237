//! The set of revoked and suspended keys: exact, of fingerprints, cut into shards.
//!
//! The set is exact, so nothing good is ever refused. It is cut by the fingerprint's leading bits into
//! 2^n shards of a few thousand entries; a shard is the unit that is copied on write in the control
//! plane, content-addressed on the wire, and one shared-data value in Envoy.

mod fingerprint;
pub mod gate;
mod operation;
mod set;
mod shard;
#[cfg(test)]
mod tests;

pub use self::fingerprint::Fingerprint;
pub use self::operation::{MAX_DELTA_OPS, Op, decode_ops, encode_ops};
pub use self::set::ExactSet;
pub use self::shard::{MAX_SHARD_BITS, MAX_SHARD_ENTRIES, Shard, ShardError, ShardView, digest};

/// The standing of a key in the revocation set.
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
    /// The standing of the key with this fingerprint.
    fn standing(&mut self, fingerprint: Fingerprint) -> Standing;
}
