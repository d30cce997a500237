//! The writer's thread: makes batches of jobs last, then publishes them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use keygate_core::decide::rules;
use keygate_core::version::Version;
use tokio::sync::{mpsc, watch};

use super::pending::{Current, Pending};
use super::{CommitError, Committed, Feed, Job, Logged, WriterObserver, WriterStatus};
use crate::durability::journal::{Journal, JournalError};
use crate::durability::store::{Store, StoreError};
use crate::model::View;
use crate::model::change::{Change, Entry};
use crate::model::state::{Deltas, Effect, Model, State};
use crate::platform::clock::{self, Clock};
use crate::secrets::keyring::Keyring;
use crate::secrets::record::SecretError;

/// The most jobs that share an fsync.
const BATCH: usize = 256;

/// The most bytes of rules without emergency measures, so that those always have room.
const MAX_DOCUMENT_BYTES: usize = rules::MAX_RULES_BYTES - 64 * 1024;

/// A batch that takes longer is worth a line in the log.
const SLOW: Duration = Duration::from_millis(250);
/// Time between two signed checkpoints of the journal while there are jobs; upkeep submits one now and then.
const SIGN_EVERY: Duration = Duration::from_secs(60);

/// The thread and all that only it changes.
pub(super) struct Thread {
    pub(super) journal: Journal,
    pub(super) store: Arc<Store>,
    pub(super) model: Model,
    pub(super) keys: Arc<Keyring>,
    pub(super) states: watch::Sender<Arc<State>>,
    pub(super) deltas: Arc<Deltas>,
    pub(super) feed: Arc<Feed>,
    pub(super) clock: Clock,
    pub(super) observer: Box<dyn WriterObserver>,
    pub(super) status: watch::Sender<WriterStatus>,
    /// Changes of the journal that the store could not take yet.
    pub(super) unstored: Vec<(u64, Change)>,
    /// The same as plans see it.
    pub(super) pending: Pending,
    /// Whether the rules changed since they were last published.
    pub(super) rules_changed: bool,
}

impl Thread {
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Job>) {
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
            let planned = match plan(&view) {
                Ok(planned) => planned,
                Err(refused) => {
                    let _caller_gone = done.send(Err(refused));
                    continue;
                }
            };
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
            for mut entry in planned {
                seq += 1;
                entry.before = model.before(&entry.change).map(Box::new);
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
        trial.picture(None, Instant::now()).map_err(CommitError::Rules)?;
        if planned.iter().any(|entry| is_document(&entry.change))
            && trial.document_bytes() > MAX_DOCUMENT_BYTES
        {
            return Err(CommitError::Documents);
        }
        Ok(())
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
            last.members = rules::changed_members(before.rules_bytes.expose(), state.rules_bytes.expose());
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

/// Whether a change replaces a document that may be long.
fn is_document(change: &Change) -> bool {
    matches!(
        change,
        Change::PolicyReplaced { .. }
            | Change::RolloutChanged { .. }
            | Change::LimitsChanged { .. }
            | Change::LimitsOverridden { .. }
    )
}

fn warn_if_slow(what: &str, took: Duration) {
    if took >= SLOW {
        tracing::warn!(what, millis = took.as_millis(), "the disk is slow: changes wait for it");
    }
}

pub(super) fn catch_up(store: &Store, behind: &mut Vec<(u64, Change)>) -> Result<(), StoreError> {
    store.apply(behind)?;
    behind.clear();
    Ok(())
}
