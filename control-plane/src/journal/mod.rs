//! The journal: every change, in order, on disk before it takes effect or is answered. It is the truth from
//! which everything else is rebuilt, and the audit log.
//!
//! One change is one line of JSON ([`Record`]), chained to the one before by its hash, so a line that was edited,
//! cut out, moved or inserted is found, with its file and number. Lines stand in segments: a new one each day, and
//! when one has grown large. Only the last line of the last segment may be half written, since it was never
//! answered; anything else is damage and is refused. Signed checkpoints beside the segments show when the whole
//! was written anew. Personal data stand in it as salted hashes, and sealed.

mod base;
mod checkpoint;
mod copy;
mod privacy;
mod read;
mod record;
mod segment;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use base::{Base, prune};
pub use checkpoint::Notary;
pub use copy::{checkpoints, hash_at, lines, salvage, write_whole};
pub use privacy::{PersonalData, Privacy};
pub use read::{Report, page, verify, walk_after};
pub use record::{Link, Record};
pub use segment::{Segment, compress_sealed, list};

use crate::change::Entry;
use base::Layout;
use checkpoint::{Checks, Keeper};

/// The directory of the segments, in the data directory.
pub const DIRECTORY: &str = "journal";
/// The one file that a journal was before it had segments.
const SINGLE_FILE: &str = "journal.jsonl";
const LOCK: &str = "lock";
const RESERVE: &str = "reserve";
/// A segment that has grown beyond this is sealed.
const MAX_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
/// Space that is kept for revocations when the disk is full: some fifteen thousand of them.
const RESERVE_BYTES: usize = 8 * 1024 * 1024;
/// How often it is tried to have that space again.
const REFILL_EVERY: Duration = Duration::from_secs(1);

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
        /// The segment.
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
    /// The disk is full, and so nothing was written.
    #[error("{path}: the disk is full, the reserve too")]
    NoSpace {
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
    dir: PathBuf,
    lock: File,
}

impl Claim {
    /// Claims the journal of a data directory; makes an empty one if there is none.
    ///
    /// # Errors
    /// When another process has it, or the disk fails.
    pub fn new(data_dir: &Path) -> Result<Self, JournalError> {
        let dir = data_dir.join(DIRECTORY);
        let io = |source| JournalError::Io { path: dir.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io)?;
        let path = dir.join(LOCK);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse { path }),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let single = data_dir.join(SINGLE_FILE);
        if single.exists() && list(&dir)?.is_empty() {
            fs::rename(&single, segment::path_of(&dir, 1)).map_err(io)?;
        }
        sync_dir(&dir).and_then(|()| sync_dir(data_dir)).map_err(io)?;
        Ok(Self { dir, lock })
    }

    /// Whether nothing was ever written to it.
    pub fn is_empty(&self) -> bool {
        let bytes = |segment: &Segment| fs::metadata(&segment.path).map_or(0, |file| file.len());
        list(&self.dir).is_ok_and(|segments| segments.iter().all(|segment| bytes(segment) == 0))
    }

    /// Hands every record to `each`, oldest first, and gives the journal for appending. A last line that was only
    /// half written, and so never answered, is cut off. `notary` signs checkpoints; those that are there must be
    /// its own. `privacy` is for what is appended.
    ///
    /// # Errors
    /// When the disk fails or any other line is not what was written.
    pub fn read(
        self,
        notary: Notary,
        privacy: Arc<Privacy>,
        mut each: impl FnMut(Record) -> Result<(), String>,
    ) -> Result<Journal, JournalError> {
        let Self { dir, lock } = self;
        let layout = Layout::read(&dir, Some(&notary.public_key()))?;
        let mut link = layout.start();
        let mut day = String::new();
        let mut checks = Checks::read(&dir, Some(&notary.public_key()))?;
        checks.skip_to(link.seq);
        for record in layout.base.iter().flat_map(base::Base::records) {
            let damaged = |problem| JournalError::Damaged { path: dir.clone(), line: 1, problem };
            let mut record = record.map_err(damaged)?;
            privacy.reveal(&mut record).and_then(|()| each(record)).map_err(damaged)?;
        }
        let segments = layout.segments;
        let mut follow = |line: &[u8], link: &mut Link| {
            let mut record = link.follow(line)?;
            checks.compare(link)?;
            privacy.reveal(&mut record)?;
            day.clear();
            day.push_str(day_of(&record.at));
            each(record)
        };
        let mut open = None;
        for (position, segment) in segments.iter().enumerate() {
            let last = position + 1 == segments.len() && !segment.compressed;
            let good_bytes = segment.walk(&mut link, last, &mut follow)?;
            if last {
                open = Some((segment.path.clone(), good_bytes));
            }
        }
        checks.finish(link.seq)?;
        let keeper = Keeper::new(&dir, notary, &checks)
            .map_err(|source| JournalError::Io { path: dir.clone(), source })?;
        let reserve = Reserve::new(&dir);
        let current = match open {
            Some((path, bytes)) => OpenSegment::reopen(path, bytes, day)?,
            None => OpenSegment::create(&dir, link.seq + 1)?,
        };
        Ok(Journal { dir, _lock: lock, current, link, reserve, keeper, privacy, sealed: false })
    }
}

/// The segment that grows.
#[derive(Debug)]
struct OpenSegment {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// The day of its last record, as `2026-01-01`; empty before the first.
    day: String,
}

impl OpenSegment {
    fn create(dir: &Path, first_seq: u64) -> Result<Self, JournalError> {
        let path = segment::path_of(dir, first_seq);
        let io = |source| JournalError::Io { path: path.clone(), source };
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(&path).map_err(io)?;
        // What an earlier try left is no record: that begins only once this has succeeded.
        file.set_len(0).and_then(|()| file.sync_all()).and_then(|()| sync_dir(dir)).map_err(io)?;
        Ok(Self { path, file, bytes: 0, day: String::new() })
    }

    /// Goes on with one of which `bytes` are whole records.
    fn reopen(path: PathBuf, bytes: u64, day: String) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { path: path.clone(), source };
        let file = OpenOptions::new().append(true).open(&path).map_err(io)?;
        let torn = file.metadata().map_err(io)?.len().saturating_sub(bytes);
        if torn > 0 {
            tracing::warn!(path = %path.display(), bytes = torn, "cut off a half-written last record; it was never answered");
            file.set_len(bytes).and_then(|()| file.sync_all()).map_err(io)?;
        }
        Ok(Self { path, file, bytes, day })
    }

    /// Writes lines and returns once they are on disk.
    fn append(&mut self, lines: &[u8]) -> Result<(), Unwritten> {
        let Self { path, file, bytes, .. } = self;
        let io = |source| JournalError::Io { path: path.clone(), source };
        // What was written of lines that were not answered is taken back, so that it is not there after a restart
        // either.
        let take_back = |file: &File| file.set_len(*bytes).and_then(|()| file.sync_all());
        if let Err(source) = file.write_all(lines) {
            let taken_back = take_back(file);
            return Err(if taken_back.is_ok() {
                Unwritten::of(io(source))
            } else {
                Unwritten::Unknown(io(source))
            });
        }
        if let Err(source) = file.sync_data() {
            let _best_effort = take_back(file);
            return Err(Unwritten::Unknown(io(source)));
        }
        *bytes += lines.len() as u64;
        Ok(())
    }

    fn is_full(&self, day: &str) -> bool {
        self.bytes > 0 && (self.bytes >= MAX_SEGMENT_BYTES || self.day != day)
    }
}

/// Space on the disk that is given free when there is none left.
#[derive(Debug)]
struct Reserve {
    path: PathBuf,
    there: bool,
    tried: Option<Instant>,
}

impl Reserve {
    fn new(dir: &Path) -> Self {
        let mut reserve = Self { path: dir.join(RESERVE), there: false, tried: None };
        if let Err(error) = reserve.fill() {
            tracing::warn!(%error, "there is no room for the journal's reserve");
        }
        reserve
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.there {
            return Ok(());
        }
        if self.tried.is_some_and(|tried| tried.elapsed() < REFILL_EVERY) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.tried = Some(Instant::now());
        let filled =
            File::options().write(true).create(true).truncate(true).mode(0o600).open(&self.path).and_then(
                |mut file| {
                    // Written, not only sized: a hole takes no space.
                    file.write_all(&vec![0; RESERVE_BYTES])?;
                    file.sync_all()
                },
            );
        self.there = filled.is_ok();
        if filled.is_err() {
            let _nothing_of_it = fs::remove_file(&self.path);
        }
        filled
    }

    fn give_free(&mut self) -> bool {
        self.tried = Some(Instant::now());
        std::mem::take(&mut self.there) && fs::remove_file(&self.path).is_ok()
    }
}

/// The journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    _lock: File,
    current: OpenSegment,
    link: Link,
    reserve: Reserve,
    keeper: Keeper,
    privacy: Arc<Privacy>,
    sealed: bool,
}

impl Journal {
    /// The number of the last record; 0 when there is none.
    pub fn last_seq(&self) -> u64 {
        self.link.seq
    }

    /// Whether a write failed.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Whether the disk is so full that the reserve is in use.
    pub fn uses_reserve(&self) -> bool {
        !self.reserve.there
    }

    /// Tries to have the reserve again; whether it is there.
    pub fn refill_reserve(&mut self) -> bool {
        self.reserve.fill().is_ok()
    }

    /// Writes changes and returns once they are on disk. When the disk is full, the reserve is given free for
    /// them.
    ///
    /// # Errors
    /// When that is not certain. A failed fsync is not tried again: the kernel may have dropped the pages and
    /// report success the next time (Rebello et al., "Can applications recover from fsync failures?", USENIX ATC
    /// 2020). The journal is sealed.
    pub fn append(&mut self, at: &str, entries: &[Entry]) -> Result<(), JournalError> {
        if self.sealed {
            return Err(JournalError::Sealed);
        }
        let (mut link, mut lines) = (self.link.clone(), Vec::new());
        for entry in entries {
            let seq = link.seq + 1;
            let hash = Record::new(seq, at, entry, link.hash, &self.privacy).write(&mut lines);
            link = Link { seq, hash };
        }
        let written = match self.write(day_of(at), &lines) {
            Err(Unwritten::NoSpace) if self.reserve.give_free() => {
                tracing::error!("the disk is full: the reserve is given free for the journal");
                self.write(day_of(at), &lines)
            }
            written => written,
        };
        match written {
            Ok(()) => {}
            // Nothing of it is there, so nothing is in doubt.
            Err(Unwritten::NoSpace) => {
                return Err(JournalError::NoSpace { path: self.current.path.clone() });
            }
            Err(Unwritten::Unknown(error)) => {
                self.sealed = true;
                return Err(error);
            }
        }
        self.link = link;
        Ok(())
    }

    /// Whether so many records came since the last checkpoint that it is time for one.
    pub fn is_checkpoint_due(&self) -> bool {
        self.keeper.is_due(self.link.seq)
    }

    /// Signs where the journal stands. Until that is done, records since the last time could be chained anew
    /// unnoticed.
    pub fn sign(&mut self, at: &str) {
        if let Err(error) = self.keeper.sign(&self.link, at) {
            tracing::error!(%error, "a checkpoint of the journal cannot be written");
        }
    }

    fn write(&mut self, day: &str, lines: &[u8]) -> Result<(), Unwritten> {
        if self.current.is_full(day) {
            self.current = OpenSegment::create(&self.dir, self.link.seq + 1).map_err(Unwritten::of)?;
        }
        self.current.append(lines)?;
        self.current.day.clear();
        self.current.day.push_str(day);
        Ok(())
    }
}

/// Why lines were not written.
#[derive(Debug)]
enum Unwritten {
    /// The disk is full, and nothing of them is there.
    NoSpace,
    /// Something of them may be there.
    Unknown(JournalError),
}

impl Unwritten {
    fn of(error: JournalError) -> Self {
        match &error {
            JournalError::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                Self::NoSpace
            }
            _ => Self::Unknown(error),
        }
    }
}

/// The day of an RFC 3339 time.
fn day_of(at: &str) -> &str {
    at.get(..10).unwrap_or(at)
}

/// Makes a new directory entry durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use keygate_core::decide::cutoff::{Cutoff, Scope};

    use super::*;
    use crate::change::Change;
    use crate::key::RevocationReason;
    use crate::keyring::RootKey;

    fn changes(n: u64) -> Vec<Entry> {
        let entry = |source| Entry {
            actor: "system".into(),
            stamp: 0,
            origin: None,
            change: Change::Genesis { source },
        };
        (0..n).map(entry).collect()
    }

    fn privacy() -> Arc<Privacy> {
        Arc::new(Privacy::new(&RootKey::of([7; 32]), PersonalData::Sealed))
    }

    fn first_segment(data_dir: &Path) -> PathBuf {
        segment::path_of(&data_dir.join(DIRECTORY), 1)
    }

    fn reopen(dir: &Path) -> Result<(Journal, usize), JournalError> {
        let mut records = 0;
        let journal = Claim::new(dir)?.read(Notary::new(&[7; 32]), privacy(), |_| {
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
        let path = first_segment(dir.path());
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
        let path = first_segment(dir.path());
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
        let read_only = File::open(&journal.current.path).unwrap();
        let writable = std::mem::replace(&mut journal.current.file, read_only);
        assert!(matches!(journal.append("t", &changes(1)), Err(JournalError::Io { .. })));
        journal.current.file = writable;
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

    #[test]
    fn a_new_day_is_a_new_segment_and_sealed_ones_are_read_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        let mut journal = reopen(dir.path()).unwrap().0;
        for day in 1..=4 {
            journal.append(&format!("2026-01-0{day}T10:00:00Z"), &changes(2)).unwrap();
            journal.append(&format!("2026-01-0{day}T23:00:00Z"), &changes(1)).unwrap();
        }
        drop(journal);
        let firsts = |segments: Vec<Segment>| segments.iter().map(|s| s.first_seq).collect::<Vec<_>>();
        assert_eq!(firsts(list(&journal_dir).unwrap()), [1, 4, 7, 10]);
        assert_eq!(compress_sealed(&journal_dir).unwrap(), 3);
        assert_eq!(compress_sealed(&journal_dir).unwrap(), 0);
        let segments = list(&journal_dir).unwrap();
        assert_eq!(segments.iter().map(|s| s.compressed).collect::<Vec<_>>(), [true, true, true, false]);
        let (mut journal, records) = reopen(dir.path()).unwrap();
        assert_eq!(records, 12);
        journal.append("2026-01-04T23:30:00Z", &changes(1)).unwrap();
        assert_eq!(list(&journal_dir).unwrap().len(), 4, "the day goes on after a restart");
        drop(journal);

        // Killed between making the compressed form and removing the plain one: either is whole.
        let plain: Vec<u8> = {
            let mut text = Vec::new();
            let file = std::fs::File::open(&segments[0].path).unwrap();
            std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(file), &mut text).unwrap();
            text
        };
        std::fs::write(first_segment(dir.path()), plain).unwrap();
        assert_eq!(reopen(dir.path()).unwrap().1, 13);
    }

    #[test]
    fn a_segment_that_is_missing_or_torn_before_the_last_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        let mut journal = reopen(dir.path()).unwrap().0;
        for day in 1..=3 {
            journal.append(&format!("2026-01-0{day}T10:00:00Z"), &changes(2)).unwrap();
        }
        drop(journal);
        let segments = list(&journal_dir).unwrap();
        let second = std::fs::read(&segments[1].path).unwrap();
        let named = |want: &Segment| {
            let Err(JournalError::Damaged { path, .. }) = reopen(dir.path()) else { panic!("not found") };
            assert_eq!(path, want.path);
        };
        std::fs::write(&segments[1].path, &second[..second.len() - 5]).unwrap();
        named(&segments[1]);
        std::fs::remove_file(&segments[1].path).unwrap();
        named(&segments[2]);
        std::fs::write(&segments[1].path, &second).unwrap();
        assert_eq!(reopen(dir.path()).unwrap().1, 6);
        compress_sealed(&journal_dir).unwrap();
        let compressed = &list(&journal_dir).unwrap()[1];
        let mut bytes = std::fs::read(&compressed.path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(&compressed.path, bytes).unwrap();
        named(compressed);
    }

    #[test]
    fn a_journal_that_was_one_file_becomes_the_first_segment() {
        let dir = tempfile::tempdir().unwrap();
        reopen(dir.path()).unwrap().0.append("2026-01-01T00:00:00Z", &changes(3)).unwrap();
        // Its records did not say what auditors ask.
        let text = std::fs::read(first_segment(dir.path())).unwrap();
        let (mut old, mut prev) = (Vec::new(), record::NO_HASH.to_owned());
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let record = Record::parse(line).unwrap();
            let body = serde_json::json!({
                "seq": record.seq, "at": record.at, "actor": record.actor, "change": record.change, "prev": prev,
            });
            let body = body.to_string();
            let body = body.strip_suffix('}').unwrap();
            prev = record::hash_of(body.as_bytes());
            old.extend_from_slice(format!("{body},\"hash\":\"{prev}\"}}\n").as_bytes());
        }
        std::fs::remove_file(first_segment(dir.path())).unwrap();
        std::fs::write(dir.path().join(SINGLE_FILE), old).unwrap();
        assert_eq!(reopen(dir.path()).unwrap().1, 3);
        assert!(!dir.path().join(SINGLE_FILE).exists());
        let (records, _) = page(&dir.path().join(DIRECTORY), u64::MAX, 1, |_| true).unwrap();
        assert_eq!((records[0].action.as_str(), records[0].outcome.as_str()), ("genesis", "done"));
    }

    #[test]
    fn what_is_sealed_in_another_journal_is_named_with_segment_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let scope = Scope { owner: Some("acme-42".into()), ..Scope::default() };
        let cutoff =
            Cutoff { id: "c1".into(), scope, created_before: 1, created_after: 0, excluded_key: None };
        let reason = RevocationReason::Emergency;
        let added = Change::CutoffAdded { cutoff, reason, approved_by: None, break_glass: None };
        let mut journal = reopen(dir.path()).unwrap().0;
        journal.append("2026-01-01T00:00:00Z", &changes(2)).unwrap();
        let entry = Entry { actor: "key_1".into(), stamp: 0, origin: None, change: added.clone() };
        journal.append("2026-01-02T00:00:00Z", &[entry]).unwrap();
        drop(journal);
        let last = || page(&dir.path().join(DIRECTORY), u64::MAX, 1, |_| true).unwrap().0.remove(0);
        assert_ne!(last().change, added, "who reads without the key sees the hash");

        let read = |master: u8, each: &mut dyn FnMut(Record)| {
            let privacy = Privacy::new(&RootKey::of([master; 32]), PersonalData::Sealed);
            Claim::new(dir.path()).unwrap().read(Notary::new(&[7; 32]), Arc::new(privacy), |record| {
                each(record);
                Ok(())
            })
        };
        let mut changes = Vec::new();
        read(7, &mut |record| changes.push(record.change)).unwrap();
        assert_eq!(changes.last(), Some(&added));
        let Err(JournalError::Damaged { path, line, problem }) = read(8, &mut |_| {}) else {
            panic!("not found")
        };
        assert_eq!((path, line), (segment::path_of(&dir.path().join(DIRECTORY), 3), 1));
        assert!(problem.contains("master key"), "{problem}");
    }

    #[test]
    fn half_a_checkpoint_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = reopen(dir.path()).unwrap().0;
        journal.append("2026-01-01T00:00:00Z", &changes(2)).unwrap();
        journal.sign("2026-01-01T00:00:01Z");
        // As a disk that is full leaves it.
        journal.keeper.leave_half_a_line();
        journal.append("2026-01-01T00:00:02Z", &changes(2)).unwrap();
        journal.sign("2026-01-01T00:00:03Z");
        drop(journal);
        let report = verify(&dir.path().join(DIRECTORY), None).unwrap();
        assert_eq!((report.checkpoints, report.signed_until), (2, 4));
        assert_eq!(reopen(dir.path()).unwrap().1, 4);
    }

    fn rechained(dir: &Path, change: impl Fn(&mut Record)) {
        let path = first_segment(dir);
        let text = std::fs::read(&path).unwrap();
        let (mut out, mut prev) = (Vec::new(), record::NO_HASH.to_owned());
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let mut record = Record::parse(line).unwrap();
            record.prev = prev;
            change(&mut record);
            prev = record.write(&mut out);
        }
        std::fs::write(&path, out).unwrap();
    }

    #[test]
    fn a_journal_that_was_chained_anew_does_not_fit_its_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        let mut journal = reopen(dir.path()).unwrap().0;
        journal.append("2026-01-01T00:00:00Z", &changes(10)).unwrap();
        journal.sign("2026-01-01T00:00:01Z");
        journal.append("2026-01-01T00:00:02Z", &changes(5)).unwrap();
        drop(journal);
        let key = Notary::new(&[7; 32]).public_key();
        let report = verify(&journal_dir, Some(&key)).unwrap();
        assert_eq!(
            (report.records, report.checkpoints, report.signed_until, report.torn),
            (15, 1, 10, false)
        );
        assert_eq!(report.signed_by, std::slice::from_ref(&key));

        let good = std::fs::read(first_segment(dir.path())).unwrap();
        let found = |want: u64| {
            let Err(JournalError::Damaged { line, .. }) = verify(&journal_dir, None) else {
                panic!("not found")
            };
            assert_eq!(line, want);
            assert!(reopen(dir.path()).is_err());
        };
        rechained(dir.path(), |record| {
            if record.seq == 4 {
                record.actor = "somebody else".into();
            }
        });
        found(10);
        // Cut off before the checkpoint.
        let lines: Vec<&[u8]> = good.split_inclusive(|byte| *byte == b'\n').collect();
        std::fs::write(first_segment(dir.path()), lines[..9].concat()).unwrap();
        found(1);
        std::fs::write(first_segment(dir.path()), &good).unwrap();
        assert!(verify(&journal_dir, Some(&key)).is_ok());

        // Signed anew with another key: only whoever knows the right one can tell.
        let checkpoints = journal_dir.join("checkpoints");
        let signed = std::fs::read_to_string(&checkpoints).unwrap();
        std::fs::write(&checkpoints, signed.replace("00:00:01", "00:00:09")).unwrap();
        found(1);
        std::fs::remove_file(&checkpoints).unwrap();
        let mut journal =
            Claim::new(dir.path()).unwrap().read(Notary::new(&[8; 32]), privacy(), |_| Ok(())).unwrap();
        journal.sign("2026-01-01T00:00:03Z");
        drop(journal);
        assert!(verify(&journal_dir, None).is_ok());
        assert!(verify(&journal_dir, Some(&key)).is_err());
    }

    #[test]
    fn records_are_looked_up_from_the_last_one_on_over_segments() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        let mut journal = reopen(dir.path()).unwrap().0;
        for day in 1..=3 {
            journal.append(&format!("2026-01-0{day}T10:00:00Z"), &changes(4)).unwrap();
        }
        compress_sealed(&journal_dir).unwrap();
        let seqs = |(records, more): (Vec<Record>, bool)| {
            (records.iter().map(|record| record.seq).collect::<Vec<_>>(), more)
        };
        assert_eq!(
            seqs(page(&journal_dir, u64::MAX, 6, |_| true).unwrap()),
            (vec![12, 11, 10, 9, 8, 7], true)
        );
        assert_eq!(seqs(page(&journal_dir, 7, 6, |_| true).unwrap()), (vec![6, 5, 4, 3, 2, 1], false));
        assert_eq!(
            seqs(page(&journal_dir, 9, 2, |record| record.seq % 4 == 0).unwrap()),
            (vec![8, 4], false)
        );
    }

    /// Numbers that look random and are the same each time (xorshift).
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 % end as u64).unwrap()
        }
    }

    #[test]
    fn ten_thousand_edits_cuts_swaps_and_insertions_are_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        let mut journal = reopen(dir.path()).unwrap().0;
        for day in 1..=3 {
            journal.append(&format!("2026-01-0{day}T10:00:00Z"), &changes(6)).unwrap();
        }
        journal.sign("2026-01-03T10:00:01Z");
        drop(journal);
        let key = Notary::new(&[7; 32]).public_key();
        assert!(verify(&journal_dir, Some(&key)).is_ok());
        let segments = list(&journal_dir).unwrap();
        let wholes: Vec<Vec<u8>> = segments.iter().map(|s| std::fs::read(&s.path).unwrap()).collect();
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for round in 0..10_000 {
            let position = numbers.below(segments.len());
            let whole = &wholes[position];
            let mut lines: Vec<Vec<u8>> =
                whole.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
            let at = numbers.below(lines.len());
            let first_bad = match round % 6 {
                0 => {
                    let byte = numbers.below(lines[at].len());
                    lines[at][byte] ^= 1 << numbers.below(8);
                    at
                }
                1 => {
                    lines.remove(at);
                    at
                }
                2 => {
                    let other = (at + 1 + numbers.below(lines.len() - 1)) % lines.len();
                    lines.swap(at, other);
                    at.min(other)
                }
                3 => {
                    let copy = lines[numbers.below(lines.len())].clone();
                    lines.insert(at, copy);
                    at
                }
                4 => {
                    let keep = numbers.below(lines[at].len());
                    lines[at].truncate(keep);
                    lines.truncate(at + 1);
                    at
                }
                _ => {
                    // Edited, and its own hash made to fit.
                    let mut record = Record::parse(lines[at].trim_ascii_end()).unwrap();
                    record.at = "2026-01-01T00:00:00Z ".into();
                    lines[at].clear();
                    record.write(&mut lines[at]);
                    at + 1
                }
            };
            std::fs::write(&segments[position].path, lines.concat()).unwrap();
            let Err(JournalError::Damaged { path, line, .. }) = verify(&journal_dir, Some(&key)) else {
                panic!("round {round}: not found")
            };
            // What the next segment or a checkpoint gives away is named there; else the first bad line, or the
            // one after, whose hash names it.
            if path == segments[position].path {
                assert!(line <= first_bad as u64 + 2, "round {round}: line {line}, not {}", first_bad + 1);
            } else {
                assert!(first_bad + 1 >= lines.len(), "round {round}: {} names nothing", path.display());
            }
            std::fs::write(&segments[position].path, whole).unwrap();
        }
        assert!(verify(&journal_dir, Some(&key)).is_ok());
    }
}
