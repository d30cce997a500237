//! Who is told, how often, and what becomes of it when nobody listens.

use std::fs;

use hmac::{Hmac, KeyInit as _, Mac as _};
use keygate_e2e::metrics::Metrics;
use keygate_e2e::{Posted, Receiver, SOON, Stack, wait_until};
use serde_json::{Value, json};
use sha2::Sha256;

const SECRET: &str = "a-secret-of-the-receiver";
const ROUTING_KEY: &str = "R0123456789ABCDEF";
const SLACK_PATH: &str = "/services/T000/B000/a-token-of-slack";

fn config(receiver: &Receiver) -> String {
    format!(
        "[notify]\nsource = \"cp-1\"\nwebhook_url = \"{}\"\npagerduty_url = \"{}\"\n[secrets]\npropagation_timeout = \"1s\"\n",
        receiver.url("/hook"),
        receiver.url("/v2/enqueue")
    )
}

fn start(receiver: &Receiver) -> Stack {
    let mut stack =
        Stack::builder().workers(1).config(&config(receiver)).without_control_plane().without_envoy().start();
    stack.control_plane.use_variable("KEYGATE_NOTIFY_WEBHOOK_SECRET", SECRET);
    stack.control_plane.use_variable("KEYGATE_NOTIFY_PAGERDUTY_KEY", ROUTING_KEY);
    stack.control_plane.use_variable("KEYGATE_NOTIFY_SLACK_URL", &receiver.url(SLACK_PATH));
    stack.control_plane.start();
    stack.start_envoy();
    stack.envoy.wait_ready();
    stack
}

fn at<'p>(posted: &'p [Posted], path: &str) -> Vec<&'p Posted> {
    posted.iter().filter(|one| one.path == path).collect()
}

fn is_signed(one: &Posted) -> bool {
    let signature = one.header("keygate-signature").expect("a signature");
    let (time, value) =
        signature.strip_prefix("t=").and_then(|rest| rest.split_once(",v1=")).expect("its form");
    let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("a key");
    mac.update(format!("{time}.").as_bytes());
    mac.update(&one.body);
    let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    hex == value
}

#[test]
fn a_rotation_that_does_not_go_on_is_told_of_once_and_so_is_its_end() {
    let receiver = Receiver::start(&[]);
    let stack = start(&receiver);
    let api = stack.api();
    let (_other, mut line) = stack.another_envoy_on_a_line("envoy-<2>", 1);
    line.cut();
    api.post("/api/admin/secrets/rotate", &json!({})).expect(202);
    wait_until(SOON, "all three to be told", || receiver.posted().len() >= 3);
    line.heal();
    wait_until(SOON, "all three to be told that it is over", || receiver.posted().len() >= 6);

    let posted = receiver.posted();
    let hook: Vec<Value> = at(&posted, "/hook").into_iter().map(Posted::json).collect();
    assert!(at(&posted, "/hook").into_iter().all(is_signed));
    let statuses: Vec<_> = hook.iter().map(|one| (&one["kind"], &one["status"], &one["source"])).collect();
    let (kind, source) = (json!("rotation_failed"), json!("cp-1"));
    assert_eq!(statuses, [(&kind, &json!("firing"), &source), (&kind, &json!("resolved"), &source)]);
    assert!(hook[0]["details"]["because"].as_str().expect("a text").contains("envoy-<2>"), "{}", hook[0]);

    let pagerduty: Vec<Value> = at(&posted, "/v2/enqueue").into_iter().map(Posted::json).collect();
    let events: Vec<_> = pagerduty.iter().map(|one| (&one["event_action"], &one["dedup_key"])).collect();
    let key = &pagerduty[0]["dedup_key"];
    assert_eq!(events, [(&json!("trigger"), key), (&json!("resolve"), key)], "one incident");
    assert_eq!(
        (&pagerduty[0]["routing_key"], &pagerduty[0]["payload"]["severity"]),
        (&json!(ROUTING_KEY), &json!("critical"))
    );

    let slack: Vec<Value> = at(&posted, SLACK_PATH).into_iter().map(Posted::json).collect();
    assert_eq!(slack.len(), 2);
    let text = slack[0]["text"].as_str().expect("a text");
    assert!(text.contains("envoy-&lt;2&gt;") && !text.contains("envoy-<2>"), "{text}");

    let metrics = Metrics::of(&api);
    for destination in ["slack", "pagerduty", "webhook"] {
        let name = format!("keygate_notifications_total{{destination=\"{destination}\",outcome=\"sent\"}}");
        assert_eq!(metrics.value(&name), 2.0, "{destination}");
    }
    // What lets others tell in our name is told to nobody else.
    let log = fs::read_to_string(stack.control_plane.log()).expect("the log");
    for secret in [SECRET, ROUTING_KEY, "a-token-of-slack"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[test]
fn a_destination_that_fails_is_tried_again_and_one_that_refuses_is_not() {
    // Three destinations post at once; whichever is answered 503 tries again, and the one that is answered 404 does not.
    let receiver = Receiver::start(&[503, 404, 503]);
    let stack = start(&receiver);
    let api = stack.api();
    api.post("/api/admin/secrets/rotate", &json!({ "immediate": true })).expect(202);
    let of = |outcome: &str| -> f64 {
        let metrics = Metrics::of(&api);
        let value = |to: &str| {
            metrics
                .value(&format!("keygate_notifications_total{{destination=\"{to}\",outcome=\"{outcome}\"}}"))
        };
        ["slack", "pagerduty", "webhook"].into_iter().map(value).sum()
    };
    wait_until(SOON, "two to be told", || (of("sent"), of("failed")) == (2.0, 1.0));
    assert_eq!(receiver.posted().len(), 5);
    // A mass revocation is told with who and how many.
    let told = receiver.posted().into_iter().filter(|one| one.path == "/hook").map(|one| one.json());
    for one in told {
        assert_eq!((&one["kind"], &one["status"]), (&json!("mass_revocation"), &json!("firing")), "{one}");
    }
}

#[test]
fn who_does_not_listen_holds_nothing_up() {
    // Nobody listens there any more.
    let gone = Receiver::start(&[]);
    let url = gone.url("/hook");
    drop(gone);
    let mut stack = Stack::builder()
        .workers(1)
        .config(&format!("[notify]\nwebhook_url = \"{url}\"\n"))
        .without_control_plane()
        .without_envoy()
        .start();
    stack.control_plane.use_variable("KEYGATE_NOTIFY_WEBHOOK_SECRET", SECRET);
    stack.control_plane.start();
    let api = stack.api();
    // More than may wait: the rest is dropped, and each call is answered all the same.
    for _ in 0..70 {
        let scope = json!({ "scope": { "role": "basic", "created_before": "2020-01-01T00:00:00Z" } });
        let answer = api.post("/api/admin/emergency/revoke", &scope).expect(200).json();
        let id = answer["cutoff"]["id"].as_str().expect("an id").to_owned();
        let lift = keygate_e2e::Request::new("DELETE", format!("/api/admin/emergency/revoke/{id}"));
        api.send(lift).expect(200);
    }
    let dropped = "keygate_notifications_total{destination=\"webhook\",outcome=\"dropped\"}";
    assert!(Metrics::of(&api).value(dropped) >= 1.0);
    assert!(stack.control_plane.stop().success(), "and it stops at once");
}

#[test]
fn a_webhook_without_a_secret_or_with_a_bad_url_is_refused_at_the_start() {
    let mut stack = Stack::builder()
        .config("[notify]\nwebhook_url = \"http://127.0.0.1:9/\"\n")
        .without_control_plane()
        .without_envoy()
        .start();
    for (secret, says) in [(None, "needs a secret"), (Some("short"), "at least 16 characters")] {
        if let Some(secret) = secret {
            stack.control_plane.use_variable("KEYGATE_NOTIFY_WEBHOOK_SECRET", secret);
        }
        stack.control_plane.launch();
        assert!(!stack.control_plane.wait_end().success());
        assert!(stack.control_plane.log_tail().contains(says), "{}", stack.control_plane.log_tail());
    }
    stack.control_plane.use_variable("KEYGATE_NOTIFY_SLACK_URL", "no-url-but-a-token");
    stack.control_plane.launch();
    assert!(!stack.control_plane.wait_end().success());
    let log = stack.control_plane.log_tail();
    assert!(log.contains("that is no URL") && !log.contains("no-url-but-a-token"), "{log}");
}
