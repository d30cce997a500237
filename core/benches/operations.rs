//! What is measured: the operations, and the proxy that they are done in. Both benches take them from here, so a time
//! and a number of instructions of one name are of the same thing.
//!
//! Nothing in it is left to chance but the keys of `ahash`, so that a number of instructions is the same in every run.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::hint::black_box;

use jsonwebtoken::EncodingKey;
use jsonwebtoken::crypto::CryptoProvider;
use keygate_core::decide::cache::TokenCache;
use keygate_core::decide::client::ClientAddress;
use keygate_core::decide::limits::{Limit, Meter, Metered};
use keygate_core::decide::rules::{Rules, Ruleset, VerificationKey};
use keygate_core::decide::{Judge, Reason, Request, State, decide};
use keygate_core::quota::{self, Account, Leader, Ledger, Worker};
use keygate_core::revocation::gate::{Gate, Gated, ShardSource};
use keygate_core::revocation::{ExactSet, Fingerprint, Op, Revocations as _, Standing};
use keygate_core::secret::Secret;
use keygate_core::shm::{Conflict, SharedData};
use keygate_core::sync::wire::{self, Answer, Body, NewRules, SHARDS_ANSWER_BYTES};
use keygate_core::sync::{Follower, Outcome, Step};
use keygate_core::token::credential::Credential;
use keygate_core::token::crypto::{self, Algorithm, Es256};
use keygate_core::token::{self, Claims, TYPE};
use keygate_core::version::Version;
use serde_json::json;

const REVOKED: u64 = 1_000_000;
/// Keys that are asked about in turn. So many that neither gates nor shards of all of them are in the CPU's first
/// cache, as in a proxy with many clients.
const ASKED: u64 = 65_536;
/// Keys whose units are in one page of the shared data: half of those that it can have. Small numbers all are.
const NEIGHBOURS: u64 = 64;
/// So few that nothing is drawn ahead, and more than is spent here.
const RARE_LIMIT: u32 = 8_000;
/// Changes of a large delta.
const CHANGES: u64 = 1_000;
/// Unix seconds.
const NOW: u64 = 1_780_000_000;
/// Of the monotonic clock.
const NOW_NS: u64 = 3_600_000_000_000;
const VERSION: Version = Version { source: 1, seq: 2 };
const SECRET: [u8; 32] = [9; 32];
const OTHER_SECRET: [u8; 32] = [8; 32];

/// Something that a proxy does.
pub struct Operation {
    /// Its name in reports and in the budget.
    pub name: &'static str,
    /// How often it is done to count its instructions: what is different from one time to the next, such as the
    /// drawing of units at every 64th request, is in the mean.
    pub times: u32,
    /// Does it once, and panics if its outcome is not the one that is meant to be measured.
    pub run: fn(&mut Proxy),
}

/// All of them.
pub const OPERATIONS: [Operation; 11] = [
    Operation { name: "decide_known_key", times: 6_400, run: Proxy::decide_known_key },
    Operation { name: "decide_forged_token", times: 100, run: Proxy::decide_forged_token },
    Operation { name: "decide_made_up_id", times: 100, run: Proxy::decide_made_up_id },
    Operation { name: "spend_of_rare_key", times: 640, run: Proxy::spend_of_rare_key },
    Operation { name: "read_token", times: 100, run: Proxy::read_token },
    Operation { name: "gate_clear", times: 65_536, run: Proxy::gate_clear },
    Operation { name: "gate_hit", times: 1_000, run: Proxy::gate_hit },
    Operation { name: "exact_set", times: 65_536, run: Proxy::exact_set },
    Operation { name: "delta_of_one", times: 100, run: |proxy| proxy.take_delta(1) },
    Operation { name: "delta_of_thousand", times: 10, run: |proxy| proxy.take_delta(CHANGES) },
    Operation { name: "snapshot_of_million", times: 1, run: Proxy::take_snapshot },
];

/// A worker of a proxy that has been up for a while: a million keys are revoked, and all gates derived; half of all
/// keys are migrated; keys have a limit, of which the proxy has its share.
pub struct Proxy {
    rules: Ruleset,
    cache: TokenCache,
    set: ExactSet,
    shards: Shards,
    gate: Gate,
    memory: Memory,
    worker: Worker,
    known: &'static str,
    forged: &'static str,
    /// Of a secret whose tokens' ids are keyed.
    made_up: &'static str,
    /// How often a look-up was done, so that each is about another key.
    looked: u64,
    /// A delta, by its number of changes.
    deltas: HashMap<u64, Vec<u8>>,
    snapshot: Vec<u8>,
    /// The answers to questions for the snapshot's shards, in order.
    shard_answers: Vec<Vec<u8>>,
}

impl Default for Proxy {
    fn default() -> Self {
        let _already_installed = PROVIDER.install_default();
        let mut revoked: Vec<Fingerprint> = (0..REVOKED).map(fingerprint).collect();
        // In order, each goes to the end of its shard.
        revoked.sort_unstable();
        let set = ExactSet::of(&revoked.into_iter().map(Op::Revoke).collect::<Vec<_>>());
        let shards = Shards(set.shards().iter().map(|shard| shard.encode()).collect());
        let mut gate = Gate::new(set.bits());
        while gate.derive_next(&mut &shards) {}

        let rules = rules();
        let answer = |rules, body| Answer { version: VERSION, sent_at_ms: NOW * 1_000, rules, body }.encode();
        let digests = set.shards().iter().map(|shard| shard.digest()).collect();
        let snapshot = Body::Snapshot { covers: None, bits: set.bits(), digests };
        let delta = |changes| {
            let ops = (0..changes).map(|number| Op::Revoke(fingerprint(REVOKED + number))).collect();
            (changes, answer(NewRules::Same, Body::Delta { base_seq: VERSION.seq - 1, ops }))
        };
        let mut memory = Memory::with_share();
        for key in 0..NEIGHBOURS {
            let account = Account { key, window_s: 3_600 };
            assert!(Worker::new(1).spend(&mut memory, account, (RARE_LIMIT, 1, false), NOW_NS).is_admitted());
        }
        Self {
            cache: TokenCache::new(1_000_000),
            memory,
            worker: Worker::new(1),
            known: sign("hs-1", &SECRET),
            forged: sign("hs-1", &OTHER_SECRET),
            made_up: sign("hs-2", &SECRET),
            looked: 0,
            deltas: [delta(1), delta(CHANGES)].into(),
            snapshot: answer(NewRules::Whole(rules.encode()), snapshot),
            shard_answers: shards.answers(),
            rules: rules.try_into().expect("good rules"),
            set,
            shards,
            gate,
        }
    }
}

impl Proxy {
    fn decide_known_key(&mut self) {
        assert_eq!(self.decide(self.known), Reason::Allowed);
    }

    fn decide_forged_token(&mut self) {
        assert_eq!(self.decide(self.forged), Reason::BadSignature);
    }

    fn decide_made_up_id(&mut self) {
        assert_eq!(self.decide(self.made_up), Reason::ForgedId);
    }

    /// Of a key that this VM has not seen lately, beside many others in the shared data.
    fn spend_of_rare_key(&mut self) {
        self.looked += 1;
        let account = Account { key: self.looked % NEIGHBOURS, window_s: 3_600 };
        let verdict = Worker::new(1).spend(&mut self.memory, account, (RARE_LIMIT, 1, false), NOW_NS);
        assert!(verdict.is_admitted(), "{verdict:?}");
    }

    fn decide(&mut self, token: &str) -> Reason {
        let request = Request {
            method: b"POST",
            path: b"/api/chat?stream=true",
            credential: Credential::One(token.as_bytes()),
            client: ClientAddress::new(b"10.0.0.1"),
        };
        let judge = Judge {
            cache: &mut self.cache,
            meter: Till { worker: &mut self.worker, memory: &mut self.memory },
            revocations: Gated { gate: &mut self.gate, source: &self.shards },
            now: NOW,
            trace: &mut (),
        };
        black_box(decide(State::Fresh(&self.rules), black_box(request), judge)).reason
    }

    fn read_token(&mut self) {
        assert!(black_box(token::read(black_box(self.known).as_bytes())).is_ok());
    }

    fn gate_clear(&mut self) {
        let asked = fingerprint(REVOKED + self.next());
        // One in 10,000 is looked up in the exact set, and is clear there.
        assert_eq!(self.gate.standing(asked, &mut &self.shards), Standing::Clear);
    }

    fn gate_hit(&mut self) {
        let asked = fingerprint(self.next());
        assert_eq!(self.gate.standing(asked, &mut &self.shards), Standing::Revoked);
    }

    fn exact_set(&mut self) {
        let asked = fingerprint(self.next());
        assert_eq!((&self.set).standing(asked), Standing::Revoked);
    }

    fn next(&mut self) -> u64 {
        self.looked = (self.looked + 1) % ASKED;
        self.looked
    }

    fn take_delta(&mut self, changes: u64) {
        let mut follower = Follower::from(Some(Version { seq: VERSION.seq - 1, ..VERSION }));
        let outcome = follower.on_answer(black_box(&self.deltas[&changes]), || None);
        assert!(matches!(black_box(outcome), Ok(Outcome::Publish(_))));
    }

    /// From nothing, to where every shard is checked and could be staged.
    fn take_snapshot(&mut self) {
        let mut follower = Follower::default();
        let outcome = follower.on_answer(black_box(&self.snapshot), || None);
        assert!(matches!(outcome, Ok(Outcome::TakeOver)));
        let mut answers = self.shard_answers.iter();
        loop {
            match black_box(follower.step(&mut Nothing).expect("good shards")) {
                Step::Differs | Step::Stage { .. } => {}
                Step::Wait => {
                    let answer = answers.next().expect("an answer for each question");
                    follower.on_shards(answer.clone()).expect("what was asked for");
                }
                Step::Publish(_) => break,
            }
        }
    }
}

/// None: the filter has ES256 verified by Envoy, which is no part of the core.
struct NoEs256;

static PROVIDER: CryptoProvider = crypto::provider::<NoEs256>();

impl Es256 for NoEs256 {
    fn verify(_: &[u8], _: &[u8], _: &[u8]) -> bool {
        false
    }

    fn sign(_: &[u8], _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

/// The exact shards, encoded.
struct Shards(Vec<Vec<u8>>);

impl ShardSource for &Shards {
    fn shard(&mut self, index: u16) -> Option<Vec<u8>> {
        // A copy, as from the host.
        self.0.get(usize::from(index)).cloned()
    }
}

impl Shards {
    /// As the control plane answers a proxy that has none of them.
    fn answers(&self) -> Vec<Vec<u8>> {
        let largest = self.0.iter().map(Vec::len).max().unwrap_or(1);
        let together = self.0.chunks(SHARDS_ANSWER_BYTES / largest);
        together.map(|shards| wire::encode_shards(shards.iter().map(Vec::as_slice))).collect()
    }
}

/// A proxy that has no shard yet.
struct Nothing;

impl ShardSource for Nothing {
    fn shard(&mut self, _: u16) -> Option<Vec<u8>> {
        None
    }
}

/// Envoy's shared data. Hashed without chance, unlike by the standard library's default.
#[derive(Default)]
struct Memory(HashMap<String, (Vec<u8>, u32), BuildHasherDefault<DefaultHasher>>);

impl SharedData for Memory {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.0.get(key).cloned()
    }

    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
        let current = self.0.get(key).map(|(_, current)| *current);
        // As the host does it: what is not there can be written with any number.
        if cas.is_some() && current.is_some() && cas != current {
            return Err(Conflict);
        }
        self.0.insert(key.to_owned(), (value.to_vec(), current.unwrap_or(0) + 1));
        Ok(())
    }
}

impl Memory {
    /// That of a proxy to which the control plane has given its share of limits.
    fn with_share() -> Self {
        let mut memory = Self::default();
        let (mut leader, mut ledger) = (Leader::new(1, 1), Ledger::new(1, false, 0));
        let mut now_ns = NOW_NS - 1_000_000_000;
        while !quota::is_ready(&mut memory) {
            now_ns += 10_000_000;
            assert!(now_ns < NOW_NS, "a share within a second");
            let Some(question) = leader.on_tick(&mut memory, now_ns) else { continue };
            let exchange = ledger.exchange(&question, now_ns).expect("a good question");
            leader.on_answer(&mut memory, &exchange.answer, now_ns);
        }
        memory
    }
}

/// Spends as the filter does.
struct Till<'p> {
    worker: &'p mut Worker,
    memory: &'p mut Memory,
}

impl Meter for Till<'_> {
    fn spend(&mut self, key: u64, limit: Limit, cost: u32) -> Metered {
        let account = Account { key, window_s: limit.window_s };
        self.worker.spend(self.memory, account, (limit.units, cost, false), NOW_NS).metered(limit)
    }
}

/// As evenly spread as those of real keys, without a hash of a million of them: the finaliser of SplitMix64.
fn fingerprint(number: u64) -> Fingerprint {
    let z = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Fingerprint(z ^ (z >> 31))
}

fn rules() -> Rules {
    let key = |kid: &str, secret: [u8; 32]| VerificationKey {
        kid: kid.into(),
        alg: Algorithm::HS256,
        material: Secret::new(secret.into()),
        not_after: None,
        jti_key: None,
    };
    let policy = json!({ "routes": [
        { "name": "health", "path": "/health", "access": "public" },
        { "name": "docs", "path": "/docs/*", "access": "public" },
        { "name": "admin", "path": "/api/admin/*", "access": "key", "roles": ["admin"] },
        { "name": "models", "path": "/api/models", "methods": ["GET"], "access": "key" },
        { "name": "chat", "path": "/api/chat", "methods": ["POST"], "access": "key",
          "scopes": ["chat:read", "chat:write"] },
    ]});
    let keys = vec![
        key("hs-0", OTHER_SECRET),
        key("hs-1", SECRET),
        VerificationKey { jti_key: Some(Secret::new(OTHER_SECRET.into())), ..key("hs-2", SECRET) },
    ];
    Rules {
        audience: Some("api".into()),
        leeway_s: 5,
        max_life_s: 86_400 * 90,
        policy: serde_json::from_value(policy).expect("a policy"),
        limits: serde_json::from_value(
            json!({ "roles": { "basic": { "units": 1_000_000_000, "window_s": 3_600 } } }),
        )
        .expect("limits"),
        rollout: serde_json::from_value(
            json!({ "strategy": "percentage", "share": 5_000, "v1_retired": false }),
        )
        .expect("a rollout"),
        expired_until: NOW - 86_400,
        ..Rules::minimal(keys)
    }
}

fn sign(kid: &str, secret: &[u8]) -> &'static str {
    let header = jsonwebtoken::Header {
        typ: Some(TYPE.into()),
        kid: Some(kid.into()),
        ..jsonwebtoken::Header::new(Algorithm::HS256.jose())
    };
    let claims = Claims {
        iss: "keygate".into(),
        sub: "key_01k0w3qz4v8r5t2m7n9pc6xdha".into(),
        jti: "01k0w3qz4v8r5t2m7n9pc6xdhb".into(),
        iat: NOW - 3_600,
        exp: NOW + 86_400,
        nbf: None,
        aud: Some("api".into()),
        role: "basic".into(),
        scope: "chat:read chat:write models:read".into(),
        // In the half that is migrated, which the first decision sees.
        own: Some("globex".into()),
        lrole: None,
    };
    let token = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(secret)).expect("a token");
    token.leak()
}
