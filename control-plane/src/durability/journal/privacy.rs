//! Personal data in the journal: owners and metadata. The journal is kept for years and shipped to where its
//! readers are, so it does not show them; and everything is made again from it, so it has them.
//!
//! ```text
//! "owner":"hash:<h>"  "metadata":{"hash":"<h>"}  "body":"hash:<h>"     in place of what the change has
//! "owners":{"hash:<h>":…}                                              the same of limits of owners
//! "sealed":"<s>"                                                       the record's member that has it
//! ```
//!
//! `h` is the first 16 bytes of HMAC-SHA-256 (RFC 2104) of `owner`, `metadata` or `body`, a line feed and the
//! value; so one owner has one hash in all records, and nobody without the key can try names out. `s` is a nonce
//! of 24 bytes and XChaCha20-Poly1305 over [`Values`] as JSON, with spaces up to a multiple of 64 bytes; action and
//! target of the record are its associated data. Both are in base64url. The keys are derived from the master key.
//!
//! A change with hashes is still a change: whoever reads without the master key needs to know nothing of this.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use keygate_core::decide::limits::Limit;
use keygate_core::secret::Secret;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::Record;
use crate::model::change::Change;
use crate::secrets::root_key::RootKey;
use crate::secrets::seal;

/// How much of a hash is written: nobody gains from two owners with the same one, and by chance none have.
const HASH_BYTES: usize = 16;
const HASH_PREFIX: &str = "hash:";
/// The one member of metadata that are hidden.
const HASH_MEMBER: &str = "hash";
/// What is sealed is a multiple of this long, so that its length tells little.
const PADDED_TO: usize = 64;

type Metadata = serde_json::Map<String, serde_json::Value>;
type OwnerLimits = BTreeMap<String, Option<Limit>>;

/// How personal data stand in new records. Either kind is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PersonalData {
    /// As hashes, and sealed beside.
    #[default]
    Sealed,
    /// As they were given.
    Plain,
}

/// Hides personal data from the journal's readers, and has them back.
pub struct Privacy {
    hashes: Secret<[u8; 32]>,
    seals: Secret<[u8; 32]>,
    mode: PersonalData,
}

impl std::fmt::Debug for Privacy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Privacy({:?})", self.mode)
    }
}

/// What stood in a change's personal members.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Values {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    limits: Option<OwnerLimits>,
}

impl Privacy {
    /// With keys derived from this root; `mode` is for records to be written.
    pub fn new(root: &RootKey, mode: PersonalData) -> Self {
        Self {
            hashes: root.derive("keygate journal hashes of personal data"),
            seals: root.derive("keygate journal personal data"),
            mode,
        }
    }

    /// What stands for an owner who is named, or given as what stands for it.
    pub fn named(&self, owner: &str) -> String {
        if owner.starts_with(HASH_PREFIX) { owner.into() } else { self.owner(owner) }
    }

    fn owner(&self, owner: &str) -> String {
        self.text("owner", owner)
    }

    /// What stands for the owner whom a record is about, whether or not it hides it.
    pub fn owner_of(&self, record: &Record) -> Option<String> {
        let owner = record.change.facts().owner?;
        Some(if record.sealed.is_some() { owner.into() } else { self.owner(owner) })
    }

    /// Puts hashes in place of personal data, and gives these, sealed; `None` when there are none to be hidden.
    pub fn hide(&self, change: &mut Change) -> Option<String> {
        if self.mode == PersonalData::Plain {
            return None;
        }
        let mut personal = change.personal()?;
        let (owner, metadata, body) = (&mut personal.owner, &mut personal.metadata, &mut personal.body);
        let values = Values {
            owner: owner.as_mut().map(|at| replace(*at, |owner| self.owner(owner))),
            metadata: metadata.as_mut().map(|at| replace(*at, |metadata| self.metadata(metadata))),
            body: body.as_mut().map(|at| replace(*at, |body| self.text("body", body))),
            limits: personal.limits.as_mut().map(|at| replace(*at, |limits| self.limits(limits))),
        };
        let mut plain = Secret::new(serde_json::to_vec(&values).expect("plain data"));
        let padded = plain.expose().len().next_multiple_of(PADDED_TO);
        plain.expose_mut().resize(padded, b' ');
        Some(seal::seal(self.seals.expose(), &associated(change), plain.expose()))
    }

    /// Puts personal data back in place of their hashes.
    ///
    /// # Errors
    /// What is wrong with the record.
    pub fn reveal(&self, record: &mut Record) -> Result<(), String> {
        const SEAL: &str = "its personal data cannot be opened: the master key is not the one it was written with, or \
                            the record is not";
        const FIT: &str = "its hashes are not those of its personal data";
        let Some(sealed) = record.sealed.take() else { return Ok(()) };
        let plain = seal::open(self.seals.expose(), &associated(&record.change), &sealed).ok_or(SEAL)?;
        // Not the parser's own words, which could quote what was sealed.
        let values: Values =
            serde_json::from_slice(plain.expose()).map_err(|_| "its personal data are of no known form")?;
        let personal = record.change.personal().ok_or(FIT)?;
        let fits = put_back(personal.owner, values.owner, |owner| self.owner(owner))
            && put_back(personal.metadata, values.metadata, |metadata| self.metadata(metadata))
            && put_back(personal.body, values.body, |body| self.text("body", body))
            && put_back(personal.limits, values.limits, |limits| self.limits(limits));
        if fits { Ok(()) } else { Err(FIT.into()) }
    }

    fn metadata(&self, metadata: &Metadata) -> Metadata {
        let text = serde_json::to_vec(metadata).expect("plain data");
        Metadata::from_iter([(HASH_MEMBER.into(), self.hash("metadata", &text).into())])
    }

    fn limits(&self, limits: &OwnerLimits) -> OwnerLimits {
        limits.iter().map(|(owner, limit)| (self.owner(owner), *limit)).collect()
    }

    fn text(&self, what: &str, value: &str) -> String {
        format!("{HASH_PREFIX}{}", self.hash(what, value.as_bytes()))
    }

    fn hash(&self, what: &str, value: &[u8]) -> String {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(self.hashes.expose()).expect("a key of any length will do");
        for part in [what.as_bytes(), b"\n", value] {
            mac.update(part);
        }
        BASE64URL.encode(&mac.finalize().into_bytes()[..HASH_BYTES])
    }
}

fn replace<T>(at: &mut T, hidden: impl Fn(&T) -> T) -> T {
    let hidden = hidden(at);
    std::mem::replace(at, hidden)
}

/// Puts a value where its hash stands; whether that, and nothing else, stood there.
fn put_back<T: PartialEq>(at: Option<&mut T>, value: Option<T>, hidden: impl Fn(&T) -> T) -> bool {
    match (at, value) {
        (None, None) => true,
        (Some(at), Some(value)) if *at == hidden(&value) => {
            *at = value;
            true
        }
        _ => false,
    }
}

/// What a seal is bound to. Not the record's number: the change would be the same in another journal.
fn associated(change: &Change) -> String {
    let facts = change.facts();
    format!("keygate journal personal data {} {}", facts.action, facts.target.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use keygate_core::decide::cutoff::{Cutoff, Scope};
    use serde_json::json;

    use super::*;
    use crate::model::approval::{Count, Proposal};
    use crate::model::change::{Entry, Idempotency};
    use crate::model::key::{Ended, KeyRecord, RevocationReason};
    use crate::model::limits;

    fn privacy(master: u8, mode: PersonalData) -> Privacy {
        Privacy::new(&RootKey::of([master; 32]), mode)
    }

    fn issued(id: &str, owner: Option<&str>, metadata: serde_json::Value) -> Change {
        let key = KeyRecord {
            key_id: id.into(),
            jti: "j".into(),
            kid: "k".into(),
            name: "a name".into(),
            role: "basic".into(),
            scopes: Vec::new(),
            owner: owner.map(Into::into),
            limit_role: None,
            registered_by: None,
            metadata: serde_json::from_value(metadata).unwrap(),
            issued_at: 1,
            expires_at: 2,
            renews: None,
            renewed_by: None,
            revoked: None,
            suspended: None,
        };
        let idempotency = Some(Idempotency { request_id: "r".into(), body: "digest-of-all".into() });
        Change::KeyIssued { key: Box::new(key), idempotency }
    }

    fn cutoff(id: &str, owner: &str) -> Cutoff {
        let scope = Scope { owner: Some(owner.into()), ..Scope::default() };
        Cutoff { id: id.into(), scope, created_before: 1, created_after: 0, excluded_key: None }
    }

    fn added(cutoff: Cutoff) -> Change {
        let reason = RevocationReason::Emergency;
        Change::CutoffAdded { cutoff, reason, approved_by: None, break_glass: None }
    }

    fn proposed(cutoff: Cutoff) -> Change {
        let (reason, count) = (RevocationReason::Emergency, Count { by_role: BTreeMap::new(), live: 0 });
        let proposal = Proposal { cutoff, reason, requested_by: "key_1".into(), requested_at: 1, count };
        Change::CutoffProposed { proposal }
    }

    /// A record as it is written and read again.
    fn record(privacy: &Privacy, change: &Change) -> (String, Record) {
        let entry = Entry::new("key_1", 1, change.clone());
        let mut line = Vec::new();
        Record::new(1, "t", &entry, String::new(), privacy).write(&mut line);
        let record = Record::parse(line.trim_ascii_end()).unwrap();
        (String::from_utf8(line).unwrap(), record)
    }

    fn limited(owner: &str) -> Change {
        let limit = Limit { units: 5, window_s: 60 };
        let owners = BTreeMap::from([(owner.to_owned(), Some(limit)), ("other-owner".into(), None)]);
        Change::LimitsChanged { limits: Box::new(limits::Set { owners, ..limits::Set::default() }) }
    }

    fn personal() -> [Change; 6] {
        [
            issued("key_1", Some("acme-42"), json!({ "mail": "a@b.example" })),
            issued("key_1", Some("acme-42"), json!({})),
            issued("key_1", None, json!({ "mail": "a@b.example" })),
            added(cutoff("c1", "acme-42")),
            proposed(cutoff("c1", "acme-42")),
            limited("acme-42"),
        ]
    }

    #[test]
    fn what_is_personal_is_not_in_the_line_and_comes_back() {
        let privacy = privacy(1, PersonalData::Sealed);
        for change in personal() {
            let (line, mut record) = record(&privacy, &change);
            for hidden in ["acme-42", "other-owner", "mail", "a@b.example", "digest-of-all"] {
                assert!(!line.contains(hidden), "{hidden} is in {line}");
            }
            assert_eq!(record.change.facts().target, change.facts().target);
            privacy.reveal(&mut record).unwrap();
            assert_eq!((record.change, record.sealed), (change, None));
        }
    }

    #[test]
    fn what_is_not_personal_is_written_as_it_is() {
        let revocation = Ended { at: 1, reason: RevocationReason::Compromised, by: "key_1".into() };
        let unowned = Cutoff { scope: Scope::default(), ..cutoff("c1", "") };
        for change in [
            issued("key_1", None, json!({})),
            added(unowned),
            Change::LimitsChanged { limits: Box::default() },
            Change::JtiRevoked { jti: "j".into(), expires_at: 1, revocation },
        ] {
            let (line, record) = record(&privacy(1, PersonalData::Sealed), &change);
            assert_eq!(record.change, change);
            assert!(!line.contains("sealed") && !line.contains(HASH_PREFIX), "{line}");
        }
    }

    #[test]
    fn plain_lines_are_written_if_so_wished_and_read_always() {
        for change in personal() {
            let (line, mut record) = record(&privacy(1, PersonalData::Plain), &change);
            assert!(!line.contains("sealed"), "{line}");
            privacy(1, PersonalData::Sealed).reveal(&mut record).unwrap();
            assert_eq!(record.change, change);
        }
        let change = &personal()[0];
        let (_, mut sealed) = record(&privacy(1, PersonalData::Sealed), change);
        privacy(1, PersonalData::Plain).reveal(&mut sealed).unwrap();
        assert_eq!(sealed.change, *change);
    }

    #[test]
    fn one_owner_has_one_hash_under_one_master_key() {
        let (one, other) = (privacy(1, PersonalData::Sealed), privacy(2, PersonalData::Sealed));
        let plain = privacy(1, PersonalData::Plain);
        let shown = |privacy: &Privacy, change: &Change| privacy.owner_of(&record(privacy, change).1);
        let acme = Some(one.owner("acme-42"));
        for change in [&personal()[0], &personal()[1], &personal()[3], &personal()[4]] {
            assert_eq!(shown(&one, change), acme);
            assert_eq!(shown(&plain, change), acme, "also where it stands in the clear");
            assert_ne!(shown(&other, change), acme);
        }
        assert_eq!(shown(&one, &personal()[2]), None);
        assert_ne!(shown(&one, &added(cutoff("c1", "acme-43"))), acme);
        assert_ne!(one.text("body", "acme-42"), one.owner("acme-42"));
    }

    #[test]
    fn equal_values_are_sealed_differently_and_their_length_is_not_told() {
        let privacy = privacy(1, PersonalData::Sealed);
        let sealed = |owner: &str| record(&privacy, &added(cutoff("c1", owner))).1.sealed.unwrap();
        assert_ne!(sealed("acme-42"), sealed("acme-42"));
        assert_eq!(sealed("a").len(), sealed("a-much-longer-name").len());
    }

    #[test]
    fn a_seal_opens_with_its_master_key_in_its_record_and_with_its_hashes_only() {
        let privacy = privacy(1, PersonalData::Sealed);
        let refused = |change: &Change, wrong: &dyn Fn(&mut Record), problem: &str| {
            let mut record = record(&privacy, change).1;
            wrong(&mut record);
            let said = privacy.reveal(&mut record).unwrap_err();
            assert!(said.contains(problem), "{said}");
        };
        let change = &personal()[0];
        let (_, mut of_another) = record(&super::tests::privacy(2, PersonalData::Sealed), change);
        assert!(privacy.reveal(&mut of_another).unwrap_err().contains("master key"));

        let moved = record(&privacy, &issued("key_2", Some("other"), json!({}))).1;
        refused(change, &|record| record.sealed.clone_from(&moved.sealed), "cannot be opened");
        refused(change, &|record| record.sealed = Some("AAAA".into()), "cannot be opened");
        // Of the same id, but what was asked for is not what came into force.
        let asked = record(&privacy, &proposed(cutoff("c1", "acme-42"))).1;
        let in_force = added(cutoff("c1", "acme-42"));
        refused(&in_force, &|record| record.sealed.clone_from(&asked.sealed), "cannot be opened");

        let owner = |owner: Option<&str>| {
            let owner = owner.map(str::to_owned);
            move |record: &mut Record| {
                let Change::KeyIssued { key, .. } = &mut record.change else { panic!("another change") };
                key.owner.clone_from(&owner);
            }
        };
        refused(change, &owner(Some("acme-42")), "hashes");
        refused(change, &owner(Some(&privacy.owner("other"))), "hashes");
        refused(change, &owner(None), "hashes");
        refused(&personal()[2], &owner(Some(&privacy.owner("other"))), "hashes");
        let limits = |record: &mut Record| {
            let Change::LimitsChanged { limits } = &mut record.change else { panic!("another change") };
            limits.owners.values_mut().for_each(|limit| *limit = None);
        };
        refused(&personal()[5], &limits, "hashes");
    }
}
