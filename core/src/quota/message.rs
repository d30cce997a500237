//! What the leader of a proxy's VMs asks the control plane, and what it answers. Both are JSON.

use serde::{Deserialize, Serialize};

use super::{Account, SHARES};

/// The format of [`Question`] and [`Answer`] that this code reads and writes.
pub const FORMAT: u32 = 1;
/// The most accounts that a question reports on, and that an answer wants to know about.
pub const MAX_ENTRIES: usize = 256;
/// The most bytes of a question or an answer: 256 entries of all members at their longest.
pub const MAX_BYTES: usize = 128 * 1024;

/// What a proxy says of its accounts. A question supersedes all that it asked before: of answers, only the one to
/// the last question counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// [`FORMAT`].
    pub format: u32,
    /// Who asks.
    pub member: Member,
    /// Its number, which grows from question to question.
    pub number: u64,
    /// The number of the question whose answer was taken last, in this term; 0: none.
    #[serde(default)]
    pub applied: u64,
    /// The ledger that gave it.
    #[serde(default)]
    pub era: u64,
    /// The share of every limit that the proxy may use, of [`SHARES`].
    #[serde(default)]
    pub share: u32,
    /// What there is to say of accounts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reports: Vec<Report>,
}

/// A process of a proxy, from when it became part of the fleet to when it was lost to it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// A fingerprint of what names the proxy, whatever process it is; it must be the proxy's alone.
    pub proxy: u64,
    /// The number that was drawn when the process started.
    pub incarnation: u64,
    /// How often it became part of the fleet.
    pub term: u64,
}

/// What a proxy says of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Of which account.
    pub account: Account,
    /// The limit that the proxy goes by.
    pub limit: u32,
    /// The most units that it has in use within a window, until it is answered.
    pub held: u32,
    /// How many are in use.
    pub used: u32,
    /// How many are asked for in a window's time.
    pub wanted: u32,
    /// What the dearest request costs that was refused.
    #[serde(default)]
    pub dearest: u32,
    /// Nothing was agreed on of it: it is counted with all that is the proxy's own, which goes by less until it is
    /// answered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
}

/// What a proxy may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// [`FORMAT`].
    pub format: u32,
    /// The question's number.
    pub number: u64,
    /// The ledger that answers.
    pub era: u64,
    /// The proxy is not known, or not any more: it has nothing, and is to ask as a new member.
    #[serde(default)]
    pub rejoin: bool,
    /// The share of every limit that the proxy may use, of [`SHARES`].
    pub share: u32,
    /// How long agreements hold from when they were asked for, in seconds.
    pub lease_s: u32,
    /// How long the share does.
    pub keep_s: u32,
    /// What was agreed about accounts that were reported on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<Grant>,
    /// Accounts that the proxy is to report on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recalls: Vec<Recall>,
}

/// What a proxy may use of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Of which account.
    pub account: Account,
    /// Of this limit.
    pub limit: u32,
    /// So many units within a window; `None`: what is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<u32>,
    /// Units that others had in use, as far as is known.
    #[serde(default)]
    pub elsewhere: u32,
}

/// An account that others need more of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recall {
    /// Which.
    pub account: Account,
    /// The limit.
    pub limit: u32,
    /// How many units to keep at most.
    pub at_most: u32,
}

/// Why a question or an answer is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Too long.
    #[error("longer than {MAX_BYTES} bytes")]
    TooLong,
    /// No JSON of this kind.
    #[error("{0}")]
    Json(String),
    /// Of another version of Keygate.
    #[error("format {0} is not known")]
    Format(u32),
    /// A number that cannot be.
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

    /// The bytes of it.
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
        check(answer.format, answer.share, [answer.grants.len(), answer.recalls.len()])?;
        check_accounts(answer.grants.iter().map(|grant| grant.account))?;
        check_accounts(answer.recalls.iter().map(|recall| recall.account))?;
        Ok(answer)
    }

    /// The bytes of it.
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
