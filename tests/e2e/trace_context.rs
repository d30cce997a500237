//! W3C Trace Context: a request can be followed through Envoy, the control plane and what that calls.

use std::fs;

use keygate_e2e::{Api, Receiver, Request, Response, SOON, Stack, wait_until};
use serde_json::{Value, json};

const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn parent() -> String {
    format!("00-{ID}-00f067aa0ba902b7-01")
}

/// The trace id of an answer.
#[track_caller]
fn trace_id(answer: &Response) -> String {
    let part = answer.header("traceparent").unwrap_or_else(|| panic!("none in {:?}", answer.headers));
    let parts: Vec<&str> = part.split('-').collect();
    assert_eq!(parts.iter().map(|part| part.len()).collect::<Vec<_>>(), [2, 32, 16, 2], "{part}");
    assert_ne!(parts[2], "00f067aa0ba902b7", "the caller's part is not the control plane's");
    parts[1].to_owned()
}

fn call(api: &Api, request: Request) -> Response {
    api.send(request.header("traceparent", parent()))
}

#[test]
fn envoy_and_filter_pass_it_on_as_it_came() {
    let stack = Stack::builder().workers(1).start();
    let key = stack.api().issue("basic");
    let state = "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7";
    let request = Request::get("/api/chat").bearer(&key.token).header("tracestate", state);
    let told = stack.call(&request.clone().header("traceparent", parent())).expect(200).json();
    assert_eq!(told["headers"]["traceparent"], parent(), "{told}");
    assert_eq!(told["headers"]["tracestate"], state, "{told}");
    assert_eq!(told["headers"]["x-keygate-role"], "basic", "and headers were changed: {told}");
    let told = stack.call(&request).expect(200).json();
    assert!(told["headers"]["traceparent"].is_null(), "none is made: {told}");
}

#[test]
fn the_control_plane_takes_a_valid_one_logs_it_and_passes_it_on() {
    let receiver = Receiver::start(&[]);
    let mut stack = Stack::builder()
        .workers(1)
        .config(&format!("[notify]\nwebhook_url = \"{}\"\n", receiver.url("/hook")))
        .without_control_plane()
        .without_envoy()
        .start();
    stack.control_plane.use_variable("KEYGATE_NOTIFY_WEBHOOK_SECRET", "a-secret-of-the-receiver");
    stack.control_plane.start();
    let api = stack.api();
    assert_eq!(trace_id(&call(&api, Request::get("/health"))), ID);
    for wrong in [format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)), format!("{}-", parent()), "x".into()]
    {
        let id = trace_id(&api.call(&Request::get("/health").header("traceparent", &wrong)));
        assert!(id != ID && id != "0".repeat(32), "{wrong}");
    }
    let both = Request::get("/health").header("traceparent", parent());
    assert_ne!(trace_id(&call(&api, both)), ID, "which of two?");
    assert_ne!(trace_id(&api.call(&Request::get("/health"))), trace_id(&api.call(&Request::get("/health"))));

    let scope = json!({ "scope": { "role": "basic", "created_before": "2020-01-01T00:00:00Z" } });
    call(&api, Request::post("/api/admin/emergency/revoke", &scope)).expect(200);
    wait_until(SOON, "somebody to be told", || receiver.posted().len() == 1);
    let told = &receiver.posted()[0];
    let part = told.header("traceparent").expect("a traceparent");
    assert!(part.starts_with(&format!("00-{ID}-")) && *part != parent(), "{part}");
    call(&api, Request::post("/api/admin/emergency/lockdown", &json!({ "ttl": "1m" }))).expect(200);
    let log = fs::read_to_string(stack.control_plane.log()).expect("the log");
    let line = log.lines().find(|line| line.contains("the lockdown was changed")).expect("a line");
    assert!(line.contains(ID), "{line}");
}

#[test]
fn the_canarys_calls_are_of_the_trace_of_their_run() {
    let mut stack = Stack::builder().workers(1).without_control_plane().without_envoy().start();
    let config =
        format!("[canary]\nurls = [\"http://127.0.0.1:{}\"]\ninterval = \"1h\"\n", stack.envoy.port());
    fs::write(stack.control_plane.config_file(), config).expect("the configuration");
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    let api = stack.api();
    let results = |answer: &Value| answer["results"].as_array().expect("results").clone();
    wait_until(SOON, "a run by itself", || !results(&api.get("/api/admin/canary/results").json()).is_empty());
    let first = results(&api.get("/api/admin/canary/results").json())[0]["trace_id"].clone();
    assert!(first.as_str().is_some_and(|id| id.len() == 32 && id != ID), "{first}");

    let put = |id: &str, more: Value| {
        let mut test = json!({ "id": id, "endpoint": "/api/chat", "expected_status": 200 });
        test.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        api.post("/api/admin/canary/tests", &test).expect(201);
    };
    let upstream_has = |what: &str| json!([{ "json": "/headers/traceparent", "contains": what }]);
    put("of_the_run", json!({ "assertions": upstream_has(&format!("00-{ID}-")) }));
    let own = format!("00-{}-00f067aa0ba902b7-00", "1".repeat(32));
    put("of_its_own", json!({ "headers": { "Traceparent": own }, "assertions": upstream_has(&own) }));
    let run = call(&api, Request::post("/api/admin/canary/run", &json!({}))).expect(200).json();
    assert_eq!(run["statistics"]["failed"], 0, "{run}");
    assert!(results(&run).iter().all(|result| result["trace_id"] == ID), "{run}");
}
