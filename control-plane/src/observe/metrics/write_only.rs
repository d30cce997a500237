//! Kinds of metrics. They can be written and not read: what is decided on is state of the component that decides.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    GaugeVec, HistogramOpts, HistogramTimer, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
};

/// Buckets from 10 µs to 100 ms, for what takes microseconds.
pub const MICROSECONDS: [f64; 13] =
    [1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 1e-1];
/// Buckets from 1 ms to 10 s, for what crosses the network.
pub const MILLISECONDS: [f64; 13] =
    [1e-3, 2.5e-3, 5e-3, 1e-2, 1.5e-2, 2e-2, 5e-2, 1e-1, 2.5e-1, 5e-1, 1.0, 5.0, 10.0];

/// Declares the metrics of a component: of each its field, kind, name, help text, and labels or buckets. The help text
/// is the field's documentation.
macro_rules! component {
    ($(#[$meta:meta])* $component:ident {
        $($field:ident: $kind:ty = ($name:literal, $help:literal $(, $more:expr)*);)+
    }) => {
        $(#[$meta])*
        pub struct $component {
            $(#[doc = concat!("`", $name, "`: ", $help)] pub $field: $kind,)+
        }

        impl $component {
            /// Makes and registers them.
            pub(super) fn register(registry: &prometheus::Registry) -> Self {
                Self { $($field: <$kind>::register(registry, $name, $help $(, $more)*),)+ }
            }
        }
    };
}
pub(super) use component;

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("a valid metric");
    registry.register(Box::new(metric.clone())).expect("a name of its own");
    metric
}

/// A count of events.
pub struct Counter(IntCounter);

impl Counter {
    pub(super) fn register(registry: &Registry, name: &str, help: &str) -> Self {
        Self(register(registry, IntCounter::new(name, help)))
    }

    /// Counts one event.
    pub fn inc(&self) {
        self.0.inc();
    }

    /// Counts `more` events.
    pub fn inc_by(&self, more: u64) {
        self.0.inc_by(more);
    }
}

/// Counts of events by `N` labels.
pub struct Counters<const N: usize>(IntCounterVec);

impl<const N: usize> Counters<N> {
    pub(super) fn register(registry: &Registry, name: &str, help: &str, labels: [&str; N]) -> Self {
        Self(register(registry, IntCounterVec::new(Opts::new(name, help), &labels)))
    }

    /// The series with these labels. It exists from then on.
    pub fn with(&self, labels: [&str; N]) -> Counter {
        Counter(self.0.with_label_values(&labels))
    }
}

/// A counter of events that another component counts.
pub struct Total {
    counter: IntCounter,
    shown: Mutex<u64>,
}

impl Total {
    pub(super) fn register(registry: &Registry, name: &str, help: &str) -> Self {
        Self { counter: register(registry, IntCounter::new(name, help)), shown: Mutex::default() }
    }

    /// Shows `total`, unless more was shown before: a component that starts again counts from 0.
    pub fn raise_to(&self, total: u64) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        self.counter.inc_by(total.saturating_sub(*shown));
        *shown = total.max(*shown);
    }
}

/// A value.
pub struct Gauge(prometheus::Gauge);

impl Gauge {
    pub(super) fn register(registry: &Registry, name: &str, help: &str) -> Self {
        Self(register(registry, prometheus::Gauge::new(name, help)))
    }

    /// Shows a value.
    pub fn set(&self, value: f64) {
        self.0.set(value);
    }

    /// Shows a whole number, exactly below 2^53.
    #[allow(clippy::cast_precision_loss)]
    pub fn set_count(&self, count: u64) {
        self.0.set(count as f64);
    }

    /// Shows 1 for true, 0 for false.
    pub fn set_flag(&self, flag: bool) {
        self.0.set(f64::from(u8::from(flag)));
    }
}

/// Values by `N` labels.
pub struct Gauges<const N: usize>(GaugeVec);

impl<const N: usize> Gauges<N> {
    pub(super) fn register(registry: &Registry, name: &str, help: &str, labels: [&str; N]) -> Self {
        Self(register(registry, GaugeVec::new(Opts::new(name, help), &labels)))
    }

    /// The series with these labels. It exists from then on.
    pub fn with(&self, labels: [&str; N]) -> Gauge {
        Gauge(self.0.with_label_values(&labels))
    }
}

/// Durations.
pub struct Histogram(prometheus::Histogram);

impl Histogram {
    pub(super) fn register(registry: &Registry, name: &str, help: &str, buckets: [f64; 13]) -> Self {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        Self(register(registry, prometheus::Histogram::with_opts(opts)))
    }

    /// Adds a duration.
    pub fn observe(&self, took: Duration) {
        self.0.observe(took.as_secs_f64());
    }

    /// Measures until the timer is dropped.
    pub fn start_timer(&self) -> Timer {
        Timer(self.0.start_timer())
    }
}

/// Durations by `N` labels.
pub struct Histograms<const N: usize>(HistogramVec);

impl<const N: usize> Histograms<N> {
    pub(super) fn register(
        registry: &Registry,
        name: &str,
        help: &str,
        labels: [&str; N],
        buckets: [f64; 13],
    ) -> Self {
        let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        Self(register(registry, HistogramVec::new(opts, &labels)))
    }

    /// The series with these labels. It exists from then on.
    pub fn with(&self, labels: [&str; N]) -> Histogram {
        Histogram(self.0.with_label_values(&labels))
    }
}

/// A duration that is being measured; it is added when this is dropped.
#[must_use]
pub struct Timer(HistogramTimer);

impl Timer {
    /// Adds the duration now.
    pub fn observe_duration(self) {
        self.0.observe_duration();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_never_goes_back() {
        let total = Total::register(&Registry::new(), "a_total", "A.");
        for (raised_to, shown) in [(3, 3), (2, 3), (5, 5)] {
            total.raise_to(raised_to);
            assert_eq!(total.counter.get(), shown);
        }
    }
}
