//! The VM that talks to the control plane for all VMs of the process: it holds the lease, polls,
//! publishes what it gets, and acknowledges once every worker has it.

use std::time::Duration;

use keygate_core::replica::{LOOK_EVERY_NS, Shards};
use keygate_core::shared::{self, Contact, PublishError, Publisher};
use keygate_core::sync::{Ask, Follower, Outcome, SyncError};
use keygate_core::wire::{FORMAT, Poll, Proxy};

use crate::VERSION;
use crate::host::{self, Answer, Shared};
use crate::metrics::Metrics;
use crate::plugin::Configuration;

const POLL_PATH: &str = "/sync/v1/poll";
const SHARDS_PATH: &str = "/sync/v1/shards";
/// What a call may take beyond the time for which a poll is held back.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Pauses after failures: doubled each time, from and up to.
const FIRST_PAUSE_NS: u64 = 50_000_000;
const LONGEST_PAUSE_NS: u64 = 1_000_000_000;

/// A VM that leads or would.
pub struct Leader {
    vm: u64,
    configuration: Configuration,
    token: Option<String>,
    proxy_id: String,
    proxy_cluster: String,
    leading: Option<Leading>,
    refused_answers: u64,
    last_error: Option<String>,
}

struct Leading {
    publisher: Publisher,
    follower: Follower,
    call: Option<u32>,
    asked_ns: u64,
    ask_at_ns: u64,
    failures: u32,
}

impl Leader {
    /// A VM that does not lead yet.
    pub fn new(vm: u64, configuration: Configuration, token: Option<String>) -> Self {
        let proxy_id = host::property(&["xds", "node", "id"]).filter(|id| !id.is_empty());
        if proxy_id.is_none() {
            host::warn("this proxy has no node id (--service-node); it will be known by a random one");
        }
        Self {
            vm,
            configuration,
            token,
            proxy_id: proxy_id.unwrap_or_default(),
            proxy_cluster: host::property(&["xds", "node", "cluster"]).unwrap_or_default(),
            leading: None,
            refused_answers: 0,
            last_error: None,
        }
    }

    /// Renews or tries the lease and asks when it is time; how soon it wants to be called again.
    pub fn on_tick(&mut self, now_ns: u64, workers: usize, metrics: &Metrics) -> Option<Duration> {
        if !shared::hold_lease(&mut Shared, self.vm, now_ns) {
            if self.leading.take().is_some() {
                host::info("another worker's VM leads now");
            }
            return None;
        }
        if self.leading.is_none() {
            match Publisher::take_over(&mut Shared, self.vm) {
                Ok(publisher) => {
                    let beacon = publisher.beacon();
                    let follower = Follower::from(beacon.has_state().then_some(beacon.version));
                    metrics.takeovers.increment();
                    self.leading = Some(Leading {
                        publisher,
                        follower,
                        call: None,
                        asked_ns: 0,
                        ask_at_ns: now_ns,
                        failures: 0,
                    });
                }
                Err(PublishError::Deposed | PublishError::Incomplete) => return None,
            }
        }
        #[cfg(feature = "trap")]
        crate::trap::on_leader_tick();
        self.ask_if_due(now_ns, workers, metrics)
    }

    /// Takes an answer; how soon it wants to be called again.
    pub fn on_answer(
        &mut self,
        token: u32,
        answer: Option<Answer>,
        now_ns: u64,
        workers: usize,
        metrics: &Metrics,
    ) -> Option<Duration> {
        let leading = self.leading.as_mut().filter(|leading| leading.call == Some(token))?;
        leading.call = None;
        let problem = match answer {
            None => Some("no answer from the control plane".to_owned()),
            Some(Answer { status: 200, body }) => {
                match follow(leading, &body, now_ns) {
                    Ok(published) => {
                        leading.failures = 0;
                        leading.ask_at_ns = now_ns;
                        if published {
                            metrics.publications.increment();
                            // Workers look every 5 ms; only then is the version what all of them enforce.
                            leading.ask_at_ns = host::monotonic_ns().saturating_add(LOOK_EVERY_NS);
                        }
                        None
                    }
                    Err(Unfollowed::Refused(problem)) => {
                        self.refused_answers = self.refused_answers.saturating_add(1);
                        metrics.sync_refusals.increment();
                        Some(problem.to_string())
                    }
                    Err(Unfollowed::Unpublished(PublishError::Deposed)) => {
                        self.leading = None;
                        return None;
                    }
                    Err(Unfollowed::Unpublished(problem @ PublishError::Incomplete)) => {
                        // What this process holds is damaged: begin again, with everything.
                        leading.follower.start_over();
                        Some(problem.to_string())
                    }
                }
            }
            Some(Answer { status, .. }) => Some(match status {
                401 | 403 => {
                    format!("the control plane refused this proxy ({status}): is the fleet token right?")
                }
                409 => {
                    "the control plane's state is older than the one enforced here; waiting for a newer one"
                        .to_owned()
                }
                _ => format!("the control plane answered {status}"),
            }),
        };
        if let Some(problem) = problem {
            metrics.sync_failures.increment();
            leading.follower.unanswered();
            let pause = FIRST_PAUSE_NS
                .checked_shl(leading.failures.min(8))
                .unwrap_or(LONGEST_PAUSE_NS)
                .min(LONGEST_PAUSE_NS);
            leading.failures = leading.failures.saturating_add(1);
            leading.ask_at_ns = now_ns.saturating_add(pause);
            if self.last_error.as_ref() != Some(&problem) {
                host::warn(&problem); // Once, not at every try.
            }
            self.last_error = Some(problem);
        } else if leading.failures == 0 && self.last_error.take().is_some() {
            host::info("in touch with the control plane again");
        }
        self.ask_if_due(now_ns, workers, metrics)
    }

    /// Lets another VM lead at once, when this one is to end.
    pub fn resign(&mut self) {
        if self.leading.take().is_some() {
            shared::release_lease(&mut Shared, self.vm);
        }
    }

    fn ask_if_due(&mut self, now_ns: u64, workers: usize, metrics: &Metrics) -> Option<Duration> {
        let incarnation = shared::incarnation(&mut Shared, self.vm);
        let leading = self.leading.as_mut()?;
        if leading.call.is_some() {
            return None;
        }
        if now_ns < leading.ask_at_ns {
            return Some(Duration::from_nanos(leading.ask_at_ns.saturating_sub(now_ns)));
        }
        // After a failure the answer is wanted at once: it tells that all is well again.
        let wait_ms = if leading.failures == 0 { self.configuration.poll_wait_ms } else { 0 };
        let (path, body, timeout) = match leading.follower.ask() {
            Ask::Poll { applied, resync } => {
                let id = if self.proxy_id.is_empty() {
                    format!("unnamed-{incarnation:016x}")
                } else {
                    self.proxy_id.clone()
                };
                let poll = Poll {
                    format: FORMAT,
                    proxy: Proxy {
                        id,
                        cluster: self.proxy_cluster.clone(),
                        incarnation: format!("{incarnation:016x}"),
                        filter: VERSION.to_owned(),
                        workers: u32::try_from(workers).unwrap_or(u32::MAX),
                    },
                    applied,
                    wait_ms,
                    resync,
                    refused_answers: self.refused_answers,
                    last_error: self.last_error.clone(),
                };
                let timeout = Duration::from_millis(wait_ms).saturating_add(CALL_TIMEOUT);
                (POLL_PATH, serde_json::to_vec(&poll), timeout)
            }
            Ask::Shards(request) => (SHARDS_PATH, serde_json::to_vec(&request), CALL_TIMEOUT),
        };
        let cluster = &self.configuration.sync_cluster;
        if path == POLL_PATH {
            leading.asked_ns = now_ns; // A snapshot is as new as the poll that led to it.
        }
        leading.call = host::post(cluster, path, self.token.as_deref(), &body.unwrap_or_default(), timeout);
        if leading.call.is_none() {
            metrics.sync_failures.increment();
            let problem = format!("no call to cluster {cluster:?} is possible; is it configured?");
            if self.last_error.as_ref() != Some(&problem) {
                host::error(&problem);
            }
            self.last_error = Some(problem);
            leading.failures = leading.failures.saturating_add(1);
            leading.ask_at_ns = now_ns.saturating_add(LONGEST_PAUSE_NS);
        }
        None
    }
}

enum Unfollowed {
    Refused(SyncError),
    Unpublished(PublishError),
}

/// Does what an answer says; whether a version was published.
fn follow(leading: &mut Leading, body: &[u8], now_ns: u64) -> Result<bool, Unfollowed> {
    let contact = Contact { asked_ns: leading.asked_ns, heard_ns: now_ns };
    let outcome = match leading.follower.ask() {
        Ask::Poll { .. } => {
            let generation = leading.publisher.beacon().generation;
            leading.follower.on_answer(body, &mut Shards { data: &mut Shared, generation })
        }
        Ask::Shards(_) => leading.follower.on_shards(body),
    };
    match outcome.map_err(Unfollowed::Refused)? {
        Outcome::AskMore => Ok(false),
        Outcome::Current { sent_at_ms } => {
            leading.publisher.touch(&mut Shared, contact, sent_at_ms).map_err(Unfollowed::Unpublished)?;
            Ok(false)
        }
        Outcome::Publish(publication) => {
            leading.publisher.publish(&mut Shared, &publication, contact).map_err(Unfollowed::Unpublished)?;
            leading.follower.published(publication.version);
            Ok(true)
        }
    }
}
