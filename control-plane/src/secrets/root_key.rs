//! The key from which keys for one purpose are derived.

use hmac::{Hmac, KeyInit as _, Mac as _};
use keygate_core::secret::Secret;
use sha2::Sha256;

/// A key from which others are derived, each for one purpose.
#[derive(Debug, Clone)]
pub struct RootKey(Secret<[u8; 32]>);

impl RootKey {
    /// From its bytes.
    pub fn of(bytes: [u8; 32]) -> Self {
        Self(Secret::new(bytes))
    }

    /// A key for one purpose: HMAC-SHA-256 (RFC 2104) of the purpose's name.
    pub fn derive(&self, purpose: &str) -> Secret<[u8; 32]> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.expose()).expect("a key of any length will do");
        mac.update(purpose.as_bytes());
        Secret::new(mac.finalize().into_bytes().into())
    }

    /// The fleet's id: the same for all control planes with this root, and no secret.
    pub fn fleet_id(&self) -> String {
        let digest = self.derive("keygate fleet id");
        format!("{:016x}", u64::from_be_bytes(*digest.expose().first_chunk().expect("32 bytes")))
    }

    #[cfg(test)]
    pub(crate) fn expose(&self) -> &[u8; 32] {
        self.0.expose()
    }
}

impl From<Secret<[u8; 32]>> for RootKey {
    fn from(bytes: Secret<[u8; 32]>) -> Self {
        Self(bytes)
    }
}
