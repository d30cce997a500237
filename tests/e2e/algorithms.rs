//! The algorithms besides the usual one: the filter verifies Ed25519 and HMAC itself, ES256 by Envoy.

use keygate_e2e::forge::Parts;
use keygate_e2e::{Request, Stack};
use serde_json::{Value, json};

fn works_with(algorithm: &str) -> Stack {
    let stack =
        Stack::builder().workers(1).config(&format!("[secrets]\nalgorithm = \"{algorithm}\"\n")).start();
    let api = stack.api();
    let active = api.get("/api/admin/secrets/status").expect(200).json()["active"].clone();
    assert_eq!((&active["alg"], &active["state"]), (&json!(algorithm), &json!("active")));

    let key = api.issue("basic");
    let parts = Parts::of(&key.token);
    assert_eq!(serde_json::from_str::<Value>(&parts.header).expect("JSON")["alg"], algorithm);
    stack.get("/api/chat", &key.token).expect(200);
    let mut tampered = parts.clone();
    tampered.signature[3] ^= 0x10;
    for hostile in [tampered, parts.with_claim("role", "admin"), parts.with_header("alg", "ES256")] {
        stack.get("/api/chat", &hostile.token()).expect_problem(401, "invalid_token");
        let request = Request::get("/api/auth/validate").bearer(hostile.token());
        api.call(&request).expect_problem(401, "invalid_token");
    }
    let path = format!("/api/admin/keys/{}/revoke?wait=applied&timeout=10s", key.id);
    let answer = api.post(&path, &json!({ "reason": "compromised" })).expect(200).json();
    assert_eq!(answer["propagation"]["missing"], json!([]));
    stack.get("/api/chat", &key.token).expect_problem(401, "invalid_token");
    stack
}

#[test]
fn ed25519_works_and_its_public_key_is_published() {
    let stack = works_with("EdDSA");
    let jwks = stack.api().call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    let key = &jwks["keys"][0];
    assert_eq!((&key["kty"], &key["crv"], &key["alg"]), (&json!("OKP"), &json!("Ed25519"), &json!("EdDSA")));
}

#[test]
fn hmac_works_and_publishes_nothing() {
    let stack = works_with("HS256");
    let jwks = stack.api().call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    assert_eq!(jwks, json!({ "keys": [] }));
}
