//! A histogram that takes over what others have observed, bucket by bucket.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use keygate_core::telemetry::{BOUNDS_NS, BUCKETS, Timing, bucket_of};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use serde::{Deserialize, Serialize};

/// Times of one kind, of all proxies and of this process.
#[derive(Debug, Clone)]
pub struct Times(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: &'static str,
    help: &'static str,
    label: Option<(&'static str, &'static str)>,
    desc: Desc,
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// What was observed until now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// As [`keygate_core::telemetry::Times::buckets`].
    pub buckets: Vec<u64>,
    /// Nanoseconds.
    pub sum_ns: u64,
}

impl Times {
    /// None yet; with a label, if there is one.
    ///
    /// # Errors
    /// When a name is none.
    pub fn new(
        name: &'static str,
        help: &'static str,
        label: Option<(&'static str, &'static str)>,
    ) -> Result<Self, prometheus::Error> {
        let labels = label.iter().map(|(name, _)| (*name).to_owned()).collect();
        let desc = Desc::new(name.into(), help.into(), labels, std::collections::HashMap::new())?;
        let buckets = std::array::from_fn(|_| AtomicU64::new(0));
        Ok(Self(Arc::new(Inner { name, help, label, desc, buckets, sum_ns: AtomicU64::new(0) })))
    }

    /// Adds a time.
    pub fn observe(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.add(bucket_of(ns), 1);
        self.add_sum(ns);
    }

    /// Adds times that fall into one bucket, without their sum.
    pub fn add(&self, bucket: usize, number: u64) {
        if let Some(bucket) = self.0.buckets.get(bucket) {
            bucket.fetch_add(number, Ordering::Relaxed);
        }
    }

    /// Adds to the sum of all times.
    pub fn add_sum(&self, ns: u64) {
        self.0.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// What was observed until now.
    pub fn observed(&self) -> Observed {
        Observed {
            buckets: self.0.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect(),
            sum_ns: self.0.sum_ns.load(Ordering::Relaxed),
        }
    }

    /// Adds what was observed before.
    pub fn add_all(&self, observed: &Observed) {
        for (bucket, number) in observed.buckets.iter().enumerate() {
            self.add(bucket, *number);
        }
        self.add_sum(observed.sum_ns);
    }
}

impl Collector for Times {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0.desc]
    }

    #[allow(clippy::cast_precision_loss)] // For display.
    fn collect(&self) -> Vec<MetricFamily> {
        let mut total = 0;
        let mut buckets = Vec::with_capacity(BUCKETS);
        let bounds = BOUNDS_NS.iter().map(|bound| *bound as f64 / 1e9).chain([f64::INFINITY]);
        for (bound, count) in bounds.zip(&self.0.buckets) {
            total += count.load(Ordering::Relaxed);
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(total);
            buckets.push(bucket);
        }
        let mut histogram = Histogram::default();
        histogram.set_sample_count(total);
        histogram.set_sample_sum(self.0.sum_ns.load(Ordering::Relaxed) as f64 / 1e9);
        histogram.set_bucket(buckets);
        let mut metric = Metric::default();
        metric.set_histogram(histogram);
        if let Some((name, value)) = self.0.label {
            let mut label = LabelPair::default();
            label.set_name(name.into());
            label.set_value(value.into());
            metric.set_label(vec![label]);
        }
        let mut family = MetricFamily::default();
        family.set_name(self.0.name.into());
        family.set_help(self.0.help.into());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(vec![metric]);
        vec![family]
    }
}

/// The names under which times are kept.
pub const fn name_of(timing: Timing) -> &'static str {
    match timing {
        Timing::Validation => "validation",
        Timing::Decode => "decode",
    }
}
