//! What one VM of the filter holds, and its part in the process: the configuration, the copy of the
//! state, the cache, and the leader when it leads.

use std::time::Duration;

use keygate_core::decide::cache::TokenCache;
use keygate_core::quota::Worker;
use keygate_core::shm::{self, Census};
use keygate_core::telemetry::Tally;
use keygate_core::telemetry::ledger::Ledger;
use keygate_core::worker::replica::Replica;
use keygate_core::worker::wall_clock::WallClock;

use crate::config::{Configuration, FLEET_TOKEN};
use crate::es256;
use crate::host::{self, Answer, CallId};
use crate::leader::{Leader, Now};
use crate::metrics::Metrics;

/// How often a VM ticks: renews or tries the lease, and derives gates.
const TICK: Duration = Duration::from_millis(100);
/// The same until there is a first state, which everybody waits for.
const EAGER_TICK: Duration = Duration::from_millis(10);
/// The same where there are limits: what a VM spent is reported within 100 ms.
const LIMITS_TICK: Duration = Duration::from_millis(50);
/// How often a VM says that it lives, in nanoseconds.
const ROLL_CALL_NS: u64 = 1_000_000_000;
/// How often a VM writes down what it spent of limits, in nanoseconds.
const TELL_UNITS_NS: u64 = 40_000_000;
/// How often a VM writes down what it has counted, if there is anything new, in nanoseconds. So much of it is lost when
/// it traps.
const WRITE_DOWN_NS: u64 = 200_000_000;

/// One VM's state.
pub struct Plugin {
    /// Tells this VM from the others of the process.
    pub vm: u64,
    /// The copy of the published state.
    pub replica: Replica,
    /// Tokens verified by this worker.
    pub cache: TokenCache,
    /// What is counted.
    pub metrics: Metrics,
    /// The wall clock.
    pub clock: WallClock,
    /// What this VM spends of limits.
    pub units: Worker,
    /// What this VM has counted for the control plane.
    pub tally: Tally,
    /// Whether a request ever came to this VM.
    pub serves: bool,
    leader: Leader,
    counted: bool,
    roll_called_ns: u64,
    ledger: Ledger,
    units_told_ns: u64,
    written_down_ns: u64,
    unwritten: bool,
    census: Census,
    tick: Duration,
}

impl Plugin {
    /// Reads the configuration and starts to tick. A VM that is made anew after a trap finds the state in
    /// shared data, before its first request.
    ///
    /// # Errors
    /// What is wrong, for the operator.
    pub fn start() -> Result<Self, String> {
        let configuration = Configuration::read(&host::configuration())?;
        es256::install()?;
        let token = std::env::var(FLEET_TOKEN).ok().filter(|token| !token.is_empty());
        if token.is_none() {
            host::warn(&format!(
                "no {FLEET_TOKEN} in the environment (in WebAssembly: of vm_config.environment_variables.host_env_keys): \
                 the control plane will refuse this proxy"
            ));
        }
        // A number of this VM's own: the keys of a fresh hasher are random.
        let vm = ahash::RandomState::new().hash_one(host::unix_ms());
        let metrics = Metrics::define();
        metrics.starts.increment();
        let mut plugin = Self {
            vm,
            replica: Replica::default(),
            cache: TokenCache::new(configuration.token_cache_bytes),
            metrics,
            clock: WallClock::default(),
            leader: Leader::new(vm, configuration, token),
            serves: false,
            counted: false,
            roll_called_ns: 0,
            units: Worker::new(vm),
            tally: Tally::default(),
            ledger: Ledger::new(vm),
            units_told_ns: 0,
            written_down_ns: 0,
            unwritten: false,
            census: Census::default(),
            tick: Duration::ZERO,
        };
        plugin.replica.look(&mut host::Shared, host::monotonic_ns());
        plugin.on_tick();
        Ok(plugin)
    }

    /// What is done now and then.
    pub fn on_tick(&mut self) {
        let now_ns = host::monotonic_ns();
        self.metrics.on_tick();
        self.tally.on_tick();
        self.replica.refresh(&mut host::Shared, now_ns);
        self.counted = self.counted || shm::count_start(&mut host::Shared);
        if self.roll_called_ns == 0 || now_ns.saturating_sub(self.roll_called_ns) >= ROLL_CALL_NS {
            self.roll_called_ns = now_ns;
            self.census = shm::roll_call(&mut host::Shared, self.vm, host::memory_bytes(), now_ns);
        }
        if now_ns.saturating_sub(self.units_told_ns) >= TELL_UNITS_NS {
            self.units_told_ns = now_ns;
            self.units.on_tick(&mut host::Shared, now_ns);
        }
        if now_ns.saturating_sub(self.written_down_ns) >= WRITE_DOWN_NS {
            self.write_down(now_ns);
        }
        // Not by the main thread's VM, which serves nobody: it would be memory for nothing.
        let derived = self.serves && self.replica.derive_gate(&mut host::Shared);
        let now = now(now_ns, self.census, &self.replica, &self.metrics);
        let wanted = self.leader.on_tick(now);
        self.report(now_ns);
        // A gate is derived at a tick, so that requests seldom have to: soon, but not all at once.
        self.set_tick(wanted.or(derived.then_some(EAGER_TICK)));
        self.metrics.slice_us.observe(micros_since(now_ns));
    }

    /// An answer of the control plane, `None` when the call failed.
    pub fn on_answer(&mut self, token: CallId, answer: Option<Answer>) {
        let now_ns = host::monotonic_ns();
        let now = now(now_ns, self.census, &self.replica, &self.metrics);
        let wanted = self.leader.on_answer(token, answer, now);
        self.replica.look(&mut host::Shared, now_ns);
        self.set_tick(wanted);
        self.metrics.slice_us.observe(micros_since(now_ns));
    }

    fn report(&mut self, now_ns: u64) {
        let looks = self.cache.take_looks();
        self.metrics.cache_hits.add(looks.hits);
        self.metrics.cache_misses.add(looks.misses);
        if self.replica.version().is_some() {
            self.metrics.state_age_s.set(self.replica.age_ns(now_ns) / 1_000_000_000);
        }
        if self.serves {
            self.metrics.gate_bytes.set(u64::try_from(self.replica.gate_bytes()).unwrap_or(u64::MAX));
        }
        self.metrics.vm_memory_bytes.set(self.census.largest_bytes);
    }

    /// Writes down what was counted, where it outlives this VM.
    fn write_down(&mut self, now_ns: u64) {
        self.written_down_ns = now_ns;
        self.unwritten |= self.tally.take_changed();
        if self.unwritten {
            self.unwritten = !self.ledger.write(&mut host::Shared, &self.tally.counts(), now_ns);
        }
    }

    /// The VM ends.
    pub fn on_end(&mut self) {
        self.metrics.on_tick();
        self.write_down(host::monotonic_ns());
        self.leader.resign();
    }

    fn set_tick(&mut self, wanted: Option<Duration>) {
        let limits = self.replica.rules().is_some_and(|rules| !rules.limits.is_empty());
        let usual = match self.replica.version() {
            None => EAGER_TICK,
            Some(_) if limits => LIMITS_TICK,
            Some(_) => TICK,
        };
        let tick = wanted.unwrap_or(usual).clamp(Duration::from_millis(1), TICK);
        if tick != self.tick {
            self.tick = tick;
            host::set_tick_period(tick);
        }
    }
}

fn now<'m>(ns: u64, census: Census, replica: &Replica, metrics: &'m Metrics) -> Now<'m> {
    let hard_age = replica.rules().map(|rules| Duration::from_secs(rules.hard_age_s));
    let limits = replica.rules().is_some_and(|rules| !rules.limits.is_empty());
    Now { ns, census, hard_age, limits, metrics }
}

fn micros_since(then_ns: u64) -> u64 {
    host::monotonic_ns().saturating_sub(then_ns) / 1_000
}
