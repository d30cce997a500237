//! Members of the fleet: how they join, leave and are released, and their shares of all limits.

use std::collections::BTreeSet;

use super::super::message::{Answer, MAX_ENTRIES, Member, Question, Recall};
use super::super::spends;
use super::super::{Account, RECOVER_NS, SHARES, SILENCE_NS, fair_share, is_same_ledger};
use super::{Ledger, SpendKey};

/// With this many proxies and more, one part in [`RESERVE_PART`] of all limits is in no share, and a share may be larger
/// than its target by one part in [`TOLERANCE_PART`]: so a proxy that joins does not change the share of every other one.
const LARGE_FLEET: u32 = 16;
const RESERVE_PART: u32 = 16;
const TOLERANCE_PART: u32 = 32;

/// What the ledger knows of a process of a proxy.
#[derive(Debug, Clone, Default)]
pub(super) struct Process {
    /// Number of its last question.
    pub(super) number: u64,
    /// The share it goes by at most, as it says.
    pub(super) said: u32,
    /// The share it was told.
    pub(super) told: u32,
    pub(super) heard_ns: u64,
    pub(super) leaving: bool,
    pub(super) left: bool,
    /// Processes of the same proxy that were there when it joined.
    pub(super) before: Vec<Member>,
    /// The next process of the same proxy took its place.
    pub(super) replaced: bool,
    /// It is known from what was kept, and did not show yet that it took an answer since.
    pub(super) kept: bool,
    /// Accounts with news for it.
    pub(super) news: BTreeSet<Account>,
    /// Accounts with a holder of its own.
    pub(super) accounts: BTreeSet<Account>,
}

impl Process {
    pub(super) fn share(&self) -> u32 {
        self.said.max(self.told)
    }

    pub(super) fn is_heard(&self, now_ns: u64) -> bool {
        !self.left && now_ns < self.heard_ns.saturating_add(SILENCE_NS)
    }
}

impl Ledger {
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

    /// Whether a process of a proxy is leaving or has left.
    pub fn leaves(&self, member: &Member) -> bool {
        self.members.get(member).is_some_and(|process| process.leaving)
    }

    /// Whether a proxy that was told to leave has left.
    pub fn has_left(&self, proxy: u64) -> bool {
        let mut processes = self.members.iter().filter(|(member, _)| member.proxy == proxy);
        processes.all(|(_, process)| process.left)
    }

    /// Takes in a process that is not known; `false`: it has to join as a new one.
    pub(super) fn admit(&mut self, question: &Question, now_ns: u64) -> bool {
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

    pub(super) fn join(&mut self, member: Member, share: u32, now_ns: u64) {
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

    pub(super) fn set_share(&mut self, member: &Member, said: u32, told: u32) {
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
    pub(super) fn replace_before(&mut self, member: &Member, now_ns: u64) -> bool {
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
    pub(super) fn leave(&mut self, member: &Member, now_ns: u64) {
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
    pub(super) fn lose(&mut self, member: &Member, now_ns: u64) {
        let Some(process) = self.members.get(member) else { return };
        if !process.left {
            let units = self.unreported(member, process, now_ns);
            self.released_units = self.released_units.saturating_add(units);
            self.released_members = self.released_members.saturating_add(1);
        }
        self.leave(member, now_ns);
    }

    /// A process is gone, and not known any more.
    pub(super) fn release(&mut self, member: &Member, now_ns: u64) {
        self.lose(member, now_ns);
        if self.members.remove(member).is_some() {
            self.count_share(0, -1);
        }
    }

    /// Drops a member's caps, and keeps its spends; others may have news then.
    pub(super) fn bequeath(&mut self, member: &Member, now_ns: u64) {
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

    pub(super) fn unreported(&self, member: &Member, process: &Process, now_ns: u64) -> u64 {
        let holders = process.accounts.iter().filter_map(|account| {
            let holder = self.pools.get(account)?.holders.get(member)?;
            let used = holder.spends.used_at(now_ns, account.window_ns());
            Some(u64::from(holder.cap.saturating_sub(used)))
        });
        holders.fold(0, u64::saturating_add)
    }

    /// The share that each member should have, and how much more is not taken back.
    pub(super) fn target_share(&self) -> (u32, u32) {
        let staying = self.staying.max(1);
        if staying < LARGE_FLEET {
            return (SHARES.checked_div(staying).unwrap_or(0), 0);
        }
        let reserve = SHARES.checked_div(RESERVE_PART).unwrap_or(0);
        let target = SHARES.saturating_sub(reserve).checked_div(staying).unwrap_or(0);
        (target, target.checked_div(TOLERANCE_PART).unwrap_or(0))
    }

    /// The share that a member that says `said` is to have, as far as that can be told without a look at accounts.
    pub(super) fn next_share(&self, process: &Process, said: u32, now_ns: u64) -> u32 {
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
    pub(super) fn share(&self, member: &Member, said: u32, answer: &mut Answer, now_ns: u64) -> u32 {
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
}
