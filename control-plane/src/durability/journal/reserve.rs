//! Space on the disk for changes that end keys, when there is none left for others.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const RESERVE: &str = "reserve";
/// Space that is kept for revocations when the disk is full: some fifteen thousand of them.
const RESERVE_BYTES: usize = 8 * 1024 * 1024;
/// Interval at which the reserve is tried to be allocated again.
const REFILL_EVERY: Duration = Duration::from_secs(1);

/// Space on the disk that is kept to be given free when there is none left.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    there: bool,
    tried: Option<Instant>,
}

impl Reserve {
    /// The one of a directory; it is there unless the disk is full.
    pub(super) fn new(dir: &Path) -> Self {
        let mut reserve = Self { path: dir.join(RESERVE), there: false, tried: None };
        if let Err(error) = reserve.fill() {
            tracing::warn!(%error, "there is no room for the journal's reserve");
        }
        reserve
    }

    /// Takes the space again, if it is not there.
    ///
    /// # Errors
    /// When the disk is full, or was less than [`REFILL_EVERY`] ago.
    pub(super) fn fill(&mut self) -> io::Result<()> {
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

    /// Gives the space free; whether there was any.
    pub(super) fn release(&mut self) -> bool {
        self.tried = Some(Instant::now());
        std::mem::take(&mut self.there) && fs::remove_file(&self.path).is_ok()
    }

    /// Whether the space is taken.
    pub(super) const fn is_there(&self) -> bool {
        self.there
    }
}
