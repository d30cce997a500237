//! One decision: the core natively, the control plane's `/api/auth/validate` and the filter in Envoy say
//! the same of 10,000 random and hostile tokens.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use keygate_core::decide::cache::TokenCache;
use keygate_core::decide::policy::Route;
use keygate_core::decide::rules::{Rules, Ruleset, VerificationKey};
use keygate_core::decide::{Judge, Verdict, decide_on_route};
use keygate_core::revocation::{ExactSet, Fingerprint, Op};
use keygate_core::secret::Secret;
use keygate_core::token::credential;
use keygate_core::token::crypto::{Algorithm, native};
use keygate_e2e::forge::Parts;
use keygate_e2e::http::Connection;
use keygate_e2e::{Request, Stack};
use serde_json::{Value, json};

const TOKENS: usize = 10_000;

/// A generator with a seed (xorshift64*), so that a failure can be had again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("smaller than a usize")
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// A byte that can stand in a header's value: no space, which would be cut off at the ends, and a comma,
    /// which says that there are two credentials, only now and then.
    fn byte(&mut self) -> u8 {
        let byte = 0x21 + u8::try_from(self.below(0xdf)).expect("a byte");
        match byte {
            0x7f => 0x80,
            b',' if self.below(100) > 0 => b'-',
            byte => byte,
        }
    }
}

/// The core with what anybody may know: the public keys. And with what this test ended itself.
struct Core {
    rules: Ruleset,
    ended: ExactSet,
    route: Route,
}

impl Core {
    fn new(jwks: &Value, ended: &[Op]) -> Self {
        native::install();
        let keys = jwks["keys"].as_array().expect("keys").iter().map(|key| {
            let part = |name: &str| BASE64URL.decode(key[name].as_str().expect("text")).expect("base64url");
            VerificationKey {
                kid: key["kid"].as_str().expect("a kid").into(),
                alg: Algorithm::ES256,
                material: Secret::new([vec![4], part("x"), part("y")].concat()),
                not_after: None,
                jti_key: None,
            }
        });
        let rules = Rules { max_life_s: 365 * 86_400, ..Rules::minimal(keys.collect()) };
        Self {
            rules: Ruleset::try_from(rules).expect("rules"),
            ended: ExactSet::of(ended),
            route: Route::keyed("any", &[]),
        }
    }

    fn verdict(&self, header: &[u8]) -> (u16, String) {
        let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
        let mut cache = TokenCache::new(0);
        let judge = Judge { cache: &mut cache, meter: (), revocations: &self.ended, now, trace: &mut () };
        let credential = credential::find([(b"authorization".as_slice(), header)]);
        match decide_on_route(&self.rules, &self.route, credential, judge).verdict {
            Verdict::Forward => (200, String::new()),
            Verdict::Refuse(refusal) => (refusal.status(), refusal.code().into()),
        }
    }
}

fn tokens(good: &[String], random: &mut Random) -> Vec<Vec<u8>> {
    let values = [
        json!(0),
        json!(-1),
        json!(1.5),
        json!(u64::MAX),
        json!("x"),
        json!(""),
        json!(null),
        json!([]),
        json!(["keygate"]),
        json!({}),
        json!(true),
        json!("ES256"),
        json!("HS256"),
        json!("none"),
        json!(4_102_444_800u64),
    ];
    let members = ["iss", "sub", "jti", "iat", "exp", "nbf", "aud", "role", "scope", "own", "x"];
    let headers = ["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "x5c", "zip", "cty"];
    let mut tokens = vec![b"".to_vec(), b".".to_vec(), b"..".to_vec(), b"a.b.c".to_vec()];
    while tokens.len() < TOKENS {
        let token = random.pick(good);
        let parts = Parts::of(&token);
        let mut bytes = token.into_bytes();
        match random.below(12) {
            0 => {}
            1 => {
                let at = random.below(bytes.len());
                bytes[at] = random.byte();
            }
            2 => bytes.truncate(random.below(bytes.len())),
            3 => bytes.insert(random.below(bytes.len()), random.byte()),
            4 => bytes = parts.with_claim(random.pick(&members), random.pick(&values)).token().into_bytes(),
            5 => bytes = parts.with_header(random.pick(&headers), random.pick(&values)).token().into_bytes(),
            6 => bytes = parts.without_claim(random.pick(&members)).token().into_bytes(),
            7 => bytes = parts.without_header(random.pick(&headers)).token().into_bytes(),
            8 => {
                let other = Parts::of(&random.pick(good));
                bytes = Parts { signature: other.signature, ..parts }.token().into_bytes();
            }
            9 => {
                let name = random.pick(&members);
                bytes = parts.with_raw_claim(&format!("\"{name}\":\"twice\"")).token().into_bytes();
            }
            10 => bytes = (0..random.below(6_000)).map(|_| random.byte()).collect(),
            _ => {
                // One changed bit of the signature's last letter: the same bytes, spelled otherwise.
                if let Some(last) = bytes.last_mut() {
                    *last ^= 1;
                }
            }
        }
        tokens.push(bytes);
    }
    tokens
}

/// A connection that is opened again when the other side closes it, as Envoy does after a 400.
struct Asker {
    port: u16,
    path: &'static str,
    connection: Option<Connection>,
}

impl Asker {
    fn said(&mut self, header: &[u8]) -> (u16, String) {
        let mut connection =
            self.connection.take().unwrap_or_else(|| Connection::open(self.port).expect("it listens"));
        let answer = connection.send(&Request::get(self.path).header("authorization", header));
        if answer.header("connection") != Some("close") {
            self.connection = Some(connection);
        }
        let code = match answer.status {
            200 => String::new(),
            _ => answer.json()["code"].as_str().unwrap_or_default().into(),
        };
        (answer.status, code)
    }
}

#[test]
fn the_core_the_api_and_the_filter_say_the_same_of_10_000_tokens() {
    let stack = Stack::start();
    let api = stack.api();
    let policy = json!({ "routes": [{ "name": "any", "path": "/any", "access": "key" }] });
    api.send(Request::new("PUT", "/api/admin/policy?wait=applied&timeout=10s").json(&policy)).expect(200);
    let mut ended = Vec::new();
    let good: Vec<String> = (0..24)
        .map(|n| {
            let key = api.issue("basic");
            let jti = Parts::of(&key.token).claim("jti");
            let fingerprint = Fingerprint::of(jti.as_str().expect("a jti"));
            let end = match n % 4 {
                0 => Some(("revoke", Op::Revoke(fingerprint))),
                1 => Some(("suspend", Op::Suspend(fingerprint))),
                _ => None,
            };
            if let Some((verb, op)) = end {
                let path = format!("/api/admin/keys/{}/{verb}?wait=applied&timeout=10s", key.id);
                let answer = api.post(&path, &json!({})).expect(200).json();
                assert_eq!(answer["propagation"]["missing"], json!([]));
                ended.push(op);
            }
            key.token
        })
        .collect();
    let core = Core::new(&api.call(&Request::get("/.well-known/jwks.json")).expect(200).json(), &ended);

    let seed = 0x6b65_7967_6174_6531;
    let tokens = tokens(&good, &mut Random(seed));
    let asker = |port, path| Asker { port, path, connection: None };
    let mut filter = asker(stack.envoy.port(), "/any");
    let mut control_plane = asker(stack.control_plane.api_port(), "/api/auth/validate");
    let mut verdicts = std::collections::BTreeMap::<(u16, String), usize>::new();
    for token in &tokens {
        let header = [b"Bearer ", token.as_slice()].concat();
        let native = core.verdict(&header);
        let validated = control_plane.said(&header);
        let filtered = filter.said(&header);
        let shown = String::from_utf8_lossy(token);
        assert_eq!(native, validated, "the API differs on {shown:?} (seed {seed:#x})");
        assert_eq!(native, filtered, "the filter differs on {shown:?} (seed {seed:#x})");
        *verdicts.entry(native).or_default() += 1;
    }
    println!("verdicts on {TOKENS} tokens: {verdicts:?}");
    assert!(verdicts.get(&(200, String::new())).is_some_and(|good| *good > 300), "{verdicts:?}");
    assert!(verdicts.get(&(401, "invalid_token".into())).is_some_and(|bad| *bad > 5_000), "{verdicts:?}");
}
