//! Rotations to another algorithm, and to secrets that were made elsewhere.

use std::io::Read;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit, Mac};
use keygate_e2e::forge::Parts;
use keygate_e2e::{Api, Key, Request, Stack};
use serde_json::{Value, json};
use sha2::Sha256;

use super::{ROTATE, active, all_workers, assert_all_answer, kid_of, rotated_with, status};

/// The ids and algorithms in the key set.
fn published(api: &Api) -> Vec<(String, String)> {
    let jwks = api.call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    let keys = jwks["keys"].as_array().unwrap_or_else(|| panic!("no keys in {jwks}"));
    keys.iter().map(|key| (super::text(&key["kid"]), super::text(&key["alg"]))).collect()
}

#[test]
fn from_one_algorithm_to_another_and_back_keys_of_all_pass() {
    let stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let mut workers = all_workers(&[&stack.envoy]);
    let mut keys = vec![api.issue("basic")];
    let mut public = vec![(kid_of(&keys[0]), "ES256".to_owned())];
    for algorithm in ["EdDSA", "HS256", "ES256"] {
        let kid = rotated_with(&api, &json!({ "algorithm": algorithm }));
        assert_eq!(status(&api)["active"]["alg"], algorithm);
        let key = api.issue("basic");
        let header: Value = serde_json::from_str(&Parts::of(&key.token).header).expect("JSON");
        assert_eq!((&header["kid"], &header["alg"]), (&json!(kid), &json!(algorithm)));
        keys.push(key);
        for key in &keys {
            assert_all_answer(&mut workers, key, 200);
        }
        // What is public of a secret, the newest first but for one that was not yet to be seen; never an HMAC secret.
        if algorithm != "HS256" {
            public.push((kid, algorithm.to_owned()));
        }
        let mut sets = [published(&api), public.clone()];
        sets.iter_mut().for_each(|set| set.sort());
        assert_eq!(sets[0], sets[1]);
    }
    assert_eq!(published(&api)[0], public[2], "the one that signs comes first");
    api.post(ROTATE, &json!({ "algorithm": "none" })).expect_problem(400, "bad_request");
}

fn random_bytes(count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("random bytes");
    bytes
}

#[test]
fn a_secret_that_can_be_guessed_is_refused_with_a_reason_that_does_not_tell_it() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let before = active(&api);
    let text = |text: &str| text.as_bytes().to_vec();
    for (secret, why) in [
        (random_bytes(31), "31 bytes"),
        (random_bytes(16), "16 bytes"),
        (random_bytes(513), "513 bytes"),
        (text("your-256-bit-secret"), "well-known"),
        (text("a-string-secret-at-least-256-bits-long"), "well-known"),
        (text("QWERTYUIOPasdfghjklzxcvbnm123456"), "well-known"),
        (BASE64URL.encode("a-string-secret-at-least-256-bits-long").into_bytes(), "well-known"),
        (vec![7; 32], "random"),
        (random_bytes(20).repeat(2), "random"),
        ((0..64).collect(), "random"),
    ] {
        let sent = BASE64URL.encode(&secret);
        let answer = api.post(ROTATE, &json!({ "secret": sent }));
        let problem = answer.expect_problem(400, "bad_request").text();
        assert!(problem.contains("'secret'") && problem.contains(why), "{why}: {problem}");
        let clear = String::from_utf8_lossy(&secret).into_owned();
        assert!(!problem.contains(&sent) && !problem.contains(&clear), "{problem}");
        let log = std::fs::read_to_string(stack.control_plane.log()).expect("the log");
        assert!(!log.contains(&sent) && !log.contains(&clear), "it is in the log");
    }
    api.post(ROTATE, &json!({ "secret": "no base64url!" })).expect_problem(400, "bad_request");
    let with_a_pair = json!({ "secret": BASE64URL.encode(random_bytes(32)), "algorithm": "ES256" });
    api.post(ROTATE, &with_a_pair).expect_problem(400, "bad_request");
    let now = status(&api);
    assert_eq!((active(&api), &now["rotation"]), (before, &Value::Null));
    assert_eq!(now["versions"].as_array().map(Vec::len), Some(1), "{now}");
}

#[test]
fn what_somebody_else_signs_with_a_secret_that_was_taken_from_them_passes() {
    let stack = Stack::builder().workers(2).start();
    let api = stack.api();
    let mut workers = all_workers(&[&stack.envoy]);
    let secret = random_bytes(48);
    let kid = rotated_with(&api, &json!({ "secret": BASE64URL.encode(&secret) }));
    assert_eq!(status(&api)["active"]["alg"], "HS256");
    let key = api.issue("basic");
    assert_eq!(kid_of(&key), kid);
    assert_all_answer(&mut workers, &key, 200);

    let issued = Parts::of(&key.token);
    let minted = |secret: &[u8], parts: &Parts| {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("any length");
        mac.update(parts.signed().as_bytes());
        let signature = mac.finalize().into_bytes().to_vec();
        Key { token: Parts { signature, ..parts.clone() }.token(), ..key.clone() }
    };
    assert!(minted(&secret, &issued).token == key.token, "it is signed with another secret");
    let elsewhere = issued.with_claim("jti", "made-elsewhere");
    let theirs = minted(&secret, &elsewhere);
    assert_all_answer(&mut workers, &theirs, 200);
    api.call(&Request::get("/api/auth/validate").bearer(&theirs.token)).expect(200);
    assert_all_answer(&mut workers, &minted(&random_bytes(48), &elsewhere), 401);
}
