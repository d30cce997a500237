//! The rollout's document in Redis, with what all control planes have counted. It is written by the one that leads, and
//! no more often than every two seconds for its counts alone.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::session::{Session, SessionError};
use super::{RedisPeers, names};
use crate::model::rollout::document;
use crate::model::state::State;
use crate::node::Node;
use crate::observe::telemetry::tally::Tally;
use crate::platform::clock;

/// For so long a document is not written again for its counts.
const STANDS_FOR: Duration = Duration::from_secs(2);

/// What is known of the document.
#[derive(Debug, Default)]
pub struct Copy {
    /// What other control planes have counted.
    others: Tally,
    /// What was counted when the document was made, and when that last changed, Unix milliseconds.
    counted: Tally,
    changed_ms: u64,
    /// The stamp of the change that it shows, when it was made, and the text.
    made: Option<(u64, Instant, String)>,
}

impl RedisPeers {
    /// What other control planes have counted.
    pub fn counted_by_others(&self) -> Tally {
        self.rollout().others
    }

    /// The document that should stand in Redis.
    pub fn rollout_document(&self, node: &Node, state: &State) -> String {
        let mut copy = self.rollout();
        if let Some((stamp, at, text)) = &copy.made
            && *stamp == state.rollout_stamp
            && at.elapsed() < STANDS_FOR
        {
            return text.clone();
        }
        let counted = counted_here(node).plus(copy.others);
        if counted != copy.counted || copy.changed_ms == 0 {
            copy.counted = counted;
            copy.changed_ms = node.clock.now_ms();
        }
        let mut members = document::show(&state.flags, state.has_v1, node.clock.now_s());
        let mut metrics = counted.show();
        metrics["last_updated"] = clock::rfc3339_ms(copy.changed_ms).into();
        members.insert("metrics".into(), metrics);
        let text = serde_json::Value::Object(members).to_string();
        copy.made = Some((state.rollout_stamp, Instant::now(), text.clone()));
        text
    }

    fn rollout(&self) -> std::sync::MutexGuard<'_, Copy> {
        self.rollout.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Since the counts were begun anew.
fn counted_here(node: &Node) -> Tally {
    node.telemetry.tally().since(node.telemetry.rollout_reset().0)
}

impl Session<'_> {
    /// Tells the others what was counted here, and hears what was counted there.
    pub async fn share_counts(&self) -> Result<(), SessionError> {
        let own = format!("{:x}", self.node.state().version.source);
        let counted = serde_json::to_string(&counted_here(self.node)).unwrap_or_default();
        let mut set = redis::cmd("HSET");
        set.arg(names::ROLLOUT_COUNTS).arg(&own).arg(counted);
        match self.reading.query::<()>(&set).await {
            Ok(()) => {}
            Err(error) if error.must_reconnect() => return Err(error.into()),
            Err(_) => return Ok(()), // Redis takes no writes; that shows elsewhere.
        }
        let all: HashMap<String, String> =
            self.reading.query(redis::cmd("HGETALL").arg(names::ROLLOUT_COUNTS)).await?;
        let lives = |source: &String| self.redis.status().peers.iter().any(|peer| peer.source == *source);
        let others = all
            .iter()
            .filter(|(source, _)| **source != own && lives(source))
            .filter_map(|(_, text)| serde_json::from_str::<Tally>(text).ok())
            .fold(Tally::default(), Tally::plus);
        self.redis.rollout().others = others;
        Ok(())
    }
}
