//! Settings of notifications.

use std::path::PathBuf;

use super::raw::RawConfig;
use super::value::{http_url, identifier, path};

/// Destinations of notifications, without their secrets.
#[derive(Debug, Clone)]
pub struct NotifySettings {
    /// Name of this control plane.
    pub source: String,
    /// File with Slack's URL.
    pub slack_url_file: Option<PathBuf>,
    /// File with PagerDuty's routing key.
    pub pagerduty_key_file: Option<PathBuf>,
    /// URL of the PagerDuty Events API.
    pub pagerduty_url: String,
    /// URL of a webhook.
    pub webhook_url: Option<String>,
    /// File with the secret that signs for the webhook.
    pub webhook_secret_file: Option<PathBuf>,
}

impl NotifySettings {
    pub(super) fn read(raw: &mut RawConfig) -> Self {
        Self {
            source: raw.get("notify.source", identifier),
            slack_url_file: raw.take("notify.slack_url_file", path),
            pagerduty_key_file: raw.take("notify.pagerduty_key_file", path),
            pagerduty_url: raw.get("notify.pagerduty_url", http_url),
            webhook_url: raw.take("notify.webhook_url", http_url),
            webhook_secret_file: raw.take("notify.webhook_secret_file", path),
        }
    }
}
