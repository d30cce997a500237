//! Filling a Redis from a journal, without a control plane.

use std::collections::BTreeMap;
use std::path::Path;

use keygate_core::revocation::{Fingerprint, Revocations as _, Standing};

use super::error::LinkError;
use super::link::Timeouts;
use super::log::{self, Filler, LogError};
use super::revoked::{self, UnionError};
use super::{Sealer, projection};
use crate::config::Target;
use crate::durability::journal::{JournalError, PersonalData, Privacy};
use crate::durability::store::{Store, StoreError};
use crate::model::state::Model;
use crate::secrets::keyring::Keyring;
use crate::secrets::record::SecretError;

/// Keys that are written at a time.
const AT_A_TIME: usize = 500;

/// Why a Redis cannot be filled.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Redis.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Its logs.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The revocations in Redis.
    #[error(transparent)]
    Union(#[from] UnionError),
    /// A secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The work file.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What was done.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// Changes read from the journal.
    pub changes: u64,
    /// Of them, those that Redis lacked.
    pub appended: u64,
    /// Records of keys written.
    pub keys: u64,
    /// Revocations written.
    pub revocations: u64,
}

/// Fills the Redis of `target` from the journal in `dir`. What is there already stays; revocations are united.
/// `work` is an empty directory for a while. `progress` is told how many changes were passed on so far.
///
/// # Errors
/// See [`RecoverError`]; it can be tried again, what was written stays.
pub async fn recover(
    target: &Target,
    dir: &Path,
    work: &Path,
    keys: &Keyring,
    now: u64,
    mut progress: impl FnMut(Recovered),
) -> Result<Recovered, RecoverError> {
    // Whole batches take longer than one request of a client that waits.
    let timeouts = Timeouts { response: std::time::Duration::from_secs(10), ..Timeouts::default() };
    let link = target.connect(timeouts).await?;
    let sealer = Sealer::new(keys.root());
    let privacy = Privacy::new(keys.root(), PersonalData::default());
    let store = Store::open(work)?;
    let mut model = Model::default();
    let mut logs: BTreeMap<u64, u64> = BTreeMap::new();
    let mut done = Recovered::default();
    let (mut seq, mut line) = (0, 0);
    loop {
        let entries = log::read_journal(dir, &privacy, seq, u64::MAX)?;
        let Some(to) = entries.last().map(|logged| logged.seq) else { break };
        let mut stored = Vec::new();
        for logged in &entries {
            if !model.apply(logged.seq, &logged.entry, keys)?.superseded {
                stored.push((logged.seq, logged.entry.change.clone()));
            }
        }
        store.apply(&stored)?;
        for (source, mut changes) in log::by_source(&entries, &mut line) {
            let last = match logs.get(&source) {
                Some(last) => *last,
                None => {
                    log::join(&link, source).await?;
                    log::last(&link, source).await?
                }
            };
            changes.retain(|(seq, _)| *seq > last);
            let mut filler = Filler { link: &link, sealer: &sealer, keys, source, last };
            filler.append(&changes, &store, now).await?;
            done.appended += changes.len() as u64;
            logs.insert(source, filler.last);
        }
        done.changes += entries.len() as u64;
        progress(done);
        seq = to;
    }
    // What stands in a log was not written again with it; the keys may be missing all the same.
    let mut records = Vec::new();
    store.each_key(|key| records.extend(projection::key(&key, now)))?;
    for writes in records.chunks(AT_A_TIME) {
        let commands: Vec<_> = writes.iter().flat_map(|write| write.commands(link.is_cluster())).collect();
        log::write_keys(&link, &commands).await?;
        done.keys += writes.len() as u64;
        progress(done);
    }
    for held in model.secrets().all() {
        let writes = projection::secret(&held.record, keys, now);
        let commands: Vec<_> = writes.iter().flat_map(|write| write.commands(link.is_cluster())).collect();
        log::write_keys(&link, &commands).await?;
    }
    let mut revoked = store.revoked_within(now.saturating_add(1), u64::MAX)?;
    // Not what was forgotten again since.
    revoked.retain(|jti| model.revocations().standing(Fingerprint::of(jti)) == Standing::Revoked);
    for jtis in revoked.chunks(AT_A_TIME) {
        revoked::write_again(&link, &store, jtis).await?;
        done.revocations += jtis.len() as u64;
        progress(done);
    }
    Ok(done)
}
