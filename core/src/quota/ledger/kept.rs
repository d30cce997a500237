//! The rows of the ledger that are kept on disk, and how a ledger resumes from them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::super::message::Member;
use super::super::spends;
use super::super::{Account, RECOVER_NS, RUN};
use super::Ledger;
use super::pool::Holder;

/// Names of the rows that changed since the last time. Each is to be read from the ledger again, and removed where the
/// ledger has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// See [`Ledger::member`].
    pub members: BTreeSet<Member>,
    /// See [`Ledger::holder`].
    pub holders: BTreeSet<(Account, Member)>,
    /// See [`Ledger::spend`].
    pub spends: BTreeSet<SpendKey>,
}

impl Changes {
    /// Whether nothing is to be kept.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty() && self.holders.is_empty() && self.spends.is_empty()
    }
}

/// Key of the units that a proxy spent of an account in a 128th of its window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SpendKey {
    /// The account.
    pub account: Account,
    /// The proxy's process, which may be gone.
    pub member: Member,
    /// The slot of the window.
    pub slot: u64,
}

impl SpendKey {
    /// The key of a row.
    pub fn of(row: &SpendRow) -> Self {
        let slot = spends::slot(row.last_ns, row.account.window_ns());
        Self { account: row.account, member: row.member, slot }
    }
}

/// A member's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberRow {
    /// The process.
    pub member: Member,
    /// Its share, of [`super::super::SHARES`].
    pub share: u32,
}

/// The row of a member's part of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HolderRow {
    /// The account.
    pub account: Account,
    /// The process.
    pub member: Member,
    /// The limit.
    pub limit: u32,
    /// Its cap.
    pub cap: u32,
    /// Units that its VMs held by its last report.
    pub held: u32,
    /// Units spent since its record was made.
    pub total: u64,
}

/// A row of spends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpendRow {
    /// The account.
    pub account: Account,
    /// The proxy's process, which may be gone.
    pub member: Member,
    /// The limit.
    pub limit: u32,
    /// Time of the last of them.
    pub last_ns: u64,
    /// Units.
    pub units: u32,
}

/// Everything that is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The ledger's number.
    pub era: u64,
    /// Nothing grew yet, see [`Ledger::recovering`].
    #[serde(default)]
    pub recovering: bool,
    /// All members.
    pub members: Vec<MemberRow>,
    /// Their parts of accounts.
    pub holders: Vec<HolderRow>,
    /// Their spends.
    pub spends: Vec<SpendRow>,
}

impl Ledger {
    /// A ledger that does not know what the one before it granted: proxies tell. Nothing grows for [`RECOVER_NS`].
    pub fn recovering(era: u64, hot_restart: bool, now_ns: u64) -> Self {
        Self::take_over(&Saved { era, ..Saved::default() }, era, hot_restart, now_ns)
    }

    /// A ledger that knows what the one before it had granted a while ago; proxies tell the rest. Nothing grows for
    /// [`RECOVER_NS`].
    pub fn take_over(saved: &Saved, era: u64, hot_restart: bool, now_ns: u64) -> Self {
        let before = Self::resume(saved, hot_restart, now_ns);
        Self { era, recovering_until_ns: now_ns.saturating_add(RECOVER_NS), ..before }
    }

    /// Goes on from what was kept, with another era; its times must be of the clock of `now_ns`.
    pub fn resume(saved: &Saved, hot_restart: bool, now_ns: u64) -> Self {
        let mut ledger = Self::new(saved.era.wrapping_add(RUN), hot_restart, now_ns);
        for row in &saved.members {
            ledger.join(row.member, row.share, now_ns);
        }
        ledger.members.values_mut().for_each(|process| process.kept = true);
        for row in &saved.holders {
            let Some(process) = ledger.members.get_mut(&row.member) else { continue };
            process.accounts.insert(row.account);
            let pool = ledger.pools.entry(row.account).or_default();
            // The rules may have been on their way to proxies: the smallest, until one of them reports.
            pool.limit = if pool.holders.is_empty() { row.limit } else { pool.limit.min(row.limit) };
            let holder = pool.holders.entry(row.member).or_default();
            holder.limit = row.limit;
            (holder.cap, holder.held, holder.total) = (row.cap, row.held, row.total);
        }
        for row in &saved.spends {
            let pool = ledger.pools.entry(row.account).or_default();
            if pool.limit == 0 {
                pool.limit = row.limit;
            }
            let spends = match pool.holders.get_mut(&row.member) {
                Some(holder) => &mut holder.spends,
                None => pool.gone.entry(row.member).or_default(),
            };
            // A clock that was set back must not keep units in use for ever.
            spends.add(row.last_ns.min(now_ns), row.units, row.account.window_ns());
        }
        ledger.changes = Changes::default();
        if saved.recovering {
            ledger.recovering_until_ns = now_ns.saturating_add(RECOVER_NS);
        }
        ledger
    }

    /// Everything that is to be kept.
    pub fn saved(&self) -> Saved {
        let recovering = self.recovering_until_ns > 0;
        let mut saved = Saved { era: self.era, recovering, ..Saved::default() };
        saved.members.extend(self.members.keys().filter_map(|member| self.member(member)));
        for (account, pool) in &self.pools {
            for member in pool.holders.keys() {
                saved.holders.extend(self.holder(*account, member));
            }
            let spends = pool.holders.iter().map(|(member, holder)| (*member, &holder.spends));
            let gone = pool.gone.iter().map(|(member, spends)| (*member, spends));
            for (member, spends) in spends.chain(gone) {
                saved.spends.extend(spends.groups().map(|group| SpendRow {
                    account: *account,
                    member,
                    limit: pool.limit,
                    last_ns: group.last_ns,
                    units: group.units,
                }));
            }
        }
        saved
    }

    /// A member's row, if it has one.
    pub fn member(&self, member: &Member) -> Option<MemberRow> {
        let process = self.members.get(member).filter(|process| !process.left)?;
        Some(MemberRow { member: *member, share: process.share() })
    }

    /// The row of a member's part of an account, if there is one.
    pub fn holder(&self, account: Account, member: &Member) -> Option<HolderRow> {
        let pool = self.pools.get(&account)?;
        let holder = pool.holders.get(member)?;
        let Holder { limit, cap, held, total, .. } = *holder;
        Some(HolderRow { account, member: *member, limit, cap, held, total })
    }

    /// The row of spends, if there are any.
    pub fn spend(&self, key: &SpendKey) -> Option<SpendRow> {
        let SpendKey { account, member, slot } = *key;
        let pool = self.pools.get(&account)?;
        let spends = match pool.holders.get(&member) {
            Some(holder) => &holder.spends,
            None => pool.gone.get(&member)?,
        };
        let window_ns = account.window_ns();
        let group = spends.groups().find(|group| spends::slot(group.last_ns, window_ns) == slot)?;
        let (limit, last_ns, units) = (pool.limit, group.last_ns, group.units);
        Some(SpendRow { account, member, limit, last_ns, units })
    }

    /// The rows that changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Whether it recovers, as [`Ledger::saved`] has it: until the first look after the end of that.
    pub fn saves_recovering(&self) -> bool {
        self.recovering_until_ns > 0
    }
}
