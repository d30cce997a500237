//! Notifications: what somebody should know although no Prometheus runs, as a rotation that does not go on. To Slack, to
//! PagerDuty, and to any web server, signed.
//!
//! A notice is told and forgotten by who tells it: never waited for, and dropped with a line in the log and a count when
//! a destination has fallen too far behind. Each destination has a thread and a queue of its own, so that one that does
//! not answer holds up no other. What somebody is told of twice is told once: a trouble when it begins, and when it ends.

mod deliver;
mod formats;

use std::collections::BTreeSet;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use keygate_core::secret::Secret;

use crate::observe::metrics::Metrics;
use crate::platform::clock::{self, Clock};
use crate::platform::http_client::HttpClient;
use crate::platform::trace::Trace;

/// Notices that a destination may be behind.
const QUEUE: usize = 64;
/// The longest text that is passed on, in characters.
const MAX_TEXT_CHARS: usize = 500;

/// What it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A rotation of signing secrets, or a step of one, does not go on.
    RotationFailed,
    /// Tests through the proxies fail again and again.
    CanaryFailing,
    /// A new secret signs although some proxies may not know it.
    RotationForced,
    /// Many keys were ended by a rule or with their secret.
    MassRevocation,
    /// A cut-off did without the second approval that it needed.
    BreakGlass,
    /// The guard rolled the rollout of V2 back.
    RolledBack,
}

impl Kind {
    /// Its name for machines.
    pub const fn label(self) -> &'static str {
        match self {
            Self::RotationFailed => "rotation_failed",
            Self::CanaryFailing => "canary_failing",
            Self::RotationForced => "rotation_forced",
            Self::MassRevocation => "mass_revocation",
            Self::BreakGlass => "break_glass",
            Self::RolledBack => "rolled_back",
        }
    }

    /// How bad it is, in PagerDuty's words.
    pub const fn severity(self) -> &'static str {
        match self {
            Self::RotationFailed
            | Self::CanaryFailing
            | Self::MassRevocation
            | Self::BreakGlass
            | Self::RolledBack => "critical",
            Self::RotationForced => "warning",
        }
    }

    /// Whether it is a trouble that ends, rather than something that happened.
    const fn ends(self) -> bool {
        matches!(self, Self::RotationFailed | Self::CanaryFailing)
    }
}

/// Something to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Tells it apart from others.
    pub id: String,
    /// When, RFC 3339 UTC.
    pub at: String,
    /// What it is about.
    pub kind: Kind,
    /// Whether it is over.
    pub resolved: bool,
    /// One sentence.
    pub summary: String,
    /// More, by name.
    pub details: Vec<(&'static str, String)>,
    /// The trace that it came of, or its own.
    pub trace: Trace,
}

/// Where notices go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// An incoming webhook of Slack. Its URL is its secret.
    Slack {
        /// The URL.
        url: Secret<String>,
    },
    /// The Events API v2 of PagerDuty.
    PagerDuty {
        /// The URL.
        url: String,
        /// The integration's routing key.
        routing_key: Secret<String>,
    },
    /// Any web server.
    Webhook {
        /// The URL.
        url: String,
        /// What signs the body.
        secret: Secret<String>,
    },
}

impl Destination {
    /// The names, for metrics.
    pub const LABELS: [&str; 3] = ["slack", "pagerduty", "webhook"];

    /// Its name in metrics and logs.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Slack { .. } => "slack",
            Self::PagerDuty { .. } => "pagerduty",
            Self::Webhook { .. } => "webhook",
        }
    }
}

/// What became of a notice at a destination, as metrics name it.
pub const OUTCOMES: [&str; 3] = ["sent", "failed", "dropped"];

/// Whether the control plane stops.
#[derive(Debug, Default)]
struct Stopping(Mutex<bool>, Condvar);

impl Stopping {
    fn begin(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.1.notify_all();
    }

    /// Waits; whether it has begun meanwhile.
    fn wait(&self, pause: Duration) -> bool {
        let stopping = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.1.wait_timeout_while(stopping, pause, |stopping| !*stopping);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// What waits for a destination, by its label.
type Queue = (&'static str, SyncSender<Arc<Notice>>);

/// Tells.
pub struct Notifier {
    queues: Mutex<Vec<Queue>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    stopping: Arc<Stopping>,
    /// The troubles that were told of and are not over.
    open: Mutex<BTreeSet<Kind>>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl Notifier {
    /// Begins to serve destinations. `source` names this control plane.
    pub fn start(destinations: &[Destination], source: &str, clock: Clock, metrics: Arc<Metrics>) -> Self {
        for label in Destination::LABELS {
            for outcome in OUTCOMES {
                metrics.notifications.sent.with([label, outcome]);
            }
        }
        let (mut queues, mut threads) = (Vec::new(), Vec::new());
        let stopping = Arc::new(Stopping::default());
        let client = HttpClient::through(Matcher::from_env());
        for destination in destinations {
            let (queue, notices) = sync_channel(QUEUE);
            queues.push((destination.label(), queue));
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    tracing::error!(%error, to = destination.label(), "nothing can be told there");
                    continue;
                }
            };
            let worker = deliver::Worker {
                destination: destination.clone(),
                source: source.to_owned(),
                stopping: Arc::clone(&stopping),
                metrics: Arc::clone(&metrics),
                client: client.clone(),
                runtime,
            };
            let thread = std::thread::Builder::new().name(format!("notify {}", destination.label()));
            match thread.spawn(move || worker.run(&notices)) {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::error!(%error, to = destination.label(), "nothing can be told there"),
            }
        }
        Self {
            queues: Mutex::new(queues),
            threads: Mutex::new(threads),
            stopping,
            open: Mutex::default(),
            clock,
            metrics,
        }
    }

    /// Tells something. Of a trouble that was told of already, nothing.
    pub fn tell(&self, kind: Kind, summary: impl Into<String>, details: Vec<(&'static str, String)>) {
        if kind.ends() && !self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(kind) {
            return;
        }
        self.send(kind, false, summary.into(), details);
    }

    /// Tells that a trouble is over, if it was told of.
    pub fn resolve(&self, kind: Kind, summary: impl Into<String>) {
        if self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&kind) {
            self.send(kind, true, summary.into(), Vec::new());
        }
    }

    fn send(&self, kind: Kind, resolved: bool, summary: String, details: Vec<(&'static str, String)>) {
        let notice = Arc::new(Notice {
            id: crate::platform::random::identifier(),
            at: clock::rfc3339_ms(self.clock.now_ms()),
            kind,
            resolved,
            summary: tame(&summary),
            details: details.into_iter().map(|(name, text)| (name, tame(&text))).collect(),
            trace: Trace::current().unwrap_or_else(Trace::begin),
        });
        for (label, queue) in self.queues.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
                queue.try_send(Arc::clone(&notice))
            {
                self.metrics.notifications.sent.with([label, "dropped"]).inc();
                tracing::error!(
                    to = label,
                    kind = kind.label(),
                    "a notification is dropped: too many wait already"
                );
            }
        }
    }

    /// Takes no more, and waits until what waits was tried once, or a destination does not answer. Takes as long as
    /// that.
    pub fn stop(&self) {
        self.stopping.begin();
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ended = thread.join();
        }
    }
}

/// A text without control characters, and not too long.
fn tame(text: &str) -> String {
    let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(MAX_TEXT_CHARS).collect()
}
