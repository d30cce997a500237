//! Backups: the journal and the keyring as one file, and both from such a file. All else is rebuilt from the journal;
//! the master key, without which the keyring cannot be opened, is not in it and is kept elsewhere. A secret that was
//! destroyed since can still be opened from a backup, with the master key of that time: keep both as long as needed
//! and no longer.
//!
//! ```text
//! gzip of lines:
//! {"keygate_backup":1,"created_at":"…","records":N,"head":"<hash of record N>","checkpoints":["…",…],"base":…,"keyring":…}
//! the lines of the journal, as they stand there
//! ```
//!
//! A restored journal is older than what was enforced last. What the journal that it takes the place of can still
//! say of keys that were ended later is handed to the next start, so that a restore does not give back what was
//! revoked.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use crate::durability::journal::{self, Claim, JournalError, Report};
use crate::platform::files;
use crate::secrets::keyring::{self, KeyringError, Wraps};

const FORMAT: u32 = 1;
/// The next start reads this.
const RESTORED: &str = "restored.json";
/// The longest line of a backup.
const MAX_LINE_BYTES: u64 = 64 * 1024 * 1024;

/// Why there is no backup, or it cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is nothing to back up.
    #[error("{0}: there is no journal here")]
    Empty(PathBuf),
    /// It is no backup, or not a whole one.
    #[error("{path}: {problem}; nothing was restored")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The fault.
        problem: String,
    },
    /// The keyring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The journal that is there is another one.
    #[error(
        "{0}: there is a journal of another history here; move it away if this backup is to take its place"
    )]
    Another(PathBuf),
}

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    keygate_backup: u32,
    created_at: String,
    records: u64,
    head: String,
    checkpoints: Vec<String>,
    /// What is left of removed segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<journal::Base>,
    /// The data keys, wrapped with the master key.
    keyring: BTreeMap<String, Wraps>,
}

/// What the next start has to do after a restore.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Restored {
    /// Whether later changes are lost for good, so that proxies shall not wait for them.
    pub accepts_loss: bool,
    /// What ended keys and is not in the restored journal: lines of the one that was there.
    pub ended: Vec<String>,
}

impl Restored {
    /// What is to be done in a data directory, if there is anything.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(data_dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(data_dir.join(RESTORED)) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// It was done.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn done(data_dir: &Path) -> io::Result<()> {
        fs::remove_file(data_dir.join(RESTORED))?;
        journal::sync_dir(data_dir)
    }
}

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The journal has the backup's records.
    Restored {
        /// Records.
        records: u64,
        /// Changes that ended keys, found in the journal that was there, which the next start takes in.
        saved: usize,
        /// Where that journal is now.
        moved_to: Option<PathBuf>,
    },
    /// The journal that is there has all of the backup, and goes on after it.
    AlreadyThere {
        /// Its records.
        records: u64,
    },
}

/// Writes a backup of the journal in `journal_dir` to `file`, also while it grows.
///
/// # Errors
/// See [`BackupError`].
pub fn export(journal_dir: &Path, file: &Path, now: &str) -> Result<Report, BackupError> {
    // Before the journal: a data key that is destroyed meanwhile is one that the journal, read later, needs no more,
    // but for the last moment, which is tried again.
    let keyring_file = journal_dir.parent().unwrap_or(Path::new(".")).join(keyring::FILE);
    let keyring = keyring::read(&keyring_file)?.unwrap_or_default();
    let report = journal::verify(journal_dir, None)?;
    if keyring::read(&keyring_file)?.unwrap_or_default() != keyring {
        return export(journal_dir, file, now); // A secret moved on: once a quarter, or so.
    }
    if report.records == 0 {
        return Err(BackupError::Empty(journal_dir.into()));
    }
    let io = |source| BackupError::Io { path: file.into(), source };
    let checkpoints = journal::checkpoints(journal_dir)?;
    let header = Header {
        keygate_backup: FORMAT,
        created_at: now.into(),
        records: report.records,
        head: report.head.clone(),
        base: journal::Base::read(journal_dir, None)?,
        keyring,
        checkpoints: checkpoints
            .into_iter()
            .filter(|(seq, _)| *seq <= report.records)
            .map(|(_, line)| line)
            .collect(),
    };
    let part = file.with_extension("part");
    let out = File::options().write(true).create(true).truncate(true).mode(0o600).open(&part).map_err(io)?;
    let mut out = BufWriter::new(GzEncoder::new(out, Compression::default()));
    let mut line = serde_json::to_vec(&header).expect("plain data");
    line.push(b'\n');
    out.write_all(&line).map_err(io)?;
    let mut written = Ok(());
    journal::lines(journal_dir, report.records, |line| {
        written = out.write_all(line).and_then(|()| out.write_all(b"\n"));
        written.is_ok()
    })?;
    written.map_err(io)?;
    let encoder = out.into_inner().map_err(|error| io(error.into_error()))?;
    encoder.finish().and_then(|file| file.sync_all()).map_err(io)?;
    fs::rename(&part, file).map_err(io)?;
    Ok(report)
}

/// Restores a backup into a data directory. A journal that is there and has more stays; one that is damaged is
/// moved away, and what it says of keys that were ended is saved. `accepts_loss`: changes after the backup are lost
/// for good, and proxies that enforce them shall take what there is now.
///
/// # Errors
/// See [`BackupError`].
pub fn import(file: &Path, data_dir: &Path, accepts_loss: bool, now: &str) -> Result<Outcome, BackupError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| BackupError::Io { path, source }
    };
    let damaged = |problem: String| BackupError::Damaged { path: file.into(), problem };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(io(data_dir))?;
    let claim = Claim::new(data_dir)?; // No control plane may run.
    let journal_dir = data_dir.join(journal::DIRECTORY);

    let reader = BufReader::new(File::open(file).map_err(io(file))?);
    let mut reader = BufReader::new(MultiGzDecoder::new(reader));
    let mut line = Vec::new();
    read_line(&mut reader, &mut line).map_err(|error| damaged(format!("it is no backup: {error}")))?;
    let header: Header =
        serde_json::from_slice(&line).map_err(|error| damaged(format!("it is no backup: {error}")))?;
    if header.keygate_backup != FORMAT {
        return Err(damaged(format!("it has format {}, this version reads {FORMAT}", header.keygate_backup)));
    }
    let fresh = data_dir.join("journal.restoring");
    let _left_by_a_try_before = fs::remove_dir_all(&fresh);
    let mut broken = None;
    let mut lines = std::iter::from_fn(|| match read_line(&mut reader, &mut line) {
        Ok(0) => None,
        Ok(_) => Some(line.clone()),
        Err(error) => {
            broken = Some(error);
            None
        }
    });
    journal::write_whole(&fresh, header.base.as_ref(), &mut lines, &header.checkpoints)?;
    let whole = match broken {
        Some(error) => Err(error.to_string()),
        None => match journal::verify(&fresh, None) {
            Ok(report) if (report.records, &report.head) == (header.records, &header.head) => Ok(()),
            Ok(report) => Err(format!("it has {} of {} records", report.records, header.records)),
            Err(error) => Err(error.to_string()),
        },
    };
    if let Err(problem) = whole {
        let _nothing_of_it = fs::remove_dir_all(&fresh);
        return Err(damaged(problem));
    }

    let (mut ended, mut moved_to) = (Vec::new(), None);
    if !claim.is_empty() {
        match journal::verify(&journal_dir, None) {
            Ok(there) if there.records >= header.records => {
                let same = journal::hash_at(&journal_dir, header.records)?.as_ref() == Some(&header.head);
                fs::remove_dir_all(&fresh).map_err(io(&fresh))?;
                if !same {
                    return Err(BackupError::Another(journal_dir));
                }
                restore_keyring(data_dir, header.keyring)?;
                return Ok(Outcome::AlreadyThere { records: there.records });
            }
            Ok(there) if journal::hash_at(&fresh, there.records)? != Some(there.head.clone()) => {
                fs::remove_dir_all(&fresh).map_err(io(&fresh))?;
                return Err(BackupError::Another(journal_dir));
            }
            Ok(_) => {}
            // Damaged: each record that is whole by itself and comes later is heard.
            Err(_) => ended = journal::salvage(&journal_dir, header.records)?,
        }
        restore_keyring(data_dir, header.keyring)?; // Before anything is moved.
        let aside = data_dir.join(format!("journal.replaced-{}", now.replace(':', "")));
        fs::rename(&journal_dir, &aside).map_err(io(&aside))?;
        moved_to = Some(aside);
    } else {
        restore_keyring(data_dir, header.keyring)?;
        fs::remove_dir_all(&journal_dir).map_err(io(&journal_dir))?;
    }
    let saved = ended.len();
    let text = serde_json::to_vec(&Restored { accepts_loss, ended }).expect("plain data");
    let path = data_dir.join(RESTORED);
    files::write_private(&path, &text).map_err(io(&path))?;
    // It goes by another journal; it is made anew.
    match fs::remove_file(data_dir.join(crate::durability::store::FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(data_dir)(error)),
        _ => {}
    }
    fs::rename(&fresh, &journal_dir).map_err(io(&journal_dir))?;
    journal::sync_dir(data_dir).map_err(io(data_dir))?;
    Ok(Outcome::Restored { records: header.records, saved, moved_to })
}

/// Puts the data keys of a backup beside those that are there: either may open what the other does not, and the next start
/// destroys the surplus. Of a keyring that cannot be read, or was begun anew and has no data key, the backup's takes the
/// place.
fn restore_keyring(data_dir: &Path, backup: BTreeMap<String, Wraps>) -> Result<(), BackupError> {
    let file = data_dir.join(keyring::FILE);
    let there = match keyring::read(&file) {
        Err(KeyringError::Damaged { .. }) => None,
        there => there?.filter(|keys| keys.len() > 1),
    };
    let mut keys = backup;
    keys.extend(there.unwrap_or_default());
    if keys.is_empty() { Ok(()) } else { Ok(keyring::write(&file, keys)?) }
}

/// A line without its line feed; 0: there is none.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    line.clear();
    let read = reader.take(MAX_LINE_BYTES).read_until(b'\n', line)?;
    if read > 0 && line.pop() != Some(b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(read)
}
