//! Opens a history: reads the journal, repairs what is derived from it, and starts the writer's thread.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use keygate_core::decide::rules::RulesError;
use tokio::sync::{mpsc, watch};

use super::batches::{Thread, catch_up};
use super::pending::Pending;
use super::{Feed, Writer, WriterObserver, WriterStatus};
use crate::durability::backup::Restored;
use crate::durability::journal::{Claim, JournalError, Notary, Privacy, Record};
use crate::durability::store::{Store, StoreError};
use crate::model::change::{Change, Entry};
use crate::model::commands::recovery;
use crate::model::state::{Deltas, Model, Settings, State};
use crate::platform::clock::{self, Clock};
use crate::secrets::keyring::{Keyring, KeyringError};
use crate::secrets::record::SecretError;

/// Jobs that may wait; beyond that callers wait to hand theirs in.
const QUEUE: usize = 1_024;

/// Failure to open a history.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The keyring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The rules.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// The first admin key.
    #[error("the first admin key cannot be issued: {0}")]
    FirstKey(#[source] crate::model::key::KeyRequestError),
    /// The store knows more than the journal.
    #[error(
        "the store has applied change {store}, but the journal ends at {journal}: the journal was lost or set back; restore it"
    )]
    JournalBehind {
        /// The store's last change.
        store: u64,
        /// The journal's.
        journal: u64,
    },
}

/// An open history: its state, and the writer that continues it.
pub struct History {
    /// Hands jobs to the writer.
    pub writer: Writer,
    /// The state, as it changes.
    pub states: watch::Receiver<Arc<State>>,
    /// The latest changes.
    pub deltas: Arc<Deltas>,
    /// Records of keys and revocations.
    pub store: Arc<Store>,
    /// The latest entries of the journal.
    pub feed: Arc<Feed>,
    /// The latest second at which anything was issued or revoked.
    pub latest_s: u64,
    /// The writer's thread; it ends when the last [`Writer`] is gone.
    pub thread: thread::JoinHandle<()>,
}

/// Inputs of [`open`].
pub struct Start<'s> {
    /// The journal, claimed.
    pub claim: Claim,
    /// Signs the journal's checkpoints.
    pub notary: Notary,
    /// Hides personal data from the journal's readers.
    pub privacy: Arc<Privacy>,
    /// The directory.
    pub dir: &'s Path,
    /// Settings of the configuration.
    pub settings: Settings,
    /// Opens secrets.
    pub keys: Arc<Keyring>,
    /// The changes that a new history begins with, after its genesis and its settings.
    pub first_changes: &'s dyn Fn() -> Result<Vec<Change>, OpenError>,
    /// Time.
    pub clock: Clock,
    /// Receives the durations of writes.
    pub observer: Box<dyn WriterObserver>,
}

/// The changes to take over from `ended`: lines of the replaced journal that ended keys. Changes of secrets count if they
/// belong to the restored `model`, whose present line of history ends at `line_end`, Unix milliseconds. A change that only
/// another root key opens does not count, and is logged.
fn taken_over(
    ended: &[String],
    privacy: &Privacy,
    model: &Model,
    line_end: u64,
    now: u64,
    keys: &Keyring,
) -> Result<Vec<Change>, SecretError> {
    let mut taken = Vec::new();
    for line in ended {
        let Ok(entry) = Record::parse(line.as_bytes()).and_then(|record| record.into_entry(privacy)) else {
            tracing::error!(
                "a change of the journal before ended keys and cannot be opened; it is in the journal that was moved away"
            );
            continue;
        };
        // Of secrets, what can still be opened, and what has ended.
        let counts = entry.change.facts().secret.is_none_or(|secret| {
            secret.check(keys).is_ok() && secret.data_key().is_none_or(|id| keys.has(id))
        });
        if !counts {
            continue;
        }
        if let Change::StateReturned { source, kids, .. } = &entry.change {
            let line_end = model.end_of_line(*source).or((*source == model.source()).then_some(line_end));
            let ended = recovery::ended_secrets(model, line_end, kids, now, keys)?;
            taken.extend(ended.into_iter().map(|secret| Change::SecretMoved { secret, justification: None }));
        }
        taken.push(entry.change);
    }
    Ok(taken)
}

/// Takes up the history of a directory, or begins one.
///
/// # Errors
/// See [`OpenError`].
pub fn open(start: Start<'_>) -> Result<History, OpenError> {
    let Start { claim, notary, privacy, dir, settings, keys, first_changes, clock, observer } = start;
    let store = Arc::new(Store::open(dir)?);
    let (stored_source, mut applied) = store.applied()?;
    let in_dir = |source| JournalError::Io { path: dir.into(), source };
    let opens = privacy.clone();
    let mut model = Model::default();
    let mut behind: Vec<(u64, Change)> = Vec::new();
    let mut failed: Option<OpenError> = None;
    let mut journal = claim
        .read(notary, privacy, |record| {
            let seq = record.seq;
            if let Change::Genesis { source } = record.change
                && stored_source != source
                && stored_source != 0
            {
                // The store belongs to another history; it is rebuilt from this one.
                if let Err(error) = store.clear() {
                    failed = Some(error.into());
                }
                applied = 0;
            }
            let entry = record.into_entry(&opens)?;
            let superseded = match model.apply(seq, &entry, &keys) {
                Ok(effect) => effect.superseded,
                Err(error) => {
                    failed = Some(error.into());
                    false
                }
            };
            if seq > applied && !superseded {
                behind.push((seq, entry.change));
                if behind.len() >= 10_000 {
                    catch_up(&store, &mut behind).unwrap_or_else(|error| failed = Some(error.into()));
                }
            }
            failed.as_ref().map_or(Ok(()), |error| Err(error.to_string()))
        })
        .map_err(|error| failed.take().unwrap_or(error.into()))?;
    catch_up(&store, &mut behind)?;
    if applied > journal.last_seq() {
        return Err(OpenError::JournalBehind { store: applied, journal: journal.last_seq() });
    }

    let mut first = Vec::new();
    if model.is_empty() {
        first.push(Change::Genesis { source: clock.now_ms() });
        first.push(Change::SettingsChanged { settings });
        first.extend(first_changes()?);
    } else if *model.settings() != settings {
        first.push(Change::SettingsChanged { settings });
    }
    let restored = if model.is_empty() { None } else { Restored::read(dir).map_err(in_dir)? };
    let is_restored = restored.is_some();
    if let Some(Restored { ended }) = restored {
        // Numbers after its end were given to other changes before.
        let source = clock.now_ms().max(model.source() + 1);
        first.push(Change::HistoryForked { source });
        let taken = taken_over(&ended, &opens, &model, source, clock.now_ms() / 1_000, &keys)?;
        tracing::warn!(
            found = ended.len(),
            taken = taken.len(),
            "the journal was restored from a backup; changes that ended keys were found in the one before"
        );
        first.extend(taken);
    }
    if !first.is_empty() {
        // What a history begins with gives way to what was decided elsewhere.
        let stamp = if model.is_empty() { 0 } else { model.next_stamp(clock.now_ms()) };
        let entry = |change| Entry::new("system", stamp, change);
        let first: Vec<Entry> = first.into_iter().map(entry).collect();
        for (seq, entry) in (journal.last_seq() + 1..).zip(&first) {
            model.apply(seq, entry, &keys)?;
        }
        model.open_secrets(&keys)?;
        model.picture(None, Instant::now())?; // Nothing that does not hold goes into the journal.
        let first_seq = journal.last_seq() + 1;
        journal.append(&clock::rfc3339_ms(clock.now_ms()), &first)?;
        let first: Vec<(u64, Change)> =
            (first_seq..).zip(first.into_iter().map(|entry| entry.change)).collect();
        store.apply(&first)?;
    }
    if is_restored {
        Restored::done(dir).map_err(in_dir)?;
    }
    journal.sign(&clock::rfc3339_ms(clock.now_ms()));
    let latest_s = model.latest_s(0);
    model.open_secrets(&keys)?;
    model.secrets().check_hsm(&keys)?;
    keys.save()?;
    // Also those of a start or a change that was cut short.
    keys.keep_only(&model.secrets().data_keys().collect())?;
    let state = Arc::new(model.picture(None, Instant::now())?);
    let deltas = Arc::new(Deltas::after(state.version.seq, Instant::now()));
    let (status, status_receiver) = watch::channel(WriterStatus {
        journal_failures: 0,
        reserve_ok: !journal.uses_reserve(),
        store_backlog: 0,
        store_failures: 0,
    });
    let feed = Feed::after_start(journal.last_seq());
    let (states, receiver) = watch::channel(state);
    let (jobs, queue) = mpsc::channel(QUEUE);
    let thread = Thread {
        journal,
        store: store.clone(),
        model,
        keys,
        states,
        deltas: deltas.clone(),
        feed: feed.clone(),
        clock,
        observer,
        status,
        unstored: Vec::new(),
        pending: Pending::default(),
        rules_changed: false,
    };
    let thread =
        thread::Builder::new().name("writer".into()).spawn(move || thread.run(queue)).map_err(in_dir)?;
    let writer = Writer { jobs, status: status_receiver };
    Ok(History { writer, states: receiver, deltas, store, feed, latest_s, thread })
}
