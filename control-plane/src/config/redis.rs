//! Settings of Redis.

use std::time::Duration;

use super::Target;
use super::raw::RawConfig;
use super::value::{count, redis_timeout};

/// The Redis that control planes share.
#[derive(Debug, Clone)]
pub struct Redis {
    /// Its address.
    pub target: Target,
    /// Number of replicas that must have a change before it counts as replicated.
    pub replicas: u64,
    /// Time-out of a call.
    pub timeout: Duration,
}

impl Redis {
    pub(super) fn read(raw: &mut RawConfig) -> Option<Self> {
        let target = raw.take("redis.url", |value| {
            let text = value.as_str().ok_or("is not a text")?; // It may hold a password.
            text.parse::<Target>().map_err(|error| error.to_string())
        });
        let replicas = raw.take("redis.replicas", count);
        let timeout = raw.get("redis.timeout", redis_timeout);
        let target = target?;
        let usual = u64::from(target.is_sentinel());
        Some(Self { replicas: replicas.unwrap_or(usual), timeout, target })
    }
}
