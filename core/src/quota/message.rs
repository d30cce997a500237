//! Messages between a proxy's leader and the ledger, as JSON.

use serde::{Deserialize, Serialize};

use super::{Account, SHARES};

/// The format of [`Question`] and [`Answer`] that this code reads and writes.
pub const FORMAT: u32 = 2;
/// The most accounts that a question reports, and that each list of an answer names.
pub const MAX_ENTRIES: usize = 256;
/// The most bytes of a question or an answer.
pub const MAX_BYTES: usize = 128 * 1024;

/// A proxy's report on its accounts. It supersedes all questions before it: the proxy takes the answer to its last
/// question only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// [`FORMAT`].
    pub format: u32,
    /// The process that asks.
    pub member: Member,
    /// Grows from question to question of a process; 1 is its first.
    pub number: u64,
    /// The ledger whose answers the proxy goes by; 0: none.
    #[serde(default)]
    pub era: u64,
    /// No question of this process was ever answered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub new: bool,
    /// What the proxy was granted has ended, since it heard nothing for long.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub void: bool,
    /// The share of every limit that the proxy goes by at most, of [`SHARES`].
    #[serde(default)]
    pub share: u32,
    /// The proxy spends nothing more and has reported everything.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
    /// Accounts with something to report.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reports: Vec<Report>,
}

/// A process of a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Fingerprint of the proxy's node id, which no other proxy may have.
    pub proxy: u64,
    /// Number drawn when the process started.
    pub incarnation: u64,
}

/// A proxy's report on one account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// The account.
    pub account: Account,
    /// The limit that the proxy goes by.
    pub limit: u32,
    /// The most units that the proxy has in use until it is answered, unless more are in use already.
    pub cap: u32,
    /// Units in use: spent within the window, or held by VMs.
    #[serde(default)]
    pub used: u32,
    /// Units spent since the record was made; grows.
    #[serde(default)]
    pub spent: u64,
    /// Milliseconds since the last of them was spent.
    #[serde(default)]
    pub age_ms: u64,
    /// Units asked for in a window's time, including refused ones.
    #[serde(default)]
    pub wanted: u32,
    /// Units refused lately and not granted since.
    #[serde(default)]
    pub lacks: u32,
    /// Nothing is in use and nothing is asked for: the record can be forgotten.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub idle: bool,
}

/// The ledger's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// [`FORMAT`].
    pub format: u32,
    /// The question's number.
    pub number: u64,
    /// The ledger that answers.
    pub era: u64,
    /// The proxy's caps and share are void; it is to ask as a new member.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rejoin: bool,
    /// The proxy is to leave: to spend nothing more, and to report all it spent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leave: bool,
    /// The share of every limit that the proxy has, of [`SHARES`].
    pub share: u32,
    /// Milliseconds within which spends are to be reported.
    pub report_ms: u32,
    /// Caps of accounts that were reported, or for which units became free.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<Grant>,
    /// Accounts of which the proxy is to keep less, and to report.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recalls: Vec<Recall>,
}

/// The cap of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The account.
    pub account: Account,
    /// The limit that is divided.
    pub limit: u32,
    /// The cap in units; `None`: the record is forgotten, and the proxy's share of the limit counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cap: Option<u32>,
    /// Units that other proxies have spent within the window.
    #[serde(default)]
    pub elsewhere: u32,
    /// Milliseconds until the first of those is free again.
    #[serde(default)]
    pub elsewhere_ms: u64,
}

/// An account of which other proxies need units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recall {
    /// The account.
    pub account: Account,
    /// The limit.
    pub limit: u32,
    /// The cap that the proxy is to go by at most.
    pub keep: u32,
}

/// A question or an answer that is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Too long.
    #[error("longer than {MAX_BYTES} bytes")]
    TooLong,
    /// Not JSON of this kind.
    #[error("{0}")]
    Json(String),
    /// A format of another version of Keygate.
    #[error("format {0} is not known")]
    Format(u32),
    /// A number out of range.
    #[error("{0}")]
    Invalid(&'static str),
}

impl Question {
    /// Reads a question.
    ///
    /// # Errors
    /// See [`MessageError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let question: Self = json(bytes)?;
        check(question.format, question.share, [question.reports.len(), 0])?;
        check_accounts(question.reports.iter().map(|report| report.account))?;
        Ok(question)
    }

    /// Encodes it as JSON.
    pub fn encode(&self) -> Vec<u8> {
        // Writing a struct of numbers into memory cannot fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl Answer {
    /// Reads an answer.
    ///
    /// # Errors
    /// See [`MessageError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let answer: Self = json(bytes)?;
        check(answer.format, answer.share, [answer.grants.len().div_ceil(2), answer.recalls.len()])?;
        check_accounts(answer.grants.iter().map(|grant| grant.account))?;
        check_accounts(answer.recalls.iter().map(|recall| recall.account))?;
        Ok(answer)
    }

    /// Encodes it as JSON.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

fn json<'b, T: Deserialize<'b>>(bytes: &'b [u8]) -> Result<T, MessageError> {
    if bytes.len() > MAX_BYTES {
        return Err(MessageError::TooLong);
    }
    serde_json::from_slice(bytes).map_err(|error| MessageError::Json(error.to_string()))
}

fn check(format: u32, share: u32, entries: [usize; 2]) -> Result<(), MessageError> {
    if format != FORMAT {
        return Err(MessageError::Format(format));
    }
    if share > SHARES {
        return Err(MessageError::Invalid("share: more than all"));
    }
    if entries.into_iter().any(|count| count > MAX_ENTRIES) {
        return Err(MessageError::Invalid("more than 256 accounts"));
    }
    Ok(())
}

fn check_accounts(mut accounts: impl Iterator<Item = Account>) -> Result<(), MessageError> {
    if accounts.all(|account| account.is_valid()) {
        Ok(())
    } else {
        Err(MessageError::Invalid("window_s: must be 1 second to 31 days"))
    }
}
