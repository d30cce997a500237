//! Copies of keys' records that are missing in Redis, as after an operator's `DEL api_key:v2:<key id>`: written again. Such a
//! deletion revokes nothing; it is journalled as refused, with what does.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::revoked::{ACTOR, UnionError};
use super::session::{Evicted, Session, SessionError};
use super::{names, pace, projection};
use crate::durability::writer::CommitError;
use crate::model::author::Author;
use crate::model::change::Change;
use crate::peers::Peers as _;

/// Time between two looks in a small Redis.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Copies that are written at a time.
const AT_A_TIME: usize = 500;
/// More that are missing at once were not deleted by hand, one by one.
const MAX_REFUSED: usize = 100;
/// The word for them in metrics.
pub(super) const METRIC: &str = "api_key:v2:<key id>";

/// State of the looks.
#[derive(Debug, Default)]
pub struct Copies {
    next: Option<Instant>,
    /// Number of keys that each master had evicted at the last look.
    evicted: Evicted,
}

impl Session<'_> {
    /// Writes copies again that are missing, if it is time to look; one control plane does.
    pub async fn look_at_copies(&mut self) -> Result<(), SessionError> {
        let now = Instant::now();
        if self.copies.next.is_some_and(|next| now < next) || !self.redis.holds_lease() {
            return Ok(());
        }
        self.copies.next = Some(now + pace::pause(&self.reading, LOOK_EVERY).await?);
        let (store, now_s) = (Arc::clone(&self.node.store), self.node.clock.now_s());
        let unexpired = tokio::task::spawn_blocking(move || store.unexpired(now_s));
        let mut missing: HashSet<String> =
            unexpired.await.map_err(|_| CommitError::Stopped)?.map_err(UnionError::from)?;
        // Each of them was written there, or tried to be, if all is that was journalled by now.
        let last = *self.node.feed.last().borrow();
        if self.redis.status.borrow().tried < last {
            self.copies.next = None;
            return Ok(());
        }
        let prefix = names::key("");
        self.reading
            .scan(&names::key("*"), &mut |found| {
                for name in found {
                    missing.remove(name.strip_prefix(&prefix).unwrap_or_default());
                }
            })
            .await?;
        self.write_copies(missing.into_iter().collect()).await
    }

    async fn write_copies(&mut self, missing: Vec<String>) -> Result<(), SessionError> {
        let mut written = Vec::new();
        let now = self.node.clock.now_s();
        for ids in missing.chunks(AT_A_TIME) {
            let mut commands = Vec::new();
            for id in ids {
                let record = self.node.store.key(id).ok().flatten();
                let write = record.and_then(|record| projection::key(&record, now));
                for mut command in write.iter().flat_map(|write| write.commands(self.writing.is_cluster())) {
                    // What was written meanwhile is newer.
                    command.arg("NX");
                    commands.push((id, command));
                }
            }
            let answers = self
                .writing
                .pipeline(&commands.iter().map(|(_, command)| command.clone()).collect::<Vec<_>>())
                .await?;
            for ((id, _), answer) in commands.iter().zip(answers) {
                match answer {
                    Ok(redis::Value::Okay) => written.push((*id).clone()),
                    // It is there by now.
                    Ok(_) => {}
                    Err(error) if !error.must_reconnect() => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        self.check().await?;
        let were_evicted = self.evicted != self.copies.evicted;
        self.copies.evicted = self.evicted.clone();
        if written.is_empty() {
            return Ok(());
        }
        tracing::warn!(
            copies = written.len(),
            "copies of keys were missing in Redis and are written again; deleting one revokes nothing, SET revoke:<key id> does"
        );
        if were_evicted || written.len() > MAX_REFUSED {
            return Ok(());
        }
        self.node.metrics.redis.edits.with([METRIC, "refused"]).inc_by(written.len() as u64);
        let refused = written.iter().map(|id| Change::EditRefused {
            key: names::key(id),
            problem: format!("deleting a copy revokes nothing; to revoke: SET revoke:{id} <reason>"),
        });
        let refused: Vec<Change> = refused.collect();
        self.node.writer.commit(&Author::part(ACTOR), move |_| Ok((refused, ()))).await?;
        Ok(())
    }
}
