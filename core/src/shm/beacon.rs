//! The value that says which state is in force.

use super::SharedData;
use crate::bytes::{Reader, WireError};
use crate::version::Version;

pub(super) const BEACON: &str = "keygate/1/beacon";
const BEACON_MAGIC: &[u8; 4] = b"KGv1";

/// Says which state is in force. Written last.
///
/// ```text
///  0 4 magic "KGv1"
///  4 8 leader   12 8 term   20 8 counter   28 8 rules counter   36 8 generation
/// 44 1 shard bits   45 8 source   53 8 seq   61 8 contact, ns   69 8 heard, ns   77 8 sent at, ms
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Beacon {
    /// The leading VM.
    pub leader: u64,
    /// Number of leaders so far.
    pub term: u64,
    /// Number of publications so far.
    pub counter: u64,
    /// The publication that last changed the rules; 0: there are none yet, hence no state.
    pub rules_counter: u64,
    /// Number of times that the revocation set was replaced as a whole.
    pub generation: u64,
    /// The number of its shards as a power of two.
    pub bits: u8,
    /// The version in force.
    pub version: Version,
    /// When the question was asked whose answer came last, nanoseconds of the process's monotonic clock.
    /// The state was the newest then; of any later moment that is not known.
    pub contact_ns: u64,
    /// When that answer came, by the same clock.
    pub heard_ns: u64,
    /// Time of the control plane's answer by its clock, Unix milliseconds.
    pub sent_at_ms: u64,
}

/// When an answer was asked for and when it came, nanoseconds of the process's monotonic clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Contact {
    /// When the question was sent.
    pub asked_ns: u64,
    /// When the answer came.
    pub heard_ns: u64,
}

impl Beacon {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = BEACON_MAGIC.to_vec();
        for number in [self.leader, self.term, self.counter, self.rules_counter, self.generation] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(self.bits);
        for number in [self.version.source, self.version.seq, self.contact_ns, self.heard_ns, self.sent_at_ms]
        {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        if reader.take(4)? != BEACON_MAGIC {
            return Err(WireError::UnknownFormat);
        }
        let beacon = Self {
            leader: reader.u64()?,
            term: reader.u64()?,
            counter: reader.u64()?,
            rules_counter: reader.u64()?,
            generation: reader.u64()?,
            bits: reader.u8()?,
            version: Version { source: reader.u64()?, seq: reader.u64()? },
            contact_ns: reader.u64()?,
            heard_ns: reader.u64()?,
            sent_at_ms: reader.u64()?,
        };
        reader.end()?;
        Ok(beacon)
    }

    /// Whether a state was ever published.
    pub fn has_state(&self) -> bool {
        self.rules_counter > 0
    }
}

/// The beacon, if a leader ever wrote one.
pub fn beacon(data: &mut impl SharedData) -> Option<Beacon> {
    Beacon::decode(&data.get(BEACON)?.0).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_beacon_is_no_beacon() {
        let good = Beacon { leader: 1, term: 2, ..Beacon::default() }.encode();
        assert_eq!(good.len(), 85);
        assert!(Beacon::decode(&good).is_ok());
        for cut in 0..good.len() {
            assert!(Beacon::decode(&good[..cut]).is_err());
        }
    }
}
