//! Signing secrets: made, sealed for rest, opened for signing.
//!
//! Each secret is sealed with a data key of its own (XChaCha20-Poly1305, draft-irtf-cfrg-xchacha), its id
//! and state as associated data, so that sealed records cannot be swapped or set back; the data key is
//! sealed with the master key.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use hmac::{Hmac, Mac as _};
use jsonwebtoken::{EncodingKey, Header};
use keygate_core::crypto::{Algorithm, native};
use keygate_core::rules::{Material, VerificationKey};
use keygate_core::token::{Claims, TYPE};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::{files, random};

/// The stage of a secret's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretState {
    /// It signs.
    Active,
}

impl SecretState {
    const fn label(self) -> &'static str {
        match self {
            Self::Active => "active",
        }
    }
}

/// A secret as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretRecord {
    /// Its id, the `kid` of the tokens it signs.
    pub kid: String,
    /// Its algorithm.
    pub alg: Algorithm,
    /// Its stage.
    pub state: SecretState,
    /// Unix seconds.
    pub created_at: u64,
    /// The sealed secret.
    sealed: Sealed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    data_key: String,
    secret: String,
}

/// Why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It was sealed with another master key, or changed.
    #[error(
        "secret {kid} cannot be opened: it was sealed with another master key, or its record was changed"
    )]
    Seal {
        /// Which.
        kid: String,
    },
    /// The master key file.
    #[error("master key {path}: {problem}")]
    MasterKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Signing failed.
    #[error("signing failed")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// The key that seals.
pub struct MasterKey(Zeroizing<[u8; 32]>);

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(…)")
    }
}

impl MasterKey {
    /// Reads the master key's file; makes it, mode 0600, if `may_create`.
    ///
    /// # Errors
    /// When it is missing and may not be made, or is not 32 bytes in base64url.
    pub fn load(path: &Path, may_create: bool) -> Result<Self, SecretError> {
        let error = |problem: String| SecretError::MasterKey { path: path.into(), problem };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => Zeroizing::new(text),
            Err(e) if e.kind() == io::ErrorKind::NotFound && may_create => {
                let text = Zeroizing::new(BASE64URL.encode(*Zeroizing::new(random::bytes::<32>())));
                files::write_private(path, text.as_bytes()).map_err(|e| error(e.to_string()))?;
                text
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(error(
                    "is not there, but secrets were sealed with it; put it back, without it no key can be issued".into(),
                ));
            }
            Err(e) => return Err(error(e.to_string())),
        };
        let bytes = Zeroizing::new(BASE64URL.decode(text.trim()).unwrap_or_default());
        let key = bytes.as_slice().try_into().map_err(|_| error("is not 32 bytes in base64url".into()))?;
        Ok(Self(Zeroizing::new(key)))
    }

    /// A key derived from it for one purpose: HMAC-SHA-256 (RFC 2104) of the purpose's name.
    pub fn derive(&self, purpose: &str) -> Zeroizing<[u8; 32]> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&*self.0).expect("a key of any length will do");
        mac.update(purpose.as_bytes());
        Zeroizing::new(mac.finalize().into_bytes().into())
    }

    #[cfg(test)]
    pub(crate) fn of(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }
}

/// Seals with XChaCha20-Poly1305, bound to `associated`: nonce and sealed bytes, in base64url.
pub fn seal(key: &[u8; 32], associated: &str, plain: &[u8]) -> String {
    let nonce = random::bytes::<24>();
    let cipher = XChaCha20Poly1305::new(key.into());
    let payload = Payload { msg: plain, aad: associated.as_bytes() };
    let sealed = cipher.encrypt(&XNonce::from(nonce), payload).expect("it is not too long to seal");
    BASE64URL.encode([nonce.as_slice(), &sealed].concat())
}

/// Opens what [`seal`] sealed with the same key and `associated`.
pub fn open(key: &[u8; 32], associated: &str, sealed: &str) -> Option<Zeroizing<Vec<u8>>> {
    let bytes = BASE64URL.decode(sealed).ok()?;
    let (nonce, sealed) = bytes.split_first_chunk::<24>()?;
    let cipher = XChaCha20Poly1305::new(key.into());
    let payload = Payload { msg: sealed, aad: associated.as_bytes() };
    cipher.decrypt(&XNonce::from(*nonce), payload).ok().map(Zeroizing::new)
}

/// A secret that is open.
#[derive(Clone)]
pub struct Signer {
    /// Its id.
    pub kid: String,
    /// Its algorithm.
    pub alg: Algorithm,
    key: EncodingKey,
    verification: Material,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("kid", &self.kid).field("alg", &self.alg).finish_non_exhaustive()
    }
}

impl SecretRecord {
    /// Makes a secret.
    pub fn generate(alg: Algorithm, master: &MasterKey, now: u64) -> Self {
        // All three are 32 random bytes: a P-256 scalar (but for 1 in 2^32), an Ed25519 seed, an HMAC secret.
        let secret = loop {
            let bytes = Zeroizing::new(random::bytes::<32>());
            if alg != Algorithm::ES256 || native::p256_point(&*bytes).is_some() {
                break bytes;
            }
        };
        let kid = format!("{}-{}", alg.name().to_lowercase(), random::identifier());
        Self::sealed(kid, alg, SecretState::Active, now, master, &secret)
    }

    fn sealed(
        kid: String,
        alg: Algorithm,
        state: SecretState,
        now: u64,
        master: &MasterKey,
        secret: &[u8; 32],
    ) -> Self {
        let data_key = Zeroizing::new(random::bytes::<32>());
        let sealed = Sealed {
            data_key: seal(&master.0, &format!("keygate data key {kid}"), &*data_key),
            secret: seal(&data_key, &associated(&kid, alg, state), secret),
        };
        Self { kid, alg, state, created_at: now, sealed }
    }

    /// Opens it.
    ///
    /// # Errors
    /// When the master key is another, or the record was changed.
    pub fn open(&self, master: &MasterKey) -> Result<Signer, SecretError> {
        let error = || SecretError::Seal { kid: self.kid.clone() };
        let data_key = open(&master.0, &format!("keygate data key {}", self.kid), &self.sealed.data_key)
            .and_then(|key| <[u8; 32]>::try_from(key.as_slice()).ok())
            .map(Zeroizing::new)
            .ok_or_else(error)?;
        let secret = open(&data_key, &associated(&self.kid, self.alg, self.state), &self.sealed.secret)
            .ok_or_else(error)?;
        let public = match self.alg {
            Algorithm::ES256 => native::p256_point(&secret),
            Algorithm::EdDSA => <[u8; 32]>::try_from(secret.as_slice())
                .ok()
                .map(|seed| ed25519_dalek::SigningKey::from_bytes(&seed).verifying_key().to_bytes().to_vec()),
            Algorithm::HS256 => Some(secret.to_vec()),
        };
        Ok(Signer {
            kid: self.kid.clone(),
            alg: self.alg,
            key: self.alg.signing_key(&secret).ok_or_else(error)?,
            verification: Material::new(public.ok_or_else(error)?),
        })
    }
}

fn associated(kid: &str, alg: Algorithm, state: SecretState) -> String {
    format!("keygate secret {kid} {} {}", alg.name(), state.label())
}

impl Signer {
    /// Signs claims. The same claims give the same token: all three algorithms are deterministic as used
    /// here (RFC 6979 for ES256).
    ///
    /// # Errors
    /// When the secret is not usable after all.
    pub fn sign(&self, claims: &Claims) -> Result<Zeroizing<String>, SecretError> {
        let header =
            Header { typ: Some(TYPE.into()), kid: Some(self.kid.clone()), ..Header::new(self.alg.jose()) };
        Ok(Zeroizing::new(jsonwebtoken::encode(&header, claims, &self.key)?))
    }

    /// What its tokens are verified with.
    pub fn verification_key(&self) -> VerificationKey {
        VerificationKey {
            kid: self.kid.clone(),
            alg: self.alg,
            material: self.verification.clone(),
            not_after: None,
        }
    }

    /// Its public key as a JWK (RFC 7517); an HMAC secret has none.
    pub fn jwk(&self) -> Option<serde_json::Value> {
        let bytes = self.verification.expose();
        let mut jwk = match self.alg {
            Algorithm::ES256 => serde_json::json!({
                "kty": "EC", "crv": "P-256",
                "x": BASE64URL.encode(bytes.get(1..33)?), "y": BASE64URL.encode(bytes.get(33..65)?),
            }),
            Algorithm::EdDSA => {
                serde_json::json!({ "kty": "OKP", "crv": "Ed25519", "x": BASE64URL.encode(bytes) })
            }
            Algorithm::HS256 => return None,
        };
        let members = jwk.as_object_mut()?;
        members.insert("kid".into(), self.kid.clone().into());
        members.insert("alg".into(), self.alg.name().into());
        members.insert("use".into(), "sig".into());
        Some(jwk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{Creator, Identity, KeyRequest};
    use crate::roles;

    fn claims() -> Claims {
        let request: KeyRequest = serde_json::from_str(r#"{"name":"a","role":"basic"}"#).unwrap();
        let creator = Creator { role: "admin", scopes: "chat:read chat:write", owner: None };
        let identity = Identity { key_id: "key_1".into(), jti: "j".into() };
        request
            .record(creator, &roles::expand(roles::defaults()), identity, "k", 1_000)
            .unwrap()
            .claims("keygate", None)
    }

    #[test]
    fn what_is_signed_is_read_strictly_and_verified_and_signed_the_same_again() {
        native::install();
        let master = MasterKey::of([1; 32]);
        for alg in [Algorithm::ES256, Algorithm::EdDSA, Algorithm::HS256] {
            let record = SecretRecord::generate(alg, &master, 1_000);
            let signer = record.open(&master).unwrap();
            let token = signer.sign(&claims()).unwrap();
            assert_eq!(signer.sign(&claims()).unwrap(), token);
            let read = keygate_core::token::read(token.as_bytes()).unwrap();
            assert_eq!((read.claims, read.kid, read.alg), (claims(), record.kid.clone(), alg));
            let key = signer.verification_key();
            let key = alg.verification_key(key.material.expose()).unwrap();
            assert!(keygate_core::crypto::verify(alg, &key, read.signing_input, read.signature));
            assert_eq!(signer.jwk().is_none(), alg == Algorithm::HS256);
        }
    }

    #[test]
    fn a_sealed_record_that_was_changed_or_moved_does_not_open() {
        native::install();
        let master = MasterKey::of([1; 32]);
        let a = SecretRecord::generate(Algorithm::HS256, &master, 1_000);
        let b = SecretRecord::generate(Algorithm::HS256, &master, 1_000);
        assert!(a.open(&MasterKey::of([2; 32])).is_err());
        assert!(SecretRecord { kid: b.kid.clone(), ..a.clone() }.open(&master).is_err());
        assert!(SecretRecord { alg: Algorithm::EdDSA, ..a.clone() }.open(&master).is_err());
        assert!(SecretRecord { sealed: b.sealed.clone(), ..a.clone() }.open(&master).is_err());
        let mixed = Sealed { data_key: a.sealed.data_key.clone(), secret: b.sealed.secret };
        assert!(SecretRecord { sealed: mixed, ..a.clone() }.open(&master).is_err());
        assert!(a.open(&master).is_ok());
    }

    #[test]
    fn nothing_secret_is_printed() {
        native::install();
        let master = MasterKey::of([7; 32]);
        let record = SecretRecord::generate(Algorithm::HS256, &master, 0);
        let signer = record.open(&master).unwrap();
        let secret = BASE64URL.encode(signer.verification.expose());
        let printed = format!("{master:?} {record:?} {signer:?} {:?}", signer.verification_key());
        assert!(!printed.contains(&secret) && !printed.contains("7, 7"), "{printed}");
    }

    #[test]
    fn a_master_key_is_made_once_and_missed_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        assert!(MasterKey::load(&path, false).is_err());
        let made = MasterKey::load(&path, true).unwrap();
        assert_eq!(made.0, MasterKey::load(&path, false).unwrap().0);
        std::fs::write(&path, "short").unwrap();
        assert!(MasterKey::load(&path, true).is_err());
    }
}
