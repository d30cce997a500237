//! Signatures: the three algorithms of a key and the [`CryptoProvider`] that gives them to
//! `jsonwebtoken`.
//!
//! The crate's own back ends are not used: each brings RSA (RUSTSEC-2023-0071, no fix), and in the
//! filter ES256 is twenty times faster when Envoy's BoringSSL does it. So ES256 is a parameter
//! ([`Es256`]); Ed25519 and HMAC are the same everywhere.

use ed25519_dalek::Signer as _;
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{ErrorKind, Result as JwtResult};
use jsonwebtoken::{AlgorithmFamily, DecodingKey, EncodingKey};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use signature::{Signer, Verifier};

/// An uncompressed point of P-256 (SEC 1 section 2.3.3): `04 || x || y`.
pub const P256_POINT_BYTES: usize = 65;
/// The shortest HMAC secret, in bytes: the hash's own length (RFC 7518 section 3.2).
pub const HMAC_SECRET_MIN_BYTES: usize = 32;

/// How a key may be signed (RFC 7518 section 3.1, RFC 8037). There is no `none`, no RSA and no choice:
/// the algorithm belongs to the key id's record, a token's header is only compared with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Algorithm {
    /// ECDSA on P-256 with SHA-256.
    ES256,
    /// Ed25519.
    EdDSA,
    /// HMAC with SHA-256: whoever can verify can also mint.
    HS256,
}

impl Algorithm {
    /// The JOSE name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ES256 => "ES256",
            Self::EdDSA => "EdDSA",
            Self::HS256 => "HS256",
        }
    }

    /// The algorithm of a JOSE name; case counts.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::ES256, Self::EdDSA, Self::HS256].into_iter().find(|alg| alg.name() == name)
    }

    /// Bytes of a signature.
    pub const fn signature_bytes(self) -> usize {
        match self {
            Self::ES256 | Self::EdDSA => 64,
            Self::HS256 => 32,
        }
    }

    /// The same algorithm as `jsonwebtoken` names it.
    pub const fn jose(self) -> jsonwebtoken::Algorithm {
        match self {
            Self::ES256 => jsonwebtoken::Algorithm::ES256,
            Self::EdDSA => jsonwebtoken::Algorithm::EdDSA,
            Self::HS256 => jsonwebtoken::Algorithm::HS256,
        }
    }

    /// The verification key from its raw bytes: a P-256 point, an Ed25519 public key (32 bytes), or an
    /// HMAC secret of at least [`HMAC_SECRET_MIN_BYTES`]. `None` when the length is wrong.
    pub fn verification_key(self, material: &[u8]) -> Option<DecodingKey> {
        match self {
            Self::ES256 => (material.len() == P256_POINT_BYTES && material.first() == Some(&4))
                .then(|| DecodingKey::from_ec_der(material)),
            Self::EdDSA => (material.len() == 32).then(|| DecodingKey::from_ed_der(material)),
            Self::HS256 => {
                (material.len() >= HMAC_SECRET_MIN_BYTES).then(|| DecodingKey::from_secret(material))
            }
        }
    }

    /// The signing key from its raw bytes: a P-256 scalar, an Ed25519 seed (32 bytes each), or an HMAC
    /// secret. `None` when the length is wrong.
    pub fn signing_key(self, material: &[u8]) -> Option<EncodingKey> {
        match self {
            Self::ES256 => (material.len() == 32).then(|| EncodingKey::from_ec_der(material)),
            Self::EdDSA => (material.len() == 32).then(|| EncodingKey::from_ed_der(material)),
            Self::HS256 => {
                (material.len() >= HMAC_SECRET_MIN_BYTES).then(|| EncodingKey::from_secret(material))
            }
        }
    }
}

/// ES256 as the surroundings offer it: a library natively, the proxy's own in the filter.
pub trait Es256: 'static {
    /// Whether `signature` (`r || s`, 64 bytes) is one of `message` under `point` (SEC 1, 65 bytes).
    fn verify(point: &[u8], message: &[u8], signature: &[u8]) -> bool;

    /// Signs `message` with a P-256 scalar of 32 bytes: `r || s`. `None` where there is no signing.
    fn sign(scalar: &[u8], message: &[u8]) -> Option<Vec<u8>>;
}

/// The provider to install once per process with `install_default`.
pub const fn provider<E: Es256>() -> CryptoProvider {
    CryptoProvider {
        signer_factory: signer::<E>,
        verifier_factory: verifier::<E>,
        // Only the JWK conversions of `jsonwebtoken` use these, and nothing here calls those.
        key_utils: KeyUtils::new_unimplemented(),
    }
}

/// Whether `signature` (base64url) signs `signing_input` under `key`. The provider must be installed.
pub fn verify(alg: Algorithm, key: &DecodingKey, signing_input: &[u8], signature: &str) -> bool {
    jsonwebtoken::crypto::verify(signature, signing_input, key, alg.jose()).unwrap_or(false)
}

fn verifier<E: Es256>(alg: &jsonwebtoken::Algorithm, key: &DecodingKey) -> JwtResult<Box<dyn JwtVerifier>> {
    let material = key.try_get_as_bytes()?.to_vec();
    match (alg, key.family()) {
        (jsonwebtoken::Algorithm::ES256, AlgorithmFamily::Ec) => {
            Ok(Box::new(Ecdsa::<E>(zeroize::Zeroizing::new(material), std::marker::PhantomData)))
        }
        (jsonwebtoken::Algorithm::EdDSA, AlgorithmFamily::Ed) => {
            let bytes = material.try_into().map_err(|_| ErrorKind::InvalidEddsaKey)?;
            let key =
                ed25519_dalek::VerifyingKey::from_bytes(&bytes).map_err(|_| ErrorKind::InvalidEddsaKey)?;
            Ok(Box::new(EdDsaVerifier(key)))
        }
        (jsonwebtoken::Algorithm::HS256, AlgorithmFamily::Hmac) => Ok(Box::new(hmac_of(&material)?)),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

fn signer<E: Es256>(alg: &jsonwebtoken::Algorithm, key: &EncodingKey) -> JwtResult<Box<dyn JwtSigner>> {
    let material = zeroize::Zeroizing::new(key.as_bytes().to_vec());
    match (alg, key.family()) {
        (jsonwebtoken::Algorithm::ES256, AlgorithmFamily::Ec) => {
            Ok(Box::new(Ecdsa::<E>(material, std::marker::PhantomData)))
        }
        (jsonwebtoken::Algorithm::EdDSA, AlgorithmFamily::Ed) => {
            let seed = material.as_slice().try_into().map_err(|_| ErrorKind::InvalidEddsaKey)?;
            Ok(Box::new(EdDsaSigner(ed25519_dalek::SigningKey::from_bytes(seed))))
        }
        (jsonwebtoken::Algorithm::HS256, AlgorithmFamily::Hmac) => Ok(Box::new(hmac_of(&material)?)),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

/// A point to verify with or a scalar to sign with.
struct Ecdsa<E>(zeroize::Zeroizing<Vec<u8>>, std::marker::PhantomData<fn() -> E>);

impl<E: Es256> Verifier<Vec<u8>> for Ecdsa<E> {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        if signature.len() == 64 && E::verify(&self.0, message, signature) {
            Ok(())
        } else {
            Err(signature::Error::new())
        }
    }
}

impl<E: Es256> Signer<Vec<u8>> for Ecdsa<E> {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        E::sign(&self.0, message).ok_or_else(signature::Error::new)
    }
}

impl<E: Es256> JwtVerifier for Ecdsa<E> {
    fn algorithm(&self) -> jsonwebtoken::Algorithm {
        jsonwebtoken::Algorithm::ES256
    }
}

impl<E: Es256> JwtSigner for Ecdsa<E> {
    fn algorithm(&self) -> jsonwebtoken::Algorithm {
        jsonwebtoken::Algorithm::ES256
    }
}

struct EdDsaVerifier(ed25519_dalek::VerifyingKey);

impl Verifier<Vec<u8>> for EdDsaVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        let signature =
            ed25519_dalek::Signature::from_slice(signature).map_err(|_| signature::Error::new())?;
        // Strict: refuses keys and nonces of small order, which `verify` lets pass (RFC 8032 leaves
        // room; Chalkias et al., "Taming the many EdDSAs", 2020).
        self.0.verify_strict(message, &signature).map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for EdDsaVerifier {
    fn algorithm(&self) -> jsonwebtoken::Algorithm {
        jsonwebtoken::Algorithm::EdDSA
    }
}

struct EdDsaSigner(ed25519_dalek::SigningKey);

impl Signer<Vec<u8>> for EdDsaSigner {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        self.0.try_sign(message).map(|signature| signature.to_vec()).map_err(|_| signature::Error::new())
    }
}

impl JwtSigner for EdDsaSigner {
    fn algorithm(&self) -> jsonwebtoken::Algorithm {
        jsonwebtoken::Algorithm::EdDSA
    }
}

struct HmacSha256(Hmac<Sha256>);

fn hmac_of(secret: &[u8]) -> JwtResult<HmacSha256> {
    if secret.len() < HMAC_SECRET_MIN_BYTES {
        return Err(ErrorKind::InvalidKeyFormat.into());
    }
    let mac = Hmac::<Sha256>::new_from_slice(secret).map_err(|_| ErrorKind::InvalidKeyFormat)?;
    Ok(HmacSha256(mac))
}

impl Verifier<Vec<u8>> for HmacSha256 {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        // Constant time, and of the whole length only.
        self.0.clone().chain_update(message).verify_slice(signature).map_err(|_| signature::Error::new())
    }
}

impl Signer<Vec<u8>> for HmacSha256 {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(self.0.clone().chain_update(message).finalize().into_bytes().to_vec())
    }
}

impl JwtVerifier for HmacSha256 {
    fn algorithm(&self) -> jsonwebtoken::Algorithm {
        jsonwebtoken::Algorithm::HS256
    }
}

impl JwtSigner for HmacSha256 {
    fn algorithm(&self) -> jsonwebtoken::Algorithm {
        jsonwebtoken::Algorithm::HS256
    }
}

/// A P-256 point as DER `SubjectPublicKeyInfo` (RFC 5480), which is what TLS libraries import.
pub fn p256_spki(point: &[u8]) -> Option<Vec<u8>> {
    // SEQUENCE { SEQUENCE { id-ecPublicKey, prime256v1 }, BIT STRING { point } }
    const PREFIX: [u8; 26] = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
        0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
    ];
    (point.len() == P256_POINT_BYTES).then(|| [PREFIX.as_slice(), point].concat())
}

/// An ECDSA signature `r || s` of 64 bytes (RFC 7518 section 3.4) as DER (RFC 3279 section 2.2.3).
pub fn ecdsa_der(signature: &[u8]) -> Option<Vec<u8>> {
    let (r, s) = signature.split_at_checked(32)?;
    if s.len() != 32 {
        return None;
    }
    let mut body = Vec::with_capacity(72);
    for half in [r, s] {
        let significant = half.iter().position(|byte| *byte != 0).unwrap_or(31);
        let digits = half.get(significant..)?;
        // A DER INTEGER is signed: a leading one bit takes a zero byte in front.
        let sign = digits.first().is_some_and(|byte| *byte >= 0x80);
        let length = u8::try_from(digits.len()).ok()?.checked_add(u8::from(sign))?;
        body.extend_from_slice(&[0x02, length]);
        if sign {
            body.push(0);
        }
        body.extend_from_slice(digits);
    }
    let mut der = vec![0x30, u8::try_from(body.len()).ok()?];
    der.append(&mut body);
    Some(der)
}

/// ES256 by the `p256` crate, for the control plane and tests.
#[cfg(feature = "native")]
pub mod native {
    use p256::ecdsa::signature::{Signer, Verifier};
    use p256::ecdsa::{Signature, SigningKey, VerifyingKey};

    use super::{CryptoProvider, Es256, provider};

    /// The native ES256.
    pub struct P256;

    static PROVIDER: CryptoProvider = provider::<P256>();

    /// Makes `jsonwebtoken` use this process-wide; calling it again changes nothing.
    pub fn install() {
        let _already_installed = PROVIDER.install_default();
    }

    /// The public point of a P-256 scalar; `None` when the bytes are no scalar of the curve.
    pub fn p256_point(scalar: &[u8]) -> Option<Vec<u8>> {
        let key = SigningKey::from_slice(scalar).ok()?;
        Some(key.verifying_key().to_sec1_point(false).as_bytes().to_vec())
    }

    impl Es256 for P256 {
        fn verify(point: &[u8], message: &[u8], signature: &[u8]) -> bool {
            let Ok(key) = VerifyingKey::from_sec1_bytes(point) else { return false };
            let Ok(signature) = Signature::from_slice(signature) else { return false };
            key.verify(message, &signature).is_ok()
        }

        fn sign(scalar: &[u8], message: &[u8]) -> Option<Vec<u8>> {
            let signature: Signature = SigningKey::from_slice(scalar).ok()?.try_sign(message).ok()?;
            Some(signature.to_bytes().to_vec())
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
    use proptest::prelude::*;

    use super::*;

    fn pair(alg: Algorithm, seed: [u8; 32]) -> (EncodingKey, DecodingKey) {
        let public = match alg {
            Algorithm::ES256 => native::p256_point(&seed).unwrap(),
            Algorithm::EdDSA => {
                ed25519_dalek::SigningKey::from_bytes(&seed).verifying_key().to_bytes().to_vec()
            }
            Algorithm::HS256 => seed.to_vec(),
        };
        (alg.signing_key(&seed).unwrap(), alg.verification_key(&public).unwrap())
    }

    #[test]
    fn each_algorithm_accepts_its_own_signature_and_nothing_else() {
        native::install();
        for alg in [Algorithm::ES256, Algorithm::EdDSA, Algorithm::HS256] {
            let (signing, verifying) = pair(alg, [7; 32]);
            let signature = jsonwebtoken::crypto::sign(b"message", &signing, alg.jose()).unwrap();
            assert!(verify(alg, &verifying, b"message", &signature), "{alg:?}");
            assert!(!verify(alg, &verifying, b"massage", &signature), "{alg:?}");
            assert!(!verify(alg, &verifying, b"message", ""), "{alg:?}");
            let (_, other) = pair(alg, [8; 32]);
            assert!(!verify(alg, &other, b"message", &signature), "{alg:?}");
            let bytes = BASE64URL.decode(&signature).unwrap();
            assert_eq!(bytes.len(), alg.signature_bytes());
            for position in 0..bytes.len() {
                let mut bent = bytes.clone();
                bent[position] ^= 1;
                assert!(!verify(alg, &verifying, b"message", &BASE64URL.encode(bent)), "{alg:?}");
            }
        }
    }

    #[test]
    fn a_public_key_is_no_hmac_secret() {
        native::install();
        let (_, public) = pair(Algorithm::ES256, [7; 32]);
        let point = native::p256_point(&[7; 32]).unwrap();
        let forged = jsonwebtoken::crypto::sign(
            b"message",
            &EncodingKey::from_secret(&point),
            jsonwebtoken::Algorithm::HS256,
        )
        .unwrap();
        assert!(!verify(Algorithm::HS256, &public, b"message", &forged));
        assert!(!verify(Algorithm::ES256, &public, b"message", &forged));
    }

    #[test]
    fn material_of_a_wrong_length_makes_no_key() {
        for length in [0, 31, 33, 64, 66] {
            assert!(Algorithm::ES256.verification_key(&vec![4; length]).is_none());
        }
        assert!(Algorithm::EdDSA.verification_key(&[1; 31]).is_none());
        assert!(Algorithm::HS256.verification_key(&[1; 31]).is_none());
    }

    proptest! {
        #[test]
        fn der_is_what_a_library_reads_back(r in prop::array::uniform32(0u8..), s in prop::array::uniform32(0u8..), zeros in 0usize..32) {
            let mut raw = [r, s].concat();
            raw[..zeros].fill(0);
            let der = ecdsa_der(&raw).unwrap();
            if let Ok(signature) = p256::ecdsa::Signature::from_slice(&raw) {
                prop_assert_eq!(der, signature.to_der().as_bytes().to_vec());
            }
        }
    }
}
