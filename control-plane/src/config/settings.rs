//! The settings: their keys, their defaults and their help. A default stands nowhere else.

/// A setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Its key in `keygate.toml`.
    pub key: &'static str,
    /// Its default.
    pub default: Default,
    /// Its help.
    pub help: &'static str,
}

/// The default of a setting.
#[derive(Debug, Clone, Copy)]
pub enum Default {
    /// This value, as an operator would type it.
    Value(&'static str),
    /// A value that depends on others; a description of it.
    Derived(&'static str),
    /// None: the setting is optional.
    None,
}

use self::Default::{Derived, None as Unset, Value};

const fn setting(key: &'static str, default: Default, help: &'static str) -> Setting {
    Setting { key, default, help }
}

/// All settings but roles.
pub const SETTINGS: [Setting; 55] = [
    setting("listen", Value("127.0.0.1:8000"), "Address of the API, metrics and console"),
    setting("sync_listen", Value("127.0.0.1:8001"), "Address of the sync port, for proxies only"),
    setting("data_dir", Value(".keygate/data"), "Directory of the journal and the store"),
    setting("admin_key_file", Derived("<data_dir>/admin.key"), "File for the first admin key, written once"),
    setting(
        "fleet_token_file",
        Derived("<data_dir>/fleet.token"),
        "File with the token of proxies; created if missing",
    ),
    setting(
        "master_key_file",
        Derived("<data_dir>/master.key"),
        "File with the key that seals secrets; created if missing",
    ),
    setting(
        "previous_master_key_file",
        Unset,
        "File with the former master key, while all control planes change to the new one",
    ),
    setting("policy_file", Unset, "Route policy for a new data directory"),
    setting("tokens.issuer", Value("keygate"), "The `iss` of keys"),
    setting("tokens.audience", Unset, "The `aud` of keys"),
    setting("tokens.realm", Value("keygate"), "The realm in challenges"),
    setting("tokens.leeway", Value("0s"), "Largest difference between clocks, at most 60s"),
    setting("secrets.algorithm", Value("ES256"), "Algorithm of new secrets: ES256, EdDSA or HS256"),
    setting(
        "secrets.overlap",
        Value("24h"),
        "Time for which a retired secret still verifies keys, with after_overlap",
    ),
    setting(
        "secrets.retire",
        Derived("after_overlap for HS256, else with_last_key"),
        "When a retired secret ends: after_overlap or with_last_key",
    ),
    setting(
        "secrets.schedule",
        Value("0 3 1 1,4,7,10 *"),
        "Schedule of rotations: cron with five fields in UTC, or off; the default is quarterly",
    ),
    setting(
        "secrets.propagation_timeout",
        Value("10m"),
        "Alert if proxies have not loaded a new secret within this time, 1s to 24h",
    ),
    setting("hsm.module", Unset, "PKCS#11 module of an HSM, such as /usr/lib/softhsm/libsofthsm2.so"),
    setting("hsm.token", Unset, "Label of the HSM's token"),
    setting("hsm.pin_file", Unset, "File with the HSM's PIN; KEYGATE_HSM_PIN overrides it"),
    setting(
        "hsm.master_key",
        Unset,
        "Label of the AES key in the HSM that is the master key; created at the first start if missing",
    ),
    setting(
        "hsm.previous_master_key",
        Unset,
        "Label of the former master key, while all control planes change to the new one",
    ),
    setting(
        "hsm.signing",
        Value("false"),
        "Whether the HSM creates and keeps new ES256 secrets: true or false",
    ),
    setting(
        "fleet.max_staleness",
        Value("300s"),
        "Time without news after which proxies answer 503, 1s to 24h",
    ),
    setting(
        "emergency.second_approval_threshold",
        Derived("never"),
        "Share of live keys, 0 to 1, above which a mass revocation needs a second approval",
    ),
    setting(
        "journal.personal_data",
        Value("sealed"),
        "Form of owners and metadata of keys in the journal: sealed (and as salted hashes) or plain",
    ),
    setting(
        "journal.retention",
        Value("7y"),
        "Time for which records are kept, such as 90d or 7y, at least 1d",
    ),
    setting(
        "redis.url",
        Unset,
        "Redis that control planes share: redis://, rediss://, redis+sentinel://, redis+cluster://",
    ),
    setting(
        "redis.replicas",
        Derived("1 with Sentinel, else 0"),
        "Number of replicas that must have a change before it counts as replicated",
    ),
    setting("redis.timeout", Value("500ms"), "Time-out of a call of Redis, 50ms to 10s"),
    setting(
        "durability",
        Value("local"),
        "Durability below which a change is answered with 202: local or replicated",
    ),
    setting(
        "canary.urls",
        Unset,
        "URLs of proxies to test as clients reach them: a list, or separated by commas",
    ),
    setting("canary.interval", Value("60s"), "Interval of the tests, 1s to 1h"),
    setting(
        "canary.probe_interval",
        Value("5m"),
        "Interval at which a key is issued, used and revoked through each proxy, 1s to 1d",
    ),
    setting("canary.app_endpoint", Value("/api/chat"), "Path that the tests of the application call"),
    setting("canary.role", Value("basic"), "Role of the canary's key"),
    setting(
        "canary.alert.failures",
        Value("3"),
        "Alert after this many failures of a critical test, 1 to 100",
    ),
    setting(
        "canary.alert.window",
        Derived("canary.alert.failures: consecutive failures"),
        "Number of latest results among which failures are counted, up to 100",
    ),
    setting("canary.allowed_hosts", Unset, "Further hosts that tests may call, as host or host:port"),
    setting("limits.enforce", Value("true"), "Whether limits of keys are enforced: true or false"),
    setting(
        "limits.url",
        Derived("http:// and sync_listen, or the host's name if that is any address"),
        "URL at which other control planes reach this one's sync port, to forward questions about limits",
    ),
    setting(
        "limits.hot_restart",
        Value("false"),
        "Whether proxies restart hot, with two processes of one that serve for a while: true or false",
    ),
    setting("rollout.v1_cluster", Unset, "Envoy cluster of the V1 upstream; without it there is no V1"),
    setting("rollout.guard.window", Value("60s"), "Time over which the guard counts requests, 5s to 1h"),
    setting(
        "rollout.guard.min_requests",
        Value("50"),
        "Least number of requests to V2 in the window; with fewer, the guard does not judge",
    ),
    setting(
        "rollout.guard.margin",
        Value("0.05"),
        "Most by which V2's share of bad requests may exceed V1's, 0 to 1",
    ),
    setting(
        "rollout.guard.stable_after",
        Value("10m"),
        "Time after which a step of the rollout counts as stable; the guard rolls back to the last stable one",
    ),
    setting(
        "rollout.guard.on_breach",
        Value("previous"),
        "What the guard does when V2 fares worse: previous (the last stable step, else off), off, or hold (pause and notify)",
    ),
    setting("notify.source", Value("keygate"), "Name of this control plane in notifications"),
    setting(
        "notify.slack_url_file",
        Unset,
        "File with the URL of a Slack incoming webhook; KEYGATE_NOTIFY_SLACK_URL overrides it",
    ),
    setting(
        "notify.pagerduty_key_file",
        Unset,
        "File with a PagerDuty routing key; KEYGATE_NOTIFY_PAGERDUTY_KEY overrides it",
    ),
    setting(
        "notify.pagerduty_url",
        Value("https://events.pagerduty.com/v2/enqueue"),
        "URL of the PagerDuty Events API",
    ),
    setting("notify.webhook_url", Unset, "URL to which notifications are posted, signed"),
    setting(
        "notify.webhook_secret_file",
        Unset,
        "File with the secret that signs them, at least 16 characters; KEYGATE_NOTIFY_WEBHOOK_SECRET overrides it",
    ),
    setting("log.format", Value("text"), "Format of the log: text or json"),
];

/// Former keys, each with the one that replaced it.
pub const RENAMED: [(&str, &str); 5] = [
    ("canary.alert.of", "canary.alert.window"),
    ("emergency.two_approvals_above", "emergency.second_approval_threshold"),
    ("fleet.hard_age", "fleet.max_staleness"),
    ("rollout.guard.good_after", "rollout.guard.stable_after"),
    ("secrets.gate_timeout", "secrets.propagation_timeout"),
];

impl Setting {
    /// Its environment variable.
    pub fn variable(&self) -> String {
        variable(self.key)
    }

    /// Its help with its default.
    pub fn describe(&self) -> String {
        match self.default {
            Value(default) | Derived(default) => format!("{} [default: {default}]", self.help),
            Unset => self.help.to_owned(),
        }
    }
}

/// The setting with a key.
pub fn find(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// The environment variable of a key.
pub fn variable(key: &str) -> String {
    format!("KEYGATE_{}", key.replace('.', "_").to_uppercase())
}
