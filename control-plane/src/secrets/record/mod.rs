//! Signing secrets: made, sealed for rest, opened for signing and verifying, moved from stage to stage, ended.
//!
//! ```text
//!  rotating ──▶ active ──▶ previous ──▶ expired        a secret only goes forward
//!  known to     signs      verifies     neither
//!  proxies
//! ```
//!
//! A [`SecretRecord`] stands in the journal. Its secret is sealed with a data key of its own (XChaCha20-Poly1305), its
//! id, algorithm and stage as associated data; the data key is in the [`Keyring`], not in the journal, and is
//! destroyed when the record is followed by the next. So what stands in the journal for years opens as long as it is
//! the latest, and never again: a secret that stopped signing is gone, and a record that was put back does not open.
//! All of a record is authenticated (HMAC-SHA-256, RFC 2104) with a key derived from the keyring's root.

mod identity;
pub mod import;
pub mod ring;
mod signer;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use keygate_core::secret::Secret;
use keygate_core::token::crypto::{Algorithm, native};
use keygate_core::token::jti::JtiKey;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

pub use self::identity::Identity;
pub use self::ring::Ring;

pub use self::signer::Signer;
use crate::platform::random;
use crate::secrets::hsm::HsmError;
use crate::secrets::keyring::{Keyring, KeyringError};
use crate::secrets::seal::{open, seal};

/// The stage of a secret's life. They only follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretState {
    /// Proxies get to know it; it signs nothing yet.
    Rotating,
    /// It signs.
    Active,
    /// It signs no more, and still verifies.
    Previous,
    /// It does neither.
    Expired,
}

impl SecretState {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [Self::Rotating, Self::Active, Self::Previous, Self::Expired];

    /// Its name in the API and in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Rotating => "rotating",
            Self::Active => "active",
            Self::Previous => "previous",
            Self::Expired => "expired",
        }
    }
}

/// What ends a secret that signs no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retire {
    /// A time, with every key that it signed.
    AfterOverlap,
    /// The end of the last key that it signed.
    WithLastKey,
}

impl Retire {
    /// What is usual: who can verify with an HMAC secret can also mint with it, so it does not stay.
    pub const fn usual(alg: Algorithm) -> Self {
        match alg {
            Algorithm::HS256 => Self::AfterOverlap,
            Algorithm::ES256 | Algorithm::EdDSA => Self::WithLastKey,
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
    /// Since when it is at this stage, Unix seconds.
    pub since: u64,
    /// Why the rotation to it was begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Whether it began to sign before proxies knew it: it signs only once they do.
    #[serde(default, skip_serializing_if = "is_false")]
    pub unannounced: bool,
    /// What ends it, once it signs no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retire: Option<Retire>,
    /// Unix seconds from which on it verifies nothing more, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<u64>,
    /// Whether an HSM keeps it, under its id.
    #[serde(default, skip_serializing_if = "is_false")]
    pub in_hsm: bool,
    /// Whether the ids of its tokens are made with a key of their own, see [`keygate_core::token::jti`]: those of a secret that
    /// was made elsewhere are not.
    #[serde(default, skip_serializing_if = "is_false")]
    pub keyed_ids: bool,
    /// Its public half, if it has one, base64url.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<String>,
    /// The sealed secret, as long as it is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sealed: Option<Sealed>,
    /// Authenticates all the rest. A record without it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    /// The id of its data key in the keyring.
    data_key: String,
    secret: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives references")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

/// Why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Its record is not what was written.
    #[error(
        "the record of secret {kid} is not as it was written: it was edited, moved or sealed with another root key; restore journal and keyring from one backup"
    )]
    Tampered {
        /// Which.
        kid: String,
    },
    /// It would go back.
    #[error(
        "the record of secret {kid} would make it {to} again, but it is {from} already: an older record was put back; restore journal and keyring from one backup"
    )]
    RolledBack {
        /// Which.
        kid: String,
        /// What it is.
        from: &'static str,
        /// What the record says.
        to: &'static str,
    },
    /// Its data key is not there.
    #[error(
        "secret {kid} ({state}) cannot be opened: its data key is not in the keyring. Its record is older than the keyring (then the journal was set back) or newer; restore both from one backup"
    )]
    NoDataKey {
        /// Which.
        kid: String,
        /// What its record says.
        state: &'static str,
    },
    /// An HSM keeps it, and none is configured.
    #[error("secret {kid} is kept by an HSM, and none is configured; set hsm.module and hsm.token")]
    NoHsm {
        /// Which.
        kid: String,
    },
    /// Only ES256 keys are kept by an HSM.
    #[error("an HSM signs with ES256 only here; set secrets.algorithm to ES256, or hsm.signing to false")]
    NotForHsm,
    /// The keyring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// Signing failed.
    #[error("signing failed")]
    Sign(#[from] jsonwebtoken::errors::Error),
    /// What is to be signed cannot be written as JSON.
    #[error("signing failed: the claims cannot be written")]
    Unencodable,
}

/// A new secret to be.
#[derive(Debug)]
pub struct NewSecret {
    /// Its algorithm.
    pub alg: Algorithm,
    /// [`SecretState::Rotating`] or [`SecretState::Active`].
    pub state: SecretState,
    /// Whether it signs before proxies know it.
    pub unannounced: bool,
    /// Why it is made.
    pub why: Option<String>,
    /// The key pair that the HSM made for it, if one keeps it.
    pub in_hsm: Option<HsmPair>,
    /// Its bytes, if it was made elsewhere; for HS256.
    pub imported: Option<Secret<Vec<u8>>>,
}

impl NewSecret {
    /// The first one of a history, in force at once: a proxy that joins later gets to know it with the rest.
    pub fn first(alg: Algorithm, in_hsm: Option<HsmPair>) -> Self {
        Self { alg, state: SecretState::Active, unannounced: false, why: None, in_hsm, imported: None }
    }
}

/// A key pair that an HSM made. Its private half stays there.
#[derive(Debug)]
pub struct HsmPair {
    /// The id of the secret to be, and the label there.
    pub kid: String,
    /// The public half (SEC 1, 65 bytes).
    point: Vec<u8>,
}

impl HsmPair {
    /// Has the HSM make one. May take as long as an HSM does.
    ///
    /// # Errors
    /// When it does not.
    pub fn make(alg: Algorithm, keys: &Keyring) -> Result<Self, SecretError> {
        let kid = new_kid(alg);
        if alg != Algorithm::ES256 {
            return Err(SecretError::NotForHsm);
        }
        let hsm = keys.hsm().ok_or_else(|| SecretError::NoHsm { kid: kid.clone() })?;
        let point = hsm.generate_p256(&kid).inspect_err(|_| {
            // It may be there all the same, and nobody will ask for it.
            let _gone_or_not = hsm.destroy(&kid);
        })?;
        Ok(Self { kid, point })
    }

    /// Has the HSM destroy it: nothing came of it.
    pub fn discard(kid: &str, keys: &Keyring) {
        if let Some(Err(error)) = keys.hsm().map(|hsm| hsm.destroy(kid)) {
            tracing::warn!(kid, %error, "a key pair that is not used stays in the HSM");
        }
    }
}

fn new_kid(alg: Algorithm) -> String {
    format!("{}-{}", alg.name().to_lowercase(), random::identifier())
}

/// What is needed of an open secret.
#[derive(Debug, Clone, Default)]
pub struct Opened {
    /// What its tokens are verified with.
    pub verification: Option<Secret<Vec<u8>>>,
    /// What signs, if it may.
    pub signer: Option<std::sync::Arc<Signer>>,
}

impl SecretRecord {
    /// Makes a secret; its data key is durable then.
    ///
    /// # Errors
    /// When the keyring or the HSM fails.
    pub fn make(new: NewSecret, keys: &Keyring, now: u64) -> Result<Self, SecretError> {
        let NewSecret { alg, state, unannounced, why, in_hsm, imported } = new;
        let mut record = Self {
            kid: new_kid(alg),
            alg,
            state,
            created_at: now,
            since: now,
            why,
            unannounced,
            retire: None,
            not_after: None,
            in_hsm: in_hsm.is_some(),
            // Whoever else has the secret signs tokens with ids of their own.
            keyed_ids: imported.is_none(),
            public: None,
            sealed: None,
            mac: None,
        };
        match in_hsm {
            Some(pair) => {
                record.kid = pair.kid;
                record.public = Some(BASE64URL.encode(pair.point));
                record.seal(&[], keys)?;
            }
            None => {
                let secret = imported.unwrap_or_else(|| draw(alg));
                record.public = public_half(alg, secret.expose()).map(|public| BASE64URL.encode(public));
                record.seal(secret.expose(), keys)?;
            }
        }
        record.authenticate(keys);
        Ok(record)
    }

    /// The record of the same secret at a later stage; its data key, if it still needs one, is a new one and durable.
    ///
    /// # Errors
    /// When the secret is needed and does not open.
    pub fn moved(&self, state: SecretState, now: u64, keys: &Keyring) -> Result<Self, SecretError> {
        let signs = state <= SecretState::Active;
        let verifies = state <= SecretState::Previous;
        let needs_secret = !self.in_hsm && (signs || (verifies && self.alg == Algorithm::HS256));
        let secret = if needs_secret { Some(self.unseal(keys)?) } else { None };
        let mut record =
            Self { state, since: now, sealed: None, mac: None, unannounced: false, ..self.clone() };
        match secret {
            Some(secret) => record.seal(secret.expose(), keys)?,
            None if verifies => record.seal(&[], keys)?,
            None => {}
        }
        record.authenticate(keys);
        Ok(record)
    }

    /// The same, and verifies nothing from `not_after` on, Unix seconds, or `None`: as long as `retire` says.
    ///
    /// # Errors
    /// When the secret is needed and does not open.
    pub fn retired(
        &self,
        retire: Retire,
        not_after: Option<u64>,
        now: u64,
        keys: &Keyring,
    ) -> Result<Self, SecretError> {
        Self { retire: Some(retire), not_after, ..self.clone() }.moved(SecretState::Previous, now, keys)
    }

    /// Seals a secret, or nothing: what verifies has a data key of its own in any case, so that a record which is put back
    /// after the secret has moved on does not open.
    fn seal(&mut self, secret: &[u8], keys: &Keyring) -> Result<(), KeyringError> {
        let data_key = Secret::new(random::bytes::<32>());
        let id = format!("{}.{}", self.kid, random::identifier());
        let sealed = seal(data_key.expose(), &self.associated(), secret);
        keys.put(&id, data_key.expose())?;
        self.sealed = Some(Sealed { data_key: id, secret: sealed });
        Ok(())
    }

    fn unseal(&self, keys: &Keyring) -> Result<Secret<Vec<u8>>, SecretError> {
        let tampered = || SecretError::Tampered { kid: self.kid.clone() };
        let missing = || SecretError::NoDataKey { kid: self.kid.clone(), state: self.state.label() };
        let sealed = self.sealed.as_ref().ok_or_else(tampered)?;
        let data_key = keys.get(&sealed.data_key)?.ok_or_else(missing)?;
        open(data_key.expose(), &self.associated(), &sealed.secret).ok_or_else(tampered)
    }

    /// Opens what is needed of it at its stage.
    ///
    /// # Errors
    /// When it cannot be opened; [`SecretError::NoDataKey`] when it might be later.
    pub fn open(&self, keys: &Keyring) -> Result<Opened, SecretError> {
        let tampered = || SecretError::Tampered { kid: self.kid.clone() };
        if self.state == SecretState::Expired {
            return Ok(Opened::default());
        }
        let signs = self.state <= SecretState::Active;
        let secret = Some(self.unseal(keys)?).filter(|secret| !secret.expose().is_empty());
        let public = match (&self.public, &secret) {
            (Some(public), _) => BASE64URL.decode(public).ok(),
            (None, Some(secret)) if self.alg == Algorithm::HS256 => Some(secret.expose().clone()),
            (None, _) => None,
        };
        let verification = Secret::new(public.ok_or_else(tampered)?);
        // A record that does not fit its secret is not to be found out by somebody's key.
        self.alg.verification_key(verification.expose()).ok_or_else(tampered)?;
        let ids = self.jti_key(keys);
        let signer = match secret {
            _ if !signs => None,
            // Without an HSM, as on another control plane, it verifies all the same.
            None if self.in_hsm => keys.hsm().map(|hsm| Signer::in_hsm(&self.kid, hsm.clone(), ids)),
            Some(secret) => {
                Some(Signer::here(&self.kid, self.alg, secret.expose(), ids).ok_or_else(tampered)?)
            }
            None => return Err(tampered()),
        };
        Ok(Opened { verification: Some(verification), signer: signer.map(Into::into) })
    }

    /// Whether all of it is as it was written.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, keys: &Keyring) -> Result<(), SecretError> {
        let mac = self.mac.as_ref().and_then(|mac| BASE64URL.decode(mac).ok()).unwrap_or_default();
        let genuine = self.mac_of(keys).verify_slice(&mac).is_ok();
        if genuine { Ok(()) } else { Err(SecretError::Tampered { kid: self.kid.clone() }) }
    }

    fn authenticate(&mut self, keys: &Keyring) {
        self.mac = Some(BASE64URL.encode(self.mac_of(keys).finalize().into_bytes()));
    }

    fn mac_of(&self, keys: &Keyring) -> Hmac<Sha256> {
        let key = keys.root().derive("keygate secret records");
        let plain = serde_json::to_vec(&Self { mac: None, ..self.clone() }).expect("plain data");
        let mac = Hmac::<Sha256>::new_from_slice(key.expose()).expect("a key of any length will do");
        mac.chain_update(plain)
    }

    /// What proxies tell the ids of its tokens with, if they can. It is derived and stands nowhere.
    pub fn jti_material(&self, keys: &Keyring) -> Option<Secret<Vec<u8>>> {
        let derived = || keys.root().derive(&format!("keygate token ids {}", self.kid));
        self.keyed_ids.then(|| Secret::new(derived().expose().to_vec()))
    }

    /// What the ids of its tokens are made with, if not at will.
    pub fn jti_key(&self, keys: &Keyring) -> Option<JtiKey> {
        self.jti_material(keys).and_then(|material| JtiKey::new(material.expose()))
    }

    /// What its tokens are verified with, as far as that is known without opening it.
    pub fn public_material(&self) -> Option<Secret<Vec<u8>>> {
        let public = self.public.as_ref().filter(|_| self.state < SecretState::Expired)?;
        let material = Secret::new(BASE64URL.decode(public).ok()?);
        self.alg.verification_key(material.expose()).map(|_| material)
    }

    /// The id of the data key that opens it, if it has one in the keyring.
    pub fn data_key(&self) -> Option<&str> {
        self.sealed.as_ref().map(|sealed| sealed.data_key.as_str())
    }

    fn associated(&self) -> String {
        format!("keygate secret {} {} {}", self.kid, self.alg.name(), self.state.label())
    }
}

/// Random bytes for a secret: a P-256 scalar (all but 1 in 2^32 of 32 bytes are), an Ed25519 seed, an HMAC secret.
fn draw(alg: Algorithm) -> Secret<Vec<u8>> {
    loop {
        let bytes = Secret::new(random::bytes::<32>());
        if alg != Algorithm::ES256 || native::p256_point(bytes.expose()).is_some() {
            return Secret::new(bytes.expose().to_vec());
        }
    }
}

/// The public half of a secret; an HMAC secret has none.
fn public_half(alg: Algorithm, secret: &[u8]) -> Option<Vec<u8>> {
    match alg {
        Algorithm::ES256 => native::p256_point(secret),
        Algorithm::EdDSA => <&[u8; 32]>::try_from(secret)
            .ok()
            .map(|seed| ed25519_dalek::SigningKey::from_bytes(seed).verifying_key().to_bytes().to_vec()),
        Algorithm::HS256 => None,
    }
}

#[cfg(test)]
mod tests;
