//! The state that plans are made against, and the store together with the changes that it does not have yet.

use std::collections::HashMap;

use crate::change::Change;
use crate::key::{Ended, KeyRecord, RevocationReason};
use crate::keyring::Keyring;
use crate::state::Model;
use crate::store::{Seen, Store, StoreError};

/// The state that a plan is made against.
pub struct View<'v> {
    /// The state as it stands.
    pub model: &'v Model,
    /// Unix seconds.
    pub now: u64,
    /// The same in milliseconds.
    pub now_ms: u64,
    /// The [`crate::change::Mark`]'s stamp of what is planned.
    pub stamp: u64,
    /// Opens secrets and seals new ones.
    pub keys: &'v Keyring,
    pub(super) store: &'v Store,
    pub(super) pending: &'v Pending,
}

/// Changes that the store does not have yet.
#[derive(Default, Clone)]
pub struct Pending {
    keys: HashMap<String, KeyRecord>,
    requests: HashMap<String, Seen>,
}

impl View<'_> {
    /// A key by its id.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn key(&self, key_id: &str) -> Result<Option<KeyRecord>, StoreError> {
        match self.pending.keys.get(key_id) {
            Some(key) => Ok(Some(key.clone())),
            None => self.store.key(key_id),
        }
    }

    /// The key with a token's id.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn key_of_jti(&self, jti: &str) -> Result<Option<KeyRecord>, StoreError> {
        if let Some(key) = self.pending.keys.values().find(|key| key.jti == jti) {
            return Ok(Some(key.clone()));
        }
        self.store.key_id_of(jti)?.map_or(Ok(None), |key_id| self.key(&key_id))
    }

    /// The change that revokes a token by its id: of the key that has it, or of none that is known here, for as long as
    /// one could live that was issued before.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn revoking(&self, jti: &str, revocation: Ended<RevocationReason>) -> Result<Change, StoreError> {
        Ok(match self.key_of_jti(jti)? {
            Some(key) => Change::revoking(&key, revocation),
            None => Change::JtiRevoked {
                jti: jti.to_owned(),
                expires_at: self.model.latest_s(self.now).saturating_add(self.model.longest_life_s()),
                revocation,
            },
        })
    }

    /// A request that came before.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn request(&self, request_id: &str) -> Result<Option<Seen>, StoreError> {
        match self.pending.requests.get(request_id) {
            Some(seen) => Ok(Some(seen.clone())),
            None => self.store.request(request_id),
        }
    }
}

impl Pending {
    /// Takes note of a change.
    pub fn note(&mut self, change: &Change, store: &Store) {
        if let Change::KeyIssued { key, .. } = change {
            self.keys.insert(key.key_id.clone(), (**key).clone());
        }
        if let Some((request, made)) = change.request() {
            let (body, made) = (request.body.clone(), made.to_owned());
            self.requests.insert(request.request_id.clone(), Seen { body, made });
        }
        if let Some(key_id) = change.altered_key() {
            let record = self.keys.remove(key_id).or_else(|| store.key(key_id).ok().flatten());
            if let Some(mut record) = record {
                change.alter(&mut record);
                self.keys.insert(key_id.to_owned(), record);
            }
        }
    }
}
