//! The control plane's API, as its users find it.

use std::time::Duration;

use keygate_e2e::forge::Parts;
use keygate_e2e::{Key, Redis, Request, SOON, Stack, wait_until};
use serde_json::{Value, json};

fn control_plane() -> Stack {
    Stack::builder().without_envoy().start()
}

#[test]
fn a_role_gives_life_and_scopes_and_may_be_narrowed() {
    let stack = control_plane();
    let api = stack.api();
    for (role, days, scopes) in [
        ("basic", 7, "chat:read chat:write"),
        ("contributor", 30, "chat:read chat:write chat:history dataset:read dataset:write"),
        ("node_operator", 90, "chat:read chat:write chat:history node:register node:manage"),
    ] {
        let answer = api.post("/api/auth/register", &json!({ "name": "n", "role": role })).expect(201);
        assert_eq!(answer.header("cache-control"), Some("no-store"), "it holds a key");
        let answer = answer.json();
        assert_eq!(answer["role"], role);
        let mut have: Vec<&str> =
            answer["scopes"].as_array().expect("scopes").iter().filter_map(Value::as_str).collect();
        let mut wanted: Vec<&str> = scopes.split(' ').collect();
        have.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(have, wanted, "{role}");
        let key = Key::from_answer(&answer);
        let claims = keygate_e2e::forge::Parts::of(&key.token);
        let life = claims.claim("exp").as_u64().expect("exp") - claims.claim("iat").as_u64().expect("iat");
        assert_eq!(life, days * 86_400, "{role}");
        assert_eq!(claims.claim("sub"), key.id.as_str());
        assert_eq!(claims.claim("jti"), key.jti.as_str());
        assert!(claims.header.contains("apikey+jwt"));
        assert!(answer["expires_at"].as_str().is_some_and(|time| time.ends_with('Z')), "{answer:?}");
        assert!(answer["refresh_after"].is_string());
    }
    let key = api.issue_with(&json!({
        "name": "n", "role": "contributor", "scopes": ["dataset:read"], "owner": "o",
        "metadata": { "team": "a" }, "expires_in": "1h",
    }));
    assert_eq!(key.answer["scopes"], json!(["dataset:read"]));
    assert_eq!(key.answer["metadata"], json!({ "team": "a" }));
}

#[test]
fn what_may_not_be_issued_is_not() {
    let stack = control_plane();
    let api = stack.api();
    for (what, body) in [
        ("no name", json!({ "role": "basic" })),
        ("no role", json!({ "name": "n" })),
        ("an unknown role", json!({ "name": "n", "role": "emperor" })),
        ("a scope beyond the role", json!({ "name": "n", "role": "basic", "scopes": ["dataset:read"] })),
        ("a life beyond the role's", json!({ "name": "n", "role": "basic", "expires_in": "8d" })),
        ("no life", json!({ "name": "n", "role": "basic", "expires_in": "0s" })),
        ("a life that is none", json!({ "name": "n", "role": "basic", "expires_in": "soon" })),
        ("a negative life", json!({ "name": "n", "role": "basic", "expires_in": "-1h" })),
        ("an unknown member", json!({ "name": "n", "role": "basic", "colour": "red" })),
        ("an empty name", json!({ "name": "", "role": "basic" })),
        ("a name without end", json!({ "name": "n".repeat(100_000), "role": "basic" })),
        ("an array", json!([])),
    ] {
        let answer = api.post("/api/auth/register", &body);
        assert!((400..500).contains(&answer.status), "{what}: {} {}", answer.status, answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{what}");
        assert!(answer.json()["code"].is_string(), "{what}");
    }
    // A role may create what the table says: its own kind at most basic.
    let basic = api.with_key(&api.issue("basic").token);
    let contributor = api.with_key(&api.issue("contributor").token);
    for caller in [&basic, &contributor] {
        caller.issue("basic");
        for role in ["contributor", "node_operator", "admin"] {
            let answer = caller.post("/api/auth/register", &json!({ "name": "n", "role": role }));
            answer.expect(403);
        }
    }
    api.issue("admin");
    // And nobody without a key creates anything.
    api.call(&Request::post("/api/auth/register", &json!({ "name": "n", "role": "basic" })))
        .expect_problem(401, "missing_credential");
}

#[test]
fn the_same_idempotency_key_issues_once() {
    let stack = control_plane();
    let api = stack.api();
    let body = json!({ "name": "once", "role": "basic" });
    let request = |key: &str| Request::post("/api/auth/register", &body).header("idempotency-key", key);
    let first = api.send(request("a")).expect(201).json();
    let again = api.send(request("a")).expect(201).json();
    assert_eq!(first, again);
    let other = api.send(request("b")).expect(201).json();
    assert_ne!(first["key_id"], other["key_id"]);
    // The same key for another request is a mistake.
    let changed = Request::post("/api/auth/register", &json!({ "name": "x", "role": "basic" }));
    let answer = api.send(changed.header("idempotency-key", "a"));
    assert!(matches!(answer.status, 409 | 422), "{} {}", answer.status, answer.text());
    let count = api.get("/api/admin/keys?role=basic").expect(200).json();
    assert_eq!(count["keys"].as_array().expect("keys").len(), 2, "{count}");
}

#[test]
fn keys_are_listed_and_shown_without_their_secret() {
    let stack = control_plane();
    let api = stack.api();
    let mine = api.issue_with(&json!({ "name": "m", "role": "basic", "owner": "me" }));
    let yours = api.issue_with(&json!({ "name": "y", "role": "contributor", "owner": "you" }));
    api.post(&format!("/api/admin/keys/{}/revoke", yours.id), &json!({ "reason": "user_request" }))
        .expect(200);

    let ids = |query: &str| -> Vec<String> {
        let answer = api.get(&format!("/api/admin/keys{query}")).expect(200).json();
        let keys = answer["keys"].as_array().unwrap_or_else(|| panic!("no keys in {answer}"));
        keys.iter().map(|key| key["key_id"].as_str().expect("an id").to_owned()).collect()
    };
    assert!(ids("").contains(&mine.id) && ids("").contains(&yours.id));
    assert_eq!(ids("?owner=me"), [mine.id.as_str()]);
    assert_eq!(ids("?role=contributor"), [yours.id.as_str()]);
    assert_eq!(ids("?state=revoked"), [yours.id.as_str()]);
    assert!(!ids("?state=active").contains(&yours.id));

    let shown = api.get(&format!("/api/admin/keys/{}", yours.id)).expect(200).json();
    assert_eq!(shown["state"], "revoked");
    assert_eq!(shown["owner"], "you");
    api.get("/api/admin/keys/no-such-key").expect_problem(404, "not_found");
    api.post("/api/admin/keys/no-such-key/revoke", &json!({ "reason": "compromised" })).expect(404);
    let bad = api.post(&format!("/api/admin/keys/{}/revoke", mine.id), &json!({ "reason": "because" }));
    assert!(matches!(bad.status, 400 | 422), "{} {}", bad.status, bad.text());

    // Page by page, every key once.
    for _ in 0..5 {
        api.issue("basic");
    }
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("/api/admin/keys?limit=2{cursor}")).expect(200).json();
        let keys = page["keys"].as_array().expect("keys");
        assert!(keys.len() <= 2);
        seen.extend(keys.iter().map(|key| key["key_id"].as_str().expect("an id").to_owned()));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
        assert!(seen.len() < 100, "no end of pages");
    }
    let mut unique = seen.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), seen.len());
    assert_eq!(seen.len(), ids("?limit=100").len());
}

#[test]
fn admin_calls_need_their_scope() {
    let stack = control_plane();
    let api = stack.api();
    let basic = api.with_key(&api.issue("basic").token);
    let reader = api
        .with_key(&api.issue_with(&json!({ "name": "r", "role": "admin", "scopes": ["admin:read"] })).token);
    let id = api.issue("basic").id;
    let revoke = format!("/api/admin/keys/{id}/revoke");
    let reason = json!({ "reason": "admin_action" });
    for path in ["/api/admin/keys", "/api/admin/fleet", "/api/admin/policy", "/api/admin/secrets/status"] {
        basic.get(path).expect_problem(403, "insufficient_scope");
        reader.get(path).expect(200);
        api.call(&Request::get(path)).expect_problem(401, "missing_credential");
        api.with_key("a.b.c").get(path).expect_problem(401, "invalid_token");
    }
    basic.post(&revoke, &reason).expect_problem(403, "insufficient_scope");
    reader.post(&revoke, &reason).expect_problem(403, "insufficient_scope");
    api.post(&revoke, &reason).expect(200);
}

#[test]
fn a_key_is_renewed_only_near_its_end() {
    let stack = control_plane();
    let api = stack.api();
    let young = api.issue("basic");
    let refresh = |key: &Key| api.call(&Request::post("/api/auth/refresh", &json!({})).bearer(&key.token));
    refresh(&young).expect_problem(400, "too_early");

    let old = api.issue_with(&json!({
        "name": "o", "role": "contributor", "scopes": ["dataset:read"], "owner": "me", "expires_in": "1h",
        "metadata": { "a": 1 },
    }));
    let answer = refresh(&old);
    assert!(matches!(answer.status, 200 | 201), "{}", answer.text());
    let new = Key::from_answer(&answer.json());
    assert_ne!(new.id, "");
    assert_ne!(new.jti, old.jti);
    assert_eq!(new.answer["scopes"], json!(["dataset:read"]));
    assert_eq!(new.answer["role"], "contributor");
    assert_eq!(new.answer["metadata"], json!({ "a": 1 }));
    let validate = |key: &Key| api.call(&Request::get("/api/auth/validate").bearer(&key.token)).status;
    assert_eq!((validate(&old), validate(&new)), (401, 200));
    refresh(&old).expect(401);

    // Whoever did not get the answer asks again, with the key that the renewal has ended.
    let once = |key: &Key, name: &str| {
        let request = Request::post("/api/auth/refresh", &json!({})).bearer(&key.token);
        api.call(&request.header("idempotency-key", name))
    };
    let first = once(&new, "n-1").expect(200).json();
    let again = once(&new, "n-1").expect(200).json();
    assert_eq!(first["api_key"], again["api_key"]);
    once(&new, "n-2").expect_problem(401, "invalid_token");
    let newest = Key::from_answer(&first);
    api.post(&format!("/api/admin/keys/{}/revoke", newest.id), &json!({})).expect(200);
    once(&newest, "n-1").expect_problem(401, "invalid_token");
}

#[test]
fn a_restart_does_not_forget_a_proxy_that_is_cut_off() {
    let mut stack = Stack::builder().config("[fleet]\nmax_staleness = \"8s\"\n").start();
    let acknowledged = |stack: &Stack| stack.api().fleet().iter().any(|proxy| proxy["current"] == true);
    wait_until(Duration::from_secs(10), "the proxy acknowledges", || acknowledged(&stack));
    stack.control_plane.kill();
    stack.envoy.kill();
    stack.control_plane.start();
    // It may be cut off and serve keys for the rest of its hard age.
    let api = stack.api();
    let (first, second) = (api.issue("basic"), api.issue("basic"));
    let revoke = |key: &Key, timeout: &str| {
        let path = format!("/api/admin/keys/{}/revoke?wait=applied&timeout={timeout}", key.id);
        api.post(&path, &json!({})).expect(200).json()["propagation"].clone()
    };
    let early = revoke(&first, "100ms");
    assert_eq!((&early["total"], &early["missing"]), (&json!(1), &json!(["envoy-1"])), "{early}");
    let late = revoke(&second, "20s");
    assert_eq!((&late["applied"], &late["missing"]), (&json!(1), &json!([])), "{late}");
}

#[test]
fn the_policy_is_changed_by_who_knows_it_and_at_once() {
    let stack = Stack::start();
    let api = stack.api();
    let answer = api.get("/api/admin/policy").expect(200);
    let tag = answer.header("etag").expect("an ETag").to_owned();
    let mut policy = answer.json();
    assert_eq!(policy["mode"], "enforce");

    let put = |policy: &Value, tag: Option<&str>| {
        let request = Request::new("PUT", "/api/admin/policy?wait=applied&timeout=10s").json(policy);
        api.send(match tag {
            Some(tag) => request.header("if-match", tag),
            None => request,
        })
    };
    stack.call(&Request::get("/new")).expect_problem(403, "no_route");
    let routes = policy["routes"].as_array_mut().expect("routes");
    routes.push(json!({ "name": "new", "path": "/new", "access": "public" }));
    put(&policy, Some("\"somebody-elses\"")).expect(412);
    stack.call(&Request::get("/new")).expect_problem(403, "no_route");
    put(&policy, Some(&tag)).expect(200);
    stack.call(&Request::get("/new")).expect(200);
    put(&policy, Some(&tag)).expect(412);
    put(&json!({}), None).expect(200);

    let tag = api.get("/api/admin/policy").expect(200).header("etag").expect("an ETag").to_owned();
    for bad in [
        json!({ "mode": "maybe" }),
        json!({ "routes": [{ "name": "a", "path": "no-slash", "access": "public" }] }),
        json!({ "routes": [{ "name": "a", "path": "/", "access": "sometimes" }] }),
        json!({ "routes": "all" }),
        json!({ "routes": [{ "name": "a", "path": "/", "access": "key", "forward": ["name"] }] }),
        json!({ "unknown": 1 }),
    ] {
        let answer = put(&bad, Some(&tag));
        assert!(matches!(answer.status, 400 | 422), "{bad}: {} {}", answer.status, answer.text());
    }
    let few = json!({ "name": "few", "path": "/few", "access": "key", "forward": ["key_id"] });
    put(&json!({ "routes": [few] }), Some(&tag)).expect(200);
    let key = api.issue("basic");
    let forged = Request::get("/few").bearer(&key.token).header("x-keygate-role", "admin");
    let told = stack.call(&forged).expect(200).json()["headers"].clone();
    assert_eq!((&told["x-keygate-version"], &told["x-keygate-key-id"]), (&json!("v2"), &json!(key.id)));
    for header in ["x-keygate-role", "x-keygate-scopes", "x-keygate-owner"] {
        assert_eq!(told[header], Value::Null, "{header}");
    }
    put(&policy, None).expect(200);
    let tag = api.get("/api/admin/policy").expect(200).header("etag").expect("an ETag").to_owned();
    // Members that are not named keep their value: in shadow mode everything is decided, nothing refused.
    put(&json!({ "mode": "shadow" }), Some(&tag)).expect(200);
    stack.call(&Request::get("/api/chat").header("user-agent", "shadow")).expect(200);
    stack.call(&Request::get("/new")).expect(200);
    assert_eq!(stack.envoy.logged("shadow")["outcome"], "missing_credential");
}

#[test]
fn the_fleet_shows_each_proxy() {
    let stack = Stack::builder().workers(2).start();
    let acknowledged = || stack.api().fleet().iter().all(|proxy| proxy["current"] == true);
    wait_until(Duration::from_secs(10), "the proxy acknowledges", acknowledged);
    let fleet = stack.api().fleet();
    assert_eq!(fleet.len(), 1, "{fleet:?}");
    let text = fleet[0].to_string();
    assert!(text.contains("envoy-1"), "its identity: {text}");
    for member in ["version", "last_seen", "workers"] {
        assert!(!fleet[0][member].is_null(), "no {member} in {text}");
    }
}

#[test]
fn a_decision_is_explained_step_by_step() {
    let stack = control_plane();
    let api = stack.api();
    let key = api.issue("basic");
    let explain = |token: Option<&str>, method: &str, path: &str| {
        let body = json!({ "token": token, "method": method, "path": path });
        let answer = api.post("/api/admin/explain", &body).expect(200);
        if let Some(token) = token {
            let signature = token.rsplit('.').next().expect("a part");
            assert!(!answer.text().contains(signature));
        }
        answer.json()
    };
    let passes = explain(Some(&key.token), "GET", "/api/chat");
    assert!(passes["steps"].as_array().is_some_and(|steps| steps.len() >= 3), "{passes}");
    assert!(passes.to_string().contains("allowed"), "{passes}");
    assert!(explain(Some(&key.token), "GET", "/api/dataset").to_string().contains("missing_scope"));
    assert!(explain(None, "GET", "/api/chat").to_string().contains("missing_credential"));
    let stranger = Parts::of(&key.token).with_claim("jti", "made-up");
    let made_up = explain(Some(&stranger.token()), "GET", "/api/chat").to_string();
    assert!(made_up.contains("its id is none of ours; the signature was not looked at"), "{made_up}");
    let other = Parts { signature: vec![7; 64], ..Parts::of(&key.token) };
    let unsigned = explain(Some(&other.token()), "GET", "/api/chat").to_string();
    assert!(unsigned.contains("bad_signature") && !unsigned.contains("not looked at"), "{unsigned}");
    assert!(explain(None, "GET", "/nothing").to_string().contains("no_route"));
    api.post(&format!("/api/admin/keys/{}/revoke", key.id), &json!({ "reason": "compromised" })).expect(200);
    assert!(explain(Some(&key.token), "GET", "/api/chat").to_string().contains("revoked"));
}

#[test]
fn the_world_may_see_health_metrics_and_public_keys() {
    let stack = control_plane();
    let api = stack.api();
    api.issue("basic");
    for path in ["/health", "/livez", "/readyz"] {
        api.call(&Request::get(path)).expect(200);
    }
    let jwks = api.call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    let key = &jwks["keys"][0];
    assert_eq!((&key["kty"], &key["crv"], &key["alg"]), (&json!("EC"), &json!("P-256"), &json!("ES256")));
    assert!(key["kid"].is_string() && key["use"] == "sig");

    let metrics = api.call(&Request::get("/metrics")).expect(200).text();
    for name in [
        "api_key_created_total",
        "api_key_validated_total",
        "api_key_refreshed_total",
        "api_key_revoked_total",
        "auth_errors_total",
        "key_validation_duration_seconds",
        "active_api_keys",
        "jwt_decode_duration_seconds",
        "rate_limit_exceeded_total",
        "secret_rotation_failures",
    ] {
        assert!(metrics.contains(name), "{name} is not there from the start");
    }
    let created = metrics
        .lines()
        .find(|line| line.starts_with("api_key_created_total") && line.contains("role=\"basic\""));
    assert!(created.is_some_and(|line| line.ends_with(" 1")), "{created:?}");
}

#[test]
fn whatever_is_wrong_is_a_problem_document() {
    let stack = control_plane();
    let api = stack.api();
    let problem = |request: Request, statuses: &[u16]| {
        let shown = format!("{request:?}");
        let answer = api.send(request);
        assert!(statuses.contains(&answer.status), "{shown}: {} {}", answer.status, answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{shown}");
        let body = answer.json();
        assert!(body["code"].is_string() && body["status"] == answer.status, "{body}");
    };
    problem(Request::get("/nothing"), &[404]);
    problem(Request::get("/api/admin/nothing"), &[404]);
    problem(Request::new("DELETE", "/api/auth/register"), &[405]);
    let post = || Request::new("POST", "/api/auth/register");
    problem(post().header("content-type", "application/json").body("{"), &[400]);
    problem(post().header("content-type", "application/json").body("\u{ff}"), &[400]);
    problem(post().header("content-type", "text/plain").body("{}"), &[415, 400]);
    problem(post().header("content-type", "application/json").body("[".repeat(100_000)), &[400, 413]);
    let big = format!("{{\"name\": \"{}\"}}", "n".repeat(4 << 20));
    problem(post().header("content-type", "application/json").body(big), &[413]);
    problem(Request::get("/api/admin/keys?limit=many"), &[400, 422]);
    problem(Request::get("/api/admin/keys?state=tired"), &[400, 422]);
    problem(Request::get("/api/admin/keys/%ff"), &[400, 404]);
}

#[test]
fn the_openapi_document_names_every_call() {
    let stack = control_plane();
    let api = stack.api();
    let document = api.call(&Request::get("/openapi.json")).expect(200).json();
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")));
    for (path, method) in [
        ("/api/auth/register", "post"),
        ("/api/auth/validate", "get"),
        ("/api/auth/refresh", "post"),
        ("/api/auth/revoke", "post"),
        ("/.well-known/jwks.json", "get"),
        ("/api/admin/keys", "get"),
        ("/api/admin/keys/{id}", "get"),
        ("/api/admin/keys/{id}/revoke", "post"),
        ("/api/admin/keys/{id}/suspend", "post"),
        ("/api/admin/keys/{id}/resume", "post"),
        ("/api/admin/secrets/status", "get"),
        ("/api/admin/policy", "get"),
        ("/api/admin/policy", "put"),
        ("/api/admin/emergency/revoke", "post"),
        ("/api/admin/emergency/approvals/{id}", "post"),
        ("/api/admin/emergency/approvals/{id}", "delete"),
        ("/api/admin/fleet", "get"),
        ("/api/admin/explain", "post"),
        ("/health", "get"),
        ("/livez", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    ] {
        assert!(document["paths"][path][method].is_object(), "{method} {path} is not described");
    }
    let page = api.call(&Request::get("/docs"));
    assert!(matches!(page.status, 200 | 303 | 307 | 308), "{}", page.status);
}

#[test]
fn readiness_says_of_each_dependency_whether_it_is_well_and_why_not() {
    let mut redis = Redis::start();
    redis.cli(&["CONFIG", "SET", "appendonly", "yes"]);
    let stack = Stack::builder().workers(1).redis(&redis.url()).start();
    let api = stack.api();
    let text = || {
        let asked = Request::get("/readyz?verbose").header("accept", "text/plain");
        api.call(&asked).expect(200).text()
    };
    let well = "[+]journal ok\n[+]store ok\n[+]redis ok\n[+]rotation ok\n[+]keyring ok\n[+]proxies ok\nreadyz check passed\n";
    wait_until(SOON, "all to be well", || text() == well);
    let ready = api.call(&Request::get("/readyz?verbose").header("accept", "text/plain, application/json"));
    let ready = ready.expect(200).json();
    let checks = ready["checks"].as_array().expect("checks");
    assert!(checks.iter().all(|check| check["status"] == "ok" && check["reasons"].is_null()), "{ready}");
    // Without `verbose` it is as short as ever, whatever is accepted.
    let short = api.call(&Request::get("/readyz").header("accept", "text/plain")).expect(200).json();
    assert_eq!(short, json!({ "status": "ready", "journal": "ok", "store": "redis", "redis": "connected" }));

    redis.kill();
    wait_until(SOON, "Redis to be missed", || text().contains("\n[-]redis failed: Redis: "));
    let failed = text();
    assert!(
        failed.starts_with("[+]journal ok\n") && failed.ends_with("\nreadyz check passed, degraded\n"),
        "{failed}"
    );
    let ready = api.get("/readyz?verbose").expect(200).json();
    let check =
        ready["checks"].as_array().and_then(|checks| checks.iter().find(|one| one["name"] == "redis"));
    let check = check.expect("a check of Redis");
    assert_eq!((&check["status"], &check["reasons"]), (&json!("failed"), &ready["reasons"]), "{ready}");
}

#[test]
fn a_policy_without_routes_is_not_taken_by_mistake_and_a_change_can_be_tried() {
    let stack = Stack::builder().without_envoy().start();
    let api = stack.api();
    let put = |query: &str, body: &Value| {
        api.send(Request::new("PUT", format!("/api/admin/policy{query}")).json(body))
    };
    let before = api.get("/api/admin/policy").expect(200).json();
    let none = json!({ "mode": "enforce", "routes": [] });
    for query in ["", "?dry_run=true"] {
        let refused = put(query, &none).expect_problem(400, "bad_request").json();
        assert_eq!(refused["errors"][0]["code"], "no_routes", "{refused}");
    }
    let mut changed = before.clone();
    changed["routes"][0]["access"] = json!("key");
    let tried = put("?dry_run=true", &changed).expect(200).json();
    assert_eq!(
        (&tried["dry_run"], tried["changes"].as_array().map(Vec::len)),
        (&json!(true), Some(1)),
        "{tried}"
    );
    assert_eq!(tried["warnings"], json!([]));
    assert_eq!(api.get("/api/admin/policy").expect(200).json(), before, "nothing was changed");
    let taken = put("?allow_warnings=true", &none).expect(200).json();
    assert_eq!(taken["warnings"][0]["code"], "no_routes", "{taken}");
    put("", &changed).expect(200);
    for wrong in ["?dry_run=perhaps", "?colour=red"] {
        put(wrong, &changed).expect_problem(400, "bad_request");
    }
}
