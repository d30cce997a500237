//! Answers to requests with a limit.

use super::SECOND_NS;
use crate::decide::limits::{Left, Limit, Metered};

/// Answer to a request with a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is within the limit, and was counted.
    Admitted(QuotaStatus),
    /// Units are left, but not at this VM yet.
    Pending(QuotaStatus),
    /// It is not within the limit, or that cannot be told.
    Refused(QuotaStatus, Why),
}

impl Verdict {
    /// Whether the request may pass.
    pub fn is_admitted(&self) -> bool {
        matches!(self, Self::Admitted(_))
    }

    /// The state of the limit, as the client sees it.
    pub fn status(&self) -> QuotaStatus {
        match self {
            Self::Admitted(status) | Self::Pending(status) | Self::Refused(status, _) => *status,
        }
    }

    /// The meter's answer about a request that was asked about with this limit.
    pub fn metered(&self, limit: Limit) -> Metered {
        let status = self.status();
        let reset_s = status.reset_ns.div_ceil(SECOND_NS).max(1);
        let left = Left { limit, remaining: status.remaining, reset_s };
        match self {
            Self::Admitted(_) => Metered::Within(left),
            Self::Pending(_) => Metered::Pending(left),
            Self::Refused(_, Why::Exhausted | Why::TooDear) => Metered::Beyond(left),
            Self::Refused(_, Why::NotMember | Why::Unknown) => Metered::Unknown,
        }
    }
}

/// Numbers for the headers of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaStatus {
    /// The limit, in units a window.
    pub limit: u32,
    /// Units that are left in the fleet, as far as this proxy knows.
    pub remaining: u32,
    /// Nanoseconds until more are free; of a pending request, until it should come again; a window where that is not
    /// known.
    pub reset_ns: u64,
    /// The source of the units.
    pub basis: Basis,
}

/// The source of a proxy's units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Basis {
    /// Its cap, as agreed with the ledger.
    Cap,
    /// Its share of the limit, too: the ledger does not answer.
    FairShare,
}

impl Basis {
    /// Label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Cap => "cap",
            Self::FairShare => "fair_share",
        }
    }
}

/// Reason of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// The limit is spent.
    Exhausted,
    /// The request costs more than the whole limit.
    TooDear,
    /// The proxy takes no part in limits: it never reached the ledger, or was drained.
    NotMember,
    /// The record of spends cannot be read or written.
    Unknown,
}

impl Why {
    /// All reasons.
    pub const ALL: [Self; 4] = [Self::Exhausted, Self::TooDear, Self::NotMember, Self::Unknown];

    /// Label in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::TooDear => "too_dear",
            Self::NotMember => "not_member",
            Self::Unknown => "unknown",
        }
    }
}
