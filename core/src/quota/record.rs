//! What a proxy knows of an account, shared by its VMs.

use super::spends::{self, Spends};
use super::standing::Standing;
use super::{AHEAD_PART, ANSWER_NS, Account};
use crate::wire::{Reader, WireError};

/// The most VMs that hold units of an account.
const MAX_DRAWS: usize = 255;
const AGREED: u8 = 1;
const RUNG: u8 = 2;
const UNREPORTED: u8 = 4;

/// What a proxy holds of an account.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Holding {
    /// Its own share of the limit.
    #[default]
    Own,
    /// As agreed with the control plane.
    Agreed {
        /// So many units.
        held: u32,
        /// Of this limit.
        of: u32,
    },
}

/// Units that a VM holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Draw {
    /// The VM.
    pub vm: u64,
    /// How many.
    pub units: u32,
    /// It may spend them before this time.
    pub until_ns: u64,
}

/// How many units are asked for in a window's time, from what was asked for in the last two periods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Demand {
    began_ns: u64,
    before: u32,
    now: u32,
}

impl Demand {
    /// Long enough for some requests of a limit that is in use, and for the noise of short windows.
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

/// What a proxy knows of an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Whose it is.
    pub account: Account,
    /// The limit that was last asked about.
    pub limit: u32,
    /// What the proxy holds.
    pub holding: Holding,
    /// When that was asked for; if it is agreed.
    pub leased_ns: u64,
    /// Of which ledger it is; if it is agreed.
    pub era: u64,
    /// Of which membership it is; if it is agreed.
    pub term: u64,
    /// The number of the question that it is part of and that was not answered yet; 0: none.
    pub asked: u64,
    /// Whether the leader was told that there is something to ask.
    pub rung: bool,
    /// Whether what it holds was changed here and the control plane has not answered to that.
    pub unreported: bool,
    /// When it may be asked about again.
    pub next_ask_ns: u64,
    /// When it was last asked about.
    pub reported_ns: u64,
    /// What other proxies had in use when it was last asked about.
    pub elsewhere: u32,
    /// What was refused since it was last asked about, in units.
    pub refused: u32,
    /// What the dearest of those requests costs.
    pub dearest: u32,
    /// How much is asked for.
    pub demand: Demand,
    /// What VMs hold.
    pub draws: Vec<Draw>,
    /// What was spent.
    pub spends: Spends,
}

impl Record {
    /// Nothing is known of the account.
    pub fn new(account: Account, limit: u32) -> Self {
        Self {
            account,
            limit,
            holding: Holding::Own,
            leased_ns: 0,
            era: 0,
            term: 0,
            asked: 0,
            rung: false,
            unreported: false,
            next_ask_ns: 0,
            reported_ns: 0,
            elsewhere: 0,
            refused: 0,
            dearest: 0,
            demand: Demand::default(),
            draws: Vec::new(),
            spends: Spends::default(),
        }
    }

    /// Lets go of what is back. What a VM held for too long counts as spent at the last moment that it could be.
    pub fn roll(&mut self, standing: &Standing, now_ns: u64) {
        let window_ns = self.account.window_ns();
        let spends = &mut self.spends;
        self.draws.retain(|draw| {
            let holds = now_ns < draw.until_ns;
            if !holds {
                spends.add(draw.until_ns, draw.units, window_ns);
            }
            holds
        });
        self.spends.expire(now_ns, window_ns);
        // From here on the control plane counts the proxy's own, and goes on until it is told something else.
        if self.term != standing.term
            || self.is_lapsed(standing, now_ns) && standing.is_alone(window_ns, now_ns)
        {
            self.holding = Holding::Own;
            self.term = standing.term;
        }
    }

    /// Whether what was agreed holds no more beyond the proxy's own.
    fn is_lapsed(&self, standing: &Standing, now_ns: u64) -> bool {
        self.era != standing.era || now_ns >= self.leased_ns.saturating_add(standing.lease_ns)
    }

    /// Whether whatever others agreed on before this has ended and is back. Until then, they may hold what was this
    /// proxy's when the limit was last as low as it is now.
    fn is_past(&self, standing: &Standing, now_ns: u64) -> bool {
        let life_ns = ANSWER_NS.saturating_add(standing.lease_ns).saturating_add(self.account.window_ns());
        now_ns >= self.leased_ns.saturating_add(life_ns)
    }

    /// Whether another limit was agreed on than the one that is gone by.
    pub fn has_other_limit(&self) -> bool {
        matches!(self.holding, Holding::Agreed { of, .. } if of != self.limit)
    }

    /// How many units may be in use.
    pub fn cap(&self, standing: &Standing, now_ns: u64) -> u32 {
        if !standing.belongs(now_ns) {
            return 0;
        }
        let own = standing.own(self.limit);
        match self.holding {
            Holding::Own => standing.unsaid(self.limit, now_ns),
            Holding::Agreed { held, of } => {
                let agreed = if of <= self.limit || self.is_past(standing, now_ns) { held } else { 0 };
                if self.is_lapsed(standing, now_ns) { agreed.min(own) } else { agreed }
            }
        }
    }

    /// Until when units may be handed to a VM: at that time there may be fewer.
    pub fn holds_until(&self, standing: &Standing, now_ns: u64) -> u64 {
        let keep_ns = standing.asked_ns.saturating_add(standing.keep_ns);
        match self.holding {
            Holding::Agreed { held, .. }
                if held > standing.own(self.limit) && !self.is_lapsed(standing, now_ns) =>
            {
                keep_ns.min(self.leased_ns.saturating_add(standing.lease_ns))
            }
            Holding::Agreed { .. } | Holding::Own => keep_ns,
        }
    }

    /// Units that were spent and are not back, or that VMs hold.
    pub fn in_use(&self) -> u32 {
        self.draws.iter().fold(self.spends.used(), |sum, draw| sum.saturating_add(draw.units))
    }

    /// Notes units that were asked for, `refused` of them in vain.
    pub fn note(&mut self, asked_for: u32, refused: u32, now_ns: u64) {
        self.demand.add(asked_for, self.account.window_ns(), now_ns);
        self.refused = self.refused.saturating_add(refused);
    }

    /// Forgets what was refused and would not be now.
    pub fn forget_refused(&mut self, standing: &Standing, now_ns: u64) {
        let free = self.cap(standing, now_ns).saturating_sub(self.in_use());
        self.dearest = if free >= self.dearest { 0 } else { self.dearest };
        self.refused = self.refused.min(self.dearest);
    }

    /// Forgets what was refused if nothing was asked for since for long.
    pub fn forget_refused_if_over(&mut self, now_ns: u64) {
        if self.demand.estimate(self.account.window_ns(), now_ns) == 0 {
            self.dearest = 0;
            self.refused = 0;
        }
    }

    /// How many units are asked for in a window's time. What is in use is asked for too, and what was refused.
    pub fn demand(&self, now_ns: u64) -> u32 {
        self.demand
            .estimate(self.account.window_ns(), now_ns)
            .max(self.in_use().saturating_add(self.refused))
            .min(self.limit.saturating_mul(64))
    }

    /// Whether half of what a proxy gets ahead is left, at least.
    pub fn has_headroom(&self, standing: &Standing, now_ns: u64) -> bool {
        let free = self.cap(standing, now_ns).saturating_sub(self.in_use());
        free >= self.limit.checked_div(2 * AHEAD_PART).unwrap_or(0).max(1)
    }

    /// Whether more will be needed than the proxy has, so that the control plane is to be asked now.
    pub fn wants_more(&self, standing: &Standing, now_ns: u64) -> bool {
        let cap = self.cap(standing, now_ns);
        // The first word takes longest to be answered, so it is said sooner.
        let short = match self.holding {
            Holding::Own => self.in_use() >= cap.div_ceil(4),
            Holding::Agreed { .. } => !self.has_headroom(standing, now_ns),
        };
        let short = short || self.refused > 0;
        let due = now_ns >= self.next_ask_ns && short && cap < self.limit;
        self.asked == 0 && (due || self.has_other_limit())
    }

    /// Fixes what the proxy holds at what it may use now.
    pub fn fix(&mut self, standing: &Standing, now_ns: u64) {
        let held = self.cap(standing, now_ns);
        if !matches!(self.holding, Holding::Agreed { .. }) || self.is_lapsed(standing, now_ns) {
            // No more than its own, or less: that needs no lease.
            self.leased_ns = now_ns;
            self.era = standing.era;
            self.term = standing.term;
        }
        self.holding = Holding::Agreed { held, of: self.limit };
    }

    /// Whether nothing is lost when it is forgotten.
    pub fn is_idle(&self) -> bool {
        self.holding == Holding::Own
            && self.asked == 0
            && !self.rung
            && !self.unreported
            && self.draws.is_empty()
            && self.spends.is_empty()
    }

    /// The bytes of it but for the account, see [`super::page::Page`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (agreed, held, of) = match self.holding {
            Holding::Own => (0, 0, 0),
            Holding::Agreed { held, of } => (AGREED, held, of),
        };
        let rung = if self.rung { RUNG } else { 0 };
        let unreported = if self.unreported { UNREPORTED } else { 0 };
        out.push(agreed | rung | unreported);
        for number in [
            self.limit.into(),
            held.into(),
            of.into(),
            self.leased_ns,
            self.era,
            self.term,
            self.asked,
            self.next_ask_ns,
            self.reported_ns,
            self.elsewhere.into(),
            self.refused.into(),
            self.dearest.into(),
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

    /// Reads what [`Record::encode`] wrote of an account.
    pub fn decode(account: Account, bytes: &[u8]) -> Result<Self, WireError> {
        fn small(reader: &mut Reader<'_>) -> Result<u32, WireError> {
            u32::try_from(spends::take(reader)?).map_err(|_| WireError::TooMany)
        }
        let reader = &mut Reader::new(bytes);
        let flags = reader.u8()?;
        let limit = small(reader)?;
        let (held, of) = (small(reader)?, small(reader)?);
        let holding = if flags & AGREED == 0 { Holding::Own } else { Holding::Agreed { held, of } };
        let mut record = Self {
            holding,
            rung: flags & RUNG != 0,
            unreported: flags & UNREPORTED != 0,
            leased_ns: spends::take(reader)?,
            era: spends::take(reader)?,
            term: spends::take(reader)?,
            asked: spends::take(reader)?,
            next_ask_ns: spends::take(reader)?,
            reported_ns: spends::take(reader)?,
            elsewhere: small(reader)?,
            refused: small(reader)?,
            dearest: small(reader)?,
            demand: Demand { began_ns: spends::take(reader)?, before: small(reader)?, now: small(reader)? },
            ..Self::new(account, limit)
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
