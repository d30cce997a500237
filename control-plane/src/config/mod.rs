//! The configuration: what was typed (`keygate.toml`, then `KEYGATE_*`, then flags), then what is valid.
//! Every error is reported at once, each with its key and what would be right.

mod canary;
mod durability;
mod keys_at_rest;
mod notify;
mod raw;
mod redis;
pub mod redis_url;
mod roles;
mod rollout;
pub mod settings;
mod signing;
mod value;
pub mod variables;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use keygate_core::decide::limits::MAX_UNITS;

pub use self::canary::CanarySettings;
pub use self::durability::Durability;
pub use self::keys_at_rest::HsmSettings;
pub use self::notify::NotifySettings;
use self::raw::RawConfig;
pub use self::raw::Shown;
pub use self::redis::Redis;
pub use self::redis_url::{Target, TargetError};
pub use self::rollout::{GuardSettings, RolloutSettings};
use self::value::{
    address, durability, flag, identifier, leeway, log_format, max_staleness, path, personal_data, plain_url,
    realm, retention, share,
};
pub use self::value::{http_url, propagation_timeout};
use crate::durability::journal::PersonalData;
use crate::model::SigningKeyPolicy;
use crate::model::roles::{Role, Roles};
use crate::model::state;
use crate::secrets::master_key::Source;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// A valid configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address of the API.
    pub listen: SocketAddr,
    /// Address of the sync port.
    pub sync_listen: SocketAddr,
    /// Directory of the journal and the store.
    pub data_dir: PathBuf,
    /// Where the first admin key is written.
    pub admin_key_file: PathBuf,
    /// File with the fleet token.
    pub fleet_token_file: PathBuf,
    /// Where the master key comes from.
    pub master_key: Source,
    /// Where the one before comes from, while it is being replaced.
    pub previous_master_key: Option<Source>,
    /// The HSM, if there is one.
    pub hsm: Option<HsmSettings>,
    /// The route policy to begin with.
    pub policy_file: Option<PathBuf>,
    /// The `iss` of keys.
    pub issuer: String,
    /// The `aud` of keys.
    pub audience: Option<String>,
    /// The realm in challenges.
    pub realm: String,
    /// How far clocks may differ.
    pub leeway: Duration,
    /// How secrets live.
    pub signing: SigningKeyPolicy,
    /// Time without news after which proxies answer 503.
    pub max_staleness: Duration,
    /// Share of live keys, from 0 to 1, above which a mass revocation needs a second approval; `None`: never.
    pub second_approval_threshold: Option<f64>,
    /// How owners and metadata of keys stand in the journal.
    pub personal_data: PersonalData,
    /// How long records of the journal are kept.
    pub retention: Duration,
    /// The Redis that control planes share, if there is one.
    pub redis: Option<Redis>,
    /// How durable a change should be before it is answered with more than 202.
    pub durability: Durability,
    /// How canaries are run.
    pub canary: CanarySettings,
    /// Whether limits are enforced.
    pub enforces_limits: bool,
    /// Where other control planes reach the sync port, if that was said.
    pub limits_url: Option<String>,
    /// Whether two processes of one proxy may serve at a time.
    pub hot_restart: bool,
    /// The rollout from V1 to V2.
    pub rollout: RolloutSettings,
    /// Who is told of what.
    pub notify: NotifySettings,
    /// How log lines look.
    pub log_format: LogFormat,
    /// The roles.
    pub roles: Roles,
}

/// Everything that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {} error(s):\n{}", .0.len(), .0.iter().map(|e| format!("  {e}")).collect::<Vec<_>>().join("\n"))]
pub struct ConfigErrors(pub Vec<String>);

impl Config {
    /// Where the journal's segments are.
    pub fn journal_dir(&self) -> PathBuf {
        self.data_dir.join(crate::durability::journal::DIRECTORY)
    }
}

/// The settings that a file and overrides make, each with its origin. [`read`] says whether they are valid.
pub fn shown(file: &str, overrides: &[(&str, String, String)]) -> Vec<Shown> {
    RawConfig::new(file, overrides).shown()
}

/// Reads the text of a file and the overrides: key, value and origin, of which later ones win.
///
/// # Errors
/// All errors at once.
pub fn read(file: &str, overrides: &[(&str, String, String)]) -> Result<Config, ConfigErrors> {
    let mut raw = RawConfig::new(file, overrides);
    let raw = &mut raw;
    let data_dir = raw.get("data_dir", path);
    let in_data_dir = |given: Option<PathBuf>, name: &str| given.unwrap_or_else(|| data_dir.join(name));
    let (master_key, previous_master_key) = keys_at_rest::master_keys(raw, &data_dir);
    let config = Config {
        listen: raw.get("listen", address),
        sync_listen: raw.get("sync_listen", address),
        admin_key_file: in_data_dir(raw.take("admin_key_file", path), "admin.key"),
        fleet_token_file: in_data_dir(raw.take("fleet_token_file", path), "fleet.token"),
        master_key,
        previous_master_key,
        hsm: HsmSettings::read(raw),
        policy_file: raw.take("policy_file", path),
        issuer: raw.get("tokens.issuer", identifier),
        audience: raw.take("tokens.audience", identifier),
        realm: raw.get("tokens.realm", realm),
        leeway: raw.get("tokens.leeway", leeway),
        signing: signing::read(raw),
        max_staleness: raw.get("fleet.max_staleness", max_staleness),
        second_approval_threshold: raw.take("emergency.second_approval_threshold", share),
        personal_data: raw.get("journal.personal_data", personal_data),
        retention: raw.get("journal.retention", retention),
        redis: Redis::read(raw),
        durability: raw.get("durability", durability),
        canary: CanarySettings::read(raw),
        enforces_limits: raw.get("limits.enforce", flag),
        limits_url: raw.take("limits.url", plain_url),
        hot_restart: raw.get("limits.hot_restart", flag),
        rollout: RolloutSettings::read(raw),
        notify: NotifySettings::read(raw),
        log_format: raw.get("log.format", log_format),
        roles: roles::read(raw),
        data_dir,
    };
    raw.errors.extend(config.contradictions());
    let errors = std::mem::take(raw).into_errors();
    if errors.is_empty() { Ok(config) } else { Err(ConfigErrors(errors)) }
}

impl Config {
    /// Settings that are valid each, but not together.
    fn contradictions(&self) -> Vec<String> {
        let mut errors = Vec::new();
        if self.listen == self.sync_listen && self.listen.port() != 0 {
            let listen = self.listen;
            errors.push(format!("sync_listen: {listen} is the API's address too; give it another port"));
        }
        let sources = [Some(&self.master_key), self.previous_master_key.as_ref()];
        let uses_hsm = sources.into_iter().flatten().any(|source| matches!(source, Source::Hsm(_)));
        if self.hsm.is_none() && (uses_hsm || self.signing.in_hsm) {
            errors.push("hsm.module: must be set, as hsm.token, for what else is set of the HSM".into());
        }
        if !self.canary.proxies.is_empty() && !self.roles.contains_key(&self.canary.role) {
            errors.push(format!("canary.role: there is no role {:?}", self.canary.role));
        }
        if self.durability == Durability::Replicated && self.redis.is_none() {
            errors.push("durability: \"replicated\" needs a Redis; set redis.url".into());
        }
        errors
    }
}

impl From<&Config> for state::Settings {
    fn from(config: &Config) -> Self {
        Self {
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            realm: config.realm.clone(),
            leeway_s: config.leeway.as_secs(),
            max_life_s: config.roles.values().map(|role| role.ttl.as_secs()).max().unwrap_or(1),
            hard_age_s: config.max_staleness.as_secs(),
            has_v1: config.rollout.v1_cluster.is_some(),
            without_limits: !config.enforces_limits,
            role_limits: config
                .roles
                .iter()
                .filter_map(|(name, role)| Some((name.clone(), limit_of(role)?)))
                .collect(),
        }
    }
}

/// More than that is no limit.
fn limit_of(role: &Role) -> Option<u32> {
    role.requests_per_hour.and_then(|limit| u32::try_from(limit).ok()).filter(|limit| *limit <= MAX_UNITS)
}
