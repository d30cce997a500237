//! What signs keys: a secret that is open, or one that an HSM keeps to itself.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use jsonwebtoken::{EncodingKey, Header};
use keygate_core::secret::Secret;
use keygate_core::token::crypto::Algorithm;
use keygate_core::token::jti::JtiKey;
use keygate_core::token::{Claims, TYPE};

use super::Identity;
use super::SecretError;
use crate::secrets::hsm::Hsm;

/// Signs keys.
#[derive(Clone)]
pub struct Signer {
    /// The id of its secret, the `kid` of the tokens.
    pub kid: String,
    /// Its algorithm.
    pub alg: Algorithm,
    key: SigningKey,
    /// What the ids of its tokens are made with.
    ids: Option<JtiKey>,
}

#[derive(Clone)]
enum SigningKey {
    Here(EncodingKey),
    InHsm(Arc<Hsm>),
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("kid", &self.kid).field("alg", &self.alg).finish_non_exhaustive()
    }
}

impl Signer {
    /// With a secret; `None` when it is none of that algorithm.
    pub(super) fn here(kid: &str, alg: Algorithm, secret: &[u8], ids: Option<JtiKey>) -> Option<Self> {
        Some(Self { kid: kid.into(), alg, key: SigningKey::Here(alg.signing_key(secret)?), ids })
    }

    /// With the ES256 key of that name in an HSM.
    pub(super) fn in_hsm(kid: &str, hsm: Arc<Hsm>, ids: Option<JtiKey>) -> Self {
        Self { kid: kid.into(), alg: Algorithm::ES256, key: SigningKey::InHsm(hsm), ids }
    }

    /// The identifiers of a key to be that this is to sign.
    pub fn identity(&self) -> Identity {
        Identity::new(self.ids.as_ref())
    }

    /// Whether somebody else is asked to sign.
    pub fn takes_long(&self) -> bool {
        matches!(self.key, SigningKey::InHsm(_))
    }

    /// Signs claims. But for an HSM, the same claims give the same token: all three algorithms are deterministic as
    /// used here (RFC 6979 for ES256). May take as long as an HSM does.
    ///
    /// # Errors
    /// When the secret is not usable after all, or the HSM does not sign.
    pub fn sign(&self, claims: &Claims) -> Result<Secret<String>, SecretError> {
        let header =
            Header { typ: Some(TYPE.into()), kid: Some(self.kid.clone()), ..Header::new(self.alg.jose()) };
        match &self.key {
            SigningKey::Here(key) => Ok(Secret::new(jsonwebtoken::encode(&header, claims, key)?)),
            SigningKey::InHsm(hsm) => {
                let part = |json: serde_json::Result<Vec<u8>>| json.map(|json| BASE64URL.encode(json));
                let header = part(serde_json::to_vec(&header)).map_err(|_| SecretError::Unencodable)?;
                let claims = part(serde_json::to_vec(claims)).map_err(|_| SecretError::Unencodable)?;
                let mut token = Secret::new(format!("{header}.{claims}"));
                let signature = hsm.sign_p256(&self.kid, token.expose().as_bytes())?;
                let text = token.expose_mut();
                text.push('.');
                text.push_str(&BASE64URL.encode(signature));
                Ok(token)
            }
        }
    }
}
