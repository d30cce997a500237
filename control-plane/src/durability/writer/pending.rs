//! The records that plans are made against: those of the store, and of changes that it does not have yet.

use std::collections::HashMap;

use crate::durability::store::{Store, StoreError};
use crate::model::change::Change;
use crate::model::key::KeyRecord;
use crate::model::{Records, RecordsError, Seen};

/// Changes that the store does not have yet.
#[derive(Default, Clone)]
pub struct Pending {
    keys: HashMap<String, KeyRecord>,
    requests: HashMap<String, Seen>,
}

/// The store together with what it does not have yet.
pub(super) struct Current<'v> {
    pub store: &'v Store,
    pub pending: &'v Pending,
}

impl From<StoreError> for RecordsError {
    fn from(error: StoreError) -> Self {
        Self::new(error)
    }
}

impl Records for Current<'_> {
    fn key(&self, key_id: &str) -> Result<Option<KeyRecord>, RecordsError> {
        match self.pending.keys.get(key_id) {
            Some(key) => Ok(Some(key.clone())),
            None => Ok(self.store.key(key_id)?),
        }
    }

    fn key_of_jti(&self, jti: &str) -> Result<Option<KeyRecord>, RecordsError> {
        if let Some(key) = self.pending.keys.values().find(|key| key.jti == jti) {
            return Ok(Some(key.clone()));
        }
        self.store.key_id_of(jti)?.map_or(Ok(None), |key_id| self.key(&key_id))
    }

    fn request(&self, request_id: &str) -> Result<Option<Seen>, RecordsError> {
        match self.pending.requests.get(request_id) {
            Some(seen) => Ok(Some(seen.clone())),
            None => Ok(self.store.request(request_id)?),
        }
    }
}

impl Pending {
    /// Notes a change.
    pub fn note(&mut self, change: &Change, store: &Store) {
        if let Change::KeyIssued { key, .. } = change {
            self.keys.insert(key.key_id.clone(), (**key).clone());
        }
        if let Some((request, made)) = change.facts().request {
            let (body, made) = (request.body.clone(), made.to_owned());
            self.requests.insert(request.request_id.clone(), Seen { body, made });
        }
        if let Some((key_id, _)) = change.facts().alters {
            let record = self.keys.remove(key_id).or_else(|| store.key(key_id).ok().flatten());
            if let Some(mut record) = record {
                change.alter(&mut record);
                self.keys.insert(key_id.to_owned(), record);
            }
        }
    }
}
