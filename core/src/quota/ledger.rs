//! The ledger: caps of all proxies, by account. Counting and dividing are one thing: each rule of the one is what makes a
//! rule of the other safe. See the proof in [`super`].

mod kept;
mod membership;
mod pool;

use std::collections::{BTreeMap, BTreeSet};

pub use self::kept::{Changes, HolderRow, MemberRow, Saved, SpendKey, SpendRow};
use self::membership::Process;
use self::pool::Pool;
use super::message::{Answer, FORMAT, Member, Question, Report};
use super::spends;
use super::{Account, RELEASE_NS, REPORT_NS, REPORT_NS_PER_PROXY, hold_ns, is_same_ledger};

const MS: u64 = 1_000_000;
/// Interval between two looks for silent proxies.
const LOOK_NS: u64 = 100_000_000;
/// Accounts that are tidied at each of them.
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

/// A proxy that was not heard of for longer than [`super::SILENCE_NS`]: it spends its share of each limit, and what it spends is
/// not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SilentProxy {
    /// The process.
    pub member: Member,
    /// Nanoseconds since it was heard of.
    pub silent_ns: u64,
    /// Units of accounts that it used, granted and not reported as spent.
    pub units: u64,
    /// Its share of all other limits, of [`super::SHARES`].
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

    /// The ledger's number.
    pub fn era(&self) -> u64 {
        self.era
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

    /// Whether a question may have been asked before the last one that the ledger answered in an earlier run.
    fn may_be_old(&self, question: &Question) -> bool {
        let shows_answer = question.era == self.era || !is_same_ledger(question.era, self.era);
        let is_kept = self.members.get(&question.member).is_some_and(|process| process.kept);
        is_kept && (question.era == 0 || !shows_answer)
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
