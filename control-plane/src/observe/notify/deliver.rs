//! Delivery to one destination, on a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::http::{Request, header};
use http_body_util::Full;
use tokio::runtime::Runtime;

use super::{Destination, Notice, Stopping, formats};
use crate::observe::metrics::Metrics;
use crate::platform::http_client::{HttpClient, HttpError};
use crate::platform::trace;

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
    pub client: HttpClient,
    /// Of this thread alone: what is still to be told is told while the server's own stops.
    pub runtime: Runtime,
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
        let mut gave_up = false;
        while let Ok(notice) = notices.recv() {
            let outcome = match gave_up {
                false if self.deliver(&notice) => "sent",
                false => "failed",
                true => "dropped",
            };
            // Once there is no time any more, one that does not answer is not asked again.
            gave_up |= outcome == "failed" && self.stopping.wait(Duration::ZERO);
            let label = self.destination.label();
            self.metrics.notifications.sent.with([label, outcome]).inc();
        }
        // A name that is still looked up is not waited for.
        self.runtime.shutdown_background();
    }

    fn deliver(&self, notice: &Notice) -> bool {
        let (to, kind) = (self.destination.label(), notice.kind.label());
        for pause in PAUSES.map(Some).into_iter().chain([None]) {
            let problem = match self.attempt(notice) {
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

    fn attempt(&self, notice: &Notice) -> Answer {
        let (url, body) = match &self.destination {
            Destination::Slack { url } => (url.expose().as_str(), formats::slack(notice, &self.source)),
            Destination::PagerDuty { url, routing_key } => {
                (url.as_str(), formats::pagerduty(notice, &self.source, routing_key.expose()))
            }
            Destination::Webhook { url, .. } => (url.as_str(), formats::webhook(notice, &self.source)),
        };
        let body = body.to_string();
        let mut request = Request::post(url)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, "keygate");
        if let Destination::Webhook { secret, .. } = &self.destination {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            request =
                request.header(formats::SIGNATURE, formats::signature(secret.expose(), now, body.as_bytes()));
            // To nobody else: what does not belong to the operators gets what it asks for.
            request = request.header(trace::HEADER, notice.trace.part());
        }
        let Ok(request) = request.body(Full::new(Bytes::from(body))) else {
            return Answer::Later("its URL cannot be called".into());
        };
        // Redirects are not followed: they could lead what is told elsewhere.
        match self.runtime.block_on(self.client.status(request, TRY_WITHIN)) {
            Ok(status) if status.is_success() => Answer::Taken,
            Ok(status) if matches!(status.as_u16(), 408 | 429 | 500..) => {
                Answer::Later(format!("it answered {status}"))
            }
            Ok(status) => Answer::Refused(status.as_u16()),
            Err(HttpError::Late) => Answer::Later("it did not answer in time".into()),
            Err(HttpError::Io(kind)) => Answer::Later(format!("it cannot be reached: {kind}")),
            Err(HttpError::HostNotFound) => Answer::Later("its host is not found".into()),
            Err(HttpError::Tls(error)) => Answer::Later(format!("it has no TLS that can be used: {error}")),
            Err(error) => Answer::Later(error.to_string()),
        }
    }
}
