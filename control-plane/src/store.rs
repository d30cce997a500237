//! The embedded store: key records and remembered requests, in a `redb` file. It is a projection of the
//! journal: what it lacks is applied again at the start, so its own commits need not be durable.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};

use crate::change::Change;
use crate::key::KeyRecord;

const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("keys");
const BY_JTI: TableDefinition<'_, &str, &str> = TableDefinition::new("key_id_by_jti");
const REQUESTS: TableDefinition<'_, &str, (&str, &str)> = TableDefinition::new("requests");
const FLEET: TableDefinition<'_, &str, ()> = TableDefinition::new("fleet");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const APPLIED_SEQ: &str = "applied_seq";
const SOURCE: &str = "source";
const FORMAT: &str = "format";
/// The tables as this version has them. Another format is emptied and applied again from the journal.
const CURRENT_FORMAT: u64 = 2;
/// How many batches are applied again after a crash, at most.
const BATCHES_PER_DURABLE_COMMIT: u32 = 1_000;

/// The store failed.
#[derive(Debug, thiserror::Error)]
#[error("store: {0}")]
pub struct StoreError(#[from] redb::Error);

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self(error.into())
            }
        }
    )*};
}
from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError
);

/// The store.
#[derive(Debug)]
pub struct Store {
    database: Database,
    batches: std::sync::atomic::AtomicU32,
}

/// A request that came before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The digest of its body.
    pub body: String,
    /// The key that it created.
    pub key_id: String,
}

impl Store {
    /// Opens or makes the store of a directory.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join("store.redb");
        let database = Database::create(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(redb::Error::Io)?;
        let write = database.begin_write()?;
        write.open_table(FLEET)?;
        let format = write.open_table(META)?.get(FORMAT)?.map(|format| format.value());
        write.commit()?;
        let store = Self { database, batches: 0.into() };
        if format != Some(CURRENT_FORMAT) {
            store.clear()?;
        }
        Ok(store)
    }

    /// The line of history and the last change that it has applied.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn applied(&self) -> Result<(u64, u64), StoreError> {
        let meta = self.database.begin_read()?.open_table(META)?;
        let number = |name| Ok::<_, StoreError>(meta.get(name)?.map_or(0, |value| value.value()));
        Ok((number(SOURCE)?, number(APPLIED_SEQ)?))
    }

    /// Empties it, so that another line of history can be applied.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn clear(&self) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        write.delete_table(KEYS)?;
        write.delete_table(BY_JTI)?;
        write.delete_table(REQUESTS)?;
        write.delete_table(META)?;
        write.open_table(KEYS)?;
        write.open_table(BY_JTI)?;
        write.open_table(REQUESTS)?;
        write.open_table(META)?.insert(FORMAT, CURRENT_FORMAT)?;
        Ok(write.commit()?)
    }

    /// A key by its id.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn key(&self, key_id: &str) -> Result<Option<KeyRecord>, StoreError> {
        let keys = self.database.begin_read()?.open_table(KEYS)?;
        let record = keys.get(key_id)?;
        Ok(record.and_then(|bytes| serde_json::from_slice(bytes.value()).ok()))
    }

    /// The id of the key with a token's id.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn key_id_of(&self, jti: &str) -> Result<Option<String>, StoreError> {
        let by_jti = self.database.begin_read()?.open_table(BY_JTI)?;
        Ok(by_jti.get(jti)?.map(|key_id| key_id.value().to_owned()))
    }

    /// Keys in the order of their ids, after `cursor`, that `wanted` takes; at most `limit`, and whether
    /// there may be more.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn keys(
        &self,
        cursor: Option<&str>,
        limit: usize,
        wanted: impl Fn(&KeyRecord) -> bool,
    ) -> Result<(Vec<KeyRecord>, bool), StoreError> {
        let keys = self.database.begin_read()?.open_table(KEYS)?;
        let mut found = Vec::new();
        for entry in keys.range(cursor.unwrap_or("")..)? {
            let (id, bytes) = entry?;
            if Some(id.value()) == cursor {
                continue;
            }
            if let Ok(record) = serde_json::from_slice::<KeyRecord>(bytes.value())
                && wanted(&record)
            {
                if found.len() == limit {
                    return Ok((found, true));
                }
                found.push(record);
            }
        }
        Ok((found, false))
    }

    /// Hands every key to `each`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn each_key(&self, mut each: impl FnMut(KeyRecord)) -> Result<(), StoreError> {
        let keys = self.database.begin_read()?.open_table(KEYS)?;
        for entry in keys.iter()? {
            if let Ok(record) = serde_json::from_slice(entry?.1.value()) {
                each(record);
            }
        }
        Ok(())
    }

    /// A request that came before, by its id.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn request(&self, request_id: &str) -> Result<Option<Seen>, StoreError> {
        let requests = self.database.begin_read()?.open_table(REQUESTS)?;
        Ok(requests.get(request_id)?.map(|seen| {
            let (body, key_id) = seen.value();
            Seen { body: body.into(), key_id: key_id.into() }
        }))
    }

    /// The proxies that were there, as [`Store::keep_fleet`] got them.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn fleet(&self) -> Result<Vec<String>, StoreError> {
        let fleet = self.database.begin_read()?.open_table(FLEET)?;
        let names =
            fleet.iter()?.map(|entry| entry.map(|(name, _)| name.value().to_owned()).map_err(Into::into));
        names.collect()
    }

    /// Keeps who is in the fleet, so that a restart does not forget a proxy that is cut off meanwhile.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep_fleet(&self, names: &[String]) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        write.delete_table(FLEET)?;
        {
            let mut fleet = write.open_table(FLEET)?;
            for name in names {
                fleet.insert(name.as_str(), ())?;
            }
        }
        Ok(write.commit()?)
    }

    /// Applies changes; `last_seq` is the number of the last one.
    ///
    /// # Errors
    /// When the file cannot be written. The changes are in the journal and are applied at the next start.
    pub fn apply<'c>(
        &self,
        changes: impl IntoIterator<Item = &'c Change>,
        last_seq: u64,
    ) -> Result<(), StoreError> {
        let mut write = self.database.begin_write()?;
        let batch = self.batches.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if !batch.is_multiple_of(BATCHES_PER_DURABLE_COMMIT) {
            write.set_durability(Durability::None)?;
        }
        {
            let mut keys = write.open_table(KEYS)?;
            let mut by_jti = write.open_table(BY_JTI)?;
            let mut requests = write.open_table(REQUESTS)?;
            let mut meta = write.open_table(META)?;
            for change in changes {
                if let Change::Genesis { source } = change {
                    meta.insert(SOURCE, source)?;
                }
                if let Change::KeyIssued { key, idempotency } = change {
                    if let Some(seen) = idempotency {
                        requests
                            .insert(seen.request_id.as_str(), (seen.body.as_str(), key.key_id.as_str()))?;
                    }
                    keys.insert(key.key_id.as_str(), encode(key).as_slice())?;
                    by_jti.insert(key.jti.as_str(), key.key_id.as_str())?;
                }
                if let Some(key_id) = change.altered_key() {
                    let record = keys.get(key_id)?.and_then(|b| serde_json::from_slice(b.value()).ok());
                    if let Some(mut record) = record {
                        change.alter(&mut record);
                        keys.insert(key_id, encode(&record).as_slice())?;
                    }
                }
            }
            meta.insert(APPLIED_SEQ, last_seq)?;
        }
        Ok(write.commit()?)
    }
}

fn encode(record: &KeyRecord) -> Vec<u8> {
    serde_json::to_vec(record).expect("a key record is plain data")
}
