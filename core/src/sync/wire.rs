//! The bytes between control plane and proxy.
//!
//! A proxy sends small JSON documents ([`Poll`], [`ShardRequest`]) and gets binary answers. Every decoder
//! here is total: bounds are checked, counts are capped before anything is allocated, unknown kinds and
//! trailing bytes are refused. Encoding is deterministic.
//!
//! ```text
//! answer to a poll, little-endian
//!  0  4  magic "KGS1"
//!  4  1  kind: 1 delta, 2 snapshot, 3 delta with a patch of the rules, 4 snapshot for who comes from another
//!        control plane
//!  5  8  source of the version
//! 13  8  seq of the version that the receiver has after applying this
//! 21  8  time of sending, Unix milliseconds
//! 29  4  n: bytes of rules; 0 in a delta: unchanged
//! 33  n  rules, JSON; in a delta with a patch: JSON merge patch (RFC 7396) of the rules that the receiver has
//!        delta with a patch:
//!    32  SHA-256 of the rules that it makes
//!        delta, also with a patch:
//!     8  seq of the version that this applies to
//!     4  m: number of changes
//!    9m  changes: kind (1 revoke, 2 suspend, 3 resume, 4 forget), fingerprint
//!        snapshot for who comes from another control plane:
//!    16  source and seq of the version that this one is known to go on from
//!        snapshot, also this one:
//!     1  bits: the exact set has 2^bits shards
//!   32·2^bits  SHA-256 of each shard
//!
//! answer to a shard request
//!  0  4  magic "KGB1"
//!  4  4  number of shards
//!        for each: 4 length, then its bytes (see [`crate::revocation::Shard`])
//!
//! part of the state that a proxy enforces, for a control plane that lacks changes of it
//!  0  4  magic "KGE1"
//!  4  16 source and seq of the version
//! 20  1  bits: the exact set has 2^bits shards
//! 21  2  number of the part: 0 are the rules, n is shard n - 1
//! 23     its bytes
//! ```
//!
//! One revocation is an answer of 54 bytes.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::bytes::{Reader, WireError, count};
use crate::decide::rules::MAX_RULES_BYTES;
use crate::revocation::{MAX_SHARD_BITS, MAX_SHARD_ENTRIES, Op, decode_ops, encode_ops};
use crate::version::Version;

/// The format of [`Poll`] and [`ShardRequest`] that this code reads and writes.
pub const FORMAT: u32 = 1;
/// The most bytes of one answer.
pub const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// The most shards asked for at a time.
pub const MAX_SHARDS_PER_REQUEST: usize = 16;
/// The bytes of shards in one answer, unless the first is larger. A proxy copies all of an answer at once,
/// so it is kept small.
pub const SHARDS_ANSWER_BYTES: usize = 128 * 1024;
/// Bytes of a shard's content address.
pub const DIGEST_BYTES: usize = 32;

const ANSWER_MAGIC: &[u8; 4] = b"KGS1";
const SHARDS_MAGIC: &[u8; 4] = b"KGB1";
const PART_MAGIC: &[u8; 4] = b"KGE1";
const PART_HEADER_BYTES: usize = 23;
const MAX_SHARD_BYTES: usize = 16 + 8 * MAX_SHARD_ENTRIES;
/// The most bytes of a [`Part`].
pub const MAX_PART_BYTES: usize = MAX_RULES_BYTES + PART_HEADER_BYTES;
const _: () = assert!(MAX_SHARD_BYTES <= MAX_RULES_BYTES);

/// What a proxy says when it asks for news: who it is, what it enforces, how it fares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Poll {
    /// [`FORMAT`].
    pub format: u32,
    /// Who asks.
    pub proxy: Proxy,
    /// The version that every worker of it enforces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<Version>,
    /// How long the answer may be held back when there is nothing new, in milliseconds.
    pub wait_ms: u64,
    /// Asks for a snapshot, since the last delta did not fit.
    #[serde(default)]
    pub resync: bool,
    /// Answers that could not be used, since this VM leads.
    #[serde(default)]
    pub refused_answers: u64,
    /// Questions that had no answer or a refusal, since this VM leads.
    #[serde(default)]
    pub failed_calls: u64,
    /// The last reason for either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// Who a proxy is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proxy {
    /// Envoy's `node.id`; it must be the proxy's alone.
    pub id: String,
    /// Envoy's `node.cluster`.
    #[serde(default)]
    pub cluster: String,
    /// A number drawn when the process started: tells a restarted proxy from the one before.
    pub incarnation: String,
    /// The filter's version.
    pub filter: String,
    /// VMs of this process that live: workers and the main thread.
    #[serde(default)]
    pub workers: u32,
    /// VMs of this process that were ever started; more than live ones after traps.
    #[serde(default)]
    pub vm_starts: u64,
    /// Memory of the largest of its VMs, in bytes.
    #[serde(default)]
    pub vm_memory_bytes: u64,
}

/// A proxy asks for shards of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRequest {
    /// [`FORMAT`].
    pub format: u32,
    /// The snapshot's version.
    pub version: Version,
    /// Which shards, at most [`MAX_SHARDS_PER_REQUEST`].
    pub shards: Vec<u16>,
}

/// The answer to a poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The version that the receiver has once it applied this.
    pub version: Version,
    /// When it was sent, Unix milliseconds.
    pub sent_at_ms: u64,
    /// The rules.
    pub rules: NewRules,
    /// What to change.
    pub body: Body,
}

/// What an answer says of the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewRules {
    /// They are as they were. Not in a snapshot.
    Same,
    /// Their bytes.
    Whole(Vec<u8>),
    /// What changed of those that the receiver has. Not in a snapshot.
    Patch {
        /// See [`crate::decide::rules::patched`].
        patch: Vec<u8>,
        /// SHA-256 of the rules that it makes.
        digest: [u8; DIGEST_BYTES],
    },
}

/// What an answer changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Changes to what the receiver has.
    Delta {
        /// The seq that they apply to.
        base_seq: u64,
        /// The changes, oldest first.
        ops: Vec<Op>,
    },
    /// The whole state, by content address.
    Snapshot {
        /// A version of another control plane that this one is known to go on from: it lacks no change of it.
        covers: Option<Version>,
        /// The number of shards as a power of two.
        bits: u8,
        /// Each shard's SHA-256.
        digests: Vec<[u8; DIGEST_BYTES]>,
    },
}

impl Answer {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.extend_from_slice(ANSWER_MAGIC);
        out.push(match (&self.body, &self.rules) {
            (Body::Delta { .. }, NewRules::Patch { .. }) => 3,
            (Body::Delta { .. }, _) => 1,
            (Body::Snapshot { covers: None, .. }, _) => 2,
            (Body::Snapshot { covers: Some(_), .. }, _) => 4,
        });
        out.extend_from_slice(&self.version.source.to_le_bytes());
        out.extend_from_slice(&self.version.seq.to_le_bytes());
        out.extend_from_slice(&self.sent_at_ms.to_le_bytes());
        let rules: &[u8] = match &self.rules {
            NewRules::Same => &[],
            NewRules::Whole(bytes) | NewRules::Patch { patch: bytes, .. } => bytes,
        };
        out.extend_from_slice(&count(rules.len()));
        out.extend_from_slice(rules);
        if let NewRules::Patch { digest, .. } = &self.rules {
            out.extend_from_slice(digest);
        }
        match &self.body {
            Body::Delta { base_seq, ops } => {
                out.extend_from_slice(&base_seq.to_le_bytes());
                out.extend_from_slice(&encode_ops(ops));
            }
            Body::Snapshot { covers, bits, digests } => {
                if let Some(covers) = covers {
                    out.extend_from_slice(&covers.source.to_le_bytes());
                    out.extend_from_slice(&covers.seq.to_le_bytes());
                }
                out.push(*bits);
                for digest in digests {
                    out.extend_from_slice(digest);
                }
            }
        }
        out
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// When anything is not as [`Answer::encode`] writes it.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        if reader.take(4)? != ANSWER_MAGIC {
            return Err(WireError::UnknownFormat);
        }
        let kind = reader.u8()?;
        let version = Version { source: reader.u64()?, seq: reader.u64()? };
        let sent_at_ms = reader.u64()?;
        let rules_bytes = reader.capped(MAX_RULES_BYTES)?;
        let bytes = reader.take(rules_bytes)?.to_vec();
        let rules = match kind {
            3 => NewRules::Patch { patch: bytes, digest: reader.array()? },
            _ if bytes.is_empty() => NewRules::Same,
            _ => NewRules::Whole(bytes),
        };
        let body = match kind {
            1 | 3 => Body::Delta { base_seq: reader.u64()?, ops: decode_ops(&mut reader)? },
            2 | 4 => {
                let covers = match kind {
                    4 => Some(Version { source: reader.u64()?, seq: reader.u64()? }),
                    _ => None,
                };
                let bits = reader.u8()?;
                if bits > MAX_SHARD_BITS || rules == NewRules::Same {
                    return Err(WireError::TooMany);
                }
                let shards = 1_usize.checked_shl(u32::from(bits)).unwrap_or(1);
                let (digests, _) =
                    reader.take(shards.saturating_mul(DIGEST_BYTES))?.as_chunks::<DIGEST_BYTES>();
                Body::Snapshot { covers, bits, digests: digests.to_vec() }
            }
            _ => return Err(WireError::UnknownFormat),
        };
        reader.end()?;
        Ok(Self { version, sent_at_ms, rules, body })
    }
}

/// The answer to a [`ShardRequest`]: the shards' bytes in the order asked for, the first of them if all would
/// be more than [`SHARDS_ANSWER_BYTES`].
pub fn encode_shards<'s>(shards: impl ExactSizeIterator<Item = &'s [u8]>) -> Vec<u8> {
    let mut out = SHARDS_MAGIC.to_vec();
    out.extend_from_slice(&count(shards.len()));
    for shard in shards {
        out.extend_from_slice(&count(shard.len()));
        out.extend_from_slice(shard);
    }
    out
}

/// Reads the answer to a [`ShardRequest`]: where in it each shard's bytes are.
///
/// # Errors
/// When anything is not as [`encode_shards`] writes it.
pub fn decode_shards(bytes: &[u8]) -> Result<Vec<Range<usize>>, WireError> {
    let mut reader = Reader::new(bytes);
    if reader.take(4)? != SHARDS_MAGIC {
        return Err(WireError::UnknownFormat);
    }
    let number = reader.capped(MAX_SHARDS_PER_REQUEST)?;
    let mut shards = Vec::with_capacity(number);
    for _ in 0..number {
        let length = reader.capped(MAX_SHARD_BYTES)?;
        let start = bytes.len().saturating_sub(reader.rest().len());
        reader.take(length)?;
        shards.push(start..start.saturating_add(length));
    }
    reader.end()?;
    Ok(shards)
}

/// A part of the state that a proxy enforces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The version that the proxy enforces.
    pub version: Version,
    /// The number of its shards as a power of two.
    pub bits: u8,
    /// 0: the rules; n: shard n - 1.
    pub number: u16,
    /// The bytes of the rules, or of the shard.
    pub bytes: Vec<u8>,
}

impl Part {
    /// The number of parts of a state with 2^`bits` shards.
    pub fn count(bits: u8) -> u16 {
        1_u16.checked_shl(u32::from(bits)).unwrap_or(u16::MAX).saturating_add(1)
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PART_HEADER_BYTES.saturating_add(self.bytes.len()));
        out.extend_from_slice(PART_MAGIC);
        out.extend_from_slice(&self.version.source.to_le_bytes());
        out.extend_from_slice(&self.version.seq.to_le_bytes());
        out.push(self.bits);
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&self.bytes);
        out
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// When they are not as [`Part::encode`] writes them, or too many.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        if bytes.len() > MAX_PART_BYTES {
            return Err(WireError::TooMany);
        }
        if reader.take(4)? != PART_MAGIC {
            return Err(WireError::UnknownFormat);
        }
        let version = Version { source: reader.u64()?, seq: reader.u64()? };
        let (bits, number) = (reader.u8()?, reader.u16()?);
        if bits > MAX_SHARD_BITS || number >= Self::count(bits) {
            return Err(WireError::TooMany);
        }
        Ok(Self { version, bits, number, bytes: reader.rest().to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::revocation::Fingerprint;

    fn delta() -> Answer {
        Answer {
            version: Version { source: 0x0102, seq: 9 },
            sent_at_ms: 0x0304,
            rules: NewRules::Same,
            body: Body::Delta { base_seq: 8, ops: vec![Op::Revoke(Fingerprint(0x0a0b))] },
        }
    }

    fn snapshot() -> Answer {
        Answer {
            version: Version { source: 1, seq: 2 },
            sent_at_ms: 3,
            rules: NewRules::Whole(b"{}".to_vec()),
            body: Body::Snapshot { covers: None, bits: 1, digests: vec![[0xaa; 32], [0xbb; 32]] },
        }
    }

    fn going_over() -> Answer {
        let covers = Some(Version { source: 5, seq: 6 });
        Answer { body: Body::Snapshot { covers, bits: 0, digests: vec![[0xaa; 32]] }, ..snapshot() }
    }

    #[test]
    fn golden_bytes() {
        let want = [
            b"KGS1\x01".as_slice(),
            &[0x02, 0x01, 0, 0, 0, 0, 0, 0],
            &[9, 0, 0, 0, 0, 0, 0, 0],
            &[0x04, 0x03, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0],
            &[8, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 0, 0],
            &[1, 0x0b, 0x0a, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        assert_eq!(delta().encode(), want);
        assert_eq!(want.len(), 54, "the size stands in this module's documentation");
        assert_eq!(Answer::decode(&want).unwrap(), delta());

        let want = [
            b"KGS1\x02".as_slice(),
            &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0],
            b"{}",
            &[1],
            &[0xaa; 32],
            &[0xbb; 32],
        ]
        .concat();
        assert_eq!(snapshot().encode(), want);
        assert_eq!(Answer::decode(&want).unwrap(), snapshot());

        let want = [
            b"KGS1\x04".as_slice(),
            &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0],
            b"{}",
            &[5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0],
            &[0],
            &[0xaa; 32],
        ]
        .concat();
        assert_eq!(going_over().encode(), want);
        assert_eq!(Answer::decode(&want).unwrap(), going_over());

        let patch = Answer {
            rules: NewRules::Patch { patch: b"{}".to_vec(), digest: [0xcc; 32] },
            body: Body::Delta { base_seq: 1, ops: Vec::new() },
            ..snapshot()
        };
        let want = [
            b"KGS1\x03".as_slice(),
            &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0],
            b"{}",
            &[0xcc; 32],
            &[1, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0],
        ]
        .concat();
        assert_eq!(patch.encode(), want);
        assert_eq!(Answer::decode(&want).unwrap(), patch);

        let shards = encode_shards([b"ab".as_slice(), b"c"].into_iter());
        assert_eq!(shards, b"KGB1\x02\0\0\0\x02\0\0\0ab\x01\0\0\0c");
        assert_eq!(decode_shards(&shards).unwrap(), [12..14, 18..19]);
    }

    #[test]
    fn a_part_is_these_bytes_and_no_others_are_read() {
        let part = Part { version: Version { source: 1, seq: 2 }, bits: 1, number: 2, bytes: b"ab".to_vec() };
        let want = [b"KGE1\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0".as_slice(), &[1, 2, 0], b"ab"].concat();
        assert_eq!(part.encode(), want);
        assert_eq!(Part::decode(&want), Ok(part.clone()));
        assert_eq!((Part::count(0), Part::count(1), Part::count(MAX_SHARD_BITS)), (2, 3, 4_097));
        assert!((0..PART_HEADER_BYTES).all(|cut| Part::decode(&want[..cut]).is_err()));
        let beyond = Part { number: 3, ..part.clone() }.encode();
        let too_large = Part { bytes: vec![0; MAX_RULES_BYTES + 1], ..part }.encode();
        for bytes in [beyond, too_large, [b"KGB1".as_slice(), &want[4..]].concat()] {
            assert!(Part::decode(&bytes).is_err());
        }
    }

    #[test]
    fn a_poll_is_this_json() {
        let poll = Poll {
            format: FORMAT,
            proxy: Proxy {
                id: "edge-1".into(),
                cluster: "edge".into(),
                incarnation: "00ff".into(),
                filter: "0.1.0".into(),
                workers: 5,
                vm_starts: 6,
                vm_memory_bytes: 65_536,
            },
            applied: Some(Version { source: 255, seq: 3 }),
            wait_ms: 10_000,
            resync: false,
            refused_answers: 0,
            failed_calls: 0,
            last_error: None,
        };
        let json = r#"{"format":1,"proxy":{"id":"edge-1","cluster":"edge","incarnation":"00ff","filter":"0.1.0","workers":5,"vm_starts":6,"vm_memory_bytes":65536},"applied":"ff.3","wait_ms":10000,"resync":false,"refused_answers":0,"failed_calls":0}"#;
        assert_eq!(serde_json::to_string(&poll).unwrap(), json);
        assert_eq!(serde_json::from_str::<Poll>(json).unwrap(), poll);
    }

    #[test]
    fn every_cut_and_every_addition_is_refused() {
        for answer in [delta(), snapshot(), going_over()] {
            let bytes = answer.encode();
            for cut in 0..bytes.len() {
                assert!(Answer::decode(&bytes[..cut]).is_err());
            }
            assert_eq!(Answer::decode(&[bytes.as_slice(), &[0]].concat()), Err(WireError::TrailingBytes));
        }
        let mut other = delta().encode();
        other[3] = b'2';
        assert_eq!(Answer::decode(&other), Err(WireError::UnknownFormat));
        other[3] = b'1';
        other[4] = 5;
        assert_eq!(Answer::decode(&other), Err(WireError::UnknownFormat));
    }

    #[test]
    fn a_huge_count_allocates_nothing() {
        let mut bytes = delta().encode();
        let count_at = bytes.len() - 13;
        bytes[count_at..count_at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Answer::decode(&bytes), Err(WireError::TooMany));
        assert_eq!(decode_shards(b"KGB1\xff\xff\xff\xff"), Err(WireError::TooMany));
        assert_eq!(decode_shards(b"KGB1\x01\0\0\0\xff\xff\xff\x7f"), Err(WireError::TooMany));
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(mut tail in prop::collection::vec(any::<u8>(), 0..200), kind in 1u8..4) {
            let mut bytes = b"KGS1".to_vec();
            bytes.push(kind);
            bytes.append(&mut tail);
            if let Ok(answer) = Answer::decode(&bytes) {
                prop_assert_eq!(answer.encode(), bytes);
            }
        }

        #[test]
        fn deltas_survive_the_way(source: u64, seq: u64, base_seq: u64, ops in prop::collection::vec((0u8..4, any::<u64>()), 0..50)) {
            let ops = ops.into_iter().map(|(kind, value)| {
                let fingerprint = Fingerprint(value);
                match kind { 0 => Op::Revoke(fingerprint), 1 => Op::Suspend(fingerprint), 2 => Op::Resume(fingerprint), _ => Op::Forget(fingerprint) }
            }).collect();
            let answer = Answer { version: Version { source, seq }, sent_at_ms: 1, rules: NewRules::Same, body: Body::Delta { base_seq, ops } };
            prop_assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }

        #[test]
        fn any_bytes_of_shards_are_read_or_refused(mut tail in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut bytes = b"KGB1".to_vec();
            bytes.append(&mut tail);
            let _ = decode_shards(&bytes);
        }
    }
}
