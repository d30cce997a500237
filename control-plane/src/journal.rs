//! The journal: every change, in order, on disk before it takes effect or is answered. It is the truth
//! from which everything else is rebuilt, and the audit log.
//!
//! One change is one line of JSON. Its `hash` is SHA-256 over the previous line's hash and this line's
//! other bytes, so a line that was edited, cut out, moved or inserted is found, with its number.
//!
//! ```text
//! {"seq":7,"at":"2026-01-01T00:00:00.000Z","actor":"key_…","change":{…},"prev":"<hash of 6>","hash":"…"}
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::change::Change;

const FILE: &str = "journal.jsonl";
/// The `prev` of the first record.
const NO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";
const HASH_MEMBER: &str = ",\"hash\":\"";

/// A line of the journal without its hashes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Its number, from 1, without gaps.
    pub seq: u64,
    /// When, RFC 3339 UTC.
    pub at: String,
    /// Whose key did it, or `system`.
    pub actor: String,
    /// What changed.
    pub change: Change,
    /// The hash of the record before.
    pub prev: String,
}

/// What is wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A record that is not what was written.
    #[error("{path}, line {line}: {problem}; the journal was changed from outside, restore it from a backup")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong.
        problem: String,
    },
    /// Another process writes it.
    #[error("{path}: another keygate process has this data directory open")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A write or fsync failed before; nothing more can be promised.
    #[error("the journal is sealed after a failed write; restart once the disk is in order")]
    Sealed,
}

/// A journal that no other process has open, not read yet. Claim it before touching anything beside it.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    file: File,
}

impl Claim {
    /// Claims the journal of a directory; makes an empty one if there is none.
    ///
    /// # Errors
    /// When another process has it, or the disk fails.
    pub fn new(dir: &Path) -> Result<Self, JournalError> {
        let path = dir.join(FILE);
        let io = |source| JournalError::Io { path: path.clone(), source };
        let new = !path.exists();
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).mode(0o600).open(&path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse { path }),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        if new {
            sync_dir(dir).map_err(io)?;
        }
        Ok(Self { path, file })
    }

    /// Whether nothing was ever written to it.
    pub fn is_empty(&self) -> bool {
        self.file.metadata().is_ok_and(|journal| journal.len() == 0)
    }

    /// Hands every record to `each`, oldest first, and gives the journal for appending. A last line that
    /// was only half written, and so never answered, is cut off.
    ///
    /// # Errors
    /// When the disk fails or any other line is not what was written.
    pub fn read(self, mut each: impl FnMut(Record) -> Result<(), String>) -> Result<Journal, JournalError> {
        let Self { path, mut file } = self;
        let io = |source| JournalError::Io { path: path.clone(), source };
        let (mut last_seq, mut last_hash, mut good_bytes) = (0, NO_HASH.to_owned(), 0);
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io)?;
            if read == 0 {
                break;
            }
            let damaged =
                |problem: String| JournalError::Damaged { path: path.clone(), line: last_seq + 1, problem };
            let Some(whole) = line.strip_suffix(b"\n") else { break };
            let (record, hash) = parse(whole, last_seq, &last_hash).map_err(damaged)?;
            each(record).map_err(damaged)?;
            last_seq += 1;
            last_hash = hash;
            good_bytes += read as u64;
        }
        drop(reader);
        let torn = file.metadata().map_err(io)?.len().saturating_sub(good_bytes);
        if torn > 0 {
            tracing::warn!(path = %path.display(), bytes = torn, "cut off a half-written last record; it was never answered");
            file.set_len(good_bytes).and_then(|()| file.sync_all()).map_err(io)?;
        }
        file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok(Journal { path, file, last_seq, last_hash, bytes: good_bytes, sealed: false })
    }
}

/// The journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    last_seq: u64,
    last_hash: String,
    bytes: u64,
    sealed: bool,
}

impl Journal {
    /// The number of the last record; 0 when there is none.
    pub fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// Whether a write failed.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Writes changes and returns once they are on disk.
    ///
    /// # Errors
    /// When that is not certain. A failed fsync is not tried again: the kernel may have dropped the pages
    /// and report success the next time (Rebello et al., "Can applications recover from fsync failures?",
    /// USENIX ATC 2020). The journal is sealed.
    pub fn append(&mut self, at: &str, changes: &[(String, Change)]) -> Result<(), JournalError> {
        if self.sealed {
            return Err(JournalError::Sealed);
        }
        let (mut seq, mut prev, mut lines) = (self.last_seq, self.last_hash.clone(), Vec::new());
        for (actor, change) in changes {
            seq += 1;
            let record =
                Record { seq, at: at.to_owned(), actor: actor.clone(), change: change.clone(), prev };
            prev = write_line(&mut lines, &record);
        }
        if let Err(source) = self.file.write_all(&lines).and_then(|()| self.file.sync_data()) {
            self.sealed = true;
            // What was written of it was not answered. If it can be taken back now, it is not there after a
            // restart either.
            let _best_effort = self.file.set_len(self.bytes).and_then(|()| self.file.sync_all());
            return Err(JournalError::Io { path: self.path.clone(), source });
        }
        self.bytes += lines.len() as u64;
        (self.last_seq, self.last_hash) = (seq, prev);
        Ok(())
    }
}

/// Makes a new directory entry durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn write_line(out: &mut Vec<u8>, record: &Record) -> String {
    let mut text = serde_json::to_string(record).expect("a record is plain data");
    text.pop(); // the closing brace, after which the hash goes
    let hash = hash_of(text.as_bytes());
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(HASH_MEMBER.as_bytes());
    out.extend_from_slice(hash.as_bytes());
    out.extend_from_slice(b"\"}\n");
    hash
}

/// `prev` is among the bytes, so hashing them chains the records.
fn hash_of(text: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digest = Sha256::digest(text);
    let digits = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

fn parse(line: &[u8], last_seq: u64, last_hash: &str) -> Result<(Record, String), String> {
    let text = std::str::from_utf8(line).map_err(|_| "not UTF-8".to_owned())?;
    let (body, tail) = text.rsplit_once(HASH_MEMBER).ok_or("no hash at its end")?;
    let hash = tail.strip_suffix("\"}").ok_or("no hash at its end")?;
    if hash != hash_of(body.as_bytes()) {
        return Err("its hash does not fit its content".into());
    }
    let record: Record = serde_json::from_str(&format!("{body}}}")).map_err(|e| e.to_string())?;
    if record.prev != last_hash {
        return Err("it does not follow on the record before it".into());
    }
    if record.seq != last_seq + 1 {
        return Err(format!("its number is {}, expected {}", record.seq, last_seq + 1));
    }
    Ok((record, hash.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(n: u64) -> Vec<(String, Change)> {
        (0..n).map(|source| ("system".to_owned(), Change::Genesis { source })).collect()
    }

    fn reopen(dir: &Path) -> Result<(Journal, usize), JournalError> {
        let mut records = 0;
        let journal = Claim::new(dir)?.read(|_| {
            records += 1;
            Ok(())
        })?;
        Ok((journal, records))
    }

    #[test]
    fn what_was_appended_is_read_back_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..3 {
            let (mut journal, records) = reopen(dir.path()).unwrap();
            assert_eq!(records, round * 5);
            journal.append("2026-01-01T00:00:00Z", &changes(5)).unwrap();
            assert_eq!(journal.last_seq(), (round as u64 + 1) * 5);
        }
    }

    #[test]
    fn a_torn_last_line_is_cut_off_wherever_it_was_torn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        reopen(dir.path()).unwrap().0.append("t", &changes(3)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let before_last = whole[..whole.len() - 1].iter().rposition(|b| *b == b'\n').unwrap() + 1;
        for cut in before_last..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(reopen(dir.path()).unwrap().1, 2, "cut at {cut}");
            assert_eq!(std::fs::metadata(&path).unwrap().len(), before_last as u64);
        }
    }

    #[test]
    fn any_changed_byte_before_the_end_is_found_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        reopen(dir.path()).unwrap().0.append("t", &changes(4)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let last_line = whole[..whole.len() - 1].iter().rposition(|b| *b == b'\n').unwrap();
        for position in 0..last_line {
            let mut bent = whole.clone();
            bent[position] ^= 1;
            std::fs::write(&path, &bent).unwrap();
            let Err(JournalError::Damaged { line, .. }) = reopen(dir.path()) else {
                panic!("byte {position} was changed and not found")
            };
            let true_line = whole[..position].iter().filter(|b| **b == b'\n').count() as u64 + 1;
            assert!(line <= true_line, "byte {position} is in line {true_line}, said {line}");
            assert!(line + 1 >= true_line);
        }
        let lines: Vec<&[u8]> = whole.split_inclusive(|b| *b == b'\n').collect();
        for bad in [
            [lines[0], lines[2], lines[1], lines[3]].concat(),
            [lines[0], lines[2], lines[3]].concat(),
            [lines[0], lines[1], lines[1], lines[2]].concat(),
            [lines[1], lines[2]].concat(),
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(matches!(reopen(dir.path()), Err(JournalError::Damaged { .. })));
        }
    }

    #[test]
    fn a_journal_that_could_not_be_written_takes_nothing_more_until_it_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = reopen(dir.path()).unwrap();
        journal.append("t", &changes(2)).unwrap();
        let writable = std::mem::replace(&mut journal.file, File::open(&journal.path).unwrap());
        assert!(matches!(journal.append("t", &changes(1)), Err(JournalError::Io { .. })));
        journal.file = writable;
        assert!(matches!(journal.append("t", &changes(1)), Err(JournalError::Sealed)));
        assert!(journal.is_sealed());
        drop(journal);
        let (mut journal, records) = reopen(dir.path()).unwrap();
        assert_eq!(records, 2);
        journal.append("t", &changes(1)).unwrap();
    }

    #[test]
    fn two_writers_do_not_share_a_journal() {
        let dir = tempfile::tempdir().unwrap();
        let first = reopen(dir.path()).unwrap();
        assert!(matches!(reopen(dir.path()), Err(JournalError::InUse { .. })));
        drop(first);
        assert!(reopen(dir.path()).is_ok());
    }
}
