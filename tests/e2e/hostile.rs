//! Tokens that are none: every one gets the same answer, and the precise reason goes to the access log
//! only.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as BASE64URL};
use hmac::{Hmac, KeyInit, Mac};
use keygate_e2e::forge::Parts;
use keygate_e2e::{Request, Response, SOON, Stack, wait_until};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::requests::assert_serves;

/// A hostile token, what it is, and the reason that the access log may give.
struct Hostile {
    what: String,
    token: Vec<u8>,
    reasons: &'static [&'static str],
}

const MALFORMED: &[&str] = &["malformed"];

/// What all refusals of bad tokens have in common; the time is no part of it.
fn shape(answer: &Response) -> (u16, Vec<(String, String)>, Vec<u8>) {
    let headers = answer.headers.iter().filter(|(name, _)| name != "date").cloned().collect();
    (answer.status, headers, answer.body.clone())
}

/// `good` with everything that an attacker could try on it. `jwks` is what anybody can read.
fn hostile_tokens(good: &str, jwks: &Value) -> Vec<Hostile> {
    let parts = Parts::of(good);
    let mut tokens = Vec::new();
    let mut add = |what: &str, token: &[u8], reasons: &'static [&'static str]| {
        tokens.push(Hostile { what: what.to_owned(), token: token.to_owned(), reasons });
    };

    // Signatures.
    let bad = &["bad_signature"];
    add("a tampered role", parts.with_claim("role", "admin").token().as_bytes(), bad);
    add("tampered scopes", parts.with_claim("scope", "system:manage").token().as_bytes(), bad);
    add("a longer life", parts.with_claim("exp", plus(&parts, "exp", 60)).token().as_bytes(), bad);
    let mut tampered = parts.clone();
    tampered.signature[7] ^= 1;
    add("a tampered signature", tampered.token().as_bytes(), bad);
    let zeroes = Parts { signature: vec![0; parts.signature.len()], ..parts.clone() };
    add("a signature of zeroes", zeroes.token().as_bytes(), &["bad_signature", "malformed"]);
    let short = Parts { signature: parts.signature[..10].to_vec(), ..parts.clone() };
    add("a short signature", short.token().as_bytes(), &["bad_signature", "malformed"]);
    let long = Parts { signature: [&parts.signature[..], &[0]].concat(), ..parts.clone() };
    add("a long signature", long.token().as_bytes(), &["bad_signature", "malformed"]);
    let none = Parts { signature: Vec::new(), ..parts.clone() };
    add("no signature", none.token().as_bytes(), &["bad_signature", "malformed"]);

    // Algorithms and signing secrets.
    let algorithm = &["algorithm_mismatch", "malformed"];
    for alg in ["none", "None", "NONE", "nOnE", "HS256", "RS256", "ES384", "EdDSA", ""] {
        add(&format!("alg {alg:?}"), parts.with_header("alg", alg).token().as_bytes(), algorithm);
        let unsigned = Parts { signature: Vec::new(), ..parts.with_header("alg", alg) };
        add(&format!("alg {alg:?} unsigned"), unsigned.token().as_bytes(), algorithm);
    }
    for (kind, secret) in public_keys(jwks) {
        let mut confused = parts.with_header("alg", "HS256").with_claim("role", "admin");
        let mut mac = Hmac::<Sha256>::new_from_slice(&secret).expect("any length");
        mac.update(confused.signed().as_bytes());
        confused.signature = mac.finalize().into_bytes().to_vec();
        add(&format!("HS256 with the public key as {kind}"), confused.token().as_bytes(), algorithm);
    }
    let foreign = parts.with_header("kid", "somebody-else").token();
    add("a foreign kid", foreign.as_bytes(), &["unknown_kid"]);
    for kid in [json!(7), json!(null), json!(["a"]), json!({})] {
        add(&format!("kid {kid}"), parts.with_header("kid", kid.clone()).token().as_bytes(), MALFORMED);
    }
    for (what, kid) in [("empty", ""), ("a path", "../../dev/null"), ("SQL", "' OR 1=1 --")] {
        let token = parts.with_header("kid", kid).token();
        add(&format!("kid: {what}"), token.as_bytes(), &["unknown_kid", "malformed"]);
    }

    // Headers that would change what a reader does.
    let crit = parts.with_header("crit", json!(["exp"])).token();
    add("crit", crit.as_bytes(), MALFORMED);
    add("an empty crit", parts.with_header("crit", json!([])).token().as_bytes(), MALFORMED);
    add("b64 false", parts.with_header("b64", false).token().as_bytes(), MALFORMED);
    add("b64 true", parts.with_header("b64", true).token().as_bytes(), MALFORMED);
    let b64 = parts.with_header("b64", false).with_header("crit", json!(["b64"]));
    add("b64 with crit", b64.token().as_bytes(), MALFORMED);
    for member in ["jwk", "jku", "x5u", "x5c", "x5t", "x5t#S256"] {
        let token = parts.with_header(member, "https://evil.example").token();
        add(member, token.as_bytes(), MALFORMED);
    }
    for typ in [json!("JWT"), json!("at+jwt"), json!(""), json!(1)] {
        add(&format!("typ {typ}"), parts.with_header("typ", typ.clone()).token().as_bytes(), MALFORMED);
    }
    for member in ["alg", "kid", "typ"] {
        let token = parts.without_header(member).token();
        add(&format!("no {member}"), token.as_bytes(), &["malformed", "unknown_kid", "algorithm_mismatch"]);
    }

    // Members twice: which one counts differs from reader to reader.
    for (what, token) in [
        ("alg twice", parts.with_raw_header(r#""alg":"none""#)),
        ("kid twice", parts.with_raw_header(r#""kid":"x""#)),
        ("jti twice", parts.with_raw_claim(r#""jti":"x""#)),
        ("the same jti twice", parts.with_raw_claim(&format!(r#""jti":{}"#, parts.claim("jti")))),
        ("jti twice by escape", parts.with_raw_claim(r#""\u006ati":"x""#)),
        ("role twice", parts.with_raw_claim(r#""role":"admin""#)),
        ("a nested member twice", parts.with_raw_claim(r#""own":{"a":1,"a":2}"#)),
    ] {
        add(what, token.token().as_bytes(), MALFORMED);
    }

    // Claims of the wrong type, or none.
    for claim in ["exp", "iat", "jti", "sub", "iss"] {
        add(&format!("no {claim}"), parts.without_claim(claim).token().as_bytes(), MALFORMED);
        for value in [json!(null), json!([]), json!({}), json!(true)] {
            let token = parts.with_claim(claim, value.clone()).token();
            add(&format!("{claim} {value}"), token.as_bytes(), MALFORMED);
        }
    }
    add(
        "an array as jti",
        parts.with_claim("jti", json!([parts.claim("jti")])).token().as_bytes(),
        MALFORMED,
    );
    add(
        "an array as iss",
        parts.with_claim("iss", json!([parts.claim("iss")])).token().as_bytes(),
        MALFORMED,
    );
    add("a number as jti", parts.with_claim("jti", 7).token().as_bytes(), MALFORMED);
    add("scope as an array", parts.with_claim("scope", json!(["chat:read"])).token().as_bytes(), MALFORMED);
    for claim in ["exp", "iat"] {
        for value in ["1.5", "-1", "18446744073709551615", "1e300", "\"1\"", "1e400", "01", "+1", "NaN"] {
            let token = parts.without_claim(claim).with_raw_claim(&format!("\"{claim}\":{value}")).token();
            let reasons = &["malformed", "life_too_long", "not_yet_valid", "expired", "bad_signature"];
            add(&format!("{claim} {value}"), token.as_bytes(), reasons);
        }
    }

    // Times and names.
    let now = parts.claim("iat").as_u64().expect("a number");
    add("another issuer", parts.with_claim("iss", "evil").token().as_bytes(), &["wrong_issuer"]);
    let future = parts.with_claim("iat", now + 86_400).with_claim("exp", now + 90_000);
    add("issued in the future", future.token().as_bytes(), &["not_yet_valid"]);
    let eternal = parts.with_claim("exp", now + 100 * 365 * 86_400);
    add("a life of a century", eternal.token().as_bytes(), &["life_too_long"]);
    let past = parts.with_claim("iat", now - 1000).with_claim("exp", now - 1);
    add("ended", past.token().as_bytes(), &["expired"]);
    let backwards = parts.with_claim("exp", now - 1);
    add("ended before it began", backwards.token().as_bytes(), &["expired", "malformed"]);

    // Form.
    let (signed, signature) = good.rsplit_once('.').expect("a token");
    let (header, claims) = signed.split_once('.').expect("a token");
    for (what, token) in [
        ("two parts", signed.to_owned()),
        ("four parts", format!("{good}.{signature}")),
        ("a dot at the end", format!("{good}.")),
        ("a dot at the start", format!(".{good}")),
        ("no header", format!(".{claims}.{signature}")),
        ("no claims", format!("{header}..{signature}")),
        ("dots", "..".to_owned()),
        ("nothing", String::new()),
        ("a word", "password".to_owned()),
        ("padded", format!("{good}=")),
        ("padded inside", format!("{header}=.{claims}.{signature}")),
        ("white space inside", format!("{header}. {claims}.{signature}")),
        ("a tab inside", format!("{header}\t.{claims}.{signature}")),
        ("standard base64", format!("{header}.{}.{signature}", STANDARD.encode(&parts.claims))),
        ("quoted", format!("\"{good}\"")),
        ("twice bearer", format!("Bearer {good}")),
        ("non-canonical base64", non_canonical(good)),
        ("percent-encoded", good.replace('.', "%2e")),
        ("hexadecimal", "deadbeef".repeat(30)),
    ] {
        add(what, token.as_bytes(), MALFORMED);
    }
    for (what, header) in [
        ("a header that is no JSON", "x"),
        ("a header that is an array", "[]"),
        ("a header with something after it", r#"{"alg":"ES256"} {}"#),
        ("an empty header", "{}"),
        ("a header with a byte order mark", "\u{feff}{}"),
    ] {
        add(what, Parts { header: header.into(), ..parts.clone() }.token().as_bytes(), MALFORMED);
    }
    let deep = parts.with_raw_claim(&format!("\"own\":{}{}", "[".repeat(800), "]".repeat(800)));
    add("deep claims", deep.token().as_bytes(), MALFORMED);
    let trailing = Parts { claims: format!("{}{{}}", parts.claims), ..parts.clone() };
    add("claims with something after them", trailing.token().as_bytes(), MALFORMED);
    let nul = Parts { claims: format!("{}\0", parts.claims), ..parts.clone() };
    add("claims with NUL after them", nul.token().as_bytes(), MALFORMED);
    let invalid = [&parts.claims.as_bytes()[..10], b"\xff\xfe\"}"].concat();
    let invalid = format!("{header}.{}.{signature}", BASE64URL.encode(invalid));
    add("claims that are no UTF-8", invalid.as_bytes(), MALFORMED);
    let large = parts.with_claim("own", "o".repeat(4096));
    add("more than 4 KiB", large.token().as_bytes(), MALFORMED);
    add("60 kB", "A".repeat(60_000).as_bytes(), MALFORMED);
    add("60 kB of a token", format!("{good}{}", "A".repeat(60_000)).as_bytes(), MALFORMED);
    add("60 kB of dots", ".".repeat(60_000).as_bytes(), MALFORMED);
    add("bytes", b"\xff", MALFORMED);
    add("bytes in a token", [good.as_bytes(), b"\xff"].concat().as_slice(), MALFORMED);
    tokens
}

fn plus(parts: &Parts, claim: &str, seconds: u64) -> u64 {
    parts.claim(claim).as_u64().expect("a number") + seconds
}

/// The same bytes for a careless reader: the last character's unused bits are set.
fn non_canonical(token: &str) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut bytes = token.as_bytes().to_vec();
    let last = bytes.last_mut().expect("a token");
    let index = ALPHABET.iter().position(|byte| byte == last).expect("base64url");
    // 64 bytes leave four bits over in the last character, which are 0 when canonical.
    *last = ALPHABET[index | 1];
    assert_ne!(bytes, token.as_bytes(), "the signature has a length without unused bits");
    String::from_utf8(bytes).expect("text")
}

/// The public keys in the forms in which a confused verifier would take one for a shared secret.
fn public_keys(jwks: &Value) -> Vec<(&'static str, Vec<u8>)> {
    let key = &jwks["keys"][0];
    let coordinate =
        |name: &str| BASE64URL.decode(key[name].as_str().expect("a coordinate")).expect("base64url");
    let point = [&[4][..], &coordinate("x"), &coordinate("y")].concat();
    // RFC 5480: SubjectPublicKeyInfo of id-ecPublicKey on prime256v1, without the point.
    let prefix = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
        0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    let der = [&prefix[..], &point].concat();
    let encoded = STANDARD.encode(&der);
    let (first, second) = encoded.split_at(64);
    let pem = format!("-----BEGIN PUBLIC KEY-----\n{first}\n{second}\n-----END PUBLIC KEY-----\n");
    vec![
        ("a point", point),
        ("DER", der),
        ("PEM", pem.clone().into_bytes()),
        ("PEM without its last newline", pem.trim_end().as_bytes().to_vec()),
        ("JWK", key.to_string().into_bytes()),
        ("nothing", Vec::new()),
    ]
}

#[test]
fn every_bad_token_gets_the_same_answer_and_the_log_knows_better() {
    let stack = Stack::start();
    let key = stack.api().issue("basic");
    let jwks = stack.api().call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    let tokens = hostile_tokens(&key.token, &jwks);
    let mut workers = stack.envoy.connect_to_all_workers();
    // A good token first, so that the hostile ones meet a cache that knows it.
    assert_serves(&mut workers, &key.token);

    let reference = stack.get("/api/chat", "not.a.key").expect_problem(401, "invalid_token");
    let challenge = reference.header("www-authenticate").expect("a challenge");
    assert!(challenge.contains("error=\"invalid_token\""), "{challenge}");
    let seen = stack.upstream.seen();
    for (number, hostile) in tokens.iter().enumerate() {
        let worker = number % workers.len();
        let request = Request::get("/api/chat")
            .bearer(&hostile.token)
            .header("user-agent", format!("hostile-{number}"));
        let answer = workers[worker].send(&request);
        assert_eq!(shape(&answer), shape(&reference), "{}: {}", hostile.what, answer.text());
        let good = workers[worker].send(&Request::get("/api/chat").bearer(&key.token));
        assert_eq!(good.status, 200, "after {}", hostile.what);
    }
    assert_eq!(stack.upstream.seen() - seen, tokens.len() as u64, "only the good ones arrived");
    for (number, hostile) in tokens.iter().enumerate() {
        let line = stack.envoy.logged(&format!("hostile-{number}"));
        let outcome = line["outcome"].as_str().unwrap_or_default();
        assert!(hostile.reasons.contains(&outcome), "{}: {outcome}, not {:?}", hostile.what, hostile.reasons);
    }
    stack.envoy.assert_no_vm_died();
}

#[test]
fn the_control_plane_judges_bad_tokens_the_same() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let key = api.issue("basic");
    let jwks = api.call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    let validate = |token: &[u8]| api.call(&Request::get("/api/auth/validate").bearer(token));
    assert_eq!(validate(key.token.as_bytes()).expect(200).json()["valid"], true);
    let reference = validate(b"not.a.key").expect_problem(401, "invalid_token");
    for hostile in hostile_tokens(&key.token, &jwks) {
        let answer = validate(&hostile.token);
        assert_eq!(answer.status, 401, "{}: {}", hostile.what, answer.text());
        assert_eq!(answer.body, reference.body, "{}", hostile.what);
    }
}

#[test]
fn a_key_ends_when_it_said_it_would() {
    let stack = Stack::start();
    let key = stack.api().issue_with(&json!({ "name": "brief", "role": "basic", "expires_in": "2s" }));
    let mut workers = stack.envoy.connect_to_all_workers();
    let request = Request::get("/api/chat").bearer(&key.token);
    // So every worker remembers it as verified.
    assert_serves(&mut workers, &key.token);
    for connection in &mut workers {
        wait_until(SOON, "the key to end", || connection.send(&request).status == 401);
        connection.send(&request).expect_problem(401, "invalid_token");
    }
    stack.call(&request.header("user-agent", "ended")).expect(401);
    assert_eq!(stack.envoy.logged("ended")["outcome"], "expired");
}
