//! Secrets that were made elsewhere: what may be taken for an HMAC secret.
//!
//! A token shows to anybody who has one whether a guessed HMAC secret is right, as often as they like. So a secret
//! that can be guessed is worth nothing, however long it is (RFC 8725 section 3.5).

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD as BASE64URL};
use keygate_core::secret::Secret;
use keygate_core::token::crypto::HMAC_SECRET_MIN_BYTES;

/// More would be hashed down first (RFC 2104 section 2) and takes room on every proxy.
const MAX_BYTES: usize = 512;
/// What has fewer different bytes was not drawn at random: 32 random bytes have 30 on average, and fewer than 16 with
/// a chance below 2^-60.
const MIN_DISTINCT: usize = 16;

/// Secrets of examples, tutorials and defaults, which whoever guesses tries first. In lower case.
const KNOWN: [&str; 24] = [
    "a-string-secret-at-least-256-bits-long",
    "a-valid-string-secret-that-is-at-least-512-bits-long-which-is-very-long",
    "your-256-bit-secret",
    "your-384-bit-secret",
    "your-512-bit-secret",
    "your-secret-key",
    "your_jwt_secret",
    "your-super-secret-jwt-token-with-at-least-32-characters-long",
    "super-secret-jwt-token-with-at-least-32-characters-long",
    "this-is-a-very-long-secret-key-for-jwt-signing",
    "this_is_a_secret_key_that_is_at_least_32_characters",
    "thisisasecretkeythatisatleast32characterslong",
    "mysupersecretkeythatisatleast32characters",
    "my-32-character-ultra-secure-and-ultra-long-secret",
    "404e635266556a586e3272357538782f413f4428472b4b6250645367566b5970",
    "qwertyuiopasdfghjklzxcvbnm123456",
    "qwertyuiopasdfghjklzxcvbnm1234567890",
    "abcdefghijklmnopqrstuvwxyz123456",
    "abcdefghijklmnopqrstuvwxyz0123456789",
    "0123456789abcdefghijklmnopqrstuvwxyz",
    "changeme",
    "secret",
    "password",
    "gfg_jwt_secret_key",
];
/// The key of the example in RFC 7515 appendix A.1.
const RFC_7515: &str =
    "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow";

/// What is wrong with a secret. Nothing of it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Not base64url.
    #[error("it is not base64url (RFC 4648 section 5); encode the bytes of the secret so")]
    Encoding,
    /// Too short.
    #[error("it has {0} bytes; at least {HMAC_SECRET_MIN_BYTES} are needed (RFC 7518 section 3.2)")]
    Short(usize),
    /// Too long.
    #[error("it has {0} bytes; at most {MAX_BYTES} are taken")]
    Long(usize),
    /// On the list.
    #[error("it is a well-known secret of examples, which whoever guesses tries first")]
    Known,
    /// Of a pattern.
    #[error("it is no random secret: it repeats itself; make one with `openssl rand 32`")]
    Pattern,
}

/// Reads a secret from base64url, with or without padding.
///
/// # Errors
/// Why it is not taken.
pub fn read(text: &str) -> Result<Secret<Vec<u8>>, ImportError> {
    let text = text.trim().trim_end_matches('=');
    let bytes = BASE64URL.decode(text).or_else(|_| STANDARD_NO_PAD.decode(text));
    let bytes = Secret::new(bytes.map_err(|_| ImportError::Encoding)?);
    check(bytes.expose())?;
    Ok(bytes)
}

/// Whether bytes may be an HMAC secret.
///
/// # Errors
/// Why not.
pub fn check(secret: &[u8]) -> Result<(), ImportError> {
    if secret.len() < HMAC_SECRET_MIN_BYTES {
        return Err(if is_known(secret) { ImportError::Known } else { ImportError::Short(secret.len()) });
    }
    if secret.len() > MAX_BYTES {
        return Err(ImportError::Long(secret.len()));
    }
    if is_known(secret) {
        return Err(ImportError::Known);
    }
    let mut seen = [false; 256];
    secret.iter().for_each(|byte| seen[usize::from(*byte)] = true);
    let distinct = seen.iter().filter(|seen| **seen).count();
    let repeats = |period: usize| secret.iter().zip(secret.iter().skip(period)).all(|(a, b)| a == b);
    let counts =
        secret.windows(2).all(|pair| pair[1].wrapping_sub(pair[0]) == secret[1].wrapping_sub(secret[0]));
    if distinct < MIN_DISTINCT || counts || (1..=secret.len() / 2).any(repeats) {
        return Err(ImportError::Pattern);
    }
    Ok(())
}

/// Whether it is on the list: as it is, in another case, or as one of the list's in base64.
fn is_known(secret: &[u8]) -> bool {
    let known = |bytes: &[u8]| {
        std::str::from_utf8(bytes).is_ok_and(|text| KNOWN.contains(&text.trim().to_lowercase().as_str()))
    };
    let rfc = BASE64URL.decode(RFC_7515).is_ok_and(|rfc| rfc == secret);
    let decoded = BASE64URL.decode(secret).or_else(|_| STANDARD_NO_PAD.decode(secret));
    rfc || known(secret) || decoded.is_ok_and(|bytes| known(&bytes)) || secret == RFC_7515.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::random;

    #[test]
    fn a_random_secret_is_taken_however_it_is_padded() {
        for _ in 0..200 {
            let secret = random::bytes::<32>();
            assert_eq!(read(&BASE64URL.encode(secret)).unwrap().expose(), &secret);
            assert_eq!(read(&format!("{}=\n", STANDARD_NO_PAD.encode(secret))).unwrap().expose(), &secret);
        }
    }

    #[test]
    fn what_can_be_guessed_is_refused() {
        let says = |secret: &[u8]| check(secret).unwrap_err();
        assert_eq!(says(&random::bytes::<31>()), ImportError::Short(31));
        assert_eq!(says(&random::bytes::<544>()), ImportError::Long(544));
        assert_eq!(says(b"secret"), ImportError::Known);
        assert_eq!(says(b"A-String-Secret-At-Least-256-Bits-Long"), ImportError::Known);
        assert_eq!(
            says(BASE64URL.encode("a-string-secret-at-least-256-bits-long").as_bytes()),
            ImportError::Known
        );
        assert_eq!(says(&BASE64URL.decode(RFC_7515).unwrap()), ImportError::Known);
        assert_eq!(says(&[0; 32]), ImportError::Pattern);
        assert_eq!(says(b"0123456789012345678901234567890123456789"), ImportError::Pattern);
        assert_eq!(says(&random::bytes::<20>().repeat(2)), ImportError::Pattern);
        assert_eq!(says(&(0..40).collect::<Vec<u8>>()), ImportError::Pattern);
        assert_eq!(read("not base64!"), Err(ImportError::Encoding));
    }
}
