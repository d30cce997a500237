//! The VM that talks to the control plane for all VMs of the process: it holds the lease, polls,
//! publishes what it gets, and acknowledges once every worker has it.

use std::time::Duration;

use keygate_core::revocation::Fingerprint;
use keygate_core::shm::{self, Census, Contact, PublishError, Publisher, Publishing};
use keygate_core::sync::wire::{FORMAT, Part, Poll, Proxy};
use keygate_core::sync::{Ask, Follower, Outcome, Step, SyncError};
use keygate_core::worker::replica::{LOOK_EVERY_NS, Shards};

use crate::VERSION;
use crate::config::Configuration;
use crate::host::{self, Answer, CallId, Shared};
use crate::metrics::Metrics;
use crate::reporter::{REPORT_PATH, Reporter};
use crate::till::{QUOTA_PATH, Teller};

const POLL_PATH: &str = "/sync/v1/poll";
const SHARDS_PATH: &str = "/sync/v1/shards";
const ENFORCED_PATH: &str = "/sync/v1/enforced";
/// What a call may take beyond the time for which a poll is held back; a sixth of the hard age if that is less, but
/// never less than [`SHORTEST_CALL_TIMEOUT`].
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
const SHORTEST_CALL_TIMEOUT: Duration = Duration::from_millis(500);
/// Pauses after failures: doubled each time, from and up to.
const FIRST_PAUSE_NS: u64 = 50_000_000;
const LONGEST_PAUSE_NS: u64 = 1_000_000_000;
/// How long the leader works at one go; its worker serves requests in between.
const SLICE_NS: u64 = 1_000_000;
/// Between two looks whether there is anything to ask for of limits: a key that is new here waits for it.
const BETWEEN_QUESTIONS: Duration = Duration::from_millis(10);
/// What a question for units may take: it is held back for 3 s when there is no news.
const QUOTA_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between two slices.
const BETWEEN_SLICES: Duration = Duration::from_millis(1);
/// How long after a set was replaced the old one is dropped: workers look every 2 ms.
const SWEEP_AFTER_NS: u64 = 1_000_000_000;
/// How many shards of an old set are dropped in a tick.
const SWEEPS_PER_TICK: u16 = 16;

/// A VM that leads or would.
pub struct Leader {
    vm: u64,
    configuration: Configuration,
    token: Option<String>,
    proxy_id: String,
    proxy_cluster: String,
    leading: Option<Leading>,
    refused_answers: u64,
    failed_calls: u64,
    last_error: Option<String>,
}

struct Leading {
    publisher: Publisher,
    follower: Follower,
    publishing: Option<Publishing>,
    sweep: Option<Sweep>,
    /// The number of the next part of the state to send: the control plane lacks changes of it and wants them back.
    returning: Option<u16>,
    call: Option<CallId>,
    reporter: Reporter,
    teller: Teller,
    /// Of the last poll that was answered: what is then published is as new as that.
    contact: Contact,
    asked_ns: u64,
    ask_at_ns: u64,
    failures: u32,
}

/// The old set, to be dropped from a time on.
struct Sweep {
    from_ns: u64,
    next: u16,
}

/// The moment at which something is done, and what is known then.
#[derive(Clone, Copy)]
pub struct Now<'m> {
    /// The monotonic clock, nanoseconds.
    pub ns: u64,
    /// The VMs of this process.
    pub census: Census,
    /// How old the state may become; `None` when there is none.
    pub hard_age: Option<Duration>,
    /// Whether there are limits.
    pub limits: bool,
    /// What is counted.
    pub metrics: &'m Metrics,
}

impl Now<'_> {
    /// For how long a poll may be held back, and then what any call may take. A connection that is lost without a
    /// word must be given up before the state is too old.
    fn patience(self, poll_wait: Duration) -> (Duration, Duration) {
        let Some(hard_age) = self.hard_age else { return (poll_wait, CALL_TIMEOUT) };
        let part = |parts| hard_age.checked_div(parts).unwrap_or(hard_age);
        (poll_wait.min(part(3)), part(6).clamp(SHORTEST_CALL_TIMEOUT, CALL_TIMEOUT))
    }
}

/// Why there is no progress.
enum Trouble {
    Call(String),
    Refused(SyncError),
    Unpublished(PublishError),
}

impl From<SyncError> for Trouble {
    fn from(error: SyncError) -> Self {
        Self::Refused(error)
    }
}

impl From<PublishError> for Trouble {
    fn from(error: PublishError) -> Self {
        Self::Unpublished(error)
    }
}

impl Leader {
    /// A VM that does not lead yet.
    pub fn new(vm: u64, configuration: Configuration, token: Option<String>) -> Self {
        let proxy_id = host::node_id();
        if proxy_id.is_none() {
            host::warn("this proxy has no node id (--service-node); it will be known by a random one");
        }
        Self {
            vm,
            configuration,
            token,
            proxy_id: proxy_id.unwrap_or_default(),
            proxy_cluster: host::node_cluster().unwrap_or_default(),
            leading: None,
            refused_answers: 0,
            failed_calls: 0,
            last_error: None,
        }
    }

    /// Renews or tries the lease, works, and asks when it is time; how soon it wants to be called again.
    pub fn on_tick(&mut self, now: Now<'_>) -> Option<Duration> {
        if !host::may_lead() || !shm::hold_lease(&mut Shared, self.vm, now.ns) {
            if self.leading.take().is_some() {
                host::info("another worker's VM leads now");
            }
            return None;
        }
        if self.leading.is_none() {
            let publisher = Publisher::take_over(&mut Shared, self.vm).ok()?;
            now.metrics.takeovers.increment();
            let (id, incarnation) = self.identity();
            let teller = Teller::new(Fingerprint::of(&id).0, incarnation);
            self.leading = Some(Leading::new(publisher, teller, now.ns));
        }
        #[cfg(feature = "trap")]
        crate::trap::on_leader_tick();
        let wanted = self.go_on(now);
        self.report_if_due(now);
        if !now.limits {
            return wanted;
        }
        self.ask_for_units(now);
        Some(wanted.unwrap_or(BETWEEN_QUESTIONS).min(BETWEEN_QUESTIONS))
    }

    /// Takes an answer; how soon it wants to be called again.
    pub fn on_answer(&mut self, token: CallId, answer: Option<Answer>, now: Now<'_>) -> Option<Duration> {
        let leading = self.leading.as_mut()?;
        if leading.teller.on_answer(token, answer.as_ref(), now.ns) {
            self.ask_for_units(now);
            return self.pace(now);
        }
        if leading.reporter.on_answer(token, answer.as_ref(), now.ns) || leading.call != Some(token) {
            return self.pace(now);
        }
        leading.call = None;
        leading.ask_at_ns = now.ns;
        if let Err(trouble) = leading.take(answer, now.ns) {
            self.hold_back(trouble, now);
        }
        self.go_on(now)
    }

    /// Works for a slice; asks if there is nothing to work on.
    fn go_on(&mut self, now: Now<'_>) -> Option<Duration> {
        let leading = self.leading.as_mut()?;
        match leading.work(now.ns, now.metrics) {
            Ok(false) => {}
            Ok(true) => return Some(BETWEEN_SLICES),
            Err(trouble) => self.hold_back(trouble, now),
        }
        if self.leading.as_ref()?.failures == 0 && self.last_error.take().is_some() {
            host::info("in touch with the control plane again");
        }
        self.ask_if_due(now)
    }

    /// Takes note of trouble, and asks for news again only after a pause.
    fn hold_back(&mut self, trouble: Trouble, now: Now<'_>) {
        let Some(leading) = self.leading.as_mut() else { return };
        leading.publishing = None;
        leading.returning = None;
        leading.follower.unanswered();
        let problem = match trouble {
            Trouble::Unpublished(PublishError::Deposed) => {
                self.leading = None;
                return;
            }
            Trouble::Unpublished(problem @ PublishError::Incomplete) => {
                // What this process holds is damaged: begin again, with everything.
                leading.follower.start_over();
                problem.to_string()
            }
            Trouble::Refused(problem) => {
                self.refused_answers = self.refused_answers.saturating_add(1);
                now.metrics.sync_refusals.increment();
                problem.to_string()
            }
            Trouble::Call(problem) => {
                self.failed_calls = self.failed_calls.saturating_add(1);
                problem
            }
        };
        now.metrics.sync_failures.increment();
        let pause = FIRST_PAUSE_NS
            .checked_shl(leading.failures.min(8))
            .unwrap_or(LONGEST_PAUSE_NS)
            .min(LONGEST_PAUSE_NS);
        leading.failures = leading.failures.saturating_add(1);
        leading.ask_at_ns = now.ns.saturating_add(pause);
        if self.last_error.as_ref() != Some(&problem) {
            host::warn(&problem); // Once, not at every try.
        }
        self.last_error = Some(problem);
    }

    /// Lets another VM lead at once, when this one is to end.
    pub fn resign(&mut self) {
        if self.leading.take().is_some() {
            shm::release_lease(&mut Shared, self.vm);
        }
    }

    /// By what the control plane knows this process.
    fn identity(&self) -> (String, u64) {
        let incarnation = shm::incarnation(&mut Shared, self.vm);
        let id = if self.proxy_id.is_empty() {
            format!("unnamed-{incarnation:016x}")
        } else {
            self.proxy_id.clone()
        };
        (id, incarnation)
    }

    /// How soon it is to be called again, whatever has just come.
    fn pace(&self, now: Now<'_>) -> Option<Duration> {
        let publishes = self.leading.as_ref().is_some_and(|leading| leading.publishing.is_some());
        if publishes { Some(BETWEEN_SLICES) } else { now.limits.then_some(BETWEEN_QUESTIONS) }
    }

    /// Asks for units of limits, when it is time.
    fn ask_for_units(&mut self, now: Now<'_>) {
        let (cluster, token) = (&self.configuration.sync_cluster, self.token.as_deref());
        if let Some(leading) = self.leading.as_mut() {
            leading
                .teller
                .on_tick(now.ns, |body| host::post(cluster, QUOTA_PATH, token, body, QUOTA_TIMEOUT));
        }
    }

    fn report_if_due(&mut self, now: Now<'_>) {
        let (id, incarnation) = self.identity();
        let Some(leading) = self.leading.as_mut() else { return };
        let (cluster, token) = (&self.configuration.sync_cluster, self.token.as_deref());
        leading.reporter.report_if_due(now.ns, (&id, incarnation), |body| {
            host::post(cluster, REPORT_PATH, token, body, CALL_TIMEOUT)
        });
    }

    fn ask_if_due(&mut self, now: Now<'_>) -> Option<Duration> {
        let (id, incarnation) = self.identity();
        let leading = self.leading.as_mut()?;
        if leading.call.is_some() {
            return None;
        }
        if now.ns < leading.ask_at_ns {
            return Some(Duration::from_nanos(leading.ask_at_ns.saturating_sub(now.ns)));
        }
        // After a failure the answer is wanted at once: it tells that all is well again.
        let wanted = if leading.failures == 0 { self.configuration.poll_wait_ms } else { 0 };
        let (wait, call_timeout) = now.patience(Duration::from_millis(wanted));
        if let Some(number) = leading.returning {
            return self.return_part(number, call_timeout, now);
        }
        let (path, body, timeout) = match leading.follower.ask() {
            Ask::Nothing => return Some(BETWEEN_SLICES),
            Ask::Poll { applied, resync } => {
                let poll = Poll {
                    format: FORMAT,
                    proxy: Proxy {
                        id,
                        cluster: self.proxy_cluster.clone(),
                        incarnation: format!("{incarnation:016x}"),
                        filter: VERSION.to_owned(),
                        workers: u32::try_from(now.census.living).unwrap_or(u32::MAX),
                        vm_starts: now.census.started,
                        vm_memory_bytes: now.census.largest_bytes,
                    },
                    applied,
                    wait_ms: u64::try_from(wait.as_millis()).unwrap_or(wanted),
                    resync,
                    refused_answers: self.refused_answers,
                    failed_calls: self.failed_calls,
                    last_error: self.last_error.clone(),
                };
                leading.asked_ns = now.ns;
                (POLL_PATH, serde_json::to_vec(&poll), wait.saturating_add(call_timeout))
            }
            Ask::Shards(request) => (SHARDS_PATH, serde_json::to_vec(&request), call_timeout),
        };
        self.call(path, &body.unwrap_or_default(), timeout, now);
        None
    }

    /// Sends a part of the state that is enforced here back to the control plane, which lacks changes of it.
    fn return_part(&mut self, number: u16, timeout: Duration, now: Now<'_>) -> Option<Duration> {
        let part = self.leading.as_ref().and_then(|leading| leading.part(number));
        match part {
            Some(part) => self.call(ENFORCED_PATH, &part.encode(), timeout, now),
            None => self.hold_back(Trouble::Unpublished(PublishError::Incomplete), now),
        }
        None
    }

    fn call(&mut self, path: &str, body: &[u8], timeout: Duration, now: Now<'_>) {
        let cluster = &self.configuration.sync_cluster;
        let call = host::post(cluster, path, self.token.as_deref(), body, timeout);
        if call.is_none() {
            let problem = format!("no call to cluster {cluster:?} is possible; is it configured?");
            self.hold_back(Trouble::Call(problem), now);
        } else if let Some(leading) = self.leading.as_mut() {
            leading.call = call;
        }
    }
}

impl Leading {
    fn new(publisher: Publisher, teller: Teller, now_ns: u64) -> Self {
        let beacon = publisher.beacon();
        let follower = Follower::from(beacon.has_state().then_some(beacon.version));
        Self {
            publisher,
            follower,
            publishing: None,
            // A leader before may have left one, or not have come to it.
            sweep: Some(Sweep { from_ns: now_ns.saturating_add(SWEEP_AFTER_NS), next: 0 }),
            returning: None,
            call: None,
            reporter: Reporter::default(),
            teller,
            contact: Contact::default(),
            asked_ns: 0,
            // The leader before may have published a moment ago; workers look every 2 ms.
            ask_at_ns: now_ns.saturating_add(LOOK_EVERY_NS),
            failures: 0,
        }
    }

    /// Takes an answer as far as that is quick; the rest is [`Leading::work`].
    fn take(&mut self, answer: Option<Answer>, now_ns: u64) -> Result<(), Trouble> {
        let body = match answer {
            None => return Err(Trouble::Call("no answer from the control plane".into())),
            Some(Answer { status: 200, body }) => body,
            Some(Answer { status: 409, body }) if self.returning.is_none() && wants_state(&body) => {
                self.returning = Some(0);
                return Ok(());
            }
            Some(Answer { status, .. }) => return Err(Trouble::Call(refusal(status))),
        };
        if let Some(number) = self.returning {
            let next = number.saturating_add(1);
            self.returning = (next < Part::count(self.publisher.beacon().bits)).then_some(next);
            return Ok(());
        }
        if let Ask::Shards(_) = self.follower.ask() {
            return Ok(self.follower.on_shards(body)?);
        }
        self.contact = Contact { asked_ns: self.asked_ns, heard_ns: now_ns };
        let rules_counter = self.publisher.beacon().rules_counter;
        match self.follower.on_answer(&body, || shm::rules(&mut Shared, rules_counter))? {
            Outcome::Current { sent_at_ms } => {
                self.publisher.touch(&mut Shared, self.contact, sent_at_ms)?;
                self.failures = 0;
            }
            Outcome::Publish(publication) => {
                self.publishing = Some(Publishing::new(publication, self.contact));
            }
            Outcome::TakeOver => self.sweep = None, // What is staged goes where the old set is.
        }
        Ok(())
    }

    /// A part of the state that is enforced here.
    fn part(&self, number: u16) -> Option<Part> {
        let beacon = self.publisher.beacon();
        let bytes = match number.checked_sub(1) {
            None => shm::rules(&mut Shared, beacon.rules_counter)?,
            Some(index) => shm::shard(&mut Shared, beacon.generation, index)?,
        };
        Some(Part { version: beacon.version, bits: beacon.bits, number, bytes })
    }

    /// Works until a slice is over or nothing is left to do; whether there is more to do.
    fn work(&mut self, now_ns: u64, metrics: &Metrics) -> Result<bool, Trouble> {
        let end = now_ns.saturating_add(SLICE_NS);
        loop {
            if !self.step(now_ns, metrics)? {
                return Ok(false);
            }
            if host::monotonic_ns() >= end {
                return Ok(true);
            }
        }
    }

    /// Does a step of what is to be done first; `false` when there is none.
    fn step(&mut self, now_ns: u64, metrics: &Metrics) -> Result<bool, Trouble> {
        if let Some(publishing) = &mut self.publishing {
            let generation = self.publisher.beacon().generation;
            if self.publisher.step(&mut Shared, publishing)? {
                self.follower.published(publishing.version());
                self.publishing = None;
                self.failures = 0;
                metrics.publications.increment();
                let published_ns = host::monotonic_ns();
                // Workers look every 2 ms; only then is the version what all of them enforce.
                self.ask_at_ns = published_ns.saturating_add(LOOK_EVERY_NS);
                if self.publisher.beacon().generation != generation {
                    let from_ns = published_ns.saturating_add(SWEEP_AFTER_NS);
                    self.sweep = Some(Sweep { from_ns, next: 0 });
                }
            }
            return Ok(true);
        }
        let generation = self.publisher.beacon().generation;
        match self.follower.step(&mut Shards { data: &mut Shared, generation })? {
            Step::Wait => return self.sweep(now_ns),
            Step::Differs => {}
            Step::Stage { index, bytes } => self.publisher.stage(&mut Shared, index, &bytes)?,
            Step::Publish(publication) => {
                self.publishing = Some(Publishing::new(publication, self.contact));
            }
        }
        Ok(true)
    }

    /// Drops some of the old set, when it is time. That does not hold up a question, hence always `false`.
    fn sweep(&mut self, now_ns: u64) -> Result<bool, Trouble> {
        let Some(sweep) = self.sweep.as_mut().filter(|sweep| now_ns >= sweep.from_ns) else {
            return Ok(false);
        };
        for _ in 0..SWEEPS_PER_TICK {
            if !self.publisher.sweep(&mut Shared, sweep.next)? {
                self.sweep = None;
                break;
            }
            sweep.next = sweep.next.saturating_add(1);
        }
        Ok(false)
    }
}

/// Whether a control plane that lacks changes of what is enforced here asks for it.
fn wants_state(problem: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Problem {
        #[serde(default)]
        wants_state: bool,
    }
    serde_json::from_slice(problem).is_ok_and(|problem: Problem| problem.wants_state)
}

fn refusal(status: u16) -> String {
    match status {
        401 | 403 => {
            format!("the control plane refused this proxy ({status}): is the fleet token right?")
        }
        409 => {
            "the control plane lacks changes that are enforced here, and does not ask for them; waiting for it".into()
        }
        _ => format!("the control plane answered {status}"),
    }
}
