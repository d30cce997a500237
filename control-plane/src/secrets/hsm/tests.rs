use std::sync::Mutex;

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeInfo, AttributeType};
use cryptoki::types::AuthPin;
use keygate_core::token::crypto::{Es256, native};

use super::error::refused;
use super::softhsm::Token;
use super::*;

fn is_signed(point: &[u8], message: &[u8], signature: &[u8]) -> bool {
    native::P256::verify(point, message, signature)
}

#[test]
fn a_wrapping_key_is_made_once_and_found_again() {
    let token = Token::new();
    let hsm = token.open();
    let missing = hsm.ensure_wrapping_key("master", false).unwrap_err();
    let text = r#"the HSM has no key "master"; restore it to the token, or correct its label"#;
    assert_eq!(missing.to_string(), text);
    assert!(matches!(hsm.wrap("master", b"", b"key").unwrap_err(), HsmError::NoSuchKey { .. }));
    hsm.ensure_wrapping_key("master", true).unwrap();
    let sealed = hsm.wrap("master", b"id 1", b"a data key").unwrap();
    assert_eq!(sealed.len(), 12 + 10 + 16);
    assert_ne!(hsm.wrap("master", b"id 1", b"a data key").unwrap(), sealed);
    drop(hsm);

    let hsm = token.open();
    hsm.ensure_wrapping_key("master", true).unwrap();
    assert_eq!(hsm.unwrap("master", b"id 1", &sealed).unwrap().expose(), b"a data key");
    assert!(!hsm.destroy("master").unwrap());
    hsm.ensure_wrapping_key("master", false).unwrap();
    let empty = hsm.wrap("master", b"", b"").unwrap();
    assert_eq!(hsm.unwrap("master", b"", &empty).unwrap().expose(), b"");
}

#[test]
fn what_was_changed_does_not_open() {
    let token = Token::new();
    let hsm = token.open();
    hsm.ensure_wrapping_key("one", true).unwrap();
    hsm.ensure_wrapping_key("two", true).unwrap();
    let sealed = hsm.wrap("one", b"id 1", b"a data key").unwrap();
    let is_refused = |key: &str, associated: &[u8], sealed: &[u8]| {
        let opened = hsm.unwrap(key, associated, sealed);
        assert!(matches!(&opened, Err(HsmError::DoesNotOpen { key: k }) if k == key), "{opened:?}");
    };
    for at in 0..sealed.len() {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        is_refused("one", b"id 1", &changed);
        is_refused("one", b"id 1", &sealed[..at]);
    }
    is_refused("one", b"id 2", &sealed);
    is_refused("one", b"", &sealed);
    is_refused("two", b"id 1", &sealed);
    assert_eq!(hsm.unwrap("one", b"id 1", &sealed).unwrap().expose(), b"a data key");
}

#[test]
fn two_keys_of_one_label_are_not_chosen_from() {
    let token = Token::new();
    let hsm = token.open();
    hsm.ensure_wrapping_key("master", true).unwrap();
    let template = [Kind::Wrapping.template("master"), vec![Attribute::ValueLen(32.into())]].concat();
    let again = move |login: &mut Login| {
        let made = login.session.generate_key(&Mechanism::AesKeyGen, &template);
        Ok(made.map(drop)?)
    };
    hsm.ask(ANSWER_WITHIN, again).unwrap();
    let ambiguous = hsm.wrap("master", b"", b"key").unwrap_err();
    assert!(matches!(ambiguous, HsmError::Ambiguous { what: "keys", count: 2, .. }), "{ambiguous:?}");
}

#[test]
fn a_key_pair_signs_and_stays_and_is_destroyed() {
    let token = Token::new();
    let hsm = token.open();
    assert!(!hsm.has("k1").unwrap());
    assert!(!hsm.destroy("k1").unwrap());
    assert!(matches!(hsm.sign_p256("k1", b"text"), Err(HsmError::NoSuchKey { .. })));
    let point = hsm.generate_p256("k1").unwrap();
    assert!(hsm.has("k1").unwrap());
    assert!(matches!(hsm.generate_p256("k1"), Err(HsmError::KeyExists { .. })));
    let other = hsm.generate_p256("k2").unwrap();

    let signature = token.open().sign_p256("k1", b"text").unwrap();
    assert!(is_signed(&point, b"text", &signature));
    assert!(!is_signed(&point, b"another text", &signature));
    assert!(!is_signed(&other, b"text", &signature));

    assert!(hsm.destroy("k1").unwrap());
    assert!(!hsm.has("k1").unwrap());
    assert!(matches!(hsm.sign_p256("k1", b"text"), Err(HsmError::NoSuchKey { .. })));
    assert!(!hsm.destroy("k1").unwrap());
    assert!(is_signed(&other, b"text", &hsm.sign_p256("k2", b"text").unwrap()));
    assert!(is_signed(&hsm.generate_p256("k1").unwrap(), b"", &hsm.sign_p256("k1", b"").unwrap()));
}

#[test]
fn no_key_can_be_taken_out() {
    let token = Token::new();
    let hsm = token.open();
    hsm.ensure_wrapping_key("master", true).unwrap();
    hsm.generate_p256("k1").unwrap();
    for (kind, label) in [(Kind::Wrapping, "master"), (Kind::Private, "k1")] {
        let seen = hsm.ask(ANSWER_WITHIN, move |login| {
            let key = login.key(kind, label)?;
            let value = login.session.get_attribute_info(key, &[AttributeType::Value])?;
            let kept = [AttributeType::AlwaysSensitive, AttributeType::NeverExtractable];
            let looser = [Attribute::Extractable(true)];
            let loosened = login.session.update_attributes(key, &looser).is_ok();
            Ok((value, login.session.get_attributes(key, &kept)?, loosened))
        });
        let (value, kept, loosened) = seen.unwrap();
        assert!(matches!(value.as_slice(), [AttributeInfo::Sensitive]), "{value:?}");
        assert_eq!(kept, [Attribute::AlwaysSensitive(true), Attribute::NeverExtractable(true)]);
        assert!(!loosened);
    }
}

/// As when the session was lost after the pair was made and before anybody was told.
#[test]
fn a_pair_that_was_made_already_is_taken_for_it() {
    let token = Token::new();
    let hsm = token.open();
    let make = |id: [u8; 16]| hsm.ask(ANSWER_WITHIN, move |login| login.generate_p256("k1", &id));
    let point = make([1; 16]).unwrap();
    assert_eq!(make([1; 16]).unwrap(), point);
    assert!(matches!(make([2; 16]), Err(HsmError::KeyExists { .. })));
}

#[test]
fn errors_at_opening_say_what_to_do() {
    let token = Token::new();
    let opened = |change: fn(&mut HsmConfig)| {
        let mut config = token.config.clone();
        change(&mut config);
        Hsm::open(config).unwrap_err()
    };
    let error = opened(|config| config.module = "/no/such/module.so".into()).to_string();
    assert!(error.starts_with("PKCS#11 module /no/such/module.so cannot be loaded ("), "{error}");

    let error = opened(|config| config.token = "another".into()).to_string();
    assert!(error.starts_with(r#"no HSM token has the label "another"; there are [""#), "{error}");
    assert!(error.contains(&token.config.token), "{error}");

    let wrong = opened(|config| config.pin = Secret::new("5926-mistaken".into()));
    assert!(matches!(wrong, HsmError::PinRefused { .. }), "{wrong:?}");
    let text = format!("{wrong} {wrong:?} {:?}", token.config);
    assert!(text.contains("(C_Login: CKR_PIN_INCORRECT); it is not tried again"), "{text}");
    assert!(!text.contains("5926"), "{text}");
    token.open();
}

/// As when it is changed while Keygate runs.
#[test]
fn a_wrong_pin_is_never_tried_again() {
    const CHANGED: &str = "5926-changed";
    let token = Token::new();
    let change_pin = |from: &'static str, to: &'static str| {
        let config = HsmConfig { pin: Secret::new(from.into()), ..token.config.clone() };
        let (from, to) = (AuthPin::new(from.into()), AuthPin::new(to.into()));
        let done = Hsm::open(config).unwrap().ask(ANSWER_WITHIN, move |login| {
            login.session.set_pin(&from, &to)?;
            Ok(())
        });
        done.unwrap();
    };
    let hsm = token.open();
    change_pin(softhsm::PIN, CHANGED);
    token.take_away();
    // It is lost. Unless it had to log in again before, for another test's sake.
    let error = hsm.has("k1").unwrap_err();
    assert!(matches!(error, HsmError::Lost { .. } | HsmError::PinRefused { .. }), "{error:?}");
    token.put_back();
    assert!(matches!(hsm.has("k1"), Err(HsmError::PinRefused { .. })));
    // The old PIN is right again. That it is refused all the same shows that it was not tried.
    change_pin(CHANGED, softhsm::PIN);
    assert!(matches!(hsm.has("k1"), Err(HsmError::PinRefused { .. })));
    assert!(!token.open().has("k1").unwrap());
}

#[test]
fn a_token_that_was_away_is_used_again() {
    let (token, other) = (Token::new(), Token::new());
    let (hsm, others) = (token.open(), other.open());
    // The same number of keys on both, so that their handles are the same numbers.
    hsm.ensure_wrapping_key("master", true).unwrap();
    others.ensure_wrapping_key("master", true).unwrap();
    let point = hsm.generate_p256("k1").unwrap();
    let others_point = others.generate_p256("k1").unwrap();
    let sealed = hsm.wrap("master", b"", b"key").unwrap();
    hsm.sign_p256("k1", b"text").unwrap();
    others.sign_p256("k1", b"text").unwrap();

    token.take_away();
    for _ in 0..2 {
        // None of them says that there is no such key.
        let errors = [
            hsm.has("k1").map(drop),
            hsm.destroy("k1").map(drop),
            hsm.wrap("master", b"", b"key").map(drop),
            hsm.unwrap("master", b"", &sealed).map(drop),
            hsm.ensure_wrapping_key("master", true),
            hsm.generate_p256("k2").map(drop),
            hsm.sign_p256("k1", b"text").map(drop),
        ];
        for error in errors.map(Result::unwrap_err) {
            let HsmError::Lost { token: lost, cause } = &error else { panic!("{error:?}") };
            assert_eq!(*lost, token.config.token);
            assert!(matches!(**cause, HsmError::NoToken { .. }), "{cause:?}");
        }
        // The module was initialised anew under the other, which must not take up what is not its own.
        assert!(is_signed(&others_point, b"text", &others.sign_p256("k1", b"text").unwrap()));
    }

    token.put_back();
    assert!(is_signed(&point, b"text", &hsm.sign_p256("k1", b"text").unwrap()));
    assert_eq!(hsm.unwrap("master", b"", &sealed).unwrap().expose(), b"key");
    assert!(is_signed(&others_point, b"text", &others.sign_p256("k1", b"text").unwrap()));
}

#[test]
fn a_session_that_was_lost_is_not_noticed() {
    let token = Token::new();
    let hsm = token.open();
    let ways: [fn(&Login); 2] =
        [|login| login.session.logout().unwrap(), |login| login.module.clone().finalize().unwrap()];
    for lose in ways {
        let lose = || {
            let done = hsm.ask(ANSWER_WITHIN, move |login| {
                lose(login);
                Ok(())
            });
            done.unwrap();
        };
        let point = hsm.generate_p256("k1").unwrap();
        lose();
        assert!(hsm.has("k1").unwrap());
        lose();
        assert!(is_signed(&point, b"text", &hsm.sign_p256("k1", b"text").unwrap()));
        lose();
        assert!(matches!(hsm.generate_p256("k1"), Err(HsmError::KeyExists { .. })));
        lose();
        assert!(hsm.destroy("k1").unwrap());
        assert!(!hsm.has("k1").unwrap());
        lose();
        assert!(!hsm.destroy("k1").unwrap());
        lose();
        hsm.generate_p256("k1").unwrap();
        assert!(hsm.destroy("k1").unwrap());
    }
}

#[test]
fn a_token_that_hangs_is_not_waited_for() {
    let token = Token::new();
    let hsm = token.open();
    let (go_on, wait) = mpsc::channel::<()>();
    let (did, done) = mpsc::channel();
    let soon = Duration::from_millis(20);
    let wait = Mutex::new(wait);
    let hangs = hsm.ask(soon, move |_| Ok(wait.lock().unwrap().recv().is_err()));
    assert!(matches!(hangs, Err(HsmError::TimedOut(within)) if within == soon));
    // What waits behind it and is given up is not done later; and no more than so much waits.
    for _ in 0..=MAX_WAITING {
        let did = did.clone();
        let waits = hsm.ask(Duration::ZERO, move |_| Ok(did.send(()).is_ok()));
        assert!(matches!(waits, Err(HsmError::TimedOut(_))));
    }
    assert!(matches!(hsm.has("k1"), Err(HsmError::TimedOut(ANSWER_WITHIN))));
    drop((go_on, did));
    assert!(done.recv().is_err());
    assert!(!hsm.has("k1").unwrap());
}

#[test]
fn a_mechanism_that_is_not_there_is_named() {
    let token = Token::new();
    let error = token.open().ask(ANSWER_WITHIN, move |login| {
        let made = login.session.generate_key(&Mechanism::EccMontgomeryKeyPairGen, &[]);
        made.map(drop).map_err(|e| refused("CKM_EC_MONTGOMERY_KEY_PAIR_GEN", e))
    });
    let text = error.unwrap_err().to_string();
    let named = "CKM_EC_MONTGOMERY_KEY_PAIR_GEN (C_GenerateKey: CKR_MECHANISM_INVALID)";
    assert!(text.contains(named), "{text}");
}
