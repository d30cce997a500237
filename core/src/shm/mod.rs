//! What the VMs of one proxy process share: who leads, and the state that the leader publishes.
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

use crate::bytes::{Reader, WireError};
use crate::revocation::{MAX_SHARD_ENTRIES, Op, Shard, decode_ops, encode_ops};
use crate::version::Version;

/// How long a lease holds, in nanoseconds. The leader renews it at every tick, several times as often.
pub const LEASE_NS: u64 = 1_500_000_000;
/// How many publications back a worker can follow change by change; further behind, it starts anew.
pub const LOG_ENTRIES: u64 = 1_024;
/// The most changes of a publication that workers follow one by one.
const MAX_LOGGED_OPS: usize = 4_096;
/// The most changes of one shard in one step.
const OPS_PER_STEP: usize = 512;
/// A VM that was not heard of for so long is not counted any more, in nanoseconds.
const ROSTER_AGE_NS: u64 = 10_000_000_000;
/// The most VMs counted.
const ROSTER_VMS: usize = 1_024;

const BEACON: &str = "keygate/1/beacon";
const LEASE: &str = "keygate/1/lease";
const RULES: &str = "keygate/1/rules";
const ROSTER: &str = "keygate/1/roster";
const STARTS: &str = "keygate/1/starts";
const INCARNATION: &str = "keygate/1/incarnation";

/// A value that is there and says nothing: a stamp that no reader asks for. Never an empty one, which some hosts
/// do not tell from none.
const NOTHING: [u8; 8] = [0; 8];
const BEACON_MAGIC: &[u8; 4] = b"KGv1";

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

/// Says which state is in force. Written last.
///
/// ```text
///  0 4 magic "KGv1"
///  4 8 leader   12 8 term   20 8 counter   28 8 rules counter   36 8 generation
/// 44 1 shard bits   45 8 source   53 8 seq   61 8 contact, ns   69 8 heard, ns   77 8 sent at, ms
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Beacon {
    /// Which VM leads.
    pub leader: u64,
    /// How many leaders there were.
    pub term: u64,
    /// How many publications there were.
    pub counter: u64,
    /// The publication that last changed the rules; 0: there are none yet, hence no state.
    pub rules_counter: u64,
    /// How often the revocation set was replaced as a whole.
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
    /// What the control plane's clock said when it answered, Unix milliseconds.
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

/// A new version for the workers.
#[derive(Debug)]
pub struct Publication {
    /// The version.
    pub version: Version,
    /// The control plane's clock when it answered, Unix milliseconds.
    pub sent_at_ms: u64,
    /// New rules; they were checked.
    pub rules: Option<Vec<u8>>,
    /// What became of the revoked.
    pub revocations: Change,
}

/// A change of the revocation set.
#[derive(Debug)]
pub enum Change {
    /// Changes to the set there is.
    Ops(Vec<Op>),
    /// The set that was staged replaces the one there is.
    Replace {
        /// The number of shards as a power of two.
        bits: u8,
    },
}

impl Beacon {
    fn encode(&self) -> Vec<u8> {
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

    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
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

/// The number drawn for this process, `drawn` if there is none yet.
pub fn incarnation(data: &mut impl SharedData, drawn: u64) -> u64 {
    if data.get(INCARNATION).is_none() {
        let _raced = data.set(INCARNATION, &drawn.to_le_bytes(), None);
    }
    data.get(INCARNATION)
        .and_then(|(bytes, _)| Some(u64::from_le_bytes(*bytes.first_chunk()?)))
        .unwrap_or(drawn)
}

/// What is known of the VMs of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// How many were heard of lately.
    pub living: usize,
    /// How many were ever started.
    pub started: u64,
    /// Memory of the largest living one, in bytes.
    pub largest_bytes: u64,
}

/// Counts VM `vm` among the living, with the bytes of memory that it has, and says what is known of all.
pub fn roll_call(data: &mut impl SharedData, vm: u64, memory_bytes: u64, now_ns: u64) -> Census {
    let (bytes, cas) = data.get(ROSTER).map_or((Vec::new(), None), |(bytes, cas)| (bytes, Some(cas)));
    let (entries, _) = bytes.as_chunks::<24>();
    let mut living: Vec<[u64; 3]> = entries
        .iter()
        .filter_map(|entry| {
            let mut reader = Reader::new(entry);
            Some([reader.u64().ok()?, reader.u64().ok()?, reader.u64().ok()?])
        })
        .filter(|[id, seen, _]| *id != vm && now_ns.saturating_sub(*seen) < ROSTER_AGE_NS)
        .take(ROSTER_VMS)
        .collect();
    living.push([vm, now_ns, memory_bytes]);
    let bytes: Vec<u8> = living.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
    // A lost race is made good at the next call.
    let _raced = data.set(ROSTER, &bytes, cas);
    let started = data.get(STARTS).and_then(|(count, _)| Some(u64::from_le_bytes(*count.first_chunk()?)));
    Census {
        living: living.len(),
        started: started.unwrap_or(0),
        largest_bytes: living.iter().map(|[.., memory]| *memory).max().unwrap_or(0),
    }
}

/// Counts a VM that has started; whether that worked, else it is to be tried again at the next tick.
pub fn count_start(data: &mut impl SharedData) -> bool {
    let Some((bytes, cas)) = data.get(STARTS) else {
        // A new value cannot be written with compare-and-swap, so the first one counts nobody.
        let _raced = data.set(STARTS, &0_u64.to_le_bytes(), None);
        return false;
    };
    let count = bytes.first_chunk().map_or(0, |count| u64::from_le_bytes(*count));
    data.set(STARTS, &count.saturating_add(1).to_le_bytes(), Some(cas)).is_ok()
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

/// Takes or renews the lease for VM `vm`; whether it leads.
pub fn hold_lease(data: &mut impl SharedData, vm: u64, now_ns: u64) -> bool {
    let Some((bytes, cas)) = data.get(LEASE) else {
        // A new value cannot be written with compare-and-swap, so the first one is nobody's.
        let _raced = data.set(LEASE, &[0; 16], None);
        return false;
    };
    let mut reader = Reader::new(&bytes);
    let holder = reader.u64().unwrap_or(0);
    let until = reader.u64().unwrap_or(0);
    if holder != vm && now_ns < until {
        return false;
    }
    let until = now_ns.saturating_add(LEASE_NS);
    let lease = [vm.to_le_bytes(), until.to_le_bytes()].concat();
    data.set(LEASE, &lease, Some(cas)).is_ok()
}

/// Gives the lease up, so that another VM need not wait for its end.
pub fn release_lease(data: &mut impl SharedData, vm: u64) {
    if let Some((bytes, cas)) = data.get(LEASE)
        && bytes.first_chunk() == Some(&vm.to_le_bytes())
    {
        let _raced = data.set(LEASE, &[0; 16], Some(cas));
    }
}

/// The leader's right to write. It ends when another VM takes over.
#[derive(Debug)]
pub struct Publisher {
    vm: u64,
    beacon: Beacon,
}

/// A publication that is being carried out.
#[derive(Debug)]
pub struct Publishing {
    publication: Publication,
    contact: Contact,
    /// Its changes in the order of their shards, and how many of them are done.
    order: Vec<Op>,
    changed: usize,
}

impl Publishing {
    /// Nothing of it is done yet.
    pub fn new(publication: Publication, contact: Contact) -> Self {
        Self { publication, contact, order: Vec::new(), changed: 0 }
    }

    fn forgets(&self) -> bool {
        matches!(&self.publication.revocations, Change::Ops(ops)
            if ops.iter().any(|op| matches!(op, Op::Forget(_))))
    }

    /// The version that it puts in force.
    pub fn version(&self) -> Version {
        self.publication.version
    }
}

/// Changes of one shard stay in their order.
fn in_shard_order(ops: &[Op], bits: u8) -> Vec<Op> {
    let mut ordered = ops.to_vec();
    ordered.sort_by_key(|op| op.fingerprint().shard(bits));
    ordered
}

/// Why a publication was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Another VM leads now.
    #[error("another worker leads")]
    Deposed,
    /// What is to be changed is not there or is damaged: the whole state is needed.
    #[error("the shared revocation set is incomplete")]
    Incomplete,
}

impl From<Conflict> for PublishError {
    fn from(_: Conflict) -> Self {
        Self::Deposed
    }
}

impl Publisher {
    /// Puts the name of VM `vm`, which holds the lease, into the beacon.
    ///
    /// # Errors
    /// [`PublishError::Deposed`] when another did so at the same time.
    pub fn take_over(data: &mut impl SharedData, vm: u64) -> Result<Self, PublishError> {
        let current = data.get(BEACON);
        let before = current.as_ref().and_then(|(bytes, _)| Beacon::decode(bytes).ok());
        let mut beacon = before.unwrap_or_default();
        beacon.leader = vm;
        beacon.term = beacon.term.saturating_add(1);
        data.set(BEACON, &beacon.encode(), current.map(|(_, cas)| cas))?;
        Self::own(data, beacon)?;
        Ok(Self { vm, beacon })
    }

    /// What is in force.
    pub fn beacon(&self) -> &Beacon {
        &self.beacon
    }

    /// Notes that the control plane was heard of.
    ///
    /// # Errors
    /// [`PublishError::Deposed`].
    pub fn touch(
        &mut self,
        data: &mut impl SharedData,
        contact: Contact,
        sent_at_ms: u64,
    ) -> Result<(), PublishError> {
        let Contact { asked_ns, heard_ns } = contact;
        let next = Beacon { contact_ns: asked_ns, heard_ns, sent_at_ms, ..self.beacon };
        self.light(data, next)
    }

    /// Keeps a shard, checked before, for the set that is to replace the one in force.
    ///
    /// # Errors
    /// [`PublishError::Deposed`].
    pub fn stage(&self, data: &mut impl SharedData, index: u16, bytes: &[u8]) -> Result<(), PublishError> {
        let generation = self.beacon.generation.saturating_add(1);
        self.write(data, &shard_key(generation, index), &with_stamp(generation, bytes))
    }

    /// Drops shard `index` of the set before the one in force, or of one that was never put in force; whether
    /// there was one. Workers must have had the time to see the beacon.
    ///
    /// # Errors
    /// [`PublishError::Deposed`].
    pub fn sweep(&self, data: &mut impl SharedData, index: u16) -> Result<bool, PublishError> {
        let key = shard_key(self.beacon.generation.saturating_add(1), index);
        match data.get(&key) {
            None => Ok(false),
            Some((bytes, _)) if bytes == NOTHING => Ok(true),
            Some((_, cas)) => {
                Self::own(data, self.beacon)?;
                data.set(&key, &NOTHING, Some(cas))?;
                Ok(true)
            }
        }
    }

    /// Puts a new version in force for every worker, in one go.
    ///
    /// # Errors
    /// See [`PublishError`]; the version in force is then the one before.
    pub fn publish(
        &mut self,
        data: &mut impl SharedData,
        publication: Publication,
        contact: Contact,
    ) -> Result<(), PublishError> {
        let mut publishing = Publishing::new(publication, contact);
        while !self.step(data, &mut publishing)? {}
        Ok(())
    }

    /// Does a step of putting a new version in force; whether that was the last one.
    ///
    /// # Errors
    /// See [`PublishError`]; the version in force is then the one before.
    pub fn step(
        &mut self,
        data: &mut impl SharedData,
        publishing: &mut Publishing,
    ) -> Result<bool, PublishError> {
        if publishing.forgets()
            && let Some(rules) = publishing.publication.rules.take()
        {
            // Rules that end expired keys for good come first: whatever dies, no key is forgotten without them.
            self.put_rules_in_force(data, &rules)?;
            return Ok(false);
        }
        if let Change::Ops(ops) = &publishing.publication.revocations
            && publishing.changed < ops.len()
        {
            if publishing.order.is_empty() {
                publishing.order = in_shard_order(ops, self.beacon.bits);
            }
            let rest = publishing.order.get(publishing.changed..).unwrap_or_default();
            publishing.changed = publishing.changed.saturating_add(self.change_shard(data, rest)?);
            // The beacon is lit in a step of its own, unless there was next to nothing to do.
            if publishing.changed < ops.len() || ops.len() > OPS_PER_STEP {
                return Ok(false);
            }
        }
        self.put_in_force(data, publishing)?;
        Ok(true)
    }

    /// Puts new rules in force with the version there is; the version that brings them follows.
    fn put_rules_in_force(&mut self, data: &mut impl SharedData, rules: &[u8]) -> Result<(), PublishError> {
        let counter = self.beacon.counter.saturating_add(1);
        let next = Beacon { counter, rules_counter: counter, ..self.beacon };
        self.write(data, &log_key(counter), &with_stamp(counter, &encode_ops(&[])))?;
        self.write(data, RULES, &with_stamp(counter, rules))?;
        self.light(data, next)
    }

    fn put_in_force(
        &mut self,
        data: &mut impl SharedData,
        publishing: &Publishing,
    ) -> Result<(), PublishError> {
        let Publishing { publication, contact, .. } = publishing;
        let mut next = Beacon {
            counter: self.beacon.counter.saturating_add(1),
            version: publication.version,
            contact_ns: contact.asked_ns,
            heard_ns: contact.heard_ns,
            sent_at_ms: publication.sent_at_ms,
            ..self.beacon
        };
        match &publication.revocations {
            Change::Ops(ops) => {
                let followed = ops.len() <= MAX_LOGGED_OPS;
                let entry = if followed { encode_ops(ops) } else { Vec::new() };
                self.write(data, &log_key(next.counter), &with_stamp(next.counter, &entry))?;
            }
            Change::Replace { bits } => {
                next.bits = *bits;
                next.generation = self.beacon.generation.saturating_add(1);
            }
        }
        if let Some(rules) = &publication.rules {
            next.rules_counter = next.counter;
            self.write(data, RULES, &with_stamp(next.counter, rules))?;
        }
        self.light(data, next)
    }

    /// Applies the first of `ops`, which are in the order of their shards, to the first one's shard; how many.
    fn change_shard(&self, data: &mut impl SharedData, ops: &[Op]) -> Result<usize, PublishError> {
        let Some(index) = ops.first().map(|op| op.fingerprint().shard(self.beacon.bits)) else {
            return Ok(0);
        };
        let key = shard_key(self.beacon.generation, index);
        let (bytes, cas) = data.get(&key).ok_or(PublishError::Incomplete)?;
        let (stamp, bytes) = bytes.split_first_chunk::<8>().ok_or(PublishError::Incomplete)?;
        if u64::from_le_bytes(*stamp) != self.beacon.generation {
            return Err(PublishError::Incomplete);
        }
        let mut shard = Shard::decode(bytes).map_err(|_| PublishError::Incomplete)?;
        let mut changed = 0_usize;
        for op in ops.iter().take(OPS_PER_STEP) {
            if op.fingerprint().shard(self.beacon.bits) != index {
                break;
            }
            shard.apply(*op);
            changed = changed.saturating_add(1);
        }
        if shard.len() > MAX_SHARD_ENTRIES {
            return Err(PublishError::Incomplete); // The set outgrew its cut.
        }
        Self::own(data, self.beacon)?;
        data.set(&key, &with_stamp(self.beacon.generation, &shard.encode()), Some(cas))?;
        Ok(changed)
    }

    /// Writes a value that readers know by its stamp.
    fn write(&self, data: &mut impl SharedData, key: &str, value: &[u8]) -> Result<(), PublishError> {
        let cas = match data.get(key) {
            Some((_, cas)) => cas,
            None => {
                // A new value cannot be written with compare-and-swap, so the first one says nothing.
                data.set(key, &NOTHING, None)?;
                data.get(key).ok_or(PublishError::Deposed)?.1
            }
        };
        Self::own(data, self.beacon)?;
        Ok(data.set(key, value, Some(cas))?)
    }

    fn light(&mut self, data: &mut impl SharedData, next: Beacon) -> Result<(), PublishError> {
        let cas = Self::own(data, self.beacon)?;
        data.set(BEACON, &next.encode(), Some(cas))?;
        self.beacon = next;
        Ok(())
    }

    /// The beacon's compare-and-swap number, if it is still the one that this leader wrote.
    fn own(data: &mut impl SharedData, written: Beacon) -> Result<u32, PublishError> {
        let (bytes, cas) = data.get(BEACON).ok_or(PublishError::Deposed)?;
        match Beacon::decode(&bytes) {
            Ok(beacon) if beacon.leader == written.leader && beacon.term == written.term => Ok(cas),
            _ => Err(PublishError::Deposed),
        }
    }

    /// The VM that leads.
    pub fn vm(&self) -> u64 {
        self.vm
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::revocation::{ExactSet, Fingerprint, Standing};

    /// Envoy's shared data as it behaves: a number per value, compare-and-swap only when asked for. It
    /// can be told to die at a write, as a VM does that traps.
    #[derive(Default, Clone)]
    pub(crate) struct Memory {
        values: HashMap<String, (Vec<u8>, u32)>,
        writes: u32,
        pub(crate) dies_at_write: Option<u32>,
    }

    impl SharedData for Memory {
        fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
            // As the host does it: an empty value is none.
            self.values.get(key).filter(|(value, _)| !value.is_empty()).cloned()
        }

        fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
            if let (Some(cas), Some((_, current))) = (cas, self.values.get(key))
                && cas != *current
            {
                return Err(Conflict);
            }
            if self.dies_at_write == Some(self.writes) {
                return Err(Conflict);
            }
            self.writes += 1;
            self.values.insert(key.to_owned(), (value.to_vec(), self.writes));
            Ok(())
        }
    }

    pub(crate) fn snapshot(seq: u64, set: &ExactSet) -> Publication {
        Publication {
            version: Version { source: 1, seq },
            sent_at_ms: 0,
            rules: Some(format!("rules {seq}").into_bytes()),
            revocations: Change::Replace { bits: set.bits() },
        }
    }

    /// Publishes a whole set.
    pub(crate) fn replace(
        leader: &mut Publisher,
        data: &mut Memory,
        set: &ExactSet,
        publication: Publication,
    ) -> Result<(), PublishError> {
        for shard in set.shards() {
            leader.stage(data, shard.index(), &shard.encode())?;
        }
        leader.publish(data, publication, Contact::default())
    }

    pub(crate) fn delta(seq: u64, ops: Vec<Op>) -> Publication {
        Publication {
            version: Version { source: 1, seq },
            sent_at_ms: 0,
            rules: None,
            revocations: Change::Ops(ops),
        }
    }

    fn standing(data: &mut Memory, jti: &str) -> Standing {
        let beacon = beacon(data).unwrap();
        let fingerprint = Fingerprint::of(jti);
        let bytes = shard(data, beacon.generation, fingerprint.shard(beacon.bits)).unwrap();
        Shard::decode(&bytes).unwrap().standing(fingerprint)
    }

    #[test]
    fn one_vm_leads_and_another_takes_over_when_it_stops_renewing() {
        let mut data = Memory::default();
        assert!(!hold_lease(&mut data, 1, 0), "the first call only makes the lease");
        assert!(hold_lease(&mut data, 1, 1));
        assert!(!hold_lease(&mut data, 2, 2));
        assert!(hold_lease(&mut data, 1, LEASE_NS));
        assert!(!hold_lease(&mut data, 2, LEASE_NS + 1));
        assert!(hold_lease(&mut data, 2, 2 * LEASE_NS));
        assert!(!hold_lease(&mut data, 1, 2 * LEASE_NS));
        release_lease(&mut data, 1);
        assert!(!hold_lease(&mut data, 1, 2 * LEASE_NS));
        release_lease(&mut data, 2);
        assert!(hold_lease(&mut data, 1, 2 * LEASE_NS));
    }

    #[test]
    fn a_leader_that_was_replaced_writes_nothing_more() {
        let mut data = Memory::default();
        let mut old = Publisher::take_over(&mut data, 1).unwrap();
        let empty = ExactSet::default();
        replace(&mut old, &mut data, &empty, snapshot(1, &empty)).unwrap();
        let mut new = Publisher::take_over(&mut data, 2).unwrap();
        new.publish(&mut data, delta(2, vec![Op::Suspend(Fingerprint::of("a"))]), Contact::default())
            .unwrap();
        new.publish(&mut data, delta(3, vec![Op::Resume(Fingerprint::of("a"))]), Contact::default()).unwrap();
        let late = delta(2, vec![Op::Suspend(Fingerprint::of("a"))]);
        assert_eq!(old.publish(&mut data, late, Contact::default()), Err(PublishError::Deposed));
        assert_eq!(old.touch(&mut data, Contact::default(), 0), Err(PublishError::Deposed));
        assert_eq!(standing(&mut data, "a"), Standing::Clear);
        assert_eq!(beacon(&mut data).unwrap().version.seq, 3);
    }

    #[test]
    fn a_leader_that_dies_at_any_write_is_made_good_by_the_next() {
        let set = ExactSet::of(&[Op::Revoke(Fingerprint::of("old"))]);
        let mut before = Memory::default();
        let mut first = Publisher::take_over(&mut before, 1).unwrap();
        replace(&mut first, &mut before, &set, snapshot(1, &set)).unwrap();
        let new = ExactSet::of(&[Op::Revoke(Fingerprint::of("old")), Op::Revoke(Fingerprint::of("new"))]);
        let change = |leader: &mut Publisher, data: &mut Memory| {
            let ops = vec![Op::Revoke(Fingerprint::of("new")), Op::Suspend(Fingerprint::of("s"))];
            leader.publish(data, delta(2, ops), Contact::default())
        };
        let replacement =
            |leader: &mut Publisher, data: &mut Memory| replace(leader, data, &new, snapshot(2, &new));
        type Publish<'a> = &'a dyn Fn(&mut Publisher, &mut Memory) -> Result<(), PublishError>;
        for publish in [&change as Publish<'_>, &replacement] {
            let mut died = 0;
            for death in 0.. {
                let mut data = before.clone();
                data.dies_at_write = Some(before.writes + death);
                let lived = Publisher::take_over(&mut data, 2)
                    .and_then(|mut leader| publish(&mut leader, &mut data))
                    .is_ok();
                data.dies_at_write = None;
                // What was revoked stays so, whatever happened, and the version is old or new, whole.
                assert_eq!(standing(&mut data, "old"), Standing::Revoked);
                let seq = beacon(&mut data).unwrap().version.seq;
                assert_eq!(seq, if lived { 2 } else { 1 });
                let mut next = Publisher::take_over(&mut data, 3).unwrap();
                publish(&mut next, &mut data).unwrap();
                assert_eq!(standing(&mut data, "old"), Standing::Revoked);
                assert_eq!(standing(&mut data, "new"), Standing::Revoked);
                if lived {
                    break;
                }
                died += 1;
            }
            assert!(died >= 4, "a publication has several writes; it died at {died}");
        }
    }

    #[test]
    fn no_key_is_forgotten_before_the_rules_that_end_it_are_in_force() {
        let set = ExactSet::of(&[Op::Revoke(Fingerprint::of("old"))]);
        let mut before = Memory::default();
        let mut first = Publisher::take_over(&mut before, 1).unwrap();
        replace(&mut first, &mut before, &set, snapshot(1, &set)).unwrap();
        for death in 0.. {
            let mut data = before.clone();
            data.dies_at_write = Some(before.writes + death);
            let mut publication = delta(2, vec![Op::Forget(Fingerprint::of("old"))]);
            publication.rules = Some(b"rules 2".to_vec());
            let lived = Publisher::take_over(&mut data, 2)
                .and_then(|mut leader| leader.publish(&mut data, publication, Contact::default()))
                .is_ok();
            let counter = beacon(&mut data).unwrap().rules_counter;
            let rules = rules(&mut data, counter).unwrap();
            assert!(
                standing(&mut data, "old") == Standing::Revoked || rules == b"rules 2",
                "died at {death}"
            );
            if lived {
                assert_eq!(beacon(&mut data).unwrap().version.seq, 2);
                assert!(death >= 6, "there are several writes");
                return;
            }
        }
    }

    #[test]
    fn changes_without_a_whole_set_ask_for_one() {
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        let op = vec![Op::Revoke(Fingerprint(1))];
        assert_eq!(
            leader.publish(&mut data, delta(1, op), Contact::default()),
            Err(PublishError::Incomplete)
        );
        assert!(!beacon(&mut data).unwrap().has_state());
    }

    #[test]
    fn many_changes_are_published_in_steps_that_serve_in_between() {
        let set = ExactSet::of(&(0..20_000).map(|n| Op::Suspend(numbered(n))).collect::<Vec<_>>());
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        replace(&mut leader, &mut data, &set, snapshot(1, &set)).unwrap();
        // Each is revoked, and suspended and resumed in this order.
        let ops: Vec<Op> = (0..10_000)
            .map(numbered)
            .flat_map(|f| [Op::Revoke(f), Op::Suspend(f), Op::Resume(f)])
            .chain((10_000..20_000).map(numbered).map(Op::Resume))
            .collect();
        let mut publishing = Publishing::new(delta(2, ops), Contact::default());
        let mut steps = 0;
        while !leader.step(&mut data, &mut publishing).unwrap() {
            steps += 1;
            assert_eq!(beacon(&mut data).unwrap().version.seq, 1, "in force only as a whole");
        }
        assert!(steps >= 40_000 / OPS_PER_STEP, "{steps} steps");
        assert_eq!(beacon(&mut data).unwrap().version.seq, 2);
        for n in 0..20_000 {
            let want = if n < 10_000 { Standing::Revoked } else { Standing::Clear };
            assert_eq!(standing(&mut data, &n.to_string()), want, "{n}");
        }
    }

    fn numbered(n: u32) -> Fingerprint {
        Fingerprint::of(&n.to_string())
    }

    #[test]
    fn what_was_replaced_is_swept_and_what_is_in_force_is_not() {
        let set = ExactSet::of(&(0..20_000).map(|n| Op::Revoke(numbered(n))).collect::<Vec<_>>());
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        replace(&mut leader, &mut data, &set, snapshot(1, &set)).unwrap();
        replace(&mut leader, &mut data, &set, snapshot(2, &set)).unwrap();
        let held = |data: &Memory| data.values.values().map(|(bytes, _)| bytes.len()).sum::<usize>();
        let before = held(&data);
        let shards = u16::try_from(set.shards().len()).unwrap();
        for index in 0..shards {
            assert!(leader.sweep(&mut data, index).unwrap());
        }
        assert!(!leader.sweep(&mut data, shards).unwrap(), "there is no further one");
        assert!(held(&data) < before * 6 / 10, "{} of {before} bytes are left", held(&data));
        assert_eq!(standing(&mut data, "7"), Standing::Revoked);
        replace(&mut leader, &mut data, &set, snapshot(3, &set)).unwrap();
        assert_eq!(standing(&mut data, "7"), Standing::Revoked);
    }

    #[test]
    fn the_roster_forgets_the_silent() {
        let mut data = Memory::default();
        let census = |living, largest_bytes| Census { living, started: 0, largest_bytes };
        assert_eq!(roll_call(&mut data, 1, 50, 0), census(1, 50));
        assert_eq!(roll_call(&mut data, 2, 70, 1), census(2, 70));
        assert_eq!(roll_call(&mut data, 1, 60, ROSTER_AGE_NS), census(2, 70));
        assert_eq!(roll_call(&mut data, 1, 60, ROSTER_AGE_NS + 1), census(1, 60));
    }

    #[test]
    fn every_start_is_counted_once() {
        let mut data = Memory::default();
        assert!(!count_start(&mut data), "the first call only makes the number");
        assert!(count_start(&mut data) && count_start(&mut data));
        assert_eq!(roll_call(&mut data, 1, 0, 0).started, 2);
    }

    #[test]
    fn one_number_for_the_process() {
        let mut data = Memory::default();
        assert_eq!(incarnation(&mut data, 7), 7);
        assert_eq!(incarnation(&mut data, 8), 7);
    }

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
