//! What one VM decides about requests.

use std::collections::HashMap;

use ahash::RandomState;

use super::page::{self, Page, PageError, Write};
use super::record::{Draw, Holding, Record};
use super::spends::Spends;
use super::standing::Standing;
use super::{Account, SECOND_NS, bell};
use crate::limits::{Left, Limit, Metered};
use crate::shared::SharedData;

/// How long a VM may keep units without a word. A VM that traps takes them with it for so long, and for a window.
const DRAW_NS: u64 = 2_000_000_000;
/// The same for a [`is_roomy`] limit, of which a VM holds so little that nobody misses it meanwhile: a key that comes
/// now and then would cost a look at the record each time.
const LONG_DRAW_NS: u64 = 20_000_000_000;
/// It is given back when the key has not come for so long,
const IDLE_NS: u64 = 5_000_000_000;
/// and so long before its end at the latest.
const MARGIN_NS: u64 = 1_000_000_000;
/// A limit of so many units, in a window so long, has room.
const ROOMY_UNITS: u32 = 8_192;
const ROOMY_WINDOW_S: u32 = 60;
/// What would have to be given back sooner is not drawn: it might not be given back in time.
const MIN_DRAW_NS: u64 = 500_000_000;
/// The most units that a VM draws beyond what a request needs; of a large limit, this part of it.
const MAX_DRAW: u32 = 64;
const MAX_DRAW_PART: u32 = 256;
/// A VM draws this part of what is free.
const DRAW_PART: u32 = 8;
/// Of so many accounts a VM tells at one go: a millisecond's work, at most.
const MAX_SETTLED: usize = 64;
/// The most accounts that a VM keeps in mind; others are looked up for every request.
const MAX_PURSES: usize = 65_536;

/// Whether a request is within the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is, and is paid for.
    Admitted(Notice),
    /// It is not.
    Refused(Notice, Why),
}

impl Verdict {
    /// Whether the request may pass.
    pub fn is_admitted(&self) -> bool {
        matches!(self, Self::Admitted(_))
    }

    /// What to tell the client.
    pub fn notice(&self) -> Notice {
        match self {
            Self::Admitted(notice) | Self::Refused(notice, _) => *notice,
        }
    }

    /// The same for a decision, about a request that was asked about with this limit.
    pub fn metered(&self, limit: Limit) -> Metered {
        let notice = self.notice();
        let reset_s = notice.reset_ns.div_ceil(SECOND_NS).max(1);
        let left = Left { limit, remaining: notice.remaining, reset_s };
        match self {
            Self::Admitted(_) => Metered::Within(left),
            Self::Refused(_, Why::Exhausted | Why::TooDear) => Metered::Beyond(left),
            Self::Refused(_, Why::NoShare | Why::Unknown) => Metered::Unknown,
        }
    }
}

/// What a client is told of its limit, for the headers of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// The limit, in units a window.
    pub limit: u32,
    /// Units that are left, as far as this proxy knows; 0 when the request was refused.
    pub remaining: u32,
    /// Nanoseconds until there are more: for an admitted request, until the oldest unit in use here comes back;
    /// for a refused one, until this proxy will have what it needs, unless it is granted more before. A window
    /// where that is not known.
    pub reset_ns: u64,
    /// What was spent from.
    pub basis: Basis,
}

/// What a proxy spends from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Basis {
    /// What it leases from the control plane.
    Lease,
    /// Its own fair share: the control plane was not heard of for longer than a lease.
    FairShare,
}

impl Basis {
    /// Its name in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::FairShare => "fair_share",
        }
    }
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// All that this proxy has is in use.
    Exhausted,
    /// The request costs more than the limit: it would never pass.
    TooDear,
    /// The control plane never gave this proxy a share, took it back, or was not heard of for too long.
    NoShare,
    /// What is in use is not known: the shared data is damaged, full, or changes all the time.
    Unknown,
}

impl Why {
    /// All of them, for metrics that exist before they are needed.
    pub const ALL: [Self; 4] = [Self::Exhausted, Self::TooDear, Self::NoShare, Self::Unknown];

    /// Its name in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::TooDear => "too_dear",
            Self::NoShare => "no_share",
            Self::Unknown => "unknown",
        }
    }
}

/// One VM's part in the limits.
#[derive(Debug)]
pub struct Worker {
    vm: u64,
    purses: HashMap<Account, Purse, RandomState>,
}

/// What a VM holds of an account, and what it has not told the others yet.
#[derive(Debug, Clone, Default)]
struct Purse {
    limit: u32,
    /// Units that may be spent before `until_ns`.
    units: u32,
    until_ns: u64,
    /// Units of the same draw that were spent.
    spent: Spends,
    asked_for: u32,
    refused: u32,
    /// Requests of `refused_cost` and more are refused until then, as `refusal` says.
    refused_until_ns: u64,
    refused_cost: u32,
    refusal: Option<(Why, u64)>,
    remaining: u32,
    reset_at_ns: u64,
    alone_from_ns: u64,
    /// The latest time that was seen: a clock that goes backwards stands still.
    now_ns: u64,
    /// When the key came last.
    came_ns: u64,
    touched: bool,
}

impl Purse {
    fn notice(&self, account: Account, now_ns: u64) -> Notice {
        Notice {
            limit: self.limit,
            remaining: self.remaining,
            reset_ns: self.reset_at_ns.saturating_sub(now_ns).min(account.window_ns()),
            basis: if now_ns < self.alone_from_ns { Basis::Lease } else { Basis::FairShare },
        }
    }

    fn refuse(&mut self, account: Account, cost: u32, now_ns: u64) -> Option<Verdict> {
        let (why, reset_at_ns) = self.refusal?;
        if now_ns >= self.refused_until_ns || cost < self.refused_cost {
            return None;
        }
        self.refused = self.refused.saturating_add(cost);
        let reset_ns = reset_at_ns.saturating_sub(now_ns).min(account.window_ns());
        Some(Verdict::Refused(Notice { remaining: 0, reset_ns, ..self.notice(account, now_ns) }, why))
    }

    fn spend(&mut self, account: Account, cost: u32, now_ns: u64) -> Option<Verdict> {
        if now_ns >= self.until_ns {
            return None;
        }
        self.units = self.units.checked_sub(cost)?;
        self.spent.add(now_ns, cost, account.window_ns());
        self.remaining = self.remaining.saturating_sub(cost);
        Some(Verdict::Admitted(self.notice(account, now_ns)))
    }

    /// Tells the record what was spent, and gives back the rest.
    fn settle(&self, vm: u64, record: &mut Record, now_ns: u64) {
        record.note(self.asked_for, self.refused, now_ns);
        // A draw that is gone counts as spent already, all of it and at its end.
        if let Some(place) = record.draws.iter().position(|draw| draw.vm == vm) {
            record.draws.swap_remove(place);
            for group in self.spent.groups() {
                record.spends.add(group.last_ns, group.units, record.account.window_ns());
            }
        }
    }

    fn settled(&mut self) {
        self.units = 0;
        self.spent = Spends::default();
        self.asked_for = 0;
        self.refused = 0;
    }

    fn is_empty(&self) -> bool {
        self.units == 0 && self.spent.is_empty()
    }

    /// Whether what it holds may stay as it is for now.
    fn may_wait(&self, account: Account, now_ns: u64) -> bool {
        is_roomy(account, self.limit)
            && now_ns.saturating_sub(self.came_ns) < IDLE_NS
            && now_ns.saturating_add(MARGIN_NS) < self.until_ns
    }
}

/// What came of looking at a record.
struct Look {
    admitted: bool,
    why: Why,
    drawn: u32,
    until_ns: u64,
    remaining: u32,
    reset_at_ns: u64,
    alone_from_ns: u64,
    ring: bool,
}

impl Worker {
    /// VM `vm`, which holds nothing yet. The number must be its own.
    pub fn new(vm: u64) -> Self {
        Self { vm, purses: HashMap::default() }
    }

    /// Whether a request that costs `cost`, at least 1, is within `limit` units of the account's window; it is
    /// paid for then. `limit` is what the rules in force say.
    pub fn spend(
        &mut self,
        data: &mut impl SharedData,
        account: Account,
        limit: u32,
        cost: u32,
        now_ns: u64,
    ) -> Verdict {
        let cost = cost.max(1);
        let purse = self.purses.entry(account).or_default();
        // Of a key that comes rarely nothing is drawn: it would only have to be given back.
        let draws = purse.came_ns > 0 || is_roomy(account, limit);
        let now_ns = now_ns.max(purse.now_ns);
        purse.now_ns = now_ns;
        purse.came_ns = now_ns;
        purse.touched = true;
        purse.asked_for = purse.asked_for.saturating_add(cost);
        if purse.limit == limit
            && let Some(verdict) =
                purse.spend(account, cost, now_ns).or_else(|| purse.refuse(account, cost, now_ns))
        {
            return verdict;
        }
        let vm = self.vm;
        let page = Page::index(account);
        let looked = page::change(data, page, true, |page, standing| {
            let record = page.record(account, limit)?;
            purse.settle(vm, record, now_ns);
            record.limit = limit;
            record.roll(standing, now_ns);
            Ok((look(vm, record, standing, cost, draws, now_ns), Write::Yes))
        });
        purse.limit = limit;
        purse.refusal = None;
        let verdict = match looked {
            Ok(Some(seen)) => {
                if seen.ring {
                    bell::ring(data, page);
                }
                purse.take(account, &seen, cost, now_ns)
            }
            // Nothing was settled, so what the purse holds stays as it was.
            Ok(None) | Err(PageError::Contended | PageError::Damaged | PageError::Crowded) => {
                let reset_ns = account.window_ns();
                Verdict::Refused(
                    Notice { remaining: 0, reset_ns, ..purse.notice(account, now_ns) },
                    Why::Unknown,
                )
            }
        };
        if self.purses.len() > MAX_PURSES {
            // Those that hold nothing; few hold anything.
            self.purses.retain(|_, purse| !purse.is_empty());
        }
        verdict
    }

    /// Tells the other VMs what was spent, and gives back what is not needed, of so many accounts as do not keep
    /// requests waiting. To be called several times a second.
    pub fn on_tick(&mut self, data: &mut impl SharedData, now_ns: u64) {
        let mut due = Vec::new();
        self.purses.retain(|account, purse| {
            let now_ns = now_ns.max(purse.now_ns);
            if purse.may_wait(*account, now_ns) {
                return true;
            }
            if purse.is_empty() && (purse.is_active(now_ns) || purse.asked_for == 0) {
                let keep = purse.is_active(now_ns);
                purse.touched = false;
                return keep;
            }
            // What has only to be told can wait longest: the next look at the record tells it too.
            due.push((if purse.is_empty() { u64::MAX } else { purse.until_ns }, *account));
            true
        });
        if due.len() > MAX_SETTLED {
            // Those whose time is nearly over. Of one that is late, all that was drawn counts as spent.
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

impl Purse {
    fn is_active(&self, now_ns: u64) -> bool {
        self.touched || now_ns < self.refused_until_ns
    }

    /// Tells what was spent, and keeps what was drawn if the key came since the last time; whether the purse is still
    /// of use.
    fn settle_now(&mut self, data: &mut impl SharedData, vm: u64, account: Account, now_ns: u64) -> bool {
        let now_ns = now_ns.max(self.now_ns);
        let active = self.is_active(now_ns);
        let comes = self.touched && now_ns.saturating_sub(self.came_ns) < IDLE_NS;
        let keep = if comes { self.units } else { 0 };
        self.touched = false;
        let settled = page::change(data, Page::index(account), false, |page, standing| {
            let Some(record) = page.find(account)? else { return Ok((None, Write::No)) };
            self.settle(vm, record, now_ns);
            record.roll(standing, now_ns);
            let until_ns = draw_until(record, standing, now_ns);
            let free = record.cap(standing, now_ns).saturating_sub(record.in_use());
            let kept = if is_worth_it(until_ns, now_ns) && record.has_room() { keep.min(free) } else { 0 };
            if kept > 0 {
                record.draws.push(Draw { vm, units: kept, until_ns });
            }
            Ok((Some((kept, until_ns)), Write::Yes))
        });
        match settled {
            Ok(Some(Some((kept, until_ns)))) => {
                self.settled();
                self.units = kept;
                self.until_ns = until_ns;
                active || kept > 0
            }
            // The record holds the draw until its end, so it may be spent until then.
            Err(PageError::Contended) => true,
            // A record with a draw is never forgotten.
            Ok(_) | Err(PageError::Damaged | PageError::Crowded) => false,
        }
    }

    fn take(&mut self, account: Account, seen: &Look, cost: u32, now_ns: u64) -> Verdict {
        self.settled();
        self.units = seen.drawn;
        self.until_ns = seen.until_ns;
        self.remaining = seen.remaining;
        self.reset_at_ns = seen.reset_at_ns;
        self.alone_from_ns = seen.alone_from_ns;
        if seen.admitted {
            return Verdict::Admitted(self.notice(account, now_ns));
        }
        self.refusal = Some((seen.why, seen.reset_at_ns));
        self.refused_cost = cost;
        // A grant may come before a unit does.
        let again_ns = account.window_ns().checked_div(64).unwrap_or(0).clamp(20_000_000, 250_000_000);
        self.refused_until_ns = seen.reset_at_ns.min(now_ns.saturating_add(again_ns));
        Verdict::Refused(Notice { remaining: 0, ..self.notice(account, now_ns) }, seen.why)
    }
}

fn draw_until(record: &Record, standing: &Standing, now_ns: u64) -> u64 {
    let long = if is_roomy(record.account, record.limit) { LONG_DRAW_NS } else { DRAW_NS };
    now_ns.saturating_add(long).min(record.holds_until(standing, now_ns))
}

/// Whether a limit is so large that what a VM holds of it is next to nothing.
fn is_roomy(account: Account, limit: u32) -> bool {
    limit >= ROOMY_UNITS && account.window_s >= ROOMY_WINDOW_S
}

fn is_worth_it(until_ns: u64, now_ns: u64) -> bool {
    now_ns.saturating_add(MIN_DRAW_NS) <= until_ns
}

/// Pays for a request from a record, and `draws` some more.
fn look(vm: u64, record: &mut Record, standing: &Standing, cost: u32, draws: bool, now_ns: u64) -> Look {
    let window_ns = record.account.window_ns();
    let cap = record.cap(standing, now_ns);
    let free = cap.saturating_sub(record.in_use());
    let rest = free.checked_sub(cost);
    let until_ns = draw_until(record, standing, now_ns);
    let mut drawn = 0;
    if let Some(rest) = rest {
        record.spends.add(now_ns, cost, window_ns);
        let most = record.limit.checked_div(MAX_DRAW_PART).unwrap_or(0).max(MAX_DRAW);
        drawn = rest.checked_div(DRAW_PART).unwrap_or(0).min(most);
        if draws && drawn > 0 && is_worth_it(until_ns, now_ns) && record.has_room() {
            record.draws.push(Draw { vm, units: drawn, until_ns });
        } else {
            drawn = 0;
        }
    } else {
        record.refused = record.refused.saturating_add(cost);
        record.dearest = record.dearest.max(cost);
    }
    let ring = !record.rung && record.wants_more(standing, now_ns);
    record.rung |= ring;
    let in_use = record.in_use();
    let back_at_ns = if rest.is_some() {
        record.spends.back_at(1, window_ns)
    } else {
        // So many units of those in use must come back. Where VMs hold some, they do no later than a draw's
        // end and a window.
        record.spends.back_at(in_use.saturating_add(cost).saturating_sub(cap), window_ns)
    };
    let why = if cost > record.limit {
        Why::TooDear
    } else if standing.belongs(now_ns) && standing.share > 0 {
        Why::Exhausted
    } else {
        Why::NoShare
    };
    let elsewhere = if record.holding == Holding::Own { 0 } else { record.elsewhere };
    Look {
        admitted: rest.is_some(),
        why,
        drawn,
        until_ns,
        // What this VM drew is free; others' draws may be.
        remaining: record.limit.saturating_sub(in_use.saturating_sub(drawn)).saturating_sub(elsewhere),
        reset_at_ns: back_at_ns.unwrap_or(now_ns.saturating_add(window_ns)),
        alone_from_ns: standing.asked_ns.saturating_add(standing.lease_ns),
        ring,
    }
}
