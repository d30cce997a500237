//! The ledger: caps of all proxies, by account. Counting and dividing are one thing: each rule of the one is what makes a
//! rule of the other safe. See the proof in [`super`].

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::division::{Need, divide};
use super::message::{Answer, FORMAT, Grant, MAX_ENTRIES, Member, Question, Recall, Report};
use super::spends::{self, Spends};
use super::{
    Account, RECOVER_NS, RELEASE_NS, REPORT_NS, REPORT_NS_PER_PROXY, RUN, SHARES, SILENCE_NS, fair_share,
    hold_ns, is_same_ledger,
};

const MS: u64 = 1_000_000;
/// With this many proxies and more, one part in [`RESERVE_PART`] of all limits is in no share, and a share may be larger
/// than its target by one part in [`TOLERANCE_PART`]: so a proxy that joins does not change the share of every other one.
const LARGE_FLEET: u32 = 16;
const RESERVE_PART: u32 = 16;
const TOLERANCE_PART: u32 = 32;
/// Noise in what is asked for moves no units: one part in so many of a limit.
const NOISE_PART: u32 = 64;
/// Interval between two looks for silent proxies, and pools that are tidied at each.
const LOOK_NS: u64 = 100_000_000;
const TIDIED: usize = 256;

/// Caps and spends of all proxies. There must be one for a fleet at a time.
///
/// Changes ([`Ledger::take_changes`]) must be kept before the answer is sent; then [`Ledger::resume`] goes on from them.
#[derive(Debug)]
pub struct Ledger {
    era: u64,
    hot_restart: bool,
    began_ns: u64,
    /// Nothing grows before this time; see [`Ledger::recovering`].
    recovering_until_ns: u64,
    members: BTreeMap<Member, Process>,
    pools: BTreeMap<Account, Pool>,
    /// Number of members with each share that is counted.
    shares: BTreeMap<u32, u32>,
    /// Members that do not leave.
    staying: u32,
    next_look_ns: u64,
    tidied: Option<Account>,
    released_units: u64,
    released_members: u64,
    changes: Changes,
}

/// What the ledger knows of a process of a proxy.
#[derive(Debug, Clone, Default)]
struct Process {
    /// Number of its last question.
    number: u64,
    /// The share it goes by at most, as it says.
    said: u32,
    /// The share it was told.
    told: u32,
    heard_ns: u64,
    leaving: bool,
    left: bool,
    /// Processes of the same proxy that were there when it joined.
    before: Vec<Member>,
    /// The next process of the same proxy took its place.
    replaced: bool,
    /// It is known from what was kept, and did not show yet that it took an answer since.
    kept: bool,
    /// Accounts with news for it.
    news: BTreeSet<Account>,
    /// Accounts with a holder of its own.
    accounts: BTreeSet<Account>,
}

impl Process {
    fn share(&self) -> u32 {
        self.said.max(self.told)
    }

    fn is_heard(&self, now_ns: u64) -> bool {
        !self.left && now_ns < self.heard_ns.saturating_add(SILENCE_NS)
    }
}

/// One account.
#[derive(Debug, Clone, Default)]
struct Pool {
    /// As it was last reported.
    limit: u32,
    holders: BTreeMap<Member, Holder>,
    /// Spends of processes that are gone.
    gone: BTreeMap<Member, Spends>,
}

impl Pool {
    /// Units in use by processes that are gone.
    fn gone(&self, now_ns: u64, window_ns: u64) -> u32 {
        let gone = self.gone.values().map(|spends| spends.used_at(now_ns, window_ns));
        gone.fold(0, u32::saturating_add)
    }

    fn is_empty(&self) -> bool {
        self.holders.is_empty() && self.gone.is_empty()
    }
}

/// A proxy's part of an account.
#[derive(Debug, Clone, Default)]
struct Holder {
    /// The limit that it goes by.
    limit: u32,
    cap: u32,
    /// Units that its VMs held by the last report.
    held: u32,
    /// Units asked for in a window's time.
    wanted: u32,
    /// Units refused since the report before the last.
    lacks: u32,
    /// Units spent since its record was made.
    total: u64,
    spends: Spends,
}

impl Holder {
    /// Units in use, as far as they were reported.
    fn used(&self, now_ns: u64, window_ns: u64) -> u32 {
        self.spends.used_at(now_ns, window_ns).saturating_add(self.held)
    }

    /// Units that the proxy may have in use.
    fn counted(&self, now_ns: u64, window_ns: u64) -> u32 {
        self.cap.max(self.used(now_ns, window_ns))
    }

    /// Whether it could use more than its cap.
    fn is_short(&self, limit: u32) -> bool {
        self.wanted > self.cap && self.cap < limit
    }
}

/// What is to be kept of what changed since the last time: what is named here is to be read again from the ledger, and
/// removed where it is not there.
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

/// What is kept of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberRow {
    /// The process.
    pub member: Member,
    /// Its share, of [`SHARES`].
    pub share: u32,
}

/// What is kept of a proxy's part of an account.
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

/// What is kept of spends.
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

/// An answer, and who else has news.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// The answer.
    pub answer: Answer,
    /// Members whose held question is to be answered now; `None`: perhaps any.
    pub wake: Option<BTreeSet<Member>>,
}

/// A question that is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// A later one came before it.
    #[error("a later question was answered already")]
    Superseded,
}

/// A proxy that was not heard of for longer than [`SILENCE_NS`]: it spends its share of each limit, and what it spends is
/// not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SilentProxy {
    /// The process.
    pub member: Member,
    /// Nanoseconds since it was heard of.
    pub silent_ns: u64,
    /// Units of accounts that it used, granted and not reported as spent.
    pub units: u64,
    /// Its share of all other limits, of [`SHARES`].
    pub share: u32,
}

impl Ledger {
    /// A ledger of which nothing was ever granted. `era` tells it from all other ledgers.
    pub fn new(era: u64, hot_restart: bool, now_ns: u64) -> Self {
        Self {
            era,
            hot_restart,
            began_ns: now_ns,
            recovering_until_ns: 0,
            members: BTreeMap::new(),
            pools: BTreeMap::new(),
            shares: BTreeMap::new(),
            staying: 0,
            next_look_ns: 0,
            tidied: None,
            released_units: 0,
            released_members: 0,
            changes: Changes::default(),
        }
    }

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

    /// The ledger's number.
    pub fn era(&self) -> u64 {
        self.era
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

    /// What is to be kept of a member.
    pub fn member(&self, member: &Member) -> Option<MemberRow> {
        let process = self.members.get(member).filter(|process| !process.left)?;
        Some(MemberRow { member: *member, share: process.share() })
    }

    /// What is to be kept of a member's part of an account.
    pub fn holder(&self, account: Account, member: &Member) -> Option<HolderRow> {
        let pool = self.pools.get(&account)?;
        let holder = pool.holders.get(member)?;
        let Holder { limit, cap, held, total, .. } = *holder;
        Some(HolderRow { account, member: *member, limit, cap, held, total })
    }

    /// What is to be kept of spends.
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

    /// What is to be kept since the last time.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Units in use of each account, as far as they were reported, with the limit.
    pub fn usage(&self, now_ns: u64) -> impl Iterator<Item = (Account, u32, u32)> {
        self.pools.iter().map(move |(account, pool)| {
            let window_ns = account.window_ns();
            let used = pool.holders.values().map(|holder| holder.spends.used_at(now_ns, window_ns));
            let used = used.fold(pool.gone(now_ns, window_ns), u32::saturating_add);
            (*account, used, pool.limit)
        })
    }

    /// Processes of proxies that take part.
    pub fn proxies(&self) -> usize {
        usize::try_from(self.staying).unwrap_or(usize::MAX)
    }

    /// Whether nothing grows since it is not known what the ledger before granted.
    pub fn is_recovering(&self, now_ns: u64) -> bool {
        now_ns < self.recovering_until_ns
    }

    /// Whether it recovers, as [`Ledger::saved`] has it: until the first look after the end of that.
    pub fn saves_recovering(&self) -> bool {
        self.recovering_until_ns > 0
    }

    /// Nanoseconds until caps and shares grow again; 0: they do.
    pub fn recovers_in_ns(&self, now_ns: u64) -> u64 {
        self.recovering_until_ns.saturating_sub(now_ns)
    }

    /// Proxies that are not heard of, and not released yet.
    pub fn silent(&self, now_ns: u64) -> Vec<SilentProxy> {
        let silent = self.members.iter().filter(|(_, process)| !process.left && !process.is_heard(now_ns));
        let silent = silent.map(|(member, process)| SilentProxy {
            member: *member,
            silent_ns: now_ns.saturating_sub(process.heard_ns),
            units: self.unreported(member, process, now_ns),
            share: process.share(),
        });
        silent.collect()
    }

    /// Units that were granted to proxies that were released without a word: as many may have been admitted once more.
    /// Shares of accounts that they never used are not among them.
    pub fn released_units(&self) -> u64 {
        self.released_units
    }

    /// Proxies that were released without a word.
    pub fn released_members(&self) -> u64 {
        self.released_members
    }

    fn unreported(&self, member: &Member, process: &Process, now_ns: u64) -> u64 {
        let holders = process.accounts.iter().filter_map(|account| {
            let holder = self.pools.get(account)?.holders.get(member)?;
            let used = holder.spends.used_at(now_ns, account.window_ns());
            Some(u64::from(holder.cap.saturating_sub(used)))
        });
        holders.fold(0, u64::saturating_add)
    }

    /// Whether a member is to be answered although it has nothing to report: otherwise its question may be held back for
    /// [`Ledger::hold_ns`].
    pub fn has_news(&self, question: &Question, now_ns: u64) -> bool {
        let Some(process) = self.members.get(&question.member) else { return true };
        !process.news.is_empty()
            || !process.before.is_empty()
            || process.number >= question.number
            || question.era != self.era
            || question.left && !process.left
            || !process.left && process.leaving && process.told > 0
            || !process.left && self.next_share(process, question.share, now_ns) != process.told
    }

    /// Time for which a question without reports may be held back.
    pub fn hold_ns(&self) -> u64 {
        hold_ns(self.proxies())
    }

    /// Whether a process takes part.
    pub fn knows(&self, member: &Member) -> bool {
        self.members.contains_key(member)
    }

    /// Has a proxy leave: it is to spend nothing more and to report everything; the next process of it is not meant. Whether
    /// the proxy is known.
    pub fn drain(&mut self, proxy: u64) -> bool {
        let mut known = false;
        for (member, process) in &mut self.members {
            if member.proxy == proxy {
                known = true;
                if !process.leaving {
                    process.leaving = true;
                    self.staying = self.staying.saturating_sub(1);
                }
            }
        }
        known
    }

    /// Whether a proxy that was told to leave has left.
    pub fn has_left(&self, proxy: u64) -> bool {
        let mut processes = self.members.iter().filter(|(member, _)| member.proxy == proxy);
        processes.all(|(_, process)| process.left)
    }

    /// Answers a question.
    ///
    /// # Errors
    /// [`ExchangeError`]; nothing changes then.
    pub fn exchange(&mut self, question: &Question, now_ns: u64) -> Result<Exchange, ExchangeError> {
        let member = question.member;
        if self.members.get(&member).is_some_and(|process| question.number <= process.number) {
            return Err(ExchangeError::Superseded);
        }
        let is_replaced = self.members.get(&member).is_some_and(|process| process.replaced);
        let mut wake = if self.on_time(now_ns) { None } else { Some(BTreeSet::new()) };
        let mut answer = self.blank(question.number);
        let is_old = self.may_be_old(question);
        let is_late = question.era != self.era && question.era != 0 && !is_old && !self.is_recovering(now_ns);
        let is_void = question.void && !is_old;
        if is_replaced && question.era != 0 {
            answer.rejoin = true;
            return Ok(Exchange { answer, wake });
        }
        if (is_void || is_late || is_replaced) && self.members.contains_key(&member) {
            // It comes too late with what it was granted.
            self.release(&member, now_ns);
            wake = None;
        }
        if !self.members.contains_key(&member) {
            if !self.admit(question, now_ns) {
                answer.rejoin = true;
                return Ok(Exchange { answer, wake });
            }
            wake = None;
        } else if question.era == self.era && self.replace_before(&member, now_ns) {
            wake = None;
        }
        let Some(process) = self.members.get_mut(&member) else { return Err(ExchangeError::Superseded) };
        process.number = question.number;
        process.heard_ns = now_ns;
        process.kept &= question.era != self.era;
        let (said_before, told) = (process.said, process.told);
        let said = if is_old {
            said_before.max(question.share)
        } else if question.era == self.era || self.recovering_until_ns > 0 {
            question.share
        } else {
            0
        };
        self.set_share(&member, said, told);
        let report = |report: &Report| if is_old { self.at_least(&member, report, now_ns) } else { *report };
        let reports: Vec<Report> = question.reports.iter().map(report).collect();
        for report in &reports {
            self.note(&member, report, now_ns);
        }
        if question.left && !is_old {
            self.leave(&member, now_ns);
            wake = None;
        }
        answer.leave = self.members.get(&member).is_some_and(|process| process.leaving);
        for (report, asked) in reports.iter().zip(&question.reports) {
            let mut grant = self.grant(&member, report, &mut wake, now_ns);
            if is_old {
                // It is counted with more, which others may have.
                grant.cap = grant.cap.map(|cap| cap.min(asked.cap));
            }
            answer.grants.push(grant);
        }
        let share = self.share(&member, question.share, &mut answer, now_ns);
        self.set_share(&member, said, share);
        answer.share = share;
        if said_before > said && self.staying > 1 {
            // There is more for others.
            wake = None;
        }
        self.news(&member, &mut answer, now_ns);
        Ok(Exchange { answer, wake })
    }

    /// Does what is due at a time: releases silent proxies and forgets what is over. Whether any proxy may have news then.
    pub fn on_time(&mut self, now_ns: u64) -> bool {
        if now_ns < self.next_look_ns {
            return false;
        }
        self.next_look_ns = now_ns.saturating_add(LOOK_NS);
        let mut any = false;
        if self.recovering_until_ns > 0 && now_ns >= self.recovering_until_ns {
            self.recovering_until_ns = 0;
            any = true;
        }
        let is_lost = |process: &Process| now_ns >= process.heard_ns.saturating_add(RELEASE_NS);
        let lost: Vec<Member> =
            self.members.iter().filter(|(_, process)| is_lost(process)).map(|(member, _)| *member).collect();
        for member in lost {
            self.release(&member, now_ns);
            any = true;
        }
        self.tidy(now_ns);
        any
    }

    fn blank(&self, number: u64) -> Answer {
        let report_ns = u64::from(self.staying).saturating_mul(REPORT_NS_PER_PROXY).max(REPORT_NS);
        Answer {
            format: FORMAT,
            number,
            era: self.era,
            rejoin: false,
            leave: false,
            share: 0,
            report_ms: u32::try_from(report_ns.checked_div(MS).unwrap_or(0)).unwrap_or(u32::MAX),
            grants: Vec::new(),
            recalls: Vec::new(),
        }
    }

    /// Takes in a process that is not known; `false`: it has to join as a new one.
    fn admit(&mut self, question: &Question, now_ns: u64) -> bool {
        let member = question.member;
        if question.era == 0 {
            let before = |other: &&Member| other.proxy == member.proxy;
            let before: Vec<Member> = self.members.keys().filter(before).copied().collect();
            self.join(member, 0, now_ns);
            if let Some(process) = self.members.get_mut(&member).filter(|_| question.new && !self.hot_restart)
            {
                process.before = before;
            }
            return true;
        }
        // It was released, or has an older ledger than the one before this.
        let recovered_ns = self.began_ns.saturating_add(RECOVER_NS);
        let adopts = now_ns < recovered_ns;
        if is_same_ledger(question.era, self.era) || question.void || !adopts {
            return false;
        }
        // There was another ledger: nothing grows until all have told what they have of it.
        self.recovering_until_ns = recovered_ns;
        self.join(member, question.share, now_ns);
        true
    }

    fn join(&mut self, member: Member, share: u32, now_ns: u64) {
        let process = Process { said: share, told: share, heard_ns: now_ns, ..Process::default() };
        self.members.insert(member, process);
        self.count_share(share, 1);
        self.staying = self.staying.saturating_add(1);
        self.changes.members.insert(member);
    }

    fn count_share(&mut self, share: u32, by: i32) {
        let count = self.shares.entry(share).or_default();
        *count = count.saturating_add_signed(by);
        if *count == 0 {
            self.shares.remove(&share);
        }
    }

    fn set_share(&mut self, member: &Member, said: u32, told: u32) {
        let Some(process) = self.members.get_mut(member) else { return };
        let before = process.share();
        (process.said, process.told) = (said, told);
        let after = process.share();
        if before != after {
            self.count_share(before, -1);
            self.count_share(after, 1);
            self.changes.members.insert(*member);
        }
    }

    /// All shares together.
    fn shared_out(&self) -> u32 {
        self.shares
            .iter()
            .fold(0, |sum: u32, (share, count)| sum.saturating_add(share.saturating_mul(*count)))
    }

    /// Releases the processes of the same proxy that were there when a member joined, since a proxy is one process at a
    /// time; whether there were any. To be called once the member has taken an answer: the first question of a process
    /// that has ended may come late.
    fn replace_before(&mut self, member: &Member, now_ns: u64) -> bool {
        let before = self.members.get_mut(member).map(|process| std::mem::take(&mut process.before));
        let before = before.unwrap_or_default();
        for other in &before {
            if self.members.get(other).is_none_or(|process| process.left) {
                continue;
            }
            self.lose(other, now_ns);
            // It stays known for a while: its questions that come late say less than what is known of it.
            if let Some(process) = self.members.get_mut(other) {
                process.replaced = true;
                process.heard_ns = now_ns;
            }
        }
        !before.is_empty()
    }

    /// A process has left: what it spent counts, and nothing else.
    fn leave(&mut self, member: &Member, now_ns: u64) {
        self.bequeath(member, now_ns);
        self.set_share(member, 0, 0);
        if let Some(process) = self.members.get_mut(member) {
            process.left = true;
            process.news.clear();
            if !process.leaving {
                process.leaving = true;
                self.staying = self.staying.saturating_sub(1);
            }
        }
        self.changes.members.insert(*member);
    }

    /// A process is gone without a word: what it reported counts, and nothing else.
    fn lose(&mut self, member: &Member, now_ns: u64) {
        let Some(process) = self.members.get(member) else { return };
        if !process.left {
            let units = self.unreported(member, process, now_ns);
            self.released_units = self.released_units.saturating_add(units);
            self.released_members = self.released_members.saturating_add(1);
        }
        self.leave(member, now_ns);
    }

    /// A process is gone, and not known any more.
    fn release(&mut self, member: &Member, now_ns: u64) {
        self.lose(member, now_ns);
        if self.members.remove(member).is_some() {
            self.count_share(0, -1);
        }
    }

    /// Drops a member's caps, and keeps its spends; others may have news then.
    fn bequeath(&mut self, member: &Member, now_ns: u64) {
        let Some(process) = self.members.get_mut(member) else { return };
        let accounts = std::mem::take(&mut process.accounts);
        process.news.clear();
        let mut waiting = BTreeSet::new();
        for account in accounts {
            let window_ns = account.window_ns();
            let Some(pool) = self.pools.get_mut(&account) else { continue };
            let Some(mut holder) = pool.holders.remove(member) else { continue };
            self.changes.holders.insert((account, *member));
            holder.spends.expire(now_ns, window_ns, |group| {
                let slot = spends::slot(group.last_ns, window_ns);
                self.changes.spends.insert(SpendKey { account, member: *member, slot });
            });
            if !holder.spends.is_empty() {
                pool.gone.insert(*member, holder.spends);
            }
            if pool.holders.values().any(|holder| holder.is_short(pool.limit)) {
                waiting.insert(account);
            }
        }
        for account in waiting {
            self.tell_waiting(account, None, &mut None);
        }
    }

    /// Whether a question may have been asked before the last one that the ledger answered in an earlier run.
    fn may_be_old(&self, question: &Question) -> bool {
        let shows_answer = question.era == self.era || !is_same_ledger(question.era, self.era);
        let is_kept = self.members.get(&question.member).is_some_and(|process| process.kept);
        is_kept && (question.era == 0 || !shows_answer)
    }

    /// A report that may be old, with no less than what is known.
    fn at_least(&self, member: &Member, report: &Report, now_ns: u64) -> Report {
        let account = report.account;
        let pool = self.pools.get(&account);
        let (cap, used, spent) = match pool.and_then(|pool| pool.holders.get(member)) {
            Some(holder) => (holder.cap, holder.used(now_ns, account.window_ns()), holder.total),
            // It may have been forgotten since.
            None => {
                let share = self.members.get(member).map_or(0, Process::share);
                let limit = pool.map_or(report.limit, |pool| pool.limit.max(report.limit));
                (fair_share(limit, share), 0, 0)
            }
        };
        Report {
            cap: report.cap.max(cap),
            used: report.used.max(used),
            spent: report.spent.max(spent),
            idle: false,
            ..*report
        }
    }

    /// Takes over what a proxy reports.
    fn note(&mut self, member: &Member, report: &Report, now_ns: u64) {
        let Report { account, limit, cap, used, spent, age_ms, wanted, lacks, idle } = *report;
        let window_ns = account.window_ns();
        let pool = self.pools.entry(account).or_default();
        // A proxy without requests does not look at the rules.
        if !idle || pool.limit == 0 {
            pool.limit = limit;
        }
        if let Some(before) = pool.gone.remove(member) {
            // It was released, and tells all that it spent within the window.
            for group in before.groups() {
                let slot = spends::slot(group.last_ns, window_ns);
                self.changes.spends.insert(SpendKey { account, member: *member, slot });
            }
        }
        let holder = pool.holders.entry(*member).or_default();
        // A record that was made since then begins to count at 0.
        let new = spent.checked_sub(holder.total).unwrap_or(spent).min(used.into());
        let new = u32::try_from(new).unwrap_or(u32::MAX);
        if new > 0 {
            let at_ns = now_ns.saturating_sub(age_ms.saturating_mul(MS));
            holder.spends.add(at_ns, new, window_ns);
            let slot = spends::slot(at_ns, window_ns);
            self.changes.spends.insert(SpendKey { account, member: *member, slot });
        }
        holder.spends.expire(now_ns, window_ns, |group| {
            let slot = spends::slot(group.last_ns, window_ns);
            self.changes.spends.insert(SpendKey { account, member: *member, slot });
        });
        let held = used.saturating_sub(holder.spends.used());
        if (holder.limit, holder.cap, holder.held, holder.total) != (limit, cap, held, spent) {
            self.changes.holders.insert((account, *member));
        }
        (holder.limit, holder.cap, holder.held, holder.total) = (limit, cap, held, spent);
        holder.wanted = wanted.max(used.saturating_add(lacks));
        holder.lacks = lacks;
        if let Some(process) = self.members.get_mut(member) {
            process.accounts.insert(account);
            process.news.remove(&account);
        }
    }

    /// The cap of a member that reported an account; calls others where units are to move.
    fn grant(
        &mut self,
        member: &Member,
        report: &Report,
        wake: &mut Option<BTreeSet<Member>>,
        now_ns: u64,
    ) -> Grant {
        let account = report.account;
        let (elsewhere, elsewhere_ms) = self.elsewhere(account, member, now_ns);
        let plan = self.plan(account, now_ns);
        let mut grant = Grant { account, limit: plan.limit, cap: None, elsewhere, elsewhere_ms };
        let leaving = self.members.get(member).is_none_or(|process| process.leaving);
        if leaving {
            grant.cap = Some(0);
            self.set_cap(account, member, 0, report.cap);
            self.tell_waiting(account, Some(member), wake);
            return grant;
        }
        if report.idle && self.forget(account, member, now_ns) {
            self.tell_waiting(account, Some(member), wake);
            return grant;
        }
        let mut cap = plan.cap_of(member, report.cap);
        if report.wanted == 0 && plan.moves && !plan.is_short() {
            // Its share, as far as that is free, for its first request.
            let own = fair_share(report.limit.min(plan.limit), self.target_share().0);
            let used = report.cap.max(report.used);
            cap = cap.max(report.cap.saturating_add(own.saturating_sub(used).min(plan.free)));
        }
        grant.cap = Some(cap);
        self.set_cap(account, member, cap, report.cap);
        let target = plan.target_of(member);
        if target > cap && report.wanted.max(report.lacks) > cap {
            self.recall_for(account, member, target.saturating_sub(cap), wake, now_ns);
        }
        if plan.over > 0 {
            self.recall_for(account, member, plan.over, wake, now_ns);
        }
        if cap < report.cap || plan.free > cap.saturating_sub(report.cap) {
            self.tell_waiting(account, Some(member), wake);
        }
        grant
    }

    /// Units that others have spent, and milliseconds until the first of them is free.
    fn elsewhere(&self, account: Account, member: &Member, now_ns: u64) -> (u32, u64) {
        let Some(pool) = self.pools.get(&account) else { return (0, 0) };
        let window_ns = account.window_ns();
        let others =
            pool.holders.iter().filter(|(other, _)| *other != member).map(|(_, holder)| &holder.spends);
        let (mut units, mut first_ns) = (0_u32, u64::MAX);
        for spends in others.chain(pool.gone.values()) {
            let used = spends.used_at(now_ns, window_ns);
            if used > 0 {
                units = units.saturating_add(used);
                let live = spends.groups().map(|group| group.last_ns.saturating_add(window_ns));
                first_ns = live.filter(|free_ns| *free_ns > now_ns).min().unwrap_or(u64::MAX).min(first_ns);
            }
        }
        if units == 0 { (0, 0) } else { (units, first_ns.saturating_sub(now_ns).div_ceil(MS)) }
    }

    /// Sets a cap that was `before` by the last report. A lower one counts once it is reported.
    fn set_cap(&mut self, account: Account, member: &Member, cap: u32, before: u32) {
        let holder = self.pools.get_mut(&account).and_then(|pool| pool.holders.get_mut(member));
        if let Some(holder) = holder {
            holder.cap = cap.max(before);
            if cap != before {
                self.changes.holders.insert((account, *member));
            }
        }
    }

    /// Forgets a member's part of an account that it does not use, if its share of the limit is free.
    fn forget(&mut self, account: Account, member: &Member, now_ns: u64) -> bool {
        let Some(share) = self.members.get(member).map(Process::share) else { return false };
        let Some(pool) = self.pools.get(&account) else { return true };
        let Some(holder) = pool.holders.get(member) else { return true };
        let others =
            self.counted(account, pool, now_ns).saturating_sub(holder.counted(now_ns, account.window_ns()));
        // Its share may grow: what would have to be explicit again stays so.
        let limit = pool.holders.values().fold(pool.limit, |least, holder| least.min(holder.limit));
        let own = fair_share(limit, share.max(self.target_share().0));
        // Its spends, as far as the ledger counts them a little longer, stay.
        let is_unused = holder.spends.used_at(now_ns, account.window_ns()) == 0;
        let is_needed =
            pool.holders.iter().any(|(other, holder)| other != member && holder.is_short(pool.limit));
        if !is_unused || is_needed || others.saturating_add(own) > limit || self.is_recovering(now_ns) {
            return false;
        }
        self.drop_holder(account, member);
        true
    }

    fn drop_holder(&mut self, account: Account, member: &Member) {
        if let Some(pool) = self.pools.get_mut(&account)
            && let Some(holder) = pool.holders.remove(member)
        {
            for group in holder.spends.groups() {
                let slot = spends::slot(group.last_ns, account.window_ns());
                self.changes.spends.insert(SpendKey { account, member: *member, slot });
            }
            if pool.is_empty() {
                self.pools.remove(&account);
            }
        }
        if let Some(process) = self.members.get_mut(member) {
            process.accounts.remove(&account);
        }
        self.changes.holders.insert((account, *member));
    }

    /// Units of an account that are counted for anyone.
    fn counted(&self, account: Account, pool: &Pool, now_ns: u64) -> u32 {
        let window_ns = account.window_ns();
        let holders = pool.holders.values().map(|holder| holder.counted(now_ns, window_ns));
        holders.fold(pool.gone(now_ns, window_ns), u32::saturating_add).saturating_add(self.implicit(pool))
    }

    /// Units of shares of members without a part of their own.
    fn implicit(&self, pool: &Pool) -> u32 {
        let all = self.shares.iter().fold(0_u32, |sum, (share, count)| {
            sum.saturating_add(fair_share(pool.limit, *share).saturating_mul(*count))
        });
        let explicit = pool.holders.keys().filter_map(|member| self.members.get(member));
        explicit.fold(all, |sum, process| sum.saturating_sub(fair_share(pool.limit, process.share())))
    }

    /// The division of an account among the proxies that use it.
    fn plan(&self, account: Account, now_ns: u64) -> Plan {
        let mut plan = Plan::default();
        let Some(pool) = self.pools.get(&account) else { return plan };
        let window_ns = account.window_ns();
        let counted = self.counted(account, pool, now_ns);
        plan.limit = pool.limit;
        plan.free = pool.limit.saturating_sub(counted);
        plan.over = counted.saturating_sub(pool.limit);
        plan.moves = !self.is_recovering(now_ns);
        plan.noise = pool.limit.checked_div(NOISE_PART).unwrap_or(0);
        // What proxies hold that are not heard of cannot be divided.
        let mut divisible = pool.limit.saturating_sub(pool.gone(now_ns, window_ns));
        for (member, holder) in &pool.holders {
            let divides =
                self.members.get(member).is_some_and(|process| process.is_heard(now_ns) && !process.leaving);
            if divides {
                let used = holder.used(now_ns, window_ns);
                let Holder { cap, wanted, lacks, .. } = *holder;
                let needed = used.saturating_add(lacks).min(pool.limit);
                plan.parts.push(Part { member: *member, cap, wanted, used, target: needed });
            } else {
                divisible = divisible.saturating_sub(holder.counted(now_ns, window_ns));
            }
        }
        let needed = plan.parts.iter().fold(0_u32, |sum, part| sum.saturating_add(part.target));
        if needed > divisible {
            // Not enough for what is in use and was refused: in proportion to what is asked for.
            plan.parts.iter_mut().for_each(|part| part.target = 0);
        }
        let rest = if needed > divisible { divisible } else { divisible.saturating_sub(needed) };
        let need = |part: &Part| Need {
            wanted: part.wanted.saturating_sub(part.target),
            most: if part.wanted > 0 { pool.limit.saturating_sub(part.target) } else { 0 },
        };
        let needs: Vec<Need> = plan.parts.iter().map(need).collect();
        for (part, more) in plan.parts.iter_mut().zip(divide(rest, &needs)) {
            part.target = part.target.saturating_add(more);
        }
        plan
    }

    /// Has others report an account, so that `units` become free for a member.
    fn recall_for(
        &mut self,
        account: Account,
        member: &Member,
        units: u32,
        wake: &mut Option<BTreeSet<Member>>,
        now_ns: u64,
    ) {
        let Some(pool) = self.pools.get(&account) else { return };
        let plan = self.plan(account, now_ns);
        let mut called = BTreeSet::new();
        let mut coming = 0_u32;
        for part in plan.parts.iter().filter(|part| part.member != *member) {
            let next = plan.cap_of(&part.member, part.cap);
            if next < part.cap {
                called.insert(part.member);
                coming = coming.saturating_add(part.cap.saturating_sub(next));
            }
        }
        let has_more = self.shares.keys().any(|share| fair_share(pool.limit, *share) > 0);
        if has_more {
            for (other, process) in &self.members {
                if coming >= units {
                    break;
                }
                let own = fair_share(pool.limit, process.share());
                if own > 0 && other != member && process.is_heard(now_ns) && !pool.holders.contains_key(other)
                {
                    called.insert(*other);
                    coming = coming.saturating_add(own);
                }
            }
        }
        for other in called {
            self.call(account, &other, wake);
        }
    }

    /// Tells members that have too few units of an account that there may be more.
    fn tell_waiting(
        &mut self,
        account: Account,
        member: Option<&Member>,
        wake: &mut Option<BTreeSet<Member>>,
    ) {
        let Some(pool) = self.pools.get(&account) else { return };
        let waiting = pool
            .holders
            .iter()
            .filter(|(other, holder)| Some(*other) != member && holder.is_short(pool.limit));
        let waiting: Vec<Member> = waiting.map(|(other, _)| *other).collect();
        for other in waiting {
            self.call(account, &other, wake);
        }
    }

    fn call(&mut self, account: Account, member: &Member, wake: &mut Option<BTreeSet<Member>>) {
        if let Some(process) = self.members.get_mut(member).filter(|process| !process.left) {
            process.news.insert(account);
            if let Some(wake) = wake {
                wake.insert(*member);
            }
        }
    }

    /// Adds the news for a member to its answer.
    fn news(&mut self, member: &Member, answer: &mut Answer, now_ns: u64) {
        let Some(process) = self.members.get_mut(member) else { return };
        let mut news = std::mem::take(&mut process.news);
        let (share, leaving) = (process.share(), process.leaving);
        while let Some(account) = news.pop_first() {
            if answer.recalls.len() >= MAX_ENTRIES || answer.grants.len() >= MAX_ENTRIES.saturating_mul(2) {
                news.insert(account);
                break;
            }
            let Some(pool) = self.pools.get(&account) else { continue };
            let limit = pool.limit;
            let Some(holder) = pool.holders.get(member) else {
                if fair_share(limit, share) > 0 {
                    answer.recalls.push(Recall { account, limit, keep: 0 });
                }
                continue;
            };
            let before = holder.cap;
            if leaving || answer.recalls.iter().any(|recall| recall.account == account) {
                continue;
            }
            let cap = self.plan(account, now_ns).cap_of(member, before);
            if cap < before {
                answer.recalls.push(Recall { account, limit, keep: cap });
            } else if cap > before {
                let (elsewhere, elsewhere_ms) = self.elsewhere(account, member, now_ns);
                answer.grants.push(Grant { account, limit, cap: Some(cap), elsewhere, elsewhere_ms });
                self.set_cap(account, member, cap, before);
            }
        }
        if let Some(process) = self.members.get_mut(member) {
            process.news = news;
        }
    }

    /// The share that each member should have, and how much more is not taken back.
    fn target_share(&self) -> (u32, u32) {
        let staying = self.staying.max(1);
        if staying < LARGE_FLEET {
            return (SHARES.checked_div(staying).unwrap_or(0), 0);
        }
        let reserve = SHARES.checked_div(RESERVE_PART).unwrap_or(0);
        let target = SHARES.saturating_sub(reserve).checked_div(staying).unwrap_or(0);
        (target, target.checked_div(TOLERANCE_PART).unwrap_or(0))
    }

    /// The share that a member that says `said` is to have, as far as that can be told without a look at accounts.
    fn next_share(&self, process: &Process, said: u32, now_ns: u64) -> u32 {
        if process.leaving {
            return 0;
        }
        let current = process.told.min(said);
        if self.is_recovering(now_ns) {
            return said;
        }
        let (target, tolerance) = self.target_share();
        let free = SHARES.saturating_sub(self.shared_out());
        if current < target {
            // What is counted for it beyond what it goes by is free for it.
            let more = free.saturating_add(process.share().saturating_sub(said));
            said.saturating_add(target.saturating_sub(said).min(more))
        } else if process.told > target.saturating_add(tolerance) {
            target
        } else {
            process.told
        }
    }

    /// The share that a member is told. One that grows is told once every account is explicit of which it would be too much.
    fn share(&self, member: &Member, said: u32, answer: &mut Answer, now_ns: u64) -> u32 {
        let Some(process) = self.members.get(member) else { return 0 };
        let share = self.next_share(process, said, now_ns);
        if share <= process.share() {
            return share;
        }
        let now = process.share();
        for (account, pool) in &self.pools {
            if pool.holders.contains_key(member) {
                continue;
            }
            let more = fair_share(pool.limit, share).saturating_sub(fair_share(pool.limit, now));
            if more > 0 && self.counted(*account, pool, now_ns).saturating_add(more) > pool.limit {
                answer.recalls.push(Recall {
                    account: *account,
                    limit: pool.limit,
                    keep: fair_share(pool.limit, now),
                });
                if answer.recalls.len() >= MAX_ENTRIES {
                    break;
                }
            }
        }
        if answer.recalls.is_empty() { share } else { now.min(process.told.max(said)) }
    }

    /// Forgets spends whose window is over, and accounts without any.
    fn tidy(&mut self, now_ns: u64) {
        let from = self.tidied.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let accounts: Vec<Account> = self
            .pools
            .range((from, std::ops::Bound::Unbounded))
            .map(|(account, _)| *account)
            .take(TIDIED)
            .collect();
        self.tidied = if accounts.len() < TIDIED { None } else { accounts.last().copied() };
        for account in accounts {
            let window_ns = account.window_ns();
            let Some(pool) = self.pools.get_mut(&account) else { continue };
            let spends = pool.holders.iter_mut().map(|(member, holder)| (*member, &mut holder.spends));
            let gone = pool.gone.iter_mut().map(|(member, spends)| (*member, spends));
            for (member, spends) in spends.chain(gone) {
                spends.expire(now_ns, window_ns, |group| {
                    let slot = spends::slot(group.last_ns, window_ns);
                    self.changes.spends.insert(SpendKey { account, member, slot });
                });
            }
            pool.gone.retain(|_, spends| !spends.is_empty());
            if pool.is_empty() {
                self.pools.remove(&account);
            }
        }
    }
}

/// Division of an account.
#[derive(Debug, Default)]
struct Plan {
    /// The limit that is divided.
    limit: u32,
    /// Units that are counted for nobody.
    free: u32,
    /// Units that are counted beyond the limit: what proxies spent that were cut off.
    over: u32,
    /// Caps may change.
    moves: bool,
    /// A difference in what is asked for that moves no units in use.
    noise: u32,
    /// Proxies in touch with a part.
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    member: Member,
    cap: u32,
    wanted: u32,
    used: u32,
    /// The cap that it should have.
    target: u32,
}

impl Plan {
    fn part(&self, member: &Member) -> Option<&Part> {
        self.parts.iter().find(|part| part.member == *member)
    }

    fn is_short(&self) -> bool {
        self.parts.iter().any(|part| part.wanted > part.cap && part.target > part.cap)
    }

    fn target_of(&self, member: &Member) -> u32 {
        self.part(member).map_or(0, |part| part.target)
    }

    /// The next cap of a member that goes by `cap`.
    fn cap_of(&self, member: &Member, cap: u32) -> u32 {
        let Some(part) = self.part(member).filter(|_| self.moves) else { return cap };
        let idle = cap.saturating_sub(part.used);
        if self.over > 0 {
            // Units in use, too: what becomes free of them is not spent again.
            return cap.saturating_sub(idle.max(cap.saturating_sub(part.target)).min(self.over));
        }
        if part.target >= cap {
            return cap.saturating_add(part.target.saturating_sub(cap).min(self.free));
        }
        // It gives what others lack, and keeps the rest.
        let others = self.parts.iter().filter(|part| part.member != *member);
        let lack = others.fold(0_u32, |sum, part| {
            sum.saturating_add(part.target.min(part.wanted).saturating_sub(part.cap))
        });
        let give = cap.saturating_sub(part.target).min(lack.saturating_sub(self.free));
        cap.saturating_sub(if give <= self.noise { give.min(idle) } else { give })
    }
}
