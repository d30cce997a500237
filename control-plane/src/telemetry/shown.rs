//! The metrics that outlive the process, as they are shown: no more than what is on disk. A counter that went back at a
//! restart would be taken for one that began anew, and all of it would be counted once more.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

/// Some metrics as they stood when they were last written.
#[derive(Clone)]
pub struct Shown(Arc<Inner>);

struct Inner {
    live: Vec<Box<dyn Collector>>,
    descs: Vec<Desc>,
    families: Mutex<Vec<MetricFamily>>,
}

impl Shown {
    /// Shows nothing yet of these.
    pub fn new(live: Vec<Box<dyn Collector>>) -> Self {
        let descs = live.iter().flat_map(|metric| metric.desc()).cloned().collect();
        Self(Arc::new(Inner { live, descs, families: Mutex::default() }))
    }

    /// The metrics as they stand.
    pub fn live(&self) -> Vec<MetricFamily> {
        self.0.live.iter().flat_map(|metric| metric.collect()).collect()
    }

    /// Shows metrics that are on disk.
    pub fn show(&self, families: Vec<MetricFamily>) {
        *self.0.families.lock().unwrap_or_else(PoisonError::into_inner) = families;
    }
}

impl Collector for Shown {
    fn desc(&self) -> Vec<&Desc> {
        self.0.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.families.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").finish_non_exhaustive()
    }
}
