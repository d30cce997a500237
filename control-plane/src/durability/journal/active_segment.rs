//! The segment that grows: the last one, to which records are appended.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{JournalError, MAX_SEGMENT_BYTES, segment, sync_dir};

/// The segment that grows.
#[derive(Debug)]
pub(super) struct ActiveSegment {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// The day of its last record, as `2026-01-01`; empty before the first.
    day: String,
}

impl ActiveSegment {
    /// An empty one, durably there.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) fn create(dir: &Path, first_seq: u64) -> Result<Self, JournalError> {
        let path = segment::path_of(dir, first_seq);
        let io = |source| JournalError::Io { path: path.clone(), source };
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(&path).map_err(io)?;
        // What an earlier try left is no record: that begins only once this has succeeded.
        file.set_len(0).and_then(|()| file.sync_all()).and_then(|()| sync_dir(dir)).map_err(io)?;
        Ok(Self { path, file, bytes: 0, day: String::new() })
    }

    /// One that is there, of which `bytes` are whole records; what follows them is cut off.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) fn reopen(path: PathBuf, bytes: u64, day: String) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io { path: path.clone(), source };
        let file = OpenOptions::new().append(true).open(&path).map_err(io)?;
        let torn = file.metadata().map_err(io)?.len().saturating_sub(bytes);
        if torn > 0 {
            tracing::warn!(path = %path.display(), bytes = torn, "cut off a half-written last record; it was never answered");
            file.set_len(bytes).and_then(|()| file.sync_all()).map_err(io)?;
        }
        Ok(Self { path, file, bytes, day })
    }

    /// Writes lines of a day and returns once they are on disk.
    ///
    /// # Errors
    /// When that is not certain.
    pub(super) fn append(&mut self, on: &str, lines: &[u8]) -> Result<(), AppendError> {
        let Self { path, file, bytes, day } = self;
        let io = |source| JournalError::Io { path: path.clone(), source };
        // What was written of lines that were not answered is taken back, so that it is not there after a restart
        // either.
        let take_back = |file: &File| file.set_len(*bytes).and_then(|()| file.sync_all());
        if let Err(source) = file.write_all(lines) {
            let taken_back = take_back(file);
            return Err(if taken_back.is_ok() {
                AppendError::of(io(source))
            } else {
                AppendError::Unknown(io(source))
            });
        }
        if let Err(source) = file.sync_data() {
            let _best_effort = take_back(file);
            return Err(AppendError::Unknown(io(source)));
        }
        *bytes += lines.len() as u64;
        day.clear();
        day.push_str(on);
        Ok(())
    }

    /// Whether a record of that day begins a new segment.
    pub(super) fn is_full(&self, day: &str) -> bool {
        self.bytes > 0 && (self.bytes >= MAX_SEGMENT_BYTES || self.day != day)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts another file in place of the one that is written; that one.
    #[cfg(test)]
    pub(super) fn replace_file(&mut self, file: File) -> File {
        std::mem::replace(&mut self.file, file)
    }
}

/// Failure to append lines.
#[derive(Debug)]
pub(super) enum AppendError {
    /// The disk is full, and nothing of them is there.
    NoSpace,
    /// Something of them may be there.
    Unknown(JournalError),
}

impl AppendError {
    pub(super) fn of(error: JournalError) -> Self {
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
