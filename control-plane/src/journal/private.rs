//! Personal data in records: owners and metadata of keys. In their place stands a salted hash, and beside it, sealed,
//! what they were, since keys and cut-offs are made again from the journal.
//!
//! ```text
//! "change":{"type":"key_issued","key":{…,"owner":"hash:<16 bytes>","metadata":{"hash":"<16 bytes>"}}},"sealed":"…"
//! ```
//!
//! The hash is HMAC-SHA-256 (RFC 2104), cut to 16 bytes, in base64url: equal owners have equal hashes, and nobody
//! without the master key can try names out. `sealed` is XChaCha20-Poly1305 of a JSON object of the values by their
//! JSON pointer (RFC 6901), with the record's number as associated data.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::change::Change;
use crate::secret::{self, MasterKey};

const HASH_BYTES: usize = 16;

/// How personal data stands in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PersonalData {
    /// As a hash, and sealed.
    #[default]
    Sealed,
    /// As it was given.
    Plain,
}

/// Hides personal data, and finds it again.
#[derive(Clone)]
pub struct Privacy {
    how: PersonalData,
    seal: Zeroizing<[u8; 32]>,
    salt: Zeroizing<[u8; 32]>,
}

impl fmt::Debug for Privacy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Privacy({:?})", self.how)
    }
}

impl Privacy {
    /// With keys derived from the master key. What was sealed is found again either way.
    pub fn new(master: &MasterKey, how: PersonalData) -> Self {
        Self {
            how,
            seal: master.derive("keygate journal personal data"),
            salt: master.derive("keygate journal personal data hash"),
        }
    }

    /// The change as it may stand in record `seq`, and what goes beside it.
    pub fn hide(&self, seq: u64, change: &Change) -> (Change, Option<String>) {
        let places = if self.how == PersonalData::Sealed { places(change) } else { &[] };
        if places.is_empty() {
            return (change.clone(), None);
        }
        let mut value = json!(change);
        let mut hidden = BTreeMap::new();
        for place in places {
            let Some(found) = value.pointer_mut(place).filter(|found| !is_empty(found)) else { continue };
            let instead = match found {
                Value::Object(_) => json!({ "hash": self.hash(found) }),
                _ => format!("hash:{}", self.hash(found)).into(),
            };
            hidden.insert(*place, std::mem::replace(found, instead));
        }
        if hidden.is_empty() {
            return (change.clone(), None);
        }
        let plain = Zeroizing::new(serde_json::to_vec(&hidden).expect("plain data"));
        let change = serde_json::from_value(value).expect("a hash fits wherever a text or an object did");
        (change, Some(secret::seal(&self.seal, &associated(seq), &plain)))
    }

    /// The change as it was made.
    ///
    /// # Errors
    /// When what was sealed does not open, or does not fit.
    pub fn show(&self, seq: u64, change: Change, sealed: Option<&str>) -> Result<Change, String> {
        let Some(sealed) = sealed else { return Ok(change) };
        let plain = secret::open(&self.seal, &associated(seq), sealed)
            .ok_or("its personal data does not open: it has another master key, or was changed")?;
        let hidden: BTreeMap<String, Value> = serde_json::from_slice(&plain).map_err(|e| e.to_string())?;
        let mut value = json!(change);
        for (place, was) in hidden {
            *value.pointer_mut(&place).ok_or("its personal data does not fit")? = was;
        }
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    fn hash(&self, value: &Value) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&*self.salt).expect("a key of any length will do");
        match value {
            Value::String(text) => mac.update(text.as_bytes()),
            value => mac.update(value.to_string().as_bytes()),
        }
        BASE64URL.encode(mac.finalize().into_bytes().get(..HASH_BYTES).unwrap_or_default())
    }
}

/// Where personal data stands in a change.
fn places(change: &Change) -> &'static [&'static str] {
    match change {
        Change::KeyIssued { .. } => &["/key/owner", "/key/metadata"],
        Change::CutoffAdded { .. } => &["/cutoff/scope/owner"],
        Change::CutoffProposed { .. } => &["/proposal/cutoff/scope/owner"],
        _ => &[],
    }
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}

fn associated(seq: u64) -> String {
    format!("keygate journal record {seq}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::KeyRecord;

    fn privacy(master: u8, how: PersonalData) -> Privacy {
        Privacy::new(&MasterKey::of([master; 32]), how)
    }

    fn issued(owner: Option<&str>, metadata: Value) -> Change {
        let Value::Object(metadata) = metadata else { panic!("an object") };
        let key = KeyRecord {
            key_id: "key_1".into(),
            jti: "j".into(),
            kid: "k".into(),
            name: "n".into(),
            role: "basic".into(),
            scopes: Vec::new(),
            owner: owner.map(Into::into),
            metadata,
            issued_at: 1,
            expires_at: 2,
            renews: None,
            revoked: None,
            suspended: None,
        };
        Change::KeyIssued { key: Box::new(key), idempotency: None }
    }

    #[test]
    fn what_is_hidden_is_found_again_and_shows_only_that_two_are_equal() {
        let privacy = privacy(7, PersonalData::Sealed);
        let change = issued(Some("ann@example.org"), json!({ "mail": "ann@example.org", "n": [1] }));
        let (hidden, sealed) = privacy.hide(5, &change);
        let text = format!("{} {sealed:?}", json!(hidden));
        assert!(!text.contains("ann") && !text.contains("mail") && text.contains("hash:"), "{text}");
        assert_eq!(privacy.show(5, hidden.clone(), sealed.as_deref()), Ok(change));
        let owner = |change: &Change| json!(change)["key"]["owner"].clone();
        assert_eq!(owner(&privacy.hide(6, &issued(Some("ann@example.org"), json!({}))).0), owner(&hidden));
        assert_ne!(owner(&privacy.hide(6, &issued(Some("bob@example.org"), json!({}))).0), owner(&hidden));
    }

    #[test]
    fn it_opens_in_its_record_and_with_its_master_key_only() {
        let (hidden, sealed) = privacy(7, PersonalData::Sealed).hide(5, &issued(Some("a"), json!({})));
        assert!(privacy(7, PersonalData::Plain).show(5, hidden.clone(), sealed.as_deref()).is_ok());
        assert!(privacy(7, PersonalData::Sealed).show(6, hidden.clone(), sealed.as_deref()).is_err());
        assert!(privacy(8, PersonalData::Sealed).show(5, hidden, sealed.as_deref()).is_err());
    }

    #[test]
    fn what_has_none_or_shall_be_plain_stands_as_it_is() {
        let bare = issued(None, json!({}));
        assert_eq!(privacy(7, PersonalData::Sealed).hide(5, &bare), (bare, None));
        let change = issued(Some("a"), json!({ "b": 1 }));
        assert_eq!(privacy(7, PersonalData::Plain).hide(5, &change), (change.clone(), None));
        // Records from before.
        assert_eq!(privacy(7, PersonalData::Sealed).show(5, change.clone(), None), Ok(change));
    }
}
