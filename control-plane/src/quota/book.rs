//! What the ledger has handed out, on disk: each change of it before the answer that makes it so. A database of its own, as
//! that of telemetry is.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use keygate_core::quota::{Account, Member, Saved, SavedMember, SavedPool, Terms};
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

/// JSON of [`SavedMember`], by that of its [`Member`].
const MEMBERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("members");
/// JSON of [`SavedPool`], by key and window.
const POOLS: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("pools");
/// JSON of [`Head`].
const HEAD: TableDefinition<'_, (), &[u8]> = TableDefinition::new("head");

const FILE: &str = "quota.redb";
/// There once a book was begun.
const BEGAN: &str = "quota.began";

/// Why the book cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// The database.
    #[error("what was leased cannot be kept: {0}")]
    Database(#[from] redb::Error),
    /// The file.
    #[error("what was leased cannot be kept: {0}")]
    Io(#[from] std::io::Error),
    /// What stands there is none of ours.
    #[error("what was leased cannot be read: {0}")]
    Json(#[from] serde_json::Error),
}

crate::store::from_redb!(BookError);

/// What is kept beside members and pools.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The ledger's number.
    pub era: u64,
    /// Its terms.
    pub terms: Terms,
    /// Whether it began in doubt.
    pub in_doubt: bool,
    /// Which start of the machine times are of.
    pub boot: String,
    /// The stamp of the change by which it is kept here.
    #[serde(default)]
    pub since: u64,
}

/// What a change comes to.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// Members, and what is to be kept of each.
    pub members: Vec<(Member, Option<SavedMember>)>,
    /// Accounts, and what is to be kept of each.
    pub pools: Vec<(Account, Option<SavedPool>)>,
}

/// The book.
#[derive(Debug)]
pub struct Book(Database);

impl Book {
    /// Opens it and reads what stands there; `None`: nothing ever did.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(dir: &Path) -> Result<(Self, Option<(Head, Saved)>), BookError> {
        let path = dir.join(FILE);
        let file =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let book = Self(Database::builder().create_with_backend(FileBackend::new(file)?)?);
        let write = book.0.begin_write()?;
        write.open_table(MEMBERS)?;
        write.open_table(POOLS)?;
        write.open_table(HEAD)?;
        write.commit()?;
        let read = book.0.begin_read()?;
        let Some(head) = read.open_table(HEAD)?.get(())?.map(|bytes| bytes.value().to_vec()) else {
            return Ok((book, None));
        };
        let head: Head = serde_json::from_slice(&head)?;
        let mut saved =
            Saved { era: head.era, terms: head.terms, in_doubt: head.in_doubt, ..Saved::default() };
        for entry in read.open_table(MEMBERS)?.iter()? {
            saved.members.push(serde_json::from_slice(entry?.1.value())?);
        }
        for entry in read.open_table(POOLS)?.iter()? {
            saved.pools.push(serde_json::from_slice(entry?.1.value())?);
        }
        Ok((book, Some((head, saved))))
    }

    /// Whether there ever was one here.
    pub fn began(dir: &Path) -> bool {
        dir.join(BEGAN).exists()
    }

    /// Notes that there is one, so that it is missed when it is lost.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn note_begin(dir: &Path) -> Result<(), BookError> {
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join(BEGAN))?
            .sync_all()?;
        Ok(())
    }

    /// Puts a damaged one aside.
    pub fn put_aside(dir: &Path) {
        let _gone_already = std::fs::rename(dir.join(FILE), dir.join(format!("{FILE}.broken")));
    }

    /// Begins it anew, with this.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn begin(&self, head: &Head, saved: &Saved) -> Result<(), BookError> {
        let write = self.0.begin_write()?;
        {
            let mut members = write.open_table(MEMBERS)?;
            members.retain(|_, _| false)?;
            for member in &saved.members {
                members.insert(key_of(&member.member)?.as_str(), serde_json::to_vec(member)?.as_slice())?;
            }
            let mut pools = write.open_table(POOLS)?;
            pools.retain(|_, _| false)?;
            for pool in &saved.pools {
                pools.insert(
                    (pool.account.key, pool.account.window_s),
                    serde_json::to_vec(pool)?.as_slice(),
                )?;
            }
            write.open_table(HEAD)?.insert((), serde_json::to_vec(head)?.as_slice())?;
        }
        write.commit()?;
        Ok(())
    }

    /// Writes a change; it is on disk then.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&self, page: &Page) -> Result<(), BookError> {
        let write = self.0.begin_write()?;
        {
            let mut members = write.open_table(MEMBERS)?;
            for (member, saved) in &page.members {
                let key = key_of(member)?;
                match saved {
                    Some(saved) => drop(members.insert(key.as_str(), serde_json::to_vec(saved)?.as_slice())?),
                    None => drop(members.remove(key.as_str())?),
                }
            }
            let mut pools = write.open_table(POOLS)?;
            for (account, saved) in &page.pools {
                let key = (account.key, account.window_s);
                match saved {
                    Some(saved) => drop(pools.insert(key, serde_json::to_vec(saved)?.as_slice())?),
                    None => drop(pools.remove(key)?),
                }
            }
        }
        write.commit()?;
        Ok(())
    }
}

fn key_of(member: &Member) -> Result<String, serde_json::Error> {
    serde_json::to_string(member)
}
