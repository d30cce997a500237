//! Signed checkpoints: lines beside the journal that say which hash it had at which record. A chain of hashes has
//! no key, so whoever can write a whole file can chain it anew; the signatures do not fit it then.
//!
//! ```text
//! {"seq":1000,"hash":"…","at":"2026-01-01T00:00:00.000Z","key":"<public key>","signature":"…"}
//! ```
//!
//! The signature is Ed25519 (RFC 8032) over `keygate journal checkpoint`, `seq`, `hash` and `at`, with a line feed
//! between each. The key is derived from the master key, which does not lie where the journal does, if it was put
//! elsewhere.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use super::{JournalError, Link};

/// The file, in the journal's directory.
pub const FILE: &str = "checkpoints";
/// A checkpoint is written after so many records at the latest.
const EVERY_RECORDS: u64 = 1_000;

/// A signed statement of where the journal stood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// The number of a record.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
    /// When it was signed, RFC 3339 UTC.
    pub at: String,
    /// The public key, 32 bytes in base64url.
    pub key: String,
    signature: String,
}

impl Checkpoint {
    fn signed_bytes(seq: u64, hash: &str, at: &str) -> String {
        format!("keygate journal checkpoint\n{seq}\n{hash}\n{at}")
    }

    /// Whether its own key signed it.
    fn is_signed(&self) -> bool {
        let text = Self::signed_bytes(self.seq, &self.hash, &self.at);
        Notary::is_signed(&self.key, &text, &self.signature)
    }
}

/// Signs checkpoints.
pub struct Notary(SigningKey);

impl std::fmt::Debug for Notary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Notary({})", self.public_key())
    }
}

impl Notary {
    /// The one with this seed.
    pub fn new(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    /// Its public key in base64url.
    pub fn public_key(&self) -> String {
        BASE64URL.encode(self.0.verifying_key().as_bytes())
    }

    /// Signs a text; the signature in base64url.
    pub fn sign_bytes(&self, text: &str) -> String {
        BASE64URL.encode(self.0.sign(text.as_bytes()).to_bytes())
    }

    /// Whether a key signed a text; both key and signature in base64url.
    pub fn is_signed(key: &str, text: &str, signature: &str) -> bool {
        let bytes = |text: &str| BASE64URL.decode(text).ok();
        let key = bytes(key)
            .and_then(|key| <[u8; 32]>::try_from(key).ok())
            .and_then(|key| VerifyingKey::from_bytes(&key).ok());
        let signature = bytes(signature).and_then(|bytes| Signature::from_slice(&bytes).ok());
        matches!((key, signature), (Some(key), Some(signature))
            if key.verify_strict(text.as_bytes(), &signature).is_ok())
    }

    fn sign(&self, link: &Link, at: &str) -> Checkpoint {
        let signature = self.sign_bytes(&Checkpoint::signed_bytes(link.seq, &link.hash, at));
        Checkpoint {
            seq: link.seq,
            hash: link.hash.clone(),
            at: at.into(),
            key: self.public_key(),
            signature,
        }
    }
}

/// The checkpoints of a journal, while its records are read.
#[derive(Debug)]
pub struct Checks {
    path: PathBuf,
    checkpoints: Vec<Checkpoint>,
    next: usize,
}

impl Checks {
    /// Reads and checks the signatures. With `trusted`, a public key in base64url, another one's are refused.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is no checkpoint. A last line that was half written is left out.
    pub fn read(dir: &Path, trusted: Option<&str>) -> Result<Self, JournalError> {
        let path = dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(JournalError::Io { path, source }),
        };
        let mut checkpoints: Vec<Checkpoint> = Vec::new();
        for (line, whole) in (1..).zip(text.split_inclusive('\n')) {
            let Some(whole) = whole.strip_suffix('\n') else { break };
            let damaged =
                |problem: &str| JournalError::Damaged { path: path.clone(), line, problem: problem.into() };
            let checkpoint: Checkpoint =
                serde_json::from_str(whole).map_err(|_| damaged("it is no checkpoint"))?;
            if !checkpoint.is_signed() {
                return Err(damaged("its signature does not fit"));
            }
            if trusted.is_some_and(|trusted| trusted != checkpoint.key) {
                return Err(damaged(
                    "it was signed with another key than the expected one: it, or the master key, was replaced",
                ));
            }
            if checkpoints.last().is_some_and(|last| last.seq >= checkpoint.seq) {
                return Err(damaged("it does not follow on the one before it"));
            }
            checkpoints.push(checkpoint);
        }
        Ok(Self { path, checkpoints, next: 0 })
    }

    /// Leaves out those of records up to number `seq`.
    pub fn skip_to(&mut self, seq: u64) {
        self.next = self.checkpoints.partition_point(|checkpoint| checkpoint.seq <= seq);
    }

    /// Compares the record that was read last.
    ///
    /// # Errors
    /// When a checkpoint says something else of it.
    pub fn compare(&mut self, link: &Link) -> Result<(), String> {
        match self.checkpoints.get(self.next) {
            Some(checkpoint) if checkpoint.seq == link.seq => {
                self.next += 1;
                if checkpoint.hash == link.hash {
                    return Ok(());
                }
                Err(format!(
                    "the checkpoint of {} says that it had another content: the journal was written anew",
                    checkpoint.at
                ))
            }
            _ => Ok(()),
        }
    }

    /// After the last record.
    ///
    /// # Errors
    /// When there were more records once, or the checkpoints are gone.
    pub fn finish(&self, read: &Span, last_seq: u64) -> Result<(), JournalError> {
        if self.checkpoints.is_empty() && read.is_beyond_the_first_batch() {
            let problem = "there is none, and a journal is signed from its first start on: they were removed, and the journal may \
                           have been rewritten. Restore a backup";
            return Err(JournalError::Damaged { path: self.path.clone(), line: 1, problem: problem.into() });
        }
        let Some(beyond) = self.checkpoints.get(self.next) else { return Ok(()) };
        Err(JournalError::Damaged {
            path: self.path.clone(),
            line: self.next as u64 + 1,
            problem: format!("it is of record {}, but the journal ends at {last_seq}", beyond.seq),
        })
    }

    /// All of them.
    pub fn all(&self) -> &[Checkpoint] {
        &self.checkpoints
    }
}

/// The times of the records that were read.
#[derive(Debug, Default)]
pub struct Span {
    /// Whether records before the first one were removed, and a signed base is in their place.
    has_base: bool,
    first: Option<String>,
    has_later: bool,
}

impl Span {
    /// Of no record yet; `has_base`: records before the first one were removed, and a signed base is in their place.
    pub fn new(has_base: bool) -> Self {
        Self { has_base, ..Self::default() }
    }

    /// Notes the time of a record.
    pub fn note(&mut self, at: &str) {
        match &self.first {
            None => self.first = Some(at.to_owned()),
            Some(first) => self.has_later |= first != at,
        }
    }

    /// Whether there are records beyond those that a history begins with, which have one time. A first start that was killed
    /// left no others before it signed.
    fn is_beyond_the_first_batch(&self) -> bool {
        !self.has_base && self.has_later
    }
}

/// Writes checkpoints as the journal grows.
#[derive(Debug)]
pub struct Keeper {
    notary: Notary,
    file: File,
    /// Of whole lines.
    bytes: u64,
    last_seq: u64,
}

impl Keeper {
    /// Goes on after those that were read.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn new(dir: &Path, notary: Notary, checks: &Checks) -> io::Result<Self> {
        let path = dir.join(FILE);
        let file = File::options().append(true).create(true).mode(0o600).open(&path)?;
        // A half-written last line is taken away.
        let whole: u64 =
            fs::read(&path)?.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at as u64 + 1);
        file.set_len(whole)?;
        let last_seq = checks.all().last().map_or(0, |last| last.seq);
        Ok(Self { notary, file, bytes: whole, last_seq })
    }

    #[cfg(test)]
    pub fn leave_half_a_line(&mut self) {
        self.file.write_all(b"{\"seq\":").unwrap();
    }

    /// Whether so many records came since the last one that it is time.
    pub fn is_due(&self, seq: u64) -> bool {
        seq >= self.last_seq + EVERY_RECORDS
    }

    /// Signs where the journal stands, unless that is signed already.
    ///
    /// # Errors
    /// When the file cannot be written; the journal does not depend on it.
    pub fn sign(&mut self, link: &Link, at: &str) -> io::Result<()> {
        if link.seq == self.last_seq {
            return Ok(());
        }
        let mut line = serde_json::to_vec(&self.notary.sign(link, at)).expect("plain data");
        line.push(b'\n');
        // What an earlier try left of a line must not stand before this one.
        self.file.set_len(self.bytes)?;
        self.file.write_all(&line).inspect_err(|_| {
            let _tried_again_next_time = self.file.set_len(self.bytes);
        })?;
        self.bytes += line.len() as u64;
        self.last_seq = link.seq;
        self.file.sync_data()
    }
}
