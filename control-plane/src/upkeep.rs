//! Maintenance: forgets revocations of keys that have expired, has proxies reload the revocation set when its number of
//! shards changes, and compresses and prunes the journal.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::change::Change;
use crate::clock;
use crate::journal;
use crate::node::Node;
use crate::writer::{CommitError, Committed, View};

/// Time between two clean-ups of expired keys. Each one makes a new version for the fleet.
const CLEAN_UP_EVERY: Duration = Duration::from_secs(5 * 60);
/// Time between two searches for old segments of the journal.
const PRUNE_EVERY: Duration = Duration::from_secs(24 * 60 * 60);
const A_DAY_S: u64 = 24 * 60 * 60;
/// Actor of these changes in the journal.
const ACTOR: &str = "system";

/// Result of a clean-up.
#[derive(Debug, Clone, Copy)]
pub struct CleanedUp {
    /// Revocations and suspensions that were dropped.
    pub forgotten: usize,
    /// Those that are left.
    pub remaining: usize,
    /// Keys whose `exp` is not later have expired for good. Unix seconds.
    pub until: u64,
}

/// Forgets what is known of keys that have expired.
///
/// # Errors
/// When the journal cannot be written.
pub async fn clean_up(node: &Node, actor: &str) -> Result<(CleanedUp, Committed), CommitError> {
    let now_ms = node
        .cautious_clock
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .at(node.clock.now_ms(), Instant::now());
    // With leeway, a key counts for a while after its expiry.
    let until = (now_ms / 1_000).saturating_sub(node.config.leeway.as_secs());
    let plan = move |view: &View<'_>| {
        let model = view.model;
        let forgotten = model.due(until);
        let spent: Vec<_> = model.spent_cutoffs(until).collect();
        let mut changes = Vec::new();
        // Now and then also for the records of keys that were never revoked.
        let long_ago = until >= model.expired_until().saturating_add(A_DAY_S);
        if forgotten > 0 || !spent.is_empty() || long_ago {
            changes.push(Change::ExpiredForgotten { until });
            changes.extend(spent.iter().map(|cutoff| Change::CutoffLifted { id: cutoff.id.clone() }));
        }
        let remaining = model.revocations().len().saturating_sub(forgotten);
        let until = if changes.is_empty() { model.expired_until() } else { until };
        (changes, CleanedUp { forgotten, remaining, until })
    };
    node.writer.commit(actor, plan).await
}

/// Has every proxy reload the revocation set.
///
/// # Errors
/// When the journal cannot be written.
pub async fn rebuild(node: &Node, actor: &str) -> Result<Committed, CommitError> {
    let plan = |_: &View<'_>| (vec![Change::RevocationsRebuilt {}], ());
    let ((), committed) = node.writer.commit(actor, plan).await?;
    Ok(committed)
}

/// Runs maintenance until the control plane stops.
pub async fn run(node: Arc<Node>) {
    let mut stopping = node.stopping.clone();
    let mut states = node.states.clone();
    let mut cut = states.borrow_and_update().revocations.bits();
    let mut clean_up_at = tokio::time::Instant::now() + CLEAN_UP_EVERY;
    let mut prune_at = clean_up_at;
    loop {
        let done = tokio::select! {
            () = stopped(&mut stopping) => return,
            changed = states.changed() => {
                let bits = states.borrow_and_update().revocations.bits();
                match changed {
                    Err(_) => return,
                    Ok(()) if bits == cut => continue,
                    Ok(()) => {
                        tracing::info!(shards = 1_u32 << bits, "the number of shards of the revocation set was changed for its size");
                        rebuild(&node, ACTOR).await.map(|_| cut = bits)
                    }
                }
            }
            () = tokio::time::sleep_until(clean_up_at) => {
                clean_up_at += CLEAN_UP_EVERY;
                if node.writer.status().reserve_ok {
                    compress_journal(&node).await;
                }
                if clean_up_at >= prune_at {
                    prune_at += PRUNE_EVERY;
                    prune_journal(&node).await;
                }
                clean_up(&node, ACTOR).await.map(|(cleaned, _)| if cleaned.forgotten > 0 {
                    tracing::info!(forgotten = cleaned.forgotten, remaining = cleaned.remaining, "expired keys were forgotten");
                })
            }
        };
        if let Err(error) = done {
            tracing::error!(%error, "upkeep failed; it is tried again");
        }
    }
}

/// Compresses the segments of the journal that are sealed.
async fn compress_journal(node: &Node) {
    let dir = node.config.journal_dir();
    match tokio::task::spawn_blocking(move || journal::compress_sealed(&dir)).await {
        Ok(Err(error)) => tracing::error!(%error, "a sealed segment of the journal cannot be compressed"),
        Ok(Ok(segments @ 1..)) => tracing::info!(segments, "sealed segments of the journal were compressed"),
        Ok(Ok(0)) | Err(_) => {}
    }
}

/// Removes the segments of the journal that are older than records are kept.
async fn prune_journal(node: &Arc<Node>) {
    let here = Arc::clone(node);
    let pruned = tokio::task::spawn_blocking(move || {
        let kept_ms = u64::try_from(here.config.retention.as_millis()).unwrap_or(u64::MAX);
        // By a clock that does not jump ahead: what is removed is gone.
        let now_ms = here
            .cautious_clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .at(here.clock.now_ms(), Instant::now());
        let before = clock::rfc3339_ms(now_ms.saturating_sub(kept_ms));
        let expired_until = here.state().rules.expired_until;
        journal::prune(&here.config.journal_dir(), &here.notary, &before, expired_until)
    });
    match pruned.await {
        Ok(Err(error)) => tracing::error!(%error, "old segments of the journal cannot be removed"),
        Ok(Ok(segments @ 1..)) => tracing::info!(segments, "old segments of the journal were removed"),
        Ok(Ok(0)) | Err(_) => {}
    }
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _sender_gone = stopping.wait_for(|stop| *stop).await;
}
