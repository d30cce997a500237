//! Journals as lines, for who copies them: out of a directory, into a new one, and what is left of a damaged one.

use std::fs::{self, File};
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use super::base::{Base, Layout};
use super::checkpoint::{self, Checks};
use super::{JournalError, MAX_SEGMENT_BYTES, Record, record, segment, sync_dir};
use crate::model::change::Change;

/// The signed checkpoints, each with its record's number and its line.
///
/// # Errors
/// When they cannot be read.
pub fn checkpoints(dir: &Path) -> Result<Vec<(u64, String)>, JournalError> {
    let checks = Checks::read(dir, None)?;
    let line = |checkpoint| serde_json::to_string(checkpoint).expect("plain data");
    Ok(checks.all().iter().map(|checkpoint| (checkpoint.seq, line(checkpoint))).collect())
}

/// Hands the lines of the first `records` records to `each`, until that says no more.
///
/// # Errors
/// When a file cannot be read, or a line is not what was written.
pub fn lines(dir: &Path, records: u64, mut each: impl FnMut(&[u8]) -> bool) -> Result<(), JournalError> {
    let layout = Layout::read(dir, None)?;
    let mut link = layout.start();
    let mut goes_on = true;
    let segments = layout.segments;
    for (position, segment) in segments.iter().enumerate() {
        if !goes_on || link.seq >= records {
            break;
        }
        let last = position + 1 == segments.len() && !segment.compressed;
        segment.walk(&mut link, last, &mut |line, link| {
            link.follow_head(line)?;
            goes_on = goes_on && link.seq <= records && each(line);
            Ok(())
        })?;
    }
    Ok(())
}

/// Number of the last record up to which two journals are the same; 0: they began differently, or nothing of one is left
/// from before the other's base.
///
/// # Errors
/// When a file cannot be read, or a line is not what was written.
pub fn common(one: &Path, other: &Path) -> Result<u64, JournalError> {
    let (one, other) = (hashes(one)?, hashes(other)?);
    let first = one.first.max(other.first);
    let of = |hashes: &Hashes, seq: u64| {
        usize::try_from(seq.checked_sub(hashes.first)?).ok().and_then(|place| hashes.each.get(place).copied())
    };
    let mut last = 0;
    for seq in first.. {
        match (of(&one, seq), of(&other, seq)) {
            (Some(here), Some(there)) if here == there => last = seq,
            _ => break,
        }
    }
    Ok(last)
}

/// Digests of the hashes of a journal's records, from number `first` on.
struct Hashes {
    first: u64,
    each: Vec<u64>,
}

fn hashes(dir: &Path) -> Result<Hashes, JournalError> {
    let digest = |hash: &String| BuildHasherDefault::<DefaultHasher>::default().hash_one(hash);
    let mut link = Layout::read(dir, None)?.start();
    // Of a base, its last record.
    let (first, mut each) = (link.seq, vec![digest(&link.hash)]);
    lines(dir, u64::MAX, |line| {
        let follows = link.follow_head(line).is_ok();
        each.push(digest(&link.hash));
        follows
    })?;
    Ok(Hashes { first, each })
}

/// Writes lines as the journal of a new directory, after a base if there is one. They are not checked.
///
/// # Errors
/// When the disk fails.
pub fn write_whole(
    dir: &Path,
    base: Option<&Base>,
    lines: &mut dyn Iterator<Item = Vec<u8>>,
    checkpoints: &[String],
) -> Result<(), JournalError> {
    let io = |source| JournalError::Io { path: dir.into(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
    let create = |path: &Path| File::options().write(true).create_new(true).mode(0o600).open(path);
    if let Some(base) = base {
        base.write(dir).map_err(io)?;
    }
    let first = base.map_or(0, |base| base.seq);
    let (mut seq, mut bytes, mut out): (u64, u64, Option<BufWriter<File>>) = (first, 0, None);
    let close = |out: Option<BufWriter<File>>| match out {
        Some(out) => out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all(),
        None => Ok(()),
    };
    for line in lines {
        if out.is_none() || bytes >= MAX_SEGMENT_BYTES {
            close(out.take()).map_err(io)?;
            bytes = 0;
            out = Some(BufWriter::new(create(&segment::path_of(dir, seq + 1)).map_err(io)?));
        }
        if let Some(out) = &mut out {
            out.write_all(&line).and_then(|()| out.write_all(b"\n")).map_err(io)?;
        }
        (seq, bytes) = (seq + 1, bytes + line.len() as u64 + 1);
    }
    close(out).map_err(io)?;
    let mut file = create(&dir.join(checkpoint::FILE)).map_err(io)?;
    for checkpoint in checkpoints {
        file.write_all(checkpoint.as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(io)?;
    }
    file.sync_all().and_then(|()| sync_dir(dir)).map_err(io)
}

/// Of a damaged journal, the lines after number `after` that are whole each by itself and end keys or move secrets on:
/// their own hash fits. That they follow on each other is not asked, which does no harm in what only refuses.
///
/// # Errors
/// When the directory cannot be read.
pub fn salvage(dir: &Path, after: u64) -> Result<Vec<String>, JournalError> {
    let mut found = Vec::new();
    for segment in segment::list(dir)? {
        let Ok(text) = segment.text() else { continue }; // Some of it may not be readable at all.
        for line in text.split(|byte| *byte == b'\n') {
            let is_whole =
                record::split_hash(line).is_ok_and(|(body, hash)| record::hash_of(body).as_bytes() == hash);
            if let Ok(record) = Record::parse(line)
                && is_whole
                && record.seq > after
                && (record.change.facts().ends_keys || is_of_secrets(&record.change))
            {
                found.push(String::from_utf8_lossy(line).into_owned());
            }
        }
    }
    Ok(found)
}

/// Whether a change moves a signing secret on.
fn is_of_secrets(change: &Change) -> bool {
    matches!(change, Change::SecretAnnounced { .. }) || change.facts().secret.is_some()
}
