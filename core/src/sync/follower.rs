//! Following the control plane: what the leader of a proxy's VMs asks for next, and what an answer
//! means. Pure: the filter carries the bytes, [`crate::shm`] publishes the outcome to the workers.
//!
//! A snapshot is taken over in steps of one shard each, so that whoever leads can go on serving requests
//! between them: [`Follower::step`]. A shard that the proxy has already is kept, the others are fetched;
//! each is staged beside the set in force as soon as it was checked. Only the last step puts them in force.

use std::collections::VecDeque;
use std::ops::Range;

use crate::bytes::WireError;
use crate::decide::rules::{self, Rules, RulesError, Ruleset};
use crate::revocation::gate::ShardSource;
use crate::revocation::{self, Shard, ShardError};
use crate::shm::{Change, Publication};
use crate::sync::wire::{self, Answer, Body, DIGEST_BYTES, MAX_SHARDS_PER_REQUEST, NewRules, ShardRequest};
use crate::version::Version;

/// Follows one line of state.
#[derive(Debug, Default)]
pub struct Follower {
    applied: Option<Version>,
    take_over: Option<TakeOver>,
    resync: bool,
}

/// What to ask for next.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask {
    /// News.
    Poll {
        /// What every worker enforces.
        applied: Option<Version>,
        /// Whether the whole state is wanted.
        resync: bool,
    },
    /// Shards of a snapshot.
    Shards(ShardRequest),
    /// Nothing yet: there are steps to be done first.
    Nothing,
}

/// What an answer means.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing new, but in touch.
    Current {
        /// The control plane's clock when it answered, Unix milliseconds.
        sent_at_ms: u64,
    },
    /// A snapshot is being taken over: do its steps, then ask on.
    TakeOver,
    /// Something to publish to all workers.
    Publish(Publication),
}

/// A step of taking a snapshot over.
#[derive(Debug)]
pub enum Step {
    /// There is nothing to be done before the next answer.
    Wait,
    /// A shard was compared with its address; it has to be fetched.
    Differs,
    /// A shard that was checked: stage it.
    Stage {
        /// Which.
        index: u16,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// All shards are staged: publish.
    Publish(Publication),
}

/// Why an answer is not followed. What is enforced stays as it was.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// Not the bytes of an answer.
    #[error("answer cannot be read: {0}")]
    Wire(#[from] WireError),
    /// Rules that do not hold.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// A state older than the one enforced; for instance of a control plane restored from an old copy.
    #[error("refused version {offered}, older than {enforced}, which is enforced")]
    Older {
        /// What was offered.
        offered: Version,
        /// What is enforced.
        enforced: Version,
    },
    /// A patch that does not make the announced rules of those there are.
    #[error("patched rules do not have the announced digest")]
    Patch,
    /// A delta to another version than the one enforced.
    #[error("delta does not apply to the version enforced")]
    Gap,
    /// A shard that is not what its address says.
    #[error("shard {0} does not have the announced digest")]
    Digest(u16),
    /// A shard whose bytes are none.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Shards that were not asked for.
    #[error("answer without a question")]
    Unasked,
}

/// A snapshot on its way.
#[derive(Debug)]
struct TakeOver {
    version: Version,
    sent_at_ms: u64,
    rules: Option<Vec<u8>>,
    bits: u8,
    shards: Vec<(Place, [u8; DIGEST_BYTES])>,
    /// Fetched, but not checked yet: where in `body`, the last answer.
    fetched: VecDeque<(u16, Range<usize>)>,
    body: Vec<u8>,
}

/// Where a shard of a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Here, perhaps.
    Unknown,
    /// At the control plane.
    There,
    /// Here.
    Staged,
}

impl TakeOver {
    fn indexes(&self, wanted: Place) -> impl Iterator<Item = u16> {
        let indexes = (0_u16..).zip(&self.shards);
        indexes.filter_map(move |(index, (place, _))| (*place == wanted).then_some(index))
    }

    fn missing(&self) -> Vec<u16> {
        self.indexes(Place::There).take(MAX_SHARDS_PER_REQUEST).collect()
    }

    fn put(&mut self, index: u16, place: Place) {
        if let Some((shard, _)) = self.shards.get_mut(usize::from(index)) {
            *shard = place;
        }
    }

    fn has_digest(&self, index: u16, bytes: &[u8]) -> bool {
        self.shards.get(usize::from(index)).is_some_and(|(_, digest)| revocation::digest(bytes) == *digest)
    }

    /// Checks the next fetched shard.
    fn check_fetched(&mut self) -> Result<Option<Step>, SyncError> {
        let Some((index, place)) = self.fetched.pop_front() else { return Ok(None) };
        let bytes = self.body.get(place).unwrap_or_default();
        if !self.has_digest(index, bytes) {
            return Err(SyncError::Digest(index));
        }
        let shard = Shard::decode(bytes)?;
        if shard.bits() != self.bits || shard.index() != index {
            return Err(SyncError::Digest(index));
        }
        let bytes = bytes.to_vec();
        if self.fetched.is_empty() {
            self.body = Vec::new();
        }
        self.put(index, Place::Staged);
        Ok(Some(Step::Stage { index, bytes }))
    }

    /// Compares the next shard of which it is not known whether it is here. An empty one needs no fetching.
    fn compare(&mut self, own: &mut impl ShardSource) -> Option<Step> {
        let index = self.indexes(Place::Unknown).next()?;
        let here = own
            .shard(index)
            .filter(|bytes| self.has_digest(index, bytes))
            .or_else(|| Some(Shard::empty(self.bits, index).encode()).filter(|b| self.has_digest(index, b)));
        Some(match here {
            Some(bytes) => {
                self.put(index, Place::Staged);
                Step::Stage { index, bytes }
            }
            None => {
                self.put(index, Place::There);
                Step::Differs
            }
        })
    }
}

impl Follower {
    /// Follows on from what is enforced already.
    pub fn from(applied: Option<Version>) -> Self {
        Self { applied, take_over: None, resync: false }
    }

    /// What is enforced, as far as this follower knows.
    pub fn applied(&self) -> Option<Version> {
        self.applied
    }

    /// What to ask for next.
    pub fn ask(&self) -> Ask {
        let Some(take_over) = &self.take_over else {
            return Ask::Poll { applied: self.applied, resync: self.resync };
        };
        let shards = take_over.missing();
        if shards.is_empty()
            || !take_over.fetched.is_empty()
            || take_over.indexes(Place::Unknown).next().is_some()
        {
            return Ask::Nothing;
        }
        Ask::Shards(ShardRequest { format: wire::FORMAT, version: take_over.version, shards })
    }

    /// The question could not be answered: ask for news again.
    pub fn unanswered(&mut self) {
        self.take_over = None;
    }

    /// What is held is not whole: ask for all of it.
    pub fn start_over(&mut self) {
        self.take_over = None;
        self.resync = true;
    }

    /// A publication was carried out.
    pub fn published(&mut self, version: Version) {
        self.applied = Some(version);
        self.resync = false;
    }

    /// Takes the answer to [`Ask::Poll`]; `own_rules` gives the bytes of the rules enforced now.
    ///
    /// # Errors
    /// See [`SyncError`]; nothing changes then, and the next poll asks for the whole state where that
    /// would help.
    pub fn on_answer(
        &mut self,
        bytes: &[u8],
        own_rules: impl FnOnce() -> Option<Vec<u8>>,
    ) -> Result<Outcome, SyncError> {
        let answer = Answer::decode(bytes)?;
        if let Some(enforced) = self.applied
            && answer.version < enforced
            && !goes_on_from(&answer, enforced)
        {
            return Err(SyncError::Older { offered: answer.version, enforced });
        }
        if let Body::Delta { base_seq, .. } = answer.body
            && self.applied != Some(Version { source: answer.version.source, seq: base_seq })
        {
            self.resync = true;
            return Err(SyncError::Gap);
        }
        let rules = match answer.rules {
            NewRules::Same => None,
            NewRules::Whole(rules) => Some(rules),
            NewRules::Patch { patch, digest } => {
                self.resync = true; // Unless it fits.
                let rules = rules::patched(&own_rules().ok_or(SyncError::Patch)?, &patch)?;
                if revocation::digest(&rules) != digest {
                    return Err(SyncError::Patch);
                }
                self.resync = false;
                Some(rules)
            }
        };
        if let Some(rules) = &rules {
            Ruleset::try_from(Rules::decode(rules)?)?;
        }
        match answer.body {
            Body::Delta { ops, .. } => {
                if self.applied == Some(answer.version) && rules.is_none() && ops.is_empty() {
                    return Ok(Outcome::Current { sent_at_ms: answer.sent_at_ms });
                }
                Ok(Outcome::Publish(Publication {
                    version: answer.version,
                    sent_at_ms: answer.sent_at_ms,
                    rules,
                    revocations: Change::Ops(ops),
                }))
            }
            Body::Snapshot { bits, digests, .. } => {
                self.take_over = Some(TakeOver {
                    version: answer.version,
                    sent_at_ms: answer.sent_at_ms,
                    rules,
                    bits,
                    shards: digests.into_iter().map(|digest| (Place::Unknown, digest)).collect(),
                    fetched: VecDeque::new(),
                    body: Vec::new(),
                });
                Ok(Outcome::TakeOver)
            }
        }
    }

    /// Takes the answer to [`Ask::Shards`]: as many of those asked for as fit, at least one.
    ///
    /// # Errors
    /// See [`SyncError`]; the snapshot is given up and asked for anew.
    pub fn on_shards(&mut self, body: Vec<u8>) -> Result<(), SyncError> {
        let mut take_over = self.take_over.take().ok_or(SyncError::Unasked)?;
        let missing = take_over.missing();
        let shards = wire::decode_shards(&body)?;
        if shards.is_empty() || shards.len() > missing.len() {
            return Err(SyncError::Unasked);
        }
        take_over.fetched = missing.into_iter().zip(shards).collect();
        take_over.body = body;
        self.take_over = Some(take_over);
        Ok(())
    }

    /// Does one step of taking a snapshot over; `own` has the shards enforced now. A step works on one
    /// shard, of at most 256 KiB.
    ///
    /// # Errors
    /// See [`SyncError`]; the snapshot is given up and asked for anew.
    pub fn step(&mut self, own: &mut impl ShardSource) -> Result<Step, SyncError> {
        let Some(mut take_over) = self.take_over.take() else { return Ok(Step::Wait) };
        let step = match take_over.check_fetched()? {
            Some(step) => Some(step),
            None => take_over.compare(own),
        };
        if step.is_none() && take_over.indexes(Place::There).next().is_none() {
            return Ok(Step::Publish(Publication {
                version: take_over.version,
                sent_at_ms: take_over.sent_at_ms,
                rules: take_over.rules,
                revocations: Change::Replace { bits: take_over.bits },
            }));
        }
        self.take_over = Some(take_over);
        Ok(step.unwrap_or(Step::Wait))
    }
}

/// Whether an answer of another control plane is known to lack nothing of the version that is enforced.
fn goes_on_from(answer: &Answer, enforced: Version) -> bool {
    let Body::Snapshot { covers: Some(covers), .. } = answer.body else { return false };
    answer.version.source != enforced.source && covers.source == enforced.source && covers.seq >= enforced.seq
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::rules;
    use crate::revocation::{ExactSet, Fingerprint, Op};

    struct Own(Vec<Vec<u8>>);

    impl ShardSource for Own {
        fn shard(&mut self, index: u16) -> Option<Vec<u8>> {
            self.0.get(usize::from(index)).cloned()
        }
    }

    fn rules() -> Vec<u8> {
        Rules::minimal(Vec::new()).encode()
    }

    fn at(seq: u64) -> Version {
        Version { source: 7, seq }
    }

    fn snapshot(seq: u64, set: &ExactSet) -> (Answer, Vec<Vec<u8>>) {
        let shards: Vec<Vec<u8>> = set.shards().iter().map(|shard| shard.encode()).collect();
        let digests = shards.iter().map(|shard| revocation::digest(shard)).collect();
        let body = Body::Snapshot { covers: None, bits: set.bits(), digests };
        (Answer { version: at(seq), sent_at_ms: 5, rules: NewRules::Whole(rules()), body }, shards)
    }

    fn delta(base_seq: u64, seq: u64, ops: Vec<Op>) -> Vec<u8> {
        Answer { version: at(seq), sent_at_ms: 6, rules: NewRules::Same, body: Body::Delta { base_seq, ops } }
            .encode()
    }

    fn many(range: std::ops::Range<u32>) -> ExactSet {
        ExactSet::of(&range.map(|n| Op::Revoke(Fingerprint::of(&n.to_string()))).collect::<Vec<_>>())
    }

    /// Does every step that there is; the indexes that were staged, and the publication if it came to that.
    fn steps(follower: &mut Follower, own: &mut Own) -> Result<(Vec<u16>, Option<Publication>), SyncError> {
        let mut staged = Vec::new();
        loop {
            match follower.step(own)? {
                Step::Wait => return Ok((staged, None)),
                Step::Differs => {}
                Step::Stage { index, .. } => staged.push(index),
                Step::Publish(publication) => return Ok((staged, Some(publication))),
            }
        }
    }

    #[test]
    fn a_snapshot_is_fetched_by_pieces_and_only_what_differs() {
        let mut set = many(0..300_000);
        let (answer, shards) = snapshot(9, &set);
        assert_eq!(shards.len(), 64);
        let mut follower = Follower::default();
        assert_eq!(follower.ask(), Ask::Poll { applied: None, resync: false });
        let mut own = Own(Vec::new());
        assert!(matches!(follower.on_answer(&answer.encode(), || None), Ok(Outcome::TakeOver)));
        assert_eq!(follower.ask(), Ask::Nothing, "first it is seen what is here already");
        let (mut staged, mut done) = steps(&mut follower, &mut own).unwrap();
        assert_eq!(staged, [0_u16; 0]);
        while done.is_none() {
            let Ask::Shards(request) = follower.ask() else { panic!("shards are missing") };
            assert!(request.shards.len() <= MAX_SHARDS_PER_REQUEST);
            // The control plane may give fewer than were asked for.
            let wanted: Vec<&[u8]> =
                request.shards.iter().take(7).map(|i| shards[usize::from(*i)].as_slice()).collect();
            follower.on_shards(wire::encode_shards(wanted.into_iter())).unwrap();
            assert_eq!(follower.ask(), Ask::Nothing);
            let (more, publication) = steps(&mut follower, &mut own).unwrap();
            staged.extend(more);
            done = publication;
        }
        assert_eq!(staged, (0..64).collect::<Vec<_>>());
        follower.published(done.unwrap().version);
        assert_eq!(follower.applied(), Some(at(9)));
        own.0 = shards;

        // One more, and a control plane that lost its deltas: one shard crosses the wire.
        set.apply(Op::Revoke(Fingerprint::of("one more")));
        let (answer, shards) = snapshot(10, &set);
        follower.on_answer(&answer.encode(), || None).unwrap();
        assert_eq!(steps(&mut follower, &mut own).unwrap().0.len(), 63);
        let Ask::Shards(request) = follower.ask() else { panic!("a shard is missing") };
        assert_eq!(request.shards, [Fingerprint::of("one more").shard(6)]);
        let one = shards[usize::from(request.shards[0])].as_slice();
        follower.on_shards(wire::encode_shards([one].into_iter())).unwrap();
        assert!(steps(&mut follower, &mut own).unwrap().1.is_some());
    }

    #[test]
    fn an_empty_snapshot_needs_no_second_question() {
        let (answer, _) = snapshot(1, &ExactSet::default());
        let mut follower = Follower::default();
        follower.on_answer(&answer.encode(), || None).unwrap();
        let (staged, publication) = steps(&mut follower, &mut Own(Vec::new())).unwrap();
        assert_eq!((staged.len(), publication.is_some()), (1, true));
    }

    #[test]
    fn deltas_follow_on_each_other_or_ask_for_everything() {
        let mut follower = Follower::from(Some(at(5)));
        let mut own = Own(Vec::new());
        let op = Op::Revoke(Fingerprint(1));
        assert!(matches!(
            follower.on_answer(&delta(5, 5, vec![]), || None),
            Ok(Outcome::Current { sent_at_ms: 6 })
        ));
        assert!(matches!(follower.on_answer(&delta(5, 6, vec![op]), || None), Ok(Outcome::Publish(_))));
        follower.published(at(6));
        assert!(matches!(follower.on_answer(&delta(7, 8, vec![op]), || None), Err(SyncError::Gap)));
        assert_eq!(follower.ask(), Ask::Poll { applied: Some(at(6)), resync: true });
        let (answer, _) = snapshot(8, &ExactSet::default());
        assert!(matches!(follower.on_answer(&answer.encode(), || None), Ok(Outcome::TakeOver)));
        assert!(steps(&mut follower, &mut own).unwrap().1.is_some());
        follower.published(at(8));
        assert_eq!(follower.ask(), Ask::Poll { applied: Some(at(8)), resync: false });
    }

    #[test]
    fn an_older_state_is_refused_and_a_newer_source_is_taken() {
        let mut follower = Follower::from(Some(at(50)));
        let (older, _) = snapshot(49, &ExactSet::default());
        assert!(matches!(
            follower.on_answer(&older.encode(), || None),
            Err(SyncError::Older { offered, enforced }) if offered == at(49) && enforced == at(50)
        ));
        let (mut newer, _) = snapshot(1, &ExactSet::default());
        newer.version.source = 8;
        assert!(matches!(follower.on_answer(&newer.encode(), || None), Ok(Outcome::TakeOver)));
        newer.version.source = 6;
        newer.version.seq = 1_000;
        assert!(follower.on_answer(&newer.encode(), || None).is_err());
    }

    #[test]
    fn an_older_source_is_taken_when_it_lacks_nothing_of_what_is_enforced() {
        let (answer, _) = snapshot(1, &ExactSet::default());
        for (covers, taken) in [
            (Some(Version { source: 7, seq: 50 }), true),
            (Some(Version { source: 7, seq: 51 }), true),
            (Some(Version { source: 7, seq: 49 }), false),
            (Some(Version { source: 8, seq: 50 }), false),
            (None, false),
        ] {
            let mut answer = answer.clone();
            answer.version.source = 6;
            if let Body::Snapshot { covers: place, .. } = &mut answer.body {
                *place = covers;
            }
            let mut follower = Follower::from(Some(at(50)));
            assert_eq!(follower.on_answer(&answer.encode(), || None).is_ok(), taken, "{covers:?}");
            // What goes on from an older change of the same source would go back all the same.
            answer.version = at(49);
            assert!(follower.on_answer(&answer.encode(), || None).is_err(), "{covers:?}");
        }
    }

    #[test]
    fn a_shard_that_is_not_what_was_announced_is_refused() {
        let set = many(0..20_000);
        let (answer, shards) = snapshot(1, &set);
        let pieces = |bad: fn(&mut Vec<Vec<u8>>)| {
            let mut shards = shards.clone();
            bad(&mut shards);
            wire::encode_shards(shards.iter().map(Vec::as_slice).collect::<Vec<_>>().into_iter())
        };
        for bad in [
            (|shards| shards[0][20] ^= 1) as fn(&mut Vec<Vec<u8>>),
            |shards| shards.swap(0, 1),
            |shards| shards.push(shards[0].clone()),
            |shards| shards.clear(),
        ] {
            let mut follower = Follower::default();
            follower.on_answer(&answer.encode(), || None).unwrap();
            steps(&mut follower, &mut Own(Vec::new())).unwrap();
            let taken = follower
                .on_shards(pieces(bad))
                .and_then(|()| steps(&mut follower, &mut Own(Vec::new())).map(|_| ()));
            assert!(taken.is_err());
            assert_eq!(follower.ask(), Ask::Poll { applied: None, resync: false });
        }
        assert!(Follower::default().on_shards(pieces(|_| ())).is_err());
    }

    #[test]
    fn rules_that_do_not_hold_change_nothing() {
        let (mut answer, _) = snapshot(1, &ExactSet::default());
        answer.rules = NewRules::Whole(b"{}".to_vec());
        let mut follower = Follower::default();
        assert!(matches!(follower.on_answer(&answer.encode(), || None), Err(SyncError::Rules(_))));
        assert_eq!(follower.applied(), None);
    }

    #[test]
    fn a_patch_of_the_rules_fits_the_rules_there_are_or_all_are_asked_for() {
        let old = rules();
        let mut changed = Rules::decode(&old).unwrap();
        changed.expired_until = 9;
        let new = changed.encode();
        let patch = rules::patch(&new, &rules::changed_members(&old, &new));
        let answer = |digest| {
            let body = Body::Delta { base_seq: 5, ops: Vec::new() };
            let rules = NewRules::Patch { patch: patch.clone(), digest };
            Answer { version: at(6), sent_at_ms: 0, rules, body }.encode()
        };
        let good = answer(revocation::digest(&new));
        let mut follower = Follower::from(Some(at(5)));
        let Ok(Outcome::Publish(publication)) = follower.on_answer(&good, || Some(old.clone())) else {
            panic!("it fits")
        };
        assert_eq!(publication.rules, Some(new.clone()));
        assert_eq!(follower.ask(), Ask::Poll { applied: Some(at(5)), resync: false });
        type Own = fn() -> Option<Vec<u8>>;
        let others: [(Vec<u8>, Own); 3] = [
            (answer([0; DIGEST_BYTES]), || Some(rules())),
            (good.clone(), || None),
            (good, || {
                let mut other = Rules::decode(&rules()).unwrap();
                other.realm = "other".into();
                Some(other.encode())
            }),
        ];
        for (answer, own) in others {
            let mut follower = Follower::from(Some(at(5)));
            assert!(matches!(follower.on_answer(&answer, own), Err(SyncError::Patch)));
            assert_eq!(follower.ask(), Ask::Poll { applied: Some(at(5)), resync: true });
        }
    }
}
