//! The logs: a stream for each control plane with all changes that were made there. This one fills its own, fills
//! up those of others where Redis has lost something, and takes in what is new in them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::Cmd;

use super::error::LinkError;
use super::link::Link;
use super::projection::{self, Write};
use super::sealed::{Sealer, Shipped};
use super::{names, scripts};
use crate::durability::journal::{self, JournalError, Privacy};
use crate::durability::store::Store;
use crate::durability::writer::Logged;
use crate::model::change::{Change, Entry};
use crate::secrets::keyring::Keyring;

/// Changes that are appended at a time.
const APPEND_AT_A_TIME: usize = 200;
/// Changes that are read from a journal at a time. Each time its segment is read from the beginning.
const READ_AT_A_TIME: usize = 20_000;
/// Changes that are taken in at a time.
const TAKE_AT_A_TIME: usize = 250;
/// For how long a change is kept back that was made in knowledge of another which does not come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a log cannot be filled or read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Redis.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Redis has lost changes that it had.
    #[error(
        "Redis has lost changes that it had: it was emptied, restored or failed over; it is filled again"
    )]
    Lost,
    /// The journal was set back and went on by itself.
    #[error(
        "this journal and its log in Redis have different changes at number {seq}: an older copy of the journal was put in place and went on. Nothing is passed on or taken in. Move this data directory away and start with an empty one, with the same master key and fleet token: it gets what is in Redis; what was changed since then must be changed again"
    )]
    Forked {
        /// Which change.
        seq: u64,
    },
    /// A change that does not open.
    #[error(
        "change {seq} in the log of control plane {source_id:x} does not open: it has another master key, or somebody else wrote it"
    )]
    Sealed {
        /// Whose log.
        source_id: u64,
        /// Which change.
        seq: u64,
    },
}

/// The number of the last change in a log; 0 when it is empty.
///
/// # Errors
/// When Redis cannot be asked.
pub async fn last(link: &Link, source: u64) -> Result<u64, LinkError> {
    let mut command = redis::cmd("XREVRANGE");
    command.arg(names::log(source)).arg("+").arg("-").arg("COUNT").arg(1);
    let found: Vec<(String, Vec<String>)> = link.query(&command).await?;
    Ok(found.first().map_or(0, |(id, _)| number(id)))
}

/// The last change in a log up to number `seq`, if there is one: its number, and what it is if it opens.
///
/// # Errors
/// When Redis cannot be asked.
pub async fn last_until(
    link: &Link,
    sealer: &Sealer,
    source: u64,
    seq: u64,
) -> Result<Option<(u64, Option<Shipped>)>, LinkError> {
    let mut command = redis::cmd("XREVRANGE");
    command.arg(names::log(source)).arg(format!("{seq}-{}", u64::MAX)).arg("-").arg("COUNT").arg(2);
    let found: Vec<(String, Vec<String>)> = link.query(&command).await?;
    let Some((id, fields)) = found.first() else { return Ok(None) };
    let before = found.get(1).map_or(0, |(id, _)| number(id));
    let sealed = fields.get(1).map_or("", String::as_str);
    Ok(Some((number(id), sealer.open_change(source, before, number(id), sealed))))
}

/// Takes a log away at whose end somebody else has written or deleted: nothing could be appended there any more, and
/// what they wrote would be taken for a change of that number. It is filled again from the journal. Whether it was so.
///
/// # Errors
/// When Redis cannot be asked.
pub async fn take_away_if_spoiled(link: &Link, sealer: &Sealer, source: u64) -> Result<bool, LinkError> {
    let name = names::log(source);
    if link.query::<u64>(redis::cmd("EXISTS").arg(&name)).await? == 0 {
        return Ok(false);
    }
    let info: HashMap<String, redis::Value> =
        link.query(redis::cmd("XINFO").arg("STREAM").arg(&name)).await?;
    let generated = match info.get("last-generated-id") {
        Some(redis::Value::BulkString(id)) => number(&String::from_utf8_lossy(id)),
        Some(redis::Value::SimpleString(id)) => number(id),
        _ => 0,
    };
    let is_whole = match last_until(link, sealer, source, u64::MAX).await? {
        Some((seq, change)) => change.is_some() && generated <= seq,
        None => false,
    };
    if !is_whole {
        link.query::<()>(redis::cmd("DEL").arg(&name)).await?;
    }
    Ok(!is_whole)
}

fn number(id: &str) -> u64 {
    id.split_once('-').and_then(|(number, _)| number.parse().ok()).unwrap_or(0)
}

/// Entries of a journal after number `seq`, in order, no later than `last`: those after it are not on disk for
/// certain. Not all of them at a time.
///
/// # Errors
/// When the journal cannot be read.
pub fn read_journal(
    dir: &Path,
    privacy: &Privacy,
    seq: u64,
    last: u64,
) -> Result<Vec<Arc<Logged>>, JournalError> {
    let mut found = Vec::new();
    journal::walk_after(dir, seq, |record| {
        if record.seq > last {
            return Ok(false);
        }
        let (seq, at) = (record.seq, record.at.clone());
        found.push(Arc::new(Logged { seq, at, entry: record.into_entry(privacy)? }));
        Ok(found.len() < READ_AT_A_TIME)
    })?;
    Ok(found)
}

/// Enters a control plane in the list of all.
///
/// # Errors
/// When Redis refuses.
pub async fn join(link: &Link, source: u64) -> Result<(), LinkError> {
    link.query(redis::cmd("SADD").arg(names::SOURCES).arg(format!("{source:x}"))).await
}

/// Entries of a journal by the log in which they stand: those made here by their line of history, `line`, which the
/// first entries begin and later ones may change.
pub fn by_source(entries: &[Arc<Logged>], line: &mut u64) -> BTreeMap<u64, Vec<(u64, Shipped)>> {
    let mut changes: BTreeMap<u64, Vec<(u64, Shipped)>> = BTreeMap::new();
    for logged in entries {
        let (source, seq) = match (&logged.entry.origin, &logged.entry.change) {
            (Some(origin), _) => (origin.source, origin.seq),
            (None, Change::Genesis { source } | Change::HistoryForked { source }) => {
                *line = *source;
                (*source, logged.seq)
            }
            (None, _) => (*line, logged.seq),
        };
        changes.entry(source).or_default().push((seq, Shipped::of(logged, BTreeMap::new())));
    }
    changes
}

/// Fills one log.
pub struct Filler<'f> {
    /// Redis.
    pub link: &'f Link,
    /// Seals the changes.
    pub sealer: &'f Sealer,
    /// The data keys of secrets.
    pub keys: &'f Keyring,
    /// Whose log.
    pub source: u64,
    /// The last change that is in it.
    pub last: u64,
}

impl Filler<'_> {
    /// Appends changes, each with its number, and writes what they mean for the keys of the contract.
    ///
    /// # Errors
    /// When Redis refuses, or has lost what was there.
    pub async fn append(
        &mut self,
        changes: &[(u64, Shipped)],
        store: &Store,
        now: u64,
    ) -> Result<(), LogError> {
        let is_cluster = self.link.is_cluster();
        for changes in changes.chunks(APPEND_AT_A_TIME) {
            // The keys first: what is in the log is not written again.
            let record = |key_id: &str| store.key(key_id).ok().flatten();
            let writes = changes
                .iter()
                .flat_map(|(_, shipped)| projection::writes(&shipped.change, now, self.keys, record));
            let (hints, writes): (Vec<_>, Vec<_>) =
                writes.partition(|write| matches!(write, Write::Publish { .. }));
            let commands = |writes: &[Write]| -> Vec<Cmd> {
                writes.iter().flat_map(|write| write.commands(is_cluster)).collect()
            };
            write_keys(self.link, &commands(&writes)).await?;
            let mut append = redis::cmd("EVAL");
            append.arg(scripts::APPEND).arg(1).arg(names::log(self.source)).arg(self.last);
            let mut before = self.last;
            for (seq, shipped) in changes {
                append.arg(*seq).arg(self.sealer.seal_change(self.source, before, *seq, shipped));
                before = *seq;
            }
            let appended: u64 = self.link.query(&append).await?;
            if appended != before {
                return Err(LogError::Lost);
            }
            self.last = before;
            let changed = Write::Publish { channel: names::CHANGED, payload: format!("{:x}", self.source) };
            let hints: Vec<Write> = hints.into_iter().chain([changed]).collect();
            self.link.pipeline(&commands(&hints)).await?; // Whether anybody listens or not.
        }
        Ok(())
    }
}

/// Carries commands out; something of another type that stands in the way of one is deleted.
///
/// # Errors
/// When Redis refuses one.
pub async fn write_keys(link: &Link, commands: &[Cmd]) -> Result<(), LinkError> {
    let answers = link.pipeline(commands).await?;
    for (command, answer) in commands.iter().zip(answers) {
        match answer {
            Ok(_) => {}
            Err(LinkError::WrongType) => {
                tracing::error!(
                    key = names::REVOKED_SET,
                    "something else than a set stands there; it is written anew"
                );
                let mut delete = redis::cmd("DEL");
                delete.arg(names::REVOKED_SET);
                link.query::<()>(&delete).await?;
                link.query::<redis::Value>(command).await?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What is new in the log of another control plane.
#[derive(Debug)]
pub struct News {
    /// To be taken in, in this order.
    pub entries: Vec<Entry>,
    /// Whether there may be more at once.
    pub more: bool,
}

/// Keeps changes back that were made in knowledge of others which are not here yet.
#[derive(Debug, Default)]
pub struct Patience(BTreeMap<(u64, u64), Instant>);

/// Reads what is new after number `seq` in the log of `source`. `merged` says how far all logs were taken in;
/// `own` is the source whose changes are all here.
///
/// # Errors
/// When Redis cannot be asked, or what stands there does not open.
pub async fn news(
    link: &Link,
    sealer: &Sealer,
    (source, seq): (u64, u64),
    (own, merged): (u64, &BTreeMap<u64, u64>),
    patience: &mut Patience,
) -> Result<News, LogError> {
    let mut range = redis::cmd("XRANGE");
    range.arg(names::log(source)).arg(format!("({seq}-{}", u64::MAX)).arg("+");
    range.arg("COUNT").arg(TAKE_AT_A_TIME);
    let found: Vec<(String, Vec<String>)> = link.query(&range).await?;
    let mut more = found.len() == TAKE_AT_A_TIME;
    let (mut before, mut entries) = (seq, Vec::new());
    for (id, fields) in found {
        let seq = number(&id);
        let sealed = fields.get(1).map_or("", String::as_str);
        let opened = sealer.open_change(source, before, seq, sealed);
        let Some(shipped) = opened else {
            if entries.is_empty() {
                return Err(LogError::Sealed { source_id: source, seq });
            }
            break; // Those before it count.
        };
        let is_here = |(other, seq): (&u64, &u64)| {
            *other == own || merged.get(other).is_some_and(|merged| merged >= seq)
        };
        if !shipped.after.iter().all(is_here) {
            let since = *patience.0.entry((source, seq)).or_insert_with(Instant::now);
            if since.elapsed() < PATIENCE {
                more = false;
                break;
            }
            tracing::warn!(
                source = format!("{source:x}"),
                seq,
                "a change is taken in without those that it follows on"
            );
        }
        before = seq;
        entries.push(shipped.into_entry(source, seq));
    }
    patience.0.retain(|(other, seq), _| *other != source || *seq > before);
    Ok(News { entries, more })
}

/// The command that waits until replicas have all that was written on this connection.
pub fn wait(replicas: u64, timeout: Duration) -> Cmd {
    let mut wait = redis::cmd("WAIT");
    wait.arg(replicas).arg(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
    wait
}
