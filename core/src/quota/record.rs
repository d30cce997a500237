//! Record of an account, shared by a proxy's VMs.

use super::spends::{self, Spends};
use super::standing::Standing;
use super::{Account, SHARES};
use crate::bytes::{Reader, WireError};

/// The most VMs that hold units of an account.
const MAX_DRAWS: usize = 255;
const AGREED: u8 = 1;
const MARKED: u8 = 2;
const UNREPORTED: u8 = 4;
const SHORT: u8 = 8;
const URGENT: u8 = 16;
/// The leader asks for more when fewer than one part in so many of the limit are free.
const LOW_PART: u32 = 16;
/// Clients that were told to come again in a second did not come after this time.
const REFUSED_NS: u64 = 3_000_000_000;
/// A record without use is reported as idle after a quarter of the window, within these bounds.
const IDLE_NS: std::ops::RangeInclusive<u64> = 1_000_000_000..=60_000_000_000;

/// Units that a VM holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Draw {
    /// The VM.
    pub vm: u64,
    /// Units.
    pub units: u32,
    /// The VM may spend them before this time.
    pub until_ns: u64,
}

/// Estimate of the units asked for in a window's time, from the last two periods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Demand {
    began_ns: u64,
    before: u32,
    now: u32,
}

impl Demand {
    /// Length of a period: some requests of a limit in use, and the noise of short windows averaged out.
    fn period_ns(window_ns: u64) -> u64 {
        window_ns.checked_div(8).unwrap_or(0).clamp(2_000_000_000, 600_000_000_000)
    }

    fn add(&mut self, units: u32, window_ns: u64, now_ns: u64) {
        let period = Self::period_ns(window_ns);
        let elapsed = now_ns.saturating_sub(self.began_ns);
        if elapsed >= period {
            self.before = if elapsed < period.saturating_mul(2) { self.now } else { 0 };
            self.now = 0;
            self.began_ns = now_ns.saturating_sub(elapsed.checked_rem(period).unwrap_or(0));
        }
        self.now = self.now.saturating_add(units);
    }

    fn estimate(&self, window_ns: u64, now_ns: u64) -> u32 {
        let mut current = *self;
        current.add(0, window_ns, now_ns);
        let period = u128::from(Self::period_ns(window_ns));
        let elapsed = u128::from(now_ns.saturating_sub(current.began_ns)).min(period);
        let weighed = u128::from(current.before)
            .saturating_mul(period.saturating_sub(elapsed))
            .saturating_add(u128::from(current.now).saturating_mul(period));
        let units = weighed
            .saturating_mul(u128::from(window_ns))
            .checked_div(period.saturating_mul(period))
            .unwrap_or(0);
        u32::try_from(units).unwrap_or(u32::MAX)
    }
}

/// Record of an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// The account.
    pub account: Account,
    /// The limit by the rules that were last seen.
    pub limit: u32,
    /// Units that may be in use while the proxy is in touch.
    pub cap: u32,
    /// The ledger has answered about this account. Until then, the proxy's share of the limit is the most.
    pub agreed: bool,
    /// The epoch of the standing that the cap is of; in another one the cap is void.
    pub epoch: u64,
    /// Number of the question that reports the record and was not answered yet; 0: none.
    pub asked: u64,
    /// The page was marked for the leader.
    pub marked: bool,
    /// Something was changed that the ledger was not told of.
    pub unreported: bool,
    /// The report should not wait.
    pub urgent: bool,
    /// A request was refused because other VMs hold units.
    pub short: bool,
    /// Units spent since the record was made.
    pub spent: u64,
    /// Earliest time to ask for more.
    pub next_ask_ns: u64,
    /// Time of the last report.
    pub reported_ns: u64,
    /// Units that other proxies had spent by the last answer.
    pub elsewhere: u32,
    /// Time at which the first of them is free again; from then on the number is not known.
    pub elsewhere_until_ns: u64,
    /// Units refused since the last answer that brought units, or that said that there are none.
    pub refused: u32,
    /// Time of the last refusal.
    pub refused_ns: u64,
    /// Units asked for.
    pub demand: Demand,
    /// Units that VMs hold.
    pub draws: Vec<Draw>,
    /// Units spent.
    pub spends: Spends,
}

impl Record {
    /// Record of an account of which this proxy spent nothing: its cap is the proxy's share of the limit.
    pub fn new(account: Account, limit: u32, standing: &Standing) -> Self {
        Self {
            account,
            limit,
            cap: standing.own(limit),
            agreed: false,
            epoch: standing.epoch,
            asked: 0,
            marked: false,
            unreported: true,
            urgent: false,
            short: false,
            spent: 0,
            next_ask_ns: 0,
            reported_ns: 0,
            elsewhere: 0,
            elsewhere_until_ns: 0,
            refused: 0,
            refused_ns: 0,
            demand: Demand::default(),
            draws: Vec::new(),
            spends: Spends::default(),
        }
    }

    /// Brings the record up to a time: drops spends whose window is over, counts draws past their end as spent, and voids
    /// a cap of another epoch.
    pub fn roll(&mut self, standing: &Standing, now_ns: u64) {
        let window_ns = self.account.window_ns();
        let mut lapsed = 0_u32;
        let spends = &mut self.spends;
        self.draws.retain(|draw| {
            let holds = now_ns < draw.until_ns;
            if !holds {
                spends.add(draw.until_ns, draw.units, window_ns);
                lapsed = lapsed.saturating_add(draw.units);
            }
            holds
        });
        self.note_spent(lapsed);
        self.spends.expire(now_ns, window_ns, drop);
        if self.epoch != standing.epoch {
            self.epoch = standing.epoch;
            self.cap = 0;
            self.agreed = true;
            self.spent = self.spends.used().into();
            self.elsewhere_until_ns = 0;
            self.unreported = true;
        }
        if !self.agreed {
            self.cap = self.cap.min(standing.own(self.limit));
        }
        if self.refused > 0 && now_ns >= self.refused_ns.saturating_add(REFUSED_NS) {
            self.refused = 0;
        }
    }

    /// Goes by a limit. Of a lower one, a proxy that is not alone has nothing until the ledger has answered: others may go
    /// by it already.
    pub fn set_limit(&mut self, limit: u32, standing: &Standing) {
        if limit < self.limit {
            let own = if self.agreed && standing.share < SHARES { 0 } else { standing.own(limit) };
            self.cap = self.cap.min(own);
        }
        if limit != self.limit {
            self.limit = limit;
            self.elsewhere_until_ns = 0;
            self.next_ask_ns = 0;
            self.unreported = true;
            self.urgent = true;
        }
    }

    /// Notes units that were added to the spends.
    pub fn note_spent(&mut self, units: u32) {
        if units > 0 {
            self.spent = self.spent.saturating_add(units.into());
            self.unreported = true;
        }
    }

    /// Units that may be in use.
    pub fn cap(&self, standing: &Standing, now_ns: u64) -> u32 {
        if !standing.is_member() {
            return 0;
        }
        let granted = if now_ns < standing.granted_until_ns() { self.cap.min(self.limit) } else { 0 };
        if standing.in_touch(now_ns) { granted } else { granted.max(standing.own(self.limit)) }
    }

    /// Latest time until which units may be handed to a VM: then there may be fewer.
    pub fn holds_until(&self, standing: &Standing, now_ns: u64) -> u64 {
        let by_share = !standing.in_touch(now_ns) && self.cap <= standing.own(self.limit);
        if by_share { u64::MAX } else { standing.granted_until_ns() }
    }

    /// Units spent within the window, or held by VMs.
    pub fn in_use(&self) -> u32 {
        self.draws.iter().fold(self.spends.used(), |sum, draw| sum.saturating_add(draw.units))
    }

    /// Units that other proxies are known to have in use.
    pub fn elsewhere(&self, now_ns: u64) -> u32 {
        if now_ns < self.elsewhere_until_ns { self.elsewhere } else { 0 }
    }

    /// Notes units that were asked for, `refused` of them in vain.
    pub fn note(&mut self, asked_for: u32, refused: u32, now_ns: u64) {
        self.demand.add(asked_for, self.account.window_ns(), now_ns);
        self.note_refused(refused, now_ns);
    }

    /// Notes units that were refused: the ledger is asked for them.
    pub fn note_refused(&mut self, units: u32, now_ns: u64) {
        if units > 0 {
            self.refused = self.refused.saturating_add(units);
            self.refused_ns = now_ns;
        }
    }

    /// Units asked for in a window's time: those in use, and those refused, too.
    pub fn demand(&self, now_ns: u64) -> u32 {
        self.demand
            .estimate(self.account.window_ns(), now_ns)
            .max(self.in_use().saturating_add(self.refused))
            .min(self.limit.saturating_mul(64))
    }

    /// Whether the proxy runs short of units that it may get, so that the ledger is to be asked now.
    pub fn wants_more(&self, standing: &Standing, now_ns: u64) -> bool {
        if self.asked != 0 || self.cap >= self.limit || now_ns < self.next_ask_ns {
            return false;
        }
        let (cap, in_use) = (self.cap(standing, now_ns), self.in_use());
        let low = self.limit.checked_div(LOW_PART).unwrap_or(0).max(1);
        // The first answer takes longest: the ledger has to recall what others have.
        let low = if self.agreed { cap.saturating_sub(in_use) < low } else { in_use >= cap.div_ceil(4) };
        low && self.unreported || self.refused > 0
    }

    /// When the ledger is to be asked for units that were refused although some are left, if that has to wait.
    pub fn asks_at(&self, now_ns: u64) -> Option<u64> {
        let left = self.limit.saturating_sub(self.elsewhere(now_ns)).saturating_sub(self.spends.used());
        let waits = self.refused > 0 && left > 0 && self.asked == 0 && self.cap < self.limit;
        (waits && now_ns < self.next_ask_ns).then_some(self.next_ask_ns)
    }

    /// Whether the leader is to report the record, and if so, whether at once; `out` is the number of the question that
    /// is not answered yet.
    pub fn is_due(&self, standing: &Standing, out: u64, now_ns: u64) -> Option<bool> {
        if self.asked > 0 {
            // Asked by a leader before this one, or by a question that was given up.
            return (self.asked != out).then_some(true);
        }
        let urgent = self.urgent || self.wants_more(standing, now_ns);
        (urgent || self.unreported || self.is_to_forget(now_ns)).then_some(urgent)
    }

    /// Whether it was not used for so long that the ledger may forget it.
    fn is_to_forget(&self, now_ns: u64) -> bool {
        let idle_ns = self.account.window_ns().checked_div(4).unwrap_or(0);
        let idle_ns = idle_ns.clamp(*IDLE_NS.start(), *IDLE_NS.end());
        self.agreed && self.is_unused(now_ns) && now_ns >= self.reported_ns.saturating_add(idle_ns)
    }

    /// Whether nothing is in use and nothing is asked for.
    pub fn is_unused(&self, now_ns: u64) -> bool {
        self.draws.is_empty()
            && self.spends.is_empty()
            && self.demand.estimate(self.account.window_ns(), now_ns) == 0
    }

    /// Whether nothing is lost when it is dropped.
    pub fn is_idle(&self) -> bool {
        !self.agreed && self.asked == 0 && !self.unreported && self.draws.is_empty() && self.spends.is_empty()
    }

    /// Appends the bytes of all but the account, see [`super::page::Page`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        out.push(
            flag(self.agreed, AGREED)
                | flag(self.marked, MARKED)
                | flag(self.unreported, UNREPORTED)
                | flag(self.short, SHORT)
                | flag(self.urgent, URGENT),
        );
        for number in [
            self.limit.into(),
            self.cap.into(),
            self.epoch,
            self.asked,
            self.spent,
            self.next_ask_ns,
            self.reported_ns,
            self.elsewhere.into(),
            self.elsewhere_until_ns,
            self.refused.into(),
            self.refused_ns,
            self.demand.began_ns,
            self.demand.before.into(),
            self.demand.now.into(),
        ] {
            spends::put(out, number);
        }
        out.push(u8::try_from(self.draws.len()).unwrap_or(u8::MAX));
        for draw in self.draws.iter().take(MAX_DRAWS) {
            out.extend_from_slice(&draw.vm.to_le_bytes());
            out.extend_from_slice(&draw.units.to_le_bytes());
            out.extend_from_slice(&draw.until_ns.to_le_bytes());
        }
        self.spends.encode(out);
    }

    /// Whether the record that [`Record::encode`] wrote is marked.
    pub fn is_marked(bytes: &[u8]) -> bool {
        bytes.first().is_some_and(|flags| flags & MARKED != 0)
    }

    /// Reads what [`Record::encode`] wrote of an account.
    pub fn decode(account: Account, bytes: &[u8]) -> Result<Self, WireError> {
        fn small(reader: &mut Reader<'_>) -> Result<u32, WireError> {
            u32::try_from(spends::take(reader)?).map_err(|_| WireError::TooMany)
        }
        let reader = &mut Reader::new(bytes);
        let flags = reader.u8()?;
        let mut record = Self {
            account,
            agreed: flags & AGREED != 0,
            marked: flags & MARKED != 0,
            unreported: flags & UNREPORTED != 0,
            short: flags & SHORT != 0,
            urgent: flags & URGENT != 0,
            limit: small(reader)?,
            cap: small(reader)?,
            epoch: spends::take(reader)?,
            asked: spends::take(reader)?,
            spent: spends::take(reader)?,
            next_ask_ns: spends::take(reader)?,
            reported_ns: spends::take(reader)?,
            elsewhere: small(reader)?,
            elsewhere_until_ns: spends::take(reader)?,
            refused: small(reader)?,
            refused_ns: spends::take(reader)?,
            demand: Demand { began_ns: spends::take(reader)?, before: small(reader)?, now: small(reader)? },
            draws: Vec::new(),
            spends: Spends::default(),
        };
        for _ in 0..reader.u8()? {
            record.draws.push(Draw { vm: reader.u64()?, units: reader.u32()?, until_ns: reader.u64()? });
        }
        record.spends = Spends::decode(reader)?;
        reader.end()?;
        Ok(record)
    }

    /// Whether one more VM may hold units.
    pub fn has_room(&self) -> bool {
        self.draws.len() < MAX_DRAWS
    }
}
