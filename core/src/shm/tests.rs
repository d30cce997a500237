use std::collections::HashMap;

use super::publisher::OPS_PER_STEP;
use super::*;
use crate::revocation::{ExactSet, Fingerprint, Shard, Standing};
use crate::version::Version;

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
fn a_leader_that_was_replaced_writes_nothing_more() {
    let mut data = Memory::default();
    let mut old = Publisher::take_over(&mut data, 1).unwrap();
    let empty = ExactSet::default();
    replace(&mut old, &mut data, &empty, snapshot(1, &empty)).unwrap();
    let mut new = Publisher::take_over(&mut data, 2).unwrap();
    new.publish(&mut data, delta(2, vec![Op::Suspend(Fingerprint::of("a"))]), Contact::default()).unwrap();
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
        assert!(standing(&mut data, "old") == Standing::Revoked || rules == b"rules 2", "died at {death}");
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
    assert_eq!(leader.publish(&mut data, delta(1, op), Contact::default()), Err(PublishError::Incomplete));
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
