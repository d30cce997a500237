//! Counters in Envoy's own stats. `/stats/prometheus` shows them as `keygate_decisions{reason="…"}` and so
//! on; the `stats_tags` of the shipped Envoy configuration make the label of a name's last part.

use keygate_core::decision::Reason;

use crate::host::{Counter, Gauge, Histogram};

/// All counters of a VM. Envoy adds those of all VMs up.
pub struct Metrics {
    /// Decisions by precise reason, in the order of [`Reason::ALL`].
    decisions: Vec<Counter>,
    /// Requests that shadow mode let pass.
    pub shadowed: Counter,
    /// Limited requests that were decided on by this proxy's own fair share, since the control plane is silent.
    pub fair_share: Counter,
    /// Questions to the control plane that had no usable answer.
    pub sync_failures: Counter,
    /// Answers of the control plane that were refused.
    pub sync_refusals: Counter,
    /// Versions put in force.
    pub publications: Counter,
    /// How often a VM began to lead.
    pub takeovers: Counter,
    /// VMs started; one for each worker and the main thread, more after traps.
    pub starts: Counter,
    /// Tokens that the worker had verified before.
    pub cache_hits: Counter,
    /// Tokens that had to be verified, or refused.
    pub cache_misses: Counter,
    /// Milliseconds since the state was last known to be the newest.
    pub state_age_ms: Gauge,
    /// Memory of the largest VM of this proxy, in bytes.
    pub vm_memory_bytes: Gauge,
    /// Memory of a worker's Bloom gates, in bytes.
    pub gate_bytes: Gauge,
    /// How long a VM was busy at one go with anything but a request, in microseconds.
    pub slice_us: Histogram,
}

impl Metrics {
    /// Defines them all, so that they are there before anything happened.
    pub fn define() -> Self {
        Self {
            decisions: Reason::ALL
                .iter()
                .map(|reason| Counter::define(&format!("keygate_decisions.reason.{}", reason.label())))
                .collect(),
            shadowed: Counter::define("keygate_shadowed"),
            fair_share: Counter::define("keygate_fair_share"),
            sync_failures: Counter::define("keygate_sync_failures"),
            sync_refusals: Counter::define("keygate_sync_refusals"),
            publications: Counter::define("keygate_publications"),
            takeovers: Counter::define("keygate_leader_takeovers"),
            starts: Counter::define("keygate_vm_starts"),
            cache_hits: Counter::define("keygate_token_cache_hits"),
            cache_misses: Counter::define("keygate_token_cache_misses"),
            state_age_ms: Gauge::define("keygate_state_age_ms"),
            vm_memory_bytes: Gauge::define("keygate_vm_memory_bytes"),
            gate_bytes: Gauge::define("keygate_gate_bytes"),
            slice_us: Histogram::define("keygate_slice_us"),
        }
    }

    /// Counts a decision.
    pub fn decided(&self, reason: Reason) {
        if let Some(counter) = self.decisions.get(reason.index()) {
            counter.increment();
        }
    }
}
