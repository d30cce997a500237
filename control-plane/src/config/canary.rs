//! Settings of the canary.

use std::sync::Arc;
use std::time::Duration;

use super::raw::RawConfig;
use super::value::{between, identifier, list, text, up_to_100};
use crate::model::canary::Alert;
use crate::model::canary::Allowed;
use crate::model::canary::Url;

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

impl CanarySettings {
    pub(super) fn read(raw: &mut RawConfig) -> Self {
        let proxies = raw.take("canary.urls", |value| {
            list(value)?.iter().map(|text| text.parse::<Url>()).collect::<Result<Vec<_>, _>>()
        });
        let proxies = proxies.unwrap_or_default();
        let more = raw.take("canary.allowed_hosts", list).unwrap_or_default();
        let allowed = Allowed::new(&proxies, &more).unwrap_or_else(|problem| {
            raw.errors.push(format!("canary.allowed_hosts: {problem}"));
            Allowed::default()
        });
        Self {
            interval: raw.get("canary.interval", between(1, 3_600)),
            probe_interval: raw.get("canary.probe_interval", between(1, 86_400)),
            role: raw.get("canary.role", identifier),
            app_endpoint: raw.get("canary.app_endpoint", |value| {
                let text = text(value)?;
                allowed.check_endpoint(text).map(|()| text.to_owned())
            }),
            alert: alert(raw),
            allowed: Arc::new(allowed),
            proxies,
        }
    }
}

fn alert(raw: &mut RawConfig) -> Alert {
    let failures = raw.get("canary.alert.failures", up_to_100);
    let window = raw.take("canary.alert.window", up_to_100);
    if let Some(window) = window.filter(|window| *window < failures) {
        raw.errors.push(format!("canary.alert.window: {window} results never have {failures} failures"));
    }
    Alert { failures, of: window.unwrap_or(failures) }
}
