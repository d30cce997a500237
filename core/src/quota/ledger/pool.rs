//! Accounts: what proxies have and spent of each, and how it is divided.

use std::collections::{BTreeMap, BTreeSet};

use super::super::division::{Need, divide};
use super::super::message::{Answer, Grant, MAX_ENTRIES, Member, Recall, Report};
use super::super::spends::{self, Spends};
use super::super::{Account, fair_share};
use super::membership::Process;
use super::{Ledger, MS, SpendKey};

/// Noise in what is asked for moves no units in use: one part in so many of a limit.
const NOISE_PART: u32 = 64;

/// One account.
#[derive(Debug, Clone, Default)]
pub(super) struct Pool {
    /// As it was last reported.
    pub(super) limit: u32,
    pub(super) holders: BTreeMap<Member, Holder>,
    /// Spends of processes that are gone.
    pub(super) gone: BTreeMap<Member, Spends>,
}

impl Pool {
    /// Units in use by processes that are gone.
    pub(super) fn gone(&self, now_ns: u64, window_ns: u64) -> u32 {
        let gone = self.gone.values().map(|spends| spends.used_at(now_ns, window_ns));
        gone.fold(0, u32::saturating_add)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.holders.is_empty() && self.gone.is_empty()
    }
}

/// A proxy's part of an account.
#[derive(Debug, Clone, Default)]
pub(super) struct Holder {
    /// The limit that it goes by.
    pub(super) limit: u32,
    pub(super) cap: u32,
    /// Units that its VMs held by the last report.
    pub(super) held: u32,
    /// Units asked for in a window's time.
    pub(super) wanted: u32,
    /// Units refused since the report before the last.
    pub(super) lacks: u32,
    /// Units spent since its record was made.
    pub(super) total: u64,
    pub(super) spends: Spends,
}

impl Holder {
    /// Units in use, as far as they were reported.
    pub(super) fn used(&self, now_ns: u64, window_ns: u64) -> u32 {
        self.spends.used_at(now_ns, window_ns).saturating_add(self.held)
    }

    /// Units that the proxy may have in use.
    fn counted(&self, now_ns: u64, window_ns: u64) -> u32 {
        self.cap.max(self.used(now_ns, window_ns))
    }

    /// Whether it could use more than its cap.
    pub(super) fn is_short(&self, limit: u32) -> bool {
        self.wanted > self.cap && self.cap < limit
    }
}

impl Ledger {
    /// Takes over what a proxy reports.
    pub(super) fn note(&mut self, member: &Member, report: &Report, now_ns: u64) {
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

    /// A report that may be old, with no less than what is known.
    pub(super) fn at_least(&self, member: &Member, report: &Report, now_ns: u64) -> Report {
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

    /// The cap of a member that reported an account; calls others where units are to move.
    pub(super) fn grant(
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
        if cap < report.cap || plan.free > cap.saturating_sub(report.cap.max(report.used)) {
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
    pub(super) fn counted(&self, account: Account, pool: &Pool, now_ns: u64) -> u32 {
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
                plan.parts.push(Part { member: *member, cap, wanted, used, needed, target: needed });
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
    pub(super) fn tell_waiting(
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
    pub(super) fn news(&mut self, member: &Member, answer: &mut Answer, now_ns: u64) {
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
    /// Units in use and refused.
    needed: u32,
    /// The cap that it should have.
    target: u32,
}

impl Plan {
    fn part(&self, member: &Member) -> Option<&Part> {
        self.parts.iter().find(|part| part.member == *member)
    }

    fn is_short(&self) -> bool {
        self.parts.iter().any(|part| part.wanted > part.cap && part.target.max(part.needed) > part.cap)
    }

    fn target_of(&self, member: &Member) -> u32 {
        self.part(member).map_or(0, |part| part.target.max(part.needed))
    }

    /// The next cap of a member that goes by `cap`.
    fn cap_of(&self, member: &Member, cap: u32) -> u32 {
        let Some(part) = self.part(member).filter(|_| self.moves) else { return cap };
        let idle = cap.saturating_sub(part.used);
        if self.over > 0 {
            // Units in use, too: what becomes free of them is not spent again.
            return cap.saturating_sub(idle.max(cap.saturating_sub(part.target)).min(self.over));
        }
        let aim = part.target.max(part.needed);
        if aim > cap {
            // Units in use beyond the cap, as after a recall of a share that was spent meanwhile, are counted already.
            return aim.min(cap.max(part.used).saturating_add(self.free));
        }
        // It gives what others lack by their targets, and idle units for what was refused elsewhere.
        let others = || self.parts.iter().filter(|part| part.member != *member);
        let sum = |of: fn(&Part) -> u32| others().fold(0_u32, |sum, part| sum.saturating_add(of(part)));
        let lack = sum(|part| part.target.min(part.wanted).saturating_sub(part.cap));
        let refused = sum(|part| part.needed.saturating_sub(part.cap));
        let give = cap.saturating_sub(part.target).min(lack.saturating_sub(self.free));
        let give = if give <= self.noise { give.min(idle) } else { give };
        cap.saturating_sub(give.max(idle.min(refused.saturating_sub(self.free))))
    }
}
