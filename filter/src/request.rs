//! What a worker does with a request: reads its headers once, has it decided, and carries that out.

use keygate_core::decide::client::ClientAddress;
use keygate_core::decide::forward::{self, Forwarded};
use keygate_core::decide::header_map::HeaderMap;
use keygate_core::decide::{Decision, Judge, Reason, Request, State, Verdict, decide};
use keygate_core::telemetry::Stopwatch;
use keygate_core::token::credential;

use crate::host::{self, Entry};
use crate::plugin::Plugin;
use crate::readiness;
use crate::response::{Awaited, DEFAULT_REALM, Response};
use crate::till::Till;

/// What is to be done with a request.
pub enum Outcome {
    /// Let it pass.
    Pass {
        /// Its headers, as they came.
        headers: HeaderMap,
        /// What the upstream is told.
        forwarded: Forwarded,
        /// What is to be done when it is answered.
        awaited: Option<Awaited>,
    },
    /// Answer it.
    Respond(Response),
}

impl Outcome {
    /// The refusal where nothing can be decided.
    pub fn unavailable() -> Self {
        Self::Respond(Response::unavailable())
    }
}

/// A decision's place among those about the same request.
#[derive(Clone, Copy)]
struct Turn {
    /// It waited before.
    again: bool,
    /// The last one.
    for_good: bool,
}

/// The same without the headers, which are still being read.
enum Decided {
    Pass { forwarded: Forwarded, awaited: Option<Awaited> },
    Refuse(Response),
    Wait,
}

impl Plugin {
    /// Decides on the current request; `again` if it has waited. `None` when it shall wait for units of its limit, which
    /// it does only where it `may_wait`: then nothing is counted nor recorded, and it is to be decided on again.
    pub fn on_request(&mut self, again: bool, may_wait: impl Fn() -> bool) -> Option<Outcome> {
        self.serves = true;
        let now_ns = host::monotonic_ns();
        self.replica.refresh(&mut host::Shared, now_ns);
        let Some(headers) = host::request_headers() else { return Some(Outcome::unavailable()) };
        #[cfg(feature = "trap")]
        crate::trap::on_request(&headers);
        let (method, path) = (headers.value(":method"), headers.value(":path"));
        if readiness::is_asked(method, path) {
            return Some(Outcome::Respond(self.ready(now_ns)));
        }
        let credential = credential::find(headers.iter());
        let reads_client = self.replica.rules().is_some_and(|rules| rules.reads_client(credential));
        let client = if reads_client { host::client_address() } else { None };
        let client = client.as_deref().and_then(|client| ClientAddress::new(client.as_bytes()));
        let request = Request { method, path, credential, client };
        let now_s = self.replica.now_s(self.clock.unix_ms(now_ns, host::unix_ms), now_ns);
        let mut turn = Turn { again, for_good: false };
        let decided = self.decide(request, now_ns, now_s, turn, &may_wait).or_else(|| {
            // The revocation set was replaced between two looks: look now and ask once more.
            self.replica.look(&mut host::Shared, now_ns);
            turn.for_good = true;
            self.decide(request, now_ns, now_s, turn, &may_wait)
        });
        Some(match decided {
            Some(Decided::Pass { forwarded, awaited }) => Outcome::Pass { headers, forwarded, awaited },
            Some(Decided::Refuse(refusal)) => Outcome::Respond(refusal),
            Some(Decided::Wait) => return None,
            None => Outcome::unavailable(),
        })
    }

    /// `None` when the revocation set could not be read and this turn is not for good.
    fn decide(
        &mut self,
        request: Request<'_>,
        now_ns: u64,
        now_s: u64,
        turn: Turn,
        may_wait: &impl Fn() -> bool,
    ) -> Option<Decided> {
        let mut data = host::Shared;
        let rolls_out = self.rolls_out();
        let (state, revocations) = self.replica.view(&mut data, now_ns);
        let realm = match state {
            State::Missing => DEFAULT_REALM,
            State::Stale(rules) | State::Fresh(rules) => &rules.realm,
        };
        let sampled = self.tally.samples();
        let mut watch = Stopwatch::new(sampled.then_some(host::monotonic_ns));
        let judge = Judge {
            cache: &mut self.cache,
            meter: Till { worker: &mut self.units, now_ns, again: turn.again, metrics: &self.metrics },
            revocations,
            now: now_s,
            trace: &mut watch,
        };
        let decision = decide(state, request, judge);
        #[cfg(feature = "trap")]
        let decision = crate::trap::on_decision(decision);
        if decision.reason == Reason::RevocationUnknown && !turn.for_good {
            return None;
        }
        // In shadow mode it passes at once.
        if decision.reason == Reason::LimitPending && !decision.shadowed && may_wait() {
            return Some(Decided::Wait);
        }
        self.metrics.decided(decision.reason);
        self.tally.decided(&decision);
        if sampled {
            self.tally.took(host::monotonic_ns().saturating_sub(now_ns), watch.decode_ns);
        }
        if decision.shadowed {
            self.metrics.shadowed.increment();
        }
        record(&decision);
        Some(match decision.verdict {
            Verdict::Forward => {
                let route = decision.route.filter(|_| rolls_out);
                let counted = route.and_then(|route| self.tally.awaits(&route.name, decision.choice.version));
                let left = decision.left;
                let awaited = (counted.is_some() || left.is_some()).then_some(Awaited { counted, left });
                Decided::Pass { forwarded: Forwarded::of(&decision), awaited }
            }
            Verdict::Refuse(refusal) => {
                let scopes = decision.route.map_or(&[][..], |route| route.scopes.as_slice());
                Decided::Refuse(Response::refusing(refusal, realm, scopes, decision.left))
            }
        })
    }

    /// Whether a rollout is under way.
    fn rolls_out(&self) -> bool {
        self.replica.rules().is_some_and(|rules| !rules.rollout.is_settled())
    }
}

/// For access logs: whose key, and precisely what became of it. Also of a refused request.
fn record(decision: &Decision<'_>) {
    if let Some(key) = &decision.key {
        host::set_filter_state(Entry::KeyId, &key.claims.sub);
    }
    host::set_filter_state(Entry::Outcome, decision.reason.label());
    if decision.shadowed {
        host::set_filter_state(Entry::Shadowed, "true");
    }
}

/// Takes out of the request what is ours to set, as clients may forge it, then adds ours; whether that worked.
fn forward(headers: &HeaderMap, forwarded: &Forwarded) -> bool {
    let forged = headers.iter().map(|(name, _)| name).filter(|name| forward::is_reserved(name));
    // A proxy lets no names pass that are no text.
    let mut removed = forged.map(|name| std::str::from_utf8(name).is_ok_and(host::remove_request_header));
    let done = removed.all(|removed| removed)
        && forwarded.headers().all(|(name, value)| host::add_request_header(name, value));
    host::request_headers_changed();
    done
}

/// What becomes of a request.
pub enum Then {
    /// It goes on to the upstream, and this is to be done when that answers.
    Continue(Option<Awaited>),
    /// It is answered.
    Answered,
}

/// Carries an outcome out.
pub fn carry_out(outcome: Outcome) -> Then {
    match outcome {
        Outcome::Pass { headers, forwarded, awaited } => {
            if forward(&headers, &forwarded) {
                return Then::Continue(awaited);
            }
            // A forged identity could be among those that were to be removed.
            carry_out(Outcome::unavailable())
        }
        Outcome::Respond(Response { status, headers, body }) => {
            let pairs = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            host::respond(status, pairs, body.as_bytes());
            Then::Answered
        }
    }
}
