//! What control planes tell each other through Redis, sealed: who can write to Redis can neither read it nor make
//! it up, nor put it elsewhere. All control planes of a fleet have one root key.

use std::collections::BTreeMap;

use keygate_core::secret::Secret;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::durability::writer::Logged;
use crate::model::change::{Change, Entry};
use crate::platform::hlc::Origin;
use crate::secrets::root_key::RootKey;
use crate::secrets::seal;

/// A change as it stands in a log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shipped {
    /// When it was made, RFC 3339 UTC.
    pub at: String,
    /// Who did it.
    pub actor: String,
    /// Its stamp.
    pub stamp: u64,
    /// What it was made in knowledge of: how far the journals of others had been taken in.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub after: BTreeMap<u64, u64>,
    /// The reason that was given for it, where the change has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The change.
    pub change: Change,
}

impl Shipped {
    /// What others are told of a change.
    pub fn of(logged: &Logged, after: BTreeMap<u64, u64>) -> Self {
        let Logged { at, entry, .. } = logged;
        let at = entry.origin.as_ref().map_or(at, |origin| &origin.at).clone();
        Self {
            at,
            actor: entry.actor.clone(),
            stamp: entry.stamp,
            after,
            reason: entry.reason.clone(),
            change: entry.change.for_peers(),
        }
    }

    /// The entry that takes it in, as change `seq` of `source`.
    pub fn into_entry(self, source: u64, seq: u64) -> Entry {
        let Self { at, actor, stamp, reason, change, .. } = self;
        Entry { origin: Some(Origin { source, seq, at }), reason, ..Entry::new(actor, stamp, change) }
    }
}

/// Seals and opens it.
#[derive(Clone)]
pub struct Sealer(Secret<[u8; 32]>);

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(…)")
    }
}

impl Sealer {
    /// With a key derived from the keyring's root.
    pub fn new(root: &RootKey) -> Self {
        Self(root.derive("keygate shared log"))
    }

    /// Seals change `seq` of the log of `source`, which follows on `before`.
    pub fn seal_change(&self, source: u64, before: u64, seq: u64, change: &Shipped) -> String {
        self.seal(&place(source, before, seq), change)
    }

    /// Opens it; `None` when it was not sealed for this place.
    pub fn open_change(&self, source: u64, before: u64, seq: u64, sealed: &str) -> Option<Shipped> {
        self.open(&place(source, before, seq), sealed)
    }

    /// Seals anything for a place.
    pub fn seal(&self, place: &str, value: &impl Serialize) -> String {
        let plain = Secret::new(serde_json::to_vec(value).expect("plain data"));
        seal::seal(self.0.expose(), place, plain.expose())
    }

    /// Opens it; `None` when it was not sealed for this place.
    pub fn open<T: DeserializeOwned>(&self, place: &str, sealed: &str) -> Option<T> {
        serde_json::from_slice(seal::open(self.0.expose(), place, sealed)?.expose()).ok()
    }
}

/// The place of a report.
pub fn report_place(source: u64) -> String {
    format!("keygate report {source}")
}

fn place(source: u64, before: u64, seq: u64) -> String {
    format!("keygate log {source} {before} {seq}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_change_opens_in_its_place_only_and_shows_nothing() {
        let sealer = Sealer(Secret::new([7; 32]));
        let change = Shipped {
            at: "2026-01-01T00:00:00.000Z".into(),
            actor: "key_of_somebody".into(),
            stamp: 5,
            after: BTreeMap::from([(3, 4)]),
            reason: None,
            change: Change::KeyResumed { key_id: "key_1".into(), jti: "j".into() },
        };
        let sealed = sealer.seal_change(1, 8, 9, &change);
        assert_eq!(sealer.open_change(1, 8, 9, &sealed), Some(change));
        for (source, before, seq) in [(2, 8, 9), (1, 7, 9), (1, 8, 10)] {
            assert_eq!(sealer.open_change(source, before, seq, &sealed), None);
        }
        assert_eq!(Sealer(Secret::new([8; 32])).open_change(1, 8, 9, &sealed), None);
        assert!(!sealed.contains("somebody"));
        let mut bent = sealed.into_bytes();
        bent[40] ^= 1;
        assert_eq!(sealer.open_change(1, 8, 9, &String::from_utf8(bent).unwrap()), None);
    }
}
