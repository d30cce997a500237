//! The keys that requests show: of 400 to 900 bytes, as Keygate issues them, spread by owners and scopes of different
//! lengths.

use std::cell::{Cell, RefCell};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use keygate_e2e::durability::Dice;
use keygate_e2e::forge::Parts;
use keygate_e2e::{Api, Connection, Request};
use serde_json::{Value, json};
use sha2::Sha256;

use super::client::{Expected, Shot};
use super::server::V2;
use super::variant::Load;
use super::zipf::Zipf;

/// How many keys a load is of.
pub const KEYS: usize = 10_000;
/// How many forged tokens there are. No proxy remembers one, so they can come again.
const FORGED: usize = 2_000;
/// Of an owner's id. A longer one the control plane does not take.
const OWNER_BYTES: std::ops::RangeInclusive<usize> = 32..=128;
/// Of a token.
const TOKEN_BYTES: std::ops::RangeInclusive<usize> = 400..=900;
/// A role of the benchmark's own, whose keys have many scopes.
pub const INTEGRATION: &str = "integration";
pub const INTEGRATION_SCOPES: [&str; 15] = [
    "analytics:read",
    "billing:read",
    "billing:write",
    "catalog:read",
    "catalog:write",
    "customers:read",
    "inventory:read",
    "invoices:read",
    "orders:read",
    "orders:write",
    "payments:read",
    "refunds:write",
    "reports:read",
    "shipments:read",
    "webhooks:manage",
];
/// A role of the benchmark's own without a limit.
pub const UNLIMITED: &str = "unlimited";
/// The path of a route whose upstream is told nothing of a key.
pub const LEAN: &str = "/api/lean";
/// How many keys are issued at a time.
const AT_A_TIME: usize = 16;

/// All keys, as requests.
#[derive(Debug)]
pub struct Tokens {
    dice: RefCell<Dice>,
    zipf: Zipf,
    /// Owners that the rollout sends to V2, so that every request is decided on.
    owners: Vec<String>,
    known: Vec<Vec<u8>>,
    /// The same keys, for the route whose upstream is told nothing of them.
    lean: Vec<Vec<u8>>,
    /// Keys like those that are known, of a role without a limit.
    unlimited: Vec<Vec<u8>>,
    es256: Vec<Vec<u8>>,
    eddsa: Vec<Vec<u8>>,
    /// With ids that are made up, and with the id of a good key.
    forged: [Vec<Vec<u8>>; 2],
    /// ES256, in the order in which they are shown for the first time.
    new: Vec<Vec<u8>>,
    shown: Cell<usize>,
}

impl Tokens {
    /// Those of some owners.
    pub fn new(api: &Api, dice: Dice, owners: Vec<String>, signer: &Hs256, eddsa: &[String]) -> Self {
        let mut tokens = Self {
            dice: RefCell::new(dice),
            zipf: Zipf::new(KEYS),
            owners,
            known: Vec::new(),
            lean: Vec::new(),
            unlimited: Vec::new(),
            es256: Vec::new(),
            eddsa: eddsa.iter().map(|token| request(token)).collect(),
            forged: Default::default(),
            new: Vec::new(),
            shown: Cell::new(0),
        };
        let grants = tokens.grants(KEYS);
        let sign = |name: &str, grants: &[Grant]| -> Vec<String> {
            let key_id = |number| format!("key_of-the-{name}-{number:05}");
            grants.iter().enumerate().map(|(number, grant)| signer.token(&key_id(number), grant)).collect()
        };
        let known = sign("benchmark", &grants);
        let unlimited: Vec<_> =
            grants.iter().map(|grant| Grant { role: UNLIMITED, ..grant.clone() }).collect();
        tokens.unlimited = sign("unlimited", &unlimited).iter().map(|token| request(token)).collect();
        tokens.known = known.iter().map(|token| request(token)).collect();
        tokens.lean = known.iter().map(|token| request_to(LEAN, token)).collect();
        let (shortest, _, longest) = tokens.sizes();
        assert!(
            TOKEN_BYTES.contains(&shortest) && TOKEN_BYTES.contains(&longest),
            "tokens have {shortest} to {longest} bytes"
        );
        let issued = issue(api, tokens.grants(FORGED + 1));
        let pairs = || issued.windows(2).enumerate();
        tokens.forged = [
            pairs().map(|(number, pair)| request(&made_up(&pair[0], number))).collect(),
            pairs().map(|(_, pair)| request(&with_signature_of(&pair[0], &pair[1]))).collect(),
        ];
        tokens.have_new(api, KEYS);
        tokens.es256 = tokens.new.clone();
        tokens
    }

    /// Has at least so many more that nobody has shown.
    pub fn have_new(&mut self, api: &Api, count: usize) {
        let missing = count.saturating_sub(self.new.len() - self.shown.get());
        let issued = issue(api, self.grants(missing));
        self.new.extend(issued.iter().map(|token| request(token)));
    }

    fn grants(&self, count: usize) -> Vec<Grant> {
        Grant::draw_many(&mut self.dice.borrow_mut(), &self.owners, count)
    }

    /// The next requests of a load. When those that nobody has shown run out, there are fewer.
    pub fn draw(&self, load: Load, count: usize) -> Vec<Shot<'_>> {
        let mut dice = self.dice.borrow_mut();
        let ok = |request| Shot { request, expected: Expected::Upstream(V2), timed: true };
        match load {
            Load::Known => (0..count).map(|_| ok(&self.known[self.zipf.draw(&mut dice)])).collect(),
            Load::Lean => (0..count).map(|_| ok(&self.lean[self.zipf.draw(&mut dice)])).collect(),
            Load::Unlimited => (0..count).map(|_| ok(&self.unlimited[self.zipf.draw(&mut dice)])).collect(),
            Load::Es256 => (0..count).map(|_| ok(&self.es256[self.zipf.draw(&mut dice)])).collect(),
            Load::EdDsa => (0..count).map(|_| ok(&self.eddsa[self.zipf.draw(&mut dice)])).collect(),
            Load::Forged | Load::Altered => {
                let forged = &self.forged[usize::from(load == Load::Altered)];
                let of = |request| Shot { request, expected: Expected::Status(401), timed: true };
                (0..count).map(|_| of(&forged[dice.below(forged.len())])).collect()
            }
            Load::New(of_hundred) => (0..count)
                .map_while(|_| {
                    if dice.below(100) >= of_hundred {
                        return Some(ok(&self.known[self.zipf.draw(&mut dice)]));
                    }
                    let request = self.new.get(self.shown.get())?;
                    self.shown.set(self.shown.get() + 1);
                    Some(ok(request))
                })
                .collect(),
        }
    }

    /// Each known key once.
    pub fn every_known(&self) -> impl Iterator<Item = Shot<'_>> {
        every(&self.known)
    }

    /// Each key without a limit once.
    pub fn every_unlimited(&self) -> impl Iterator<Item = Shot<'_>> {
        every(&self.unlimited)
    }

    /// The shortest, mean and longest token of those that are known.
    pub fn sizes(&self) -> (usize, usize, usize) {
        let overhead = request("").len();
        let sizes = || self.known.iter().map(|request| request.len() - overhead);
        (sizes().min().unwrap_or_default(), sizes().sum::<usize>() / KEYS, sizes().max().unwrap_or_default())
    }
}

fn every(requests: &[Vec<u8>]) -> impl Iterator<Item = Shot<'_>> {
    requests.iter().map(|request| Shot { request, expected: Expected::Upstream(V2), timed: false })
}

/// What a key is given.
#[derive(Debug, Clone)]
pub struct Grant {
    owner: String,
    role: &'static str,
    scopes: Vec<&'static str>,
}

impl Grant {
    /// So many, of owners and roles at random.
    pub fn draw_many(dice: &mut Dice, owners: &[String], count: usize) -> Vec<Self> {
        (0..count).map(|_| Self::draw(dice, owners)).collect()
    }

    fn draw(dice: &mut Dice, owners: &[String]) -> Self {
        const ROLES: [(&str, &[&str]); 3] = [
            ("basic", &["chat:write"]),
            ("contributor", &["chat:history", "chat:write", "dataset:read", "dataset:write"]),
            (INTEGRATION, &INTEGRATION_SCOPES),
        ];
        let (role, more) = ROLES[dice.below(ROLES.len())];
        let mut scopes = vec!["chat:read"];
        scopes.extend(&more[..dice.below(more.len() + 1)]);
        scopes.sort_unstable();
        Self { owner: owners[dice.below(owners.len())].clone(), role, scopes }
    }

    /// One for each owner.
    pub fn of_each(owners: &[String]) -> impl Iterator<Item = Self> {
        owners.iter().map(|owner| Self { owner: owner.clone(), role: "basic", scopes: vec!["chat:read"] })
    }
}

/// So many ids of organisations, of different lengths.
pub fn owners(dice: &mut Dice, count: usize) -> Vec<String> {
    let (shortest, longest) = OWNER_BYTES.into_inner();
    let owner = |number| {
        let length = shortest + dice.below(longest - shortest + 1);
        format!("{number:03}-{}", "organisation-".repeat(10))[..length].to_owned()
    };
    (0..count).map(owner).collect()
}

/// A request with a token, as a small client sends it.
pub fn request(token: &str) -> Vec<u8> {
    request_to("/api/chat", token)
}

fn request_to(path: &str, token: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nhost: localhost\r\nuser-agent: keygate-bench/1\r\naccept: */*\r\n\
         authorization: Bearer {token}\r\n\r\n"
    )
    .into_bytes()
}

/// Signs tokens with a secret that the control plane imported.
pub struct Hs256 {
    /// Its id there.
    pub kid: String,
    /// Whose tokens they are.
    pub issuer: String,
    /// The secret, base64url.
    pub secret: String,
    /// Unix seconds.
    pub issued_at: u64,
}

impl Hs256 {
    /// For tokens like those that the control plane signs with the secret, which signs now.
    pub fn like(api: &Api, kid: String, secret: String) -> Self {
        let key = Parts::of(&api.issue("basic").token);
        let issuer = key.claim("iss").as_str().expect("an issuer").to_owned();
        let issued_at = key.claim("iat").as_u64().expect("a time");
        assert!(key.header.contains(&kid), "the imported secret signs");
        Self { kid, issuer, secret, issued_at }
    }

    /// The token of a key that is registered nowhere: proxies ask nobody whether it is.
    pub fn token(&self, key_id: &str, grant: &Grant) -> String {
        let header = format!(r#"{{"alg":"HS256","kid":"{}","typ":"apikey+jwt"}}"#, self.kid);
        let claims = format!(
            r#"{{"iss":"{}","sub":"{key_id}","jti":"{}","iat":{},"exp":{},"role":"{}","scope":"{}","own":"{}"}}"#,
            self.issuer,
            key_id.replace("key_of-", "id-in-"),
            self.issued_at,
            self.issued_at + 24 * 60 * 60,
            grant.role,
            grant.scopes.join(" "),
            grant.owner,
        );
        let signed = format!("{}.{}", BASE64URL.encode(header), BASE64URL.encode(claims));
        let secret = BASE64URL.decode(&self.secret).expect("it was encoded here");
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret).expect("any length will do");
        mac.update(signed.as_bytes());
        format!("{signed}.{}", BASE64URL.encode(mac.finalize().into_bytes()))
    }
}

/// Issues keys over several connections, with whatever secret signs now.
pub fn issue(api: &Api, grants: Vec<Grant>) -> Vec<String> {
    let (port, admin) = (api.port(), api.key());
    let some = |grants: &[Grant]| -> Vec<String> {
        let mut connection = Connection::open(port).expect("the control plane listens");
        let mut one = |grant: &Grant| {
            let Grant { owner, role, scopes } = grant;
            let body = json!({ "name": "bench", "role": role, "owner": owner, "scopes": scopes });
            let request = Request::post("/api/auth/register", &body).bearer(&admin);
            let answer = connection.send(&request);
            assert_eq!(answer.status, 201, "a key is not issued");
            let answer: Value = answer.json();
            answer["api_key"].as_str().expect("a key").to_owned()
        };
        grants.iter().map(&mut one).collect()
    };
    let each = grants.len().div_ceil(AT_A_TIME).max(1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = grants.chunks(each).map(|chunk| scope.spawn(|| some(chunk))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("keys")).collect()
    })
}

/// As who has no key makes it, but has seen one: well-formed, and each with a key id and an id of its own.
fn made_up(token: &str, number: usize) -> String {
    let parts = Parts::of(token);
    let length = parts.claim("jti").as_str().expect("an id").len();
    parts
        .with_claim("sub", format!("key_{number:022}"))
        .with_claim("jti", format!("{number:0length$}"))
        .token()
}

/// As who has a key can make it of that.
fn with_signature_of(token: &str, other: &str) -> String {
    let (signed, _) = token.rsplit_once('.').expect("a token");
    let (_, signature) = other.rsplit_once('.').expect("a token");
    format!("{signed}.{signature}")
}
