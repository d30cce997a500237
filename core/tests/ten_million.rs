//! A million revoked keys among ten million issued, through everything that a proxy does with them: the wire, the
//! leader's steps, shared data, a worker's gate. Every one of the ten million is asked about.

#![expect(clippy::disallowed_methods, reason = "it measures")]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use keygate_core::decide::rules::Rules;
use keygate_core::revocation::{ExactSet, Fingerprint, Op, Revocations as _, Standing};
use keygate_core::shm::{Change, Conflict, Contact, Publication, Publisher, Publishing, SharedData};
use keygate_core::sync::wire::{self, Answer, Body, MAX_ANSWER_BYTES, NewRules, SHARDS_ANSWER_BYTES};
use keygate_core::sync::{Ask, Follower, Outcome, Step};
use keygate_core::version::Version;
use keygate_core::worker::replica::Replica;

const ISSUED: u32 = 10_000_000;
/// One in ten is revoked.
const REVOKED_EVERY: u32 = 10;

/// Envoy's shared data.
#[derive(Default)]
struct Shared {
    values: HashMap<String, (Vec<u8>, u32)>,
    reads: u64,
}

impl SharedData for Shared {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.reads += 1;
        // As the host does it: an empty value is none.
        self.values.get(key).filter(|(value, _)| !value.is_empty()).cloned()
    }

    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
        let current = self.values.get(key).map_or(0, |(_, current)| *current);
        if cas.is_some_and(|cas| cas != current) {
            return Err(Conflict);
        }
        self.values.insert(key.to_owned(), (value.to_vec(), current + 1));
        Ok(())
    }
}

impl Shared {
    fn bytes(&self) -> usize {
        self.values.values().map(|(value, _)| value.len()).sum()
    }
}

fn fingerprint(key: u32) -> Fingerprint {
    Fingerprint::of(&format!("01J{key:023}"))
}

fn rules() -> Vec<u8> {
    Rules::minimal(Vec::new()).encode()
}

/// The control plane's side: a snapshot, and shards as they are asked for.
struct ControlPlane {
    set: ExactSet,
    version: Version,
    sent: usize,
}

impl ControlPlane {
    fn snapshot(&mut self) -> Vec<u8> {
        let digests = self.set.shards().iter().map(|shard| shard.digest()).collect();
        let body = Body::Snapshot { covers: None, bits: self.set.bits(), digests };
        let bytes =
            Answer { version: self.version, sent_at_ms: 0, rules: NewRules::Whole(rules()), body }.encode();
        self.count(bytes)
    }

    fn shards(&mut self, wanted: &[u16]) -> Vec<u8> {
        let mut shards: Vec<Vec<u8>> = Vec::new();
        for index in wanted {
            let shard = self.set.shards()[usize::from(*index)].encode();
            if !shards.is_empty()
                && shards.iter().map(Vec::len).sum::<usize>() + shard.len() > SHARDS_ANSWER_BYTES
            {
                break;
            }
            shards.push(shard);
        }
        self.count(wire::encode_shards(shards.iter().map(Vec::as_slice)))
    }

    fn delta(&mut self, ops: Vec<Op>) -> Vec<u8> {
        let base_seq = self.version.seq;
        self.version.seq += 1;
        ops.iter().for_each(|op| self.set.apply(*op));
        let body = Body::Delta { base_seq, ops };
        let bytes = Answer { version: self.version, sent_at_ms: 0, rules: NewRules::Same, body }.encode();
        self.count(bytes)
    }

    fn count(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        assert!(bytes.len() <= MAX_ANSWER_BYTES);
        self.sent += bytes.len();
        bytes
    }
}

/// The leader's side, as the filter does it, with the time of each of its steps.
struct Leader {
    publisher: Publisher,
    follower: Follower,
    worst: Duration,
    steps: usize,
}

impl Leader {
    fn timed<T>(&mut self, step: impl FnOnce(&mut Self) -> T) -> T {
        let begun = Instant::now();
        let value = step(self);
        self.worst = self.worst.max(begun.elapsed());
        self.steps += 1;
        value
    }

    fn take(&mut self, shared: &mut Shared, control_plane: &mut ControlPlane, answer: &[u8]) {
        match self.timed(|leader| leader.follower.on_answer(answer, || None)).expect("a good answer") {
            Outcome::Publish(publication) => self.publish(shared, publication),
            Outcome::TakeOver => self.take_over(shared, control_plane),
            Outcome::Current { .. } => {}
        }
    }

    fn take_over(&mut self, shared: &mut Shared, control_plane: &mut ControlPlane) {
        loop {
            let generation = self.publisher.beacon().generation;
            let mut own = keygate_core::worker::replica::Shards { data: shared, generation };
            match self.timed(|leader| leader.follower.step(&mut own)).expect("good shards") {
                Step::Differs => {}
                Step::Stage { index, bytes } => {
                    self.timed(|leader| leader.publisher.stage(shared, index, &bytes)).expect("it leads");
                }
                Step::Publish(publication) => return self.publish(shared, publication),
                Step::Wait => {
                    let Ask::Shards(request) = self.follower.ask() else { panic!("shards are missing") };
                    let answer = control_plane.shards(&request.shards);
                    self.timed(|leader| leader.follower.on_shards(answer)).expect("what was asked for");
                }
            }
        }
    }

    fn publish(&mut self, shared: &mut Shared, publication: Publication) {
        if let Change::Ops(ops) = &publication.revocations {
            assert!(!ops.is_empty());
        }
        let mut publishing = Publishing::new(publication, Contact::default());
        while !self.timed(|leader| leader.publisher.step(shared, &mut publishing)).expect("it leads") {}
        self.follower.published(publishing.version());
    }
}

#[test]
fn none_of_ten_million_keys_gets_a_wrong_answer() {
    let issued: Vec<Fingerprint> = (0..ISSUED).map(fingerprint).collect();
    let ops: Vec<Op> =
        issued.iter().step_by(REVOKED_EVERY as usize).map(|revoked| Op::Revoke(*revoked)).collect();
    let version = Version { source: 1, seq: 1 };
    let mut control_plane = ControlPlane { set: ExactSet::of(&ops), version, sent: 0 };
    assert_eq!(control_plane.set.len(), 1_000_000, "no two of them share a fingerprint");

    let mut shared = Shared::default();
    let publisher = Publisher::take_over(&mut shared, 1).expect("nobody else leads");
    let mut leader = Leader { publisher, follower: Follower::default(), worst: Duration::ZERO, steps: 0 };
    let begun = Instant::now();
    let snapshot = control_plane.snapshot();
    leader.take(&mut shared, &mut control_plane, &snapshot);
    let took_over = begun.elapsed();
    let snapshot_bytes = control_plane.sent;

    let mut worker = Replica::default();
    worker.look(&mut shared, 0);
    let (mut gates, mut worst_gate) = (0_u32, Duration::ZERO);
    loop {
        let begun = Instant::now();
        if !worker.derive_gate(&mut shared) {
            break;
        }
        worst_gate = worst_gate.max(begun.elapsed());
        gates += 1;
    }

    shared.reads = 0;
    let (mut wrong, begun) = (0_u32, Instant::now());
    for (key, fingerprint) in (0..).zip(&issued) {
        let want = if key % REVOKED_EVERY == 0 { Standing::Revoked } else { Standing::Clear };
        wrong += u32::from(worker.view(&mut shared, 0).1.standing(*fingerprint) != want);
    }
    let asked = begun.elapsed();
    let looks_behind = shared.reads - 1_000_000;

    // One more, and back again: a delta each, seen at the next look.
    let one_more = fingerprint(1);
    control_plane.sent = 0;
    let delta = control_plane.delta(vec![Op::Revoke(one_more)]);
    let delta_bytes = control_plane.sent;
    leader.take(&mut shared, &mut control_plane, &delta);
    worker.look(&mut shared, 1);
    wrong += u32::from(worker.view(&mut shared, 1).1.standing(one_more) != Standing::Revoked);
    wrong += u32::from(worker.view(&mut shared, 1).1.standing(fingerprint(2)) != Standing::Clear);

    // A snapshot after one change: one shard is fetched.
    control_plane.sent = 0;
    control_plane.set.apply(Op::Revoke(fingerprint(3)));
    control_plane.version.seq += 1;
    let snapshot = control_plane.snapshot();
    leader.take(&mut shared, &mut control_plane, &snapshot);
    let again_bytes = control_plane.sent;
    for index in 0.. {
        if !leader.publisher.sweep(&mut shared, index).expect("it leads") {
            break;
        }
    }

    let mib = |bytes: usize| format!("{:.2} MiB", bytes as f64 / 1_048_576.0);
    println!("wrong answers among {ISSUED} keys: {wrong}");
    println!("a worker's gates: {} in {gates} shards", mib(worker.gate_bytes()));
    println!("shared by all workers: {}", mib(shared.bytes()));
    println!("snapshot: {} on the wire; after one change {}", mib(snapshot_bytes), mib(again_bytes));
    println!("one more revocation: {delta_bytes} bytes on the wire");
    println!("looks behind the gate for keys that are not revoked: {looks_behind} of 9000000");
    println!("taken over in {took_over:?}, {} steps, the longest {:?}", leader.steps, leader.worst);
    println!("longest derivation of a gate: {worst_gate:?}; a look-up: {:?}", asked / ISSUED);

    assert_eq!(wrong, 0);
    assert!(worker.gate_bytes() <= 3_000_000, "{}", worker.gate_bytes());
    assert!(delta_bytes <= 100, "{delta_bytes}");
    assert!(again_bytes < 256 * 1024, "{again_bytes}");
    assert!(looks_behind < 9_000_000 / 10_000, "{looks_behind} false positives");
    assert!(shared.bytes() < 9_000_000, "{}", shared.bytes());
}
