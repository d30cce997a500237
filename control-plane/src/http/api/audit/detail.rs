//! The change of a record of the journal: the values, and those before. Neither secrets nor metadata of keys are shown,
//! and owners by their hashes, as the journal has them.

use keygate_core::decide::cutoff::Lockdown;
use serde_json::{Value, json};

use crate::http::api::emergency::scope_view;
use crate::model::change::Change;
use crate::platform::clock;
use crate::secrets::record::SecretRecord;

/// The change in terms of the API; `null` where the action and the target say all.
pub fn detail(change: &Change) -> Value {
    match change {
        Change::Genesis { source } | Change::HistoryForked { source } => json!({ "source": hex(*source) }),
        Change::StateReturned { source, seq, .. } => json!({ "source": hex(*source), "seq": seq }),
        Change::FingerprintsEnded { revoked, suspended, expires_at, .. } => json!({
            "revoked": revoked.0.len(),
            "suspended": suspended.0.len(),
            "expires_at": clock::rfc3339(*expires_at),
        }),
        Change::SettingsChanged { settings } => json!(settings),
        Change::SecretCreated { secret, .. } => of_secret(secret, None),
        Change::SecretMoved { secret, justification } => of_secret(secret, justification.as_deref()),
        Change::SecretAnnounced { kid, justification } => {
            json!({ "version_id": kid, "justification": justification })
        }
        Change::KeyIssued { key, .. } => json!({
            "name": key.name,
            "role": key.role,
            "scopes": key.scopes,
            "expires_at": clock::rfc3339(key.expires_at),
            "renews": key.renews,
            "registered_by": key.registered_by,
        }),
        Change::KeyRevoked { jti, role, expires_at, .. } => {
            json!({ "jti": jti, "role": role, "expires_at": clock::rfc3339(*expires_at) })
        }
        Change::JtiRevoked { expires_at, .. } => json!({ "expires_at": clock::rfc3339(*expires_at) }),
        Change::KeySuspended { jti, .. } | Change::KeyResumed { jti, .. } => json!({ "jti": jti }),
        Change::ExpiredForgotten { until } => json!({ "until": clock::rfc3339(*until) }),
        Change::EditRefused { key, problem } => json!({ "redis_key": key, "problem": problem }),
        Change::PeerChanged { max_life_s } => json!({ "max_life_s": max_life_s }),
        Change::CutoffAdded { cutoff, reason, approved_by, break_glass } => {
            let mut detail = scope_view(cutoff);
            detail["reason"] = json!(reason);
            detail["approved_by"] = json!(approved_by);
            detail["break_glass"] = json!(break_glass);
            detail
        }
        Change::CutoffProposed { proposal } => {
            let mut detail = scope_view(&proposal.cutoff);
            detail["reason"] = json!(proposal.reason);
            detail["requested_by"] = json!(proposal.requested_by);
            detail["keys"] = json!(proposal.count.keys());
            detail["by_role"] = json!(proposal.count.by_role);
            detail
        }
        Change::LockdownChanged { lockdown } => of_lockdown(lockdown.as_ref()),
        Change::CanaryTestPut { test } => json!(test),
        Change::PolicyReplaced { policy } => json!(policy),
        Change::LimitsChanged { limits } => json!(limits),
        Change::LimitsOverridden { emergency } => match emergency {
            Some(emergency) => {
                json!({ "active": true, "limits": emergency.roles, "until": clock::rfc3339(emergency.until) })
            }
            None => json!({ "active": false }),
        },
        Change::QuotaOwnerChanged { keeper } => json!({ "keeper": hex(*keeper) }),
        Change::RolloutChanged { flags } => json!(flags),
        Change::SecretsOpened {}
        | Change::RevocationsRebuilt {}
        | Change::CanaryTestDeleted { .. }
        | Change::CutoffWithdrawn { .. }
        | Change::CutoffLifted { .. } => Value::Null,
    }
}

fn hex(source: u64) -> String {
    format!("{source:x}")
}

fn of_secret(secret: &SecretRecord, justification: Option<&str>) -> Value {
    json!({
        "version_id": secret.kid,
        "state": secret.state,
        "alg": secret.alg,
        "reason": secret.why,
        "justification": justification,
    })
}

fn of_lockdown(lockdown: Option<&Lockdown>) -> Value {
    match lockdown {
        Some(lockdown) => json!({
            "active": true,
            "until": clock::rfc3339(lockdown.until),
            "exempt_roles": lockdown.exempt_roles,
        }),
        None => json!({ "active": false }),
    }
}

/// The differences: `[{"member", "from", "to"}]`, members of members with a dot between, items of lists that have a `name`
/// by it.
pub fn differences(before: &Value, after: &Value) -> Vec<Value> {
    let mut found = Vec::new();
    compare("", before, after, &mut found);
    found
}

fn compare(at: &str, before: &Value, after: &Value, found: &mut Vec<Value>) {
    if before == after {
        return;
    }
    match (members(before), members(after)) {
        (Some(old), Some(new)) => {
            let names = old.iter().map(|(name, _)| *name);
            let added = new.iter().map(|(name, _)| *name).filter(|name| value_of(&old, name).is_none());
            for name in names.chain(added) {
                let path = if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") };
                let (from, to) = (value_of(&old, name), value_of(&new, name));
                compare(&path, from.unwrap_or(&Value::Null), to.unwrap_or(&Value::Null), found);
            }
            // The first route that matches decides, so their order counts.
            let (from, to) = (names_of(&old), names_of(&new));
            if before.is_array() && from.len() == to.len() && from != to {
                found.push(json!({ "member": at, "from": from, "to": to }));
            }
        }
        _ => found.push(json!({ "member": at, "from": before, "to": after })),
    }
}

/// The members of an object, or the items of a list whose items have names, each once.
fn members(value: &Value) -> Option<Vec<(&str, &Value)>> {
    match value {
        Value::Object(members) => Some(members.iter().map(|(name, value)| (name.as_str(), value)).collect()),
        Value::Array(items) => {
            items.iter().map(|item| Some((item.get("name")?.as_str()?, item))).collect::<Option<Vec<_>>>()
        }
        _ => None,
    }
}

fn names_of<'v>(members: &[(&'v str, &Value)]) -> Vec<&'v str> {
    members.iter().map(|(name, _)| *name).collect()
}

fn value_of<'v>(members: &[(&str, &'v Value)], name: &str) -> Option<&'v Value> {
    members.iter().find(|(member, _)| *member == name).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_by_their_path() {
        let route = |name: &str, access: &str| json!({ "name": name, "access": access });
        for (before, after, wanted) in [
            (json!({ "a": 1 }), json!({ "a": 1 }), json!([])),
            (json!({ "a": 1 }), json!({ "a": 2 }), json!([{ "member": "a", "from": 1, "to": 2 }])),
            (json!({}), json!({ "a": 2 }), json!([{ "member": "a", "from": null, "to": 2 }])),
            (
                json!({ "a": { "b": 1, "c": 2 } }),
                json!({ "a": { "c": 2 } }),
                json!([{ "member": "a.b", "from": 1, "to": null }]),
            ),
            (json!({ "a": ["x"] }), json!({ "a": [] }), json!([{ "member": "a", "from": ["x"], "to": [] }])),
            (
                json!({ "routes": [route("one", "key")] }),
                json!({ "routes": [] }),
                json!([{ "member": "routes.one", "from": route("one", "key"), "to": null }]),
            ),
            (
                json!({ "routes": [route("one", "key"), route("two", "key")] }),
                json!({ "routes": [route("two", "public"), route("three", "key")] }),
                json!([
                    { "member": "routes.one", "from": route("one", "key"), "to": null },
                    { "member": "routes.two.access", "from": "key", "to": "public" },
                    { "member": "routes.three", "from": null, "to": route("three", "key") },
                    { "member": "routes", "from": ["one", "two"], "to": ["two", "three"] },
                ]),
            ),
        ] {
            assert_eq!(Value::Array(differences(&before, &after)), wanted, "{before} {after}");
        }
    }
}
