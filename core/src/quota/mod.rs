//! Quotas: units of a limit that are spent within a window, over all proxies, without a hop per request.
//!
//! # Caps
//!
//! A limit of `L` units is divided into *caps*. A cap is the number of units that a proxy may have in use: units spent
//! within the last window, and units that a VM of the proxy holds. A unit that is spent at time `t` is free at
//! `t + window` at the same proxy, so a proxy in steady use never asks for units. While caps and the spends of proxies
//! that are gone add up to at most `L`, no window sees more than `L` units.
//!
//! - **The ledger** ([`Ledger`], one for all proxies, in a control plane) grants caps. It counts, for each account, the cap
//!   of each proxy and what each proxy reported as spent.
//! - **A proxy** has a *share* of every limit, `1/n` of it. An account that the proxy never used has an implicit cap, its
//!   share of the limit: the first request of a key is decided at once. From its first request on, the account has a
//!   record in the shared memory of the proxy's VMs, and its cap is explicit and known to the ledger.
//! - **A VM** ([`Worker`]) draws units from the record and spends them without looking at shared memory.
//! - One VM of each proxy is the [`Leader`]. It reports spends within [`REPORT_NS`], asks for units when the proxy runs
//!   short, and writes grants into the records.
//!
//! # Three answers
//!
//! A request is *admitted*; or *exhausted*: the units in use at this proxy and those known to be in use elsewhere leave
//! too few of the limit; or *pending*: units are left, at another proxy, at another VM, or not granted yet. A pending
//! request waits some milliseconds, or is refused with `Retry-After: 1`.
//!
//! # Contact
//!
//! Times are durations, measured on each side by its own monotonic clock:
//!
//! | after | since | what |
//! |---|---|---|
//! | [`SILENCE_NS`] | the last answer | the proxy spends up to the larger of its cap and its share of the limit |
//! | [`GRANT_NS`] | it sent the last question that was answered | the proxy stops to spend by its cap; its share stays |
//! | [`RELEASE_NS`] | the ledger heard of it | the ledger releases the proxy's caps and share |
//! | [`RECOVER_NS`] | another ledger began | its caps and shares grow again |
//!
//! # Proof
//!
//! For each account, the ledger counts `max(cap, used)` of each proxy with a record, the share of the limit of each proxy
//! without one, and the spends of proxies that are gone. It raises a cap or a share only while the sum is at most `L`.
//! It remains to show that a proxy in touch never has more in use than the ledger counts for it.
//!
//! 1. **Grants.** The ledger counts a raised cap before it answers. A lowered cap counts only once the proxy reported it:
//!    each report carries the cap that the proxy goes by until the answer, and a proxy raises its cap only by the answer
//!    to its last question. Lost questions and answers make the ledger count too much, never too little.
//! 2. **First use.** A VM creates a record with the share of the limit as its cap, marks the record for the leader, and
//!    only then spends, by the cap in the record, which no VM raises. A record that the ledger has not answered about goes
//!    by the present share if that is less.
//! 3. **A share that shrinks.** The proxy goes by the smaller share at once. It says so only in a question that reports
//!    every record the ledger has not answered about (a new leader looks at all records first), so whatever was opened
//!    under the larger share is explicit from then on. Until then the ledger counts the larger share.
//! 4. **A share that grows.** The ledger first makes explicit, by recalls, each account of which the larger share would
//!    exceed the limit, and raises the share when all those are reported.
//! 5. **Forgotten records.** Before a proxy says that an account is idle, it lowers the cap to its share of the limit. The
//!    ledger then forgets its record and counts the share; if the answer is lost, the proxy reports again.
//! 6. **VMs.** What a VM draws is in use. A VM never spends what it drew at or after the draw's end; a VM that finds a draw
//!    past its end counts it as spent at that time. So a VM that traps loses what it held, and no unit is spent twice.
//! 7. **Restarts of the control plane.** Caps, shares and spends are on disk before the answer leaves, and the ledger goes
//!    on from there ([`Ledger::resume`]). It does not know which questions it had answered. So until a proxy shows, by the
//!    era, that it took an answer since, its questions may be old ones that come late, and only raise what is counted.
//!
//!    A ledger without that knowledge ([`Ledger::recovering`]), or with some of it ([`Ledger::take_over`]), takes over
//!    caps and shares as proxies report them, and raises none for [`RECOVER_NS`]: by then every proxy in touch has
//!    reported. One that heard nothing for so long drops what it had when another ledger answers, since a ledger between
//!    the two may have granted it to others.
//! 8. **Leaving.** A proxy that is drained spends nothing more, whichever ledger answers, reports all it spent, and then
//!    says that it left.
//!
//! A proxy that is killed or cut off is released after [`RELEASE_NS`], or once the next process of the same proxy has
//! taken an answer (unless Envoy restarts hot): a first question may be that of a process that has ended, come late. What
//! it had not reported, at most its cap or its share of the limit, may be
//! admitted once more within one window; the ledger counts those units ([`Ledger::released_units`]). Its reported spends
//! count until their window is over.
//!
//! # Losses
//!
//! Spends are remembered by 128ths of a window, so units are free at most 0.8 % of a window late. Where more is asked for
//! than there is, the ledger divides the limit in proportion to what is asked for at each proxy.

mod dirty;
mod division;
mod leader;
mod ledger;
mod message;
mod page;
mod record;
mod spends;
mod standing;
mod verdict;
mod worker;

use serde::{Deserialize, Serialize};

use crate::shm::SharedData;

pub use leader::Leader;
pub use ledger::{
    Changes, Exchange, ExchangeError, HolderRow, Ledger, MemberRow, Saved, SilentProxy, SpendKey, SpendRow,
};
pub use message::{
    Answer, FORMAT, Grant, MAX_BYTES, MAX_ENTRIES, Member, MessageError, Question, Recall, Report,
};
pub use verdict::{Basis, QuotaStatus, Verdict, Why};
pub use worker::Worker;

/// The sum of all shares of a limit: divisible by every number up to 16, so that small fleets divide limits evenly.
pub const SHARES: u32 = 720_720;
/// The longest window: 31 days, in seconds.
pub const MAX_WINDOW_S: u32 = 31 * 86_400;
/// A proxy reports spends within this time, or within [`REPORT_NS_PER_PROXY`] times the number of proxies if that is
/// longer.
pub const REPORT_NS: u64 = 100_000_000;
/// See [`REPORT_NS`]: bounds the questions that a large fleet sends to the ledger.
pub const REPORT_NS_PER_PROXY: u64 = 200_000;
/// Without an answer for this time, a proxy also spends its share of a limit.
pub const SILENCE_NS: u64 = 3_000_000_000;
/// After this time since the last answered question was sent, a proxy spends nothing of what it was granted.
pub const GRANT_NS: u64 = 25_000_000_000;
/// After this time without a question of a proxy, the ledger releases what the proxy has.
pub const RELEASE_NS: u64 = 30_000_000_000;
/// A ledger that does not know what the one before it granted lets nothing grow for this time: proxies in touch have
/// reported by then.
pub const RECOVER_NS: u64 = 15_000_000_000;
/// A question that was not answered within this time is given up. Longer than the ledger holds back an answer.
pub const ANSWER_NS: u64 = 5_000_000_000;
/// The ledger holds back the answer to a question without reports for this time, and up to [`MAX_HOLD_NS`] with many
/// proxies.
const HOLD_NS: u64 = 1_000_000_000;
const HOLD_NS_PER_PROXY: u64 = 100_000;
const MAX_HOLD_NS: u64 = 2_000_000_000;

const SECOND_NS: u64 = 1_000_000_000;

/// Subject of a limit: a key, an owner or a client address, with the length of the window. The same subject with another
/// window is another account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// Fingerprint of the subject, evenly spread over all numbers.
    pub key: u64,
    /// The window in seconds, 1 to [`MAX_WINDOW_S`].
    pub window_s: u32,
}

impl Account {
    fn window_ns(self) -> u64 {
        u64::from(self.window_s.max(1)).saturating_mul(SECOND_NS)
    }

    fn is_valid(self) -> bool {
        (1..=MAX_WINDOW_S).contains(&self.window_s)
    }
}

/// Units of a limit that belong to a share of it, rounded down; `share` is of [`SHARES`].
pub fn fair_share(limit: u32, share: u32) -> u32 {
    let units = u64::from(limit).saturating_mul(share.min(SHARES).into());
    u32::try_from(units.checked_div(SHARES.into()).unwrap_or(0)).unwrap_or(u32::MAX)
}

/// Eras with the same lower bits are of the same ledger: each time that it goes on from what was kept, it adds this.
const RUN: u64 = 1 << 48;

/// Whether two eras are of one ledger, which knows all that it had granted before.
const fn is_same_ledger(one: u64, other: u64) -> bool {
    (one ^ other).trailing_zeros() >= RUN.trailing_zeros()
}

/// Whether this proxy is ready for limited requests: the ledger gave it a share, and it was not drained.
pub fn is_ready(data: &mut impl SharedData) -> bool {
    standing::Standing::read(data).is_some_and(|(standing, _)| standing.is_member() && standing.shared)
}

/// Time for which the ledger may hold back an answer without news, with `proxies` in the fleet.
pub fn hold_ns(proxies: usize) -> u64 {
    let proxies = u64::try_from(proxies).unwrap_or(u64::MAX);
    HOLD_NS.saturating_add(proxies.saturating_mul(HOLD_NS_PER_PROXY)).min(MAX_HOLD_NS)
}

#[cfg(test)]
mod tests;
