//! Quotas: how many units a key may spend within a window, over the whole fleet, with no hop per request.
//!
//! # Units
//!
//! Of a limit of `L` units there are `L` units, and no more. A unit that is spent at time `t` is back where it was
//! at `t + W`, where `W` is the window. So it is spent at most once in any half-open window of length `W`, and `L`
//! units are spent at most `L` times: the limit is never exceeded in any such window, not only in some that begin
//! at a fixed time. What has to be shown is only that there are never more than `L` units, whatever is lost,
//! delayed or restarted.
//!
//! They move on two levels, and all of them work while they do not move:
//!
//! - **A proxy** has a *cap*: how many units it may have in use. Before anything was said of an account, that is
//!   its own share of the limit: so the first request of a key is answered at once, and a key that is used little
//!   is never spoken of. Where one proxy needs more and others less, they agree with the control plane's [`Ledger`]
//!   on other numbers, account by account. Units in use move when they are back, others at once.
//! - **A VM** of the proxy ([`Worker`]) draws units from what all VMs share, and spends them on its own. What was
//!   spent is told at the next tick.
//!
//! One VM of each proxy leads ([`Leader`]) and speaks with the ledger.
//!
//! # Proof
//!
//! A VM spends only what is in the shared record, by compare-and-swap, or what it drew from there; both count as in
//! use. It does so only while units in use are below the cap. So within a window, a proxy spends at most the
//! largest cap that it had in it, and it is to be shown that caps add up to `L`, where a cap that was lowered counts
//! until a window later. The ledger counts for each proxy a number that its cap does not exceed, now and until what
//! is granted now is back, and grants what the others leave of `L`. That number is right because:
//!
//! 1. **VMs.** A draw ends, no later than what allows it. Whoever looks later and finds it there counts it as spent
//!    at its end, and the VM never spends at its end or later. So a VM that traps takes its units away for the rest
//!    of the draw and a window, and no unit is spent twice.
//! 2. **Own shares.** Shares add up to at most [`SHARES`], so the sum of [`fair_share`] is at most `L`. A share grows
//!    when the ledger says so, and it counts it from then on. Accounts of which others were granted too much for that
//!    are named with it, and the proxy fixes them at what it has before it goes by the larger share. A share shrinks
//!    in three steps: the proxy goes by the smaller one; it looks through all accounts, and reports those of which
//!    more than that is in use; it says so, and only then the ledger counts the smaller one. The looking writes each
//!    page, and spending reads the share after the page and writes after that: so nobody spends by the larger share
//!    on a page that was looked at. A proxy that is drained ([`Ledger::drain`]) goes this way to nothing: then all that
//!    it spent was reported, and nothing else is counted for it.
//! 3. **Agreements.** A [`Question`] supersedes all before it, and a proxy takes the answer to its last one only, also
//!    if another VM leads meanwhile. So what a question reports is what the proxy has at most until it is answered.
//!    The ledger counts the larger of what was reported and what was granted. A lost question or answer means that it
//!    counts too much.
//! 4. **Lost proxies.** Durations, no clocks, are agreed on. What a proxy *may do until* a time it measures from
//!    when it asked, and the ledger from when it answered, which is later. What a proxy *may not do until* a time
//!    it measures from when it heard an answer, and the ledger from when it sent the last answer that the proxy is
//!    known to have heard, which is earlier. Each agreement is a lease of length `l`: it is renewed by reporting,
//!    and when it ends, the cap is the smaller of it and of the proxy's own. The ledger counts it for `l + W`.
//!    The share itself is a lease of length `k`, renewed by every answer; after `k + W` nothing of it is left.
//! 5. **Alone.** A proxy that gave units away takes back its own when it has heard nothing for `3l + W`. Up to `2l`
//!    after the last answer that it took, the ledger counts what it agreed to. After that it counts at least the
//!    proxy's own, so that whatever it renews for others leaves room for that. What was renewed before then ends
//!    by `3l` and is back by `3l + W`. When it hears of the proxy again after more than `2l`, it counts at least the
//!    proxy's own until the account was reported on anew.
//! 6. **Restarts of a proxy.** The new process is a new member. The one before goes the way of a lost one, unless it
//!    is known to have ended: a process that has heard an answer was there after that was sent, and a proxy is one
//!    process at a time (but see [`Terms::hot_restart`]), so those that were heard of before are gone. While it is in
//!    touch, a process spends no more than a fourth of its own of an account before it reports, so if it was in touch
//!    all the time, no more than that counts, for a window. A process that was lost and comes back counts what it
//!    spent itself, and gets what it had.
//! 7. **Restarts of the control plane.** It goes on from what it kept before each answer ([`Ledger::resume`]), with
//!    all leases as if they began now, and nobody heard of. If it may have lost something ([`Ledger::in_doubt`]), it
//!    lets nothing grow until `k + W` have passed. Since it is another ledger, no proxy has more than its own by an
//!    agreement with the one before. Of an account of which nothing was agreed on ([`Report::own`]), the one before
//!    counted all that is the proxy's own.
//! 8. **Another limit.** An agreement is about a limit. If the limit is higher now, a proxy has no more than before
//!    until it has agreed on the new one, which it asks for at once. If it is lower, it has nothing until then, or
//!    until all agreements of others are over that count on less. So among agreements on at most the limit that is
//!    gone by, the last one made sees what the others have. While proxies go by different limits, the largest is the
//!    limit, until a window after the last one knows the smaller. An override is another limit for a time.
//!
//! # Losses
//!
//! Spends are remembered by the time of the last one in each 128th of a window, so units are at most 0.8 % late.
//! When all units are in use, a unit is idle only until the next request at the place where it came back. Limits are
//! divided in proportion to what is asked for, so that this takes as long everywhere. A key that is all of a sudden
//! used at a proxy that has none of it left is refused until the ledger has answered: some tens of milliseconds, and
//! what others use comes only as it is back.

mod bell;
mod division;
mod drain;
mod fellow;
mod leader;
mod ledger;
mod message;
mod page;
mod record;
mod saved;
mod spends;
mod standing;
mod worker;

use serde::{Deserialize, Serialize};

use crate::shared::SharedData;

pub use leader::{ANSWER_NS, HOLD_NS, Leader};
pub use ledger::{Exchange, ExchangeError, Ledger};
pub use message::{
    Answer, FORMAT, Grant, MAX_BYTES, MAX_ENTRIES, Member, MessageError, Question, Recall, Report,
};
pub use saved::{Saved, SavedMember, SavedPool};
pub use worker::{Basis, Notice, Verdict, Why, Worker};

/// All shares of a limit together.
pub const SHARES: u32 = 65_536;
/// The longest window: 31 days, in seconds.
pub const MAX_WINDOW_S: u32 = 31 * 86_400;
/// The shortest lease, in seconds: three times [`ANSWER_NS`], so that an answer is heard of soon after it was sent or
/// not at all.
pub const MIN_LEASE_S: u32 = 15;
/// The longest share, in seconds: 31 days.
pub const MAX_KEEP_S: u32 = 31 * 86_400;

/// While it is in touch with the control plane, a proxy spends one part in so many of its own before it reports on
/// an account. More of it means fewer refusals in a burst, and more that is lost when the proxy restarts.
const UNSAID_PART: u32 = 4;

/// A proxy gets so much more of a limit than it uses, one part in so many of the limit. It is what is lost of the
/// account when the proxy restarts; a proxy asks again when half of it is left.
const AHEAD_PART: u32 = 8;

const SECOND_NS: u64 = 1_000_000_000;

/// What a limit is about: the requests of a key, in windows of a length. Another length is another account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// The fingerprint of the key's id, evenly spread over all numbers.
    pub key: u64,
    /// The window, in seconds, 1 to [`MAX_WINDOW_S`].
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

/// How long what the ledger hands out holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    /// An agreement that gives a proxy more than its own share, in seconds. So long after the last contact, a proxy
    /// falls back on its own share.
    pub lease_s: u32,
    /// A proxy's share, in seconds. So long after the last contact, it has nothing. The share of a proxy that is
    /// lost goes to others so long and a window later.
    pub keep_s: u32,
    /// The longest window that is in use, in seconds.
    pub longest_window_s: u32,
    /// Whether a process of a proxy may still serve when the next one of the same proxy asks, as in Envoy's hot
    /// restart. If not, the next one means that the one before has ended.
    #[serde(default)]
    pub hot_restart: bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self { lease_s: 30, keep_s: 300, longest_window_s: 3_600, hot_restart: false }
    }
}

impl Terms {
    /// Everything that is wrong with them.
    ///
    /// # Errors
    /// At least one, each with its member and what would be right.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut errors = Vec::new();
        let Self { lease_s, keep_s, longest_window_s, hot_restart: _ } = *self;
        if lease_s < MIN_LEASE_S {
            errors.push(format!("lease_s: {lease_s} is too short; at least {MIN_LEASE_S}"));
        }
        if keep_s < lease_s || keep_s > MAX_KEEP_S {
            errors.push(format!("keep_s: {keep_s} must be at least lease_s and at most {MAX_KEEP_S}"));
        }
        if !(1..=MAX_WINDOW_S).contains(&longest_window_s) {
            errors.push(format!("longest_window_s: {longest_window_s} must be 1 to {MAX_WINDOW_S}"));
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// Of each the longer.
    fn longest(self, other: Self) -> Self {
        Self {
            lease_s: self.lease_s.max(other.lease_s),
            keep_s: self.keep_s.max(other.keep_s),
            longest_window_s: self.longest_window_s.max(other.longest_window_s),
            hot_restart: self.hot_restart || other.hot_restart,
        }
    }

    fn lease_ns(self) -> u64 {
        u64::from(self.lease_s).saturating_mul(SECOND_NS)
    }

    fn keep_ns(self) -> u64 {
        u64::from(self.keep_s).saturating_mul(SECOND_NS)
    }

    fn longest_window_ns(self) -> u64 {
        u64::from(self.longest_window_s).saturating_mul(SECOND_NS)
    }
}

/// What is a proxy's own of a limit, rounded down: its fair share. `share` is of [`SHARES`]; the ledger gives each of
/// `n` proxies 7/8 of an `n`-th, and leaves the rest for those that come.
pub fn fair_share(limit: u32, share: u32) -> u32 {
    let units = u64::from(limit).saturating_mul(share.min(SHARES).into());
    u32::try_from(units.checked_div(SHARES.into()).unwrap_or(0)).unwrap_or(u32::MAX)
}

/// Whether this proxy has a part of limits: before, requests that are limited cannot be decided on.
pub fn has_share(data: &mut impl SharedData, now_ns: u64) -> bool {
    standing::Standing::read(data).is_some_and(|(standing, _)| standing.belongs(now_ns) && standing.share > 0)
}

/// The part of a share that may be spent before anything was said of the account, while in touch.
fn unsaid(share: u32) -> u32 {
    share.checked_div(UNSAID_PART).unwrap_or(0)
}

#[cfg(test)]
mod tests;
