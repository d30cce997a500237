//! Standing of a proxy with the ledger, for all of its VMs.

use super::{GRANT_NS, REPORT_NS, SILENCE_NS, fair_share};
use crate::bytes::{Reader, WireError};
use crate::shm::{Conflict, SharedData};

const KEY: &str = "keygate/2/quota/standing";
const MAGIC: &[u8; 4] = b"KGq2";
const JOINED: u32 = 1;
const LEAVING: u32 = 2;
const SHARED: u32 = 4;

/// Result of the last exchange with the ledger. The leader writes it.
///
/// ```text
///  0 4 magic "KGq2"   4 4 share   8 4 share said   12 4 flags: 1 joined, 2 leaving, 4 shared   16 8 era   24 8 epoch
/// 32 8 sent, ns   40 8 heard, ns   48 8 question   56 8 report interval, ns
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// This proxy's share of every limit, of [`super::SHARES`].
    pub share: u32,
    /// The share that the ledger counts: `share`, or a larger one while the share shrinks.
    pub said: u32,
    /// A ledger answered this process before.
    pub joined: bool,
    /// The proxy was told to leave: nothing more is spent.
    pub leaving: bool,
    /// The proxy had a share once.
    pub shared: bool,
    /// The ledger that answered last; 0: none, or what it granted is void.
    pub era: u64,
    /// Grows each time that what was granted before is void.
    pub epoch: u64,
    /// Time at which the last question that was answered was sent.
    pub sent_ns: u64,
    /// Time at which its answer came.
    pub heard_ns: u64,
    /// Number of the last question.
    pub question: u64,
    /// Time within which spends are to be reported.
    pub report_ns: u64,
}

impl Default for Standing {
    fn default() -> Self {
        Self {
            share: 0,
            said: 0,
            joined: false,
            leaving: false,
            shared: false,
            era: 0,
            epoch: 1,
            sent_ns: 0,
            heard_ns: 0,
            question: 0,
            report_ns: REPORT_NS,
        }
    }
}

impl Standing {
    /// Reads what is written, and its compare-and-swap number.
    pub fn read(data: &mut impl SharedData) -> Option<(Self, u32)> {
        let (bytes, cas) = data.get(KEY)?;
        Self::decode(&bytes).ok().map(|standing| (standing, cas))
    }

    /// Writes it in place of the one with a number.
    pub fn write(&self, data: &mut impl SharedData, cas: u32) -> Result<(), Conflict> {
        data.set(KEY, &self.encode(), Some(cas))
    }

    /// Whether limited requests can be decided.
    pub fn is_member(&self) -> bool {
        self.joined && !self.leaving
    }

    /// Whether the ledger answered lately. If not, the proxy also spends its share of each limit.
    pub fn in_touch(&self, now_ns: u64) -> bool {
        now_ns < self.silent_from_ns()
    }

    /// Time from which the proxy also spends its share of each limit, if there is no answer.
    pub fn silent_from_ns(&self) -> u64 {
        self.heard_ns.saturating_add(SILENCE_NS)
    }

    /// Time at which the proxy stops to spend by what it was granted, if there is no answer.
    pub fn granted_until_ns(&self) -> u64 {
        self.sent_ns.saturating_add(GRANT_NS)
    }

    /// Units of a limit that belong to the proxy's share.
    pub fn own(&self, limit: u32) -> u32 {
        fair_share(limit, self.share)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let joined = if self.joined { JOINED } else { 0 };
        let leaving = if self.leaving { LEAVING } else { 0 };
        let shared = if self.shared { SHARED } else { 0 };
        for number in [self.share, self.said, joined | leaving | shared] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for number in [self.era, self.epoch, self.sent_ns, self.heard_ns, self.question, self.report_ns] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        if reader.take(4)? != MAGIC {
            return Err(WireError::UnknownFormat);
        }
        let (share, said, flags) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let standing = Self {
            share,
            said,
            joined: flags & JOINED != 0,
            leaving: flags & LEAVING != 0,
            shared: flags & SHARED != 0,
            era: reader.u64()?,
            epoch: reader.u64()?,
            sent_ns: reader.u64()?,
            heard_ns: reader.u64()?,
            question: reader.u64()?,
            report_ns: reader.u64()?,
        };
        reader.end()?;
        Ok(standing)
    }
}
