//! Observation: what proxies report, metrics, and notifications.

pub mod fleet;
pub mod metrics;
pub mod notify;
pub mod telemetry;
