//! Whether a change that was answered survives whatever happens to the process.
//!
//! A [`Drill`] has rounds. In each, clients make changes of every kind as fast as they are answered, until at a
//! random moment a [`Disaster`] happens; it is put right, and then what was answered must be in force: exactly that,
//! but for the one change of each client that had no answer. At the end everything that was ever answered is asked
//! about once more, and nothing else may be there.
//!
//! A process that is killed loses nothing that it gave to the kernel, so this does not show that changes are on disk
//! before they are answered: that takes a look at its system calls.

mod client;
mod dice;
mod disaster;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::SOON;
use crate::api::{Api, Key};
use crate::control_plane::ControlPlane;
use crate::http::{Connection, Request};
use crate::metrics::Metrics;
use crate::stack::Stack;
use crate::wait::{pass, wait_until};

use client::{Change, Client, Held, Orders, Said};
pub use client::{Count, Kind};
pub use dice::Dice;
pub use disaster::{Disaster, KillControlPlane, LoseRedis, Recovery};
pub use report::Report;

/// After load begins, a disaster happens within this time.
const STRIKE_WITHIN: Duration = Duration::from_millis(60);
/// A first start takes about this long.
const BIRTH: Duration = Duration::from_millis(60);
/// What the API takes, and gives, at a time.
const BATCH: usize = 10_000;
const PAGE: usize = 1_000;

/// A Keygate, its clients, and what was answered.
pub struct Drill {
    stack: Stack,
    dice: Dice,
    clients: Vec<Client>,
    orders: Orders,
    /// A key that the clients' lockdowns hit, and theirs not.
    sentinel: Key,
    /// A connection to each worker of the proxy, if there is one.
    workers: Vec<Connection>,
    /// The route by which the policy in force is known; none at first.
    mark: Option<String>,
    /// Until when there is a lockdown.
    lockdown: Option<String>,
    report: Report,
}

impl Drill {
    /// Clients at a Keygate that runs, with a proxy or without.
    #[track_caller]
    pub fn new(stack: Stack, clients: usize, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let api = stack.api();
        let policy = api.get("/api/admin/policy").expect(200).json();
        let proxy = stack.envoy.is_running();
        Self {
            orders: Orders {
                port: stack.control_plane.api_port(),
                admin_key: stack.control_plane.admin_key(),
                routes: policy["routes"].as_array().expect("routes").clone(),
                proxy,
            },
            clients: (0..clients).map(|number| Client::new(number, dice.split())).collect(),
            sentinel: api.issue("contributor"),
            workers: if proxy { stack.envoy.connect_to_all_workers() } else { Vec::new() },
            mark: None,
            lockdown: None,
            report: Report::new(seed),
            stack,
            dice,
        }
    }

    /// One round: changes, a disaster, and whether all that was answered is in force after it.
    #[track_caller]
    pub fn round(&mut self, disaster: &mut dyn Disaster) {
        self.report.begin_round(disaster.name());
        self.clients.iter_mut().for_each(Client::begin_round);
        let moment = self.dice.moment(STRIKE_WITHIN);
        let stop = AtomicBool::new(false);
        let Self { clients, orders, stack, .. } = self;
        std::thread::scope(|scope| {
            for client in &mut *clients {
                scope.spawn(|| client.work(orders, &stop));
            }
            pass(moment);
            disaster.strike(stack);
            stop.store(true, Ordering::Relaxed);
        });
        // What a proxy enforced when it was answered, it goes on to enforce whatever became of the control plane.
        let enforced: Vec<_> = self.clients.iter().flat_map(|client| client.enforced.clone()).collect();
        self.check_proxy(&[], &enforced);
        let recovery = disaster.recover(&mut self.stack, &mut self.dice);
        self.report.ready.add(recovery.ready_in);
        self.report.starts_cut_short += recovery.starts_cut_short;

        let api = self.stack.api();
        for client in &mut self.clients {
            client.settle(&api, &self.orders);
        }
        self.check_rules(&api);
        self.check_keys(|held| held.touched);
        self.check_foreign(&api, |client| client.foreign_of_round().to_vec());
    }

    /// Asks about everything that was ever answered, and whether there is anything else; gives the figures.
    #[track_caller]
    pub fn finish(mut self) -> Report {
        let api = self.stack.api();
        self.check_rules(&api);
        self.check_keys(|_| true);
        self.check_foreign(&api, |client| client.foreign.clone());
        self.check_listing(&api);
        self.check_counters(&api);
        if self.orders.proxy {
            self.stack.envoy.assert_no_vm_died();
        }
        let log = std::fs::read_to_string(self.stack.control_plane.log()).unwrap_or_default();
        self.report.torn_records = log.matches("cut off a half-written last record").count() as u64;
        for client in &self.clients {
            for (kind, count) in &client.done {
                let sum = self.report.changes.entry(*kind).or_default();
                sum.answered += count.answered;
                sum.unanswered += count.unanswered;
            }
        }
        self.report
    }

    /// The figures so far, without those of changes.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What there is one of: the policy, the lockdown, the list of cut-offs.
    fn check_rules(&mut self, api: &Api) {
        let in_doubt: Vec<Change> =
            self.clients.iter_mut().filter_map(|client| client.in_doubt.take()).collect();

        let policy = api.get("/api/admin/policy").expect(200).json();
        let routes = policy["routes"].as_array().expect("routes");
        let mark = routes.get(self.orders.routes.len()).and_then(|route| route["name"].as_str());
        let answered = latest(self.clients.iter().flat_map(|client| &client.policies));
        let answered = answered.map_or_else(|| self.mark.clone(), |mark| Some(mark.clone()));
        let tried = |name: &str| {
            in_doubt.iter().any(|change| matches!(change, Change::PutPolicy { mark } if mark == name))
        };
        if mark != answered.as_deref() && !mark.is_some_and(tried) {
            self.report.lost(format!("the policy is {mark:?}, answered was {answered:?}"));
        }
        if routes.len() > self.orders.routes.len() + 1 {
            self.report.unasked(format!("the policy has {} routes", routes.len()));
        }
        self.mark = mark.map(str::to_owned);

        let emergency = api.get("/api/admin/emergency").expect(200).json();
        let until = emergency["lockdown"]["until"].as_str();
        let answered = latest(self.clients.iter().flat_map(|client| &client.lockdowns));
        let answered = answered.map_or_else(|| self.lockdown.clone(), Clone::clone);
        let remaining_s = emergency["lockdown"]["remaining_s"].as_u64();
        let tried = in_doubt.iter().any(|change| match (change, remaining_s) {
            (Change::LockDown { ttl_s }, Some(remaining_s)) => {
                (remaining_s..remaining_s + SOON.as_secs()).contains(ttl_s)
            }
            (Change::LiftLockdown, None) => true,
            _ => false,
        });
        if until != answered.as_deref() && !tried {
            self.report.lost(format!("the lockdown is until {until:?}, answered was {answered:?}"));
        }
        self.lockdown = until.map(str::to_owned);

        // What was found stands for what was answered from here on: it may be what had no answer.
        self.clients.iter_mut().for_each(Client::forget_rules);

        let listed: BTreeSet<&str> = emergency["cutoffs"]
            .as_array()
            .map(|cutoffs| cutoffs.iter().filter_map(|cutoff| cutoff["id"].as_str()).collect())
            .unwrap_or_default();
        let answered: BTreeSet<&str> = self.clients.iter().flat_map(Client::cutoffs).collect();
        for id in answered.difference(&listed) {
            self.report.lost(format!("{id} is not in force"));
        }
        for id in listed.difference(&answered) {
            self.report.unasked(format!("{id} is in force"));
        }
    }

    /// Whether keys pass that must, and no others: as the control plane says, and as every worker of the proxy.
    fn check_keys(&mut self, which: impl Fn(&Held) -> bool) {
        let (mut pass, mut refuse) = (Vec::new(), Vec::new());
        for client in &self.clients {
            for held in client.keys.iter().filter(|held| which(held)) {
                if client.passes(held) { &mut pass } else { &mut refuse }.push(held.key.token.clone());
            }
        }
        if self.lockdown.is_some() { &mut refuse } else { &mut pass }.push(self.sentinel.token.clone());

        let mut connection = Connection::open(self.orders.port).expect("the control plane listens");
        let mut wrong = Vec::new();
        for (tokens, status) in [(&pass, 200), (&refuse, 401)] {
            for token in tokens {
                let answer = connection.send(&Request::get("/api/auth/validate").bearer(token));
                if answer.status != status {
                    wrong.push(format!("a key must get {status} and gets {}", answer.text()));
                }
            }
        }
        wrong.into_iter().for_each(|wrong| self.report.lost(wrong));

        if self.orders.proxy {
            let api = self.stack.api();
            wait_until(SOON, "the proxy to have what stands", || {
                let fleet = api.fleet();
                !fleet.is_empty() && fleet.iter().all(|proxy| proxy["current"] == true)
            });
            self.check_proxy(&pass, &refuse);
        }
    }

    /// Whether every worker lets some keys pass and refuses others.
    fn check_proxy(&mut self, pass: &[String], refuse: &[String]) {
        for (tokens, status) in [(pass, 200), (refuse, 401)] {
            for token in tokens {
                let request = Request::get("/api/chat").bearer(token);
                for (worker, connection) in self.workers.iter_mut().enumerate() {
                    let answer = connection.send(&request);
                    self.report.asked_of_proxy += 1;
                    if answer.status != status {
                        self.report.lost(format!("worker {worker} must answer {status}: {}", answer.text()));
                    }
                }
            }
        }
    }

    /// Whether token ids without a key are revoked: revoking them again changes nothing.
    fn check_foreign(&mut self, api: &Api, of: impl Fn(&Client) -> Vec<String>) {
        let jtis: Vec<String> = self.clients.iter().flat_map(of).collect();
        for batch in jtis.chunks(BATCH) {
            let body = json!({ "jtis": batch, "reason": "compromised" });
            let answer = api.post("/api/admin/revocations", &body).expect(200).json();
            for result in answer["results"].as_array().into_iter().flatten() {
                if result["result"] != "already_revoked" {
                    self.report.lost(format!("a token id is not revoked: {result}"));
                }
            }
        }
    }

    /// Whether the control plane knows the keys that were answered, each in its state, and no others.
    fn check_listing(&mut self, api: &Api) {
        let mut wanted: BTreeMap<&str, &str> = self
            .clients
            .iter()
            .flat_map(|client| &client.keys)
            .map(|held| (held.key.id.as_str(), held.state()))
            .collect();
        wanted.insert(&self.sentinel.id, "active");
        let mut wrong = (Vec::new(), Vec::new());
        let mut cursor = String::new();
        loop {
            let page = api.get(&format!("/api/admin/keys?limit={PAGE}{cursor}")).expect(200).json();
            for key in page["keys"].as_array().into_iter().flatten() {
                let (id, state) = (key["key_id"].as_str().unwrap_or_default(), &key["state"]);
                match wanted.remove(id) {
                    Some(wanted) if state == wanted => {}
                    Some(wanted) => wrong.0.push(format!("{id} is {state}, answered was {wanted}")),
                    None if key["name"] == "bootstrap" => {}
                    None => wrong.1.push(format!("{id} was never answered: {}", key["name"])),
                }
            }
            let Some(next) = page["next_cursor"].as_str() else { break };
            cursor = format!("&cursor={next}");
        }
        wrong.0.extend(wanted.keys().map(|id| format!("{id} is not known")));
        wrong.0.into_iter().for_each(|lost| self.report.lost(lost));
        wrong.1.into_iter().for_each(|unasked| self.report.unasked(unasked));
    }

    /// Whether the audit log is whole, and the counters say what was answered.
    fn check_counters(&mut self, api: &Api) {
        let verified = api.get("/api/admin/audit/verify").expect(200).json();
        assert_eq!(verified["valid"], true, "{verified}");
        self.report.records = verified["journal"]["records"].as_u64().unwrap_or_default();

        let keys = || self.clients.iter().flat_map(|client| &client.keys);
        let count = |state: &str| keys().filter(|held| held.state() == state).count();
        let foreign: usize = self.clients.iter().map(|client| client.foreign.len()).sum();
        let (revoked, suspended) = (count("revoked") + foreign, count("suspended"));
        let cutoffs = self.clients.iter().flat_map(Client::cutoffs).count();
        let stats = api.get("/api/admin/revocations/stats").expect(200).json();
        let said = ["total_revoked", "total_suspended", "cutoffs"].map(|member| stats[member].as_u64());
        assert_eq!(said, [revoked, suspended, cutoffs].map(|count| Some(count as u64)), "{stats}");
        assert_eq!(stats["emergency_active"], self.lockdown.is_some(), "{stats}");
        let gauge = Metrics::of(api).value("keygate_revocations");
        assert_eq!(gauge as usize, revoked + suspended, "keygate_revocations");
        // Each key's issue and end stands in the journal for itself.
        let least = keys().count() + revoked;
        assert!(self.report.records >= least as u64, "{verified}: fewer than {least}");
        (self.report.keys, self.report.revoked) = (keys().count() as u64, revoked as u64);
    }
}

/// What was said last, in the order of the changes.
fn latest<'s, T>(said: impl Iterator<Item = &'s Said<T>>) -> Option<&'s T>
where
    T: 's,
{
    said.max_by_key(|said| said.seq).map(|said| &said.value)
}

/// Kills control planes during their first start, each once or more; the next start must be as good as the first.
/// How often one was killed.
#[track_caller]
pub fn killed_at_birth(control_planes: u64, dice: &mut Dice) -> u64 {
    let mut times = 0;
    for _ in 0..control_planes {
        let directory = tempfile::Builder::new().prefix("keygate-e2e.").tempdir().expect("a directory");
        let mut control_plane = ControlPlane::new(directory.path());
        for _ in 0..1 + dice.below(3) {
            control_plane.launch();
            pass(dice.moment(BIRTH));
            control_plane.kill();
            times += 1;
        }
        control_plane.start();
        let api = control_plane.api();
        let key = api.issue("basic");
        for token in [api.key(), key.token] {
            api.call(&Request::get("/api/auth/validate").bearer(token)).expect(200);
        }
        let verified = api.get("/api/admin/audit/verify").expect(200).json();
        assert_eq!(verified["valid"], true, "{verified}");
        let listed: Value = api.get("/api/admin/keys").expect(200).json();
        assert_eq!(listed["keys"].as_array().map(Vec::len), Some(2), "{listed}");
    }
    times
}
