//! Signing secrets are rotated under way: whoever holds a good key never notices, whoever holds one of an ended secret
//! is refused everywhere, and whatever is killed or cut off meanwhile, exactly one secret signs.

mod algorithms;
mod begun;
mod gate;
mod immediate;
mod killed;
mod overlap;
mod peers;
mod under_load;

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::envoy::Envoy;
use keygate_e2e::forge::Parts;
use keygate_e2e::{Api, Connection, Key, Request, SOON, wait_for, wait_until};
use serde_json::{Value, json};

const ROTATE: &str = "/api/admin/secrets/rotate";
const FORCE: &str = "/api/admin/secrets/rotate/force";

fn chat(key: &Key) -> Request {
    Request::get("/api/chat").bearer(&key.token)
}

fn status(api: &Api) -> Value {
    api.get("/api/admin/secrets/status").expect(200).json()
}

/// The secret that signs.
fn active(api: &Api) -> String {
    text(&status(api)["active"]["version_id"])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// The secret that a key was signed with.
#[track_caller]
fn kid_of(key: &Key) -> String {
    let header: Value = serde_json::from_str(&Parts::of(&key.token).header).expect("JSON");
    text(&header["kid"])
}

/// The stage of a secret.
#[track_caller]
fn stage(api: &Api, kid: &str) -> String {
    let status = status(api);
    let versions = status["versions"].as_array().expect("versions");
    let found = versions.iter().find(|version| version["version_id"] == kid);
    text(&found.unwrap_or_else(|| panic!("no {kid} in {status}"))["state"])
}

/// The secrets at a stage, the newest first.
fn at_stage(status: &Value, stage: &str) -> Vec<String> {
    let versions = status["versions"].as_array().unwrap_or_else(|| panic!("no versions in {status}"));
    let at = versions.iter().filter(|version| version["state"] == stage);
    at.map(|version| text(&version["version_id"])).collect()
}

/// Panics unless one secret signs, and says which.
#[track_caller]
fn the_one_active(status: &Value) -> String {
    let active = at_stage(status, "active");
    assert_eq!(active, [text(&status["active"]["version_id"])], "{status}");
    active[0].clone()
}

/// Begins a rotation as soon as one may be begun; the whole answer.
#[track_caller]
fn begin(api: &Api, body: &Value) -> Value {
    begin_at(api, ROTATE, body)
}

#[track_caller]
fn begin_at(api: &Api, path: &str, body: &Value) -> Value {
    wait_for(SOON, "the rotation before to be over", || {
        let answer = api.post(path, body);
        if answer.status == 409 {
            answer.expect_problem(409, "rotation_in_progress");
            return None;
        }
        Some(answer.expect(202).json())
    })
}

/// Rotates, and waits until the new secret signs; its id.
#[track_caller]
fn rotated(api: &Api) -> String {
    rotated_with(api, &json!({}))
}

#[track_caller]
pub fn rotated_with(api: &Api, body: &Value) -> String {
    let kid = text(&begin(api, body)["version_id"]);
    wait_until(SOON, "the new secret to sign", || active(api) == kid && status(api)["rotation"].is_null());
    kid
}

#[track_caller]
fn assert_all_answer(workers: &mut [Connection], key: &Key, status: u16) {
    for (worker, connection) in workers.iter_mut().enumerate() {
        let answer = connection.send(&chat(key));
        let kid = kid_of(key);
        assert_eq!(answer.status, status, "worker {worker}, a key of {kid}: {}", answer.text());
    }
}

/// Connections to all workers of these proxies.
fn all_workers(envoys: &[&Envoy]) -> Vec<Connection> {
    envoys.iter().flat_map(|envoy| envoy.connect_to_all_workers()).collect()
}

/// The secrets whose data keys are in the keyring, sorted.
#[track_caller]
fn with_data_keys(control_plane: &ControlPlane) -> Vec<String> {
    let text = std::fs::read_to_string(control_plane.data().join("keyring.json")).expect("a keyring");
    let keyring: Value = serde_json::from_str(&text).expect("JSON");
    let keys = keyring["keys"].as_object().unwrap_or_else(|| panic!("no keys in {keyring}"));
    assert!(keys.contains_key("root"), "{keyring}");
    let ids = keys.keys().filter(|id| *id != "root");
    let mut kids: Vec<String> =
        ids.map(|id| id.rsplit_once('.').unwrap_or_else(|| panic!("whose is {id}?")).0.to_owned()).collect();
    kids.sort();
    kids
}

/// The secrets that have a data key, sorted: all that have not expired, whether it opens the secret or only says that the
/// record is the latest.
fn need_data_keys(status: &Value) -> Vec<String> {
    let versions = status["versions"].as_array().unwrap_or_else(|| panic!("no versions in {status}"));
    let lives = versions.iter().filter(|version| version["state"] != "expired");
    let mut kids: Vec<String> = lives.map(|version| text(&version["version_id"])).collect();
    kids.sort();
    kids
}

/// Waits until the keyring has exactly the data keys that are needed.
#[track_caller]
fn wait_tidy(control_plane: &ControlPlane, api: &Api) {
    let mut last = None;
    let tidy = keygate_e2e::wait::try_wait_for(SOON, || {
        let both = (with_data_keys(control_plane), need_data_keys(&status(api)));
        let tidy = both.0 == both.1;
        last = Some(both);
        tidy.then_some(())
    });
    assert!(tidy.is_some(), "in the keyring, and needed: {last:?}");
}
