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
//! A restored journal is older than what was enforced last. What the journal that it takes the place of says of keys
//! that were ended later is handed to the next start, and proxies return what they know; so a restore takes back no
//! revocation that is still known anywhere.

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
/// Actors without a person behind them: their changes are no loss.
const ACTS_BY_ITSELF: [&str; 3] = ["system", "canary", "guard"];
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
    #[error("{path}: {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The fault.
        problem: String,
    },
    /// The keyring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The journal that is there has changes that would be lost.
    #[error("the journal here has changes that are not in the backup; nothing was changed")]
    WouldLose(Box<Loss>),
}

/// Changes of the journal that is there and are not in a backup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loss {
    /// Their number by action; only those that an operator or a client asked for.
    pub changes: BTreeMap<&'static str, u64>,
    /// Those among them that end keys, which are taken over.
    pub taken_over: usize,
    /// The time of the first one, RFC 3339.
    pub first_at: Option<String>,
    /// The time of the last one.
    pub last_at: Option<String>,
}

impl Loss {
    /// Whether there is anything that would be lost.
    pub fn is_any(&self) -> bool {
        !self.changes.is_empty()
    }
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
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Restored {
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

/// A backup that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// When it was made, RFC 3339.
    pub created_at: String,
    /// Its records.
    pub records: u64,
    /// The time of the last one.
    pub last_at: Option<String>,
    /// Its hash.
    pub head: String,
    /// The secrets whose data keys are in it.
    pub secrets: usize,
}

/// The outcome of a restore, or of a dry run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restoration {
    /// The backup.
    pub backup: Checked,
    /// The journal that was there.
    pub there: There,
    /// Where that journal is now, if it was moved.
    pub moved_to: Option<PathBuf>,
}

/// The journal in whose place a backup is put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum There {
    /// None.
    Nothing,
    /// The backup's.
    Same,
    /// One that is damaged; changes that ended keys are taken over from it.
    Damaged {
        /// Their number.
        taken_over: usize,
    },
    /// One that has other changes.
    Other(Loss),
}

/// Options of a restore.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mode {
    /// Changes of the journal that is there may be lost.
    pub accept_loss: bool,
    /// Nothing is changed.
    pub dry_run: bool,
}

/// Writes a backup of the journal in `journal_dir` to `file`, also while it grows.
///
/// # Errors
/// See [`BackupError`].
pub fn create(journal_dir: &Path, file: &Path, now: &str) -> Result<Report, BackupError> {
    // Before the journal: a data key that is destroyed meanwhile is one that the journal, read later, needs no more,
    // but for the last moment, which is tried again.
    let keyring_file = journal_dir.parent().unwrap_or(Path::new(".")).join(keyring::FILE);
    let keyring = keyring::read(&keyring_file)?.unwrap_or_default();
    let report = journal::verify(journal_dir, None)?;
    if keyring::read(&keyring_file)?.unwrap_or_default() != keyring {
        return create(journal_dir, file, now); // A secret moved on: once a quarter, or so.
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

/// Checks a backup from its first byte to its last, as a restore would. `work` is a directory that does not exist yet.
///
/// # Errors
/// See [`BackupError`].
pub fn verify(file: &Path, work: &Path) -> Result<Checked, BackupError> {
    let unpacked = unpack(file, work);
    let _left_or_not = fs::remove_dir_all(work);
    Ok(unpacked?.1)
}

/// Restores a backup into a data directory, unless that loses changes which the mode does not accept. What the journal that
/// is there says of keys that were ended is taken over at the next start, and the journal is moved aside. `may_go_on` is
/// asked before anything is changed.
///
/// # Errors
/// See [`BackupError`]; nothing is changed then.
pub fn restore(
    file: &Path,
    data_dir: &Path,
    mode: Mode,
    now: &str,
    may_go_on: impl FnOnce(&Restoration) -> bool,
) -> Result<Option<Restoration>, BackupError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(io_at(data_dir))?;
    let claim = Claim::new(data_dir)?; // No control plane may run.
    let fresh = data_dir.join("journal.restoring");
    let _left_by_a_try_before = fs::remove_dir_all(&fresh);
    let done = unpack(file, &fresh).and_then(|(header, backup)| {
        restore_from(&fresh, header, backup, &claim, (data_dir, mode, now), may_go_on)
    });
    let _moved_or_not_needed = fs::remove_dir_all(&fresh);
    done
}

fn restore_from(
    fresh: &Path,
    header: Header,
    backup: Checked,
    claim: &Claim,
    (data_dir, mode, now): (&Path, Mode, &str),
    may_go_on: impl FnOnce(&Restoration) -> bool,
) -> Result<Option<Restoration>, BackupError> {
    let journal_dir = data_dir.join(journal::DIRECTORY);
    let (there, ended) =
        if claim.is_empty() { (There::Nothing, Vec::new()) } else { compare(&journal_dir, fresh, &backup)? };
    let is_other = there != There::Nothing;
    let mut done = Restoration { backup, there, moved_to: None };
    if let There::Other(loss) = &done.there
        && loss.is_any()
        && !mode.accept_loss
        && !mode.dry_run
    {
        return Err(BackupError::WouldLose(Box::new(loss.clone())));
    }
    if mode.dry_run {
        return Ok(Some(done));
    }
    if !may_go_on(&done) {
        return Ok(None);
    }
    restore_keyring(data_dir, header.keyring, &journal_dir, fresh)?; // Before anything is moved.
    if done.there == There::Same {
        return Ok(Some(done));
    }
    // First of all, so that a restore which is cut short loses none of it. Applied to the present journal, it changes
    // nothing. A restore that was not followed by a start may have left some.
    let path = data_dir.join(RESTORED);
    let mut restored = Restored::read(data_dir).map_err(io_at(&path))?.unwrap_or_default();
    restored.ended.extend(ended);
    let text = serde_json::to_vec(&restored).expect("plain data");
    files::write_private(&path, &text).map_err(io_at(&path))?;
    if is_other {
        let aside = data_dir.join(format!("journal.replaced-{}", now.replace(':', "")));
        fs::rename(&journal_dir, &aside).map_err(io_at(&aside))?;
        done.moved_to = Some(aside);
    } else {
        fs::remove_dir_all(&journal_dir).map_err(io_at(&journal_dir))?;
    }
    // It is of another journal; the next start rebuilds it.
    match fs::remove_file(data_dir.join(crate::durability::store::FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_at(data_dir)(error)),
        _ => {}
    }
    fs::rename(fresh, &journal_dir).map_err(io_at(&journal_dir))?;
    journal::sync_dir(data_dir).map_err(io_at(data_dir))?;
    Ok(Some(done))
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::Io { path, source }
}

/// Writes the journal of a backup into the new directory `fresh`, and checks all of it.
fn unpack(file: &Path, fresh: &Path) -> Result<(Header, Checked), BackupError> {
    let damaged = |problem: String| BackupError::Damaged { path: file.into(), problem };
    let reader = BufReader::new(File::open(file).map_err(io_at(file))?);
    let mut reader = BufReader::new(MultiGzDecoder::new(reader));
    let mut line = Vec::new();
    read_line(&mut reader, &mut line).map_err(|error| damaged(format!("this is no backup: {error}")))?;
    let header: Header =
        serde_json::from_slice(&line).map_err(|error| damaged(format!("this is no backup: {error}")))?;
    if header.keygate_backup != FORMAT {
        let format = header.keygate_backup;
        return Err(damaged(format!("the backup has format {format}, this version reads {FORMAT}")));
    }
    let mut broken = None;
    let mut lines = std::iter::from_fn(|| match read_line(&mut reader, &mut line) {
        Ok(0) => None,
        Ok(_) => Some(line.clone()),
        Err(error) => {
            broken = Some(error);
            None
        }
    });
    journal::write_whole(fresh, header.base.as_ref(), &mut lines, &header.checkpoints)?;
    if let Some(error) = broken {
        return Err(damaged(format!("the backup is not whole: {error}")));
    }
    let report = journal::verify(fresh, None).map_err(|error| damaged(error.to_string()))?;
    if (report.records, &report.head) != (header.records, &header.head) {
        let (has, of) = (report.records, header.records);
        return Err(damaged(format!("the backup is not whole: it has {has} of {of} records")));
    }
    let checked = Checked {
        created_at: header.created_at.clone(),
        records: report.records,
        last_at: report.last_at,
        head: report.head,
        secrets: header.keyring.len().saturating_sub(1),
    };
    Ok((header, checked))
}

/// Compares the journal that is there with that of a backup in `fresh`; also the lines of what ended keys and is not in the
/// backup.
fn compare(journal_dir: &Path, fresh: &Path, backup: &Checked) -> Result<(There, Vec<String>), BackupError> {
    let Ok(report) = journal::verify(journal_dir, None) else {
        // Each record that is whole by itself and comes later is heard.
        let ended = journal::salvage(journal_dir, backup.records)?;
        return Ok((There::Damaged { taken_over: ended.len() }, ended));
    };
    if (report.records, &report.head) == (backup.records, &backup.head) {
        return Ok((There::Same, Vec::new()));
    }
    let common = journal::common(journal_dir, fresh)?;
    let ended = journal::salvage(journal_dir, common)?;
    let mut loss = Loss { taken_over: ended.len(), ..Loss::default() };
    journal::walk_after(journal_dir, common, |record| {
        // What a history begins with, or what comes of itself, is no loss.
        let is_asked_for = !ACTS_BY_ITSELF.contains(&record.actor.as_str()) && record.origin.is_none();
        if is_asked_for {
            *loss.changes.entry(record.change.facts().action).or_default() += 1;
            loss.first_at.get_or_insert_with(|| record.at.clone());
            loss.last_at = Some(record.at);
        }
        Ok(true)
    })?;
    Ok((There::Other(loss), ended))
}

/// Puts the data keys of a backup beside those that are there: either may open what the other does not, and the next start
/// destroys the surplus. Where both have one, as the root key, that of the present journal counts if it began as the backup
/// did, else the backup's. Of a keyring that cannot be read, the backup's takes the place.
fn restore_keyring(
    data_dir: &Path,
    backup: BTreeMap<String, Wraps>,
    journal_dir: &Path,
    fresh: &Path,
) -> Result<(), BackupError> {
    let file = data_dir.join(keyring::FILE);
    let there = match keyring::read(&file) {
        Err(KeyringError::Damaged { .. }) => None,
        there => there?.filter(|keys| keys.len() > 1),
    };
    let there = there.unwrap_or_default();
    let began_alike = journal::common(journal_dir, fresh).is_ok_and(|records| records > 0);
    let (mut keys, rest) = if began_alike { (backup, there) } else { (there, backup) };
    keys.extend(rest);
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
