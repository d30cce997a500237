//! A worker's copy of the published state: what it decides with, and how old that is.

use crate::decide::State;
use crate::decide::rules::{Rules, Ruleset};
use crate::quota;
use crate::revocation::gate::{Gate, Gated, ShardSource};
use crate::shm::{self, Beacon, LOG_ENTRIES, SharedData};
use crate::version::Version;

/// How long a worker may trust its copy before it looks whether there is a newer one, in nanoseconds.
/// The leader acknowledges a version no sooner than this after it published it.
pub const LOOK_EVERY_NS: u64 = 2_000_000;

/// A worker's copy.
#[derive(Debug, Default)]
pub struct Replica {
    beacon: Beacon,
    rules: Option<Ruleset>,
    gate: Gate,
    looked_ns: Option<u64>,
}

impl Replica {
    /// Looks for a newer state if the last look is [`LOOK_EVERY_NS`] ago.
    pub fn refresh(&mut self, data: &mut impl SharedData, now_ns: u64) {
        let waiting = self.rules.is_none(); // Nothing to trust yet: look every time.
        let due = waiting
            || self.looked_ns.is_none_or(|looked| {
                // A clock that went backwards is a reason to look, too.
                now_ns < looked || now_ns.saturating_sub(looked) >= LOOK_EVERY_NS
            });
        if due {
            self.look(data, now_ns);
        }
    }

    /// Looks for a newer state now.
    pub fn look(&mut self, data: &mut impl SharedData, now_ns: u64) {
        self.looked_ns = Some(now_ns);
        let Some(beacon) = shm::beacon(data).filter(Beacon::has_state) else { return };
        // Never an older one. Whether one of another control plane may follow was for the leader to say.
        let (new, old) = (beacon.version, self.beacon.version);
        if new.source == old.source && new.seq < old.seq {
            return;
        }
        if beacon.generation != self.beacon.generation || self.rules.is_none() {
            self.gate = Gate::new(beacon.bits);
        } else if beacon.counter != self.beacon.counter {
            self.follow_log(data, beacon);
        }
        if beacon.rules_counter != self.beacon.rules_counter || self.rules.is_none() {
            // Rules that cannot be had leave no state at all: the old ones may not be enforced any more.
            self.rules = shm::rules(data, beacon.rules_counter)
                .and_then(|bytes| Rules::decode(&bytes).ok())
                .and_then(|rules| Ruleset::try_from(rules).ok());
        }
        self.beacon = beacon;
    }

    fn follow_log(&mut self, data: &mut impl SharedData, beacon: Beacon) {
        let behind = beacon.counter.saturating_sub(self.beacon.counter);
        let mut counters = (self.beacon.counter.saturating_add(1)..=beacon.counter).fuse();
        let followed = behind < LOG_ENTRIES
            && counters.all(|counter| match shm::logged(data, counter) {
                Some(ops) => {
                    ops.into_iter().for_each(|op| self.gate.note(op));
                    true
                }
                None => false,
            });
        if !followed {
            self.gate = Gate::new(beacon.bits);
        }
    }

    /// The rules in force, if there are any.
    pub fn rules(&self) -> Option<&Ruleset> {
        self.rules.as_ref()
    }

    /// The version in force, if there is a state.
    pub fn version(&self) -> Option<Version> {
        self.rules.as_ref().map(|_| self.beacon.version)
    }

    /// Nanoseconds since the state was last known to be the newest.
    pub fn age_ns(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.beacon.contact_ns)
    }

    /// Now in Unix seconds: the later of the host's clock and the control plane's, so that a host clock
    /// that is set back revives no key.
    pub fn now_s(&self, host_unix_ms: u64, now_ns: u64) -> u64 {
        let since_heard_ms = now_ns.saturating_sub(self.beacon.heard_ns) / 1_000_000;
        let control_plane_ms = self.beacon.sent_at_ms.saturating_add(since_heard_ms);
        host_unix_ms.max(control_plane_ms) / 1_000
    }

    /// The gate's bytes of memory.
    pub fn gate_bytes(&self) -> usize {
        self.gate.memory_bytes()
    }

    /// What a decision at `now_ns` is made with: the state, and who is revoked.
    pub fn view<'r, D: SharedData>(
        &'r mut self,
        data: &'r mut D,
        now_ns: u64,
    ) -> (State<'r>, Gated<'r, Shards<'r, D>>) {
        let age_ns = self.age_ns(now_ns);
        let state = match &self.rules {
            None => State::Missing,
            Some(rules) => State::aged(rules, age_ns),
        };
        let source = Shards { data, generation: self.beacon.generation };
        (state, Gated { gate: &mut self.gate, source })
    }

    /// The version that requests are decided on with, if they can be: any route is served, and where there are limits
    /// this proxy has a part of them.
    pub fn ready(&mut self, data: &mut impl SharedData, now_ns: u64) -> Option<Version> {
        let limited = self.rules.as_ref().is_some_and(|rules| !rules.limits.is_empty());
        let serves = self.view(data, now_ns).0.serves();
        self.version().filter(|_| serves && (!limited || quota::is_ready(data)))
    }

    /// Derives one gate that is missing, in an idle moment; whether there was one.
    pub fn derive_gate(&mut self, data: &mut impl SharedData) -> bool {
        self.rules.is_some()
            && self.gate.derive_next(&mut Shards { data, generation: self.beacon.generation })
    }
}

/// The exact shards of one generation in shared data.
#[derive(Debug)]
pub struct Shards<'a, D> {
    /// The shared data.
    pub data: &'a mut D,
    /// The generation.
    pub generation: u64,
}

impl<D: SharedData> ShardSource for Shards<'_, D> {
    fn shard(&mut self, index: u16) -> Option<Vec<u8>> {
        shm::shard(self.data, self.generation, index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decide::limits::Limit;
    use crate::revocation::{ExactSet, Fingerprint, Op, Revocations, Standing};
    use crate::shm::tests::{Memory, delta, replace, snapshot};
    use crate::shm::{Contact, Publication, Publisher};

    fn rules_bytes(hard_age_s: u64) -> Vec<u8> {
        Rules { hard_age_s, ..Rules::minimal(Vec::new()) }.encode()
    }

    fn first(set: &ExactSet) -> Publication {
        let mut publication = snapshot(1, set);
        publication.rules = Some(rules_bytes(300));
        publication
    }

    fn begin(leader: &mut Publisher, data: &mut Memory, set: &ExactSet) {
        replace(leader, data, set, first(set)).unwrap();
    }

    fn standing(replica: &mut Replica, data: &mut Memory, fingerprint: Fingerprint) -> Standing {
        replica.view(data, 0).1.standing(fingerprint)
    }

    #[test]
    fn a_version_is_in_force_at_the_next_look_and_looks_are_5_ms_apart() {
        let mut data = Memory::default();
        let mut replica = Replica::default();
        replica.refresh(&mut data, 0);
        assert_eq!(replica.version(), None);
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        begin(&mut leader, &mut data, &ExactSet::default());
        replica.refresh(&mut data, 1);
        assert_eq!(replica.version().unwrap().seq, 1, "the first one is not waited for");
        let f = Fingerprint::of("a");
        assert_eq!(standing(&mut replica, &mut data, f), Standing::Clear);
        leader.publish(&mut data, delta(2, vec![Op::Revoke(f)]), Contact::default()).unwrap();
        replica.refresh(&mut data, LOOK_EVERY_NS);
        assert_eq!(replica.version().unwrap().seq, 1);
        replica.refresh(&mut data, LOOK_EVERY_NS + 1);
        assert_eq!(standing(&mut replica, &mut data, f), Standing::Revoked);
        // A clock that went back does not freeze the copy.
        leader.publish(&mut data, delta(3, vec![Op::Forget(f)]), Contact::default()).unwrap();
        replica.refresh(&mut data, 2);
        assert_eq!(replica.version().unwrap().seq, 3);
    }

    #[test]
    fn a_worker_that_slept_through_the_log_starts_anew() {
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        begin(&mut leader, &mut data, &ExactSet::default());
        let mut replica = Replica::default();
        replica.look(&mut data, 0);
        while replica.derive_gate(&mut data) {}
        for seq in 2..LOG_ENTRIES + 10 {
            let op = Op::Revoke(Fingerprint::of(&seq.to_string()));
            leader.publish(&mut data, delta(seq, vec![op]), Contact::default()).unwrap();
        }
        replica.look(&mut data, 0);
        for seq in 2..LOG_ENTRIES + 10 {
            let f = Fingerprint::of(&seq.to_string());
            assert_eq!(standing(&mut replica, &mut data, f), Standing::Revoked, "{seq}");
        }
    }

    #[test]
    fn too_many_changes_to_follow_are_not_missed() {
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        begin(&mut leader, &mut data, &ExactSet::default());
        let mut replica = Replica::default();
        replica.look(&mut data, 0);
        while replica.derive_gate(&mut data) {}
        let ops: Vec<Op> = (0..5_000).map(|n| Op::Revoke(Fingerprint::of(&n.to_string()))).collect();
        leader.publish(&mut data, delta(2, ops.clone()), Contact::default()).unwrap();
        replica.look(&mut data, 0);
        for op in ops {
            assert_eq!(standing(&mut replica, &mut data, op.fingerprint()), Standing::Revoked);
        }
    }

    #[test]
    fn rules_that_cannot_be_read_leave_no_state() {
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        begin(&mut leader, &mut data, &ExactSet::default());
        let mut replica = Replica::default();
        replica.look(&mut data, 0);
        assert!(matches!(replica.view(&mut data, 0).0, State::Fresh(_)));
        let mut broken = delta(2, vec![]);
        broken.rules = Some(b"{}".to_vec());
        leader.publish(&mut data, broken, Contact::default()).unwrap();
        replica.look(&mut data, 0);
        assert!(matches!(replica.view(&mut data, 0).0, State::Missing));
    }

    #[test]
    fn where_there_are_limits_a_proxy_is_ready_once_it_has_a_part_of_them() {
        const S: u64 = 1_000_000_000;
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        let mut replica = Replica::default();
        assert_eq!(replica.ready(&mut data, S), None, "there is no state");
        begin(&mut leader, &mut data, &ExactSet::default());
        leader.touch(&mut data, Contact { asked_ns: S, heard_ns: S }, 0).unwrap();
        replica.look(&mut data, S);
        assert!(replica.ready(&mut data, S).is_some(), "there are no limits");
        let mut rules = Rules::decode(&rules_bytes(300)).unwrap();
        rules.limits.public = Some(Limit { units: 100, window_s: 60 }.into());
        let mut publication = delta(2, vec![]);
        publication.rules = Some(rules.encode());
        leader.publish(&mut data, publication, Contact { asked_ns: S, heard_ns: S }).unwrap();
        replica.look(&mut data, S);
        assert_eq!(replica.ready(&mut data, S), None);
        let mut ledger = quota::Ledger::new(1, false, S);
        let mut asker = quota::Leader::new(1, 1);
        let mut now = S;
        while replica.ready(&mut data, now).is_none() {
            now += S / 100;
            assert!(now < 2 * S, "a share within a second");
            if let Some(question) = asker.on_tick(&mut data, now) {
                let exchange = ledger.exchange(&question, now).unwrap();
                asker.on_answer(&mut data, &exchange.answer, now);
            }
        }
    }

    #[test]
    fn the_state_ages_from_the_last_contact() {
        const S: u64 = 1_000_000_000;
        let at = |s: u64| Contact { asked_ns: s * S, heard_ns: s * S };
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        begin(&mut leader, &mut data, &ExactSet::default());
        leader.touch(&mut data, at(1_000), 0).unwrap();
        let mut replica = Replica::default();
        replica.look(&mut data, 1_000 * S);
        assert!(matches!(replica.view(&mut data, 1_300 * S - 1).0, State::Fresh(_)));
        assert!(matches!(replica.view(&mut data, 1_300 * S).0, State::Stale(_)));
        leader.touch(&mut data, at(1_200), 0).unwrap();
        replica.look(&mut data, 1_301 * S);
        assert!(matches!(replica.view(&mut data, 1_301 * S).0, State::Fresh(_)));
    }

    #[test]
    fn the_later_clock_counts() {
        let mut data = Memory::default();
        let mut leader = Publisher::take_over(&mut data, 1).unwrap();
        let mut publication = first(&ExactSet::default());
        publication.sent_at_ms = 50_000;
        replace(&mut leader, &mut data, &ExactSet::default(), publication).unwrap();
        let mut replica = Replica::default();
        replica.look(&mut data, 0);
        assert_eq!(replica.now_s(10_000, 0), 50, "the host's clock was set back");
        assert_eq!(replica.now_s(10_000, 7_000_000_000), 57);
        assert_eq!(replica.now_s(90_000, 0), 90);
    }

    proptest! {
        /// Whatever is published, however it is batched and whenever a worker looks: at a look it
        /// enforces exactly the set that was published last.
        #[test]
        fn a_look_is_exact(steps in prop::collection::vec((0u8..6, 0u64..24), 1..120)) {
            let mut data = Memory::default();
            let mut leader = Publisher::take_over(&mut data, 1).unwrap();
            let mut set = ExactSet::default();
            begin(&mut leader, &mut data, &set);
            let mut replica = Replica::default();
            let mut seq = 1;
            for (step, value) in steps {
                let f = Fingerprint(value.rotate_right(6));
                let op = match step {
                    0 => Op::Revoke(f),
                    1 => Op::Suspend(f),
                    2 => Op::Resume(f),
                    3 => Op::Forget(f),
                    4 => {
                        replica.look(&mut data, 0);
                        replica.derive_gate(&mut data);
                        for value in 0..24u64 {
                            let f = Fingerprint(value.rotate_right(6));
                            prop_assert_eq!(standing(&mut replica, &mut data, f), (&set).standing(f));
                        }
                        continue;
                    }
                    _ => {
                        seq += 1;
                        let mut publication = snapshot(seq, &set);
                        publication.rules = Some(rules_bytes(seq));
                        replace(&mut leader, &mut data, &set, publication).unwrap();
                        continue;
                    }
                };
                set.apply(op);
                seq += 1;
                leader.publish(&mut data, delta(seq, vec![op]), Contact::default()).unwrap();
            }
        }
    }
}
