//! The filter as a dynamic module of Envoy's: one plugin for the main thread and one for each worker, as there are VMs
//! in WebAssembly. Workers decide on requests with theirs; all of them tick on the main thread, which also
//! takes the control plane's answers. Envoy has no timers for modules, so a thread of our own wakes it.

mod hooks;
mod ticker;
mod waiting;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use keygate_core::decide::Reason;
use keygate_core::worker::waiting::{Ticket, WaitingList};

use crate::host::{self, Answer, CallId, Config, Counter, Envoy, MAIN, Stream, Waker};
use crate::metrics;
use crate::plugin::Plugin;
use crate::request::{self, Outcome, Then};
use crate::response::{self, Awaited};
use ticker::Ticker;
use waiting::Turns;

/// How long after a panic a plugin is made anew, in nanoseconds.
const REVIVE_AFTER_NS: u64 = 100_000_000;

/// What there is for one configuration of the filter.
pub struct Module {
    // In the order in which they end.
    ticker: Ticker,
    seats: Box<[Seat]>,
    /// Answers that came while a plugin was at work on this thread.
    answers: Mutex<Answers>,
    /// When requests that wait are looked at again.
    turns: Mutex<Turns>,
    panics: Counter,
    /// Requests that waited.
    waits: Counter,
    /// Requests that found no plugin: a reason of decisions like others, which no plugin counts.
    undecided: Counter,
    envoy: Envoy,
}

/// Of calls, `None` where one failed.
pub type Answers = VecDeque<(CallId, Option<Answer>)>;

/// The place of a plugin, on cache lines of its own.
#[repr(align(128))]
struct Seat {
    state: Mutex<State>,
    /// The requests of its worker that wait. Not the plugin's, so that they are answered also when that panics.
    waiting: Mutex<WaitingList<Waker>>,
}

/// What comes next of a request.
pub enum Next {
    /// This.
    Then(Then),
    /// It waits, until it is woken.
    Wait(Ticket),
}

enum State {
    Works(Box<Plugin>),
    /// It panicked, as WebAssembly traps.
    Died {
        at_ns: u64,
    },
}

/// Nothing is left half-done where one of these locks is held and something panics: a plugin that does is thrown away.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Module {
    /// Begins to work by a configuration. `early` are the calls that are answered before this returns.
    ///
    /// # Errors
    /// What is wrong, for the operator.
    pub fn start(
        config: Config,
        name: &str,
        configuration: Vec<u8>,
        early: &RefCell<Answers>,
    ) -> Result<Box<Self>, String> {
        let workers = usize::try_from(host::concurrency()).unwrap_or(1);
        let plugins = workers.saturating_add(1);
        let envoy = Envoy::new(config, name, configuration, plugins);
        let start = |index| {
            let plugin = host::enter(&envoy, index, None, Plugin::start)?;
            let state = Mutex::new(State::Works(Box::new(plugin)));
            Ok::<_, String>(Seat { state, waiting: Mutex::default() })
        };
        let workers = (MAIN.saturating_add(1)..plugins).map(start).collect::<Result<Vec<_>, _>>()?;
        // Last, so that it knows of all when it first tells the control plane.
        let seats = std::iter::once(start(MAIN)?).chain(workers).collect();
        let ticker = Ticker::start(config).ok_or("no thread can be made that wakes the filter")?;
        let (panics, waits, undecided) = host::enter(&envoy, MAIN, None, || {
            (metrics::panics(), metrics::limit_waits(), metrics::decisions(Reason::NoState))
        });
        let (answers, turns) = (Mutex::new(early.take()), Mutex::default());
        let module = Box::new(Self { ticker, seats, answers, turns, panics, waits, undecided, envoy });
        // The first tick of a process finds no lease, and makes one; this takes it.
        host::enter(&module.envoy, MAIN, None, || module.with(MAIN, Plugin::on_tick));
        module.deliver();
        module.plan();
        Ok(module)
    }

    /// Which plugin a request is for.
    pub fn plugin_of(&self, stream: Stream) -> usize {
        usize::try_from(host::worker_index(stream)).unwrap_or(usize::MAX).saturating_add(1)
    }

    /// Decides on a request, and carries that out.
    pub fn on_request(&self, plugin: usize, stream: Stream) -> Next {
        host::enter(&self.envoy, plugin, Some(stream), || {
            let decided = self.with(plugin, |it| it.on_request(false, || self.has_room(plugin)));
            match decided {
                Some(None) => self.wait(plugin, stream),
                decided => Next::Then(self.carry_out(decided.flatten())),
            }
        })
    }

    /// Carries out what was decided on a request, if it was. Not under a lock: Envoy may call other hooks meanwhile.
    fn carry_out(&self, outcome: Option<Outcome>) -> Then {
        outcome.map_or_else(|| self.refuse(), request::carry_out)
    }

    /// Refuses a request that could not be decided on.
    fn refuse(&self) -> Then {
        self.undecided.increment();
        request::carry_out(Outcome::unavailable())
    }

    /// The same, after a panic.
    pub fn refuse_after_panic(&self, plugin: usize, stream: Stream) {
        host::enter(&self.envoy, plugin, Some(stream), || self.refuse());
    }

    /// The upstream answers a request.
    pub fn on_response(&self, plugin: usize, stream: Stream, awaited: Awaited) {
        host::enter(&self.envoy, plugin, Some(stream), || {
            if let Some((counted, trouble)) = response::on_response(awaited) {
                self.with(plugin, |plugin| plugin.tally.answered(&counted, trouble));
            }
        });
    }

    /// The main thread was woken: those tick whose time it is.
    pub fn on_tick(&self) {
        for index in MAIN..self.seats.len() {
            if host::monotonic_ns() >= self.envoy.due_ns(index) {
                host::enter(&self.envoy, index, None, || {
                    self.revive(index);
                    self.with(index, Plugin::on_tick)
                });
                // A period after its end, so that what takes longer than that leaves time for others.
                self.envoy.ticked(index, host::monotonic_ns());
            }
        }
        self.deliver();
        self.wake_waiting();
    }

    /// A call was answered, or `None` was the answer.
    pub fn on_answer(&self, call: CallId, answer: Option<Answer>) {
        lock(&self.answers).push_back((call, answer));
        // Envoy may answer a call before it has told the number of it.
        if !host::is_entered() {
            self.deliver();
            self.units_may_have_come();
        }
    }

    fn deliver(&self) {
        loop {
            // Not within the condition, where the lock would be held.
            let next = lock(&self.answers).pop_front();
            let Some((call, answer)) = next else { return };
            if let Some(index) = self.envoy.answered(call) {
                host::enter(&self.envoy, index, None, || {
                    self.with(index, |plugin| plugin.on_answer(call, answer))
                });
            }
        }
    }

    /// Says when the main thread is to be woken next. To be called after each time, whatever came of it.
    pub fn plan(&self) {
        let ticks = (MAIN..self.seats.len()).map(|index| self.envoy.due_ns(index));
        let due_ns = ticks.chain(self.next_turn_ns()).min();
        self.ticker.wake_at(due_ns.unwrap_or(u64::MAX));
    }

    /// Does something with a plugin that is entered; `None` when it is not there, or panics, and is thrown away.
    fn with<R>(&self, index: usize, work: impl FnOnce(&mut Plugin) -> R) -> Option<R> {
        let mut state = lock(&self.seats.get(index)?.state);
        let State::Works(plugin) = &mut *state else { return None };
        let result = caught(|| work(plugin));
        if result.is_none() {
            *state = State::Died { at_ns: host::monotonic_ns() };
            self.panics.increment();
            host::error("a plugin panicked and is made anew; its worker answers 503 meanwhile");
        }
        result
    }

    /// Makes a plugin anew that died a while ago. On the main thread: a plugin may have to call, as it starts.
    fn revive(&self, index: usize) {
        let Some(seat) = self.seats.get(index) else { return };
        let mut state = lock(&seat.state);
        let State::Died { at_ns } = *state else { return };
        let now_ns = host::monotonic_ns();
        if now_ns.saturating_sub(at_ns) < REVIVE_AFTER_NS {
            return;
        }
        *state = match caught(Plugin::start) {
            Some(Ok(plugin)) => State::Works(Box::new(plugin)),
            failed => {
                self.panics.increment();
                let problem = failed.and_then(Result::err).unwrap_or_else(|| "it panicked again".to_owned());
                host::error(&format!("a plugin that panicked cannot be made anew: {problem}"));
                State::Died { at_ns: now_ns }
            }
        };
    }
}

/// The configuration ends: another plugin of the process may lead at once, and nothing that was counted is lost.
impl Drop for Module {
    fn drop(&mut self) {
        self.ticker.stop();
        for index in MAIN..self.seats.len() {
            host::enter(&self.envoy, index, None, || self.with(index, Plugin::on_end));
        }
    }
}

/// Workers share it, and their requests; pointers do not have the compiler check that.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    const fn is_sent<T: Send>() {}
    is_shared::<Module>();
    is_sent::<Awaited>();
};

/// What came of it, if it did not panic.
fn caught<R>(work: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}
