//! Settings of the canary.

use std::sync::Arc;
use std::time::Duration;

use crate::canary::{Alert, Allowed, Url};

/// Settings of the canary.
#[derive(Debug, Clone)]
pub struct CanarySettings {
    /// The proxies, as clients reach them; none: nothing is run.
    pub proxies: Vec<Url>,
    /// Addresses that tests may call.
    pub allowed: Arc<Allowed>,
    /// Time between runs.
    pub interval: Duration,
    /// Time between probes of a revocation.
    pub probe_interval: Duration,
    /// The role of the canary's key.
    pub role: String,
    /// Path that the tests of the application call.
    pub app_endpoint: String,
    /// Number of failures after which an alert is sent.
    pub alert: Alert,
}
