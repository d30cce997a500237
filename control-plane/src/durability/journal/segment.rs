//! The files of a journal. A segment is named after its first record; the last one grows, the others are sealed
//! and, after a while, compressed. `zcat` reads them.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;

use super::{JournalError, Link, sync_dir};

const PLAIN: &str = "jsonl";
const COMPRESSED: &str = "jsonl.gz";
const TEMPORARY: &str = "tmp";
/// The longest line; beyond, a damaged file could ask for any amount of memory.
const MAX_LINE_BYTES: u64 = 64 * 1024 * 1024;

/// What is done with a line and the chain so far, which it follows.
pub type EachLine<'e> = dyn FnMut(&[u8], &mut Link) -> Result<(), String> + 'e;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where it is.
    pub path: PathBuf,
    /// The number of its first record.
    pub first_seq: u64,
    /// Whether it is compressed, and so sealed.
    pub compressed: bool,
}

/// Where the segment with that first record is while it grows.
pub fn path_of(dir: &Path, first_seq: u64) -> PathBuf {
    dir.join(format!("{first_seq:020}.{PLAIN}"))
}

/// The segments of a directory, in order. Where one is there plain and compressed, the plain one counts.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(dir: &Path) -> Result<Vec<Segment>, JournalError> {
    let io = |source| JournalError::Io { path: dir.into(), source };
    let mut segments = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some((digits, extension)) = name.split_once('.')
            && let Ok(first_seq) = digits.parse()
            && matches!(extension, PLAIN | COMPRESSED)
        {
            segments.push(Segment { compressed: extension == COMPRESSED, path, first_seq });
        }
    }
    segments.sort_by_key(|segment| (segment.first_seq, segment.compressed));
    segments.dedup_by_key(|segment| segment.first_seq);
    Ok(segments)
}

impl Segment {
    /// Hands every line to `each`, without its line feed, with the chain so far, which `each` follows. With
    /// `may_be_torn` a last line that was only half written ends the reading; the bytes up to there are returned.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not what was written.
    pub fn walk(
        &self,
        link: &mut Link,
        may_be_torn: bool,
        each: &mut EachLine<'_>,
    ) -> Result<u64, JournalError> {
        let mut line_number = 0;
        let damaged =
            |line, problem: String| JournalError::Damaged { path: self.path.clone(), line, problem };
        if self.first_seq != link.seq + 1 {
            let problem = format!("it should begin with record {}: a segment is missing", link.seq + 1);
            return Err(damaged(1, problem));
        }
        let mut reader = self.open()?;
        let (mut line, mut good_bytes) = (Vec::new(), 0);
        loop {
            line.clear();
            line_number += 1;
            let read = match (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
                Ok(0) => return Ok(good_bytes),
                Ok(read) => read as u64,
                // What is no gzip file any more is damage, not a broken disk.
                Err(error) if self.compressed => return Err(damaged(line_number, error.to_string())),
                Err(source) => return Err(JournalError::Io { path: self.path.clone(), source }),
            };
            let Some(whole) = line.strip_suffix(b"\n") else {
                if may_be_torn {
                    return Ok(good_bytes);
                }
                return Err(damaged(line_number, "it is cut short".into()));
            };
            each(whole, link).map_err(|problem| damaged(line_number, problem))?;
            good_bytes += read;
        }
    }

    /// All of it, as it was written.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn text(&self) -> Result<Vec<u8>, JournalError> {
        let mut text = Vec::new();
        let read = self.open()?.read_to_end(&mut text);
        read.map_err(|source| JournalError::Io { path: self.path.clone(), source })?;
        Ok(text)
    }

    /// Its first line, without the line feed; empty when there is none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn first_line(&self) -> Result<Vec<u8>, JournalError> {
        let mut line = Vec::new();
        let read = self.open()?.take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
        read.map_err(|source| JournalError::Io { path: self.path.clone(), source })?;
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        Ok(line)
    }

    fn open(&self) -> Result<Box<dyn BufRead>, JournalError> {
        let (file, compressed) = match File::open(&self.path) {
            // It was compressed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.compressed => {
                (File::open(self.path.with_extension(COMPRESSED)), true)
            }
            file => (file, self.compressed),
        };
        let file = file.map_err(|source| JournalError::Io { path: self.path.clone(), source })?;
        let file = BufReader::with_capacity(1 << 16, file);
        Ok(if compressed {
            Box::new(BufReader::with_capacity(1 << 16, MultiGzDecoder::new(file)))
        } else {
            Box::new(file)
        })
    }
}

/// Compresses the sealed segments that are not yet; how many. Killed at any moment, it leaves each segment in at
/// least one whole form.
///
/// # Errors
/// When a file cannot be read or written.
pub fn compress_sealed(dir: &Path) -> Result<usize, JournalError> {
    let segments = list(dir)?;
    let sealed = segments.split_last().map_or(&[][..], |(_, sealed)| sealed);
    let mut compressed = 0;
    for segment in sealed.iter().filter(|segment| !segment.compressed) {
        let io = |source| JournalError::Io { path: segment.path.clone(), source };
        compress(dir, &segment.path)
            .inspect_err(|_| {
                // Not to stand in the way on a disk that is full.
                let _there_or_not = fs::remove_file(segment.path.with_extension(TEMPORARY));
            })
            .map_err(io)?;
        compressed += 1;
    }
    Ok(compressed)
}

fn compress(dir: &Path, plain: &Path) -> io::Result<()> {
    let (target, temporary) = (plain.with_extension(COMPRESSED), plain.with_extension(TEMPORARY));
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    let mut encoder = GzEncoder::new(file, Compression::default());
    io::copy(&mut BufReader::new(File::open(plain)?), &mut encoder)?;
    let mut file = encoder.finish()?;
    file.flush()?;
    file.sync_all()?;
    fs::rename(&temporary, &target)?;
    sync_dir(dir)?;
    fs::remove_file(plain)?;
    sync_dir(dir)
}
