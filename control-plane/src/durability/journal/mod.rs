//! The journal: every change, in order, on disk before it takes effect or is answered. It is the truth from
//! which everything else is rebuilt, and the audit log.
//!
//! One change is one line of JSON ([`Record`]), chained to the one before by its hash, so a line that was edited,
//! cut out, moved or inserted is found, with its file and number. Lines stand in segments: a new one each day, and
//! when one has grown large. Only the last line of the last segment may be half written, since it was never
//! answered; anything else is damage and is refused. Signed checkpoints beside the segments show when the whole
//! was written again. Personal data stand in it as salted hashes, and sealed.

mod active_segment;
mod base;
mod checkpoint;
mod copy;
mod privacy;
mod read;
mod record;
mod reserve;
mod segment;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use base::{Base, prune};
pub use checkpoint::Notary;
pub use copy::{checkpoints, common, lines, salvage, write_whole};
pub use privacy::{PersonalData, Privacy};
pub use read::{Report, contains, page, verify, walk_after};
pub use record::{Link, Record};
pub use segment::{Segment, compress_sealed, list};

use crate::model::change::Entry;
use active_segment::{ActiveSegment, AppendError};
use base::Layout;
use checkpoint::{Checks, Keeper, Span};
use reserve::Reserve;

/// The directory of the segments, in the data directory.
pub const DIRECTORY: &str = "journal";
/// A journal that is one file, in the data directory. It is not read, and not overlooked either: keys that it revoked
/// would count again.
const SINGLE_FILE: &str = "journal.jsonl";
const LOCK: &str = "lock";
/// A segment that has grown beyond this is sealed.
const MAX_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// Damage or fault of a journal.
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
        /// The fault.
        problem: String,
    },
    /// A journal of one file.
    #[error(
        "{path}: a journal of one file, which this version does not read; move it away to begin with an empty journal, \
         in which the keys and revocations of that one are unknown"
    )]
    SingleFile {
        /// The file.
        path: PathBuf,
    },
    /// Another process writes it.
    #[error("{path}: another keygate process has this data directory open; stop it first")]
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

/// Whether a data directory has a journal's directory.
pub fn exists(data_dir: &Path) -> bool {
    data_dir.join(DIRECTORY).exists()
}

impl Claim {
    /// Claims the journal of a data directory; makes an empty one if there is none.
    ///
    /// # Errors
    /// When another process has it, it is of another form, or the disk fails.
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
        if single.exists() {
            return Err(JournalError::SingleFile { path: single });
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
        let mut span = Span::new(layout.base.is_some());
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
            span.note(&record.at);
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
        checks.finish(&span, link.seq)?;
        let keeper = Keeper::new(&dir, notary, &checks)
            .map_err(|source| JournalError::Io { path: dir.clone(), source })?;
        let reserve = Reserve::new(&dir);
        let current = match open {
            Some((path, bytes)) => ActiveSegment::reopen(path, bytes, day)?,
            None => ActiveSegment::create(&dir, link.seq + 1)?,
        };
        Ok(Journal { dir, _lock: lock, current, link, reserve, keeper, privacy, sealed: false })
    }
}

/// The journal, open for appending.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    _lock: File,
    current: ActiveSegment,
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
        !self.reserve.is_there()
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
            Err(AppendError::NoSpace) if self.reserve.release() => {
                tracing::error!("the disk is full: the reserve is given free for the journal");
                self.write(day_of(at), &lines)
            }
            written => written,
        };
        match written {
            Ok(()) => {}
            // Nothing of it is there, so nothing is in doubt.
            Err(AppendError::NoSpace) => {
                return Err(JournalError::NoSpace { path: self.current.path().to_owned() });
            }
            Err(AppendError::Unknown(error)) => {
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

    /// Signs the end of the journal. Until that is done, records since the last time could be chained again
    /// unnoticed.
    pub fn sign(&mut self, at: &str) {
        if let Err(error) = self.keeper.sign(&self.link, at) {
            tracing::error!(%error, "a checkpoint of the journal cannot be written");
        }
    }

    fn write(&mut self, day: &str, lines: &[u8]) -> Result<(), AppendError> {
        if self.current.is_full(day) {
            self.current = ActiveSegment::create(&self.dir, self.link.seq + 1).map_err(AppendError::of)?;
        }
        self.current.append(day, lines)
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
mod tests;
