//! Counts of what proxies report and of what this process's own API counts: plain data with typed labels. Metrics are
//! made of it when they are scraped, and the rollout is judged by it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use keygate_core::decide::Reason;
use keygate_core::decide::refusal::Refusal;
use keygate_core::decide::rollout::ApiVersion;
use keygate_core::telemetry::{Series, Times, Timing, Trouble};
use serde::{Deserialize, Serialize};

/// Endpoint of a route that this control plane does not know.
pub const OTHER: &str = "other";
/// Endpoint of a request that no route matched.
pub const NONE: &str = "none";
/// Role of a request whose key was not verified.
pub const UNKNOWN: &str = "unknown";

/// Labels of a decision on a request.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Decision {
    /// The precise reason.
    pub reason: Reason,
    /// The route's name, [`NONE`] or [`OTHER`].
    pub endpoint: String,
    /// The key's role, or [`UNKNOWN`].
    pub role: String,
}

/// Labels of an upstream's response that tells of trouble.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct UpstreamResponse {
    /// The upstream.
    pub version: ApiVersion,
    /// The kind of response.
    pub trouble: Trouble,
    /// The route's name, [`NONE`] or [`OTHER`].
    pub endpoint: String,
}

/// Labels of a key's validation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Validation {
    /// The key's role, or [`UNKNOWN`].
    pub role: String,
    /// Whether the key is valid.
    pub success: bool,
}

/// Result of a request, as operators see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Sent to an upstream.
    Passed,
    /// Refused.
    Refused,
    /// Answered with 503, since nothing could be decided.
    Unavailable,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 3] = [Self::Passed, Self::Refused, Self::Unavailable];

    /// Outcome of a decision.
    pub fn of(reason: Reason) -> Self {
        match reason.refusal() {
            None => Self::Passed,
            Some(Refusal::Unavailable) => Self::Unavailable,
            Some(_) => Self::Refused,
        }
    }

    /// Label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
        }
    }
}

/// The version that a decision sends a request to.
pub fn version_of(reason: Reason) -> ApiVersion {
    if reason == Reason::V1 { ApiVersion::V1 } else { ApiVersion::V2 }
}

/// Everything that is counted over restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Decisions of proxies.
    #[serde(with = "rows")]
    pub decisions: BTreeMap<Decision, u64>,
    /// Responses of upstreams that tell of trouble.
    #[serde(with = "rows")]
    pub upstream_responses: BTreeMap<UpstreamResponse, u64>,
    /// Validations by this process's own API.
    #[serde(with = "rows")]
    pub api_validations: BTreeMap<Validation, u64>,
    /// Refusals of this process's own API.
    #[serde(with = "rows")]
    pub api_refusals: BTreeMap<Reason, u64>,
    /// Durations of decisions.
    pub validation_times: Times,
    /// Durations of reading and verifying tokens.
    pub decode_times: Times,
}

impl Counts {
    /// Adds `more` to a series of a report. Unknown routes become [`OTHER`] and unknown roles [`UNKNOWN`], so that
    /// reports cannot make new labels.
    pub fn add(
        &mut self,
        series: Series<'_>,
        more: u64,
        routes: &BTreeSet<String>,
        roles: &BTreeSet<String>,
    ) {
        match series {
            Series::Decision { reason, route, role } => {
                let role = known_role(role, roles);
                add(
                    &mut self.decisions,
                    Decision { reason, endpoint: endpoint(route, routes).into(), role },
                    more,
                );
            }
            Series::Answer { version, trouble, route } => {
                let labels = UpstreamResponse { version, trouble, endpoint: endpoint(route, routes).into() };
                add(&mut self.upstream_responses, labels, more);
            }
            Series::Bucket { timing, bucket } => {
                if let Some(count) = self.times_mut(timing).buckets.get_mut(bucket) {
                    *count = count.saturating_add(more);
                }
            }
            Series::TimeSum { timing } => {
                let sum = &mut self.times_mut(timing).sum_ns;
                *sum = sum.saturating_add(more);
            }
        }
    }

    /// Counts a key that the API validated.
    pub fn add_validation(&mut self, role: &str, success: bool, roles: &BTreeSet<String>) {
        add(&mut self.api_validations, Validation { role: known_role(role, roles), success }, 1);
    }

    /// Counts a request that the API refused.
    pub fn add_refusal(&mut self, reason: Reason) {
        add(&mut self.api_refusals, reason, 1);
    }

    /// Adds a duration.
    pub fn add_time(&mut self, timing: Timing, time: Duration) {
        self.times_mut(timing).add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Durations of one kind.
    pub const fn times(&self, timing: Timing) -> &Times {
        match timing {
            Timing::Validation => &self.validation_times,
            Timing::Decode => &self.decode_times,
        }
    }

    const fn times_mut(&mut self, timing: Timing) -> &mut Times {
        match timing {
            Timing::Validation => &mut self.validation_times,
            Timing::Decode => &mut self.decode_times,
        }
    }

    /// Names of the routes that there are counts of.
    pub fn routes(&self) -> impl Iterator<Item = &str> {
        let decisions = self.decisions.keys().map(|labels| labels.endpoint.as_str());
        let responses = self.upstream_responses.keys().map(|labels| labels.endpoint.as_str());
        decisions.chain(responses).filter(|endpoint| ![NONE, OTHER].contains(endpoint))
    }
}

fn add<K: Ord>(counts: &mut BTreeMap<K, u64>, labels: K, more: u64) {
    let count = counts.entry(labels).or_default();
    *count = count.saturating_add(more);
}

fn endpoint<'r>(route: &'r str, routes: &BTreeSet<String>) -> &'r str {
    match route {
        "" => NONE,
        route if routes.contains(route) => route,
        _ => OTHER,
    }
}

fn known_role(role: &str, roles: &BTreeSet<String>) -> String {
    if roles.contains(role) { role.to_owned() } else { UNKNOWN.to_owned() }
}

/// Maps as lists of pairs, since JSON has only text as keys.
mod rows {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<K: Serialize, S: Serializer>(
        counts: &BTreeMap<K, u64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(counts)
    }

    pub fn deserialize<'de, K: Deserialize<'de> + Ord, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<K, u64>, D::Error> {
        Ok(Vec::<(K, u64)>::deserialize(deserializer)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_saved_as_this_json() {
        let mut counts = Counts::default();
        let routes = BTreeSet::from(["chat".to_owned()]);
        let roles = BTreeSet::from(["basic".to_owned()]);
        for (name, more) in [
            ("decision allowed chat basic", 5),
            ("decision revoked old nobody", 2),
            ("decision no_route  ", 1),
            ("answer v1 error chat", 3),
            ("time decode 2", 4),
            ("time decode sum", 9_000),
        ] {
            counts.add(Series::of(name).unwrap(), more, &routes, &roles);
        }
        counts.add_validation("basic", true, &roles);
        counts.add_refusal(Reason::Expired);
        let json = serde_json::json!({
            "decisions": [
                [{ "reason": "allowed", "endpoint": "chat", "role": "basic" }, 5],
                [{ "reason": "no_route", "endpoint": "none", "role": "unknown" }, 1],
                [{ "reason": "revoked", "endpoint": "other", "role": "unknown" }, 2],
            ],
            "upstream_responses": [[{ "version": "v1", "trouble": "error", "endpoint": "chat" }, 3]],
            "api_validations": [[{ "role": "basic", "success": true }, 1]],
            "api_refusals": [["expired", 1]],
            "validation_times": { "buckets": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "sum_ns": 0 },
            "decode_times": { "buckets": [0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "sum_ns": 9_000 },
        });
        assert_eq!(serde_json::to_value(&counts).unwrap(), json);
        assert_eq!(serde_json::from_value::<Counts>(json).unwrap(), counts);
        assert_eq!(counts.routes().collect::<Vec<_>>(), ["chat", "chat"]);
    }

    #[test]
    fn the_saved_name_of_a_reason_is_its_label() {
        for reason in Reason::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.label());
        }
    }
}
