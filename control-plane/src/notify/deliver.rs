//! Delivery to one destination, on a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Destination, Notice, Stopping, formats};
use crate::metrics::Metrics;
use crate::trace;

/// How long a destination may take for one try.
const TRY_WITHIN: Duration = Duration::from_secs(5);
/// How long is waited before another try: for longer each time, a minute in all.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
    Duration::from_secs(16),
    Duration::from_secs(32),
];

/// What serves a destination.
pub struct Worker {
    pub destination: Destination,
    pub source: String,
    pub stopping: Arc<Stopping>,
    pub metrics: Arc<Metrics>,
}

/// What became of a try.
enum Answer {
    /// It was taken.
    Taken,
    /// It was refused for what it is; another try would be refused, too.
    Refused(u16),
    /// It may be taken another time.
    Later(String),
}

impl Worker {
    /// Delivers until nobody can tell any more. What waits then is tried once.
    pub fn run(self, notices: &Receiver<Arc<Notice>>) {
        // Redirects are not followed: they could lead what is told elsewhere.
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(TRY_WITHIN))
            .http_status_as_error(false)
            .max_redirects(0)
            .build()
            .into();
        let mut gave_up = false;
        while let Ok(notice) = notices.recv() {
            let outcome = match gave_up {
                false if self.deliver(&agent, &notice) => "sent",
                false => "failed",
                true => "dropped",
            };
            // Once there is no time any more, one that does not answer is not asked again.
            gave_up |= outcome == "failed" && self.stopping.wait(Duration::ZERO);
            let label = self.destination.label();
            self.metrics.notifications.sent.with([label, outcome]).inc();
        }
    }

    fn deliver(&self, agent: &ureq::Agent, notice: &Notice) -> bool {
        let (to, kind) = (self.destination.label(), notice.kind.label());
        for pause in PAUSES.map(Some).into_iter().chain([None]) {
            let problem = match self.attempt(agent, notice) {
                Answer::Taken => return true,
                Answer::Refused(status) => {
                    tracing::error!(to, kind, status, "a notification was refused; see its URL and key");
                    return false;
                }
                Answer::Later(problem) => problem,
            };
            match pause {
                Some(pause) => {
                    tracing::warn!(to, kind, problem, "a notification is not taken yet");
                    if self.stopping.wait(pause) {
                        tracing::error!(to, kind, "a notification is given up: the control plane stops");
                        return false;
                    }
                }
                None => tracing::error!(to, kind, problem, "a notification is given up"),
            }
        }
        false
    }

    fn attempt(&self, agent: &ureq::Agent, notice: &Notice) -> Answer {
        let (url, body) = match &self.destination {
            Destination::Slack { url } => (url.0.as_str(), formats::slack(notice, &self.source)),
            Destination::PagerDuty { url, routing_key } => {
                (url.as_str(), formats::pagerduty(notice, &self.source, &routing_key.0))
            }
            Destination::Webhook { url, .. } => (url.as_str(), formats::webhook(notice, &self.source)),
        };
        let body = body.to_string();
        let mut request = agent.post(url).header("content-type", "application/json");
        if let Destination::Webhook { secret, .. } = &self.destination {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            request = request.header(formats::SIGNATURE, formats::signature(&secret.0, now, body.as_bytes()));
            // To nobody else: what does not belong to the operators gets what it asks for.
            request = request.header(trace::HEADER, notice.trace.part());
        }
        match request.send(body.as_bytes()) {
            Ok(answer) if answer.status().is_success() => Answer::Taken,
            Ok(answer) if matches!(answer.status().as_u16(), 408 | 429 | 500..) => {
                Answer::Later(format!("it answered {}", answer.status()))
            }
            Ok(answer) => Answer::Refused(answer.status().as_u16()),
            // Not the error as it is: it may name the URL, which is a secret of Slack's.
            Err(ureq::Error::Timeout(_)) => Answer::Later("it did not answer in time".into()),
            Err(ureq::Error::Io(error)) => Answer::Later(format!("it cannot be reached: {}", error.kind())),
            Err(ureq::Error::HostNotFound) => Answer::Later("its host is not found".into()),
            Err(_) => Answer::Later("it cannot be reached".into()),
        }
    }
}
