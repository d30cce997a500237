//! What a proxy may do by what the control plane last said.

use super::{fair_share, unsaid};
use crate::shared::{Conflict, SharedData};
use crate::wire::{Reader, WireError};

const KEY: &str = "keygate/1/quota/standing";
const MAGIC: &[u8; 4] = b"KGqs";

/// How a proxy stands with the control plane, for all of its VMs. The leader writes it.
///
/// ```text
///  0 4 magic "KGqs"   4 4 share   8 4 reported   12 8 era   20 8 term   28 8 lease, ns   36 8 keep, ns
/// 44 8 asked, ns   52 8 heard, ns   60 8 question   68 8 question asked, ns   76 8 applied
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// This proxy's share of every limit, of [`super::SHARES`].
    pub share: u32,
    /// What the control plane is to count: `share`, but while it is being lowered still the larger one.
    pub reported: u32,
    /// The ledger that agreements are of.
    pub era: u64,
    /// Which membership this is, counted from 1.
    pub term: u64,
    /// How long an agreement holds from when it was asked for.
    pub lease_ns: u64,
    /// How long the share holds from when it was asked for.
    pub keep_ns: u64,
    /// When the last question was asked that was answered.
    pub asked_ns: u64,
    /// When its answer came.
    pub heard_ns: u64,
    /// The number of the last question.
    pub question: u64,
    /// When it was asked.
    pub question_ns: u64,
    /// The number of the last question whose answer was taken, in this term; 0: none yet.
    pub applied: u64,
}

impl Standing {
    /// What is written, and its compare-and-swap number.
    pub fn read(data: &mut impl SharedData) -> Option<(Self, u32)> {
        let (bytes, cas) = data.get(KEY)?;
        Self::decode(&bytes).ok().map(|standing| (standing, cas))
    }

    /// Writes it in place of the one with a number.
    pub fn write(&self, data: &mut impl SharedData, cas: u32) -> Result<(), Conflict> {
        data.set(KEY, &self.encode(), Some(cas))
    }

    /// Whether it is a member of the fleet, as far as it knows.
    pub fn belongs(&self, now_ns: u64) -> bool {
        self.applied > 0 && now_ns < self.asked_ns.saturating_add(self.keep_ns)
    }

    /// Whether the control plane was heard of lately. Then so little is spent without a word that a restart of the
    /// proxy makes little difference.
    pub fn in_touch(&self, now_ns: u64) -> bool {
        now_ns < self.asked_ns.saturating_add(self.lease_ns)
    }

    /// Whether everything that other proxies were granted of what is this one's own has come back, if this one
    /// has no contact: see the proof.
    pub fn is_alone(&self, window_ns: u64, now_ns: u64) -> bool {
        let silence_ns = self.lease_ns.saturating_mul(3).saturating_add(window_ns);
        self.applied > 0 && now_ns >= self.heard_ns.saturating_add(silence_ns)
    }

    /// What is its own of a limit.
    pub fn own(&self, limit: u32) -> u32 {
        fair_share(limit, self.share)
    }

    /// What it may spend of a limit before it said a word.
    pub fn unsaid(&self, limit: u32, now_ns: u64) -> u32 {
        if self.in_touch(now_ns) { fair_share(limit, unsaid(self.share)) } else { self.own(limit) }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&self.share.to_le_bytes());
        out.extend_from_slice(&self.reported.to_le_bytes());
        for number in [
            self.era,
            self.term,
            self.lease_ns,
            self.keep_ns,
            self.asked_ns,
            self.heard_ns,
            self.question,
            self.question_ns,
            self.applied,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        if reader.take(4)? != MAGIC {
            return Err(WireError::UnknownFormat);
        }
        let standing = Self {
            share: reader.u32()?,
            reported: reader.u32()?,
            era: reader.u64()?,
            term: reader.u64()?,
            lease_ns: reader.u64()?,
            keep_ns: reader.u64()?,
            asked_ns: reader.u64()?,
            heard_ns: reader.u64()?,
            question: reader.u64()?,
            question_ns: reader.u64()?,
            applied: reader.u64()?,
        };
        reader.end()?;
        Ok(standing)
    }
}
