//! Requests that wait for units of their limit. They are decided on again, each by its own worker, when units may have
//! come: with an answer of the control plane, or with what another worker gives back. The main thread wakes them.

use keygate_core::worker::waiting::Ticket;

use super::{Module, Next, lock};
use crate::host::{self, Stream, Waker};

/// For how long a request waits at most, in nanoseconds: 200 ms, less what may pass until the turn after that.
const WAIT_NS: u64 = 200_000_000 - TURN_EVERY_NS;
/// How often those that wait are looked at, in nanoseconds: as often as the control plane is asked for units.
const TURN_EVERY_NS: u64 = 10_000_000;
/// The time between two turns where answers come more often than that, in nanoseconds. Of a worker's time, looks take a
/// tenth at the pace above and a fifth at this one, at most.
const TURN_AFTER_NS: u64 = 5_000_000;

/// When requests that wait are looked at.
#[derive(Default)]
pub(super) struct Turns {
    last_ns: u64,
    /// An answer came since, which may have brought units.
    hurry: bool,
}

impl Turns {
    fn next_ns(&self) -> u64 {
        self.last_ns.saturating_add(if self.hurry { TURN_AFTER_NS } else { TURN_EVERY_NS })
    }
}

impl Module {
    /// Whether one more request of a worker may wait. Nobody but the worker takes that place.
    pub(super) fn has_room(&self, plugin: usize) -> bool {
        self.seats.get(plugin).is_some_and(|seat| lock(&seat.waiting).has_room())
    }

    /// Has a request wait that is entered.
    pub(super) fn wait(&self, plugin: usize, stream: Stream) -> Next {
        let now_ns = host::monotonic_ns();
        let joined = self
            .seats
            .get(plugin)
            .zip(Waker::new(stream))
            .and_then(|(seat, waker)| lock(&seat.waiting).join(now_ns.saturating_add(WAIT_NS), waker));
        let Some(ticket) = joined else { return Next::Then(self.refuse()) };
        self.waits.increment();
        // Once it is on the list, or the main thread could find nobody there and sleep on.
        self.ticker.wake_by(now_ns.saturating_add(TURN_EVERY_NS));
        Next::Wait(ticket)
    }

    /// Decides again on a request that was woken, and carries that out. On its worker. Unless it waits on, Envoy may have
    /// ended it when this returns.
    pub fn on_woken(&self, plugin: usize, stream: Stream, ticket: Ticket) -> Next {
        host::enter(&self.envoy, plugin, Some(stream), || {
            let waiting = self.seats.get(plugin).map(|seat| &seat.waiting);
            let until_ns = waiting.and_then(|waiting| lock(waiting).until_ns(ticket)).unwrap_or(0);
            let in_time = || host::monotonic_ns() < until_ns;
            let decided = self.with(plugin, |it| it.on_request(true, in_time));
            if matches!(decided, Some(None)) && waiting.is_some_and(|waiting| lock(waiting).stay(ticket)) {
                return Next::Wait(ticket);
            }
            self.leave(plugin, ticket);
            Next::Then(self.carry_out(decided.flatten()))
        })
    }

    /// A request waits no longer, whatever the reason.
    pub fn leave(&self, plugin: usize, ticket: Ticket) {
        if let Some(seat) = self.seats.get(plugin) {
            // Ended without the lock.
            let _waker = lock(&seat.waiting).leave(ticket);
        }
    }

    /// An answer of the control plane was taken.
    pub(super) fn units_may_have_come(&self) {
        lock(&self.turns).hurry = true;
        self.wake_waiting();
    }

    /// Wakes requests that wait, if it is time.
    pub(super) fn wake_waiting(&self) {
        let now_ns = host::monotonic_ns();
        {
            let mut turns = lock(&self.turns);
            if now_ns < turns.next_ns() {
                return;
            }
            *turns = Turns { last_ns: now_ns, hurry: false };
        }
        for seat in &self.seats {
            lock(&seat.waiting).wake(now_ns, Waker::wake);
        }
    }

    /// When requests that wait are to be looked at; `None` when none waits.
    pub(super) fn next_turn_ns(&self) -> Option<u64> {
        let waits = self.seats.iter().any(|seat| !lock(&seat.waiting).is_empty());
        waits.then(|| lock(&self.turns).next_ns())
    }
}
