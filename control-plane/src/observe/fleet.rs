//! The proxies: who they are, what they enforce, and waiting until all of them enforce a version.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use keygate_core::sync::wire::{self, Poll};
use keygate_core::version::Version;
use serde::Serialize;
use tokio::sync::watch;

use crate::durability::store::{Store, StoreError};
use crate::model::state::{Deltas, State};

/// A proxy that was not heard of for this long is forgotten, unless the hard age is longer.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// A proxy that does not ask for this long, while another has its id, is gone. Between two polls there are
/// 2 ms, after a failure up to 1 s.
const GONE_AFTER: Duration = Duration::from_secs(2);
/// The most proxies kept; beyond, the one heard of longest ago is forgotten.
const MAX_PROXIES: usize = 10_000;

/// The fleet.
#[derive(Debug)]
pub struct Fleet {
    proxies: Mutex<HashMap<Id, Entry>>,
    changes: watch::Sender<u64>,
    store: Arc<Store>,
}

/// A process: its node id and the number that it drew at its start.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Id {
    proxy: String,
    incarnation: String,
}

#[derive(Debug)]
struct Entry {
    poll: Poll,
    /// When the last poll came. What the proxy enforces was the newest at most until then, so it stops
    /// serving at the latest one hard age after.
    heard: Instant,
    heard_ms: u64,
    joined: Instant,
    applied_since: Instant,
    lag: Option<Duration>,
    /// Since when it enforces changes that are lacking here, so that nothing from here reaches it.
    ahead_since: Option<Instant>,
    polling: u32,
    /// When it last stopped waiting for news.
    left: Instant,
}

impl Entry {
    fn new(poll: Poll, now: Instant, now_ms: u64) -> Self {
        Self {
            poll,
            heard: now,
            heard_ms: now_ms,
            joined: now,
            applied_since: now,
            lag: None,
            ahead_since: None,
            polling: 0,
            left: now,
        }
    }
}

impl Entry {
    /// Whether it asks for news, so that its process is surely alive.
    fn asks(&self, now: Instant) -> bool {
        self.polling > 0 || now.duration_since(self.left) < GONE_AFTER
    }
}

/// A proxy, for operators.
#[derive(Debug, Serialize)]
pub struct ProxyView {
    /// Envoy's node id.
    pub id: String,
    /// Envoy's node cluster.
    pub cluster: String,
    /// Tells a restarted proxy from the one before.
    pub incarnation: String,
    /// The version that it enforces.
    pub version: Option<Version>,
    /// Whether that is the newest.
    pub current: bool,
    /// Milliseconds from the publication of that version to its acknowledgement.
    pub lag_ms: Option<u64>,
    /// When it was last heard of.
    pub last_seen: String,
    /// Seconds since.
    pub last_seen_age_s: u64,
    /// Whether it waits for news right now.
    pub connected: bool,
    /// Whether it enforces a newer state than this control plane has.
    pub ahead: bool,
    /// Whether it was silent for longer than the hard age, and so answers 503.
    pub stale: bool,
    /// Its VMs: workers and the main thread.
    pub workers: u32,
    /// VMs that were ever started; more than `workers` after traps or a new configuration.
    pub vm_starts: u64,
    /// Memory of its largest VM, in bytes.
    pub vm_memory_bytes: u64,
    /// The filter's version.
    pub filter: String,
    /// Answers that it refused.
    pub refused_answers: u64,
    /// Calls of it that had no answer, or a refusal.
    pub failed_calls: u64,
    /// The last reason for either.
    pub last_error: Option<String>,
    /// Whether it was drained, and so refuses limited keys; a new process of it does not.
    pub drained: bool,
    /// Whether another process with the same id is alive. Give each Envoy an id of its own.
    pub duplicate_id: bool,
}

/// How the proxies fare together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Those that were heard of within the hard age.
    pub live: usize,
    /// Those of them that do not enforce the newest version yet.
    pub behind: usize,
    /// For how long the one has been behind that has been so for longest; zero when none is.
    pub lag: Duration,
    /// Those that were silent for longer than the hard age, and so answer 503, and are not forgotten yet.
    pub stale: usize,
}

/// How far a version has got.
#[derive(Debug, Serialize)]
pub struct Propagation {
    /// The version.
    pub version: Version,
    /// Proxies that enforce it, or serve no keys any more.
    pub applied: usize,
    /// Proxies there are.
    pub total: usize,
    /// Milliseconds from the change to the acknowledgement of the slowest of those that enforce it.
    pub max_lag_ms: u64,
    /// The ids of the others.
    pub missing: Vec<String>,
}

/// Says that a proxy waits for news, until dropped.
pub struct Polling {
    fleet: Arc<Fleet>,
    id: Id,
    /// For how long the proxy has enforced changes that are lacking here.
    pub ahead_for: Duration,
}

impl Drop for Polling {
    fn drop(&mut self) {
        if let Some(entry) = self.fleet.lock().get_mut(&self.id) {
            entry.polling = entry.polling.saturating_sub(1);
            entry.left = Instant::now();
        }
    }
}

impl Fleet {
    /// Those that were there when this control plane stopped. One that does not come back may be cut off and
    /// still serve keys, so it is waited for until its hard age has passed, counted from now.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn open(store: Arc<Store>, now_ms: u64) -> Result<Arc<Self>, StoreError> {
        let now = Instant::now();
        let names = store.fleet()?;
        let known = names.iter().filter_map(|name| {
            let (incarnation, proxy) = name.split_once(' ')?;
            let poll = Poll {
                format: wire::FORMAT,
                proxy: wire::Proxy {
                    id: proxy.into(),
                    cluster: String::new(),
                    incarnation: incarnation.into(),
                    filter: String::new(),
                    workers: 0,
                    vm_starts: 0,
                    vm_memory_bytes: 0,
                },
                applied: None,
                wait_ms: 0,
                resync: false,
                refused_answers: 0,
                failed_calls: 0,
                last_error: None,
            };
            let mut entry = Entry::new(poll, now, now_ms);
            entry.left = now.checked_sub(GONE_AFTER).unwrap_or(now); // It does not ask this process yet.
            Some((Id { proxy: proxy.into(), incarnation: incarnation.into() }, entry))
        });
        let proxies = Mutex::new(known.collect());
        Ok(Arc::new(Self { proxies, changes: watch::Sender::new(0), store }))
    }

    /// Keeps who is there, when that has changed.
    fn keep(&self) {
        let names: Vec<String> =
            self.lock().keys().map(|id| format!("{} {}", id.incarnation, id.proxy)).collect();
        if let Err(error) = self.store.keep_fleet(&names) {
            tracing::error!(%error, "the fleet cannot be kept; after a restart a silent proxy may be missed");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Id, Entry>> {
        self.proxies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a poll, and whether the proxy enforces what is lacking here; keep what it returns for as long as
    /// the poll is held back.
    pub fn heard(self: &Arc<Self>, poll: Poll, state: &State, ahead: bool, now_ms: u64) -> Polling {
        let now = Instant::now();
        let id = Id { proxy: poll.proxy.id.clone(), incarnation: poll.proxy.incarnation.clone() };
        let mut proxies = self.lock();
        let (known, count) = (proxies.contains_key(&id), proxies.len());
        // Node ids are unique, so a new process under an id means that the one before is gone; unless
        // that one still asks for news, in which case both are waited for.
        proxies.retain(|other, entry| {
            other.proxy != id.proxy || other.incarnation == id.incarnation || entry.asks(now)
        });
        proxies.retain(|_, entry| now.duration_since(entry.heard) < forget_after(state));
        if proxies.len() >= MAX_PROXIES
            && !proxies.contains_key(&id)
            && let Some(oldest) =
                proxies.iter().min_by_key(|(_, entry)| entry.heard).map(|(id, _)| id.clone())
        {
            proxies.remove(&oldest);
        }
        let entry = proxies.entry(id.clone()).or_insert_with(|| {
            let silent = Poll { applied: None, ..poll.clone() };
            Entry::new(silent, now, now_ms)
        });
        if entry.poll.applied != poll.applied {
            entry.applied_since = now;
            // A proxy that joins late is not behind for the time before.
            let due = state.published.max(entry.joined);
            entry.lag = (poll.applied == Some(state.version)).then(|| now.saturating_duration_since(due));
        }
        entry.ahead_since = ahead.then(|| entry.ahead_since.unwrap_or(now));
        let ahead_for = entry.ahead_since.map_or(Duration::ZERO, |since| now.duration_since(since));
        entry.poll = poll;
        entry.heard = now;
        entry.heard_ms = now_ms;
        entry.polling = entry.polling.saturating_add(1);
        let changed = !known || proxies.len() != count;
        drop(proxies);
        if changed {
            self.keep();
        }
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        Polling { fleet: Arc::clone(self), id, ahead_for }
    }

    /// Every proxy, by id.
    pub fn view(&self, state: &State) -> Vec<ProxyView> {
        let now = Instant::now();
        let known = self.lock();
        let mut asking: HashMap<&str, usize> = HashMap::new();
        for (id, _) in known.iter().filter(|(_, entry)| entry.asks(now)) {
            *asking.entry(&id.proxy).or_default() += 1;
        }
        let mut proxies: Vec<ProxyView> = known
            .iter()
            .filter(|(_, entry)| now.duration_since(entry.heard) < forget_after(state))
            .map(|(id, entry)| {
                let age = now.duration_since(entry.heard);
                ProxyView {
                    id: id.proxy.clone(),
                    cluster: entry.poll.proxy.cluster.clone(),
                    incarnation: id.incarnation.clone(),
                    version: entry.poll.applied,
                    current: entry.poll.applied == Some(state.version),
                    lag_ms: entry.lag.map(millis),
                    last_seen: crate::platform::clock::rfc3339_ms(entry.heard_ms),
                    last_seen_age_s: age.as_secs(),
                    connected: entry.polling > 0,
                    ahead: entry.ahead_since.is_some(),
                    stale: age > hard_age(state),
                    workers: entry.poll.proxy.workers,
                    vm_starts: entry.poll.proxy.vm_starts,
                    vm_memory_bytes: entry.poll.proxy.vm_memory_bytes,
                    filter: entry.poll.proxy.filter.clone(),
                    refused_answers: entry.poll.refused_answers,
                    failed_calls: entry.poll.failed_calls,
                    last_error: entry.poll.last_error.clone(),
                    drained: false,
                    duplicate_id: asking.get(id.proxy.as_str()).is_some_and(|alive| *alive > 1),
                }
            })
            .collect();
        drop(known);
        proxies.sort_by(|a, b| (&a.id, &a.incarnation).cmp(&(&b.id, &b.incarnation)));
        proxies
    }

    /// Waits until every proxy that was heard of within the hard age enforces `version`, or has been
    /// silent for the hard age and so serves no keys any more, or the time is up. Lag counts from `since`.
    pub async fn wait_applied(
        &self,
        version: Version,
        state: &State,
        since: Instant,
        timeout: Duration,
    ) -> Propagation {
        let deadline = tokio::time::Instant::now() + timeout;
        let mut changes = self.changes.subscribe();
        // Those that may serve keys at this moment; one that comes later has this version or a newer one.
        let waited_for: Vec<Id> = {
            let now = Instant::now();
            let proxies = self.lock();
            proxies
                .iter()
                .filter(|(_, entry)| {
                    now.duration_since(entry.heard) <= hard_age(state) || state.rules.policy.allows_stale()
                })
                .map(|(id, _)| id.clone())
                .collect()
        };
        loop {
            changes.mark_unchanged();
            let (propagation, next_silence) = self.propagation(version, state, since, &waited_for);
            if propagation.missing.is_empty() {
                return propagation;
            }
            let wake = next_silence.map_or(deadline, |silence| deadline.min(silence));
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(wake) => {
                    if wake == deadline {
                        return self.propagation(version, state, since, &waited_for).0;
                    }
                }
            }
        }
    }

    fn propagation(
        &self,
        version: Version,
        state: &State,
        since: Instant,
        waited_for: &[Id],
    ) -> (Propagation, Option<tokio::time::Instant>) {
        let now = Instant::now();
        let proxies = self.lock();
        let mut propagation =
            Propagation { version, applied: 0, total: waited_for.len(), max_lag_ms: 0, missing: Vec::new() };
        let mut next_silence: Option<tokio::time::Instant> = None;
        for id in waited_for {
            let Some(entry) = proxies.get(id) else {
                // Gone: made way for its own successor, which is waited for if it was there; or forgotten.
                if proxies.keys().any(|other| other.proxy == id.proxy) {
                    propagation.applied += 1;
                } else {
                    propagation.missing.push(id.proxy.clone());
                }
                continue;
            };
            let reaches = |applied: Version| applied.source == version.source && applied.seq >= version.seq;
            if entry.ahead_since.is_none() && entry.poll.applied.is_some_and(reaches) {
                let lag = entry.applied_since.saturating_duration_since(since);
                propagation.max_lag_ms = propagation.max_lag_ms.max(millis(lag));
                propagation.applied += 1;
                continue;
            }
            // A route that goes on without news would still let a revoked key pass.
            let silence = entry.heard + hard_age(state);
            if now > silence && !state.rules.policy.allows_stale() {
                propagation.applied += 1;
                continue;
            }
            if now <= silence && !state.rules.policy.allows_stale() {
                let silence = tokio::time::Instant::from_std(silence + Duration::from_millis(1));
                next_silence = Some(next_silence.map_or(silence, |next| next.min(silence)));
            }
            propagation.missing.push(id.proxy.clone());
        }
        propagation.missing.sort();
        (propagation, next_silence)
    }

    /// The proxies that may serve keys and do not enforce `version` yet: heard of within the hard age, whatever the
    /// policy says of stale routes.
    pub fn lacking(&self, version: Version, state: &State) -> Vec<String> {
        let now = Instant::now();
        let proxies = self.lock();
        let lacks = |entry: &Entry| {
            let reaches = |applied: Version| applied.source == version.source && applied.seq >= version.seq;
            entry.ahead_since.is_some() || !entry.poll.applied.is_some_and(reaches)
        };
        let mut lacking: Vec<String> = proxies
            .iter()
            .filter(|(_, entry)| now.duration_since(entry.heard) <= hard_age(state) && lacks(entry))
            .map(|(id, _)| id.proxy.clone())
            .collect();
        lacking.sort();
        lacking
    }

    /// The ids of the proxies that were heard of within the hard age. A new process with an id means that the one before is
    /// gone.
    pub fn live(&self, state: &State) -> BTreeSet<String> {
        let now = Instant::now();
        let proxies = self.lock();
        let live = proxies.iter().filter(|(_, entry)| now.duration_since(entry.heard) <= hard_age(state));
        live.map(|(id, _)| id.proxy.clone()).collect()
    }

    /// Changes each time that a proxy was heard.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// How they fare together.
    pub fn summary(&self, state: &State, deltas: &Deltas) -> Summary {
        let now = Instant::now();
        let mut summary = Summary::default();
        for entry in self.lock().values() {
            if now.duration_since(entry.heard) > hard_age(state) {
                summary.stale += 1;
                continue;
            }
            summary.live += 1;
            if entry.poll.applied != Some(state.version) {
                summary.behind += 1;
                // One that joins late is not behind for the time before.
                let since = deltas.lacking_since(state, entry.poll.applied).max(entry.joined);
                summary.lag = summary.lag.max(now.saturating_duration_since(since));
            }
        }
        summary
    }
}

/// For how long a silent proxy stays in the list.
fn forget_after(state: &State) -> Duration {
    FORGET_AFTER.max(2 * hard_age(state))
}

fn hard_age(state: &State) -> Duration {
    Duration::from_secs(state.rules.hard_age_s)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
