//! Revocations by key id that operators order with redis-cli: `SET revoke:<key id> <reason>`. Each is carried out by the
//! command that the API uses, journalled, and taken away.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::error::LinkError;
use super::revoked::ACTOR;
use super::session::{Session, SessionError};
use super::{names, pace};
use crate::model::View;
use crate::model::author::Author;
use crate::model::change::Change;
use crate::model::commands::keys::{self, KeyError};
use crate::model::key::RevocationReason;
use crate::peers::Peers as _;

/// Time between two looks in a small Redis.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// For how long an order for an unknown key stands: another control plane may have issued it a moment ago.
const UNKNOWN_FOR: Duration = Duration::from_secs(5);
/// The longest reason that is read.
const MAX_REASON_BYTES: usize = 200;
/// The word for the orders in metrics.
pub(super) const METRIC: &str = "revoke:<key id>";

/// The orders that were met, and when to look again.
#[derive(Debug, Default)]
pub struct Orders {
    next: Option<Instant>,
    /// Orders for unknown keys, and since when.
    unknown: Vec<(String, Instant)>,
}

impl Session<'_> {
    /// Looks for orders, if it is time, and carries them out.
    pub async fn look_at_orders(&mut self) -> Result<(), SessionError> {
        let now = Instant::now();
        if self.orders.next.is_some_and(|next| now < next) {
            return Ok(());
        }
        let pause = pace::pause(&self.reading, LOOK_EVERY).await?;
        let mut found = BTreeSet::new();
        self.reading.scan(&names::revocation_order("*"), &mut |keys| found.extend(keys)).await?;
        self.orders.unknown.retain(|(key, _)| found.contains(key));
        for name in found {
            self.carry_out(&name).await?;
        }
        self.orders.next = Some(Instant::now() + pause);
        Ok(())
    }

    async fn carry_out(&mut self, name: &str) -> Result<(), SessionError> {
        let mut get = redis::cmd("GET");
        get.arg(name);
        let text = match self.reading.query::<Option<Vec<u8>>>(&get).await {
            Ok(text) => text.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
            Err(LinkError::WrongType) => None,
            Err(error) => return Err(error.into()),
        };
        let key_id = name.strip_prefix(&names::revocation_order("")).unwrap_or_default().to_owned();
        let reason = text.as_deref().map_or(Err("it is no string"), reason);
        let patient = self.is_patient(name);
        let entry = name.to_owned();
        let plan = move |view: &View<'_>| {
            let problem = match reason {
                Err(problem) => problem,
                Ok(reason) => match keys::revoke(
                    view,
                    &keys::Revocation { id: key_id, reason, with_successors: None },
                    ACTOR,
                ) {
                    Ok((changes, _)) => return Ok((changes, Order::Done)),
                    Err(KeyError::Unknown) if patient => return Ok((Vec::new(), Order::Waits)),
                    Err(KeyError::Unknown) => "there is no key with this id",
                    Err(error) => return Ok((refused(&entry, &error.to_string()), Order::Refused)),
                },
            };
            Ok((refused(&entry, problem), Order::Refused))
        };
        let (order, _) = self.node.writer.commit(&Author::part(ACTOR), plan).await?;
        let outcome = match order {
            Order::Waits => return Ok(()),
            Order::Done => {
                tracing::warn!(key = name, "a key was revoked by an order in Redis");
                "taken"
            }
            Order::Refused => {
                tracing::error!(
                    key = name,
                    "an order in Redis to revoke a key is refused; see the audit log"
                );
                "refused"
            }
        };
        self.node.metrics.redis.edits.with([METRIC, outcome]).inc();
        let mut delete = redis::cmd("DEL");
        delete.arg(name);
        match self.writing.query::<u64>(&delete).await {
            // It is met again, and changes nothing then.
            Err(error) if !error.must_reconnect() => {}
            deleted => drop(deleted?),
        }
        Ok(())
    }

    /// Whether an order for an unknown key stands a while longer. Only one control plane refuses it.
    fn is_patient(&mut self, name: &str) -> bool {
        let now = Instant::now();
        let since = match self.orders.unknown.iter().find(|(key, _)| key == name) {
            Some((_, since)) => *since,
            None => {
                self.orders.unknown.push((name.to_owned(), now));
                now
            }
        };
        !self.redis.holds_lease() || now.duration_since(since) < UNKNOWN_FOR
    }
}

/// The result of an order.
#[derive(Debug, Clone, Copy)]
enum Order {
    Done,
    Waits,
    Refused,
}

fn refused(name: &str, problem: &str) -> Vec<Change> {
    vec![Change::EditRefused { key: name.to_owned(), problem: problem.to_owned() }]
}

/// The reason of an order; free text is an operator's decision.
fn reason(text: &str) -> Result<RevocationReason, &'static str> {
    if text.len() > MAX_REASON_BYTES {
        return Err("the reason has more than 200 bytes");
    }
    let text = text.trim();
    let found = RevocationReason::ALL.into_iter().find(|reason| reason.label() == text);
    Ok(found.unwrap_or(RevocationReason::AdminAction))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_of_the_list_or_an_operators_decision() {
        assert_eq!(reason("compromised\n"), Ok(RevocationReason::Compromised));
        for text in ["", "INC-7", "Compromised"] {
            assert_eq!(reason(text), Ok(RevocationReason::AdminAction), "{text}");
        }
        assert!(reason(&"x".repeat(201)).is_err());
    }
}
