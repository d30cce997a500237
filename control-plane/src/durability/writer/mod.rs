//! The one writer. Every change goes through it, in this order: planned against what stands, written to
//! the journal and on disk, published to the proxies, kept in the store, answered.
//!
//! Changes that come at the same time share one fsync (group commit). A plan sees the effect of those
//! before it in the same batch; if the write fails, none of them happened.

mod batches;
mod feed;
mod open;
mod pending;
mod status;

use std::convert::Infallible;

use keygate_core::decide::Reason;
use keygate_core::decide::rules::RulesError;
use keygate_core::version::Version;
use tokio::sync::{mpsc, oneshot, watch};

pub use self::feed::{Feed, Logged};
pub use self::open::{History, OpenError, Start, open};
pub use self::status::{WriterObserver, WriterStatus};
use crate::model::View;
use crate::model::author::Author;
use crate::model::change::{Change, Entry};
use crate::secrets::keyring::Wraps;

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
    /// Policy, rollout and limits would take the room of emergency measures.
    #[error(
        "policy, rollout and limits are too long together: 64 KiB of the rules are kept free for emergencies; nothing was changed"
    )]
    Documents,
    /// The key that orders it was ended while the request was on its way.
    #[error("the key that ordered it is refused by now ({reason}); nothing was changed", reason = .reason.label())]
    AuthorEnded {
        /// The reason for which it is refused.
        reason: Reason,
        /// The realm of the refusal's challenge.
        realm: String,
    },
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

type Plan = Box<dyn FnOnce(&View<'_>) -> Result<Vec<Entry>, CommitError> + Send>;

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

    /// Has `plan` made against what stands and its changes carried out in the name of `author`, if its key counts at
    /// that moment. The plan gives its changes and an answer, or refuses; no changes is a fine plan.
    ///
    /// # Errors
    /// The plan's refusal, that the author's key was ended, or that the journal cannot be written.
    pub async fn submit<T, E>(
        &self,
        author: &Author,
        plan: impl FnOnce(&View<'_>) -> Result<(Vec<Change>, T), E> + Send + 'static,
    ) -> Result<Result<(T, Committed), E>, CommitError>
    where
        T: Send + 'static,
        E: Send + 'static,
    {
        let (done, committed) = oneshot::channel();
        let (answer, answered) = oneshot::channel();
        let author = author.clone();
        let plan: Plan = Box::new(move |view| {
            author.check(view).map_err(|reason| {
                let realm = view.model.settings().realm.clone();
                CommitError::AuthorEnded { reason, realm }
            })?;
            match plan(view) {
                Ok((changes, value)) => {
                    let _caller_gone = answer.send(Ok(value));
                    let entry = |change| Entry {
                        reason: author.reason().map(Into::into),
                        ..Entry::new(author.name(), view.stamp, change)
                    };
                    Ok(changes.into_iter().map(entry).collect())
                }
                Err(refusal) => {
                    let _caller_gone = answer.send(Err(refusal));
                    Ok(Vec::new())
                }
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

    /// Carries out the changes of a plan that refuses nothing, in the name of `author`; see [`Writer::submit`].
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub async fn commit<T: Send + 'static>(
        &self,
        author: &Author,
        plan: impl FnOnce(&View<'_>) -> Result<(Vec<Change>, T), Infallible> + Send + 'static,
    ) -> Result<(T, Committed), CommitError> {
        match self.submit(author, plan).await? {
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
            Ok(entries.into_iter().filter(is_new).collect())
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
            let entry = |change| Entry::new("system", view.stamp, change);
            Ok(opens.then(|| entry(Change::SecretsOpened {})).into_iter().collect())
        });
        self.jobs.send(Job { plan, data_keys, done }).await.map_err(|_| CommitError::Stopped)?;
        committed.await.map_err(|_| CommitError::Stopped)?
    }
}
