//! Metrics of what proxies report, made of the counts when they are scraped.

use std::collections::HashMap;
use std::sync::Arc;

use keygate_core::decide::rollout::ApiVersion;
use keygate_core::decide::{Reason, Validation};
use keygate_core::telemetry::{BOUNDS_NS, Times, Timing, Trouble};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{IntCounterVec, Opts};

use crate::observe::telemetry::counts::{Counts, NONE, OTHER, Outcome, UNKNOWN, version_of};
use crate::observe::telemetry::{Exported, Telemetry};

const V1: &str = ApiVersion::V1.label();
const V2: &str = ApiVersion::V2.label();

/// A metric that is made of counts.
struct Family {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
}

const VALIDATED: Family = Family {
    name: "api_key_validated_total",
    help: "Keys validated by proxies and by /api/auth/validate; 'limited': valid, and beyond its limit; role is 'unknown' when the signature did not verify.",
    labels: &["role", "version", "result"],
};
const REQUESTS: Family = Family {
    name: "keygate_requests_total",
    help: "Requests to proxies and what was decided; endpoint is the route's name in the policy, 'none' when none matched.",
    labels: &["version", "endpoint", "outcome"],
};
const REFUSALS: Family = Family {
    name: "keygate_refusals_total",
    help: "Requests refused by proxies, by precise reason.",
    labels: &["error_type"],
};
const UPSTREAM_RESPONSES: Family = Family {
    name: "keygate_upstream_responses_total",
    help: "Responses of an upstream that tell of trouble, while a rollout is under way: error (500 and more), denied (401, 403, 429).",
    labels: &["version", "endpoint", "kind"],
};
const AUTH_ERRORS: Family = Family {
    name: "auth_errors_total",
    help: "Requests refused by proxies and by the control plane's own API, by precise reason.",
    labels: &["error_type", "version"],
};
const RATE_LIMIT_EXCEEDED: Family = Family {
    name: "rate_limit_exceeded_total",
    help: "Requests beyond a key's limit; endpoint is the route's name in the policy.",
    labels: &["role", "endpoint"],
};
const TELEMETRY_FAILURES: Family = Family {
    name: "keygate_telemetry_failures_total",
    help: "Times that the reports of proxies could not be saved; proxies report again.",
    labels: &[],
};
const VALIDATION_SECONDS: Family = Family {
    name: "key_validation_duration_seconds",
    help: "Time to decide on a key: of every call of the API, and of one in sixteen requests to proxies.",
    labels: &["version"],
};
const DECODE_SECONDS: Family = Family {
    name: "jwt_decode_duration_seconds",
    help: "Time to read and verify a token, or to find it in the cache; of the same calls and requests.",
    labels: &[],
};
const ALL: [&Family; 9] = [
    &VALIDATED,
    &REQUESTS,
    &REFUSALS,
    &UPSTREAM_RESPONSES,
    &AUTH_ERRORS,
    &RATE_LIMIT_EXCEEDED,
    &TELEMETRY_FAILURES,
    &VALIDATION_SECONDS,
    &DECODE_SECONDS,
];

/// Exporter of the counts.
pub struct ProxyMetrics {
    telemetry: Arc<Telemetry>,
    descs: Vec<Desc>,
}

impl ProxyMetrics {
    /// Exporter of the counts of `telemetry`.
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        let desc = |family: &&Family| {
            let labels = family.labels.iter().map(|label| (*label).to_owned()).collect();
            Desc::new(family.name.into(), family.help.into(), labels, HashMap::new()).expect("a valid metric")
        };
        Self { telemetry, descs: ALL.iter().map(desc).collect() }
    }
}

impl Collector for ProxyMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let exported = self.telemetry.exported();
        let roles: Vec<&str> = self.telemetry.roles().iter().map(String::as_str).collect();
        let mut families = counters(&exported, &roles);
        families.push(VALIDATION_SECONDS.times(exported.counts().times(Timing::Validation), &[V2]));
        families.push(DECODE_SECONDS.times(exported.counts().times(Timing::Decode), &[]));
        families
    }
}

/// Counters, with 0 for what has not happened yet.
fn counters(exported: &Exported, roles: &[&str]) -> Vec<MetricFamily> {
    let counts: &Counts = exported.counts();
    let mut validated = VALIDATED.counter();
    let mut requests = REQUESTS.counter();
    let mut refusals = REFUSALS.counter();
    let mut upstream_responses = UPSTREAM_RESPONSES.counter();
    let mut auth_errors = AUTH_ERRORS.counter();
    let mut rate_limit_exceeded = RATE_LIMIT_EXCEEDED.counter();
    let mut failures = TELEMETRY_FAILURES.counter();
    failures.add(&[], exported.failures);

    for role in roles {
        for result in Validation::ALL {
            validated.add(&[role, V2, result.label()], 0);
        }
        for route in &exported.routes {
            rate_limit_exceeded.add(&[role, route], 0);
        }
    }
    validated.add(&[UNKNOWN, V2, Validation::Failure.label()], 0);
    for outcome in Outcome::ALL {
        requests.add(&[V2, NONE, outcome.label()], 0);
    }
    for route in &exported.routes {
        for version in [V1, V2] {
            for outcome in Outcome::ALL {
                requests.add(&[version, route, outcome.label()], 0);
            }
            for trouble in Trouble::ALL {
                upstream_responses.add(&[version, route, trouble.label()], 0);
            }
        }
    }
    for reason in Reason::ALL.iter().filter(|reason| reason.refusal().is_some()) {
        refusals.add(&[reason.label()], 0);
        auth_errors.add(&[reason.label(), V2], 0);
    }

    // The series of a route go with it.
    let is_there = |endpoint: &str| [NONE, OTHER].contains(&endpoint) || exported.routes.contains(endpoint);
    for (decision, count) in &counts.decisions {
        let (reason, role, endpoint) = (decision.reason, decision.role.as_str(), decision.endpoint.as_str());
        if is_there(endpoint) {
            requests.add(&[version_of(reason).label(), endpoint, Outcome::of(reason).label()], *count);
        }
        if reason.refusal().is_some() {
            refusals.add(&[reason.label()], *count);
            auth_errors.add(&[reason.label(), V2], *count);
        }
        if reason == Reason::RateLimited && is_there(endpoint) {
            rate_limit_exceeded.add(&[role, endpoint], *count);
        }
        if let Some(result) = reason.validation() {
            validated.add(&[role, V2, result.label()], *count);
        }
    }
    for (response, count) in counts.upstream_responses.iter().filter(|(of, _)| is_there(&of.endpoint)) {
        let labels = [response.version.label(), response.endpoint.as_str(), response.trouble.label()];
        upstream_responses.add(&labels, *count);
    }
    for (validation, count) in &counts.api_validations {
        let result = if validation.success { Validation::Success } else { Validation::Failure };
        validated.add(&[&validation.role, V2, result.label()], *count);
    }
    for (reason, count) in &counts.api_refusals {
        auth_errors.add(&[reason.label(), V2], *count);
    }
    [validated, requests, refusals, upstream_responses, auth_errors, rate_limit_exceeded, failures]
        .into_iter()
        .flat_map(|counter| counter.0.collect())
        .collect()
}

/// A counter that lives for one scrape.
struct Counter(IntCounterVec);

impl Counter {
    fn add(&mut self, labels: &[&str], count: u64) {
        self.0.with_label_values(labels).inc_by(count);
    }
}

impl Family {
    fn counter(&self) -> Counter {
        let opts = Opts::new(self.name, self.help);
        Counter(IntCounterVec::new(opts, self.labels).expect("a valid metric"))
    }

    /// A histogram of durations. The crate's own cannot be given counts.
    #[allow(clippy::cast_precision_loss)] // For display.
    fn times(&self, times: &Times, values: &[&str]) -> MetricFamily {
        let mut total = 0_u64;
        let bounds = BOUNDS_NS.iter().map(|bound| *bound as f64 / 1e9).chain([f64::INFINITY]);
        let buckets = bounds.zip(times.buckets).map(|(bound, count)| {
            total = total.saturating_add(count);
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(total);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(total);
        histogram.set_sample_sum(times.sum_ns as f64 / 1e9);
        let labels = self.labels.iter().zip(values).map(|(name, value)| {
            let mut label = LabelPair::default();
            label.set_name((*name).into());
            label.set_value((*value).into());
            label
        });
        let mut metric = Metric::default();
        metric.set_label(labels.collect());
        metric.set_histogram(histogram);
        let mut family = MetricFamily::default();
        family.set_name(self.name.into());
        family.set_help(self.help.into());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(vec![metric]);
        family
    }
}
