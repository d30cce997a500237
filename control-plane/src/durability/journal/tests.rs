use keygate_core::decide::cutoff::{Cutoff, Scope};

use super::*;
use crate::model::change::Change;
use crate::model::key::RevocationReason;
use crate::secrets::root_key::RootKey;

fn changes(n: u64) -> Vec<Entry> {
    let entry = |source| Entry::new("system", 0, Change::Genesis { source });
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
    let read_only = File::open(journal.current.path()).unwrap();
    let writable = journal.current.replace_file(read_only);
    assert!(matches!(journal.append("t", &changes(1)), Err(JournalError::Io { .. })));
    journal.current.replace_file(writable);
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
    journal.sign("2026-01-04T23:00:00Z");
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
    assert_eq!(list(&journal_dir).unwrap().len(), 4, "the same day continues after a restart");
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
    journal.sign("2026-01-03T10:00:00Z");
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
fn a_journal_of_one_file_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let single = dir.path().join(SINGLE_FILE);
    std::fs::write(&single, "{}\n").unwrap();
    let refusal = reopen(dir.path()).unwrap_err().to_string();
    assert!(refusal.contains("journal.jsonl: a journal of one file"), "{refusal}");
    assert!(refusal.contains("move it away"), "{refusal}");
    assert_eq!(std::fs::read(&single).unwrap(), b"{}\n");
    std::fs::remove_file(&single).unwrap();
    assert_eq!(reopen(dir.path()).unwrap().1, 0);
}

#[test]
fn a_record_without_what_auditors_ask_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    reopen(dir.path()).unwrap().0.append("2026-01-01T00:00:00Z", &changes(1)).unwrap();
    let path = first_segment(dir.path());
    let record = Record::parse(std::fs::read(&path).unwrap().trim_ascii_end()).unwrap();
    for (member, value) in [("action", &record.action), ("outcome", &record.outcome)] {
        let mut line = Vec::new();
        record.write(&mut line);
        let line = String::from_utf8(line).unwrap().replace(&format!(r#""{member}":"{value}","#), "");
        let body = &line[..line.find(",\"hash\"").unwrap()];
        let line = format!("{body},\"hash\":\"{}\"}}\n", record::hash_of(body.as_bytes()));
        std::fs::write(&path, line).unwrap();
        let refusal = reopen(dir.path()).unwrap_err().to_string();
        assert!(refusal.contains(&format!("line 1: missing field `{member}`")), "{refusal}");
    }
}

#[test]
fn what_is_sealed_in_another_journal_is_named_with_segment_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let scope = Scope { owner: Some("acme-42".into()), ..Scope::default() };
    let cutoff = Cutoff { id: "c1".into(), scope, created_before: 1, created_after: 0, excluded_key: None };
    let reason = RevocationReason::Emergency;
    let added = Change::CutoffAdded { cutoff, reason, approved_by: None, break_glass: None };
    let mut journal = reopen(dir.path()).unwrap().0;
    journal.append("2026-01-01T00:00:00Z", &changes(2)).unwrap();
    let entry = Entry::new("key_1", 0, added.clone());
    journal.append("2026-01-02T00:00:00Z", &[entry]).unwrap();
    journal.sign("2026-01-02T00:00:00Z");
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
    assert_eq!((report.records, report.checkpoints, report.signed_until, report.torn), (15, 1, 10, false));
    assert_eq!(report.signed_by, std::slice::from_ref(&key));

    let good = std::fs::read(first_segment(dir.path())).unwrap();
    let found = |want: u64| {
        let Err(JournalError::Damaged { line, .. }) = verify(&journal_dir, None) else { panic!("not found") };
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

    // Signed again with another key: it takes the right one to tell.
    let checkpoints = journal_dir.join("checkpoints");
    let signed = std::fs::read_to_string(&checkpoints).unwrap();
    std::fs::write(&checkpoints, signed.replace("00:00:01", "00:00:09")).unwrap();
    found(1);
    std::fs::remove_file(&checkpoints).unwrap();
    assert!(verify(&journal_dir, None).unwrap_err().to_string().contains("they were removed"));
    assert!(reopen(dir.path()).is_err());
    let last = Record::parse(lines.last().unwrap().trim_ascii_end()).unwrap();
    let none = Checks::read(&journal_dir, None).unwrap();
    let link = Link { seq: last.seq, hash: last.hash };
    Keeper::new(&journal_dir, Notary::new(&[8; 32]), &none)
        .unwrap()
        .sign(&link, "2026-01-01T00:00:03Z")
        .unwrap();
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
    assert_eq!(seqs(page(&journal_dir, u64::MAX, 6, |_| true).unwrap()), (vec![12, 11, 10, 9, 8, 7], true));
    assert_eq!(seqs(page(&journal_dir, 7, 6, |_| true).unwrap()), (vec![6, 5, 4, 3, 2, 1], false));
    assert_eq!(seqs(page(&journal_dir, 9, 2, |record| record.seq % 4 == 0).unwrap()), (vec![8, 4], false));
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
        let mut lines: Vec<Vec<u8>> = whole.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
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
