//! The ledger on disk: each change before the answer that makes it so. A database of its own, as that of telemetry is.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use keygate_core::quota::{
    Account, Changes, HolderRow, Ledger, Member, MemberRow, Saved, SpendKey, SpendRow,
};
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

/// Proxy and incarnation.
type MemberKey = (u64, u64);
/// Key and window of an account, proxy and incarnation.
type HolderKey = (u64, u32, u64, u64);
/// The same, and the slot of the window.
type SlotKey = (u64, u32, u64, u64, u64);

/// Share.
const MEMBERS: TableDefinition<'_, MemberKey, u32> = TableDefinition::new("proxies");
/// Limit, cap, units held by VMs, and units spent since the record was made.
const HOLDERS: TableDefinition<'_, HolderKey, (u32, u32, u32, u64)> = TableDefinition::new("caps");
/// Limit, time of the last spend, and units.
const SPENDS: TableDefinition<'_, SlotKey, (u32, u64, u32)> = TableDefinition::new("spends");
/// JSON of [`Head`].
const HEAD: TableDefinition<'_, (), &[u8]> = TableDefinition::new("ledger");

const FILE: &str = "quota.redb";
/// Exists once there was a ledger here.
const BEGAN: &str = "quota.began";

/// The ledger's file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The database.
    #[error("the ledger of limits cannot be kept: {0}")]
    Database(#[from] redb::Error),
    /// The file.
    #[error("the ledger of limits cannot be kept: {0}")]
    Io(#[from] std::io::Error),
    /// It was written by another program or version.
    #[error("the ledger of limits cannot be read: {0}")]
    Json(#[from] serde_json::Error),
}

crate::durability::store::from_redb!(DiskError);

/// The ledger's number, and the clocks that the rows' times are of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// The ledger's number.
    pub era: u64,
    /// Nothing grows yet; see [`Ledger::recovering`].
    pub recovering: bool,
    /// The stamp of the change by which it is kept here.
    pub since: u64,
    /// The start of the machine that times are of.
    pub boot: String,
    /// A time of the monotonic clock, in nanoseconds, and the same by the wall clock, in Unix milliseconds.
    pub clocks: (u64, u64),
}

/// Rows that are to be written, `None` where they are to be removed.
#[derive(Debug, Default)]
pub struct Rows {
    members: Vec<(Member, Option<MemberRow>)>,
    holders: Vec<((Account, Member), Option<HolderRow>)>,
    spends: Vec<(SpendKey, Option<SpendRow>)>,
}

impl Rows {
    /// The present rows of what changed.
    pub fn of(ledger: &Ledger, changes: &Changes) -> Self {
        let members = changes.members.iter().map(|member| (*member, ledger.member(member)));
        let holders =
            changes.holders.iter().map(|key @ (account, member)| (*key, ledger.holder(*account, member)));
        let spends = changes.spends.iter().map(|key| (*key, ledger.spend(key)));
        Self { members: members.collect(), holders: holders.collect(), spends: spends.collect() }
    }
}

/// The file.
#[derive(Debug)]
pub struct Disk(Database);

impl Disk {
    /// Opens it and reads it; `None`: nothing was ever written.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(dir: &Path) -> Result<(Self, Option<(Head, Saved)>), DiskError> {
        let path = dir.join(FILE);
        let file =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let disk = Self(Database::builder().create_with_backend(FileBackend::new(file)?)?);
        let write = disk.0.begin_write()?;
        write.open_table(MEMBERS)?;
        write.open_table(HOLDERS)?;
        write.open_table(SPENDS)?;
        write.open_table(HEAD)?;
        write.commit()?;
        let read = disk.0.begin_read()?;
        let Some(head) = read.open_table(HEAD)?.get(())?.map(|bytes| bytes.value().to_vec()) else {
            return Ok((disk, None));
        };
        let head: Head = serde_json::from_slice(&head)?;
        let mut saved = Saved { era: head.era, recovering: head.recovering, ..Saved::default() };
        for entry in read.open_table(MEMBERS)?.iter()? {
            let (key, share) = entry?;
            saved.members.push(MemberRow { member: member(key.value()), share: share.value() });
        }
        for entry in read.open_table(HOLDERS)?.iter()? {
            let (key, value) = entry?;
            let ((key, window_s, proxy, incarnation), (limit, cap, held, total)) =
                (key.value(), value.value());
            let (account, member) = (Account { key, window_s }, member((proxy, incarnation)));
            saved.holders.push(HolderRow { account, member, limit, cap, held, total });
        }
        for entry in read.open_table(SPENDS)?.iter()? {
            let (key, value) = entry?;
            let ((key, window_s, proxy, incarnation, _), (limit, last_ns, units)) =
                (key.value(), value.value());
            let (account, member) = (Account { key, window_s }, member((proxy, incarnation)));
            saved.spends.push(SpendRow { account, member, limit, last_ns, units });
        }
        Ok((disk, Some((head, saved))))
    }

    /// Whether there ever was a ledger here.
    pub fn began(dir: &Path) -> bool {
        dir.join(BEGAN).exists()
    }

    /// Notes that there is one, so that it is missed when it is lost.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn note_begin(dir: &Path) -> Result<(), DiskError> {
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

    /// Replaces everything.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn replace(&self, head: &Head, saved: &Saved) -> Result<(), DiskError> {
        let write = self.0.begin_write()?;
        {
            let mut members = write.open_table(MEMBERS)?;
            members.retain(|_, _| false)?;
            for row in &saved.members {
                members.insert(member_key(&row.member), row.share)?;
            }
            let mut holders = write.open_table(HOLDERS)?;
            holders.retain(|_, _| false)?;
            for row in &saved.holders {
                holders.insert(
                    holder_key(row.account, &row.member),
                    (row.limit, row.cap, row.held, row.total),
                )?;
            }
            let mut spends = write.open_table(SPENDS)?;
            spends.retain(|_, _| false)?;
            for row in &saved.spends {
                let key = spend_key(&SpendKey::of(row));
                spends.insert(key, (row.limit, row.last_ns, row.units))?;
            }
            write.open_table(HEAD)?.insert((), serde_json::to_vec(head)?.as_slice())?;
        }
        write.commit()?;
        Ok(())
    }

    /// Writes changes; they are on disk then.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn write<'r>(&self, batch: impl Iterator<Item = &'r Rows>) -> Result<(), DiskError> {
        let write = self.0.begin_write()?;
        {
            let mut members = write.open_table(MEMBERS)?;
            let mut holders = write.open_table(HOLDERS)?;
            let mut spends = write.open_table(SPENDS)?;
            for rows in batch {
                for (member, row) in &rows.members {
                    match row {
                        Some(row) => drop(members.insert(member_key(member), row.share)?),
                        None => drop(members.remove(member_key(member))?),
                    }
                }
                for ((account, member), row) in &rows.holders {
                    let key = holder_key(*account, member);
                    match row {
                        Some(row) => drop(holders.insert(key, (row.limit, row.cap, row.held, row.total))?),
                        None => drop(holders.remove(key)?),
                    }
                }
                for (key, row) in &rows.spends {
                    let key = spend_key(key);
                    match row {
                        Some(row) => drop(spends.insert(key, (row.limit, row.last_ns, row.units))?),
                        None => drop(spends.remove(key)?),
                    }
                }
            }
        }
        write.commit()?;
        Ok(())
    }
}

fn member((proxy, incarnation): MemberKey) -> Member {
    Member { proxy, incarnation }
}

fn member_key(member: &Member) -> MemberKey {
    (member.proxy, member.incarnation)
}

fn holder_key(account: Account, member: &Member) -> HolderKey {
    (account.key, account.window_s, member.proxy, member.incarnation)
}

fn spend_key(key: &SpendKey) -> SlotKey {
    let (account, member) = (key.account, &key.member);
    (account.key, account.window_s, member.proxy, member.incarnation, key.slot)
}
