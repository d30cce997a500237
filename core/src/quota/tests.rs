use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::page::{self, Page, Write};
use super::spends::Spends;
use super::*;
use crate::shm::tests::Memory;
use crate::shm::{Conflict, SharedData};

mod simulation;
mod units;

const MS: u64 = 1_000_000;
const S: u64 = SECOND_NS;
/// A spread-out key.
const KEY: u64 = 0x9e37_79b9_7f4a_7c15;

fn account(window_s: u32) -> Account {
    Account { key: KEY, window_s }
}

/// Numbers that look random, the same for a seed (SplitMix64).
#[derive(Debug, Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(KEY);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, sides: u64) -> u64 {
        self.roll() % sides.max(1)
    }

    fn chance(&mut self, in_thousand: u64) -> bool {
        self.below(1_000) < in_thousand
    }
}

/// The most units that were spent in a window beyond what was allowed at its end.
fn worst_excess(spends: &[(u64, u32)], window_ns: u64, allowed: impl Fn(u64) -> u64) -> i64 {
    let mut spends = spends.to_vec();
    spends.sort_unstable();
    let mut inside = VecDeque::new();
    let mut sum = 0_i64;
    let mut worst = i64::MIN;
    for (at, units) in spends {
        inside.push_back((at, units));
        sum += i64::from(units);
        while inside.front().is_some_and(|(first, _)| first + window_ns <= at) {
            sum -= i64::from(inside.pop_front().unwrap().1);
        }
        worst = worst.max(sum - i64::try_from(allowed(at)).unwrap());
    }
    worst
}
