//! The part of the configuration that proxies must know.

use std::collections::BTreeMap;

use keygate_core::decide::limits::Limits;
use serde::{Deserialize, Serialize};

use crate::model::limits;

/// Settings of the state. Journalled when they changed, so that proxies get a new version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Issuer of keys.
    pub issuer: String,
    /// Audience of keys, if they have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audience: Option<String>,
    /// Realm of challenges.
    pub realm: String,
    /// Tolerance of clocks, seconds.
    pub leeway_s: u64,
    /// Longest life of a key, seconds.
    pub max_life_s: u64,
    /// Age of a state from which proxies refuse, seconds.
    pub hard_age_s: u64,
    /// Whether there is a V1.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_v1: bool,
    /// Requests an hour of each role that has a limit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub role_limits: BTreeMap<String, u32>,
    /// Whether no limits are enforced.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_limits: bool,
}

impl Settings {
    /// The limits that a new history begins with.
    pub fn first_limits(&self) -> Limits {
        if self.without_limits {
            Limits::default()
        } else {
            limits::Set::default().in_force(&self.role_limits, None)
        }
    }

    /// The longest life of a key, in seconds.
    pub const fn max_life_s(&self) -> u64 {
        self.max_life_s
    }
}
