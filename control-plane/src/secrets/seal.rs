//! Sealing: XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha) with a random nonce, bound to what it is for.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use keygate_core::secret::Secret;

use crate::platform::random;

/// Seals, bound to `associated`: nonce and sealed bytes, in base64url.
pub fn seal(key: &[u8; 32], associated: &str, plain: &[u8]) -> String {
    let nonce = random::bytes::<24>();
    let cipher = XChaCha20Poly1305::new(key.into());
    let payload = Payload { msg: plain, aad: associated.as_bytes() };
    let sealed = cipher.encrypt(&XNonce::from(nonce), payload).expect("it is not too long to seal");
    BASE64URL.encode([nonce.as_slice(), &sealed].concat())
}

/// Opens what [`seal`] sealed with the same key and `associated`.
pub fn open(key: &[u8; 32], associated: &str, sealed: &str) -> Option<Secret<Vec<u8>>> {
    let bytes = BASE64URL.decode(sealed).ok()?;
    let (nonce, sealed) = bytes.split_first_chunk::<24>()?;
    let cipher = XChaCha20Poly1305::new(key.into());
    let payload = Payload { msg: sealed, aad: associated.as_bytes() };
    cipher.decrypt(&XNonce::from(*nonce), payload).ok().map(Secret::new)
}
