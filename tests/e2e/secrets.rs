//! What must never be seen, is not.

use std::fs;
use std::path::Path;

use keygate_e2e::{Request, Stack};

#[test]
fn no_secret_shows_anywhere() {
    let stack = Stack::start();
    let api = stack.api();
    let key = api.issue("basic");
    stack.get("/api/chat", &key.token).expect(200);
    stack.get("/api/chat", &format!("{}x", key.token)).expect(401);
    api.call(&Request::get("/api/auth/validate").bearer(&key.token)).expect(200);
    api.post(
        "/api/admin/explain",
        &serde_json::json!({ "token": key.token, "method": "GET", "path": "/api/chat" }),
    )
    .expect(200);
    api.revoke(&key.id);

    let secrets = [
        ("the fleet token", stack.fleet_token()),
        ("the admin key", stack.control_plane.admin_key()),
        ("a key", key.token.clone()),
    ];
    let mut places = vec![
        ("Envoy's configuration", stack.envoy.admin("/config_dump?include_eds").expect(200).text()),
        ("Envoy's metrics", stack.envoy.admin("/stats/prometheus").expect(200).text()),
        ("Envoy's log", stack.envoy.log_text()),
        ("the control plane's log", fs::read_to_string(stack.control_plane.log()).expect("the log")),
    ];
    for path in ["/metrics", "/health", "/livez", "/readyz", "/openapi.json", "/.well-known/jwks.json"] {
        places.push((path, api.call(&Request::get(path)).expect(200).text()));
    }
    for path in ["/api/admin/keys", "/api/admin/fleet", "/api/admin/secrets/status"] {
        places.push((path, api.get(path).expect(200).text()));
    }
    let one = format!("/api/admin/keys/{}", key.id);
    places.push((&one, api.get(&one).expect(200).text()));
    let access_log = fs::read_to_string(stack.envoy.access_log_file()).expect("the log");
    places.push(("the access log", access_log));
    for (secret, value) in &secrets {
        // A signature is as good as the key to whoever has the rest.
        let part = value.rsplit('.').next().expect("a part");
        for (place, text) in &places {
            assert!(!text.contains(part), "{secret} shows in {place}");
        }
        assert!(
            !any_file_contains(&stack.control_plane.data(), part.as_bytes()),
            "{secret} is kept in clear"
        );
    }
    // What the public may know of a signing key is its public half.
    let jwks = api.call(&Request::get("/.well-known/jwks.json")).json();
    for jwk in jwks["keys"].as_array().expect("keys") {
        assert!(jwk["d"].is_null() && jwk["k"].is_null(), "a private key in the key set");
    }
}

fn any_file_contains(directory: &Path, needle: &[u8]) -> bool {
    fs::read_dir(directory).expect("a directory").any(|entry| {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            return any_file_contains(&path, needle);
        }
        let bytes = fs::read(&path).unwrap_or_default();
        bytes.windows(needle.len()).any(|window| window == needle)
    })
}
