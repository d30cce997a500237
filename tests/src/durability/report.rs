//! What a drill found.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};

use super::client::{Count, Kind};
use crate::figures::Times;

/// Its figures.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    /// How many there were of each disaster.
    pub disasters: BTreeMap<&'static str, u64>,
    /// Rounds.
    pub rounds: u64,
    /// How often a control plane was killed during a later start.
    pub starts_cut_short: u64,
    /// How often one was killed during its first start.
    pub births: u64,
    /// What was asked for.
    pub changes: BTreeMap<Kind, Count>,
    /// What was answered and is not in force.
    pub lost: Vec<String>,
    /// What is in force and was never asked for.
    pub unasked: Vec<String>,
    /// Half-written records that a start cut off.
    pub torn_records: u64,
    /// From the start after a disaster until changes are taken.
    pub ready: Times,
    /// Requests to the proxy's workers.
    pub asked_of_proxy: u64,
    /// Keys that were issued.
    pub keys: u64,
    /// Tokens that are revoked at the end.
    pub revoked: u64,
    /// Records of the journal at the end.
    pub records: u64,
}

impl Report {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            disasters: BTreeMap::new(),
            rounds: 0,
            starts_cut_short: 0,
            births: 0,
            changes: BTreeMap::new(),
            lost: Vec::new(),
            unasked: Vec::new(),
            torn_records: 0,
            ready: Times::default(),
            asked_of_proxy: 0,
            keys: 0,
            revoked: 0,
            records: 0,
        }
    }

    pub(super) fn begin_round(&mut self, disaster: &'static str) {
        self.rounds += 1;
        *self.disasters.entry(disaster).or_default() += 1;
    }

    // Said at once as well: after a loss the drill may not get to its end.
    pub(super) fn lost(&mut self, what: String) {
        eprintln!("lost: round {}: {what}", self.rounds);
        self.lost.push(format!("round {}: {what}", self.rounds));
    }

    pub(super) fn unasked(&mut self, what: String) {
        eprintln!("never asked for: round {}: {what}", self.rounds);
        self.unasked.push(format!("round {}: {what}", self.rounds));
    }

    /// Panics when anything is missing, or there is anything that was never asked for.
    #[track_caller]
    pub fn assert_nothing_lost(&self) {
        let seed = self.seed;
        assert!(self.lost.is_empty(), "seed {seed}: lost: {:#?}", self.lost);
        assert!(self.unasked.is_empty(), "seed {seed}: never asked for: {:#?}", self.unasked);
    }

    /// What was asked for, of all kinds together.
    pub fn total(&self) -> Count {
        self.changes.values().fold(Count::default(), |sum, count| Count {
            answered: sum.answered + count.answered,
            unanswered: sum.unanswered + count.unanswered,
        })
    }

    /// The same for a machine.
    pub fn figures(&self) -> Value {
        let changes = self.changes.iter().map(|(kind, count)| {
            (kind.name(), json!({ "answered": count.answered, "unanswered": count.unanswered }))
        });
        let total = self.total();
        json!({
            "seed": self.seed,
            "rounds": self.rounds,
            "disasters": self.disasters,
            "starts_cut_short": self.starts_cut_short,
            "first_starts_cut_short": self.births,
            "changes_answered": total.answered,
            "changes_unanswered": total.unanswered,
            "changes": Value::from_iter(changes),
            "lost": self.lost.len(),
            "never_asked_for": self.unasked.len(),
            "torn_records": self.torn_records,
            "keys": self.keys,
            "revoked": self.revoked,
            "records": self.records,
            "asked_of_proxy": self.asked_of_proxy,
            "ready_median_ms": self.ready.at(50).as_secs_f64() * 1_000.0,
            "ready_worst_ms": self.ready.worst().as_secs_f64() * 1_000.0,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |what: &str, value: String| writeln!(f, "{what:<44} {value:>12}");
        row("seed", self.seed.to_string())?;
        row("rounds", self.rounds.to_string())?;
        for (disaster, times) in &self.disasters {
            row(&format!("  {disaster}"), times.to_string())?;
        }
        row("starts cut short as well", self.starts_cut_short.to_string())?;
        row("first starts cut short", self.births.to_string())?;
        let total = self.total();
        row("changes answered", total.answered.to_string())?;
        for (kind, count) in &self.changes {
            row(&format!("  {}", kind.name()), count.answered.to_string())?;
        }
        row("changes under way without an answer", total.unanswered.to_string())?;
        row("answered and lost", self.lost.len().to_string())?;
        row("in force and never asked for", self.unasked.len().to_string())?;
        row("half-written records cut off", self.torn_records.to_string())?;
        row("keys issued", self.keys.to_string())?;
        row("tokens revoked at the end, all asked about", self.revoked.to_string())?;
        row("records of the audit log, verified", self.records.to_string())?;
        row("requests to the proxy's workers", self.asked_of_proxy.to_string())?;
        let millis = |time: std::time::Duration| format!("{:.1} ms", time.as_secs_f64() * 1_000.0);
        row("start to ready after a kill, median", millis(self.ready.at(50)))?;
        row("start to ready after a kill, worst", millis(self.ready.worst()))
    }
}
