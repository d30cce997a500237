//! A line of the journal.
//!
//! ```text
//! {"seq":7,"at":"2026-01-01T00:00:00.000Z","actor":"key_…","action":"key_revoked","target":"key_…",
//!  "reason":"compromised","outcome":"done","change":{…},"sealed":"…","prev":"<hash of 6>","hash":"…"}
//! ```
//!
//! A change that was taken in from another control plane has an `origin` too, and a `stamp` stands where it is not
//! the time `at`, see [`crate::model::change::Mark`].
//! `target`, `reason`, `before` and `sealed` are there where there is something to say. `before` is what the change took
//! the place of, as the change that would put it back. With `sealed` the change has hashes in
//! place of personal data, see [`Privacy`](super::Privacy).
//!
//! `hash` is SHA-256 over the line's bytes before `,"hash"`, in hexadecimal. `prev` is among them, which chains
//! the lines.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Privacy;
use crate::model::change::{Change, Entry};
use crate::platform::clock;
use crate::platform::hlc::{Mark, Origin};

/// The `prev` of the first record.
pub const NO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";
const HASH_MEMBER: &[u8] = b",\"hash\":\"";
const HASH_DIGITS: usize = 64;
const TAIL: &[u8] = b"\"}";

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its number, from 1, without gaps.
    pub seq: u64,
    /// When, RFC 3339 UTC.
    pub at: String,
    /// Whose key did it, or `system`.
    pub actor: String,
    /// Its action: the type of the change.
    pub action: String,
    /// To what: an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Why, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What became of it: `done` or `refused`.
    pub outcome: String,
    /// Where it was made, if not here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// How it is ordered among others, if not by the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<u64>,
    /// The change itself, enough to make it again.
    pub change: Change,
    /// The change that would undo it, where it took the place of something; owners by their hashes. For readers only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Box<Change>>,
    /// The personal data that the change has hashes of, sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
    /// The hash of the record before.
    pub prev: String,
    /// Its own hash. Written by [`Record::write`], since it is of all the rest.
    #[serde(skip_serializing)]
    pub hash: String,
}

impl Record {
    /// The record of a change that is made; its hash comes with writing it.
    pub fn new(seq: u64, at: &str, entry: &Entry, prev: String, privacy: &Privacy) -> Self {
        let Entry { actor, stamp, origin, reason, before, change } = entry;
        let mut change = change.clone();
        let sealed = privacy.hide(&mut change);
        let mut before = before.clone();
        if let Some(before) = &mut before {
            // Without the seal: its owners are those of an earlier record, which has it.
            privacy.hide(before);
        }
        let facts = change.facts();
        Self {
            seq,
            at: at.into(),
            actor: actor.clone(),
            action: facts.action.into(),
            target: facts.target.map(Into::into),
            reason: facts.reason.map(Into::into).or_else(|| reason.clone()),
            outcome: facts.outcome.into(),
            origin: origin.clone(),
            stamp: Some(*stamp).filter(|stamp| *stamp != clock::unix_ms(at)),
            change,
            before,
            sealed,
            prev,
            hash: String::new(),
        }
    }

    /// Reads a line, without its line feed. Its hash is not checked.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(line).map_err(|e| e.to_string())
    }

    /// Its mark, in the line of history `here`.
    pub fn mark(&self, here: u64) -> Mark {
        let source = self.origin.as_ref().map_or(here, |origin| origin.source);
        Mark { stamp: self.stamp.unwrap_or_else(|| clock::unix_ms(&self.at)), source: Reverse(source) }
    }

    /// What was written.
    ///
    /// # Errors
    /// When its personal data does not open.
    pub fn into_entry(mut self, privacy: &Privacy) -> Result<Entry, String> {
        privacy.reveal(&mut self)?;
        let stamp = self.stamp.unwrap_or_else(|| clock::unix_ms(&self.at));
        let reason = self.reason.filter(|_| self.change.facts().reason.is_none());
        Ok(Entry {
            actor: self.actor,
            stamp,
            origin: self.origin,
            reason,
            before: self.before,
            change: self.change,
        })
    }

    /// Writes the line and returns its hash.
    pub fn write(&self, out: &mut Vec<u8>) -> String {
        let start = out.len();
        serde_json::to_writer(&mut *out, self).expect("a record is plain data");
        out.pop(); // the closing brace, after which the hash goes
        let hash = hash_of(&out[start..]);
        out.extend_from_slice(HASH_MEMBER);
        out.extend_from_slice(hash.as_bytes());
        out.extend_from_slice(TAIL);
        out.push(b'\n');
        hash
    }
}

/// What the chain needs of a record.
#[derive(Debug, Deserialize)]
pub struct Head {
    seq: u64,
    /// When, RFC 3339 UTC.
    pub at: String,
    prev: String,
}

/// Where a chain of records stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The number of the last record; 0 before the first.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
}

impl Link {
    /// Before the first record.
    pub fn start() -> Self {
        Self { seq: 0, hash: NO_HASH.into() }
    }

    /// Checks that a line, without its line feed, comes next, and goes on to it.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn follow(&mut self, line: &[u8]) -> Result<Record, String> {
        let record = Record::parse(line)?;
        self.go_on(line, record.seq, &record.prev)?;
        Ok(record)
    }

    /// The same, for who does not want the change.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn follow_head(&mut self, line: &[u8]) -> Result<Head, String> {
        let head: Head = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        self.go_on(line, head.seq, &head.prev)?;
        Ok(head)
    }

    fn go_on(&mut self, line: &[u8], seq: u64, prev: &str) -> Result<(), String> {
        let (body, hash) = split_hash(line)?;
        if hash != hash_of(body).as_bytes() {
            return Err("its hash does not fit its content".into());
        }
        if prev != self.hash {
            return Err("it does not follow on the record before it".into());
        }
        if seq != self.seq + 1 {
            return Err(format!("its number is {seq}, expected {}", self.seq + 1));
        }
        *self = Self { seq, hash: String::from_utf8_lossy(hash).into_owned() };
        Ok(())
    }
}

/// A line's bytes before the hash, and the hash.
pub fn split_hash(line: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let split = || {
        let rest = line.strip_suffix(TAIL)?;
        let (rest, hash) = rest.split_at_checked(rest.len().checked_sub(HASH_DIGITS)?)?;
        Some((rest.strip_suffix(HASH_MEMBER)?, hash))
    };
    split().ok_or_else(|| "no hash at its end".into())
}

/// SHA-256 in hexadecimal.
pub fn hash_of(text: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut hash = String::with_capacity(HASH_DIGITS);
    for byte in Sha256::digest(text) {
        hash.push(char::from(DIGITS[usize::from(byte >> 4)]));
        hash.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    hash
}
