//! Counters in Envoy's own stats. `/stats/prometheus` shows them as `keygate_decisions_total{reason="…"}` and so
//! on; the `stats_tags` of the shipped Envoy configuration make the label of a name's last part. Names follow
//! Prometheus, as Envoy passes them on; all values are whole numbers.

use keygate_core::decide::Reason;

use crate::host::{Counter, Gauge, Histogram};

/// Of so many decisions between two ticks the proxy is told at once, of others when the next tick comes: each time is a
/// call.
const TOLD_AT_ONCE: u32 = 32;

/// All counters of a VM. Envoy adds those of all VMs up.
pub struct Metrics {
    /// Decisions by precise reason, in the order of [`Reason::ALL`], and how many of each were not handed over yet.
    decisions: Vec<(Counter, u64)>,
    since_tick: u32,
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
    /// Whole seconds since the state was last known to be the newest.
    pub state_age_s: Gauge,
    /// Memory of the largest VM of this proxy, in bytes.
    pub vm_memory_bytes: Gauge,
    /// Memory of a worker's Bloom gates, in bytes.
    pub gate_bytes: Gauge,
    /// How long a VM was busy at one go with anything but a request, in microseconds: Envoy's histograms take whole
    /// numbers, and of seconds all would be 0.
    pub slice_us: Histogram,
}

/// Decisions for a reason.
pub fn decisions(reason: Reason) -> Counter {
    Counter::define(&format!("keygate_decisions_total.reason.{}", reason.label()))
}

/// Panics that were caught, in a dynamic module. In WebAssembly they trap, and Envoy counts what comes of that.
pub fn panics() -> Counter {
    Counter::define("keygate_panics_total")
}

/// Requests that waited for units of their limit, in a dynamic module. In WebAssembly none does.
pub fn limit_waits() -> Counter {
    Counter::define("keygate_limit_waits_total")
}

impl Metrics {
    /// Defines them all, so that they are there before anything happened.
    pub fn define() -> Self {
        let _there_from_the_start = (panics(), limit_waits());
        Self {
            decisions: Reason::ALL.iter().map(|reason| (decisions(*reason), 0)).collect(),
            since_tick: 0,
            shadowed: Counter::define("keygate_shadowed_total"),
            fair_share: Counter::define("keygate_fair_share_total"),
            sync_failures: Counter::define("keygate_sync_failures_total"),
            sync_refusals: Counter::define("keygate_sync_refusals_total"),
            publications: Counter::define("keygate_publications_total"),
            takeovers: Counter::define("keygate_leader_takeovers_total"),
            starts: Counter::define("keygate_vm_starts_total"),
            cache_hits: Counter::define("keygate_token_cache_hits_total"),
            cache_misses: Counter::define("keygate_token_cache_misses_total"),
            state_age_s: Gauge::define("keygate_state_age_seconds"),
            vm_memory_bytes: Gauge::define("keygate_vm_memory_bytes"),
            gate_bytes: Gauge::define("keygate_gate_bytes"),
            slice_us: Histogram::define("keygate_slice_microseconds"),
        }
    }

    /// Counts a decision. Under load the proxy is told of many at once.
    pub fn decided(&mut self, reason: Reason) {
        let Some((counter, count)) = self.decisions.get_mut(reason.index()) else { return };
        if self.since_tick < TOLD_AT_ONCE {
            self.since_tick = self.since_tick.saturating_add(1);
            counter.increment();
        } else {
            *count = count.saturating_add(1);
        }
    }

    /// Tells the proxy of the decisions that it was not told of yet. To be called at each tick.
    pub fn on_tick(&mut self) {
        self.since_tick = 0;
        for (counter, count) in self.decisions.iter_mut().filter(|(_, count)| *count > 0) {
            counter.add(std::mem::take(count));
        }
    }
}
