//! What happens to a Keygate in the middle of its work.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::dice::Dice;
use crate::SOON;
use crate::redis::Redis;
use crate::stack::Stack;
use crate::wait::{pass, wait_until};

/// How what a disaster left was put right.
#[derive(Debug, Clone, Copy)]
pub struct Recovery {
    /// From the start of what is missing until changes were taken again.
    pub ready_in: Duration,
    /// How many starts before that were cut short.
    pub starts_cut_short: u64,
}

/// Something that happens while changes are made, and how it is put right.
pub trait Disaster {
    /// What it is called.
    fn name(&self) -> &'static str;

    /// Happens, at a moment that was chosen; clients are at work.
    fn strike(&mut self, stack: &mut Stack);

    /// Puts right what an operator or a supervisor would, and waits until changes are taken again; clients are
    /// still.
    fn recover(&mut self, stack: &mut Stack, dice: &mut Dice) -> Recovery;
}

/// SIGKILL for the control plane, which is then started again; at times it is killed during that, too, and at times
/// it finds half a record at the end of its journal.
#[derive(Debug)]
pub struct KillControlPlane {
    usual_start: Duration,
}

impl KillControlPlane {
    /// One start in so many is cut short.
    const STARTS_FOR_ONE_CUT_SHORT: usize = 4;
    /// One kill in so many leaves half a record. The kernel writes a process' bytes to the end whatever becomes of
    /// it, so this has to be made; it is what a machine leaves that stops.
    const KILLS_FOR_HALF_A_RECORD: usize = 4;

    /// It has not happened yet.
    pub const fn new() -> Self {
        Self { usual_start: Duration::from_millis(60) }
    }
}

impl Default for KillControlPlane {
    fn default() -> Self {
        Self::new()
    }
}

impl Disaster for KillControlPlane {
    fn name(&self) -> &'static str {
        "control plane killed"
    }

    fn strike(&mut self, stack: &mut Stack) {
        stack.control_plane.kill();
    }

    fn recover(&mut self, stack: &mut Stack, dice: &mut Dice) -> Recovery {
        if dice.one_in(Self::KILLS_FOR_HALF_A_RECORD) {
            leave_half_a_record(&stack.control_plane.data().join("journal"), dice);
        }
        let mut starts_cut_short = 0;
        while dice.one_in(Self::STARTS_FOR_ONE_CUT_SHORT) {
            stack.control_plane.launch();
            pass(dice.moment(self.usual_start));
            stack.control_plane.kill();
            starts_cut_short += 1;
        }
        let begun = Instant::now();
        stack.control_plane.start();
        self.usual_start = begun.elapsed();
        Recovery { ready_in: self.usual_start, starts_cut_short }
    }
}

/// Redis is emptied, or killed and comes back with its data, with older data, or with none; at times the control plane
/// is killed with it. Redis must have every revocation again, and take changes.
#[derive(Debug)]
pub struct LoseRedis {
    redis: Redis,
    dice: Dice,
}

impl LoseRedis {
    /// It has not happened yet. The control plane is to share this Redis.
    pub const fn new(redis: Redis, dice: Dice) -> Self {
        Self { redis, dice }
    }
}

impl Disaster for LoseRedis {
    fn name(&self) -> &'static str {
        "Redis lost"
    }

    fn strike(&mut self, stack: &mut Stack) {
        match self.dice.below(4) {
            0 => drop(self.redis.cli(&["FLUSHALL"])),
            1 => self.redis.kill(),
            2 => {
                self.redis.kill();
                for entry in fs::read_dir(self.redis.directory()).expect("its directory") {
                    let path = entry.expect("an entry").path();
                    if path.is_dir() {
                        fs::remove_dir_all(path).expect("its append-only file");
                    }
                }
            }
            _ => {
                self.redis.kill();
                stack.control_plane.kill();
            }
        }
    }

    fn recover(&mut self, stack: &mut Stack, _: &mut Dice) -> Recovery {
        let begun = Instant::now();
        if !self.redis.is_running() {
            self.redis.run();
        }
        if !stack.control_plane.is_running() {
            stack.control_plane.start();
        }
        let api = stack.api();
        wait_until(SOON, "a change to be in Redis", || {
            let answer = api.post("/api/admin/revocations/rebuild", &json!({})).expect(200).json();
            answer["durability"] == "replicated"
        });
        let ready_in = begun.elapsed();
        wait_until(SOON, "every revocation to be in Redis", || {
            let stats = api.get("/api/admin/revocations/stats").expect(200).json();
            self.redis.cli(&["SCARD", "revoked_bloom"]).trim().parse().ok() == stats["total_revoked"].as_u64()
        });
        Recovery { ready_in, starts_cut_short: 0 }
    }
}

/// Appends the beginning of a record to the journal.
fn leave_half_a_record(journal: &Path, dice: &mut Dice) {
    const RECORD: &[u8] =
        br#"{"seq":1000000,"at":"2026-01-01T00:00:00.000Z","actor":"key_1","action":"key_revoked""#;
    let segments = fs::read_dir(journal).expect("a journal").filter_map(|entry| Some(entry.ok()?.path()));
    let last = segments.filter(|path| path.extension().is_some_and(|extension| extension == "jsonl")).max();
    let mut file = File::options().append(true).open(last.expect("a segment")).expect("the segment");
    file.write_all(&RECORD[..1 + dice.below(RECORD.len())]).expect("half a record");
}
