//! The latest changes of the state, from which proxies that are a little behind get deltas.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;
use std::time::Instant;

use keygate_core::decide::rules;
use keygate_core::revocation::{MAX_DELTA_OPS, digest};
use keygate_core::sync::wire::{Answer, Body, NewRules};
use keygate_core::version::Version;

use super::{Effect, State};

/// Number of latest changes that a proxy can follow by delta.
const DELTAS_KEPT: usize = 65_536;

/// The latest changes, for proxies that are a little behind.
#[derive(Debug)]
pub struct Deltas(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    /// Everything after this is kept.
    floor: u64,
    /// When that was published, or this process began.
    floor_at: Instant,
    /// By their numbers, with when they were published.
    entries: VecDeque<(u64, Effect, Instant)>,
    ops: usize,
}

impl Kept {
    fn after(floor: u64, at: Instant) -> Self {
        Self { floor, floor_at: at, entries: VecDeque::new(), ops: 0 }
    }
}

impl Deltas {
    /// None yet, all after `seq`, which was published at an instant, will be kept.
    pub fn after(seq: u64, at: Instant) -> Self {
        Self(Mutex::new(Kept::after(seq, at)))
    }

    /// Keeps the effect of change `seq`, published at an instant.
    pub fn push(&self, seq: u64, effect: Effect, at: Instant) {
        let mut kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if effect.rebuilt {
            *kept = Kept::after(seq, at);
            return;
        }
        kept.ops += effect.ops.len();
        kept.entries.push_back((seq, effect, at));
        while kept.entries.len() > DELTAS_KEPT || kept.ops > MAX_DELTA_OPS {
            let Some((seq, effect, at)) = kept.entries.pop_front() else { break };
            kept.floor = seq;
            kept.floor_at = at;
            kept.ops -= effect.ops.len();
        }
    }

    /// The answer that brings a proxy from `applied` to `state`: a delta if that is kept, else a snapshot. `covers` is what it
    /// enforces of another control plane, if `state` is known to lack nothing of that.
    pub fn answer(
        &self,
        state: &State,
        applied: Option<Version>,
        covers: Option<Version>,
        sent_at_ms: u64,
    ) -> Answer {
        let kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let base =
            applied.filter(|applied| applied.source == state.version.source && applied.seq >= kept.floor);
        let Some(base) = base else {
            drop(kept);
            return Self::snapshot(state, covers, sent_at_ms);
        };
        let start = kept.entries.partition_point(|(seq, ..)| *seq <= base.seq);
        let (mut ops, mut members) = (Vec::new(), BTreeSet::new());
        for (_, effect, _) in kept.entries.range(start..).take_while(|(seq, ..)| *seq <= state.version.seq) {
            ops.extend_from_slice(&effect.ops);
            members.extend(effect.members.iter().cloned());
        }
        drop(kept);
        Answer {
            version: state.version,
            sent_at_ms,
            rules: new_rules(state, &members),
            body: Body::Delta { base_seq: base.seq, ops },
        }
    }

    /// When the first change was published that a proxy lacks which enforces `applied`, something else than `state`. Of
    /// what is not kept any more: at the latest then.
    pub fn lacking_since(&self, state: &State, applied: Option<Version>) -> Instant {
        let kept = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match applied.filter(|applied| applied.source == state.version.source && applied.seq >= kept.floor) {
            None => kept.floor_at,
            Some(applied) => {
                let next = kept.entries.partition_point(|(seq, ..)| *seq <= applied.seq);
                kept.entries.get(next).map_or(state.published, |(.., at)| *at)
            }
        }
    }

    fn snapshot(state: &State, covers: Option<Version>, sent_at_ms: u64) -> Answer {
        let shards = state.revocations.shards();
        Answer {
            version: state.version,
            sent_at_ms,
            rules: NewRules::Whole(state.rules_bytes.expose().clone()),
            body: Body::Snapshot {
                covers,
                bits: state.revocations.bits(),
                digests: shards.iter().map(|shard| shard.digest()).collect(),
            },
        }
    }
}

/// The rules for a proxy that has other values of these members.
fn new_rules(state: &State, members: &BTreeSet<String>) -> NewRules {
    if members.is_empty() {
        return NewRules::Same;
    }
    let patch = rules::patch(state.rules_bytes.expose(), members);
    if patch.len() >= state.rules_bytes.expose().len() {
        return NewRules::Whole(state.rules_bytes.expose().clone());
    }
    NewRules::Patch { patch, digest: digest(state.rules_bytes.expose()) }
}
