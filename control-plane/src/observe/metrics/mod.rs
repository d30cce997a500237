//! Metrics, one struct for each component. Every series exists from the start, with 0, so that alerts see a first event;
//! labels come from closed sets, never a key, path or owner. Metrics are only written; nothing decides by reading one.

mod canary;
mod durability;
mod fleet;
mod keys;
mod notifications;
mod proxies;
mod quota;
mod redis;
mod rollout;
mod secrets;
mod sync;
mod write_only;

use std::sync::Arc;

use prometheus::{Encoder, Registry, TextEncoder};

pub use self::quota::Doubts;
use crate::model::roles::Roles;
use crate::model::rollout::Flags;
use crate::observe::telemetry::Telemetry;

/// The version label: keys of Keygate.
pub const V2: &str = "v2";

/// All metrics.
pub struct Metrics {
    registry: Registry,
    /// Keys.
    pub keys: keys::KeyMetrics,
    /// The rollout.
    pub rollout: rollout::RolloutMetrics,
    /// The ledger of rate limits.
    pub quota: quota::QuotaMetrics,
    /// Signing secrets.
    pub secrets: secrets::SecretMetrics,
    /// Canary tests.
    pub canary: canary::CanaryMetrics,
    /// Redis and other control planes.
    pub redis: redis::RedisMetrics,
    /// Notifications.
    pub notifications: notifications::NotificationMetrics,
    /// Journal and store.
    pub durability: durability::DurabilityMetrics,
    /// Proxies and the state that they load.
    pub fleet: fleet::FleetMetrics,
    /// The port that proxies poll.
    pub sync: sync::SyncMetrics,
}

impl Metrics {
    /// Makes and registers all of them.
    pub fn new(roles: &Roles) -> Arc<Self> {
        let registry = Registry::new();
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect("a name of its own");
        let metrics = Self {
            keys: keys::KeyMetrics::register(&registry),
            rollout: rollout::RolloutMetrics::register(&registry),
            quota: quota::QuotaMetrics::register(&registry),
            secrets: secrets::SecretMetrics::register(&registry),
            canary: canary::CanaryMetrics::register(&registry),
            redis: redis::RedisMetrics::register(&registry),
            notifications: notifications::NotificationMetrics::register(&registry),
            durability: durability::DurabilityMetrics::register(&registry),
            fleet: fleet::FleetMetrics::register(&registry),
            sync: sync::SyncMetrics::register(&registry),
            registry,
        };
        metrics.keys.begin(roles);
        metrics.rollout.show(&Flags::default(), false, 0);
        metrics.secrets.begin();
        metrics.canary.begin();
        metrics.sync.begin();
        Arc::new(metrics)
    }

    /// Exports what proxies report. To be called once.
    pub fn export(&self, telemetry: Arc<Telemetry>) {
        self.registry.register(Box::new(proxies::ProxyMetrics::new(telemetry))).expect("names of their own");
    }

    /// The text that Prometheus reads.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        // Writing into memory fails only for metrics without names.
        let _never = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_rollout_without_a_v1_is_not_shown_as_in_force() {
        let metrics = Metrics::new(&crate::model::roles::expand(crate::model::roles::defaults()));
        let mut flags = Flags::default();
        flags.rollout.strategy = keygate_core::decide::rollout::Strategy::Off;
        metrics.rollout.show(&flags, true, 0);
        let off = "keygate_rollout_strategy{strategy=\"off\"} 1";
        assert!(metrics.text().contains(off) && metrics.text().contains("keygate_rollout_v2_ratio 0\n"));
        metrics.rollout.show(&flags, false, 0);
        assert!(!metrics.text().contains(off) && metrics.text().contains("keygate_rollout_v2_ratio 1\n"));
    }

    #[test]
    fn every_series_is_there_before_anything_happened() {
        let roles = crate::model::roles::expand(crate::model::roles::defaults());
        let metrics = Metrics::new(&roles);
        let dir = tempfile::tempdir().unwrap();
        metrics.export(Arc::new(Telemetry::open(dir.path(), roles.keys().cloned().collect()).unwrap()));
        crate::redis_store::begin_metrics(&metrics);
        let text = metrics.text();
        for series in [
            "api_key_created_total{role=\"basic\",version=\"v2\"} 0",
            "api_key_validated_total{result=\"failure\",role=\"admin\",version=\"v2\"} 0",
            "api_key_refreshed_total{role=\"basic\",success=\"false\"} 0",
            "api_key_revoked_total{reason=\"compromised\",role=\"contributor\"} 0",
            "auth_errors_total{error_type=\"revoked\",version=\"v2\"} 0",
            "key_validation_duration_seconds_count{version=\"v2\"} 0",
            "active_api_keys{role=\"node_operator\"} 0",
            "keygate_journal_failures_total 0",
            "keygate_telemetry_failures_total 0",
            "keygate_requests_total{endpoint=\"none\",outcome=\"passed\",version=\"v2\"} 0",
            "jwt_decode_duration_seconds_count 0",
            "keygate_break_glass_total 0",
            "keygate_canary_configured 0",
            "keygate_canary_consecutive_failures 0",
            "keygate_canary_alerting 0",
            "keygate_store_backlog 0",
            "keygate_propagation_timeouts_total 0",
            "keygate_fleet_stale 0",
            "keygate_fleet_lag_seconds 0",
            "keygate_snapshot_bytes 0",
            "keygate_snapshot_age_seconds 0",
            "redis_connection_status 0",
            "redis_operation_duration_seconds_count{operation=\"append\"} 0",
            "keygate_redis_errors_total{kind=\"out_of_memory\"} 0",
            "keygate_redis_errors_total{kind=\"forked\"} 0",
            "keygate_redis_edits_total{key=\"emergency_revocation\",outcome=\"refused\"} 0",
        ] {
            assert!(text.contains(series), "{series}");
        }
    }
}
