//! A change of the revocation set, and the bytes of a list of them.

use serde::{Deserialize, Serialize};

use super::fingerprint::Fingerprint;
use crate::bytes::{self, Reader, WireError};

/// The most changes of one delta; a proxy further behind takes a snapshot.
pub const MAX_DELTA_OPS: usize = 65_536;

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
    let (entries, _) = reader.take(number.saturating_mul(9))?.as_chunks::<9>();
    let mut ops = Vec::with_capacity(number);
    for [kind, fingerprint @ ..] in entries {
        let fingerprint = Fingerprint(u64::from_le_bytes(*fingerprint));
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
