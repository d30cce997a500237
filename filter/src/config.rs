//! The plugin's configuration, as Envoy's operators write it.

use serde::Deserialize;

/// The environment variable with the fleet token.
pub const FLEET_TOKEN: &str = "KEYGATE_FLEET_TOKEN";

/// The plugin's configuration. It shows in Envoy's `/config_dump`, so nothing secret stands in it: the
/// fleet token comes by the environment variable [`FLEET_TOKEN`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// The Envoy cluster of the control plane's sync port.
    pub sync_cluster: String,
    /// How long a poll is held back when there is nothing new, in milliseconds.
    #[serde(default = "default_poll_wait_ms")]
    pub poll_wait_ms: u64,
    /// Memory of each worker for tokens verified before, in bytes.
    #[serde(default = "default_token_cache_bytes")]
    pub token_cache_bytes: usize,
}

impl Configuration {
    /// Reads the bytes that Envoy has of it.
    ///
    /// # Errors
    /// The first problem and the expected form, for the operator.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes)
            .map_err(|e| format!("{e}; expected {{\"sync_cluster\": \"<an Envoy cluster>\"}}"))
    }
}

fn default_poll_wait_ms() -> u64 {
    10_000
}

fn default_token_cache_bytes() -> usize {
    16 * 1024 * 1024
}
