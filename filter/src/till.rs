//! Limits: what a worker spends of them, and what the leader asks the control plane for.

use keygate_core::decide::limits::{Limit, Meter, Metered};
use keygate_core::quota::{Account, Answer, Basis, Leader, Worker};

use crate::host::{self, CallId, Shared};
use crate::metrics::Metrics;

/// Where the leader asks.
pub const QUOTA_PATH: &str = "/sync/v1/quota";

/// Spends for one request.
pub struct Till<'w> {
    /// This VM's part.
    pub worker: &'w mut Worker,
    /// The monotonic clock, nanoseconds.
    pub now_ns: u64,
    /// The request was pending before.
    pub again: bool,
    /// What is counted.
    pub metrics: &'w Metrics,
}

impl Meter for Till<'_> {
    fn spend(&mut self, key: u64, limit: Limit, cost: u32) -> Metered {
        let account = Account { key, window_s: limit.window_s };
        let verdict = self.worker.spend(&mut Shared, account, (limit.units, cost, self.again), self.now_ns);
        if !self.again && verdict.status().basis == Basis::FairShare {
            self.metrics.fair_share.increment();
        }
        verdict.metered(limit)
    }
}

/// Asks for one process.
pub struct Teller {
    leader: Leader,
    call: Option<(CallId, u64)>,
    /// After a failure, when to ask again.
    ask_at_ns: u64,
}

/// The pause after a question that was not answered.
const PAUSE_NS: u64 = 250_000_000;

impl Teller {
    /// For the process with this number, of a proxy with this fingerprint.
    pub fn new(proxy: u64, incarnation: u64) -> Self {
        Self { leader: Leader::new(proxy, incarnation), call: None, ask_at_ns: 0 }
    }

    /// Asks what is to be asked. `send` sends it, and gives the number of the call.
    pub fn on_tick(&mut self, now_ns: u64, send: impl FnOnce(&[u8]) -> Option<CallId>) {
        if now_ns < self.ask_at_ns {
            return;
        }
        let Some(question) = self.leader.on_tick(&mut Shared, now_ns) else { return };
        self.call = send(&question.encode()).map(|call| (call, question.number));
        if self.call.is_none() {
            self.leader.on_failure(question.number);
            self.ask_at_ns = now_ns.saturating_add(PAUSE_NS);
        }
    }

    /// Takes an answer; whether it is one to a question of this.
    pub fn on_answer(&mut self, token: CallId, answer: Option<&host::Answer>, now_ns: u64) -> bool {
        let Some((_, number)) = self.call.take_if(|(call, _)| *call == token) else { return false };
        let taken = answer
            .filter(|answer| answer.status == 200)
            .and_then(|answer| Answer::decode(&answer.body).ok())
            .is_some_and(|answer| self.leader.on_answer(&mut Shared, &answer, now_ns));
        if !taken {
            self.leader.on_failure(number);
            self.ask_at_ns = now_ns.saturating_add(PAUSE_NS);
        }
        true
    }
}
