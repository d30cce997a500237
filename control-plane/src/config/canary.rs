//! Settings of the canary.

use std::sync::Arc;
use std::time::Duration;

use crate::canary::{Alert, Allowed, Url};

/// How canaries are run.
#[derive(Debug, Clone)]
pub struct CanarySettings {
    /// The proxies, as clients reach them; none: nothing is run.
    pub proxies: Vec<Url>,
    /// What may be called.
    pub allowed: Arc<Allowed>,
    /// How often.
    pub interval: Duration,
    /// How often the probe.
    pub probe_interval: Duration,
    /// The role of the canary's key.
    pub role: String,
    /// What the tests of the application call.
    pub app_endpoint: String,
    /// After how many failures somebody is told.
    pub alert: Alert,
}
