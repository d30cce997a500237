//! The leader's writes: one publication after the other, each in steps.

use super::beacon::{BEACON, Beacon, Contact};
use super::{Conflict, RULES, SharedData, log_key, shard_key, with_stamp};
use crate::revocation::{MAX_SHARD_ENTRIES, Op, Shard, encode_ops};
use crate::version::Version;

/// The most changes of a publication that workers follow one by one.
const MAX_LOGGED_OPS: usize = 4_096;
/// The most changes of one shard in one step.
pub(super) const OPS_PER_STEP: usize = 512;

/// A value that is there and says nothing: a stamp that no reader asks for. Never an empty one, which some hosts
/// do not tell from none.
const NOTHING: [u8; 8] = [0; 8];

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

/// Failure of a publication.
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
