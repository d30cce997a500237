//! Who a request is of.

use sha2::{Digest, Sha256};

/// Who a request is of, as far as the rollout is concerned. What a token says of it need not be verified:
/// whoever is sent to V1 is V1's to refuse, and whoever is sent to V2 is verified there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject<'s> {
    /// The key's owner.
    pub owner: Option<&'s str>,
    /// The key's id.
    pub key_id: Option<&'s str>,
    /// Decides about shares; see the module for how it is made.
    pub hash: u64,
}

impl<'s> Subject<'s> {
    /// Of a key: all keys of an owner go the same way, and a key without owner goes its own.
    pub fn of_key(owner: Option<&'s str>, key_id: &'s str) -> Self {
        let hash = match owner {
            Some(owner) => Domain::Owner.hash(owner.as_bytes()),
            None => Domain::KeyId.hash(key_id.as_bytes()),
        };
        Self { owner, key_id: Some(key_id), hash }
    }

    /// Of a key whose hash is known, from a [`Subject::of_key`] before.
    pub fn of_parts(owner: Option<&'s str>, key_id: &'s str, hash: u64) -> Self {
        Self { owner, key_id: Some(key_id), hash }
    }

    /// Of a credential that is no key, or is not read, as on a public route. See also [`super::Plan::for_legacy`].
    pub fn of_legacy(credential: &[u8]) -> Self {
        Self { owner: None, key_id: None, hash: Domain::Credential.hash(credential) }
    }

    /// Of a client without credential: its address, without the port.
    pub fn of_address(address: &[u8]) -> Self {
        Self { owner: None, key_id: None, hash: Domain::Address.hash(address) }
    }
}

/// What is hashed. Its tag goes first, so that a key with the id `x` and an owner named `x` are two subjects,
/// and no salt cancels a subject.
#[derive(Debug, Clone, Copy)]
pub(super) enum Domain {
    Salt = 0,
    Owner = 1,
    KeyId = 2,
    Credential = 3,
    Address = 4,
}

impl Domain {
    pub(super) fn hash(self, bytes: &[u8]) -> u64 {
        let digest: [u8; 32] = Sha256::new().chain_update([self as u8]).chain_update(bytes).finalize().into();
        u64::from_be_bytes(digest.first_chunk().copied().unwrap_or_default())
    }
}
