//! Recovery after a loss: proxies enforce changes that are lacking here, and return what they know before they are given
//! anything else. So a restored backup takes back no revocation that a live proxy knows.
//!
//! One proxy at a time returns its state, in parts: the rules, then each shard of revocations. The others wait; what the
//! one returned covers all that enforce no later version.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keygate_core::decide::rules::{Rules, RulesError, changed_members};
use keygate_core::revocation::{Fingerprint, Revocations as _, Shard, ShardError, Standing};
use keygate_core::sync::wire::Part;
use keygate_core::version::Version;

use super::admin_key;
use crate::durability::store::StoreError;
use crate::durability::writer::CommitError;
use crate::model::author::Author;
use crate::model::commands::recovery::{self, ACTOR, Enforced};
use crate::model::key::KeyRecord;
use crate::model::state::State;
use crate::node::Node;
use crate::secrets::record::ring::Held;
use crate::secrets::record::{SecretError, SecretState};

/// After this time without a part, another proxy may return its state.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(5);
/// By then another control plane has passed a change on, if it lives and reaches Redis: it takes milliseconds.
const PEERS_BRING_WITHIN: Duration = Duration::from_secs(5);
/// By this time after the hard age, each proxy that serves has returned what it knows.
const ALL_HAVE_RETURNED_AFTER: Duration = Duration::from_secs(60);
/// Of a proxy that waits, there is a line in the log this often.
const LOGGED_EVERY: Duration = Duration::from_secs(60);
/// Time within which a state is taken in, however large.
const TAKEN_IN_WITHIN: Duration = Duration::from_secs(60);
/// The most entries of a state that is returned: 128 MB of them.
const MAX_ENTRIES: usize = 16_000_000;

/// A part of a state is not taken, or the whole is not.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// It is not the next part of the state that is being returned.
    #[error("this is not the part that is expected; poll again")]
    OutOfOrder,
    /// There are too many entries.
    #[error("the state has more than {MAX_ENTRIES} entries")]
    TooLarge,
    /// The rules cannot be read.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// A shard cannot be read.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// A secret cannot be ended.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The records of keys cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The changes cannot be written.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The control plane stops.
    #[error("the control plane is stopping")]
    Stopping,
}

/// The state that a proxy returns.
#[derive(Debug, Default)]
pub struct Recovery {
    returning: Mutex<Option<Returning>>,
    /// The last version of which a line was logged, and when.
    logged: Mutex<Option<(Version, Instant)>>,
}

#[derive(Debug)]
struct Returning {
    /// The proxy that was asked.
    proxy: String,
    version: Version,
    heard: Instant,
    /// The next part; `None`: all are here, and are being taken in.
    next: Option<u16>,
    bits: u8,
    rules: Option<Rules>,
    revoked: Vec<Fingerprint>,
    suspended: Vec<Fingerprint>,
}

impl Recovery {
    /// Whether a proxy that enforces `version` is to return its state now.
    pub fn asks(&self, proxy: &str, version: Version) -> bool {
        let mut returning = self.lock();
        let is_free = returning.as_ref().is_none_or(|other| match other.next {
            Some(_) => other.proxy == proxy || other.heard.elapsed() > GIVEN_UP_AFTER,
            None => other.heard.elapsed() > TAKEN_IN_WITHIN,
        });
        if is_free {
            *returning = Some(Returning {
                proxy: proxy.to_owned(),
                version,
                heard: Instant::now(),
                next: Some(0),
                bits: 0,
                rules: None,
                revoked: Vec::new(),
                suspended: Vec::new(),
            });
        }
        is_free
    }

    /// Whether it is time for a line in the log about a proxy that enforces `version`: its poll comes every second.
    pub fn is_to_be_logged(&self, version: Version) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = logged.is_none_or(|(last, at)| last != version || at.elapsed() > LOGGED_EVERY);
        if is_due {
            *logged = Some((version, Instant::now()));
        }
        is_due
    }

    /// Takes a part; the state, when it was the last one.
    ///
    /// # Errors
    /// When it is another one than was expected, or cannot be read: the proxy begins again then.
    pub fn take(&self, part: &Part) -> Result<Option<Enforced>, RecoveryError> {
        let mut slot = self.lock();
        let returning = slot.as_mut().ok_or(RecoveryError::OutOfOrder)?;
        let is_next = returning.next == Some(part.number) && returning.version == part.version;
        if !is_next || part.number > 0 && part.bits != returning.bits {
            return Err(RecoveryError::OutOfOrder);
        }
        match part.number.checked_sub(1) {
            None => {
                returning.rules = Some(Rules::decode(&part.bytes)?);
                returning.bits = part.bits;
            }
            Some(index) => {
                let shard = Shard::decode(&part.bytes)?;
                if (shard.bits(), shard.index()) != (part.bits, index) {
                    return Err(RecoveryError::OutOfOrder);
                }
                if returning.revoked.len() + returning.suspended.len() + shard.len() > MAX_ENTRIES {
                    return Err(RecoveryError::TooLarge);
                }
                for (fingerprint, standing) in shard.entries() {
                    match standing {
                        Standing::Revoked => returning.revoked.push(fingerprint),
                        _ => returning.suspended.push(fingerprint),
                    }
                }
            }
        }
        returning.heard = Instant::now();
        let next = part.number + 1;
        if next < Part::count(part.bits) {
            returning.next = Some(next);
            return Ok(None);
        }
        returning.next = None;
        let rules = returning.rules.take().ok_or(RecoveryError::OutOfOrder)?;
        let (revoked, suspended) =
            (std::mem::take(&mut returning.revoked), std::mem::take(&mut returning.suspended));
        Ok(Some(Enforced { version: part.version, rules, revoked, suspended }))
    }

    /// Takes the state in that [`Recovery::take`] gave.
    ///
    /// # Errors
    /// When it cannot be written; it may be returned again then.
    pub async fn take_back(&self, node: &Arc<Node>, enforced: Enforced) -> Result<(), RecoveryError> {
        let taken = take_back(node, enforced).await;
        *self.lock() = None;
        taken
    }

    fn lock(&self) -> MutexGuard<'_, Option<Returning>> {
        self.returning.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn take_back(node: &Arc<Node>, enforced: Enforced) -> Result<(), RecoveryError> {
    let state = node.state();
    let here = Arc::clone(node);
    let (version, rules) = (enforced.version, enforced.rules.encode());
    let lost = tokio::task::spawn_blocking(move || {
        let keys = records(&here, &state, &enforced)?;
        Ok::<_, StoreError>((enforced, keys))
    });
    let (enforced, keys) = lost.await.map_err(|_| RecoveryError::Stopping)??;
    let command = move |view: &crate::model::View<'_>| recovery::take_back(view, &enforced, &keys);
    let (taken, committed) = node.writer.submit(&Author::part(ACTOR), command).await??;
    let differs = changed_members(&rules, node.state().rules_bytes.expose());
    let differs: Vec<&str> = differs.iter().map(String::as_str).filter(|name| *name != "keys").collect();
    tracing::warn!(
        enforced = %version,
        version = %committed.version,
        revocations = taken.revoked,
        suspensions = taken.suspended,
        cutoffs = taken.cutoffs,
        lockdown = taken.lockdown,
        secrets = taken.secrets,
        other_rules_than_enforced = differs.join(" "),
        "a proxy enforced changes that were lost here; all of them that end keys were taken back from it"
    );
    Ok(())
}

/// Records of the keys that a returned state ends and this one does not.
fn records(
    node: &Node,
    state: &State,
    enforced: &Enforced,
) -> Result<HashMap<Fingerprint, KeyRecord>, StoreError> {
    let mut set = &state.revocations;
    let all = enforced.revoked.iter().chain(&enforced.suspended).copied();
    let lacking: HashSet<Fingerprint> =
        all.filter(|fingerprint| set.standing(*fingerprint) != Standing::Revoked).collect();
    let mut found = HashMap::new();
    if !lacking.is_empty() {
        node.store.each_key(|key| {
            let fingerprint = Fingerprint::of(&key.jti);
            if lacking.contains(&fingerprint) {
                found.insert(fingerprint, key);
            }
        })?;
    }
    Ok(found)
}

/// Whether a proxy is to return what it enforces, after it was `ahead_for` so long: no other control plane will bring the
/// changes that are lacking here.
pub fn may_return(node: &Node, state: &State, enforced: Version, ahead_for: Duration) -> bool {
    let have = state.version;
    let is_of_this_journal = state.lines.contains_key(&enforced.source);
    let is_later = enforced.source != have.source && (is_of_this_journal || enforced < have);
    let peers = node.peers.as_ref();
    let has_waited = ahead_for >= PEERS_BRING_WITHIN;
    let others_bring_none = if peers.is_connected() {
        peers.is_caught_up() && (is_of_this_journal || has_waited)
    } else {
        is_of_this_journal && has_waited
    };
    is_later && (peers.is_alone() || others_bring_none)
}

/// After a restore, writes another admin key where that of the start has ended: by what proxies or Redis know, the secret
/// that signed it had ended. `admin_key` is the secret that signed it; `None`: none was written.
pub async fn run(node: Arc<Node>, mut admin_key: Option<String>) {
    let mut stopping = node.stopping.clone();
    let hard_age = Duration::from_secs(node.state().rules.hard_age_s);
    let deadline = tokio::time::Instant::now() + hard_age + ALL_HAVE_RETURNED_AFTER;
    loop {
        if admin_key::is_wanted(&node.config.data_dir) {
            tokio::select! {
                signed_by = admin_key::issue_when_signed(&node) => admin_key = signed_by,
                _ = stopping.wait_for(|stop| *stop) => return,
            }
        }
        let Some(kid) = admin_key.take() else { return };
        let mut states = node.states.clone();
        let counts = |held: &Held| held.record.state < SecretState::Expired;
        tokio::select! {
            ended = states.wait_for(|state| !state.secrets.get(&kid).is_some_and(counts)) => {
                if ended.is_err() {
                    return;
                }
            }
            () = tokio::time::sleep_until(deadline) => return,
            _ = stopping.wait_for(|stop| *stop) => return,
        }
        tracing::warn!("the secret that signed the new admin key had ended before; another key is written");
        admin_key::want(&node.config.data_dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version() -> Version {
        Version { source: 1, seq: 2 }
    }

    fn parts(fingerprints: &[u64]) -> Vec<Part> {
        let mut shards = [Shard::empty(1, 0), Shard::empty(1, 1)];
        for value in fingerprints {
            let fingerprint = Fingerprint(*value);
            shards[usize::from(fingerprint.shard(1))]
                .apply(keygate_core::revocation::Op::Revoke(fingerprint));
        }
        let bytes = [Rules::minimal(Vec::new()).encode(), shards[0].encode(), shards[1].encode()];
        (0..).zip(bytes).map(|(number, bytes)| Part { version: version(), bits: 1, number, bytes }).collect()
    }

    #[test]
    fn a_state_is_whole_once_each_part_came_in_order() {
        let recovery = Recovery::default();
        let parts = parts(&[5, u64::MAX]);
        assert!(recovery.take(&parts[0]).is_err(), "no proxy was asked");
        assert!(recovery.asks("a", version()));
        assert!(!recovery.asks("b", version()), "one at a time");
        assert!(recovery.take(&parts[1]).is_err(), "the rules come first");
        assert!(recovery.take(&parts[0]).unwrap().is_none());
        assert!(recovery.take(&parts[2]).is_err());
        assert!(recovery.take(&Part { version: Version { source: 1, seq: 3 }, ..parts[1].clone() }).is_err());
        assert!(recovery.take(&parts[1]).unwrap().is_none());
        assert!(recovery.asks("a", version()), "it begins again");
        assert!(recovery.take(&parts[2]).is_err());
        for part in &parts[..2] {
            assert!(recovery.take(part).unwrap().is_none());
        }
        let enforced = recovery.take(&parts[2]).unwrap().unwrap();
        assert_eq!(enforced.revoked, [Fingerprint(5), Fingerprint(u64::MAX)]);
        assert!(!recovery.asks("a", version()), "it is being taken in");
    }

    #[test]
    fn what_is_no_part_of_a_state_is_refused() {
        let recovery = Recovery::default();
        let parts = parts(&[5]);
        assert!(recovery.asks("a", version()));
        assert!(recovery.take(&Part { bytes: b"{}".to_vec(), ..parts[0].clone() }).is_err());
        assert!(recovery.take(&parts[0]).is_ok());
        assert!(recovery.take(&Part { bytes: b"no shard".to_vec(), ..parts[1].clone() }).is_err());
        let other = Part { bytes: parts[2].bytes.clone(), ..parts[1].clone() };
        assert!(recovery.take(&other).is_err(), "another shard than it says");
    }
}
