//! Shared data of the VMs of one proxy process: the lease of the leader, and the state that it publishes.
//!
//! Envoy gives each worker a VM of its own and all of them a small store of keys and values with
//! compare-and-swap. One VM leads: it talks to the control plane and writes here. The others read.
//!
//! A new version is written piece by piece and the [`Beacon`] last, so a reader that sees the beacon
//! finds all it names. A leader may stall and be replaced at any moment, or die between two writes.
//! Three rules keep that safe:
//! 1. Whoever takes the lease first puts its own name and a higher term into the beacon, then writes.
//! 2. A writer checks that the beacon is still its own after it read what it is about to change, and
//!    writes with compare-and-swap. So a stalled leader that wakes up changes nothing.
//! 3. Changes can be applied again. A leader that died half-way is made good by the next one.
//!
//! Nothing here works on more than one shard, or on more than a few hundred changes of it, at a time: large
//! publications are carried out in steps, between which the leader serves requests.

mod beacon;
mod lease;
mod publisher;
mod roster;
#[cfg(test)]
pub(crate) mod tests;

pub use self::beacon::{Beacon, Contact, beacon};
pub use self::lease::{LEASE_NS, hold_lease, release_lease};
pub use self::publisher::{Change, Publication, PublishError, Publisher, Publishing};
pub use self::roster::{Census, count_start, incarnation, roll_call};
use crate::bytes::Reader;
use crate::revocation::{Op, decode_ops};

/// Number of latest publications that a worker can follow change by change; further behind, it loads the whole state.
pub const LOG_ENTRIES: u64 = 1_024;

const RULES: &str = "keygate/1/rules";

/// A value changed since it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict;

/// The store that the VMs of a process share.
pub trait SharedData {
    /// A value and its compare-and-swap number, which is never 0.
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)>;

    /// Writes a value; with a number, only if the value still has it.
    ///
    /// # Errors
    /// [`Conflict`] when it has not.
    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict>;
}

/// The bytes of the rules, if they are at least as new as `counter` says.
pub fn rules(data: &mut impl SharedData, counter: u64) -> Option<Vec<u8>> {
    stamped(data, RULES).filter(|(stamp, _)| *stamp >= counter).map(|(_, bytes)| bytes)
}

/// The changes of publication `counter`; `None` when they are gone or too many to follow.
pub fn logged(data: &mut impl SharedData, counter: u64) -> Option<Vec<Op>> {
    let (stamp, bytes) = stamped(data, &log_key(counter))?;
    let mut reader = Reader::new(&bytes);
    let ops = decode_ops(&mut reader).ok()?;
    (stamp == counter && reader.end().is_ok()).then_some(ops)
}

/// The bytes of a shard of a generation.
pub fn shard(data: &mut impl SharedData, generation: u64, index: u16) -> Option<Vec<u8>> {
    stamped(data, &shard_key(generation, index))
        .filter(|(stamp, _)| *stamp == generation)
        .map(|(_, bytes)| bytes)
}

fn log_key(counter: u64) -> String {
    format!("keygate/1/log/{}", counter.checked_rem(LOG_ENTRIES).unwrap_or(0))
}

fn shard_key(generation: u64, index: u16) -> String {
    // Two sets at most exist at a time: the one in force and the one being written.
    format!("keygate/1/shard/{}/{index}", generation & 1)
}

/// Values that are overwritten carry the number of what they are, so that a reader knows an old one.
fn stamped(data: &mut impl SharedData, key: &str) -> Option<(u64, Vec<u8>)> {
    let (mut bytes, _) = data.get(key)?;
    let stamp = u64::from_le_bytes(*bytes.first_chunk()?);
    bytes.drain(..8);
    Some((stamp, bytes))
}

fn with_stamp(stamp: u64, bytes: &[u8]) -> Vec<u8> {
    [stamp.to_le_bytes().as_slice(), bytes].concat()
}
