//! Secrets at rest, opened by a reader of the tests' own: by the format that the control plane documents, with nothing
//! of its code.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305, XNonce};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// The keyring's file in the data directory.
pub const KEYRING: &str = "keyring.json";

/// The wraps of each data key, by the master key's id.
pub type Wraps = BTreeMap<String, BTreeMap<String, String>>;

/// The wraps that a keyring's file holds, which must be whole.
#[track_caller]
pub fn wraps(file: &Path) -> Wraps {
    let bytes = fs::read(file).expect("the keyring");
    let mut keyring: serde_json::Value = serde_json::from_slice(&bytes).expect("a whole keyring");
    assert_eq!(keyring["format"], 1);
    serde_json::from_value(keyring["keys"].take()).expect("wraps by data key and master key")
}

/// Writes a keyring's file with these wraps, readable by its owner alone.
#[track_caller]
pub fn write(file: &Path, wraps: &Wraps) {
    let text = serde_json::json!({ "format": 1, "keys": wraps }).to_string();
    fs::write(file, text).expect("the keyring");
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).expect("its mode");
}

/// The data keys of a keyring, opened with the master key in the same directory.
#[derive(Debug)]
pub struct DataKeys {
    wrapping: [u8; 32],
    wraps: Wraps,
}

impl DataKeys {
    /// Those in the control plane's data directory.
    #[track_caller]
    pub fn of(data: &Path) -> Self {
        let text = fs::read_to_string(data.join("master.key")).expect("the master key");
        let master = BASE64URL.decode(text.trim().trim_end_matches('=')).expect("base64url");
        let mut mac = Hmac::<Sha256>::new_from_slice(&master).expect("a key of any length will do");
        mac.update(b"keygate wrapped data keys");
        Self { wrapping: mac.finalize().into_bytes().into(), wraps: wraps(&data.join(KEYRING)) }
    }

    /// The data key with this id; `None` once it is not kept any more.
    #[track_caller]
    pub fn get(&self, id: &str) -> Option<[u8; 32]> {
        let wrapped = self.wraps.get(id)?.values().next().expect("a wrap");
        let key = open(&self.wrapping, &format!("keygate data key {id}"), wrapped);
        Some(key.try_into().expect("32 bytes"))
    }
}

/// Opens what was sealed with this key for this place: XChaCha20-Poly1305, the nonce in front, in base64url.
#[track_caller]
pub fn open(key: &[u8; 32], place: &str, sealed: &str) -> Vec<u8> {
    let bytes = BASE64URL.decode(sealed).expect("base64url");
    let (nonce, sealed) = bytes.split_first_chunk::<24>().expect("a nonce");
    let cipher = XChaCha20Poly1305::new(key.into());
    let payload = Payload { msg: sealed, aad: place.as_bytes() };
    cipher.decrypt(&XNonce::from(*nonce), payload).expect("it opens")
}
