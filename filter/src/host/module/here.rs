//! For which configuration, plugin and request the filter is working on this thread.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ahash::RandomState;

use super::CallId;
use super::abi::{Config, Stream};
use super::store::Store;

/// The plugin of the main thread; those of workers follow it.
pub const MAIN: usize = 0;

/// A configuration of the filter in Envoy, and what its plugins want of it.
pub struct Envoy {
    config: Config,
    configuration: Vec<u8>,
    store: Arc<Store>,
    /// Envoy takes definitions only while it configures the filter, and a plugin may be made anew later.
    metrics: Mutex<HashMap<String, Option<usize>, RandomState>>,
    /// Which plugin waits for which call.
    calls: Mutex<HashMap<CallId, usize, RandomState>>,
    timers: Box<[Timer]>,
}

/// When a plugin ticks.
#[derive(Default)]
struct Timer {
    period_ns: AtomicU64,
    due_ns: AtomicU64,
}

impl Envoy {
    /// For so many plugins, which share what those of other configurations of the same name share.
    pub fn new(config: Config, name: &str, configuration: Vec<u8>, plugins: usize) -> Self {
        Self {
            config,
            configuration,
            store: Store::of(name),
            metrics: Mutex::default(),
            calls: Mutex::default(),
            timers: std::iter::repeat_with(Timer::default).take(plugins).collect(),
        }
    }

    pub(super) fn config(&self) -> Config {
        self.config
    }

    pub(super) fn configuration(&self) -> &[u8] {
        &self.configuration
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn metric(&self, name: &str, define: impl FnOnce() -> Option<usize>) -> Option<usize> {
        let mut metrics = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        *metrics.entry(name.to_owned()).or_insert_with(define)
    }

    pub(super) fn asked(&self, call: CallId, plugin: usize) {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).insert(call, plugin);
    }

    /// Which plugin waits for a call that was answered.
    pub fn answered(&self, call: CallId) -> Option<usize> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).remove(&call)
    }

    pub(super) fn set_tick_period(&self, plugin: usize, period: Duration, now_ns: u64) {
        if let Some(timer) = self.timers.get(plugin) {
            timer.period_ns.store(u64::try_from(period.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
            self.ticked(plugin, now_ns);
        }
    }

    /// The plugin ticked now; it will again after its period.
    pub fn ticked(&self, plugin: usize, now_ns: u64) {
        if let Some(timer) = self.timers.get(plugin) {
            let period_ns = timer.period_ns.load(Ordering::Relaxed);
            timer.due_ns.store(now_ns.saturating_add(period_ns), Ordering::Relaxed);
        }
    }

    /// When a plugin is to tick.
    pub fn due_ns(&self, plugin: usize) -> u64 {
        self.timers.get(plugin).map_or(u64::MAX, |timer| timer.due_ns.load(Ordering::Relaxed))
    }
}

#[derive(Clone, Copy)]
struct Here {
    envoy: NonNull<Envoy>,
    plugin: usize,
    stream: Option<Stream>,
}

thread_local! {
    static HERE: Cell<Option<Here>> = const { Cell::new(None) };
}

/// Does something for a plugin of a configuration, and for a request if there is one.
pub fn enter<R>(envoy: &Envoy, plugin: usize, stream: Option<Stream>, f: impl FnOnce() -> R) -> R {
    struct Leave(Option<Here>);
    impl Drop for Leave {
        fn drop(&mut self) {
            HERE.set(self.0);
        }
    }
    // Also when it panics: what is here never outlives what it points at.
    let _leave = Leave(HERE.replace(Some(Here { envoy: NonNull::from(envoy), plugin, stream })));
    f()
}

/// Whether this thread is at work for somebody.
pub fn is_entered() -> bool {
    HERE.get().is_some()
}

/// The configuration and the plugin that are entered, if any are.
pub(super) fn here<R>(f: impl FnOnce(&Envoy, usize) -> R) -> Option<R> {
    let here = HERE.get()?;
    // SAFETY: `enter` borrows it for as long as it stands there.
    Some(f(unsafe { here.envoy.as_ref() }, here.plugin))
}

/// The request that is entered, if one is.
pub(super) fn stream() -> Option<Stream> {
    HERE.get()?.stream
}
