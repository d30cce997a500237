//! A client that makes changes as fast as they are answered, and keeps account of what was answered.
//!
//! Its account is of what was answered alone. The one change that was under way when there was no answer any more
//! stands beside it, until the control plane is asked what became of it ([`Client::settle`]); from then on
//! everything in the account is certain, and must be so in the control plane.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::dice::Dice;
use crate::api::{Api, Key};
use crate::http::{Connection, Request, Response};

/// Keys that share an owner, which a cut-off can end together.
const KEYS_OF_AN_OWNER: usize = 4;
/// A cut-off is lifted rather than another one added; 256 may be in force together, for all clients.
const MAX_CUTOFFS: usize = 8;
/// Token ids of a large batch: its records are more than a page of memory, so a kill can tear them.
const LARGE_BATCH: usize = 300;

/// What a change is, for counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Register,
    Refresh,
    Revoke,
    RevokeItself,
    RevokeMany,
    Suspend,
    Resume,
    CutOff,
    LiftCutOff,
    LockDown,
    LiftLockdown,
    PutPolicy,
}

impl Kind {
    /// What it is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Register => "key registered",
            Self::Refresh => "key renewed",
            Self::Revoke => "key revoked",
            Self::RevokeItself => "key revoked by itself",
            Self::RevokeMany => "batch revoked",
            Self::Suspend => "key suspended",
            Self::Resume => "key resumed",
            Self::CutOff => "cut-off",
            Self::LiftCutOff => "cut-off lifted",
            Self::LockDown => "lockdown",
            Self::LiftLockdown => "lockdown lifted",
            Self::PutPolicy => "policy replaced",
        }
    }
}

/// How often something was done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Count {
    /// With an answer of success.
    pub answered: u64,
    /// Without an answer.
    pub unanswered: u64,
}

/// A key, as the answers about it make it.
#[derive(Debug)]
pub struct Held {
    /// The key.
    pub key: Key,
    /// Revoked, by whatever way but a cut-off.
    pub revoked: bool,
    /// Suspended.
    pub suspended: bool,
    owner: usize,
    /// Whether an answer of this round was about it.
    pub touched: bool,
}

impl Held {
    /// The state that the control plane must show.
    pub const fn state(&self) -> &'static str {
        match (self.revoked, self.suspended) {
            (true, _) => "revoked",
            (false, true) => "suspended",
            (false, false) => "active",
        }
    }
}

/// An owner and what befell all of its keys.
#[derive(Debug)]
struct Owner {
    name: String,
    keys: usize,
    cut: bool,
    /// The id of the cut-off in force.
    cutoff: Option<String>,
}

/// What was answered about the one thing of its kind, with its place among all changes.
#[derive(Debug, Clone)]
pub struct Said<T> {
    /// The number of the change.
    pub seq: u64,
    /// What is so from then on.
    pub value: T,
}

/// A change that is asked for.
#[derive(Debug, Clone)]
pub enum Change {
    Register { name: String, owner: usize },
    Refresh { old: usize, name: String },
    Revoke { key: usize, itself: bool, applied: bool },
    RevokeMany { keys: Vec<usize>, by_jti: bool, foreign: Vec<String> },
    Suspend { key: usize },
    Resume { key: usize },
    CutOff { owner: usize, form: usize },
    LiftCutOff { owner: usize, id: String },
    LockDown { ttl_s: u64 },
    LiftLockdown,
    PutPolicy { mark: String },
}

impl Change {
    const fn kind(&self) -> Kind {
        match self {
            Self::Register { .. } => Kind::Register,
            Self::Refresh { .. } => Kind::Refresh,
            Self::Revoke { itself: false, .. } => Kind::Revoke,
            Self::Revoke { itself: true, .. } => Kind::RevokeItself,
            Self::RevokeMany { .. } => Kind::RevokeMany,
            Self::Suspend { .. } => Kind::Suspend,
            Self::Resume { .. } => Kind::Resume,
            Self::CutOff { .. } => Kind::CutOff,
            Self::LiftCutOff { .. } => Kind::LiftCutOff,
            Self::LockDown { .. } => Kind::LockDown,
            Self::LiftLockdown => Kind::LiftLockdown,
            Self::PutPolicy { .. } => Kind::PutPolicy,
        }
    }
}

/// What every client is told.
#[derive(Debug)]
pub struct Orders {
    /// Where the control plane listens.
    pub port: u16,
    /// The key of an admin.
    pub admin_key: String,
    /// The routes that stay in every policy.
    pub routes: Vec<Value>,
    /// Whether there is a proxy, for which a change can wait.
    pub proxy: bool,
}

/// One client and its account.
#[derive(Debug)]
pub struct Client {
    number: usize,
    dice: Dice,
    made: u64,
    owners: Vec<Owner>,
    /// Every key that it was ever given.
    pub keys: Vec<Held>,
    /// Every token's id, of no key, that it had revoked.
    pub foreign: Vec<String>,
    /// Those of this round begin here.
    foreign_before: usize,
    /// The change without an answer.
    pub in_doubt: Option<Change>,
    /// Policies of this round, each with the name of a route of its own.
    pub policies: Vec<Said<String>>,
    /// Lockdowns of this round: until when, or lifted.
    pub lockdowns: Vec<Said<Option<String>>>,
    /// Tokens whose end every proxy enforced when the answer came, of this round.
    pub enforced: Vec<String>,
    /// What it did.
    pub done: BTreeMap<Kind, Count>,
}

impl Client {
    /// One that has nothing.
    pub fn new(number: usize, dice: Dice) -> Self {
        Self {
            number,
            dice,
            made: 0,
            owners: Vec::new(),
            keys: Vec::new(),
            foreign: Vec::new(),
            foreign_before: 0,
            in_doubt: None,
            policies: Vec::new(),
            lockdowns: Vec::new(),
            enforced: Vec::new(),
            done: BTreeMap::new(),
        }
    }

    /// Forgets what only the round before concerned.
    pub fn begin_round(&mut self) {
        self.keys.iter_mut().for_each(|held| held.touched = false);
        self.foreign_before = self.foreign.len();
        self.forget_rules();
        self.enforced.clear();
    }

    /// Forgets what was answered of the policy and the lockdown.
    pub fn forget_rules(&mut self) {
        self.policies.clear();
        self.lockdowns.clear();
    }

    /// Makes changes, one after the other, until told to stop or there is no answer.
    ///
    /// # Panics
    /// When a change is refused: all of these are allowed.
    pub fn work(&mut self, orders: &Orders, stop: &AtomicBool) {
        let Ok(mut connection) = Connection::open(orders.port) else { return };
        while !stop.load(Ordering::Relaxed) {
            let change = self.choose(orders);
            let request = self.request(&change, orders);
            match connection.try_send(&request) {
                Ok(answer) => {
                    self.done.entry(change.kind()).or_default().answered += 1;
                    self.answered(&change, &answer);
                }
                Err(_) => {
                    self.done.entry(change.kind()).or_default().unanswered += 1;
                    self.in_doubt = Some(change);
                    return;
                }
            }
        }
    }

    /// Finds out what became of the change without an answer, as a client would: what creates a key is asked for
    /// again, with the same `Idempotency-Key`, and so is a batch; of all else it is asked how it stands.
    pub fn settle(&mut self, api: &Api, orders: &Orders) {
        let Some(change) = self.in_doubt.take() else { return };
        match change {
            Change::Register { .. } | Change::Refresh { .. } | Change::RevokeMany { .. } => {
                let answer = api.call(&self.request(&change, orders));
                self.answered(&change, &answer);
            }
            // Only what the change would have changed is taken from there; all else is left to be compared.
            Change::Revoke { key, .. } => {
                self.keys[key].revoked = shown_state(&self.keys[key], api) == "revoked";
                self.keys[key].touched = true;
            }
            Change::Suspend { key } | Change::Resume { key } => {
                self.keys[key].suspended = shown_state(&self.keys[key], api) == "suspended";
                self.keys[key].touched = true;
            }
            Change::CutOff { owner, .. } | Change::LiftCutOff { owner, .. } => {
                let cutoffs = cutoffs(api);
                let name = self.owners[owner].name.as_str();
                let found = cutoffs.iter().find(|cutoff| cutoff["owner"] == name);
                self.owners[owner].cutoff = found.map(|cutoff| text(&cutoff["id"]));
                self.touch_keys_of(owner);
            }
            // There is one of each for all clients together: whoever compares them all knows of this one.
            Change::LockDown { .. } | Change::LiftLockdown | Change::PutPolicy { .. } => {
                self.in_doubt = Some(change);
            }
        }
    }

    /// The ids of its cut-offs in force.
    pub fn cutoffs(&self) -> impl Iterator<Item = &str> {
        self.owners.iter().filter_map(|owner| owner.cutoff.as_deref())
    }

    /// Whether a key must pass.
    pub fn passes(&self, held: &Held) -> bool {
        held.state() == "active" && self.owners[held.owner].cutoff.is_none()
    }

    /// The token ids without a key that were revoked in this round.
    pub fn foreign_of_round(&self) -> &[String] {
        &self.foreign[self.foreign_before..]
    }

    fn choose(&mut self, orders: &Orders) -> Change {
        let chosen = match self.dice.below(100) {
            0..28 => None,
            28..38 => self.live_key().map(|old| Change::Refresh { old, name: self.name() }),
            38..58 => self.live_key().map(|key| Change::Revoke {
                key,
                itself: false,
                applied: orders.proxy && self.dice.one_in(8),
            }),
            58..65 => self.live_key().map(|key| Change::Revoke { key, itself: true, applied: false }),
            65..75 => self.live_key().map(|key| Change::Suspend { key }),
            75..81 => self.suspended_key().map(|key| Change::Resume { key }),
            81..86 => Some(self.batch()),
            86..90 => self.cut_off(),
            90..93 => self.lift_cut_off(),
            // At least an hour, and each ten minutes from the next, so that it is known again by its end.
            93..96 => Some(Change::LockDown { ttl_s: 3_600 + 40 * self.dice.below(2_000) as u64 }),
            96..97 => Some(Change::LiftLockdown),
            _ => Some(Change::PutPolicy { mark: self.name() }),
        };
        chosen.unwrap_or_else(|| Change::Register { owner: self.owner(), name: self.name() })
    }

    /// A name that nothing else has.
    fn name(&mut self) -> String {
        self.made += 1;
        format!("c{}n{}", self.number, self.made)
    }

    /// One whose keys may still become more.
    fn owner(&mut self) -> usize {
        match self.owners.last() {
            Some(last) if !last.cut && last.keys < KEYS_OF_AN_OWNER => {}
            _ => {
                let name = format!("owner-{}", self.name());
                self.owners.push(Owner { name, keys: 0, cut: false, cutoff: None });
            }
        }
        let index = self.owners.len() - 1;
        self.owners[index].keys += 1;
        index
    }

    /// One of the last keys, or of all, for which that holds.
    fn pick(&mut self, suits: impl Fn(&Self, &Held) -> bool) -> Option<usize> {
        let reach = if self.dice.one_in(4) { self.keys.len() } else { self.keys.len().min(30) };
        let first = self.keys.len() - reach;
        let offset = self.dice.below(reach);
        (0..reach).map(|n| first + (offset + n) % reach).find(|index| suits(self, &self.keys[*index]))
    }

    fn live_key(&mut self) -> Option<usize> {
        self.pick(Self::passes)
    }

    fn suspended_key(&mut self) -> Option<usize> {
        self.pick(|_, held| held.state() == "suspended")
    }

    fn batch(&mut self) -> Change {
        let mut keys: Vec<usize> = (0..1 + self.dice.below(4)).filter_map(|_| self.live_key()).collect();
        keys.sort_unstable();
        keys.dedup();
        let size = if self.dice.one_in(3) { LARGE_BATCH } else { 1 + self.dice.below(5) };
        let name = self.name();
        let foreign = (0..size).map(|n| format!("{name}-foreign-{n:06}")).collect();
        Change::RevokeMany { keys, by_jti: self.dice.one_in(2), foreign }
    }

    fn cut_off(&mut self) -> Option<Change> {
        if self.cutoffs().count() >= MAX_CUTOFFS {
            return self.lift_cut_off();
        }
        let owner = self.owners.iter().rposition(|owner| !owner.cut && owner.keys > 1)?;
        self.owners[owner].cut = true;
        Some(Change::CutOff { owner, form: self.dice.below(3) })
    }

    fn lift_cut_off(&mut self) -> Option<Change> {
        let owner = self.owners.iter().position(|owner| owner.cutoff.is_some())?;
        let id = self.owners[owner].cutoff.clone()?;
        Some(Change::LiftCutOff { owner, id })
    }

    fn request(&mut self, change: &Change, orders: &Orders) -> Request {
        let id = |key: &usize| self.keys[*key].key.id.as_str();
        let post = |path: &str, body: Value| Request::post(path, &body).bearer(&orders.admin_key);
        match change {
            Change::Register { name, owner } => {
                let owner = &self.owners[*owner].name;
                // Short enough to be renewed at once, also what it is renewed to.
                let body = json!({ "name": name, "role": "basic", "owner": owner, "expires_in": "12h" });
                post("/api/auth/register", body).header("idempotency-key", name)
            }
            Change::Refresh { old, name } => Request::post("/api/auth/refresh", &json!({}))
                .bearer(&self.keys[*old].key.token)
                .header("idempotency-key", name),
            Change::Revoke { key, itself: true, .. } => {
                Request::post("/api/auth/revoke", &json!({})).bearer(&self.keys[*key].key.token)
            }
            Change::Revoke { key, applied, .. } => {
                let wait = if *applied { "?wait=applied&timeout=5s" } else { "" };
                post(&format!("/api/admin/keys/{}/revoke{wait}", id(key)), json!({ "reason": "compromised" }))
            }
            Change::RevokeMany { keys, by_jti, foreign } => {
                let mut jtis = foreign.clone();
                let mut key_ids = Vec::new();
                if *by_jti {
                    jtis.extend(keys.iter().map(|key| self.keys[*key].key.jti.clone()));
                } else {
                    key_ids.extend(keys.iter().map(id));
                }
                let body = json!({ "key_ids": key_ids, "jtis": jtis, "reason": "compromised" });
                post("/api/admin/revocations", body)
            }
            Change::Suspend { key } => {
                post(&format!("/api/admin/keys/{}/suspend", id(key)), json!({ "reason": "durability" }))
            }
            Change::Resume { key } => post(&format!("/api/admin/keys/{}/resume", id(key)), json!({})),
            Change::CutOff { owner, form } => {
                let owner = &self.owners[*owner].name;
                let scope = match form {
                    0 => json!({ "owner": owner }),
                    1 => json!({ "owner": owner, "role": "basic" }),
                    _ => {
                        json!({ "owner": owner, "role": "basic", "created_after": "2020-01-01T00:00:00Z" })
                    }
                };
                post("/api/admin/emergency/revoke", json!({ "scope": scope }))
            }
            Change::LiftCutOff { id, .. } => {
                Request::new("DELETE", format!("/api/admin/emergency/revoke/{id}")).bearer(&orders.admin_key)
            }
            Change::LockDown { ttl_s } => post(
                "/api/admin/emergency/lockdown",
                // Whoever makes changes here goes on; a key of another role tells whether it holds.
                json!({ "ttl": format!("{ttl_s}s"), "exempt_roles": ["admin", "basic"] }),
            ),
            Change::LiftLockdown => {
                Request::new("DELETE", "/api/admin/emergency/lockdown").bearer(&orders.admin_key)
            }
            Change::PutPolicy { mark } => {
                let mut routes = orders.routes.clone();
                routes.push(json!({ "name": mark, "path": format!("/mark/{mark}"), "access": "public" }));
                Request::new("PUT", "/api/admin/policy")
                    .json(&json!({ "routes": routes }))
                    .bearer(&orders.admin_key)
            }
        }
    }

    fn answered(&mut self, change: &Change, answer: &Response) {
        assert!((200..300).contains(&answer.status), "{change:?}: {} {}", answer.status, answer.text());
        let body = answer.json();
        match change {
            Change::Register { owner, .. } => self.hold(&body, *owner),
            Change::Refresh { old, .. } => {
                let held = &mut self.keys[*old];
                (held.revoked, held.touched) = (true, true);
                let owner = held.owner;
                self.owners[owner].keys += 1;
                self.hold(&body, owner);
            }
            Change::Revoke { key, applied, .. } => {
                let held = &mut self.keys[*key];
                (held.revoked, held.touched) = (true, true);
                let propagation = &body["propagation"];
                if *applied && propagation["total"] == 1 && propagation["applied"] == 1 {
                    self.enforced.push(held.key.token.clone());
                }
            }
            Change::RevokeMany { keys, foreign, .. } => {
                for key in keys {
                    let held = &mut self.keys[*key];
                    (held.revoked, held.touched) = (true, true);
                }
                self.foreign.extend(foreign.iter().cloned());
            }
            Change::Suspend { key } | Change::Resume { key } => {
                let held = &mut self.keys[*key];
                held.suspended = matches!(change, Change::Suspend { .. });
                held.touched = true;
            }
            Change::CutOff { owner, .. } => {
                self.owners[*owner].cutoff = Some(text(&body["cutoff"]["id"]));
                self.touch_keys_of(*owner);
            }
            Change::LiftCutOff { owner, .. } => {
                self.owners[*owner].cutoff = None;
                self.touch_keys_of(*owner);
            }
            Change::LockDown { .. } | Change::LiftLockdown => {
                let until = body["lockdown"]["until"].as_str().map(str::to_owned);
                self.lockdowns.push(Said { seq: seq(&body), value: until });
            }
            Change::PutPolicy { mark } => {
                self.policies.push(Said { seq: seq(&body), value: mark.clone() });
            }
        }
    }

    fn hold(&mut self, answer: &Value, owner: usize) {
        self.keys.push(Held {
            key: Key::from_answer(answer),
            revoked: false,
            suspended: false,
            owner,
            touched: true,
        });
    }

    fn touch_keys_of(&mut self, owner: usize) {
        self.keys.iter_mut().filter(|held| held.owner == owner).for_each(|held| held.touched = true);
    }
}

/// The state of a key, as the control plane shows it.
fn shown_state(held: &Held, api: &Api) -> String {
    text(&api.get(&format!("/api/admin/keys/{}", held.key.id)).expect(200).json()["state"])
}

/// The cut-offs in force.
pub fn cutoffs(api: &Api) -> Vec<Value> {
    let shown = api.get("/api/admin/emergency").expect(200).json();
    shown["cutoffs"].as_array().cloned().unwrap_or_default()
}

/// The number of a change within its history, from its answer.
fn seq(answer: &Value) -> u64 {
    let version = text(&answer["version"]);
    let seq = version.rsplit('.').next().and_then(|seq| seq.parse().ok());
    seq.unwrap_or_else(|| panic!("not a version: {version}"))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("not a text: {value}")).to_owned()
}
