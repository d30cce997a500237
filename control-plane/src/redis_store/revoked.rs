//! The revocations in Redis and those here, united. What Redis lacks is written again; what somebody put there by
//! hand is revoked here too; what belongs to keys that have expired is taken away.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use keygate_core::revocation::{Fingerprint, Revocations as _, Standing};
use keygate_core::token::is_identifier;

use super::error::LinkError;
use super::link::Link;
use super::projection::Write;
use super::{log, names};
use crate::durability::store::{Store, StoreError};
use crate::durability::writer::CommitError;
use crate::model::author::Author;
use crate::model::commands::keys::{self, Batch, Outcome};
use crate::model::key::RevocationReason;
use crate::model::{RecordsError, View};
use crate::node::Node;

/// Members that are read or written at a time.
const AT_A_TIME: usize = 1_000;
/// In whose name.
pub const ACTOR: &str = "redis";

/// Why revocations cannot be united.
#[derive(Debug, thiserror::Error)]
pub enum UnionError {
    /// Redis.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The records cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// The journal.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// What is compared with what is revoked here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// The set.
    Set,
    /// Also the single keys of what is revoked here.
    OwnKeys,
    /// Also all single keys, which takes a look at every key of Redis.
    AllKeys,
}

/// What was done.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct United {
    /// Revoked here, since somebody had put them there.
    pub taken: usize,
    /// Written there again.
    pub written: usize,
    /// Taken away there, since they have expired.
    pub forgotten: usize,
    /// Not revoked here yet: another control plane may have put them there, whose log says so soon.
    pub waiting: usize,
}

/// Revocations that were met in Redis and not in a log, and since when.
#[derive(Debug, Default)]
pub struct Met(HashMap<String, Instant>);

impl Met {
    /// Lets those through that have waited long enough; how many wait.
    fn hold_back(
        &mut self,
        unknown: &mut Vec<String>,
        may_wait: impl Fn(&String) -> bool,
        within: Duration,
    ) -> usize {
        let still: HashSet<&String> = unknown.iter().collect();
        self.0.retain(|jti, _| still.contains(jti));
        let all = unknown.len();
        unknown.retain(|jti| {
            !may_wait(jti) || self.0.entry(jti.clone()).or_insert_with(Instant::now).elapsed() >= within
        });
        all.saturating_sub(unknown.len())
    }
}

/// How many members the set has.
///
/// # Errors
/// When Redis cannot be asked.
pub async fn count(link: &Link) -> Result<u64, LinkError> {
    let mut command = redis::cmd("SCARD");
    command.arg(names::REVOKED_SET);
    match link.query(&command).await {
        Err(LinkError::WrongType) => Ok(0),
        answer => answer,
    }
}

/// Unites what stands in Redis, to an extent, with what is revoked here. `may_forget`: takes away what has expired
/// and what is no token's id; one control plane at a time does. What another control plane revokes stands there before
/// it stands in its log, with a single key: for so long, `within`, it is waited for.
///
/// # Errors
/// See [`UnionError`].
pub async fn unite(
    node: &Arc<Node>,
    link: &Link,
    extent: Extent,
    may_forget: bool,
    (met, within): (&mut Met, Duration),
) -> Result<United, UnionError> {
    let mut there = members(link).await?;
    let mut unknown: Vec<String> = Vec::new();
    let mut expired: Vec<String> = Vec::new();
    let mut single: Option<HashSet<String>> = None;
    if extent == Extent::AllKeys {
        let found = single.insert(HashSet::new());
        let jti = |key: String| key.strip_prefix(names::REVOKED_PREFIX).map(str::to_owned);
        link.scan(&names::revoked("*"), &mut |keys| found.extend(keys.into_iter().filter_map(jti))).await?;
        unknown.extend(found.iter().filter(|jti| !there.contains(*jti) && !is_revoked(node, jti)).cloned());
    }
    for jti in there.iter().filter(|jti| !is_revoked(node, jti)) {
        match node.store.revoked_until(jti)? {
            Some(_) => expired.push(jti.clone()),
            None if !is_identifier(jti) => expired.push(jti.clone()),
            None => unknown.push(jti.clone()),
        }
    }
    // A single key ends by the clock of Redis. Where this one's is far ahead it has forgotten what others have not,
    // and must neither take it for new nor take it away.
    let from = node.state().rules.expired_until.max(node.clock.now_s()).saturating_add(1);
    let known_ends = ends_of(link, &unknown).await?;
    unknown.retain(|jti| known_ends.get(jti).is_none_or(|end| *end >= from));
    let ends = ends_of(link, &expired).await?;
    expired.retain(|jti| !ends.contains_key(jti));
    let may_wait = |jti: &String| there.contains(jti) && known_ends.contains_key(jti);
    let waiting = met.hold_back(&mut unknown, may_wait, within);
    let mut united = United { waiting, ..United::default() };
    for jtis in unknown.chunks(AT_A_TIME) {
        let jtis: Vec<String> = jtis.iter().filter(|jti| is_identifier(jti)).cloned().collect();
        united.taken += take(node, jtis).await?;
    }
    if may_forget {
        for jtis in expired.chunks(AT_A_TIME) {
            log::write_keys(link, &Write::Forget { jtis: jtis.to_vec() }.commands(link.is_cluster())).await?;
            there.retain(|jti| !jtis.contains(jti));
        }
        united.forgotten = expired.len();
    }
    let store = Arc::clone(&node.store);
    let here = tokio::task::spawn_blocking(move || store.revoked_within(from, u64::MAX));
    let here = here.await.map_err(|_| CommitError::Stopped)??;
    if extent == Extent::OwnKeys {
        single = Some(ends_of(link, &here).await?.into_keys().collect());
    }
    let stands = |jti: &String| there.contains(jti) && single.as_ref().is_none_or(|keys| keys.contains(jti));
    let missing: Vec<String> = here.into_iter().filter(|jti| !stands(jti)).collect();
    for jtis in missing.chunks(AT_A_TIME) {
        write_again(link, &node.store, jtis).await?;
    }
    united.written = missing.len();
    Ok(united)
}

/// Writes revocations of which only the ids are at hand; what Redis says of one stays.
///
/// # Errors
/// See [`UnionError`].
pub async fn write_again(link: &Link, store: &Store, jtis: &[String]) -> Result<(), UnionError> {
    let mut commands = Vec::new();
    for jti in jtis {
        let Some(until) = store.revoked_until(jti)? else { continue };
        let text = serde_json::json!({ "jti": jti }).to_string();
        commands.extend(Write::RevokeIfMissing { jti: jti.clone(), text, until }.commands(link.is_cluster()));
    }
    Ok(log::write_keys(link, &commands).await?)
}

/// Those of these ids that have a key of their own, and when it ends, Unix seconds.
async fn ends_of(link: &Link, jtis: &[String]) -> Result<HashMap<String, u64>, LinkError> {
    let mut ends = HashMap::new();
    let (now, _): (u64, u64) = link.query(&redis::cmd("TIME")).await?;
    for jtis in jtis.chunks(AT_A_TIME) {
        let ask = |jti: &String| {
            let mut ask = redis::cmd("TTL");
            ask.arg(names::revoked(jti));
            ask
        };
        let commands: Vec<_> = jtis.iter().map(ask).collect();
        for (jti, answer) in jtis.iter().zip(link.pipeline(&commands).await?) {
            match answer? {
                redis::Value::Int(-1) => drop(ends.insert(jti.clone(), u64::MAX)),
                redis::Value::Int(ttl @ 0..) => {
                    ends.insert(jti.clone(), now.saturating_add(ttl.unsigned_abs()));
                }
                _ => {}
            }
        }
    }
    Ok(ends)
}

async fn members(link: &Link) -> Result<HashSet<String>, LinkError> {
    let (mut members, mut cursor) = (HashSet::new(), 0_u64);
    loop {
        let mut command = redis::cmd("SSCAN");
        command.arg(names::REVOKED_SET).arg(cursor).arg("COUNT").arg(AT_A_TIME);
        let (next, found): (u64, Vec<String>) = match link.query(&command).await {
            Err(LinkError::WrongType) => return Ok(HashSet::new()),
            answer => answer?,
        };
        members.extend(found);
        cursor = next;
        if cursor == 0 {
            return Ok(members);
        }
    }
}

fn is_revoked(node: &Node, jti: &str) -> bool {
    (&node.state().revocations).standing(Fingerprint::of(jti)) == Standing::Revoked
}

/// Revokes what somebody put into Redis by hand; how many.
async fn take(node: &Node, jtis: Vec<String>) -> Result<usize, UnionError> {
    if jtis.is_empty() {
        return Ok(0);
    }
    let batch = Batch { key_ids: Vec::new(), jtis, reason: RevocationReason::AdminAction };
    let command = move |view: &View<'_>| keys::revoke_many(view, &batch, ACTOR);
    let (receipt, _) = node.writer.submit(&Author::part(ACTOR), command).await??;
    let taken = receipt.count(Outcome::Revoked) + receipt.count(Outcome::RevokedUnseen);
    if taken > 0 {
        tracing::warn!(taken, "revocations that were put into Redis by hand are in force");
    }
    Ok(taken)
}
