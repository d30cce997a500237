//! Reading a journal without writing it: verifying it whole, and looking records up.

use std::path::Path;

use super::base::{Base, Layout};
use super::checkpoint::{Checks, Span};
use super::{JournalError, Link, Record, segment};

/// What a whole and unchanged journal is like.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Records.
    pub records: u64,
    /// Files.
    pub segments: usize,
    /// The time of the first record.
    pub first_at: Option<String>,
    /// The time of the last record.
    pub last_at: Option<String>,
    /// The hash of the last record.
    pub head: String,
    /// Signed checkpoints that fit.
    pub checkpoints: usize,
    /// Records that were removed for their age, and are among the number above.
    pub removed: u64,
    /// The last record that a checkpoint covers.
    pub signed_until: u64,
    /// The public keys that signed them, in base64url.
    pub signed_by: Vec<String>,
    /// Whether the last line is half written, as after a crash; it was never answered.
    pub torn: bool,
}

/// Reads every record of a journal's directory and checks the chain and the checkpoints.
///
/// # Errors
/// The first record that is not what was written, with its file and line.
pub fn verify(dir: &Path, trusted: Option<&str>) -> Result<Report, JournalError> {
    let mut checks = Checks::read(dir, trusted)?;
    let Layout { base, segments } = Layout::read(dir, trusted)?;
    let mut link = base.as_ref().map_or_else(Link::start, Base::link);
    checks.skip_to(link.seq);
    let removed = link.seq;
    let mut span = Span::new(base.is_some());
    let (mut first_at, mut last_at, mut torn) = (None, None, false);
    for (position, segment) in segments.iter().enumerate() {
        let last = position + 1 == segments.len() && !segment.compressed;
        let good_bytes = segment.walk(&mut link, last, &mut |line, link| {
            let head = link.follow_head(line)?;
            if first_at.is_none() {
                first_at = Some(head.at.clone());
            }
            span.note(&head.at);
            last_at = Some(head.at);
            checks.compare(link)
        })?;
        torn = last && std::fs::metadata(&segment.path).is_ok_and(|file| file.len() > good_bytes);
    }
    checks.finish(&span, link.seq)?;
    let mut signed_by: Vec<String> = checks.all().iter().map(|checkpoint| checkpoint.key.clone()).collect();
    signed_by.extend(base.map(|base| base.key));
    signed_by.sort();
    signed_by.dedup();
    Ok(Report {
        records: link.seq,
        segments: segments.len(),
        first_at,
        last_at,
        head: link.hash,
        removed,
        checkpoints: checks.all().len(),
        signed_until: checks.all().last().map_or(0, |checkpoint| checkpoint.seq),
        signed_by,
        torn,
    })
}

/// Whether a record of a journal that was verified has this hash.
///
/// # Errors
/// When a file cannot be read, or a record is no record.
pub fn contains(dir: &Path, hash: &str) -> Result<bool, JournalError> {
    let mut found = false;
    walk_after(dir, 0, |record| {
        found = record.hash == hash;
        Ok(!found)
    })?;
    Ok(found)
}

/// Hands every record after number `after` to `each`, oldest first, until that says no more. The chain is not
/// checked.
///
/// # Errors
/// When a file cannot be read, or a record is no record.
pub fn walk_after(
    dir: &Path,
    after: u64,
    mut each: impl FnMut(Record) -> Result<bool, String>,
) -> Result<(), JournalError> {
    let Layout { base, segments } = Layout::read(dir, None)?;
    for record in base.iter().flat_map(Base::records) {
        let damaged = |problem| JournalError::Damaged { path: dir.into(), line: 1, problem };
        let record = record.map_err(damaged)?;
        if record.seq > after && !each(record).map_err(damaged)? {
            return Ok(());
        }
    }
    let next_first = segments.iter().skip(1).map(|segment| segment.first_seq).chain([u64::MAX]);
    for (segment, next_first) in segments.iter().zip(next_first) {
        if next_first <= after.saturating_add(1) {
            continue;
        }
        let text = segment.text()?;
        let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
        let whole = lines.split_last().map_or(&[][..], |(_, whole)| whole);
        for (number, line) in whole.iter().enumerate() {
            let damaged = |problem| JournalError::Damaged {
                path: segment.path.clone(),
                line: number as u64 + 1,
                problem,
            };
            let record = Record::parse(line).map_err(damaged)?;
            if record.seq > after && !each(record).map_err(damaged)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Records before number `before`, the last one first, that `wanted` takes; at most `limit`, and whether there
/// may be more. The chain is not checked.
///
/// # Errors
/// When a file cannot be read, or a record is no record.
pub fn page(
    dir: &Path,
    before: u64,
    limit: usize,
    wanted: impl Fn(&Record) -> bool,
) -> Result<(Vec<Record>, bool), JournalError> {
    let mut found = Vec::new();
    for segment in segment::list(dir)?.iter().rev().filter(|segment| segment.first_seq < before) {
        let text = segment.text()?;
        // After the last line feed there is nothing, or what is just being written.
        let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
        let whole = lines.split_last().map_or(&[][..], |(_, whole)| whole);
        for (number, line) in whole.iter().enumerate().rev() {
            let damaged = |problem| JournalError::Damaged {
                path: segment.path.clone(),
                line: number as u64 + 1,
                problem,
            };
            let record = Record::parse(line).map_err(damaged)?;
            if record.seq < before && wanted(&record) {
                if found.len() == limit {
                    return Ok((found, true));
                }
                found.push(record);
            }
        }
    }
    Ok((found, false))
}
