//! The name by which revocation knows a token.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::shard::MAX_SHARD_BITS;

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

    /// The shard, of 2^`bits`, that it belongs to.
    pub fn shard(self, bits: u8) -> u16 {
        let shift = 64_u32.saturating_sub(u32::from(bits.min(MAX_SHARD_BITS)));
        // bits ≤ 12, so what is left fits sixteen bits.
        u16::try_from(self.0.checked_shr(shift).unwrap_or(0)).unwrap_or(u16::MAX)
    }
}
