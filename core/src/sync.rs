//! Following the control plane: what the leader of a proxy's VMs asks for next, and what an answer
//! means. Pure: the filter carries the bytes, [`crate::shared`] publishes the outcome to the workers.

use crate::gate::ShardSource;
use crate::revocation::{self, Op, Shard, ShardError};
use crate::rules::{Rules, RulesError, Ruleset};
use crate::version::Version;
use crate::wire::{self, Answer, Body, DIGEST_BYTES, MAX_SHARDS_PER_REQUEST, ShardRequest, WireError};

/// Follows one line of state.
#[derive(Debug, Default)]
pub struct Follower {
    applied: Option<Version>,
    fetch: Option<Fetch>,
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
}

/// What an answer means.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing new, but in touch.
    Current {
        /// The control plane's clock when it answered, Unix milliseconds.
        sent_at_ms: u64,
    },
    /// More is to be asked before anything can be published.
    AskMore,
    /// Something to publish to all workers.
    Publish(Publication),
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
    /// A set that replaces the one there is; every shard was checked.
    Replace {
        /// The number of shards as a power of two.
        bits: u8,
        /// The bytes of each.
        shards: Vec<Vec<u8>>,
    },
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

#[derive(Debug)]
struct Fetch {
    version: Version,
    sent_at_ms: u64,
    rules: Option<Vec<u8>>,
    bits: u8,
    digests: Vec<[u8; DIGEST_BYTES]>,
    shards: Vec<Option<Vec<u8>>>,
}

impl Fetch {
    fn missing(&self) -> Vec<u16> {
        let indexes = (0_u16..).zip(&self.shards);
        indexes
            .filter_map(|(index, shard)| shard.is_none().then_some(index))
            .take(MAX_SHARDS_PER_REQUEST)
            .collect()
    }
}

impl Follower {
    /// Follows on from what is enforced already.
    pub fn from(applied: Option<Version>) -> Self {
        Self { applied, fetch: None, resync: false }
    }

    /// What is enforced, as far as this follower knows.
    pub fn applied(&self) -> Option<Version> {
        self.applied
    }

    /// What to ask for next.
    pub fn ask(&self) -> Ask {
        match &self.fetch {
            None => Ask::Poll { applied: self.applied, resync: self.resync },
            Some(fetch) => Ask::Shards(ShardRequest {
                format: wire::FORMAT,
                version: fetch.version,
                shards: fetch.missing(),
            }),
        }
    }

    /// The question could not be answered: ask for news again.
    pub fn unanswered(&mut self) {
        self.fetch = None;
    }

    /// What is held is not whole: ask for all of it.
    pub fn start_over(&mut self) {
        self.fetch = None;
        self.resync = true;
    }

    /// A publication was carried out.
    pub fn published(&mut self, version: Version) {
        self.applied = Some(version);
        self.resync = false;
    }

    /// Takes the answer to [`Ask::Poll`]. `own` has the shards enforced now.
    ///
    /// # Errors
    /// See [`SyncError`]; nothing changes then, and the next poll asks for the whole state where that
    /// would help.
    pub fn on_answer(&mut self, bytes: &[u8], own: &mut impl ShardSource) -> Result<Outcome, SyncError> {
        let answer = Answer::decode(bytes)?;
        if let Some(enforced) = self.applied
            && answer.version < enforced
        {
            return Err(SyncError::Older { offered: answer.version, enforced });
        }
        if let Some(rules) = &answer.rules {
            Ruleset::try_from(Rules::decode(rules)?)?;
        }
        match answer.body {
            Body::Delta { base_seq, ops } => {
                let base = Version { source: answer.version.source, seq: base_seq };
                if self.applied != Some(base) {
                    self.resync = true;
                    return Err(SyncError::Gap);
                }
                if answer.version == base && answer.rules.is_none() && ops.is_empty() {
                    return Ok(Outcome::Current { sent_at_ms: answer.sent_at_ms });
                }
                Ok(Outcome::Publish(Publication {
                    version: answer.version,
                    sent_at_ms: answer.sent_at_ms,
                    rules: answer.rules,
                    revocations: Change::Ops(ops),
                }))
            }
            Body::Snapshot { bits, digests } => {
                let shards = (0_u16..)
                    .zip(&digests)
                    .map(|(index, digest)| {
                        // What this proxy has already is not asked for again.
                        own.shard(index)
                            .filter(|bytes| revocation::digest(bytes) == *digest)
                            .or_else(|| empty_shard(bits, index, digest))
                    })
                    .collect();
                self.fetch = Some(Fetch {
                    version: answer.version,
                    sent_at_ms: answer.sent_at_ms,
                    rules: answer.rules,
                    bits,
                    digests,
                    shards,
                });
                Ok(self.complete())
            }
        }
    }

    /// Takes the answer to [`Ask::Shards`].
    ///
    /// # Errors
    /// See [`SyncError`]; the snapshot is given up and asked for anew.
    pub fn on_shards(&mut self, bytes: &[u8]) -> Result<Outcome, SyncError> {
        let mut fetch = self.fetch.take().ok_or(SyncError::Unasked)?;
        let missing = fetch.missing();
        let shards = wire::decode_shards(bytes)?;
        if shards.len() != missing.len() {
            return Err(SyncError::Unasked);
        }
        for (index, bytes) in missing.into_iter().zip(shards) {
            let position = usize::from(index);
            if fetch.digests.get(position) != Some(&revocation::digest(bytes)) {
                return Err(SyncError::Digest(index));
            }
            let shard = Shard::decode(bytes)?;
            if shard.bits() != fetch.bits || shard.index() != index {
                return Err(SyncError::Digest(index));
            }
            if let Some(slot) = fetch.shards.get_mut(position) {
                *slot = Some(bytes.to_vec());
            }
        }
        self.fetch = Some(fetch);
        Ok(self.complete())
    }

    fn complete(&mut self) -> Outcome {
        let Some(fetch) = self.fetch.take_if(|fetch| fetch.shards.iter().all(Option::is_some)) else {
            return Outcome::AskMore;
        };
        Outcome::Publish(Publication {
            version: fetch.version,
            sent_at_ms: fetch.sent_at_ms,
            rules: fetch.rules,
            revocations: Change::Replace {
                bits: fetch.bits,
                shards: fetch.shards.into_iter().flatten().collect(),
            },
        })
    }
}

/// An empty shard is known by its digest; it needs no fetching.
fn empty_shard(bits: u8, index: u16, digest: &[u8; DIGEST_BYTES]) -> Option<Vec<u8>> {
    let bytes = Shard::empty(bits, index).encode();
    (revocation::digest(&bytes) == *digest).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;
    use crate::revocation::{ExactSet, Fingerprint};
    use crate::rules;

    struct Own(Vec<Vec<u8>>);

    impl ShardSource for Own {
        fn shard(&mut self, index: u16) -> Option<Vec<u8>> {
            self.0.get(usize::from(index)).cloned()
        }
    }

    fn rules() -> Vec<u8> {
        Rules {
            format: rules::FORMAT,
            issuer: "keygate".into(),
            audience: None,
            realm: "keygate".into(),
            leeway_s: 0,
            max_life_s: 1,
            hard_age_s: 1,
            keys: Vec::new(),
            policy: Policy::default(),
            cutoffs: Vec::new(),
            lockdown: None,
        }
        .encode()
    }

    fn at(seq: u64) -> Version {
        Version { source: 7, seq }
    }

    fn snapshot(seq: u64, set: &ExactSet) -> (Answer, Vec<Vec<u8>>) {
        let shards: Vec<Vec<u8>> = set.shards().iter().map(|shard| shard.encode()).collect();
        let digests = shards.iter().map(|shard| revocation::digest(shard)).collect();
        let body = Body::Snapshot { bits: set.bits(), digests };
        (Answer { version: at(seq), sent_at_ms: 5, rules: Some(rules()), body }, shards)
    }

    fn delta(base_seq: u64, seq: u64, ops: Vec<Op>) -> Vec<u8> {
        Answer { version: at(seq), sent_at_ms: 6, rules: None, body: Body::Delta { base_seq, ops } }.encode()
    }

    fn many(range: std::ops::Range<u32>) -> ExactSet {
        ExactSet::of(&range.map(|n| Op::Revoke(Fingerprint::of(&n.to_string()))).collect::<Vec<_>>())
    }

    #[test]
    fn a_snapshot_is_fetched_by_pieces_and_only_what_differs() {
        let mut set = many(0..300_000);
        let (answer, shards) = snapshot(9, &set);
        assert_eq!(shards.len(), 64);
        let mut follower = Follower::default();
        assert_eq!(follower.ask(), Ask::Poll { applied: None, resync: false });
        let mut own = Own(Vec::new());
        let mut outcome = follower.on_answer(&answer.encode(), &mut own).unwrap();
        let mut asked = 0;
        while let Outcome::AskMore = outcome {
            let Ask::Shards(request) = follower.ask() else { panic!("shards are missing") };
            assert!(request.shards.len() <= MAX_SHARDS_PER_REQUEST);
            asked += request.shards.len();
            let wanted: Vec<&[u8]> =
                request.shards.iter().map(|i| shards[usize::from(*i)].as_slice()).collect();
            outcome = follower.on_shards(&wire::encode_shards(wanted.into_iter())).unwrap();
        }
        assert_eq!(asked, 64);
        let Outcome::Publish(publication) = outcome else { panic!("complete") };
        assert_eq!(publication.version, at(9));
        follower.published(publication.version);
        own.0 = shards;

        // One more, and a control plane that lost its deltas: one shard crosses the wire.
        set.apply(Op::Revoke(Fingerprint::of("one more")));
        let (answer, shards) = snapshot(10, &set);
        assert!(matches!(follower.on_answer(&answer.encode(), &mut own), Ok(Outcome::AskMore)));
        let Ask::Shards(request) = follower.ask() else { panic!("a shard is missing") };
        assert_eq!(request.shards, [Fingerprint::of("one more").shard(6)]);
        let one = shards[usize::from(request.shards[0])].as_slice();
        let outcome = follower.on_shards(&wire::encode_shards([one].into_iter()));
        assert!(matches!(outcome, Ok(Outcome::Publish(_))));
    }

    #[test]
    fn an_empty_snapshot_needs_no_second_question() {
        let (answer, _) = snapshot(1, &ExactSet::default());
        let outcome = Follower::default().on_answer(&answer.encode(), &mut Own(Vec::new()));
        assert!(matches!(outcome, Ok(Outcome::Publish(_))));
    }

    #[test]
    fn deltas_follow_on_each_other_or_ask_for_everything() {
        let mut follower = Follower::from(Some(at(5)));
        let mut own = Own(Vec::new());
        let op = Op::Revoke(Fingerprint(1));
        assert!(matches!(
            follower.on_answer(&delta(5, 5, vec![]), &mut own),
            Ok(Outcome::Current { sent_at_ms: 6 })
        ));
        assert!(matches!(follower.on_answer(&delta(5, 6, vec![op]), &mut own), Ok(Outcome::Publish(_))));
        follower.published(at(6));
        assert!(matches!(follower.on_answer(&delta(7, 8, vec![op]), &mut own), Err(SyncError::Gap)));
        assert_eq!(follower.ask(), Ask::Poll { applied: Some(at(6)), resync: true });
        let (answer, _) = snapshot(8, &ExactSet::default());
        assert!(matches!(follower.on_answer(&answer.encode(), &mut own), Ok(Outcome::Publish(_))));
        follower.published(at(8));
        assert_eq!(follower.ask(), Ask::Poll { applied: Some(at(8)), resync: false });
    }

    #[test]
    fn an_older_state_is_refused_and_a_newer_source_is_taken() {
        let mut follower = Follower::from(Some(at(50)));
        let mut own = Own(Vec::new());
        let (older, _) = snapshot(49, &ExactSet::default());
        assert!(matches!(
            follower.on_answer(&older.encode(), &mut own),
            Err(SyncError::Older { offered, enforced }) if offered == at(49) && enforced == at(50)
        ));
        let (mut newer, _) = snapshot(1, &ExactSet::default());
        newer.version.source = 8;
        assert!(matches!(follower.on_answer(&newer.encode(), &mut own), Ok(Outcome::Publish(_))));
        newer.version.source = 6;
        newer.version.seq = 1_000;
        assert!(follower.on_answer(&newer.encode(), &mut own).is_err());
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
            |shards| shards.truncate(1),
            |shards| shards.clear(),
        ] {
            let mut follower = Follower::default();
            follower.on_answer(&answer.encode(), &mut Own(Vec::new())).unwrap();
            assert!(follower.on_shards(&pieces(bad)).is_err());
            assert_eq!(follower.ask(), Ask::Poll { applied: None, resync: false });
        }
        assert!(Follower::default().on_shards(&pieces(|_| ())).is_err());
    }

    #[test]
    fn rules_that_do_not_hold_change_nothing() {
        let (mut answer, _) = snapshot(1, &ExactSet::default());
        answer.rules = Some(b"{}".to_vec());
        let mut follower = Follower::default();
        assert!(matches!(
            follower.on_answer(&answer.encode(), &mut Own(Vec::new())),
            Err(SyncError::Rules(_))
        ));
        assert_eq!(follower.applied(), None);
    }
}
