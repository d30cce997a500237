use std::collections::BTreeMap;

use proptest::prelude::*;

use super::set::bits_for;
use super::*;

#[test]
fn the_fingerprint_is_the_head_of_sha_256() {
    // printf abc | sha256sum
    assert_eq!(Fingerprint::of("abc"), Fingerprint(0xba78_16bf_8f01_cfea));
    assert_eq!(Fingerprint::of("abc").shard(0), 0);
    assert_eq!(Fingerprint::of("abc").shard(4), 0xb);
    assert_eq!(Fingerprint::of("abc").shard(12), 0xba7);
}

#[test]
fn golden_bytes() {
    let mut shard = Shard::empty(4, 0xb);
    shard.apply(Op::Revoke(Fingerprint(0xb000_0000_0000_0002)));
    shard.apply(Op::Revoke(Fingerprint(0xb000_0000_0000_0001)));
    shard.apply(Op::Suspend(Fingerprint(0xb000_0000_0000_0003)));
    shard.apply(Op::Revoke(Fingerprint(0xa000_0000_0000_0001))); // another shard's
    let want = [
        b"KGX1".as_slice(),
        &[4, 0, 0x0b, 0, 2, 0, 0, 0, 1, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 0, 0xb0],
        &[2, 0, 0, 0, 0, 0, 0, 0xb0],
        &[3, 0, 0, 0, 0, 0, 0, 0xb0],
    ]
    .concat();
    assert_eq!(shard.encode(), want);
    assert_eq!(shard.encoded_bytes(), want.len());
    assert_eq!(Shard::decode(&want).unwrap(), shard);
}

#[test]
fn damaged_bytes_are_refused() {
    let mut shard = Shard::empty(1, 1);
    for value in [3, 5, 9] {
        shard.apply(Op::Revoke(Fingerprint(1 << 63 | value)));
    }
    let good = shard.encode();
    for cut in 0..good.len() {
        assert!(Shard::decode(&good[..cut]).is_err());
    }
    assert!(Shard::decode(&[good.as_slice(), &[0]].concat()).is_err());
    for (position, value) in [(0, b'L'), (4, 13), (4, 0), (5, 1), (6, 0), (6, 2), (8, 4), (12, 1), (16, 9)] {
        let mut bad = good.clone();
        bad[position] = value;
        assert!(Shard::decode(&bad).is_err(), "byte {position} = {value}");
    }
}

#[test]
fn a_revocation_is_terminal() {
    let (mut shard, f) = (Shard::empty(0, 0), Fingerprint(7));
    shard.apply(Op::Suspend(f));
    assert_eq!(shard.standing(f), Standing::Suspended);
    shard.apply(Op::Revoke(f));
    shard.apply(Op::Resume(f));
    shard.apply(Op::Suspend(f));
    assert_eq!(shard.standing(f), Standing::Revoked);
    shard.apply(Op::Forget(f));
    assert_eq!(shard.standing(f), Standing::Clear);
}

#[test]
fn the_layout_follows_the_count() {
    assert_eq!(bits_for(0), 0);
    assert_eq!(bits_for(8_192), 0);
    assert_eq!(bits_for(8_193), 1);
    assert_eq!(bits_for(1_000_000), 7);
    assert_eq!(bits_for(usize::MAX), 12);

    let many: Vec<Op> = (0..50_000).map(|n| Op::Revoke(Fingerprint::of(&format!("jti-{n}")))).collect();
    let mut set = ExactSet::default();
    for op in &many {
        set.apply(*op);
    }
    set.apply(Op::Suspend(Fingerprint::of("s")));
    let relaid = set.relaid().unwrap();
    assert_eq!((relaid.bits(), relaid.len()), (3, 50_001));
    assert!(relaid.relaid().is_none());
    for op in &many {
        assert_eq!((&relaid).standing(op.fingerprint()), Standing::Revoked);
    }
    assert_eq!((&relaid).standing(Fingerprint::of("s")), Standing::Suspended);
    for shard in relaid.shards() {
        assert_eq!(Shard::decode(&shard.encode()).unwrap(), **shard);
    }
    assert_eq!(ExactSet::of(&many).bits(), 3);
}

fn op(choice: u8, value: u64) -> Op {
    let fingerprint = Fingerprint(value.rotate_right(2));
    match choice % 4 {
        0 => Op::Revoke(fingerprint),
        1 => Op::Suspend(fingerprint),
        2 => Op::Resume(fingerprint),
        _ => Op::Forget(fingerprint),
    }
}

proptest! {
    /// The set agrees with a plain map, whatever the order, in every form that it takes.
    #[test]
    fn the_set_is_exact(ops in prop::collection::vec((any::<u8>(), 0u64..64), 0..200), bits in 0u8..4) {
        let mut set = ExactSet::with_bits(bits);
        let mut model: BTreeMap<u64, (bool, bool)> = BTreeMap::new();
        for (choice, value) in ops {
            let op = op(choice, value);
            set.apply(op);
            let entry = model.entry(op.fingerprint().0).or_default();
            match op {
                Op::Revoke(_) => entry.0 = true,
                Op::Suspend(_) => entry.1 = true,
                Op::Resume(_) => entry.1 = false,
                Op::Forget(_) => *entry = (false, false),
            }
        }
        for value in 0u64..64 {
            let fingerprint = Fingerprint(value.rotate_right(2));
            let want = match model.get(&fingerprint.0) {
                Some((true, _)) => Standing::Revoked,
                Some((_, true)) => Standing::Suspended,
                _ => Standing::Clear,
            };
            prop_assert_eq!((&set).standing(fingerprint), want);
            let bytes = set.shards()[usize::from(fingerprint.shard(bits))].encode();
            prop_assert_eq!(ShardView::new(&bytes).unwrap().standing(fingerprint), want);
        }
        let revoked = model.values().filter(|(revoked, _)| *revoked).count();
        let suspended = model.values().filter(|(_, suspended)| *suspended).count();
        prop_assert_eq!((set.len(), set.revoked()), (revoked + suspended, revoked));
    }

    #[test]
    fn forgetting_many_is_forgetting_each(
        have in prop::collection::vec((any::<bool>(), 0u64..64), 0..60),
        gone in prop::collection::vec(0u64..64, 0..60),
        bits in 0u8..4,
    ) {
        let mut one_by_one = ExactSet::with_bits(bits);
        for (suspend, value) in have {
            one_by_one.apply(op(u8::from(suspend), value));
        }
        let _digests: Vec<_> = one_by_one.shards().iter().map(|shard| shard.digest()).collect();
        let mut at_once = one_by_one.clone();
        let gone: Vec<_> = gone.into_iter().map(|value| Fingerprint(value.rotate_right(2))).collect();
        at_once.forget_all(&gone);
        gone.iter().for_each(|fingerprint| one_by_one.apply(Op::Forget(*fingerprint)));
        prop_assert_eq!(at_once.len(), one_by_one.len());
        for (a, b) in at_once.shards().iter().zip(one_by_one.shards()) {
            prop_assert_eq!(a, b);
            prop_assert_eq!(a.digest(), digest(&b.encode()));
        }
    }

    #[test]
    fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
        if let Ok(shard) = Shard::decode(&bytes) {
            prop_assert_eq!(shard.encode(), bytes);
        }
    }

    #[test]
    fn bytes_like_a_shard_decode_or_are_refused(mut tail in prop::collection::vec(any::<u8>(), 0..120)) {
        let mut bytes = b"KGX1".to_vec();
        bytes.append(&mut tail);
        if let Ok(shard) = Shard::decode(&bytes) {
            prop_assert_eq!(shard.encode(), bytes);
        }
    }
}
