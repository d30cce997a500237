//! What the control plane knows of who holds what, and how it divides limits. Counting and dividing are one thing:
//! each rule of the one is what makes a rule of the other safe.

use std::collections::{BTreeMap, BTreeSet};

use super::division::{Need, divide};
use super::fellow::{Fellow, Holder};
use super::message::{Answer, FORMAT, Grant, MAX_ENTRIES, Member, Question, Recall, Report};
use super::{AHEAD_PART, ANSWER_NS, Account, SHARES, Terms, UNSAID_PART, fair_share};

/// One part in so many of all limits is nobody's own, so that a new proxy has something from its first request.
const RESERVE_PART: u32 = 16;

/// Who holds what. There must be one for a fleet at a time.
///
/// Every change must be kept, as [`Exchange`] says, before the answer is sent. Then [`Ledger::resume`] goes on
/// from what was kept. To keep all of [`Ledger::saved`] now and then, as when the control plane is told to stop, lets
/// proxies that restart meanwhile leave less behind. Where anything may have been lost, [`Ledger::in_doubt`] starts over.
#[derive(Debug)]
pub struct Ledger {
    pub(super) terms: Terms,
    pub(super) era: u64,
    /// Until when proxies may spend of whom nothing is known; 0: there are none.
    pub(super) doubt_until_ns: u64,
    pub(super) members: BTreeMap<Member, Fellow>,
    pub(super) pools: BTreeMap<Account, BTreeMap<Member, Holder>>,
}

/// An answer, and what has to be kept before it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// The answer.
    pub answer: Answer,
    /// The proxies whose [`Ledger::member`] was changed.
    pub members_changed: Vec<Member>,
    /// The accounts whose [`Ledger::pool`] was changed.
    pub pools_changed: Vec<Account>,
}

impl Exchange {
    fn new(answer: Answer, members: BTreeSet<Member>, pools: BTreeSet<Account>) -> Self {
        Self {
            answer,
            members_changed: members.into_iter().collect(),
            pools_changed: pools.into_iter().collect(),
        }
    }
}

/// A question that is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// A later one came before it.
    #[error("a later question was answered already")]
    Superseded,
}

/// What a proxy is to have of an account.
struct Decision {
    /// So many units; `None`: its own.
    held: Option<u32>,
    /// How many it should have.
    target: u32,
    /// Units that others have in use.
    elsewhere: u32,
    /// Units that nobody has.
    free: u32,
}

impl Ledger {
    /// A ledger of which nothing was ever handed out: of a control plane that never had one before. `era` tells it
    /// from all other ledgers.
    pub fn new(terms: Terms, era: u64) -> Self {
        Self { terms, era, doubt_until_ns: 0, members: BTreeMap::new(), pools: BTreeMap::new() }
    }

    /// Starts over where it is not known what was handed out: what is not known to be unused counts as used, until
    /// a share has ended of whoever does not come forward, and then a window has passed. `era` must be new.
    pub fn in_doubt(terms: Terms, era: u64, now_ns: u64) -> Self {
        Self { doubt_until_ns: now_ns.saturating_add(terms.keep_ns()), ..Self::new(terms, era) }
    }

    /// The ledger's number.
    pub fn era(&self) -> u64 {
        self.era
    }

    /// Units in use of each account that more than a little is used of, as far as is known, with the limit.
    pub fn usage(&self) -> impl Iterator<Item = (Account, u32, u32)> {
        self.pools.iter().map(|(account, pool)| {
            let used = pool.values().fold(0_u32, |sum, holder| sum.saturating_add(holder.used));
            (*account, used, pool.values().map(|holder| holder.of).max().unwrap_or(0))
        })
    }

    /// Whether a proxy is to be answered although it has nothing to report: otherwise its question may be held
    /// back for [`super::HOLD_NS`], and is then to be handed to [`Ledger::exchange`].
    pub fn has_news(&self, member: &Member, now_ns: u64) -> bool {
        match self.members.get(member) {
            None => true,
            Some(fellow) => {
                !fellow.looks.is_empty() || self.next_share(member, fellow.share, now_ns) != fellow.told
            }
        }
    }

    /// Answers a question that came at a time of the control plane's monotonic clock.
    ///
    /// # Errors
    /// [`ExchangeError`]; nothing changes then.
    pub fn exchange(&mut self, question: &Question, now_ns: u64) -> Result<Exchange, ExchangeError> {
        let (mut members_changed, mut pools_changed) = self.forget(now_ns);
        let member = &question.member;
        let mut answer = self.blank(question.number);
        let known = self.members.get(member);
        let later = |(other, _): (&Member, &Fellow)| {
            (other.proxy, other.incarnation) == (member.proxy, member.incarnation) && other.term > member.term
        };
        if known.is_some_and(|fellow| question.number <= fellow.number) || self.members.iter().any(later) {
            return Err(ExchangeError::Superseded);
        }
        let unknown = known.is_none() && question.applied > 0 && now_ns >= self.doubt_until_ns;
        if unknown || known.is_some_and(|fellow| fellow.ended.is_some()) {
            answer.rejoin = true;
            return Ok(Exchange::new(answer, members_changed, pools_changed));
        }
        let before = known.map(|fellow| (fellow.share, fellow.acked_ns));
        if known.is_none() {
            self.take_over(member, now_ns, &mut members_changed, &mut pools_changed);
        }
        members_changed.extend(self.acknowledge(question, now_ns));
        pools_changed.extend(self.note(member, &question.reports, now_ns));
        if let Some(fellow) = self.members.get_mut(member) {
            fellow.number = question.number;
            if question.share > 0 {
                fellow.owed = 0;
            }
            fellow.share = question.share.max(fellow.owed);
            fellow.told = fellow.told.min(question.share);
            fellow.answered_ns = now_ns;
            fellow.sent_ns = Some(now_ns);
        }
        for report in &question.reports {
            let (grant, changed) = self.grant(member, report, now_ns);
            answer.grants.push(grant);
            if changed {
                pools_changed.insert(report.account);
            }
        }
        let mut share = self.next_share(member, question.share, now_ns);
        if share > question.share {
            let (exceptions, all) = self.exceptions(member, share, now_ns);
            pools_changed.extend(exceptions.iter().map(|recall| recall.account));
            answer.recalls = exceptions;
            if !all {
                share = question.share;
            }
        }
        if let Some(fellow) = self.members.get_mut(member) {
            fellow.share = question.share.max(share).max(fellow.owed);
            fellow.told = share;
        }
        answer.share = share;
        self.recall(member, &mut answer.recalls, now_ns);
        if !pools_changed.is_empty() || self.is_to_keep(member, before) {
            members_changed.insert(member.clone());
        }
        Ok(Exchange::new(answer, members_changed, pools_changed))
    }

    fn blank(&self, number: u64) -> Answer {
        Answer {
            format: FORMAT,
            number,
            era: self.era,
            rejoin: false,
            share: 0,
            lease_s: self.terms.lease_s,
            keep_s: self.terms.keep_s,
            grants: Vec::new(),
            recalls: Vec::new(),
        }
    }

    /// Whether it began in doubt, and that is not over: then shares and grants do not grow.
    pub fn is_in_doubt(&self, now_ns: u64) -> bool {
        self.doubts(self.terms.longest_window_ns(), now_ns)
    }

    fn doubts(&self, window_ns: u64, now_ns: u64) -> bool {
        self.doubt_until_ns > 0 && now_ns < self.doubt_until_ns.saturating_add(window_ns)
    }

    /// Drops members whose shares have ended, and whose spends have left all windows.
    fn forget(&mut self, now_ns: u64) -> (BTreeSet<Member>, BTreeSet<Account>) {
        if !self.is_in_doubt(now_ns) {
            self.doubt_until_ns = 0;
        }
        let window_ns = self.terms.longest_window_ns();
        let keep_ns = self.terms.keep_ns();
        let is_over = |fellow: &Fellow| now_ns >= fellow.end_ns(keep_ns).saturating_add(window_ns);
        let gone = self.members.extract_if(.., |_, fellow| is_over(fellow));
        let gone: BTreeSet<Member> = gone.map(|(member, _)| member).collect();
        let mut changed = BTreeSet::new();
        if !gone.is_empty() {
            self.pools.retain(|account, pool| {
                let before = pool.len();
                pool.retain(|member, _| !gone.contains(member));
                if pool.len() < before {
                    changed.insert(*account);
                }
                !pool.is_empty()
            });
        }
        (gone, changed)
    }

    /// Whether something changed that has to be kept.
    fn is_to_keep(&self, member: &Member, before: Option<(u32, Option<u64>)>) -> bool {
        let Some(fellow) = self.members.get(member) else { return true };
        before.is_none_or(|(share, acked_ns)| share != fellow.share || acked_ns.is_none())
    }

    /// A process that was lost and is a new member goes on with what it had, and counts what it spent itself.
    fn take_over(
        &mut self,
        member: &Member,
        now_ns: u64,
        members_changed: &mut BTreeSet<Member>,
        pools_changed: &mut BTreeSet<Account>,
    ) {
        let lost = |(other, fellow): &(&Member, &Fellow)| {
            fellow.ended.is_none() && (other.proxy, other.incarnation) == (member.proxy, member.incarnation)
        };
        let Some(before) = self.members.iter().find(lost).map(|(other, _)| other.clone()) else { return };
        let Some(fellow) = self.members.remove(&before) else { return };
        let moved = self.pools.iter_mut().filter_map(|(account, pool)| {
            let holder = pool.remove(&before)?;
            pool.insert(member.clone(), Holder { unsure: true, told: true, ..holder });
            Some(*account)
        });
        let looks: BTreeSet<Account> = moved.collect();
        pools_changed.extend(&looks);
        members_changed.insert(before);
        let back = Fellow {
            share: fellow.share,
            owed: fellow.share,
            steady_since_ns: now_ns,
            looks,
            joined_ns: now_ns,
            leaves_since_ns: fellow.leaves_since_ns,
            ..Fellow::default()
        };
        self.members.insert(member.clone(), back);
    }

    /// A process took an answer that was sent at a time, so it was there after that. Others of the same proxy that
    /// were heard of before have ended.
    fn end_others(&mut self, member: &Member, sent_ns: u64, now_ns: u64) -> Vec<Member> {
        let mut ended = Vec::new();
        if self.terms.hot_restart {
            return ended;
        }
        for (other, fellow) in &mut self.members {
            let same = other.proxy == member.proxy && other.incarnation != member.incarnation;
            if same && fellow.ended.is_none() && fellow.joined_ns < sent_ns {
                fellow.end(self.terms, now_ns);
                ended.push(other.clone());
            }
        }
        ended
    }

    /// Notes which answer a proxy has taken; which other processes of it have ended.
    fn acknowledge(&mut self, question: &Question, now_ns: u64) -> Vec<Member> {
        // Of one that comes from another ledger it is not known for how long it was in touch.
        let steady_since_ns = if question.applied > 0 { now_ns } else { 0 };
        let new = Fellow { told: question.share, joined_ns: now_ns, steady_since_ns, ..Fellow::default() };
        let fellow = self.members.entry(question.member.clone()).or_insert(new);
        if question.applied == 0 || question.applied != fellow.number {
            return Vec::new();
        }
        let Some(sent_ns) = fellow.sent_ns else { return Vec::new() };
        let gap_ns = fellow.acked_ns.map_or(u64::MAX, |acked_ns| sent_ns.saturating_sub(acked_ns));
        let joined = fellow.acked_ns.is_none() && fellow.steady_since_ns == 0;
        fellow.acked_ns = Some(sent_ns);
        // It is in touch for a lease from when it asked, and asks and hears of an answer near when it was sent.
        let steady_ns = self.terms.lease_ns().saturating_sub(ANSWER_NS.saturating_mul(2));
        if gap_ns > steady_ns && !joined {
            fellow.steady_since_ns = sent_ns.saturating_add(ANSWER_NS);
        }
        let was_away = gap_ns > self.terms.lease_ns().saturating_mul(2);
        let ended = self.end_others(&question.member, sent_ns, now_ns);
        let Some(fellow) = self.members.get_mut(&question.member).filter(|_| was_away) else { return ended };
        // It may have been alone for long enough to take back its own.
        for (account, pool) in &mut self.pools {
            if let Some(holder) = pool.get_mut(&question.member) {
                holder.unsure = true;
                fellow.looks.insert(*account);
            }
        }
        ended
    }

    /// Takes over what a proxy says that it has; which accounts were changed.
    fn note(&mut self, member: &Member, reports: &[Report], now_ns: u64) -> BTreeSet<Account> {
        let mut changed = BTreeSet::new();
        for report in reports {
            let Report { account, limit, held, used, wanted, dearest, own } = *report;
            let (unsure, told) = (false, false);
            let holder =
                Holder { held, of: limit, used, wanted, dearest, answered_ns: now_ns, unsure, told, own };
            let before = self.pools.entry(account).or_default().insert(member.clone(), holder);
            if before.is_none_or(|before| (before.held, before.of) != (held, limit)) {
                changed.insert(account);
            }
            if let Some(fellow) = self.members.get_mut(member) {
                fellow.looks.remove(&account);
            }
        }
        changed
    }

    /// What share a proxy is to have that has `share`.
    fn next_share(&self, member: &Member, share: u32, now_ns: u64) -> u32 {
        // What it was before is only given back by whoever has it, step by step.
        if self.leaves(member) && self.members.get(member).is_some_and(|fellow| fellow.owed == 0) {
            return 0;
        }
        if self.is_in_doubt(now_ns) {
            return share;
        }
        let mut others = 0_u32;
        let mut locked = 0_u32;
        let mut living = 1_u32;
        for (_, fellow) in self.members.iter().filter(|(other, _)| *other != member) {
            others = others.saturating_add(fellow.locked_share());
            if fellow.lives(self.terms, now_ns) {
                living = living.saturating_add(1);
            } else {
                locked = locked.saturating_add(fellow.locked_share());
            }
        }
        let usable = SHARES.saturating_sub(locked);
        let reserve = usable.checked_div(RESERVE_PART).unwrap_or(0);
        let target = usable.saturating_sub(reserve).checked_div(living).unwrap_or(0);
        let free = SHARES.saturating_sub(others).saturating_sub(share);
        let owed = self.members.get(member).map_or(0, |fellow| fellow.owed);
        if share < owed {
            owed
        } else if share == 0 {
            target.min(free.checked_div(2).unwrap_or(0))
        } else if share < target {
            share.saturating_add(target.saturating_sub(share).min(free.saturating_sub(reserve)))
        } else if share > target.saturating_add(target.checked_div(32).unwrap_or(0)) {
            target
        } else {
            share
        }
    }

    /// What a proxy is to have of an account that it has reported on, and whether that is something else.
    fn grant(&mut self, member: &Member, report: &Report, now_ns: u64) -> (Grant, bool) {
        let Report { account, limit, held, wanted, .. } = *report;
        let decision = self.decide(member, account, limit, now_ns);
        let now_held = decision.held.unwrap_or(held);
        let short = wanted.min(decision.target) > now_held;
        let left = decision.free.saturating_add(held).saturating_sub(now_held);
        let mut calls = Vec::new();
        if let Some(pool) = self.pools.get_mut(&account) {
            match (decision.held, pool.get_mut(member)) {
                (Some(granted), Some(holder)) => holder.held = held.max(granted),
                _ => {
                    pool.remove(member);
                }
            }
            // Others are asked to give what this one needs, or told that there is something for them.
            for (other, fellow) in self.members.iter().filter(|(other, _)| *other != member) {
                let waits = pool.get(other).is_some_and(|holder| holder.wanted > holder.held);
                if short && left == 0 || waits && left > 0 {
                    calls.push((other.clone(), fellow.share));
                }
            }
            if pool.is_empty() {
                self.pools.remove(&account);
            }
        }
        for (other, _) in calls {
            let living = self.members.get(&other).is_some_and(|fellow| fellow.lives(self.terms, now_ns));
            if !living {
                continue;
            }
            let theirs = self.decide(&other, account, limit, now_ns);
            let has = self.held_by(&other, account, limit);
            let moves = theirs.held.is_some_and(|held| held != has);
            if moves && let Some(fellow) = self.members.get_mut(&other) {
                fellow.looks.insert(account);
            }
        }
        let grant = Grant { account, limit, held: decision.held, elsewhere: decision.elsewhere };
        (grant, decision.held != Some(held))
    }

    fn held_by(&self, member: &Member, account: Account, limit: u32) -> u32 {
        let holder = self.pools.get(&account).and_then(|pool| pool.get(member));
        let share = self.members.get(member).map_or(0, |fellow| fellow.share);
        holder.map_or(fair_share(limit, share), |holder| holder.held)
    }

    /// The accounts of which a proxy must not have a larger share since others have it, and whether that is all of
    /// them. It has no more of them than now, if it takes the answer.
    fn exceptions(&mut self, member: &Member, share: u32, now_ns: u64) -> (Vec<Recall>, bool) {
        let Some(now) = self.members.get(member) else { return (Vec::new(), false) };
        let then = Fellow { share, ..now.clone() };
        let mut exceptions = Vec::new();
        for (account, pool) in &self.pools {
            let Some(limit) = pool.values().map(|holder| holder.of).max() else { continue };
            if pool.get(member).is_some_and(|holder| !holder.told) {
                continue;
            }
            let others = self.members.iter().filter(|(other, _)| *other != member);
            let taken = others.fold(0_u32, |sum, (other, fellow)| {
                let units = fellow.counted(pool.get(other), self.terms, *account, limit, now_ns);
                sum.saturating_add(units)
            });
            // It may not have heard what it was told.
            let told = pool.get(member).map_or(0, |holder| holder.held);
            let then_has = then.counted(None, self.terms, *account, limit, now_ns).max(told);
            let one_limit = pool.values().all(|holder| holder.of == limit);
            if !one_limit || taken.saturating_add(then_has) > limit {
                if exceptions.len() >= MAX_ENTRIES {
                    return (exceptions, false);
                }
                let at_most = fair_share(limit, now.told);
                exceptions.push(Recall { account: *account, limit, at_most });
            }
        }
        for (account, pool) in &mut self.pools {
            if let Some(holder) = pool.get_mut(member).filter(|holder| holder.told) {
                holder.unsure = true;
            }
            if let Ok(place) = exceptions.binary_search_by_key(account, |recall| recall.account)
                && let Some(Recall { limit, at_most, .. }) = exceptions.get(place)
            {
                let told = pool.get(member).map_or(0, |holder| holder.held);
                let holder = Holder {
                    held: told.max(*at_most),
                    of: *limit,
                    used: 0,
                    wanted: 0,
                    dearest: 0,
                    answered_ns: now_ns,
                    unsure: false,
                    told: true,
                    own: false,
                };
                pool.insert(member.clone(), holder);
            }
        }
        (exceptions, true)
    }

    /// Adds what a proxy is to report on.
    fn recall(&mut self, member: &Member, recalls: &mut Vec<Recall>, now_ns: u64) {
        let looks = self.members.get_mut(member).map(|fellow| std::mem::take(&mut fellow.looks));
        let looks = looks.map(|mut looks| {
            looks.extend(self.not_given_back(member));
            looks
        });
        let mut rest = BTreeSet::new();
        for account in looks.unwrap_or_default() {
            if recalls.iter().any(|recall| recall.account == account) {
                continue;
            }
            if recalls.len() >= MAX_ENTRIES {
                rest.insert(account);
                continue;
            }
            let Some(pool) = self.pools.get(&account) else { continue };
            let Some(limit) = pool.values().map(|holder| holder.of).min() else { continue };
            let at_most = match self.decide(member, account, limit, now_ns).held {
                Some(held) if held < self.held_by(member, account, limit) => held,
                _ => u32::MAX,
            };
            recalls.push(Recall { account, limit, at_most });
        }
        if let Some(fellow) = self.members.get_mut(member) {
            fellow.looks = rest;
        }
    }

    /// What a proxy should have of an account.
    fn decide(&self, member: &Member, account: Account, limit: u32, now_ns: u64) -> Decision {
        let pool = self.pools.get(&account);
        let holder_of = |member: &Member| pool.and_then(|pool| pool.get(member));
        let own = fair_share(limit, self.members.get(member).map_or(0, |fellow| fellow.told));
        let mine = holder_of(member).copied().unwrap_or(Holder {
            held: own,
            of: limit,
            used: 0,
            wanted: 0,
            dearest: 0,
            answered_ns: now_ns,
            unsure: false,
            told: false,
            own: false,
        });
        if self.leaves(member) {
            // What is back is not for it.
            let held = mine.held.min(mine.used);
            let share = self.members.get(member).map_or(0, |fellow| fellow.share);
            let kept = (mine.held > 0 || share > 0).then_some(held);
            return Decision { held: kept, target: held, elsewhere: 0, free: 0 };
        }
        if self.doubts(account.window_ns(), now_ns) {
            // Of what was agreed on with the ledger before, others may count on what this one gave away.
            let held = if mine.own { own } else { mine.held.min(own) };
            return Decision { held: Some(held), target: held, elsewhere: 0, free: 0 };
        }
        let ahead = limit.checked_div(AHEAD_PART).unwrap_or(0).max(1);
        let most = |holder: &Holder| holder.used.saturating_add(ahead.max(holder.dearest));
        let need = |holder: &Holder| Need { wanted: holder.wanted, most: most(holder) };
        // The one who asks comes first.
        let mut needs = vec![need(&mine)];
        let mut others = Vec::new();
        let mut taken = 0_u32;
        let mut elsewhere = 0_u32;
        // Whether somebody needs more than its own.
        let mut hot = false;
        for (other, fellow) in self.members.iter().filter(|(other, _)| *other != member) {
            let holder = holder_of(other);
            taken = taken.saturating_add(fellow.counted(holder, self.terms, account, limit, now_ns));
            elsewhere = elsewhere.saturating_add(holder.map_or(0, |holder| holder.used));
            let theirs = fair_share(limit, fellow.locked_share());
            hot |= holder.is_some_and(|holder| holder.held.max(holder.wanted) > theirs);
            if fellow.lives(self.terms, now_ns) {
                needs.push(holder.map_or(Need { wanted: 0, most: ahead }, need));
                others.push(holder);
            }
        }
        let targets = divide(limit, &needs);
        let target = targets.first().copied().unwrap_or(0);
        let short = others.iter().zip(targets.iter().skip(1)).fold(0_u32, |sum, (holder, target)| {
            let missing = holder.map_or(0, |holder| {
                let due = (*target).min(holder.wanted);
                due.saturating_sub(holder.held)
            });
            sum.saturating_add(missing)
        });
        let available = limit.saturating_sub(taken);
        let free = available.saturating_sub(mine.held);
        // So little that nothing would be said of it.
        let quiet = mine.wanted.max(mine.used).saturating_mul(4 * UNSAID_PART) <= own;
        // Noise in what is wanted moves no units, but what is idle is free to go.
        let tolerance = if mine.wanted < mine.held { 0 } else { limit.checked_div(64).unwrap_or(0).max(1) };
        let surplus = mine.held.saturating_sub(target);
        let held = if quiet && !hot && available >= own {
            // Others may count on less, if they agreed when the limit was lower.
            let one_limit = pool.is_none_or(|pool| pool.values().all(|holder| holder.of == limit));
            if mine.held <= own && one_limit {
                return Decision { held: None, target, elsewhere, free };
            }
            own
        } else if target > mine.held {
            if mine.wanted > mine.held || short == 0 { target } else { mine.held }
        } else if short > free && surplus > tolerance {
            mine.held.saturating_sub(surplus.min(short.saturating_sub(free)))
        } else {
            mine.held
        };
        let held = held.min(most(&mine));
        Decision { held: Some(held.min(available)), target, elsewhere, free }
    }
}
