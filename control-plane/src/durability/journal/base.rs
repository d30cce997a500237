//! The base of a journal: what takes the place of segments that were removed since they are older than records are
//! kept. It says where the chain goes on, has the lines of those records that still count, and is signed, so that the
//! rest of the journal is verified as before.
//!
//! ```text
//! {"seq":9000,"hash":"<hash of record 9000>","at":"<its time>","carried":["<line>",…],"key":"…","signature":"…"}
//! ```
//!
//! The signature is Ed25519 (RFC 8032) with the key of the checkpoints, over `keygate journal base`, `seq`, `hash`,
//! `at` and the SHA-256 of the carried lines, each ended by a line feed, with a line feed between each.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::checkpoint::Checks;
use super::{JournalError, Link, Notary, Record, Segment, record, segment, sync_dir};
use crate::model::change::Change;
use crate::platform::files;
use crate::platform::hlc::Mark;

/// The file, in the journal's directory.
const FILE: &str = "base.json";

/// What is left of removed segments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// The last record that was removed.
    pub seq: u64,
    hash: String,
    /// Its time.
    pub at: String,
    /// The lines of removed records that still count.
    pub carried: Vec<String>,
    /// The public key.
    pub key: String,
    signature: String,
}

impl Base {
    /// The one of a directory, if it has one. With `trusted`, another's is refused.
    ///
    /// # Errors
    /// When it cannot be read or is not as it was signed.
    pub fn read(dir: &Path, trusted: Option<&str>) -> Result<Option<Self>, JournalError> {
        let path = dir.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(JournalError::Io { path, source }),
        };
        Self::parse(&text, trusted).map(Some).map_err(|problem| JournalError::Damaged {
            path,
            line: 1,
            problem,
        })
    }

    /// One that stands elsewhere.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8], trusted: Option<&str>) -> Result<Self, String> {
        let base: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if !Notary::is_signed(&base.key, &base.signed_bytes(), &base.signature) {
            return Err("its signature does not fit".into());
        }
        if trusted.is_some_and(|trusted| trusted != base.key) {
            return Err("it was signed with another key than the expected one".into());
        }
        Ok(base)
    }

    fn signed_bytes(&self) -> String {
        let lines: String = self.carried.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
        let carried = record::hash_of(lines.as_bytes());
        format!("keygate journal base\n{}\n{}\n{}\n{carried}", self.seq, self.hash, self.at)
    }

    /// Writes it to a directory, durably.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        files::write_private(&dir.join(FILE), &serde_json::to_vec(self).expect("plain data"))
    }

    /// Where the chain goes on.
    pub fn link(&self) -> Link {
        Link { seq: self.seq, hash: self.hash.clone() }
    }

    /// The records that are carried on, oldest first.
    ///
    /// # Errors
    /// What is wrong with one.
    pub fn records(&self) -> impl Iterator<Item = Result<Record, String>> {
        self.carried.iter().map(|line| Record::parse(line.as_bytes()))
    }
}

/// A journal's segments, and its base if it has one: where to begin, and the segments that come then. Those that the
/// base is in place of are left out; they may still be there.
pub struct Layout {
    /// The base.
    pub base: Option<Base>,
    /// The segments after it.
    pub segments: Vec<Segment>,
}

impl Layout {
    /// That of a directory.
    ///
    /// # Errors
    /// When it cannot be read, or the base is not as it was signed.
    pub fn read(dir: &Path, trusted: Option<&str>) -> Result<Self, JournalError> {
        let base = Base::read(dir, trusted)?;
        let mut segments = segment::list(dir)?;
        segments.retain(|segment| base.as_ref().is_none_or(|base| segment.first_seq > base.seq));
        Ok(Self { base, segments })
    }

    /// Where the chain begins.
    pub fn start(&self) -> Link {
        self.base.as_ref().map_or_else(Link::start, Base::link)
    }
}

/// Removes the segments all of whose records are from before `before`, RFC 3339 UTC, and puts a base in their place.
/// Keys that expired by `expired_until`, Unix seconds, do not count any more. How many segments there were. Killed at
/// any moment, it leaves a journal that reads the same.
///
/// # Errors
/// When a file cannot be read or written, or is not what was written.
pub fn prune(dir: &Path, notary: &Notary, before: &str, expired_until: u64) -> Result<usize, JournalError> {
    let trusted = notary.public_key();
    let layout = Layout::read(dir, Some(&trusted))?;
    let mut link = layout.start();
    let mut checks = Checks::read(dir, Some(&trusted))?;
    checks.skip_to(link.seq);
    let mut carrier = Carrier::new(expired_until);
    for line in layout.base.iter().flat_map(|base| &base.carried) {
        carrier.add(line).map_err(|problem| JournalError::Damaged {
            path: dir.join(FILE),
            line: 1,
            problem,
        })?;
    }
    let (mut removed, mut at): (Vec<PathBuf>, String) = (Vec::new(), String::new());
    // The last one grows.
    for pair in layout.segments.windows(2) {
        let [segment, next] = pair else { break };
        if !begins_before(next, before)? {
            break;
        }
        segment.walk(&mut link, false, &mut |line, link| {
            at = link.follow_head(line)?.at;
            checks.compare(link)?;
            carrier.add(std::str::from_utf8(line).map_err(|error| error.to_string())?)
        })?;
        removed.push(segment.path.clone());
    }
    if !removed.is_empty() {
        let mut base = Base {
            seq: link.seq,
            hash: link.hash,
            at,
            carried: carrier.finish(),
            key: trusted,
            signature: String::new(),
        };
        base.signature = notary.sign_bytes(&base.signed_bytes());
        base.write(dir).map_err(|source| JournalError::Io { path: dir.join(FILE), source })?;
    }
    // Also what an earlier try left behind.
    let seq = Base::read(dir, None)?.map_or(0, |base| base.seq);
    for segment in segment::list(dir)?.iter().filter(|segment| segment.first_seq <= seq) {
        fs::remove_file(&segment.path)
            .map_err(|source| JournalError::Io { path: segment.path.clone(), source })?;
    }
    sync_dir(dir).map_err(|source| JournalError::Io { path: dir.into(), source })?;
    Ok(removed.len())
}

/// Whether the first record of a segment is from before a time. Then all of those in the one before it are.
fn begins_before(segment: &Segment, before: &str) -> Result<bool, JournalError> {
    let line = segment.first_line()?;
    Ok(Record::parse(&line).is_ok_and(|record| record.at.as_str() < before))
}

/// Picks the lines that still count.
struct Carrier {
    expired_until: u64,
    /// The line of history that the records are of.
    source: u64,
    /// Those that count whatever comes after them.
    lines: BTreeMap<u64, String>,
    /// Of each thing of which one record counts, that one.
    one: BTreeMap<String, (Mark, u64, String)>,
    cutoffs: BTreeMap<String, u64>,
    suspended: BTreeSet<String>,
}

impl Carrier {
    fn new(expired_until: u64) -> Self {
        Self {
            expired_until,
            source: 0,
            lines: BTreeMap::new(),
            one: BTreeMap::new(),
            cutoffs: BTreeMap::new(),
            suspended: BTreeSet::new(),
        }
    }

    fn add(&mut self, line: &str) -> Result<(), String> {
        let record = Record::parse(line.as_bytes())?;
        let seq = record.seq;
        // How far another control plane was taken in is known by the last record of it.
        if let Some(origin) = &record.origin {
            let mark = Mark { stamp: origin.seq, ..Mark::default() };
            self.keep_one(&format!("origin {}", origin.source), mark, seq, line);
        }
        let mark = record.mark(self.source);
        let lives = |expires_at: u64| expires_at > self.expired_until;
        let counts = match &record.change {
            Change::Genesis { source } | Change::HistoryForked { source } => {
                self.source = *source;
                true
            }
            Change::SettingsChanged { .. }
            | Change::SecretCreated { .. }
            | Change::SecretMoved { .. }
            | Change::SecretAnnounced { .. } => true,
            Change::PeerChanged { max_life_s } => *max_life_s > 0,
            Change::KeyIssued { key, .. } => lives(key.expires_at),
            Change::KeyRevoked { expires_at, .. }
            | Change::JtiRevoked { expires_at, .. }
            | Change::FingerprintsEnded { expires_at, .. } => lives(*expires_at),
            Change::StateReturned { source, .. } => {
                self.keep_one(&format!("returned {source}"), mark, seq, line)
            }
            Change::KeySuspended { jti, expires_at, .. } => {
                if lives(*expires_at) {
                    self.suspended.insert(jti.clone());
                }
                lives(*expires_at)
            }
            Change::KeyResumed { jti, .. } => self.suspended.contains(jti),
            Change::CutoffAdded { cutoff, .. } => {
                self.cutoffs.insert(cutoff.id.clone(), seq);
                true
            }
            Change::CutoffLifted { id } => match self.cutoffs.remove(id) {
                Some(added) => self.lines.remove(&added).is_none(),
                None => true,
            },
            Change::CanaryTestPut { test } => self.keep_one(&format!("canary {}", test.id), mark, seq, line),
            Change::CanaryTestDeleted { id } => self.keep_one(&format!("canary {id}"), mark, seq, line),
            Change::LockdownChanged { .. } => self.keep_one("lockdown", mark, seq, line),
            Change::PolicyReplaced { .. } => self.keep_one("policy", mark, seq, line),
            Change::LimitsChanged { .. } => self.keep_one("limits", mark, seq, line),
            Change::LimitsOverridden { .. } => self.keep_one("limits override", mark, seq, line),
            Change::QuotaOwnerChanged { .. } => self.keep_one("limits kept", mark, seq, line),
            Change::RolloutChanged { .. } => self.keep_one("rollout", mark, seq, line),
            Change::ExpiredForgotten { .. } => self.keep_one("expired", mark, seq, line),
            // Over within the hour, or of no effect on what comes.
            Change::CutoffProposed { .. }
            | Change::CutoffWithdrawn { .. }
            | Change::RevocationsRebuilt {}
            | Change::SecretsOpened {}
            | Change::EditRefused { .. } => false,
        };
        if counts {
            self.lines.insert(seq, line.to_owned());
        }
        Ok(())
    }

    /// Keeps it if it counts more than the one before; it is not kept beside others.
    fn keep_one(&mut self, what: &str, mark: Mark, seq: u64, line: &str) -> bool {
        if self.one.get(what).is_none_or(|(before, _, _)| mark >= *before) {
            self.one.insert(what.to_owned(), (mark, seq, line.to_owned()));
        }
        false
    }

    fn finish(mut self) -> Vec<String> {
        self.lines.extend(self.one.into_values().map(|(_, seq, line)| (seq, line)));
        self.lines.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::durability::journal::{
        Claim, DIRECTORY, Journal, PersonalData, Privacy, compress_sealed, copy, verify, walk_after,
    };
    use crate::model::change::Entry;
    use crate::model::state::Model;
    use crate::secrets::keyring::Keyring;
    use crate::secrets::master_key::MasterKey;
    use crate::secrets::root_key::RootKey;

    fn notary() -> Notary {
        Notary::new(&[7; 32])
    }

    fn keys() -> Keyring {
        Keyring::in_memory(MasterKey::of([7; 32]), RootKey::of([7; 32]))
    }

    fn open(dir: &Path, model: &mut Model) -> Result<Journal, JournalError> {
        let privacy = std::sync::Arc::new(Privacy::new(keys().root(), PersonalData::Sealed));
        let opens = std::sync::Arc::clone(&privacy);
        Claim::new(dir)?.read(notary(), privacy, |record| {
            let seq = record.seq;
            let entry = record.into_entry(&opens)?;
            model.apply(seq, &entry, &keys()).map(|_| ()).map_err(|error| error.to_string())
        })
    }

    fn change(value: serde_json::Value) -> Entry {
        let change = serde_json::from_value(value).unwrap();
        Entry::new("a", 0, change)
    }

    fn revoked(n: u64, expires_at: u64) -> Entry {
        change(json!({
            "type": "jti_revoked", "jti": format!("jti-{n}"), "expires_at": expires_at,
            "revocation": { "at": 1, "reason": "compromised", "by": "a" },
        }))
    }

    fn policy(name: &str) -> Entry {
        let route = json!({ "name": name, "path": "/", "access": "public" });
        change(json!({ "type": "policy_replaced", "policy": { "routes": [route] } }))
    }

    /// Ten days of a journal, all but the last in sealed and compressed segments.
    fn ten_days(dir: &Path) -> Model {
        let mut journal = open(dir, &mut Model::default()).unwrap();
        for day in 1..=10_u64 {
            let mut entries =
                vec![revoked(day, 100 * day), revoked(1_000 + day, 10_000), policy(&format!("p{day}"))];
            if day == 1 {
                entries.insert(0, change(json!({ "type": "genesis", "source": 5 })));
            }
            if day == 4 {
                entries.push(change(json!({ "type": "expired_forgotten", "until": 350 })));
                entries.push(change(json!({ "type": "lockdown_changed", "lockdown": { "until": 77 } })));
            }
            journal.append(&format!("2026-01-{day:02}T10:00:00.000Z"), &entries).unwrap();
            journal.sign(&format!("2026-01-{day:02}T10:00:01.000Z"));
        }
        drop(journal);
        compress_sealed(&dir.join(DIRECTORY)).unwrap();
        let mut model = Model::default();
        open(dir, &mut model).unwrap();
        model
    }

    fn enforced(model: &Model) -> (Vec<u8>, usize, u64) {
        (model.rules().encode(), model.revocations().revoked(), model.seq())
    }

    #[test]
    fn what_was_removed_is_not_missed_and_the_rest_is_verified_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        let before = ten_days(dir.path());
        let head = verify(&journal_dir, None).unwrap().head;
        assert_eq!(prune(&journal_dir, &notary(), "2026-01-01T00:00:00Z", 350).unwrap(), 0);
        for (until, removed, first_seq) in [("2026-01-06T00:00:00Z", 4, 16), ("2026-01-09T00:00:00Z", 3, 25)]
        {
            assert_eq!(prune(&journal_dir, &notary(), until, 350).unwrap(), removed);
            assert_eq!(segment::list(&journal_dir).unwrap()[0].first_seq, first_seq);
            assert_eq!(prune(&journal_dir, &notary(), until, 350).unwrap(), 0, "once is enough");
            let mut model = Model::default();
            let journal = open(dir.path(), &mut model).unwrap();
            assert_eq!(enforced(&model), enforced(&before));
            assert_eq!(journal.last_seq(), 33);
            drop(journal);
            let report = verify(&journal_dir, Some(&notary().public_key())).unwrap();
            assert_eq!((&report.head, report.records, report.removed), (&head, 33, first_seq - 1));
        }
        let base = Base::read(&journal_dir, None).unwrap().unwrap();
        let carried: Vec<String> =
            base.records().map(|record| record.unwrap().change.facts().action.to_owned()).collect();
        // Three revocations of short life had expired; of seven policies and one lockdown the last ones count.
        assert_eq!(carried.iter().filter(|action| *action == "jti_revoked").count(), 7 + 4);
        assert_eq!(carried.iter().filter(|action| *action == "policy_replaced").count(), 1);
        let mut seqs = Vec::new();
        walk_after(&journal_dir, 0, |record| {
            seqs.push(record.seq);
            Ok(true)
        })
        .unwrap();
        assert!(seqs.is_sorted() && seqs.len() == carried.len() + 9, "{seqs:?}");
        assert_eq!(copy::common(&journal_dir, &journal_dir).unwrap(), 33);

        // It goes on.
        let mut journal = open(dir.path(), &mut Model::default()).unwrap();
        journal.append("2026-01-11T10:00:00.000Z", &[policy("more")]).unwrap();
        drop(journal);
        assert_eq!(verify(&journal_dir, None).unwrap().records, 34);
    }

    #[test]
    fn killed_between_the_base_and_the_removal_it_reads_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        let before = ten_days(dir.path());
        let kept: Vec<_> = segment::list(&journal_dir)
            .unwrap()
            .into_iter()
            .map(|segment| (segment.path.clone(), fs::read(&segment.path).unwrap()))
            .collect();
        prune(&journal_dir, &notary(), "2026-01-06T00:00:00Z", 350).unwrap();
        for (path, bytes) in &kept {
            fs::write(path, bytes).unwrap();
        }
        let mut model = Model::default();
        drop(open(dir.path(), &mut model).unwrap());
        assert_eq!(enforced(&model), enforced(&before));
        assert_eq!(verify(&journal_dir, None).unwrap().records, 33);
        prune(&journal_dir, &notary(), "2026-01-06T00:00:00Z", 350).unwrap();
        assert_eq!(segment::list(&journal_dir).unwrap()[0].first_seq, 16, "made good");
    }

    #[test]
    fn a_base_that_was_changed_or_signed_by_another_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let journal_dir = dir.path().join(DIRECTORY);
        ten_days(dir.path());
        prune(&journal_dir, &notary(), "2026-01-06T00:00:00Z", 350).unwrap();
        let path = journal_dir.join(FILE);
        let whole = fs::read_to_string(&path).unwrap();
        for (from, to) in
            [("jti-3", "jti-8"), ("\"seq\":15", "\"seq\":14"), ("p4", "p3"), ("compromised", "rotation")]
        {
            let bent = whole.replacen(from, to, 1);
            if bent == whole {
                continue;
            }
            fs::write(&path, bent).unwrap();
            assert!(matches!(verify(&journal_dir, None), Err(JournalError::Damaged { .. })), "{from}");
            assert!(open(dir.path(), &mut Model::default()).is_err(), "{from}");
        }
        fs::write(&path, whole).unwrap();
        assert!(verify(&journal_dir, None).is_ok());
        assert!(verify(&journal_dir, Some("another key")).is_err());
        fs::remove_file(&path).unwrap();
        assert!(verify(&journal_dir, None).is_err(), "without it a segment is missing");
    }
}
