//! The configuration: what was typed (`keygate.toml`, then `KEYGATE_*`, then flags), then what is valid.
//! Every error is reported at once, each with its key and what would be right.

mod canary;
mod durability;
pub mod redis_url;
mod rollout;
mod signing;
mod value;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keygate_core::decide::limits::MAX_UNITS;
use keygate_core::token;
use keygate_core::token::crypto::Algorithm;
use toml::Value;

pub use self::canary::CanarySettings;
pub use self::durability::Durability;
pub use self::redis_url::{Target, TargetError};
pub use self::rollout::{GuardSettings, RolloutSettings};
pub use self::signing::SigningKeyPolicy;
use self::value::{
    address, algorithm, count, durability, duration, flag, hard_age, identifier, label, leeway, life, list,
    log_format, overlap, path, personal_data, plain_url, realm, redis_timeout, requests_per_hour, retention,
    retire, schedule, scopes, share, text, up_to_100, words,
};
pub use self::value::{gate_timeout, http_url};
use crate::canary::{Alert, Allowed, Url};
use crate::journal::PersonalData;
use crate::master_key::Source;
use crate::roles::{self, Role, Roles};
use crate::rotation::schedule::{QUARTERLY, Schedule};
use crate::state;

/// The settings that a variable or a flag can set: their key in the file, and what they are.
/// `KEYGATE_` and the key in capitals, dots as underscores, is the variable.
pub const SETTINGS: [(&str, &str); 54] = [
    ("listen", "Address of the API, metrics and console [default: 127.0.0.1:8000]"),
    ("sync_listen", "Address of the sync port, for proxies only [default: 127.0.0.1:8001]"),
    ("data_dir", "Directory of the journal and the store [default: .keygate/data]"),
    ("admin_key_file", "Where the first admin key is written, once [default: <data_dir>/admin.key]"),
    (
        "fleet_token_file",
        "File with the token that proxies show; made if missing [default: <data_dir>/fleet.token]",
    ),
    (
        "master_key_file",
        "File with the key that seals secrets; made if missing [default: <data_dir>/master.key]",
    ),
    (
        "previous_master_key_file",
        "File with the master key before, while the new one takes its place on all control planes",
    ),
    ("policy_file", "Route policy that a new data directory begins with"),
    ("tokens.issuer", "The `iss` of keys [default: keygate]"),
    ("tokens.audience", "The `aud` of keys, if they shall have one"),
    ("tokens.realm", "The realm in challenges [default: keygate]"),
    ("tokens.leeway", "How far clocks may differ, at most 60s [default: 0s]"),
    ("secrets.algorithm", "ES256, EdDSA or HS256, for new secrets [default: ES256]"),
    ("secrets.overlap", "How long a secret that signs no more verifies, with after_overlap [default: 24h]"),
    (
        "secrets.retire",
        "after_overlap or with_last_key: what ends such a secret [default: after_overlap for HS256, else with_last_key]",
    ),
    (
        "secrets.schedule",
        "When secrets are rotated: cron of five fields, UTC, or off [default: 0 3 1 1,4,7,10 *, quarterly]",
    ),
    (
        "secrets.gate_timeout",
        "How long proxies may take to know a new secret before somebody is told, 1s to 24h [default: 10m]",
    ),
    ("hsm.module", "The PKCS#11 module of an HSM, such as /usr/lib/softhsm/libsofthsm2.so"),
    ("hsm.token", "The label of its token"),
    ("hsm.pin_file", "File with its PIN; KEYGATE_HSM_PIN overrides it"),
    (
        "hsm.master_key",
        "The label of the AES key in it that is the master key; made if missing at the first start",
    ),
    ("hsm.previous_master_key", "The label of the one before, while the new one takes its place"),
    ("hsm.signing", "Whether it makes and keeps new ES256 secrets: true or false [default: false]"),
    ("fleet.hard_age", "How long proxies go on without news before they answer 503 [default: 300s]"),
    (
        "emergency.two_approvals_above",
        "Share of live keys, 0 to 1, above which a cut-off needs a second approval [default: never]",
    ),
    (
        "journal.personal_data",
        "Owners and metadata of keys in the journal: sealed (and as salted hashes) or plain [default: sealed]",
    ),
    ("journal.retention", "How long records are kept, such as 90d or 7y, at least 1d [default: 7y]"),
    (
        "redis.url",
        "Redis that control planes share: redis://, rediss://, redis+sentinel://, redis+cluster:// [default: none]",
    ),
    (
        "redis.replicas",
        "Replicas that must have a change before it is 'replicated' [default: 1 with Sentinel, else 0]",
    ),
    ("redis.timeout", "How long Redis may take to answer, 50ms to 10s [default: 500ms]"),
    ("durability", "local or replicated: below it, changes are answered with 202 [default: local]"),
    (
        "canary.urls",
        "URLs of proxies that are tested as clients reach them, a list or with commas between [default: none]",
    ),
    ("canary.interval", "How often they are tested, 1s to 1h [default: 60s]"),
    (
        "canary.probe_interval",
        "How often a key is issued, used and revoked through each, 1s to 1d [default: 5m]",
    ),
    ("canary.app_endpoint", "What the tests of the application call [default: /api/chat]"),
    ("canary.role", "The role of the canary's key [default: basic]"),
    (
        "canary.alert.failures",
        "After how many failures of a critical test somebody is told, 1 to 100 [default: 3]",
    ),
    (
        "canary.alert.of",
        "Among how many of its last results, up to 100 [default: canary.alert.failures, so in a row]",
    ),
    ("canary.allowed_hosts", "More hosts that tests may call, as host or host:port [default: none]"),
    ("limits.enforce", "Whether limits of keys are counted and enforced: true or false [default: true]"),
    (
        "limits.url",
        "Where other control planes reach this one's sync port, to pass on questions about limits [default: http:// and sync_listen, or the host's name if that is any address]",
    ),
    (
        "limits.hot_restart",
        "Whether proxies restart hot, so that two processes of one serve for a while: true or false [default: false]",
    ),
    ("rollout.v1_cluster", "The Envoy cluster of the V1 upstream; without it there is none [default: none]"),
    ("rollout.guard.window", "Over how long the guard counts requests, 5s to 1h [default: 60s]"),
    ("rollout.guard.min_requests", "Requests to V2 in it below which it says nothing [default: 50]"),
    (
        "rollout.guard.margin",
        "By how much V2's share of bad requests may be greater than V1's, 0 to 1 [default: 0.05]",
    ),
    ("rollout.guard.good_after", "For how long a share must be in force to be gone back to [default: 10m]"),
    ("notify.source", "What this control plane is called in notifications [default: keygate]"),
    (
        "notify.slack_url_file",
        "File with the URL of an incoming webhook of Slack; or KEYGATE_NOTIFY_SLACK_URL",
    ),
    ("notify.pagerduty_key_file", "File with a routing key of PagerDuty; or KEYGATE_NOTIFY_PAGERDUTY_KEY"),
    (
        "notify.pagerduty_url",
        "Where PagerDuty takes events [default: https://events.pagerduty.com/v2/enqueue]",
    ),
    ("notify.webhook_url", "A web server that notifications are posted to, signed"),
    (
        "notify.webhook_secret_file",
        "File with the secret that signs them, at least 16 characters; or KEYGATE_NOTIFY_WEBHOOK_SECRET",
    ),
    ("log.format", "text or json [default: text]"),
];

const A_DAY: Duration = Duration::from_secs(86_400);
/// As auditors ask. With leap days.
const SEVEN_YEARS: Duration = Duration::from_secs((7 * 365 + 2) * 86_400);

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// The Redis that control planes share.
#[derive(Debug, Clone)]
pub struct Redis {
    /// Where it is.
    pub target: Target,
    /// Replicas that must have a change before it counts as replicated.
    pub replicas: u64,
    /// How long it may take to answer.
    pub timeout: Duration,
}

/// An HSM, but for its PIN.
#[derive(Debug, Clone)]
pub struct HsmSettings {
    /// The PKCS#11 module.
    pub module: PathBuf,
    /// The label of the token.
    pub token: String,
    /// File with the PIN.
    pub pin_file: Option<PathBuf>,
}

/// Where notifications go, but for the secrets.
#[derive(Debug, Clone)]
pub struct NotifySettings {
    /// What this control plane is called.
    pub source: String,
    /// File with Slack's URL.
    pub slack_url_file: Option<PathBuf>,
    /// File with PagerDuty's routing key.
    pub pagerduty_key_file: Option<PathBuf>,
    /// Where PagerDuty takes events.
    pub pagerduty_url: String,
    /// Any web server.
    pub webhook_url: Option<String>,
    /// File with what signs for it.
    pub webhook_secret_file: Option<PathBuf>,
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
    /// How long proxies go on without news.
    pub hard_age: Duration,
    /// The share of live keys, from 0 to 1, above which a cut-off needs a second approval; `None`: never.
    pub two_approvals_above: Option<f64>,
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
        self.data_dir.join(crate::journal::DIRECTORY)
    }
}

/// Reads the file's text and the overrides (`(key, value, where it came from)`, later ones win).
///
/// # Errors
/// Everything that is wrong.
pub fn read(file: &str, overrides: &[(&str, String, String)]) -> Result<Config, ConfigErrors> {
    let mut typed = Typed::default();
    match file.parse::<toml::Table>() {
        Ok(table) => typed.flatten(String::new(), Value::Table(table)),
        Err(error) => typed.errors.push(format!("keygate.toml: {}", error.to_string().trim_end())),
    }
    for (key, value, origin) in overrides {
        typed.values.insert((*key).to_owned(), (Value::String(value.clone()), origin.clone()));
    }
    typed.validate()
}

/// What was typed, by dotted key, with where it came from.
#[derive(Default)]
struct Typed {
    values: BTreeMap<String, (Value, String)>,
    errors: Vec<String>,
}

impl Typed {
    fn flatten(&mut self, prefix: String, value: Value) {
        match value {
            Value::Table(table) => {
                for (name, value) in table {
                    let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
                    self.flatten(key, value);
                }
            }
            value => {
                self.values.insert(prefix, (value, "keygate.toml".into()));
            }
        }
    }

    fn take<T>(&mut self, key: &str, parse: impl FnOnce(&Value) -> Result<T, String>) -> Option<T> {
        let (value, origin) = self.values.remove(key)?;
        match parse(&value) {
            Ok(parsed) => Some(parsed),
            Err(problem) => {
                self.errors.push(format!("{key}: {problem} (from {origin})"));
                None
            }
        }
    }

    fn validate(mut self) -> Result<Config, ConfigErrors> {
        let data_dir = self.take("data_dir", path).unwrap_or_else(|| ".keygate/data".into());
        let file = |given: Option<PathBuf>, name: &str| given.unwrap_or_else(|| data_dir.join(name));
        let listen = self.take("listen", address).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8000)));
        let sync_listen =
            self.take("sync_listen", address).unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8001)));
        if listen == sync_listen && listen.port() != 0 {
            self.errors.push(format!("sync_listen: {listen} is the API's address too; give it another port"));
        }
        let hsm = self.hsm();
        let key_file = self.take("master_key_file", path);
        let previous_file = self.take("previous_master_key_file", path);
        let in_hsm = self.take("hsm.master_key", label).map(Source::Hsm);
        let previous_in_hsm = self.take("hsm.previous_master_key", label).map(Source::Hsm);
        if key_file.is_some() && in_hsm.is_some() {
            self.errors.push(
                "hsm.master_key: master_key_file names a master key too; to go over to the HSM's, name the file as previous_master_key_file".into(),
            );
        }
        if previous_file.is_some() && previous_in_hsm.is_some() {
            self.errors
                .push("hsm.previous_master_key: previous_master_key_file names one too; keep one".into());
        }
        let master_key = in_hsm.unwrap_or_else(|| Source::File(file(key_file, "master.key")));
        let previous_master_key = previous_in_hsm.or_else(|| previous_file.map(Source::File));
        let signing = self.signing();
        let canary = self.canary();
        let rollout = self.rollout();
        let uses_hsm = [Some(&master_key), previous_master_key.as_ref()]
            .into_iter()
            .flatten()
            .any(|source| matches!(source, Source::Hsm(_)));
        if hsm.is_none() && (uses_hsm || signing.in_hsm) {
            self.errors.push("hsm.module: must be set, as hsm.token, for what else is set of the HSM".into());
        }
        let config = Config {
            listen,
            sync_listen,
            admin_key_file: file(self.take("admin_key_file", path), "admin.key"),
            fleet_token_file: file(self.take("fleet_token_file", path), "fleet.token"),
            master_key,
            previous_master_key,
            hsm,
            policy_file: self.take("policy_file", path),
            issuer: self.take("tokens.issuer", identifier).unwrap_or_else(|| "keygate".into()),
            audience: self.take("tokens.audience", identifier),
            realm: self.take("tokens.realm", realm).unwrap_or_else(|| "keygate".into()),
            leeway: self.take("tokens.leeway", leeway).unwrap_or_default(),
            signing,
            hard_age: self.take("fleet.hard_age", hard_age).unwrap_or(Duration::from_secs(300)),
            two_approvals_above: self.take("emergency.two_approvals_above", share),
            personal_data: self.take("journal.personal_data", personal_data).unwrap_or_default(),
            retention: self.take("journal.retention", retention).unwrap_or(SEVEN_YEARS),
            redis: self.redis(),
            durability: self.take("durability", durability).unwrap_or(Durability::Local),
            canary,
            enforces_limits: self.take("limits.enforce", flag).unwrap_or(true),
            limits_url: self.take("limits.url", plain_url),
            hot_restart: self.take("limits.hot_restart", flag).unwrap_or(false),
            rollout,
            notify: NotifySettings {
                source: self.take("notify.source", identifier).unwrap_or_else(|| "keygate".into()),
                slack_url_file: self.take("notify.slack_url_file", path),
                pagerduty_key_file: self.take("notify.pagerduty_key_file", path),
                pagerduty_url: self
                    .take("notify.pagerduty_url", http_url)
                    .unwrap_or_else(|| "https://events.pagerduty.com/v2/enqueue".into()),
                webhook_url: self.take("notify.webhook_url", http_url),
                webhook_secret_file: self.take("notify.webhook_secret_file", path),
            },
            log_format: self.take("log.format", log_format).unwrap_or(LogFormat::Text),
            roles: self.roles(),
            data_dir,
        };
        if !config.canary.proxies.is_empty() && !config.roles.contains_key(&config.canary.role) {
            self.errors.push(format!("canary.role: there is no role {:?}", config.canary.role));
        }
        if config.durability == Durability::Replicated && config.redis.is_none() {
            self.errors.push("durability: \"replicated\" needs a Redis; set redis.url".into());
        }
        for (key, (_, origin)) in std::mem::take(&mut self.values) {
            self.errors.push(format!("{key}: no such setting (from {origin}){}", suggestion(&key)));
        }
        if self.errors.is_empty() { Ok(config) } else { Err(ConfigErrors(self.errors)) }
    }

    fn signing(&mut self) -> SigningKeyPolicy {
        let algorithm = self.take("secrets.algorithm", algorithm).unwrap_or(Algorithm::ES256);
        let in_hsm = self.take("hsm.signing", flag).unwrap_or_default();
        if in_hsm && algorithm != Algorithm::ES256 {
            self.errors.push(format!("hsm.signing: the HSM signs with ES256 only, not {}", algorithm.name()));
        }
        SigningKeyPolicy {
            algorithm,
            overlap: self.take("secrets.overlap", overlap).unwrap_or(A_DAY),
            retire: self.take("secrets.retire", retire),
            schedule: self
                .take("secrets.schedule", schedule)
                .unwrap_or_else(|| Schedule::parse(QUARTERLY).ok()),
            gate_timeout: self.take("secrets.gate_timeout", gate_timeout).unwrap_or(Duration::from_secs(600)),
            in_hsm,
        }
    }

    fn canary(&mut self) -> CanarySettings {
        let proxies = self.take("canary.urls", |value| {
            list(value)?.iter().map(|text| text.parse::<Url>()).collect::<Result<Vec<_>, _>>()
        });
        let proxies = proxies.unwrap_or_default();
        let more = self.take("canary.allowed_hosts", list).unwrap_or_default();
        let allowed = Allowed::new(&proxies, &more).unwrap_or_else(|problem| {
            self.errors.push(format!("canary.allowed_hosts: {problem}"));
            Allowed::default()
        });
        let app_endpoint = self.take("canary.app_endpoint", |value| {
            let text = text(value)?;
            allowed.check_endpoint(text).map(|()| text.to_owned())
        });
        let alert = self.canary_alert();
        CanarySettings {
            interval: self.take("canary.interval", between(1, 3_600)).unwrap_or(Duration::from_secs(60)),
            probe_interval: self
                .take("canary.probe_interval", between(1, 86_400))
                .unwrap_or(Duration::from_secs(300)),
            role: self.take("canary.role", identifier).unwrap_or_else(|| "basic".into()),
            app_endpoint: app_endpoint.unwrap_or_else(|| "/api/chat".into()),
            alert,
            allowed: Arc::new(allowed),
            proxies,
        }
    }

    fn rollout(&mut self) -> RolloutSettings {
        let usual = GuardSettings::default();
        let guard = GuardSettings {
            window: self.take("rollout.guard.window", between(5, 3_600)).unwrap_or(usual.window),
            min_requests: self.take("rollout.guard.min_requests", count).unwrap_or(usual.min_requests),
            margin: self.take("rollout.guard.margin", share).unwrap_or(usual.margin),
            good_after: self
                .take("rollout.guard.good_after", between(1, 30 * 86_400))
                .unwrap_or(usual.good_after),
        };
        RolloutSettings { v1_cluster: self.take("rollout.v1_cluster", identifier), guard }
    }

    fn canary_alert(&mut self) -> Alert {
        let failures = self.take("canary.alert.failures", up_to_100);
        let of = self.take("canary.alert.of", up_to_100);
        let failures = failures.unwrap_or(Alert::default().failures);
        if let Some(of) = of.filter(|of| *of < failures) {
            self.errors.push(format!("canary.alert.of: {of} results never have {failures} failures"));
        }
        Alert { failures, of: of.unwrap_or(failures) }
    }

    fn hsm(&mut self) -> Option<HsmSettings> {
        let module = self.take("hsm.module", path);
        let token = self.take("hsm.token", label);
        let pin_file = self.take("hsm.pin_file", path);
        match (module, token) {
            (Some(module), Some(token)) => Some(HsmSettings { module, token, pin_file }),
            (None, None) => None,
            _ => {
                self.errors.push("hsm: both hsm.module and hsm.token are needed".into());
                None
            }
        }
    }

    fn redis(&mut self) -> Option<Redis> {
        let target = self.take("redis.url", |value| {
            let text = value.as_str().ok_or("is not a text")?; // It may hold a password.
            text.parse::<Target>().map_err(|error| error.to_string())
        });
        let replicas = self.take("redis.replicas", count);
        let timeout = self.take("redis.timeout", redis_timeout);
        let target = target?;
        let usual = u64::from(target.is_sentinel());
        Some(Redis {
            replicas: replicas.unwrap_or(usual),
            timeout: timeout.unwrap_or(Duration::from_millis(500)),
            target,
        })
    }

    /// The default roles, changed member by member and added to by `[roles.NAME]` tables.
    fn roles(&mut self) -> Roles {
        let mut roles = roles::defaults();
        let named: Vec<String> = self
            .values
            .keys()
            .filter_map(|key| Some(key.strip_prefix("roles.")?.split_once('.')?.0.to_owned()))
            .collect();
        for name in named {
            let key = |member: &str| format!("roles.{name}.{member}");
            let life = self.take(&key("life"), life);
            let limit = self.take(&key("requests_per_hour"), requests_per_hour);
            let scopes = self.take(&key("scopes"), scopes);
            let may_create = self.take(&key("may_create"), words);
            if !token::is_identifier(&name) {
                self.errors.push(format!("roles.{name}: a role's name is one word of visible ASCII"));
            }
            let known = roles.contains_key(&name);
            if !known && (life.is_none() || scopes.is_none()) {
                let key = format!("roles.{name}");
                if !self.errors.iter().any(|error| error.starts_with(&key)) {
                    self.errors.push(format!("{key}: a new role needs at least 'life' and 'scopes'"));
                }
            }
            let role = roles.entry(name).or_insert_with(|| Role {
                life: Duration::ZERO,
                requests_per_hour: None,
                scopes: Vec::new(),
                may_create: Vec::new(),
            });
            role.life = life.unwrap_or(role.life);
            role.requests_per_hour = limit.unwrap_or(role.requests_per_hour);
            role.scopes = scopes.unwrap_or_else(|| std::mem::take(&mut role.scopes));
            role.may_create = may_create.unwrap_or_else(|| std::mem::take(&mut role.may_create));
        }
        for (name, role) in &roles {
            for other in role.may_create.iter().filter(|other| *other != roles::ALL) {
                if !roles.contains_key(other) {
                    self.errors.push(format!("roles.{name}.may_create: there is no role {other:?}"));
                }
            }
        }
        roles::expand(roles)
    }
}

/// Reads a duration of so many seconds.
fn between(from: u64, to: u64) -> impl Fn(&Value) -> Result<Duration, String> {
    move |value| {
        let wanted = duration(value)?;
        let range = Duration::from_secs(from)..=Duration::from_secs(to);
        let say = || format!("must be from {from}s to {}", humantime::format_duration(*range.end()));
        if range.contains(&wanted) { Ok(wanted) } else { Err(say()) }
    }
}

fn suggestion(key: &str) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    SETTINGS
        .iter()
        .find(|(known, _)| {
            last(known) == last(key) || known.replace(['_', '.'], "") == key.replace(['_', '.', '-'], "")
        })
        .map(|(known, _)| format!("; did you mean '{known}'?"))
        .unwrap_or_default()
}

impl From<&Config> for state::Settings {
    fn from(config: &Config) -> Self {
        Self {
            issuer: config.issuer.clone(),
            audience: config.audience.clone(),
            realm: config.realm.clone(),
            leeway_s: config.leeway.as_secs(),
            max_life_s: config.roles.values().map(|role| role.life.as_secs()).max().unwrap_or(1),
            hard_age_s: config.hard_age.as_secs(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_typed_is_valid() {
        let config = read("", &[]).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:8000");
        assert_eq!(config.admin_key_file.to_str(), Some(".keygate/data/admin.key"));
        assert_eq!(config.roles.len(), 4);
        assert_eq!(config.personal_data, PersonalData::Sealed);
    }

    #[test]
    fn later_sources_win() {
        let file = "listen = \"127.0.0.1:1\"\n[tokens]\nissuer = \"a\"\n[journal]\npersonal_data = \"plain\"";
        let overrides = [
            ("listen", "127.0.0.1:2".to_owned(), "KEYGATE_LISTEN".to_owned()),
            ("listen", "127.0.0.1:3".to_owned(), "--listen".to_owned()),
        ];
        let config = read(file, &overrides).unwrap();
        assert_eq!((config.listen.port(), config.issuer.as_str()), (3, "a"));
        assert_eq!(config.personal_data, PersonalData::Plain);
    }

    #[test]
    fn every_error_is_reported_at_once_and_unknown_settings_are_named() {
        let file = r#"
            listen = "nowhere"
            sync_listn = "127.0.0.1:1"
            [tokens]
            leeway = "2h"
            isuer = "x"
            [secrets]
            algorithm = "none"
            schedule = "quarterly"
            overlap = "0s"
            retire = "never"
            [hsm]
            module = "/usr/lib/softhsm/libsofthsm2.so"
            signing = "yes"
            [fleet]
            hard_age = 300
            [limits]
            url = "https://keygate-0:8001"
            [emergency]
            two_approvals_above = 25
            [journal]
            personal_data = "dropped"
            [roles.basic]
            life = "1s"
            requests_per_hour = -2
            [roles.robot]
            may_create = ["nobody"]
        "#;
        let errors = read(file, &[("log.format", "xml".into(), "KEYGATE_LOG_FORMAT".into())]).unwrap_err().0;
        for start in [
            "listen: \"nowhere\" is not an address",
            "tokens.leeway: must be whole seconds, at most 60s",
            "limits.url: is not a URL such as \"http://",
            "secrets.algorithm: \"none\" is none of",
            "secrets.schedule: \"quarterly\" is not a cron expression",
            "secrets.overlap: must be whole seconds from 1s",
            "secrets.retire: \"never\" is neither",
            "hsm.signing: \"yes\" is neither true nor false",
            "hsm: both hsm.module and hsm.token are needed",
            "fleet.hard_age: 300 is not a text",
            "emergency.two_approvals_above: 25 is not a share",
            "journal.personal_data: \"dropped\" is neither \"sealed\" nor \"plain\"",
            "log.format: \"xml\" is neither \"text\" nor \"json\" (from KEYGATE_LOG_FORMAT)",
            "roles.basic.life: must be from 1m",
            "roles.basic.requests_per_hour: must be -1",
            "roles.robot: a new role needs",
            "roles.robot.may_create: there is no role \"nobody\"",
            "sync_listn: no such setting",
            "tokens.isuer: no such setting",
        ] {
            assert!(errors.iter().any(|error| error.starts_with(start)), "{start}\n{errors:#?}");
        }
        assert_eq!(errors.len(), 19, "{errors:#?}");
    }

    #[test]
    fn a_canarys_alert_is_so_many_failures_of_so_many() {
        let typed = |toml: &str| read(&format!("[canary]\n{toml}"), &[]).map(|config| config.canary.alert);
        let of = |failures, of| Alert { failures, of };
        assert_eq!(typed("").unwrap(), of(3, 3));
        assert_eq!(typed("alert = { failures = 3, of = 5 }").unwrap(), of(3, 5));
        assert_eq!(typed("alert.failures = 2").unwrap(), of(2, 2));
        assert_eq!(typed("alert.of = 4").unwrap(), of(3, 4));
        let variable = ("canary.alert.of", "9".to_owned(), "KEYGATE_CANARY_ALERT_OF".to_owned());
        assert_eq!(read("", &[variable]).unwrap().canary.alert, of(3, 9));
        for wrong in ["alert.of = 2", "alert.failures = 0", "alert = { failures = 3, of = 101 }", "alert = 3"]
        {
            assert!(typed(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_share_is_a_number_from_0_to_1() {
        let typed = |value: &str| {
            read(&format!("[emergency]\ntwo_approvals_above = {value}"), &[])
                .map(|config| config.two_approvals_above)
        };
        for (value, share) in [("0", 0.0), ("1", 1.0), ("0.25", 0.25), ("\"0.25\"", 0.25)] {
            assert_eq!(typed(value).unwrap(), Some(share), "{value}");
        }
        for value in ["-0.1", "1.1", "2", "nan", "inf", "\"NaN\"", "\"25%\"", "\"\"", "true"] {
            assert!(typed(value).is_err(), "{value}");
        }
        assert_eq!(read("", &[]).unwrap().two_approvals_above, None);
    }

    #[test]
    fn a_role_is_changed_member_by_member() {
        let config =
            read("[roles.basic]\nlife = \"1d\"\n[roles.robot]\nlife = \"1h\"\nscopes = [\"x\"]", &[])
                .unwrap();
        assert_eq!(config.roles["basic"].life, Duration::from_secs(86_400));
        assert_eq!(config.roles["basic"].scopes, ["chat:read", "chat:write"]);
        assert_eq!(config.roles["robot"].requests_per_hour, None);
        assert!(config.roles["admin"].may_create.contains(&"robot".to_owned()));
        assert!(config.roles["admin"].scopes.contains(&"x".to_owned()));
    }
}
