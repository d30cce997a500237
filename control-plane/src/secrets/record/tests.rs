use keygate_core::token::Claims;

use super::*;
use crate::model::key::{Creator, KeyRequest};
use crate::model::roles;
use crate::platform::hlc::Mark;
use crate::secrets::master_key::MasterKey;
use crate::secrets::record::Identity;
use crate::secrets::root_key::RootKey;

const ALL: [Algorithm; 3] = [Algorithm::ES256, Algorithm::EdDSA, Algorithm::HS256];

fn keyring() -> Keyring {
    native::install();
    Keyring::in_memory(MasterKey::of([1; 32]), RootKey::of([2; 32]))
}

fn claims() -> Claims {
    let request: KeyRequest = serde_json::from_str(r#"{"name":"a","role":"basic"}"#).unwrap();
    let creator = Creator {
        key_id: None,
        role: "admin",
        limit_role: "admin",
        scopes: "chat:read chat:write",
        owner: None,
    };
    let identity = Identity { key_id: "key_1".into(), jti: "j".into() };
    request
        .record(creator, &roles::expand(roles::defaults()), identity, "k", 1_000)
        .unwrap()
        .claims("keygate", None)
}

fn make(alg: Algorithm, state: SecretState, keys: &Keyring) -> SecretRecord {
    SecretRecord::make(NewSecret { state, ..NewSecret::first(alg, None) }, keys, 1_000).unwrap()
}

fn mark(stamp: u64) -> Mark {
    Mark { stamp, source: std::cmp::Reverse(7) }
}

fn says(result: Result<impl std::fmt::Debug, SecretError>) -> String {
    result.unwrap_err().to_string()
}

/// As an attacker edits it: member by member, the MAC as it was.
fn edited(record: &SecretRecord, member: &str, value: serde_json::Value) -> SecretRecord {
    let mut json = serde_json::to_value(record).unwrap();
    json[member] = value;
    serde_json::from_value(json).unwrap()
}

#[test]
fn what_is_signed_is_read_strictly_and_verified_and_signed_the_same_again() {
    let keys = keyring();
    for alg in ALL {
        let record = make(alg, SecretState::Active, &keys);
        let opened = record.open(&keys).unwrap();
        let signer = opened.signer.unwrap();
        let token = signer.sign(&claims()).unwrap();
        assert_eq!(signer.sign(&claims()).unwrap(), token);
        let read = keygate_core::token::read(token.expose().as_bytes()).unwrap();
        assert_eq!((read.claims, read.kid, read.alg), (claims(), record.kid.clone(), alg));
        let key = alg.verification_key(opened.verification.unwrap().expose()).unwrap();
        assert!(keygate_core::token::crypto::verify(alg, &key, read.signing_input, read.signature));
    }
}

#[test]
fn a_secret_signs_and_verifies_at_its_stages_and_its_private_half_ends_with_signing() {
    let keys = keyring();
    for alg in ALL {
        let mut ring = Ring::default();
        let mut record = make(alg, SecretState::Rotating, &keys);
        let mut stages = Vec::new();
        for (n, state) in SecretState::ALL.into_iter().enumerate() {
            if state != SecretState::Rotating {
                record = record.moved(state, 2_000, &keys).unwrap();
            }
            assert!(ring.take(&record, mark(n as u64 + 1), (1, true), &keys).unwrap());
            ring.open(&keys, 1).unwrap();
            keys.keep_only(&ring.data_keys().collect()).unwrap();
            stages.push((
                ring.signer().is_ok(),
                !ring.verification_keys().is_empty(),
                ring.data_keys().count(),
            ));
        }
        assert_eq!(
            stages,
            [(false, true, 1), (true, true, 1), (false, true, 1), (false, false, 0)],
            "{alg:?}"
        );
        assert!(record.sealed.is_none());
        assert!(ring.jwks(0).is_empty());
    }
}

#[test]
fn all_that_verifies_is_published_until_its_end_and_an_hmac_secret_never() {
    let keys = keyring();
    let mut ring = Ring::default();
    let old = make(Algorithm::ES256, SecretState::Active, &keys);
    let old = old.retired(Retire::AfterOverlap, Some(5_000), 2_000, &keys).unwrap();
    let active = make(Algorithm::EdDSA, SecretState::Active, &keys);
    let next = make(Algorithm::ES256, SecretState::Rotating, &keys);
    let hmac = make(Algorithm::HS256, SecretState::Previous, &keys);
    for (n, record) in [&old, &active, &next, &hmac].into_iter().enumerate() {
        ring.take(record, mark(n as u64), (1, true), &keys).unwrap();
    }
    ring.open(&keys, 1).unwrap();
    let kids =
        |now| ring.jwks(now).iter().map(|jwk| jwk["kid"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(kids(4_999), [active.kid.clone(), old.kid.clone(), next.kid.clone()]);
    assert_eq!(kids(5_000), [active.kid.clone(), next.kid]);
    assert!(ring.jwks(0).iter().all(|jwk| jwk.get("d").is_none() && jwk.get("k").is_none()));
}

#[test]
fn a_record_that_was_edited_swapped_or_moved_is_refused() {
    let keys = keyring();
    for alg in ALL {
        let (a, b) = (make(alg, SecretState::Active, &keys), make(alg, SecretState::Active, &keys));
        let members = [
            ("kid", serde_json::json!(b.kid)),
            ("alg", serde_json::json!(if alg == Algorithm::EdDSA { "ES256" } else { "EdDSA" })),
            ("state", serde_json::json!("previous")),
            ("created_at", serde_json::json!(999)),
            ("since", serde_json::json!(0)),
            ("not_after", serde_json::json!(1)),
            ("unannounced", serde_json::json!(true)),
            ("in_hsm", serde_json::json!(true)),
            ("public", serde_json::json!("AAAA")),
            ("sealed", serde_json::to_value(&b.sealed).unwrap()),
            ("sealed", serde_json::Value::Null),
            ("mac", serde_json::to_value(&b.mac).unwrap()),
            ("mac", serde_json::Value::Null),
        ];
        for (member, value) in members {
            let record = edited(&a, member, value);
            let refusal = says(Ring::default().take(&record, mark(1), (1, true), &keys));
            assert!(refusal.contains("is not as it was written"), "{member}: {refusal}");
        }
        // Not even a keyring with the right data keys helps another root.
        let other = Keyring::in_memory(MasterKey::of([1; 32]), RootKey::of([3; 32]));
        assert!(a.check(&other).is_err());
        a.check(&keys).unwrap();
    }
}

#[test]
fn a_record_that_was_put_back_is_refused_by_what_follows_it_and_by_its_data_key() {
    let keys = keyring();
    for alg in ALL {
        let active = make(alg, SecretState::Active, &keys);
        let expired = active.moved(SecretState::Expired, 2_000, &keys).unwrap();
        let mut ring = Ring::default();
        ring.take(&active, mark(1), (1, true), &keys).unwrap();
        ring.take(&expired, mark(2), (2, true), &keys).unwrap();
        assert!(says(ring.take(&active, mark(3), (3, true), &keys)).contains("an older record was put back"));
        // Of another control plane it is late, not false.
        assert!(!ring.take(&active, mark(3), (3, false), &keys).unwrap());
        assert_eq!(ring.get(&active.kid).unwrap().record.state, SecretState::Expired);
        // A journal that ends before its end, at whatever stage.
        let previous = active.retired(Retire::WithLastKey, None, 1_500, &keys).unwrap();
        keys.keep_only(&ring.data_keys().collect()).unwrap();
        for put_back in [&active, &previous] {
            let mut ring = Ring::default();
            ring.take(put_back, mark(1), (1, true), &keys).unwrap();
            assert!(says(ring.open(&keys, 1)).contains("its data key is not in the keyring"), "{alg:?}");
        }
    }
}

#[test]
fn a_record_without_its_code_is_refused_though_its_seal_opens() {
    let keys = keyring();
    for alg in ALL {
        let record = make(alg, SecretState::Active, &keys);
        // Its data key sealed with the root, in the record itself.
        let data_key = random::bytes::<32>();
        let sealed = Sealed {
            data_key: seal(keys.root().expose(), &format!("keygate data key {}", record.kid), &data_key),
            secret: seal(&data_key, &record.associated(), record.unseal(&keys).unwrap().expose()),
        };
        let bare = serde_json::json!({
            "kid": record.kid, "alg": alg, "state": "active", "created_at": 1_000, "since": 1_000,
            "sealed": serde_json::to_value(&sealed).unwrap(),
        });
        let bare: SecretRecord = serde_json::from_value(bare).unwrap();
        assert!(says(bare.check(&keys)).contains("is not as it was written"), "{alg:?}");
        assert!(says(bare.open(&keys)).contains("its data key is not in the keyring"), "{alg:?}");
        assert!(
            says(Ring::default().take(&bare, mark(1), (1, true), &keys)).contains("not as it was written")
        );
    }
}

#[test]
fn of_two_that_are_active_the_one_that_became_so_last_signs_in_whatever_order_they_came() {
    let keys = keyring();
    let (a, b) = (
        make(Algorithm::ES256, SecretState::Active, &keys),
        make(Algorithm::ES256, SecretState::Active, &keys),
    );
    for order in [[(&a, 5), (&b, 9)], [(&b, 9), (&a, 5)]] {
        let mut ring = Ring::default();
        for (record, stamp) in order {
            ring.take(record, mark(stamp), (1, stamp == 5), &keys).unwrap();
        }
        ring.open(&keys, 1).unwrap();
        assert_eq!(ring.signer().unwrap().kid, b.kid);
        let surplus = ring.surplus(SecretState::Active);
        assert_eq!(surplus.iter().map(|held| held.record.kid.as_str()).collect::<Vec<_>>(), [a.kid.as_str()]);
        assert_eq!(ring.state_of(surplus[0]), SecretState::Previous);
        assert_eq!(ring.verification_keys().len(), 2);
    }
}

#[test]
fn a_secret_of_another_control_plane_waits_for_its_data_key() {
    let (here, there) = (keyring(), keyring());
    let record = make(Algorithm::HS256, SecretState::Active, &there);
    let mut ring = Ring::default();
    ring.take(&record, mark(1), (1, false), &here).unwrap();
    ring.open(&here, 1).unwrap();
    assert_eq!(ring.signer().unwrap_err(), ring::NoSigner::Locked);
    assert_eq!(ring.locked().count(), 1);
    let id = record.data_key().unwrap();
    here.take(id, &there.wraps(id).unwrap()).unwrap();
    ring.open(&here, 1).unwrap();
    assert_eq!((ring.signer().unwrap().kid.as_str(), ring.locked().count()), (record.kid.as_str(), 0));
}

#[test]
fn nothing_signs_that_was_not_announced() {
    let keys = keyring();
    let new = NewSecret { unannounced: true, ..NewSecret::first(Algorithm::ES256, None) };
    let record = SecretRecord::make(new, &keys, 1_000).unwrap();
    let mut ring = Ring::default();
    ring.take(&record, mark(1), (1, true), &keys).unwrap();
    ring.open(&keys, 1).unwrap();
    assert_eq!(ring.signer().unwrap_err(), ring::NoSigner::Unannounced);
    ring.announce(&record.kid);
    assert!(ring.signer().is_ok());
}

#[test]
fn the_ids_of_tokens_are_those_that_proxies_know_at_every_stage() {
    let keys = keyring();
    for alg in ALL {
        let mut ring = Ring::default();
        let mut record = make(alg, SecretState::Active, &keys);
        ring.take(&record, mark(1), (1, true), &keys).unwrap();
        ring.open(&keys, 1).unwrap();
        let identity = ring.signer().unwrap().identity();
        let made = |ring: &Ring| {
            let pushed = ring.verification_keys()[0].jti_key.clone().expect("its ids are keyed");
            JtiKey::new(pushed.expose()).unwrap().made(&identity.jti)
        };
        assert!(made(&ring));
        assert_ne!(identity.jti, ring.signer().unwrap().identity().jti);
        record = record.moved(SecretState::Previous, 2_000, &keys).unwrap();
        ring.take(&record, mark(2), (2, true), &keys).unwrap();
        ring.open(&keys, 2).unwrap();
        assert!(made(&ring));
        // Another secret's are others.
        let other = make(alg, SecretState::Active, &keys).jti_key(&keys).unwrap();
        assert!(!other.made(&identity.jti));
        let unkeyed = edited(&record, "keyed_ids", false.into());
        assert!(says(unkeyed.check(&keys)).contains("not as it was written"));
    }
    // Whoever else has an imported secret signs tokens with ids of their own.
    let imported = Some(Secret::new(vec![3; 32]));
    let new = NewSecret { imported, ..NewSecret::first(Algorithm::HS256, None) };
    let record = SecretRecord::make(new, &keys, 1_000).unwrap();
    assert!(record.jti_key(&keys).is_none());
    assert_eq!(record.open(&keys).unwrap().signer.unwrap().identity().jti.len(), 22);
}

#[test]
fn nothing_secret_is_printed() {
    let keys = keyring();
    let record = make(Algorithm::HS256, SecretState::Active, &keys);
    let opened = record.open(&keys).unwrap();
    let secret = BASE64URL.encode(record.unseal(&keys).unwrap().expose());
    let master = MasterKey::of([7; 32]);
    let printed = format!("{master:?} {keys:?} {:?} {record:?} {opened:?}", keys.root());
    assert!(
        !printed.contains(&secret) && !printed.contains("7, 7") && !printed.contains("1, 1"),
        "{printed}"
    );
}

#[test]
fn what_was_known_of_a_secret_goes_on_verifying_while_its_next_data_key_is_on_its_way() {
    let (here, there) = (keyring(), keyring());
    for alg in ALL {
        let rotating = make(alg, SecretState::Rotating, &there);
        let mut ring = Ring::default();
        ring.take(&rotating, mark(1), (1, false), &here).unwrap();
        let id = rotating.data_key().unwrap();
        here.take(id, &there.wraps(id).unwrap()).unwrap();
        ring.open(&here, 1).unwrap();
        let known = ring.verification_keys();
        let active = rotating.moved(SecretState::Active, 2_000, &there).unwrap();
        ring.take(&active, mark(2), (2, false), &here).unwrap();
        ring.open(&here, 2).unwrap();
        assert_eq!((ring.verification_keys(), ring.locked().count()), (known, 1), "{alg:?}");
        // One of which nothing was known verifies by its public half, if it has one; what opens later is new to proxies.
        let mut ring = Ring::default();
        ring.take(&active, mark(2), (2, false), &here).unwrap();
        ring.open(&here, 2).unwrap();
        assert_eq!(ring.verification_keys().is_empty(), alg == Algorithm::HS256);
        let id = active.data_key().unwrap();
        here.take(id, &there.wraps(id).unwrap()).unwrap();
        ring.open(&here, 9).unwrap();
        let seq = if alg == Algorithm::HS256 { 9 } else { 2 };
        assert_eq!(ring.get(&active.kid).unwrap().seq, seq, "{alg:?}");
    }
}
