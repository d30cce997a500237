//! What a control plane keeps of the ledger.

use serde::{Deserialize, Serialize};

use super::message::Member;
use super::{Account, Terms};

/// All that has to be kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The ledger's number.
    pub era: u64,
    /// The terms that were in force.
    pub terms: Terms,
    /// Whether it began in doubt, and that was not over. If it is over since, that only means more caution.
    #[serde(default)]
    pub in_doubt: bool,
    /// Proxies.
    pub members: Vec<SavedMember>,
    /// Accounts of which a proxy has something else than its own.
    pub pools: Vec<SavedPool>,
}

/// What has to be kept of a proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMember {
    /// Which.
    pub member: Member,
    /// The number of its last question.
    pub number: u64,
    /// Its share, of [`super::SHARES`].
    pub share: u32,
    /// When it was last known to be in touch, by the control plane's clock.
    pub acked_ns: Option<u64>,
    /// Since when without a break.
    pub steady_since_ns: u64,
    /// Whether it has ended; if so, whether it was in touch until then.
    pub ended_in_touch: Option<bool>,
}

/// What has to be kept of an account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPool {
    /// Which.
    pub account: Account,
    /// Each proxy with the units that it has at most, and the limit of which that is.
    pub holders: Vec<(Member, u32, u32)>,
}
