//! How many requests went to which version, and what became of them: for people, and for the guard.

use std::collections::BTreeMap;

use keygate_core::decide::Reason;
use keygate_core::decide::rollout::ApiVersion;
use prometheus::core::Collector as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::metrics::Metrics;

/// What one version did.
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
    /// What is here beyond `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            requests: self.requests.saturating_sub(before.requests),
            errors: self.errors.saturating_sub(before.errors),
            refused: self.refused.saturating_sub(before.refused),
        }
    }

    /// Both together.
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

/// Both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// V1.
    pub v1: OfVersion,
    /// V2.
    pub v2: OfVersion,
}

impl Tally {
    /// What is here beyond `before`.
    pub fn since(self, before: Self) -> Self {
        Self { v1: self.v1.since(before.v1), v2: self.v2.since(before.v2) }
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self { v1: self.v1.plus(other.v1), v2: self.v2.plus(other.v2) }
    }

    /// What proxies have counted until now.
    pub fn of(metrics: &Metrics) -> Self {
        let mut tally = Self::default();
        each(&metrics.requests, |labels, count| {
            let of = tally.version(labels.get("version"));
            of.requests += count;
            if labels.get("outcome").is_some_and(|outcome| outcome == "unavailable") {
                of.errors += count;
            }
        });
        each(&metrics.upstream_answers, |labels, count| {
            let is_error = labels.get("kind").is_some_and(|kind| kind == "error");
            let of = tally.version(labels.get("version"));
            if is_error {
                of.errors += count;
            } else {
                of.refused += count;
            }
        });
        // What V2's upstream denies by itself is its own matter; what Keygate refuses for it is not.
        tally.v2.refused = 0;
        each(&metrics.refusals, |labels, count| {
            let reason = labels
                .get("error_type")
                .and_then(|label| Reason::ALL.into_iter().find(|reason| reason.label() == label.as_str()));
            if reason.is_some_and(is_fault) {
                tally.v2.refused += count;
            }
        });
        tally
    }

    fn version(&mut self, label: Option<&String>) -> &mut OfVersion {
        if label.is_some_and(|label| label == ApiVersion::V1.label()) { &mut self.v1 } else { &mut self.v2 }
    }

    /// For people.
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

/// Whether a refusal may be trouble of V2, rather than what somebody ordered or a client forgot: V1 would have let the
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
pub fn by_endpoint(metrics: &Metrics) -> Vec<Value> {
    let mut rows: BTreeMap<(String, String), BTreeMap<String, u64>> = BTreeMap::new();
    let mut note = |labels: &BTreeMap<String, String>, what: &str, count: u64| {
        let of = |name: &str| labels.get(name).cloned().unwrap_or_default();
        *rows.entry((of("endpoint"), of("version"))).or_default().entry(what.to_owned()).or_default() +=
            count;
    };
    each(&metrics.requests, |labels, count| {
        let outcome = labels.get("outcome").cloned().unwrap_or_default();
        note(labels, &outcome, count);
    });
    each(&metrics.upstream_answers, |labels, count| {
        let kind = labels.get("kind").cloned().unwrap_or_default();
        note(labels, if kind == "error" { "upstream_errors" } else { "upstream_denied" }, count);
    });
    let row = |((endpoint, version), counts): ((String, String), BTreeMap<String, u64>)| {
        let mut row = json!({ "endpoint": endpoint, "version": version });
        for (what, count) in counts {
            row[what] = json!(count);
        }
        row
    };
    rows.into_iter().filter(|(_, counts)| counts.values().any(|count| *count > 0)).map(row).collect()
}

fn each(counters: &prometheus::IntCounterVec, mut note: impl FnMut(&BTreeMap<String, String>, u64)) {
    for family in counters.collect() {
        for metric in family.get_metric() {
            let labels = metric.get_label().iter();
            let labels = labels.map(|label| (label.name().to_owned(), label.value().to_owned())).collect();
            // Whole numbers, exact up to 2^53.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let count = metric.get_counter().get_value() as u64;
            note(&labels, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roles;

    #[test]
    fn what_somebody_without_a_key_makes_up_is_no_fault_of_v2() {
        let metrics = Metrics::new(&roles::expand(roles::defaults()));
        let refused =
            |reason: Reason, count| metrics.refusals.with_label_values(&[reason.label()]).inc_by(count);
        refused(Reason::ForgedId, 1_000);
        refused(Reason::Revoked, 100);
        assert_eq!(Tally::of(&metrics).v2.refused, 0);
        refused(Reason::BadSignature, 3);
        refused(Reason::MissingScope, 4);
        assert_eq!(Tally::of(&metrics).v2.refused, 7);
    }
}
