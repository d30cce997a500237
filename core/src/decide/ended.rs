//! The rules and the revocations that end a key before it expires.

use crate::decide::cache::Verified;
use crate::decide::cutoff::{Cutoff, Lockdown};
use crate::decide::reason::Reason;
use crate::revocation::{Fingerprint, Standing};

/// Whether a verified key has been ended: by a lockdown, a mass revocation, or by itself.
///
/// # Errors
/// The reason for which it is refused.
pub fn ended(
    lockdown: Option<&Lockdown>,
    cutoffs: &[Cutoff],
    key: &Verified,
    now: u64,
    standing: impl FnOnce(Fingerprint) -> Standing,
) -> Result<(), Reason> {
    if lockdown.is_some_and(|lockdown| lockdown.holds(&key.claims.role, now)) {
        return Err(Reason::Lockdown);
    }
    if cutoffs.iter().any(|cutoff| cutoff.hits(&key.claims, &key.kid)) {
        return Err(Reason::Cutoff);
    }
    match standing(key.fingerprint) {
        Standing::Clear => Ok(()),
        Standing::Revoked => Err(Reason::Revoked),
        Standing::Suspended => Err(Reason::Suspended),
        Standing::Unknown => Err(Reason::RevocationUnknown),
    }
}
