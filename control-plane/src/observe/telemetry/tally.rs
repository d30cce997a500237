//! Requests of the rollout by version, with errors and refusals: for operators, and for the guard.

use std::collections::BTreeMap;

use keygate_core::decide::Reason;
use keygate_core::decide::rollout::ApiVersion;
use keygate_core::telemetry::Trouble;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::counts::{Counts, Outcome, version_of};

/// Requests to one version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfVersion {
    /// Requests.
    pub requests: u64,
    /// Those that an upstream answered with 500 or more, or that V2 could not decide on.
    pub errors: u64,
    /// Those that were refused for a reason that V1 may not share: see [`is_fault`]. Of V1, whatever it answered with
    /// 401, 403 or 429.
    pub refused: u64,
}

impl OfVersion {
    /// The excess over `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(before.requests),
            errors: self.errors.saturating_sub(before.errors),
            refused: self.refused.saturating_sub(before.refused),
        }
    }

    /// The sum of both.
    pub fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests.saturating_add(other.requests),
            errors: self.errors.saturating_add(other.errors),
            refused: self.refused.saturating_add(other.refused),
        }
    }

    /// Requests that did not end well.
    pub const fn bad(self) -> u64 {
        self.errors.saturating_add(self.refused)
    }

    /// The share of them, 0 when there were no requests.
    pub fn bad_share(self) -> f64 {
        self.share(self.bad())
    }

    /// The share of errors, refusals apart.
    pub fn error_share(self) -> f64 {
        self.share(self.errors)
    }

    #[allow(clippy::cast_precision_loss)]
    fn share(self, part: u64) -> f64 {
        if self.requests == 0 { 0.0 } else { part.min(self.requests) as f64 / self.requests as f64 }
    }
}

/// Requests to both versions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// V1.
    pub v1: OfVersion,
    /// V2.
    pub v2: OfVersion,
}

impl Tally {
    /// The excess over `before`.
    pub fn since(self, before: Self) -> Self {
        Self { v1: self.v1.since(before.v1), v2: self.v2.since(before.v2) }
    }

    /// The sum of both.
    pub fn plus(self, other: Self) -> Self {
        Self { v1: self.v1.plus(other.v1), v2: self.v2.plus(other.v2) }
    }

    /// The rollout's part of counts.
    pub fn of(counts: &Counts) -> Self {
        let mut tally = Self::default();
        for (decision, count) in &counts.decisions {
            let of = tally.version_mut(version_of(decision.reason));
            of.requests = of.requests.saturating_add(*count);
            if Outcome::of(decision.reason) == Outcome::Unavailable {
                of.errors = of.errors.saturating_add(*count);
            }
            if is_fault(decision.reason) {
                of.refused = of.refused.saturating_add(*count);
            }
        }
        for (response, count) in &counts.upstream_responses {
            let of = tally.version_mut(response.version);
            match (response.trouble, response.version) {
                (Trouble::Error, _) => of.errors = of.errors.saturating_add(*count),
                (Trouble::Denied, ApiVersion::V1) => of.refused = of.refused.saturating_add(*count),
                // Denials by V2's upstream are its own decision; only Keygate's refusals count for V2.
                (Trouble::Denied, ApiVersion::V2) => {}
            }
        }
        tally
    }

    const fn version_mut(&mut self, version: ApiVersion) -> &mut OfVersion {
        match version {
            ApiVersion::V1 => &mut self.v1,
            ApiVersion::V2 => &mut self.v2,
        }
    }

    /// JSON for operators.
    #[allow(clippy::cast_precision_loss)]
    pub fn show(self) -> Value {
        let all = self.v1.requests.saturating_add(self.v2.requests);
        let percentage = |requests: u64| {
            if all == 0 { 0.0 } else { (requests as f64 / all as f64 * 10_000.0).round() / 100.0 }
        };
        json!({
            "v1_requests": self.v1.requests,
            "v2_requests": self.v2.requests,
            "v1_errors": self.v1.errors,
            "v2_errors": self.v2.errors,
            "v1_refused": self.v1.refused,
            "v2_refused": self.v2.refused,
            "v1_percentage": percentage(self.v1.requests),
            "v2_percentage": percentage(self.v2.requests),
        })
    }
}

/// Whether a refusal may be a fault of V2, rather than an operator's order or a client's mistake: V1 would have let the
/// key pass. Each new reason must be decided on here, as the guard rolls back by them.
pub const fn is_fault(reason: Reason) -> bool {
    match reason {
        Reason::Malformed
        | Reason::UnknownKid
        | Reason::AlgorithmMismatch
        | Reason::WrongIssuer
        | Reason::WrongAudience
        | Reason::NotYetValid
        | Reason::LifeTooLong
        | Reason::BadSignature
        | Reason::MissingScope
        | Reason::WrongRole => true,
        Reason::Allowed
        | Reason::Public
        | Reason::V1
        | Reason::NoRoute
        | Reason::MissingCredential
        | Reason::TooManyCredentials
        | Reason::NoState
        | Reason::StaleState
        | Reason::RevocationUnknown
        | Reason::Expired
        | Reason::ForgedId
        | Reason::Lockdown
        | Reason::Revoked
        | Reason::Suspended
        | Reason::Cutoff
        | Reason::RateLimited
        | Reason::LimitUnknown
        | Reason::LimitPending => false,
    }
}

/// Requests by route, version and outcome.
pub fn by_endpoint(counts: &Counts) -> Vec<Value> {
    let mut rows: BTreeMap<(&str, ApiVersion), BTreeMap<&str, u64>> = BTreeMap::new();
    let mut add = |endpoint, version, name, count: u64| {
        let sum = rows.entry((endpoint, version)).or_default().entry(name).or_default();
        *sum = sum.saturating_add(count);
    };
    for (decision, count) in &counts.decisions {
        let (version, outcome) = (version_of(decision.reason), Outcome::of(decision.reason));
        add(decision.endpoint.as_str(), version, outcome.label(), *count);
    }
    for (response, count) in &counts.upstream_responses {
        let name = match response.trouble {
            Trouble::Error => "upstream_errors",
            Trouble::Denied => "upstream_denied",
        };
        add(response.endpoint.as_str(), response.version, name, *count);
    }
    let row = |((endpoint, version), counts): ((&str, ApiVersion), BTreeMap<&str, u64>)| {
        let mut row = json!({ "endpoint": endpoint, "version": version.label() });
        for (name, count) in counts {
            row[name] = json!(count);
        }
        row
    };
    rows.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::telemetry::counts::{Decision, UpstreamResponse};

    fn decided(counts: &mut Counts, reason: Reason, count: u64) {
        let labels = Decision { reason, endpoint: "chat".into(), role: "basic".into() };
        *counts.decisions.entry(labels).or_default() += count;
    }

    fn answered(counts: &mut Counts, version: ApiVersion, trouble: Trouble, count: u64) {
        let labels = UpstreamResponse { version, trouble, endpoint: "chat".into() };
        *counts.upstream_responses.entry(labels).or_default() += count;
    }

    #[test]
    fn what_somebody_without_a_key_makes_up_is_no_fault_of_v2() {
        let mut counts = Counts::default();
        decided(&mut counts, Reason::ForgedId, 1_000);
        decided(&mut counts, Reason::Revoked, 100);
        assert_eq!(Tally::of(&counts).v2.refused, 0);
        decided(&mut counts, Reason::BadSignature, 3);
        decided(&mut counts, Reason::MissingScope, 4);
        assert_eq!(Tally::of(&counts).v2.refused, 7);
    }

    #[test]
    fn a_denial_of_the_upstream_counts_as_refused_for_v1_alone() {
        let mut counts = Counts::default();
        decided(&mut counts, Reason::V1, 10);
        decided(&mut counts, Reason::Allowed, 20);
        decided(&mut counts, Reason::NoState, 5);
        for version in [ApiVersion::V1, ApiVersion::V2] {
            answered(&mut counts, version, Trouble::Error, 2);
            answered(&mut counts, version, Trouble::Denied, 3);
        }
        let v1 = OfVersion { requests: 10, errors: 2, refused: 3 };
        let v2 = OfVersion { requests: 25, errors: 7, refused: 0 };
        assert_eq!(Tally::of(&counts), Tally { v1, v2 });
        assert_eq!(
            json!(by_endpoint(&counts)),
            json!([
                { "endpoint": "chat", "version": "v1", "passed": 10, "upstream_errors": 2, "upstream_denied": 3 },
                { "endpoint": "chat", "version": "v2", "passed": 20, "unavailable": 5, "upstream_errors": 2,
                  "upstream_denied": 3 },
            ])
        );
    }
}
