//! Maintenance: forgets revocations of keys that have expired, has proxies reload the revocation set when its number of
//! shards changes, and compresses and prunes the journal.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::durability::journal;
use crate::durability::writer::{CommitError, Committed};
use crate::model::View;
use crate::model::author::Author;
use crate::model::commands::revocations::{self as commands, CleanedUp};
use crate::node::Node;
use crate::platform::clock;

/// Time between two clean-ups of expired keys. Each one makes a new version for the fleet.
const CLEAN_UP_EVERY: Duration = Duration::from_secs(5 * 60);
/// Time between two searches for old segments of the journal.
const PRUNE_EVERY: Duration = Duration::from_secs(24 * 60 * 60);
/// Actor of these changes in the journal.
const ACTOR: &str = "system";

/// Forgets what is known of keys that have expired.
///
/// # Errors
/// When the journal cannot be written.
pub async fn clean_up(node: &Node, author: &Author) -> Result<(CleanedUp, Committed), CommitError> {
    let now_ms = node
        .cautious_clock
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .at(node.clock.now_ms(), Instant::now());
    // With leeway, a key counts for a while after its expiry.
    let until = (now_ms / 1_000).saturating_sub(node.config.leeway.as_secs());
    node.writer.commit(author, move |view: &View<'_>| commands::forget_expired(view, until)).await
}

/// Has every proxy reload the revocation set.
///
/// # Errors
/// When the journal cannot be written.
pub async fn rebuild(node: &Node, author: &Author) -> Result<Committed, CommitError> {
    let ((), committed) = node.writer.commit(author, commands::rebuild).await?;
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
                        rebuild(&node, &Author::part(ACTOR)).await.map(|_| cut = bits)
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
                clean_up(&node, &Author::part(ACTOR)).await.map(|(cleaned, _)| if cleaned.forgotten > 0 {
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
