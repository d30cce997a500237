//! The keys that operators edit by hand: looked at, and what was edited put in force or refused.

use std::collections::BTreeSet;
use std::time::Duration;

use super::edits::{self, Ours, Seen, Value, Verdict, Written};
use super::error::LinkError;
use super::names::{self, OperatorKey};
use super::revoked::ACTOR;
use super::scripts;
use super::session::{Session, SessionError};
use crate::model::View;
use crate::model::author::Author;
use crate::model::change::Change;
use crate::model::commands::{Expected, Plan, emergency, limits, rollout};
use crate::peers::Peers as _;

/// For how long one control plane has an edit to itself.
const CLAIM_FOR: Duration = Duration::from_secs(2);

impl Session<'_> {
    /// Looks at the keys that operators edit.
    pub async fn look_at_edits(&mut self) -> Result<(), SessionError> {
        for key in OperatorKey::ALL {
            let seen = self.see(key).await?;
            let ours = self.ours(key);
            match seen.judge(&ours) {
                Verdict::Same => self.note_standing(key),
                Verdict::Newer => {}
                // The counts in it are written by the one that leads.
                Verdict::Write
                    if key == OperatorKey::Flags && !self.redis.holds_lease() && seen.is_of(&ours) =>
                {
                    self.note_standing(key);
                }
                Verdict::Write => drop(self.put(key, &seen, &ours).await?),
                Verdict::Edited if seen.value == Value::None && self.was_evicted(key).await? => {
                    if self.put(key, &seen, &ours).await? {
                        self.note_standing(key);
                    }
                }
                Verdict::Edited => {
                    // Also in vain: one that cannot be written over now is dealt with once all the same.
                    let edit = (seen.digest.clone(), seen.written.as_ref().map(|written| written.stamp));
                    if self.dealt_with.get(&key) != Some(&edit) {
                        if !self.claim(key, &seen).await? {
                            continue;
                        }
                        self.honour(key, &seen).await?;
                    }
                    let ours = self.ours(key);
                    if self.put(key, &seen, &ours).await? {
                        self.dealt_with.remove(&key);
                    } else {
                        self.dealt_with.insert(key, edit);
                    }
                }
            }
        }
        Ok(())
    }

    fn ours(&self, key: OperatorKey) -> Ours {
        let state = self.node.state();
        match key {
            OperatorKey::Lockdown => edits::ours_lockdown(
                state.rules.lockdown.as_ref(),
                state.lockdown_stamp,
                self.node.clock.now_s(),
            ),
            OperatorKey::Flags => {
                let text = self.redis.rollout_document(self.node, &state);
                Ours { stamp: state.rollout_stamp, text: Some(text), until_ms: 0 }
            }
            OperatorKey::CanaryUsers => edits::ours_canary_users(&state.flags, state.rollout_stamp),
            OperatorKey::Limits => edits::ours_limits(
                state.limits_override.as_ref(),
                state.override_stamp,
                self.node.clock.now_s(),
            ),
        }
    }

    async fn see(&self, key: OperatorKey) -> Result<Seen, SessionError> {
        let mut look = redis::cmd("EVAL");
        look.arg(scripts::LOOK).arg(2).arg(key.name()).arg(names::written(key.name()));
        let (kind, text, ttl, digest, stamp, written, until, now_ms): (
            String,
            Vec<u8>,
            i64,
            String,
            String,
            String,
            String,
            u64,
        ) = self.reading.query(&look).await?;
        Ok(Seen {
            value: match kind.as_str() {
                "none" => Value::None,
                "string" => Value::Text(String::from_utf8_lossy(&text).into_owned()),
                // Redis writes some characters in another way, and may sort in another.
                "set" if key == OperatorKey::CanaryUsers => {
                    let users: BTreeSet<String> = serde_json::from_slice(&text).unwrap_or_default();
                    Value::Text(serde_json::json!(users).to_string())
                }
                _ => Value::Other(kind),
            },
            ttl_ms: u64::try_from(ttl).ok(),
            digest,
            written: stamp.parse().ok().map(|stamp| Written {
                stamp,
                digest: written,
                until_ms: until.parse().unwrap_or(0),
            }),
            now_ms,
        })
    }

    /// Writes what should stand there, unless somebody was faster; whether it was written.
    async fn put(&self, key: OperatorKey, seen: &Seen, ours: &Ours) -> Result<bool, SessionError> {
        let mut put = redis::cmd("EVAL");
        put.arg(scripts::PUT)
            .arg(3)
            .arg(key.name())
            .arg(names::written(key.name()))
            .arg(names::claim(key.name()));
        put.arg(&seen.digest).arg(ours.text.as_deref().unwrap_or("")).arg(ours.until_ms).arg(ours.stamp);
        put.arg(format!("{:x}", self.node.state().version.source));
        put.arg(if key.is_set() { "set" } else { "" });
        match self.reading.query::<u64>(&put).await {
            Ok(written) => Ok(written == 1),
            Err(error @ LinkError::WrongType) => Err(error.into()), // Made good by a new session.
            // It reads all the same; what cannot be written now is written when it can be.
            Err(error) if !error.must_reconnect() => {
                self.node.metrics.redis.errors.with([error.label()]).inc();
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it is for this control plane to deal with an edit; one does at a time.
    async fn claim(&self, key: OperatorKey, seen: &Seen) -> Result<bool, SessionError> {
        let mut claim = redis::cmd("EVAL");
        claim
            .arg(scripts::CLAIM)
            .arg(3)
            .arg(key.name())
            .arg(names::written(key.name()))
            .arg(names::claim(key.name()));
        claim.arg(&seen.digest);
        claim.arg(seen.written.as_ref().map_or_else(String::new, |written| written.stamp.to_string()));
        claim.arg(format!("{:x}", self.node.state().version.source));
        claim.arg(u64::try_from(CLAIM_FOR.as_millis()).unwrap_or(u64::MAX));
        match self.reading.query::<u64>(&claim).await {
            Ok(taken) => Ok(taken == 1),
            // Redis takes no writes, so nobody can claim it: better twice than not at all.
            Err(error) if !error.must_reconnect() => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts an edit in force by the command that the API uses, or refuses it; both are journalled.
    async fn honour(&self, key: OperatorKey, seen: &Seen) -> Result<(), SessionError> {
        let (now, roles) = (self.node.clock.now_s(), self.node.config.roles.clone());
        let is_role = |role: &str| roles.contains_key(role);
        match key {
            OperatorKey::Lockdown => {
                let lockdown = edits::lockdown(&seen.value, seen.ttl_ms, now, &roles);
                self.decide(key, lockdown, |view, lockdown| changed(emergency::lock_down(view, lockdown)))
                    .await
            }
            OperatorKey::Limits => {
                let limits = edits::limits(&seen.value, seen.ttl_ms, now, is_role);
                let command =
                    move |view: &View<'_>, limits| changed(limits::override_roles(view, limits, &roles));
                self.decide(key, limits, command).await
            }
            OperatorKey::Flags => match edits::flags(&seen.value).transpose() {
                None => Ok(()), // It was deleted, and is written again.
                Some(edit) => {
                    self.decide(key, edit, |view, edit| rollout::edit(view, edit, Expected::Any)).await
                }
            },
            OperatorKey::CanaryUsers => {
                let edit = edits::canary_users(&seen.value);
                self.decide(key, edit, |view, edit| rollout::edit(view, edit, Expected::Any)).await
            }
        }
    }

    /// Carries out the command that an edit stands for. The command says whether it changed anything.
    async fn decide<Edit: Send + 'static, Refusal: ToString>(
        &self,
        key: OperatorKey,
        edit: Result<Edit, String>,
        command: impl FnOnce(&View<'_>, Edit) -> Plan<bool, Refusal> + Send + 'static,
    ) -> Result<(), SessionError> {
        let name = key.name().to_owned();
        let plan = move |view: &View<'_>| {
            let decided = edit.and_then(|edit| command(view, edit).map_err(|refusal| refusal.to_string()));
            Ok(match decided {
                Ok((changes, is_changed)) => (changes, Ok(is_changed)),
                Err(problem) => {
                    (vec![Change::EditRefused { key: name, problem: problem.clone() }], Err(problem))
                }
            })
        };
        let (outcome, _) = self.node.writer.commit(&Author::part(ACTOR), plan).await?;
        match outcome {
            Ok(false) => {}
            Ok(true) => self.note_edit(key, true, None),
            Err(problem) => self.note_edit(key, false, Some(problem)),
        }
        Ok(())
    }

    fn note_edit(&self, key: OperatorKey, is_taken: bool, problem: Option<String>) {
        if is_taken {
            tracing::warn!(key = key.name(), "an edit in Redis is in force");
        } else {
            let problem = problem.unwrap_or_default();
            tracing::error!(
                key = key.name(),
                problem,
                "an edit in Redis is refused; the last good value stays in force"
            );
        }
        let outcome = if is_taken { "taken" } else { "refused" };
        self.node.metrics.redis.edits.with([key.name(), outcome]).inc();
    }

    fn note_standing(&mut self, key: OperatorKey) {
        if self.stood.get(&key) != Some(&self.evicted) {
            self.stood.insert(key, self.evicted.clone());
        }
    }

    /// Whether Redis may have dropped a key that is missing: it has dropped some since that one was last as it
    /// should be. Then that it is missing says nothing.
    async fn was_evicted(&mut self, key: OperatorKey) -> Result<bool, SessionError> {
        self.check().await?;
        Ok(match self.stood.get(&key) {
            Some(before) => *before != self.evicted,
            None => self.evicted.values().any(|dropped| *dropped > 0),
        })
    }
}

/// A command that counts as a change, even if it puts in force what is in force.
fn changed<E>(plan: Plan<(), E>) -> Plan<bool, E> {
    plan.map(|(changes, ())| (changes, true))
}
