//! What a change means for the keys that operators read with redis-cli. They are a copy: nothing is decided by
//! them, and they can be written again at any time.

use redis::Cmd;
use serde_json::{Value, json};

use super::{names, scripts};
use crate::durability::store::PastRevocation;
use crate::model::change::Change;
use crate::model::key::KeyRecord;
use crate::platform::clock;
use crate::secrets::keyring::{Keyring, Wraps};
use crate::secrets::record::{SecretRecord, SecretState};

/// How long a revocation is told of, in seconds.
const AUDIT_S: u64 = 30 * 24 * 60 * 60;

/// Something to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// A text, until a time in Unix seconds if it has an end.
    Set {
        /// The key.
        key: String,
        /// The text.
        text: String,
        /// Its end.
        until: Option<u64>,
    },
    /// The revocation of a token.
    Revoke {
        /// The token's id.
        jti: String,
        /// How and when.
        text: String,
        /// Until when it is kept, Unix seconds.
        until: u64,
    },
    /// The same of which only this is known; what is known there stays.
    RevokeIfMissing {
        /// The token's id.
        jti: String,
        /// What is known.
        text: String,
        /// Until when it is kept, Unix seconds.
        until: u64,
    },
    /// Revocations that are not kept any more.
    Forget {
        /// The tokens' ids.
        jtis: Vec<String>,
    },
    /// Something that is not there any more.
    Delete {
        /// The key.
        key: String,
    },
    /// A hint to other control planes.
    Publish {
        /// The channel.
        channel: &'static str,
        /// What.
        payload: String,
    },
}

impl Write {
    /// The commands for it.
    pub fn commands(&self, is_cluster: bool) -> Vec<Cmd> {
        match self {
            Self::Set { key, text, until } => {
                let mut set = redis::cmd("SET");
                set.arg(key).arg(text);
                if let Some(until) = until {
                    set.arg("EXAT").arg(*until);
                }
                vec![set]
            }
            Self::Revoke { jti, text, until } if is_cluster => {
                let mut add = redis::cmd("SADD");
                add.arg(names::REVOKED_SET).arg(jti);
                let mut set = redis::cmd("SET");
                set.arg(names::revoked(jti)).arg(text).arg("EXAT").arg(*until);
                vec![add, set]
            }
            Self::Revoke { jti, text, until } => {
                let mut revoke = redis::cmd("EVAL");
                revoke.arg(scripts::REVOKE).arg(2).arg(names::revoked(jti)).arg(names::REVOKED_SET);
                revoke.arg(jti).arg(text).arg(*until);
                vec![revoke]
            }
            Self::RevokeIfMissing { jti, text, until } => {
                let mut add = redis::cmd("SADD");
                add.arg(names::REVOKED_SET).arg(jti);
                let mut set = redis::cmd("SET");
                set.arg(names::revoked(jti)).arg(text).arg("EXAT").arg(*until).arg("NX");
                vec![add, set]
            }
            Self::Forget { jtis } => {
                let mut remove = redis::cmd("SREM");
                remove.arg(names::REVOKED_SET).arg(jtis);
                vec![remove]
            }
            Self::Delete { key } => {
                let mut delete = redis::cmd("DEL");
                delete.arg(key);
                vec![delete]
            }
            Self::Publish { channel, payload } => {
                let mut publish = redis::cmd("PUBLISH");
                publish.arg(*channel).arg(payload);
                vec![publish]
            }
        }
    }
}

/// A key's record, as it stands in Redis until the key expires.
pub fn key(record: &KeyRecord, now: u64) -> Option<Write> {
    let text = json!({
        "key_id": record.key_id,
        "jti": record.jti,
        "kid": record.kid,
        "name": record.name,
        "role": record.role,
        "scopes": record.scopes,
        "owner": record.owner,
        "metadata": record.metadata,
        "state": record.state(now),
        "issued_at": clock::rfc3339(record.issued_at),
        "expires_at": clock::rfc3339(record.expires_at),
    });
    let until = Some(record.expires_at);
    (record.expires_at > now).then(|| Write::Set {
        key: names::key(&record.key_id),
        text: text.to_string(),
        until,
    })
}

/// A revocation, as it stands in Redis until the key would have expired.
pub fn revocation(past: &PastRevocation, now: u64) -> Option<Write> {
    (past.expires_at > now).then(|| Write::Revoke {
        jti: past.jti.clone(),
        text: revocation_json(past).to_string(),
        until: past.expires_at,
    })
}

fn revocation_json(past: &PastRevocation) -> Value {
    json!({
        "key_id": past.key_id,
        "jti": past.jti,
        "role": past.role,
        "reason": past.reason,
        "revoked_by": past.by,
        "revoked_at": clock::rfc3339(past.at),
        "expires_at": clock::rfc3339(past.expires_at),
    })
}

/// A secret as it stands in Redis: its state, and, as long as there is one, the sealed secret with its data key as the
/// master key wrapped it. Other control planes have the data key from here.
pub fn secret(record: &SecretRecord, keys: &Keyring, now: u64) -> Vec<Write> {
    let has_ended = record.state == SecretState::Expired;
    let version = json!({
        "version_id": record.kid,
        "state": record.state,
        "alg": record.alg.name(),
        "created_at": clock::rfc3339(record.created_at),
        "not_after": record.not_after.map(clock::rfc3339),
    });
    let until = has_ended.then(|| record.since.max(now).saturating_add(AUDIT_S));
    let version = Write::Set { key: names::secret_version(&record.kid), text: version.to_string(), until };
    let key = names::secret(&record.kid);
    let wraps = record.data_key().and_then(|id| Some((id, keys.wraps(id)?)));
    let sealed = match wraps {
        _ if has_ended => Write::Delete { key },
        Some((id, wraps)) => {
            let text = json!({ "secret": record, "data_key": { "id": id, "wraps": wraps } }).to_string();
            Write::Set { key, text, until: None }
        }
        None => Write::Set { key, text: json!({ "secret": record }).to_string(), until: None },
    };
    vec![sealed, version]
}

/// The data key of that id in what [`secret`] wrote, if it is there.
pub fn data_key(text: &str, id: &str) -> Option<Wraps> {
    let text: Value = serde_json::from_str(text).ok()?;
    let data_key = text.get("data_key").filter(|data_key| data_key["id"] == id)?;
    serde_json::from_value(data_key["wraps"].clone()).ok()
}

/// What a change means. `record` finds the key's record; the change may not be in it yet.
pub fn writes(
    change: &Change,
    now: u64,
    keys: &Keyring,
    record: impl Fn(&str) -> Option<KeyRecord>,
) -> Vec<Write> {
    let mut writes = Vec::new();
    if let Some(past) = PastRevocation::of(change) {
        writes.extend(revocation(&past, now));
        let until = past.at.saturating_add(AUDIT_S);
        if until > now {
            let id = past.key_id.as_deref().unwrap_or(&past.jti);
            let key = names::revocation_audit(id, past.at);
            writes.push(Write::Set { key, text: revocation_json(&past).to_string(), until: Some(until) });
        }
        writes.push(Write::Publish { channel: names::KEY_REVOKED, payload: past.jti });
    }
    match change {
        Change::KeyIssued { key: issued, .. } => {
            writes.extend(key(issued, now));
            writes.extend(altered(change, &record, now));
        }
        Change::SecretCreated { secret: record, .. } | Change::SecretMoved { secret: record, .. } => {
            writes.extend(secret(record, keys, now));
            writes.push(Write::Publish { channel: names::SECRET_ROTATION, payload: record.kid.clone() });
        }
        Change::LockdownChanged { .. } => {
            let payload = "changed".into();
            writes.push(Write::Publish { channel: names::EMERGENCY_REVOCATION, payload });
        }
        change => writes.extend(altered(change, &record, now)),
    }
    writes
}

/// The record of the key that a change alters, as it is then.
fn altered(change: &Change, record: &impl Fn(&str) -> Option<KeyRecord>, now: u64) -> Vec<Write> {
    let Some(mut altered) = change.facts().alters.and_then(|(key_id, _)| record(key_id)) else {
        return Vec::new();
    };
    change.alter(&mut altered);
    key(&altered, now).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::key::{Ended, RevocationReason};
    use crate::secrets::master_key::MasterKey;
    use crate::secrets::root_key::RootKey;

    fn record() -> KeyRecord {
        KeyRecord {
            key_id: "key_1".into(),
            jti: "j".into(),
            kid: "k".into(),
            name: "n".into(),
            role: "basic".into(),
            scopes: vec!["chat:read".into()],
            owner: None,
            limit_role: None,
            registered_by: None,
            metadata: serde_json::Map::new(),
            issued_at: 100,
            expires_at: 5_000,
            renews: None,
            renewed_by: None,
            revoked: None,
            suspended: None,
        }
    }

    #[test]
    fn a_revocation_is_in_all_its_places_until_the_key_would_have_expired() {
        let change = Change::KeyRevoked {
            key_id: "key_1".into(),
            jti: "j".into(),
            role: "basic".into(),
            expires_at: 5_000,
            revocation: Ended { at: 1_000, reason: RevocationReason::Compromised, by: "key_2".into() },
        };
        let keyring = Keyring::in_memory(MasterKey::of([7; 32]), RootKey::of([7; 32]));
        let keys = |now| {
            let name = |write: &Write| match write {
                Write::Set { key, until, .. } => format!("{key} {until:?}"),
                Write::Revoke { jti, until, .. } => format!("revoke {jti} {until}"),
                other => format!("{other:?}"),
            };
            writes(&change, now, &keyring, |_| Some(record())).iter().map(name).collect::<Vec<_>>()
        };
        assert_eq!(
            keys(1_000),
            [
                "revoke j 5000",
                "revocation_audit:key_1:1000 Some(2593000)",
                "Publish { channel: \"key_revoked\", payload: \"j\" }",
                "api_key:v2:key_1 Some(5000)",
            ]
        );
        assert!(!keys(5_000).iter().any(|key| key.starts_with("revoke ") || key.starts_with("api_key")));
        let state = writes(&change, 1_000, &keyring, |_| Some(record()));
        assert!(matches!(&state[3], Write::Set { text, .. } if text.contains("\"state\":\"revoked\"")));
    }

    #[test]
    fn both_places_of_a_revocation_change_together_unless_they_cannot() {
        let write = Write::Revoke { jti: "j".into(), text: "{}".into(), until: 9 };
        assert_eq!(write.commands(false).len(), 1);
        assert_eq!(write.commands(true).len(), 2);
    }
}
