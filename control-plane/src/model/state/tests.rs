use super::*;
use crate::model::change::{Change, Entry};
use crate::platform::hlc::Origin;
use crate::secrets::master_key::MasterKey;
use crate::secrets::record::ring::Held;
use crate::secrets::record::{NewSecret, Retire, SecretRecord, SecretState};
use crate::secrets::root_key::RootKey;

#[test]
fn the_last_day_is_counted_to_the_minute_and_forgotten_after() {
    let mut recent = Recent::default();
    let day = 86_400;
    for at in [1_000, 1_001, 1_000 + day / 2, 1_000 + day] {
        recent.add(at);
    }
    assert_eq!(recent.last_24h(1_000 + day), 4);
    assert_eq!(recent.last_24h(1_100 + day), 2);
    assert_eq!(recent.last_24h(2_000 + 2 * day), 0);
    recent.add(1_000 + 3 * day);
    assert_eq!(recent.0.len(), 1, "older ones take no room");
}

#[test]
fn the_census_counts_what_is_live() {
    let mut census = Census::default();
    census.change("basic", 6_000, 1);
    census.change("basic", 12_000, 1);
    census.change("admin", 12_000, 1);
    census.change("admin", 12_000, -1);
    let live = |now| census.live(now).map(|(role, n)| (role.to_owned(), n)).collect::<Vec<_>>();
    assert_eq!(live(0), [("admin".to_owned(), 0), ("basic".to_owned(), 2)]);
    assert_eq!(live(6_060)[1].1, 1);
}

#[test]
fn registrations_are_counted_again_from_the_journal_also_those_made_elsewhere() {
    let keys = Keyring::in_memory(MasterKey::of([7; 32]), RootKey::of([7; 32]));
    let issued = |n: u64, owner: Option<&str>, registered_by: Option<&str>, origin| {
        let Change::KeyIssued { mut key, .. } = key_of("k", 900_000 + n) else { panic!("another change") };
        key.owner = owner.map(Into::into);
        key.registered_by = registered_by.map(Into::into);
        key.issued_at = 1_000 + n;
        let change = Change::KeyIssued { key, idempotency: None };
        Entry { origin, ..Entry::new("a", 1, change) }
    };
    let origin = Some(Origin { source: 9, seq: 1, at: String::new() });
    let entries = [
        issued(1, Some("acme"), Some("key_0"), None),
        issued(2, Some("acme"), Some("key_0"), origin),
        issued(3, Some("acme"), None, None),
        issued(4, None, None, None),
    ];
    let mut model = Model::default();
    for (seq, entry) in (1..).zip(&entries) {
        model.apply(seq, entry, &keys).unwrap();
    }
    let limit = |units| Some(keygate_core::decide::limits::Limit { units, window_s: 60 });
    let check = |units| model.registrations().check("acme", limit(units), 1_010);
    assert_eq!((check(2), check(3)), (Err(4_601), Ok(())), "but for those of administrators, and renewals");
}

/// A control plane, as far as its history goes.
struct Node {
    source: u64,
    model: Model,
    seq: u64,
    clock_ms: u64,
    log: Vec<(u64, Entry)>,
}

impl Node {
    fn new(source: u64, clock_ms: u64, secret: SecretRecord, keys: &Keyring) -> Self {
        let model = Model::default();
        let mut node = Self { source, model, seq: 0, clock_ms, log: Vec::new() };
        let policy = Policy { mode: keygate_core::decide::policy::Mode::Shadow, ..Policy::default() };
        for change in [
            Change::Genesis { source },
            Change::SecretCreated { secret, idempotency: None },
            Change::PolicyReplaced { policy: policy.clone() },
        ] {
            node.add(Entry::new("system", 0, change), keys);
        }
        assert_eq!(node.model.policy().0, &policy, "what a history begins with is in force");
        node
    }

    fn add(&mut self, entry: Entry, keys: &Keyring) {
        self.seq += 1;
        self.model.apply(self.seq, &entry, keys).unwrap();
        self.model.open_secrets(keys).unwrap();
        if entry.origin.is_none() {
            let change = entry.change.for_peers();
            self.log.push((self.seq, Entry { change, ..entry }));
        }
    }

    fn change(&mut self, change: Change, keys: &Keyring) {
        self.clock_ms += 1;
        let stamp = self.model.next_stamp(self.clock_ms);
        self.add(Entry::new("a", stamp, change), keys);
    }

    /// Takes in the next change of another one; whether there was one.
    fn take_next(&mut self, source: u64, log: &[(u64, Entry)], keys: &Keyring) -> bool {
        let merged = self.model.merged().get(&source).copied().unwrap_or(0);
        let Some((seq, entry)) = log.iter().find(|(seq, _)| *seq > merged) else { return false };
        let origin = Some(Origin { source, seq: *seq, at: String::new() });
        self.add(Entry { origin, ..entry.clone() }, keys);
        true
    }

    fn enforced(&self) -> impl PartialEq + std::fmt::Debug {
        let shards: Vec<_> = self.model.revocations().shards().iter().map(|shard| shard.digest()).collect();
        let rules = String::from_utf8(self.model.rules().encode()).unwrap();
        let ring = self.model.secrets();
        let signs = ring.active().map(|held| held.record.kid.clone()).unwrap_or_default();
        let of = |held: &Held| (ring.last_expiry(&held.record.kid), ring.is_announced(held));
        (rules, shards, signs, ring.all().into_iter().map(of).collect::<Vec<_>>())
    }
}

/// A generator of numbers (splitmix64), so that a failure can be had again.
fn draw(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % below
}

fn any_change(seed: &mut u64, known_cutoffs: &mut Vec<String>) -> Change {
    let jti = format!("jti-{}", draw(seed, 12));
    let key_id = format!("key-{jti}");
    let ended = crate::model::key::Ended {
        at: 5,
        reason: crate::model::key::RevocationReason::Compromised,
        by: "a".into(),
    };
    match draw(seed, 8) {
        0 => Change::KeyRevoked { key_id, jti, role: "basic".into(), expires_at: 900, revocation: ended },
        1 => Change::JtiRevoked { jti, expires_at: 900, revocation: ended },
        2 => {
            let suspension = crate::model::key::Ended { at: 5, reason: None, by: "a".into() };
            Change::KeySuspended { key_id, jti, expires_at: 900, suspension }
        }
        3 => Change::KeyResumed { key_id, jti },
        4 => {
            let id = format!("cutoff_{}", draw(seed, 1_000_000));
            known_cutoffs.push(id.clone());
            let cutoff = Cutoff {
                id,
                scope: keygate_core::decide::cutoff::Scope::default(),
                created_before: draw(seed, 100) + 1,
                created_after: 0,
                excluded_key: None,
            };
            let reason = crate::model::key::RevocationReason::Emergency;
            Change::CutoffAdded { cutoff, reason, approved_by: None, break_glass: None }
        }
        5 if !known_cutoffs.is_empty() => {
            let position = draw(seed, known_cutoffs.len() as u64) as usize;
            Change::CutoffLifted { id: known_cutoffs[position].clone() }
        }
        6 => {
            let until = draw(seed, 50);
            let lockdown = (until > 9).then(|| Lockdown { until, exempt_roles: Vec::new() });
            Change::LockdownChanged { lockdown }
        }
        _ => {
            let mode = if draw(seed, 2) == 0 { "enforce" } else { "shadow" };
            let policy = serde_json::from_value(serde_json::json!({ "mode": mode, "routes": [] })).unwrap();
            Change::PolicyReplaced { policy }
        }
    }
}

/// A rotation begun, gone on with, or a secret ended, by one who may not have heard of the others.
fn any_secret_change(seed: &mut u64, model: &Model, keys: &Keyring) -> Vec<Change> {
    let ring = model.secrets();
    let moved = |secret| Change::SecretMoved { secret, justification: None };
    let previous = ring.all().into_iter().find(|held| held.record.state == SecretState::Previous);
    if let Some(held) = ring.all().first().filter(|_| draw(seed, 4) == 0) {
        let kid = held.record.kid.clone();
        return vec![
            Change::SecretAnnounced { kid, justification: None },
            key_of(&held.record.kid, draw(seed, 900)),
        ];
    }
    match (ring.rotating(), previous, draw(seed, 3)) {
        (_, Some(held), 0) => vec![moved(held.record.moved(SecretState::Expired, 9, keys).unwrap())],
        (Some(held), ..) => {
            let mut changes = vec![moved(held.record.moved(SecretState::Active, 9, keys).unwrap())];
            changes.extend(ring.active().map(|old| {
                moved(old.record.retired(Retire::AfterOverlap, Some(draw(seed, 99)), 9, keys).unwrap())
            }));
            changes
        }
        (None, ..) => {
            let new = NewSecret {
                state: if draw(seed, 4) == 0 { SecretState::Active } else { SecretState::Rotating },
                ..NewSecret::first(keygate_core::token::crypto::Algorithm::HS256, None)
            };
            vec![Change::SecretCreated {
                secret: SecretRecord::make(new, keys, 9).unwrap(),
                idempotency: None,
            }]
        }
    }
}

/// That a key was issued.
fn key_of(kid: &str, expires_at: u64) -> Change {
    let key = serde_json::json!({
        "key_id": format!("key-{expires_at}"), "jti": format!("jti-{expires_at}"), "kid": kid, "name": "n",
        "role": "basic", "scopes": [], "issued_at": 1, "expires_at": expires_at,
    });
    Change::KeyIssued { key: Box::new(serde_json::from_value(key).unwrap()), idempotency: None }
}

#[test]
fn control_planes_agree_in_whatever_order_they_hear_of_each_others_changes() {
    keygate_core::token::crypto::native::install();
    let keys = Keyring::in_memory(MasterKey::of([7; 32]), RootKey::of([7; 32]));
    let algorithm = keygate_core::token::crypto::Algorithm::HS256;
    for round in 0..200 {
        let mut seed = round;
        // Clocks that are far apart, one by a year.
        let clocks = [1_000_000, 1_000_400, 31_536_000_000_000];
        let mut nodes: Vec<Node> = (0..3)
            .map(|n| {
                let secret = SecretRecord::make(NewSecret::first(algorithm, None), &keys, 1).unwrap();
                Node::new(100 + n, clocks[n as usize], secret, &keys)
            })
            .collect();
        let mut cutoffs = Vec::new();
        for _ in 0..60 {
            let n = draw(&mut seed, 3) as usize;
            if draw(&mut seed, 8) == 0 {
                for change in any_secret_change(&mut seed, &nodes[n].model, &keys) {
                    nodes[n].change(change, &keys);
                }
            } else if draw(&mut seed, 2) == 0 {
                let change = any_change(&mut seed, &mut cutoffs);
                nodes[n].change(change, &keys);
            } else {
                let other = (n + 1 + draw(&mut seed, 2) as usize) % 3;
                let (source, log) = (nodes[other].source, nodes[other].log.clone());
                nodes[n].take_next(source, &log, &keys);
            }
        }
        for n in 0..3 {
            for other in [(n + 1) % 3, (n + 2) % 3] {
                let (source, log) = (nodes[other].source, nodes[other].log.clone());
                while nodes[n].take_next(source, &log, &keys) {}
            }
        }
        let enforced: Vec<_> = nodes.iter().map(Node::enforced).collect();
        assert_eq!(enforced[0], enforced[1], "round {round}");
        assert_eq!(enforced[0], enforced[2], "round {round}");
    }
}
