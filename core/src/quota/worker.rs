//! Decisions of one VM about requests with a limit.

use std::collections::HashMap;

use ahash::RandomState;

use super::page::{self, Page, PageError, Write};
use super::record::{Draw, Record};
use super::spends::Spends;
use super::standing::Standing;
use super::verdict::{Basis, QuotaStatus, Verdict, Why};
use super::{Account, SECOND_NS, dirty};
use crate::shm::SharedData;

/// Time for which a VM may hold units without a word. A VM that traps loses them for this time and a window.
const DRAW_NS: u64 = 2_000_000_000;
/// What would have to be returned sooner is not drawn: the VM might not return it in time.
const MIN_DRAW_NS: u64 = 500_000_000;
/// The most units that a VM draws beyond what a request needs, as one part in so many of what is free: units that a VM
/// holds are missing at the others.
const DRAW_PART: u32 = 64;
/// The most accounts that a VM settles at one go: a millisecond's work.
const MAX_SETTLED: usize = 64;
/// The most accounts that a VM keeps in mind; others are looked up for every request.
const MAX_PURSES: usize = 65_536;
/// A pending request is told to come again after this time.
const PENDING_NS: u64 = SECOND_NS;

/// One VM's part in the limits.
#[derive(Debug)]
pub struct Worker {
    vm: u64,
    purses: HashMap<Account, Purse, RandomState>,
}

/// Units of an account that a VM holds, and what it has not written to the record yet.
#[derive(Debug, Clone, Default)]
struct Purse {
    limit: u32,
    /// Units that may be spent before `until_ns`.
    units: u32,
    until_ns: u64,
    /// Units of the same draw that were spent.
    spent: Spends,
    spent_units: u32,
    /// Units spent between the last two looks at the record.
    pace: u32,
    asked_for: u32,
    refused: u32,
    /// Requests of `refused_cost` and more are refused until then: the limit is spent until `reset_at_ns`.
    refused_until_ns: u64,
    refused_cost: u32,
    remaining: u32,
    reset_at_ns: u64,
    silent_from_ns: u64,
    /// The latest time that was seen: a clock that goes backwards stands still.
    now_ns: u64,
    touched: bool,
}

impl Purse {
    fn status(&self, account: Account, now_ns: u64) -> QuotaStatus {
        QuotaStatus {
            limit: self.limit,
            remaining: self.remaining,
            reset_ns: self.reset_at_ns.saturating_sub(now_ns).min(account.window_ns()),
            basis: if now_ns < self.silent_from_ns { Basis::Cap } else { Basis::FairShare },
        }
    }

    fn refuse(&mut self, account: Account, cost: u32, now_ns: u64) -> Option<Verdict> {
        if now_ns >= self.refused_until_ns || cost < self.refused_cost {
            return None;
        }
        self.refused = self.refused.saturating_add(cost);
        Some(Verdict::Refused(self.status(account, now_ns), Why::Exhausted))
    }

    fn spend(&mut self, account: Account, cost: u32, now_ns: u64) -> Option<Verdict> {
        if now_ns >= self.until_ns {
            return None;
        }
        self.units = self.units.checked_sub(cost)?;
        self.spent.add(now_ns, cost, account.window_ns());
        self.spent_units = self.spent_units.saturating_add(cost);
        self.remaining = self.remaining.saturating_sub(cost);
        Some(Verdict::Admitted(self.status(account, now_ns)))
    }

    /// Writes what was spent into the record, and returns the rest.
    fn settle(&self, vm: u64, record: &mut Record, now_ns: u64) {
        record.note(self.asked_for, self.refused, now_ns);
        // A draw that is gone counts as spent already, all of it and at its end.
        if let Some(place) = record.draws.iter().position(|draw| draw.vm == vm) {
            // What is free again may be missing elsewhere.
            record.unreported |= record.in_use() > record.cap;
            record.draws.swap_remove(place);
            for group in self.spent.groups() {
                record.spends.add(group.last_ns, group.units, record.account.window_ns());
                record.note_spent(group.units);
            }
        }
    }

    fn settled(&mut self) {
        self.units = 0;
        self.pace = self.spent_units;
        self.spent_units = 0;
        self.spent = Spends::default();
        self.asked_for = 0;
        self.refused = 0;
    }

    fn is_settled(&self) -> bool {
        self.units == 0 && self.spent.is_empty()
    }

    fn is_active(&self, now_ns: u64) -> bool {
        self.touched || now_ns < self.refused_until_ns
    }
}

/// Result of a look at a record.
struct Look {
    outcome: Outcome,
    drawn: u32,
    until_ns: u64,
    remaining: u32,
    reset_at_ns: u64,
    silent_from_ns: u64,
    mark: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Admitted,
    Pending,
    Refused(Why),
}

impl Worker {
    /// VM `vm`, which holds nothing yet. The number must be its own.
    pub fn new(vm: u64) -> Self {
        Self { vm, purses: HashMap::default() }
    }

    /// Decides whether a request that costs `cost`, at least 1, is within `limit` units of the account's window, and counts
    /// it if so. `limit` is what the rules in force say. `again` says that the request was pending before, so that it is
    /// counted once.
    pub fn spend(
        &mut self,
        data: &mut impl SharedData,
        account: Account,
        (limit, cost, again): (u32, u32, bool),
        now_ns: u64,
    ) -> Verdict {
        let cost = cost.max(1);
        let purse = self.purses.entry(account).or_default();
        let now_ns = now_ns.max(purse.now_ns);
        purse.now_ns = now_ns;
        purse.touched = true;
        if !again {
            purse.asked_for = purse.asked_for.saturating_add(cost);
        }
        if purse.limit == limit
            && let Some(verdict) =
                purse.spend(account, cost, now_ns).or_else(|| purse.refuse(account, cost, now_ns))
        {
            return verdict;
        }
        let vm = self.vm;
        let pace = purse.pace.max(purse.spent_units);
        let page = Page::index(account);
        let look_at = |purse: &Purse, data: &mut _| {
            let looked = page::change(data, page, false, |page, standing| {
                let Some(record) = page.find(account)? else { return Ok((None, Write::No)) };
                record.roll(standing, now_ns);
                purse.settle(vm, record, now_ns);
                record.set_limit(limit, standing);
                Ok((Some(look(vm, record, standing, (cost, again), pace, now_ns)), Write::Yes))
            });
            looked.map(Option::flatten)
        };
        let looked = match look_at(purse, data) {
            Ok(None) => open(data, page, account, limit).and_then(|()| look_at(purse, data)),
            looked => looked,
        };
        purse.limit = limit;
        purse.refused_until_ns = 0;
        let verdict = match looked {
            Ok(Some(seen)) => {
                if seen.mark {
                    // If that fails, the leader finds the record when it looks at all pages.
                    let _found_later = dirty::mark(data, page);
                }
                purse.take(account, &seen, cost, now_ns)
            }
            // Nothing was settled, so what the purse holds stays as it was.
            Ok(None) | Err(PageError::Contended | PageError::Damaged | PageError::Crowded) => {
                let status = QuotaStatus {
                    remaining: 0,
                    reset_ns: account.window_ns(),
                    ..purse.status(account, now_ns)
                };
                Verdict::Refused(status, Why::Unknown)
            }
        };
        if self.purses.len() > MAX_PURSES {
            self.purses.retain(|_, purse| !purse.is_settled());
        }
        verdict
    }

    /// Writes what was spent where the other VMs and the leader see it, and returns units that are not needed, for so many
    /// accounts as do not keep requests waiting. To be called twice in [`super::REPORT_NS`].
    pub fn on_tick(&mut self, data: &mut impl SharedData, now_ns: u64) {
        let mut due = Vec::new();
        self.purses.retain(|account, purse| {
            let now_ns = now_ns.max(purse.now_ns);
            if purse.is_settled() && (purse.is_active(now_ns) || purse.asked_for == 0) {
                let keep = purse.is_active(now_ns);
                purse.touched = false;
                return keep;
            }
            // What has only to be noted can wait longest: the next look at the record notes it, too.
            due.push((if purse.is_settled() { u64::MAX } else { purse.until_ns }, *account));
            true
        });
        if due.len() > MAX_SETTLED {
            // Those whose time is nearly over. What was drawn counts as spent, if it is returned late.
            due.select_nth_unstable(MAX_SETTLED);
            due.truncate(MAX_SETTLED);
        }
        for (_, account) in due {
            let vm = self.vm;
            if let Some(purse) = self.purses.get_mut(&account)
                && !purse.settle_now(data, vm, account, now_ns)
            {
                self.purses.remove(&account);
            }
        }
    }
}

/// Makes the record of an account if there is none, and marks its page before anything is spent of it: see the proof,
/// "first use".
fn open(data: &mut impl SharedData, index: u16, account: Account, limit: u32) -> Result<(), PageError> {
    let made = page::change(data, index, true, |page, standing| {
        if page.find(account)?.is_some() {
            return Ok((false, Write::No));
        }
        let record = page.record(account, limit, standing)?;
        record.marked = true;
        Ok((true, Write::Yes))
    })?;
    if made == Some(true) {
        dirty::mark(data, index).map_err(|_| PageError::Contended)?;
    }
    Ok(())
}

impl Purse {
    /// Writes what was spent into the record, and keeps units that are likely to be used; whether the purse is still of
    /// use.
    fn settle_now(&mut self, data: &mut impl SharedData, vm: u64, account: Account, now_ns: u64) -> bool {
        let now_ns = now_ns.max(self.now_ns);
        let active = self.is_active(now_ns);
        let keep = if self.touched { self.units.min(self.spent_units) } else { 0 };
        self.touched = false;
        let index = Page::index(account);
        let settled = page::change(data, index, false, |page, standing| {
            let Some(record) = page.find(account)? else { return Ok((None, Write::No)) };
            record.roll(standing, now_ns);
            self.settle(vm, record, now_ns);
            let until_ns = draw_until(record, standing, now_ns);
            let free = record.cap(standing, now_ns).saturating_sub(record.in_use());
            let may_keep = is_worth_it(until_ns, now_ns) && record.has_room() && !record.short;
            let kept = if may_keep { keep.min(free) } else { 0 };
            if kept > 0 {
                record.draws.push(Draw { vm, units: kept, until_ns });
            }
            let mark = mark(record, standing, now_ns);
            Ok((Some((kept, until_ns, mark)), Write::Yes))
        });
        match settled {
            Ok(Some(Some((kept, until_ns, mark)))) => {
                if mark {
                    let _found_later = dirty::mark(data, index);
                }
                self.settled();
                self.units = kept;
                self.until_ns = until_ns;
                active || kept > 0
            }
            // The record holds the draw until its end, so it may be spent until then.
            Err(PageError::Contended) => true,
            // A record with a draw is never dropped.
            Ok(_) | Err(PageError::Damaged | PageError::Crowded) => false,
        }
    }

    fn take(&mut self, account: Account, seen: &Look, cost: u32, now_ns: u64) -> Verdict {
        self.settled();
        self.units = seen.drawn;
        self.until_ns = seen.until_ns;
        self.remaining = seen.remaining;
        self.reset_at_ns = seen.reset_at_ns;
        self.silent_from_ns = seen.silent_from_ns;
        if seen.outcome == Outcome::Admitted {
            self.spent_units = cost;
        }
        let status = self.status(account, now_ns);
        match seen.outcome {
            Outcome::Admitted => Verdict::Admitted(status),
            Outcome::Pending => Verdict::Pending(QuotaStatus { reset_ns: PENDING_NS, ..status }),
            Outcome::Refused(Why::Exhausted) => {
                self.refused_cost = cost;
                // More may come from elsewhere before the first unit is free.
                let again_ns =
                    account.window_ns().checked_div(64).unwrap_or(0).clamp(20_000_000, 250_000_000);
                self.refused_until_ns = seen.reset_at_ns.min(now_ns.saturating_add(again_ns));
                Verdict::Refused(status, Why::Exhausted)
            }
            Outcome::Refused(why) => Verdict::Refused(status, why),
        }
    }
}

fn draw_until(record: &Record, standing: &Standing, now_ns: u64) -> u64 {
    now_ns.saturating_add(DRAW_NS).min(record.holds_until(standing, now_ns))
}

fn is_worth_it(until_ns: u64, now_ns: u64) -> bool {
    now_ns.saturating_add(MIN_DRAW_NS) <= until_ns
}

/// Notes that the page is marked, if the leader has something to do, now or soon; whether it is to be marked.
fn mark(record: &mut Record, standing: &Standing, now_ns: u64) -> bool {
    let is_due = record.is_due(standing, record.asked, now_ns).is_some() || record.asks_at(now_ns).is_some();
    let mark = !record.marked && is_due;
    record.marked |= mark;
    mark
}

/// Pays for a request from a record, and draws some more.
fn look(
    vm: u64,
    record: &mut Record,
    standing: &Standing,
    (cost, again): (u32, bool),
    pace: u32,
    now_ns: u64,
) -> Look {
    let window_ns = record.account.window_ns();
    let cap = record.cap(standing, now_ns);
    let rest = cap.saturating_sub(record.in_use()).checked_sub(cost);
    let until_ns = draw_until(record, standing, now_ns);
    let elsewhere = record.elsewhere(now_ns);
    // What others hold and did not spend is left.
    let spent = record.spends.used().saturating_add(elsewhere);
    let mut drawn = 0;
    let outcome = if let Some(rest) = rest {
        record.short = false;
        record.spends.add(now_ns, cost, window_ns);
        record.note_spent(cost);
        let most = rest.checked_div(DRAW_PART).unwrap_or(0);
        // Nothing for a key that comes rarely, and then twice what was spent since the look before.
        drawn = pace.saturating_mul(2).min(most);
        if drawn > 0 && is_worth_it(until_ns, now_ns) && record.has_room() {
            record.draws.push(Draw { vm, units: drawn, until_ns });
        } else {
            drawn = 0;
        }
        Outcome::Admitted
    } else {
        if !standing.is_member() {
            Outcome::Refused(Why::NotMember)
        } else if cost > record.limit {
            Outcome::Refused(Why::TooDear)
        } else {
            if !again {
                record.note_refused(cost, now_ns);
            }
            if spent.saturating_add(cost) > record.limit {
                Outcome::Refused(Why::Exhausted)
            } else {
                record.short = !record.draws.is_empty();
                Outcome::Pending
            }
        }
    };
    let spent = if outcome == Outcome::Admitted { spent.saturating_add(cost) } else { spent };
    let remaining = record.limit.saturating_sub(spent);
    // So many units must become free: one more, or what this request lacks.
    let lacks = spent.saturating_add(cost).saturating_sub(record.limit).max(1);
    let lacks = if outcome == Outcome::Admitted { 1 } else { lacks };
    let here = record.spends.back_at(lacks, window_ns);
    let there = (elsewhere > 0).then_some(record.elsewhere_until_ns);
    let reset_at_ns = match (here, there) {
        (Some(here), Some(there)) if lacks <= 1 => here.min(there),
        (Some(here), _) => here,
        (None, Some(there)) => there,
        (None, None) => now_ns.saturating_add(window_ns),
    };
    Look {
        outcome,
        drawn,
        until_ns,
        remaining,
        reset_at_ns,
        silent_from_ns: standing.silent_from_ns(),
        mark: mark(record, standing, now_ns),
    }
}
