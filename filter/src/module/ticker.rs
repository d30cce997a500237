//! The thread that wakes Envoy's main thread when a plugin is to tick.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::lock;
use crate::host::{self, Config, Scheduler};

/// Wakes the main thread at the time it was told last, once.
pub struct Ticker {
    plan: Arc<(Mutex<Plan>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

struct Plan {
    /// By the monotonic clock; `None` when it was done.
    wake_at_ns: Option<u64>,
    /// The same, as workers want it. The main thread, which may have looked at what they want before, leaves it be.
    wake_by_ns: Option<u64>,
    stopped: bool,
}

impl Plan {
    fn next_ns(&self) -> Option<u64> {
        self.wake_at_ns.into_iter().chain(self.wake_by_ns).min()
    }
}

impl Ticker {
    /// Begins to wait for a time. From the main thread.
    pub fn start(config: Config) -> Option<Self> {
        let scheduler = Scheduler::new(config)?;
        let plan = Arc::new((
            Mutex::new(Plan { wake_at_ns: None, wake_by_ns: None, stopped: false }),
            Condvar::new(),
        ));
        let shared = Arc::clone(&plan);
        let thread = thread::Builder::new()
            .name("keygate-ticker".into())
            .spawn(move || wake(&scheduler, &shared.0, &shared.1))
            .ok()?;
        Some(Self { plan, thread: Some(thread) })
    }

    /// When to wake the main thread next. From the main thread.
    pub fn wake_at(&self, ns: u64) {
        lock(&self.plan.0).wake_at_ns = Some(ns);
        self.plan.1.notify_one();
    }

    /// Wakes the main thread no later than that. From any thread.
    pub fn wake_by(&self, ns: u64) {
        let mut plan = lock(&self.plan.0);
        if plan.wake_by_ns.is_none_or(|before| ns < before) {
            plan.wake_by_ns = Some(ns);
            self.plan.1.notify_one();
        }
    }

    /// Ends the thread.
    pub fn stop(&mut self) {
        lock(&self.plan.0).stopped = true;
        self.plan.1.notify_one();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Also where a configuration is refused half-way: Envoy frees what the thread would call.
impl Drop for Ticker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn wake(scheduler: &Scheduler, plan: &Mutex<Plan>, changed: &Condvar) {
    let mut plan = lock(plan);
    while !plan.stopped {
        let Some(wake_at_ns) = plan.next_ns() else {
            plan = changed.wait(plan).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let wait_ns = wake_at_ns.saturating_sub(host::monotonic_ns());
        if wait_ns == 0 {
            // The next time is told when the main thread has done what it is woken for.
            (plan.wake_at_ns, plan.wake_by_ns) = (None, None);
            scheduler.commit();
        } else {
            let waited = changed.wait_timeout(plan, Duration::from_nanos(wait_ns));
            plan = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
