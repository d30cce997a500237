//! The state that a command is decided against: the model, and the records of keys and requests.

use crate::model::change::Change;
use crate::model::key::{Ended, KeyRecord, RevocationReason};
use crate::model::state::Model;
use crate::secrets::keyring::Keyring;

/// The state as it is when a command is decided, with the effects of all commands before it.
pub struct View<'v> {
    /// The model.
    pub model: &'v Model,
    /// Unix seconds.
    pub now: u64,
    /// The same in milliseconds.
    pub now_ms: u64,
    /// Stamp of the change, see [`crate::platform::hlc::Mark`].
    pub stamp: u64,
    /// Opens secrets and seals new ones.
    pub keys: &'v Keyring,
    /// Records of keys and requests.
    pub records: &'v dyn Records,
}

/// Records by their ids.
pub trait Records {
    /// A key.
    ///
    /// # Errors
    /// When the records cannot be read.
    fn key(&self, key_id: &str) -> Result<Option<KeyRecord>, RecordsError>;

    /// The key that has a token with this `jti`.
    ///
    /// # Errors
    /// When the records cannot be read.
    fn key_of_jti(&self, jti: &str) -> Result<Option<KeyRecord>, RecordsError>;

    /// An earlier request with an `Idempotency-Key`.
    ///
    /// # Errors
    /// When the records cannot be read.
    fn request(&self, request_id: &str) -> Result<Option<Seen>, RecordsError>;
}

/// An earlier request with an `Idempotency-Key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The digest of its body.
    pub body: String,
    /// The id of the key or secret that it made.
    pub made: String,
}

/// The records cannot be read.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct RecordsError(Box<dyn std::error::Error + Send + Sync>);

impl RecordsError {
    /// The error of a store.
    pub fn new(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Box::new(error))
    }
}

impl View<'_> {
    /// A key by its id.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn key(&self, key_id: &str) -> Result<Option<KeyRecord>, RecordsError> {
        self.records.key(key_id)
    }

    /// The key that has a token with this `jti`.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn key_of_jti(&self, jti: &str) -> Result<Option<KeyRecord>, RecordsError> {
        self.records.key_of_jti(jti)
    }

    /// The change that revokes a token by its id: of the key that has it, or of an unknown one, for as long as a key could
    /// live that was issued before.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn revoking(&self, jti: &str, revocation: Ended<RevocationReason>) -> Result<Change, RecordsError> {
        Ok(match self.key_of_jti(jti)? {
            Some(key) => Change::revoking(&key, revocation),
            None => Change::JtiRevoked {
                jti: jti.to_owned(),
                expires_at: self.model.latest_s(self.now).saturating_add(self.model.longest_life_s()),
                revocation,
            },
        })
    }
}
