//! The embedded store: key records, past revocations and remembered requests, in a `redb` file. It is a projection of the
//! journal: what it lacks is applied again at the start, so its own commits need not be durable.

use std::collections::HashSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use redb::{Database, Durability, ReadableDatabase, ReadableTable, Table, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::model::Seen;
use crate::model::change::Change;
use crate::model::key::{KeyRecord, RevocationReason};

/// The file, in the data directory.
pub const FILE: &str = "store.redb";
const NEW_FILE: &str = "store.redb.new";

const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("keys");
const BY_JTI: TableDefinition<'_, &str, &str> = TableDefinition::new("key_id_by_jti");
/// Keys by the Unix second in which they expire.
const BY_EXPIRY: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("keys_by_expiry");
/// Revocations by their number in the journal.
const REVOCATIONS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("revocations");
/// The ids of revoked tokens, with the Unix second in which they expire.
const REVOKED: TableDefinition<'_, &str, u64> = TableDefinition::new("revoked");
const REVOKED_BY_EXPIRY: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("revoked_by_expiry");
const REQUESTS: TableDefinition<'_, &str, (&str, &str)> = TableDefinition::new("requests");
/// Remembered requests by the Unix second of the key that they created.
const REQUESTS_BY_TIME: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("requests_by_time");
const FLEET: TableDefinition<'_, &str, ()> = TableDefinition::new("fleet");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const APPLIED_SEQ: &str = "applied_seq";
const SOURCE: &str = "source";
const FORMAT: &str = "format";
/// The tables as this version has them. Another format is emptied and applied again from the journal.
const CURRENT_FORMAT: u64 = 5;
/// How many batches are applied again after a crash, at most.
const BATCHES_PER_DURABLE_COMMIT: u32 = 1_000;

/// How long a request is remembered, in seconds.
const KEEP_REQUESTS_S: u64 = 24 * 60 * 60;
/// How long the record of a key is kept after it expired, in seconds. The journal has it for longer.
const KEEP_EXPIRED_S: u64 = 30 * 24 * 60 * 60;

/// The store failed.
#[derive(Debug, thiserror::Error)]
#[error("store: {0}")]
pub struct StoreError(#[from] redb::Error);

/// Makes an error that can be made of `redb::Error` of each of the errors that redb has besides.
macro_rules! from_redb {
    ($target:ty) => {
        $crate::durability::store::from_redb!(
            $target,
            redb::DatabaseError,
            redb::TransactionError,
            redb::TableError,
            redb::StorageError,
            redb::CommitError,
            redb::SetDurabilityError
        );
    };
    ($target:ty, $($error:ty),*) => {
        $(impl From<$error> for $target {
            fn from(error: $error) -> Self {
                Self::from(redb::Error::from(error))
            }
        })*
    };
}
pub(crate) use from_redb;
from_redb!(StoreError);

/// The store.
#[derive(Debug)]
pub struct Store {
    database: Database,
    batches: std::sync::atomic::AtomicU32,
}

/// A revocation that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastRevocation {
    /// The key's id; `None` for a token's id that belonged to no key known here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// The token's id.
    pub jti: String,
    /// The key's role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// Until when proxies know of it. Unix seconds.
    pub expires_at: u64,
    /// When. Unix seconds.
    pub at: u64,
    /// Why.
    pub reason: RevocationReason,
    /// Whose key did it.
    pub by: String,
}

impl PastRevocation {
    /// That of a change, if it is one.
    pub fn of(change: &Change) -> Option<Self> {
        let (key_id, jti, role, expires_at, ended) = match change {
            Change::KeyRevoked { key_id, jti, role, expires_at, revocation } => {
                (Some(key_id.clone()), jti, Some(role.clone()), expires_at, revocation)
            }
            Change::JtiRevoked { jti, expires_at, revocation } => (None, jti, None, expires_at, revocation),
            _ => return None,
        };
        let (at, reason, by) = (ended.at, ended.reason, ended.by.clone());
        Some(Self { key_id, jti: jti.clone(), role, expires_at: *expires_at, at, reason, by })
    }
}

impl Store {
    /// Opens or makes the store of a directory.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(FILE);
        make_if_missing(dir, &path)?;
        let database = match Database::open(&path) {
            Err(error) if is_damage(&error) => {
                tracing::warn!(%error, file = %path.display(), "the store is damaged; it is rebuilt from the journal");
                std::fs::remove_file(&path).map_err(redb::Error::Io)?;
                make_if_missing(dir, &path)?;
                Database::open(&path)?
            }
            opened => opened?,
        };
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
        macro_rules! empty {
            ($($table:expr),*) => {$(
                write.delete_table($table)?;
                write.open_table($table)?;
            )*};
        }
        empty!(
            KEYS,
            BY_JTI,
            BY_EXPIRY,
            REVOCATIONS,
            REVOKED,
            REVOKED_BY_EXPIRY,
            REQUESTS,
            REQUESTS_BY_TIME,
            META
        );
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

    /// The ids of keys that have not expired at `now`, Unix seconds, revoked ones among them.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn unexpired(&self, now: u64) -> Result<HashSet<String>, StoreError> {
        let by_expiry = self.database.begin_read()?.open_table(BY_EXPIRY)?;
        let entries = by_expiry.range((now.saturating_add(1), "")..)?;
        entries.map(|entry| Ok(entry?.0.value().1.to_owned())).collect()
    }

    /// Revocations before number `cursor`, the last one first, that `wanted` takes; at most `limit` with their
    /// numbers, and whether there may be more.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn revocations(
        &self,
        cursor: Option<u64>,
        limit: usize,
        wanted: impl Fn(&PastRevocation) -> bool,
    ) -> Result<(Vec<(u64, PastRevocation)>, bool), StoreError> {
        let revocations = self.database.begin_read()?.open_table(REVOCATIONS)?;
        let mut found = Vec::new();
        for entry in revocations.range(..cursor.unwrap_or(u64::MAX))?.rev() {
            let (seq, bytes) = entry?;
            if let Ok(revocation) = serde_json::from_slice::<PastRevocation>(bytes.value())
                && wanted(&revocation)
            {
                if found.len() == limit {
                    return Ok((found, true));
                }
                found.push((seq.value(), revocation));
            }
        }
        Ok((found, false))
    }

    /// Until when the revocation of a token is kept, Unix seconds; `None`: no revocation is known.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn revoked_until(&self, jti: &str) -> Result<Option<u64>, StoreError> {
        let revoked = self.database.begin_read()?.open_table(REVOKED)?;
        Ok(revoked.get(jti)?.map(|until| until.value()))
    }

    /// The ids of tokens whose revocations are kept until a Unix second in `from..to`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn revoked_within(&self, from: u64, to: u64) -> Result<Vec<String>, StoreError> {
        let by_expiry = self.database.begin_read()?.open_table(REVOKED_BY_EXPIRY)?;
        let entries = by_expiry.range((from, "")..(to, ""))?;
        entries.map(|entry| Ok(entry?.0.value().1.to_owned())).collect()
    }

    /// A request that came before, by its id.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn request(&self, request_id: &str) -> Result<Option<Seen>, StoreError> {
        let requests = self.database.begin_read()?.open_table(REQUESTS)?;
        Ok(requests.get(request_id)?.map(|seen| {
            let (body, made) = seen.value();
            Seen { body: body.into(), made: made.into() }
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

    /// Applies changes, each with its number in the journal.
    ///
    /// # Errors
    /// When the file cannot be written. The changes are in the journal and are applied at the next start.
    pub fn apply(&self, changes: &[(u64, Change)]) -> Result<(), StoreError> {
        let Some((last_seq, _)) = changes.last() else { return Ok(()) };
        let mut write = self.database.begin_write()?;
        let batch = self.batches.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if !batch.is_multiple_of(BATCHES_PER_DURABLE_COMMIT) {
            write.set_durability(Durability::None)?;
        }
        {
            let mut tables = Tables {
                keys: write.open_table(KEYS)?,
                by_jti: write.open_table(BY_JTI)?,
                by_expiry: write.open_table(BY_EXPIRY)?,
                revocations: write.open_table(REVOCATIONS)?,
                revoked: write.open_table(REVOKED)?,
                revoked_by_expiry: write.open_table(REVOKED_BY_EXPIRY)?,
                requests: write.open_table(REQUESTS)?,
                requests_by_time: write.open_table(REQUESTS_BY_TIME)?,
            };
            let mut meta = write.open_table(META)?;
            for (seq, change) in changes {
                if let Change::Genesis { source } = change {
                    meta.insert(SOURCE, source)?;
                }
                tables.apply(*seq, change)?;
            }
            meta.insert(APPLIED_SEQ, last_seq)?;
        }
        Ok(write.commit()?)
    }
}

/// The tables that changes alter.
struct Tables<'w> {
    keys: Table<'w, &'static str, &'static [u8]>,
    by_jti: Table<'w, &'static str, &'static str>,
    by_expiry: Table<'w, (u64, &'static str), ()>,
    revocations: Table<'w, u64, &'static [u8]>,
    revoked: Table<'w, &'static str, u64>,
    revoked_by_expiry: Table<'w, (u64, &'static str), ()>,
    requests: Table<'w, &'static str, (&'static str, &'static str)>,
    requests_by_time: Table<'w, (u64, &'static str), ()>,
}

impl Tables<'_> {
    fn apply(&mut self, seq: u64, change: &Change) -> Result<(), StoreError> {
        match change {
            Change::KeyIssued { key, .. } => {
                let key_id = key.key_id.as_str();
                self.keys.insert(key_id, encode(key).as_slice())?;
                self.by_jti.insert(key.jti.as_str(), key_id)?;
                self.by_expiry.insert((key.expires_at, key_id), ())?;
            }
            Change::ExpiredForgotten { until } => self.forget(*until)?,
            _ => {}
        }
        if let Some((request, made)) = change.facts().request {
            let at = match change {
                Change::KeyIssued { key, .. } => key.issued_at,
                other => other.facts().secret.map_or(0, |secret| secret.created_at),
            };
            self.requests.insert(request.request_id.as_str(), (request.body.as_str(), made))?;
            self.requests_by_time.insert((at, request.request_id.as_str()), ())?;
        }
        if let Some(revocation) = PastRevocation::of(change) {
            self.revocations.insert(seq, encode(&revocation).as_slice())?;
            let (jti, until) = (revocation.jti.as_str(), revocation.expires_at);
            let before = self.revoked.insert(jti, until)?.map(|until| until.value());
            if let Some(before) = before {
                self.revoked_by_expiry.remove((before, jti))?;
            }
            self.revoked_by_expiry.insert((until, jti), ())?;
        }
        if let Some(key_id) = change.facts().alters.map(|(key_id, _)| key_id)
            && let Some(mut record) = self.key(key_id)?
        {
            change.alter(&mut record);
            self.keys.insert(key_id, encode(&record).as_slice())?;
        }
        Ok(())
    }

    fn key(&self, key_id: &str) -> Result<Option<KeyRecord>, StoreError> {
        Ok(self.keys.get(key_id)?.and_then(|bytes| serde_json::from_slice(bytes.value()).ok()))
    }

    /// Drops what is long over at `until`, Unix seconds.
    fn forget(&mut self, until: u64) -> Result<(), StoreError> {
        let before = until.saturating_sub(KEEP_REQUESTS_S);
        for entry in self.requests_by_time.extract_from_if(..(before, ""), |_, ()| true)? {
            self.requests.remove(entry?.0.value().1)?;
        }
        let before = until.saturating_sub(KEEP_EXPIRED_S);
        for entry in self.revoked_by_expiry.extract_from_if(..(before, ""), |_, ()| true)? {
            self.revoked.remove(entry?.0.value().1)?;
        }
        for entry in self.by_expiry.extract_from_if(..(before, ""), |_, ()| true)? {
            let entry = entry?;
            if let Some(bytes) = self.keys.remove(entry.0.value().1)?
                && let Ok(record) = serde_json::from_slice::<KeyRecord>(bytes.value())
            {
                self.by_jti.remove(record.jti.as_str())?;
            }
        }
        Ok(())
    }
}

fn encode(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("plain data")
}

/// Whether a file is no store, or a broken one: it is made of the journal, so nothing is lost with it.
fn is_damage(error: &redb::DatabaseError) -> bool {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match error {
        redb::DatabaseError::RepairAborted | redb::DatabaseError::UpgradeRequired(_) => true,
        redb::DatabaseError::Storage(redb::StorageError::Corrupted(_)) => true,
        redb::DatabaseError::Storage(redb::StorageError::Io(error)) => {
            [InvalidData, UnexpectedEof].contains(&error.kind())
        }
        _ => false,
    }
}

/// `redb` refuses a file that it was stopped from making, so one is made beside its place and moved there whole.
fn make_if_missing(dir: &Path, path: &Path) -> Result<(), StoreError> {
    if path.try_exists().map_err(redb::Error::Io)? {
        return Ok(());
    }
    let new = dir.join(NEW_FILE);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(redb::Error::Io(error).into());
        }
        _ => {}
    }
    drop(Database::create(&new)?);
    Ok(std::fs::rename(&new, path).map_err(redb::Error::Io)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::change::Idempotency;

    #[test]
    fn what_an_earlier_start_left_half_made_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(NEW_FILE), [0; 4096]).unwrap();
        Store::open(dir.path()).unwrap().apply(&[(1, issued(1, 2_000))]).unwrap();
        assert!(!dir.path().join(NEW_FILE).exists());
        assert!(Store::open(dir.path()).unwrap().key("key_1").unwrap().is_some());
    }

    fn issued(n: u64, expires_at: u64) -> Change {
        let key = KeyRecord {
            key_id: format!("key_{n}"),
            jti: format!("jti-{n}"),
            kid: "k".into(),
            name: "a".into(),
            role: "basic".into(),
            scopes: Vec::new(),
            owner: None,
            limit_role: None,
            registered_by: None,
            metadata: serde_json::Map::new(),
            issued_at: 1_000,
            expires_at,
            renews: None,
            renewed_by: None,
            revoked: None,
            suspended: None,
        };
        let idempotency = Some(Idempotency { request_id: format!("request-{n}"), body: String::new() });
        Change::KeyIssued { key: Box::new(key), idempotency }
    }

    #[test]
    fn records_are_kept_for_a_month_after_their_keys_and_requests_for_a_day() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.apply(&[(1, issued(1, 2_000)), (2, issued(2, 5_000))]).unwrap();
        let known = |n: u64| {
            let (key, jti, request) = (format!("key_{n}"), format!("jti-{n}"), format!("request-{n}"));
            (
                store.key(&key).unwrap().is_some(),
                store.key_id_of(&jti).unwrap().is_some(),
                store.request(&request).unwrap().is_some(),
            )
        };
        for (seq, until, first, second) in [
            (3, 1_000 + KEEP_REQUESTS_S, (true, true, true), (true, true, true)),
            (4, 1_001 + KEEP_REQUESTS_S, (true, true, false), (true, true, false)),
            (5, 2_000 + KEEP_EXPIRED_S, (true, true, false), (true, true, false)),
            (6, 2_001 + KEEP_EXPIRED_S, (false, false, false), (true, true, false)),
            (7, 9_999 + KEEP_EXPIRED_S, (false, false, false), (false, false, false)),
        ] {
            store.apply(&[(seq, Change::ExpiredForgotten { until })]).unwrap();
            assert_eq!((known(1), known(2)), (first, second), "until {until}");
        }
        assert_eq!(store.applied().unwrap().1, 7);
    }
}
