//! Token ids that nobody else makes up: a proxy drops a forged token for the price of an HMAC, before it verifies a
//! signature, which costs many times as much.
//!
//! ```text
//!  jti = base64url( random, 16 bytes │ first 8 bytes of HMAC-SHA-256(key, random) )
//! ```
//!
//! The key is pushed to proxies with the verification key of a secret, and is of that secret alone. It keeps a flood
//! cheap, and nothing else: a token with a genuine id still has to be signed. Who has a key of their own has a genuine
//! id, and who has a proxy's memory can make them up.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// Of the key.
pub const KEY_BYTES: usize = 32;
/// The part that is random.
pub const RANDOM_BYTES: usize = 16;
const MARK_BYTES: usize = 8;

/// What the ids of one secret's tokens are made and told with.
#[derive(Clone)]
pub struct JtiKey(Hmac<Sha256>);

impl std::fmt::Debug for JtiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JtiKey(…)")
    }
}

impl JtiKey {
    /// From its bytes; `None` when there are not [`KEY_BYTES`].
    pub fn new(key: &[u8]) -> Option<Self> {
        if key.len() != KEY_BYTES {
            return None;
        }
        Hmac::new_from_slice(key).ok().map(Self)
    }

    /// The id that begins with these random bytes.
    pub fn make(&self, random: [u8; RANDOM_BYTES]) -> String {
        let mark = self.mark(&random);
        BASE64URL.encode([random.as_slice(), &mark].concat())
    }

    /// Whether an id was made with this key.
    pub fn made(&self, jti: &str) -> bool {
        let mut bytes = [0; RANDOM_BYTES + MARK_BYTES];
        if !matches!(BASE64URL.decode_slice(jti, &mut bytes), Ok(length) if length == bytes.len()) {
            return false;
        }
        let (random, mark) = bytes.split_at(RANDOM_BYTES);
        // In constant time, and of its first bytes alone.
        self.0.clone().chain_update(random).verify_truncated_left(mark).is_ok()
    }

    fn mark(&self, random: &[u8]) -> [u8; MARK_BYTES] {
        let digest: [u8; 32] = self.0.clone().chain_update(random).finalize().into_bytes().into();
        digest.first_chunk().copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> JtiKey {
        JtiKey::new(&[byte; KEY_BYTES]).unwrap()
    }

    #[test]
    fn an_id_is_what_the_format_says() {
        // printf '%032d' 0 | xxd -r -p | openssl dgst -sha256 -mac HMAC -macopt hexkey:$(printf '01%.0s' {1..32}) -binary |
        //   head -c 8 | cat <(printf '%032d' 0 | xxd -r -p) - | basenc --base64url
        assert_eq!(key(1).make([0; RANDOM_BYTES]), "AAAAAAAAAAAAAAAAAAAAAERFdiQhhhxc");
        assert!(JtiKey::new(&[1; 31]).is_none() && JtiKey::new(&[1; 33]).is_none());
        assert_eq!(format!("{:?}", key(1)), "JtiKey(…)");
    }

    proptest! {
        #[test]
        fn its_own_ids_are_told_from_all_others(random in any::<[u8; RANDOM_BYTES]>(), place in 0usize..32, other in "[A-Za-z0-9_-]") {
            let jti = key(1).make(random);
            prop_assert!(key(1).made(&jti) && !key(2).made(&jti));
            let mut changed = jti.clone();
            changed.replace_range(place..=place, &other);
            prop_assert_eq!(key(1).made(&changed), changed == jti);
        }

        #[test]
        fn nothing_made_up_is_taken_for_one(jti in ".{0,40}") {
            prop_assert!(!key(1).made(&jti));
        }
    }
}
