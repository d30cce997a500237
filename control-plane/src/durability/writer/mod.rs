//! The one writer. Every change goes through it, in this order: planned against what stands, written to
//! the journal and on disk, published to the proxies, kept in the store, answered.
//!
//! Changes that come at the same time share one fsync (group commit). A plan sees the effect of those
//! before it in the same batch; if the write fails, none of them happened.

mod feed;
mod pending;
mod status;

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use keygate_core::decide::rules::{self, RulesError};
use keygate_core::version::Version;
use tokio::sync::{mpsc, oneshot, watch};

pub use self::feed::{Feed, Logged};
use self::pending::{Current, Pending};
pub use self::status::{WriterObserver, WriterStatus};
use crate::durability::backup::Restored;
use crate::durability::journal::{Claim, Journal, JournalError, Notary, Privacy, Record};
use crate::durability::store::{Store, StoreError};
use crate::model::View;
use crate::model::change::{Change, Entry};
use crate::model::state::{Deltas, Effect, Model, Settings, State};
use crate::platform::clock::{self, Clock};
use crate::secrets::keyring::{Keyring, KeyringError, Wraps};
use crate::secrets::record::SecretError;

/// Jobs that may wait; beyond that callers wait to hand theirs in.
const QUEUE: usize = 1_024;
/// The most jobs that share an fsync.
const BATCH: usize = 256;

/// A batch that takes longer is worth a line in the log.
const SLOW: Duration = Duration::from_millis(250);
/// Time between two signed checkpoints of the journal while there are jobs; upkeep submits one now and then.
const SIGN_EVERY: Duration = Duration::from_secs(60);

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

/// Failure of a change.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The journal cannot be written.
    #[error("the journal cannot be written; nothing was changed")]
    Journal,
    /// The disk is full; what is left is for changes that end keys.
    #[error("the disk of the journal is full: only changes that end keys are taken; nothing was changed")]
    NoSpace,
    /// Rules that proxies could not take.
    #[error("{0}; nothing was changed")]
    Rules(RulesError),
    /// A change of the same batch cannot be applied.
    #[error("the change cannot be applied; nothing was changed")]
    Inapplicable,
    /// The writer has stopped.
    #[error("the control plane is stopping; nothing was changed")]
    Stopped,
}

/// A change that happened.
#[derive(Debug, Clone, Copy)]
pub struct Committed {
    /// The version from which on it is enforced.
    pub version: Version,
    /// The number of its last record in the journal.
    pub journal_seq: u64,
}

type Plan = Box<dyn FnOnce(&View<'_>) -> Vec<Entry> + Send>;

struct Job {
    plan: Plan,
    /// Data keys that another control plane has, by their ids.
    data_keys: Vec<(String, Wraps)>,
    done: oneshot::Sender<Result<Committed, CommitError>>,
}

/// Hands jobs to the writer.
#[derive(Clone)]
pub struct Writer {
    jobs: mpsc::Sender<Job>,
    status: watch::Receiver<WriterStatus>,
}

impl Writer {
    /// State of the journal and the store.
    pub fn status(&self) -> WriterStatus {
        *self.status.borrow()
    }

    /// Has `plan` made against what stands and its changes carried out, in the name of `actor`. The plan
    /// gives its changes and an answer, or refuses; no changes is a fine plan.
    ///
    /// # Errors
    /// The plan's refusal, or that the journal cannot be written.
    pub async fn submit<T, E>(
        &self,
        actor: &str,
        plan: impl FnOnce(&View<'_>) -> Result<(Vec<Change>, T), E> + Send + 'static,
    ) -> Result<Result<(T, Committed), E>, CommitError>
    where
        T: Send + 'static,
        E: Send + 'static,
    {
        let (done, committed) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        let actor = actor.to_owned();
        let plan: Plan = Box::new(move |view| match plan(view) {
            Ok((changes, value)) => {
                let _caller_gone = answer.send(Ok(value));
                let entry = |change| Entry { actor: actor.clone(), stamp: view.stamp, origin: None, change };
                changes.into_iter().map(entry).collect()
            }
            Err(refusal) => {
                let _caller_gone = answer.send(Err(refusal));
                Vec::new()
            }
        });
        let job = Job { plan, data_keys: Vec::new(), done };
        self.jobs.send(job).await.map_err(|_| CommitError::Stopped)?;
        let committed = committed.await.map_err(|_| CommitError::Stopped)??;
        match answered.await.map_err(|_| CommitError::Stopped)? {
            Ok(value) => Ok(Ok((value, committed))),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// Carries out the changes of a plan that refuses nothing, in the name of `actor`; see [`Writer::submit`].
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn commit<T: Send + 'static>(
        &self,
        actor: &str,
        plan: impl FnOnce(&View<'_>) -> Result<(Vec<Change>, T), Infallible> + Send + 'static,
    ) -> Result<(T, Committed), CommitError> {
        match self.submit(actor, plan).await? {
            Ok(done) => Ok(done),
            Err(never) => match never {},
        }
    }

    /// Takes in changes that another control plane made, in its order, and data keys of the secrets among them; those
    /// that were taken in before are left out.
    ///
    /// # Errors
    /// When the journal cannot be written, or the rules that they make do not hold here.
    pub async fn merge(
        &self,
        entries: Vec<Entry>,
        data_keys: Vec<(String, Wraps)>,
    ) -> Result<Committed, CommitError> {
        let (done, committed) = oneshot::channel();
        let plan: Plan = Box::new(move |view| {
            let is_new = |entry: &Entry| {
                entry.origin.as_ref().is_some_and(|origin| {
                    view.model.merged().get(&origin.source).is_none_or(|seq| *seq < origin.seq)
                })
            };
            entries.into_iter().filter(is_new).collect()
        });
        self.jobs.send(Job { plan, data_keys, done }).await.map_err(|_| CommitError::Stopped)?;
        committed.await.map_err(|_| CommitError::Stopped)?
    }

    /// Takes data keys of secrets whose records were taken in without, and opens these.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn unlock(&self, data_keys: Vec<(String, Wraps)>) -> Result<Committed, CommitError> {
        let (done, committed) = oneshot::channel();
        let plan: Plan = Box::new(|view| {
            let opens = view
                .model
                .secrets()
                .locked()
                .any(|record| record.data_key().is_some_and(|id| view.keys.has(id)));
            let entry = |change| Entry { actor: "system".into(), stamp: view.stamp, origin: None, change };
            opens.then(|| entry(Change::SecretsOpened {})).into_iter().collect()
        });
        self.jobs.send(Job { plan, data_keys, done }).await.map_err(|_| CommitError::Stopped)?;
        committed.await.map_err(|_| CommitError::Stopped)?
    }
}

/// A history taken up: its state, and the writer that goes on with it.
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

struct Thread {
    journal: Journal,
    store: Arc<Store>,
    model: Model,
    keys: Arc<Keyring>,
    states: watch::Sender<Arc<State>>,
    deltas: Arc<Deltas>,
    feed: Arc<Feed>,
    clock: Clock,
    observer: Box<dyn WriterObserver>,
    status: watch::Sender<WriterStatus>,
    /// Changes of the journal that the store could not take yet.
    unstored: Vec<(u64, Change)>,
    /// The same as plans see it.
    pending: Pending,
    /// Whether the rules changed since they were last published.
    rules_changed: bool,
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
    if let Some(Restored { accepts_loss, ended }) = restored {
        tracing::warn!(accepts_loss, ended = ended.len(), "the journal was restored from a backup");
        // Numbers after its end were given to other changes before.
        let source = clock.now_ms().max(model.source() + 1);
        first.push(Change::HistoryForked { source, accepts_loss });
        let entry = |line: &String| Record::parse(line.as_bytes()).ok()?.into_entry(&opens).ok();
        // Of secrets, what can still be opened, and what has ended.
        let counts = |change: &Change| {
            change.facts().secret.is_none_or(|secret| {
                secret.check(&keys).is_ok() && secret.data_key().is_none_or(|id| keys.has(id))
            })
        };
        first.extend(ended.iter().filter_map(entry).map(|entry| entry.change).filter(counts));
    }
    if !first.is_empty() {
        // What a history begins with gives way to what was decided elsewhere.
        let stamp = if model.is_empty() { 0 } else { model.next_stamp(clock.now_ms()) };
        let entry = |change| Entry { actor: "system".into(), stamp, origin: None, change };
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

fn warn_if_slow(what: &str, took: Duration) {
    if took >= SLOW {
        tracing::warn!(what, millis = took.as_millis(), "the disk is slow: changes wait for it");
    }
}

fn catch_up(store: &Store, behind: &mut Vec<(u64, Change)>) -> Result<(), StoreError> {
    store.apply(behind)?;
    behind.clear();
    Ok(())
}

impl Thread {
    fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        let mut signed = Instant::now();
        while let Some(job) = queue.blocking_recv() {
            let mut batch = vec![job];
            while batch.len() < BATCH {
                match queue.try_recv() {
                    Ok(job) => batch.push(job),
                    Err(_) => break,
                }
            }
            self.commit(batch);
            if signed.elapsed() >= SIGN_EVERY || self.journal.is_checkpoint_due() {
                signed = Instant::now();
                self.journal.sign(&clock::rfc3339_ms(self.clock.now_ms()));
            }
        }
        self.journal.sign(&clock::rfc3339_ms(self.clock.now_ms()));
    }

    fn commit(&mut self, batch: Vec<Job>) {
        let now_ms = self.clock.now_ms();
        let mut model = self.model.clone();
        let mut pending = self.pending.clone();
        let (mut entries, mut effects, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
        let (mut unstored, mut secrets_changed) = (Vec::new(), false);
        let mut seq = self.journal.last_seq();
        for job in batch {
            let Job { plan, data_keys, done } = job;
            for (id, wraps) in &data_keys {
                if let Err(error) = self.keys.take(id, wraps) {
                    tracing::error!(%error, "a data key of another control plane is not taken");
                }
            }
            let view = View {
                model: &model,
                now: now_ms / 1_000,
                now_ms,
                stamp: model.next_stamp(now_ms),
                keys: &self.keys,
                records: &Current { store: &self.store, pending: &pending },
            };
            let planned = plan(&view);
            if !planned.iter().all(|entry| entry.change.facts().ends_keys)
                && self.journal.uses_reserve()
                && !self.journal.refill_reserve()
            {
                let _caller_gone = done.send(Err(CommitError::NoSpace));
                continue;
            }
            if let Err(error) = self.check_rules(&model, &planned, seq) {
                let _caller_gone = done.send(Err(error));
                continue;
            }
            for entry in planned {
                seq += 1;
                match self.apply(&mut model, seq, &entry) {
                    Ok(effect) => {
                        secrets_changed |= effect.secrets;
                        if !effect.superseded {
                            pending.note(&entry.change, &self.store);
                            unstored.push((seq, entry.change.clone()));
                        }
                        if !effect.is_empty() {
                            effects.push((seq, effect));
                        }
                    }
                    Err(error) => {
                        // Only a secret that was sealed a moment ago can fail to open.
                        tracing::error!(%error, "a planned change cannot be applied; nothing of its batch was changed");
                        let dones = waiting.into_iter().map(|(done, _)| done);
                        for waits in dones.chain([done]) {
                            let _caller_gone = waits.send(Err(CommitError::Inapplicable));
                        }
                        return;
                    }
                }
                entries.push(entry);
            }
            let version = Version { source: model.source(), seq: model.seq() };
            waiting.push((done, Committed { version, journal_seq: seq }));
        }
        if !entries.is_empty() {
            let started = Instant::now();
            let at = clock::rfc3339_ms(now_ms);
            if let Err(error) = self.journal.append(&at, &entries) {
                tracing::error!(%error, "the journal cannot be written; changes are refused");
                let full = matches!(error, JournalError::NoSpace { .. });
                self.update_status(|status| status.journal_failures += u64::from(!full));
                self.destroy_data_keys(); // Of secrets that were planned and are not.
                for (done, _) in waiting {
                    let error = if full { CommitError::NoSpace } else { CommitError::Journal };
                    let _caller_gone = done.send(Err(error));
                }
                return;
            }
            self.observer.journal_appended(started.elapsed());
            warn_if_slow("journal", started.elapsed());
            self.publish(model, effects);
            let first_seq = self.journal.last_seq() + 1 - entries.len() as u64;
            let logged = |(seq, entry)| Logged { seq, at: at.clone(), entry };
            self.feed.push((first_seq..).zip(entries).map(logged));
            self.unstored.append(&mut unstored);
            self.pending = pending;
            if secrets_changed {
                self.destroy_data_keys();
            }
            self.store_what_waits();
        }
        for (done, committed) in waiting {
            let _caller_gone = done.send(Ok(committed));
        }
    }

    /// Checks the rules that planned changes make: changes to invalid rules must not be in the journal.
    fn check_rules(&self, model: &Model, planned: &[Entry], mut seq: u64) -> Result<(), CommitError> {
        if !planned.iter().any(|entry| entry.change.facts().of_rules) {
            return Ok(());
        }
        let mut trial = model.clone();
        for entry in planned {
            seq += 1;
            self.apply(&mut trial, seq, entry).map_err(|error| {
                tracing::error!(%error, "a change cannot be applied");
                CommitError::Inapplicable
            })?;
        }
        trial.picture(None, Instant::now()).map(|_| ()).map_err(CommitError::Rules)
    }

    fn apply(&self, model: &mut Model, seq: u64, entry: &Entry) -> Result<Effect, SecretError> {
        let effect = model.apply(seq, entry, &self.keys)?;
        if effect.secrets {
            model.open_secrets(&self.keys)?;
        }
        Ok(effect)
    }

    /// The journal has a later record of each secret that had them; what they opened is gone for good.
    fn destroy_data_keys(&self) {
        match self.keys.keep_only(&self.model.secrets().data_keys().collect()) {
            Ok(0) => {}
            Ok(destroyed) => tracing::info!(destroyed, "data keys of secrets that moved on were destroyed"),
            Err(error) => {
                tracing::error!(%error, "data keys that are not needed any more cannot be destroyed; tried again");
            }
        }
    }

    /// The journal has these changes; what the store cannot take now is tried again with the next ones, or at the
    /// next start. Until then only plans know of them.
    fn store_what_waits(&mut self) {
        // With the disk full the store would take the space that is left for the journal.
        if !self.journal.uses_reserve() {
            self.try_to_store();
        }
        self.update_status(|_| {});
    }

    /// Publishes the state of the journal and the store, with a change to its counts.
    fn update_status(&self, count: impl FnOnce(&mut WriterStatus)) {
        self.status.send_modify(|status| {
            status.reserve_ok = !self.journal.uses_reserve();
            status.store_backlog = self.unstored.len();
            count(status);
        });
    }

    fn try_to_store(&mut self) {
        let started = Instant::now();
        let stored = self.store.apply(&self.unstored);
        self.observer.store_applied(started.elapsed());
        warn_if_slow("store", started.elapsed());
        match stored {
            Ok(()) => {
                self.unstored.clear();
                self.pending = Pending::default();
            }
            Err(error) => {
                self.update_status(|status| status.store_failures += 1);
                tracing::error!(%error, waiting = self.unstored.len(), "the store cannot be written");
            }
        }
    }

    fn publish(&mut self, model: Model, mut effects: Vec<(u64, Effect)>) {
        let before = self.states.borrow().clone();
        self.rules_changed |= effects.iter().any(|(_, effect)| effect.rules);
        let state = match model.picture((!self.rules_changed).then_some(&*before), Instant::now()) {
            Ok(state) => {
                self.rules_changed = false;
                Ok(state)
            }
            // Plans check what they change; this is for errors that no check foresaw. Revocations are still published.
            Err(error) => {
                tracing::error!(%error, "the new rules do not hold; proxies keep those they have");
                model.picture(Some(&before), Instant::now())
            }
        };
        if let (Ok(state), Some((_, last))) = (&state, effects.last_mut())
            && state.rules_bytes != before.rules_bytes
        {
            last.members = rules::changed_members(&before.rules_bytes, &state.rules_bytes);
        }
        // Kept whatever becomes of the rules: the next version must bring every revocation of this one.
        for (seq, effect) in effects {
            self.deltas.push(seq, effect, Instant::now());
        }
        if let Ok(state) = state {
            self.show(state);
        }
        self.model = model;
    }

    /// Makes a state the one that is read, and wakes the polls if it is news for them: that a key was issued
    /// is not.
    fn show(&self, mut state: State) {
        self.states.send_if_modified(|current| {
            let news = current.version != state.version;
            if !news {
                state.published = current.published;
            }
            *current = Arc::new(state);
            news
        });
    }
}
