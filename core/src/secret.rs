//! Values that must not be seen.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize, Zeroizing};

/// A key, token, password or what else must not be seen: nothing of it in `Debug`, wiped when dropped, compared in a
/// time that depends on its length alone.
///
/// In JSON bytes are base64url and text is text: it is for documents that carry secrets, and no `Display` is there.
#[derive(Clone, Default)]
pub struct Secret<T: Zeroize>(Zeroizing<T>);

impl<T: Zeroize> Secret<T> {
    /// Keeps a value.
    pub fn new(value: T) -> Self {
        Self(Zeroizing::new(value))
    }

    /// The value.
    pub fn expose(&self) -> &T {
        &self.0
    }

    /// The value, to be changed. What a longer one leaves behind where it lay is not wiped.
    pub fn expose_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Zeroize> From<T> for Secret<T> {
    fn from(value: T) -> Self {
        Self::new(value)
    }
}

impl<T: Zeroize> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl<T: Zeroize + AsRef<[u8]>> PartialEq for Secret<T> {
    fn eq(&self, other: &Self) -> bool {
        let (one, other): (&[u8], &[u8]) = (self.expose().as_ref(), other.expose().as_ref());
        one.ct_eq(other).into()
    }
}

impl<T: Zeroize + AsRef<[u8]>> Eq for Secret<T> {}

impl Serialize for Secret<Vec<u8>> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&Zeroizing::new(BASE64URL.encode(self.expose())))
    }
}

impl<'de> Deserialize<'de> for Secret<Vec<u8>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Zeroizing::new(String::deserialize(deserializer)?);
        // The error names no byte of it.
        let bytes = BASE64URL.decode(text.as_bytes());
        bytes.map(Self::new).map_err(|_| serde::de::Error::custom("a secret that is not base64url"))
    }
}

impl Serialize for Secret<String> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.expose())
    }
}

impl<'de> Deserialize<'de> for Secret<String> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_printed() {
        let printed = format!("{:?} {:#?}", Secret::new([7_u8; 32]), Some(Secret::new("secret".to_owned())));
        assert!(!printed.contains('7') && !printed.contains("secret"), "{printed}");
    }

    #[test]
    fn equal_bytes_alone_are_equal() {
        let secret = |bytes: &[u8]| Secret::new(bytes.to_vec());
        assert_eq!(secret(b"abc"), secret(b"abc"));
        assert_eq!(secret(b""), secret(b""));
        for other in [&b"abd"[..], b"xbc", b"ab", b"abcd", b""] {
            assert_ne!(secret(b"abc"), secret(other));
        }
    }

    #[test]
    fn bytes_are_base64url_in_json_and_text_is_text() {
        let bytes = Secret::new(vec![0xfb, 0xff]);
        assert_eq!(serde_json::to_string(&bytes).unwrap(), r#""-_8""#);
        assert_eq!(serde_json::from_str::<Secret<Vec<u8>>>(r#""-_8""#).unwrap(), bytes);
        let refusal = serde_json::from_str::<Secret<Vec<u8>>>(r#""se+cret""#).unwrap_err().to_string();
        assert!(refusal.contains("not base64url") && !refusal.contains("cret\""), "{refusal}");
        let text = Secret::new("a".to_owned());
        assert_eq!(serde_json::to_string(&text).unwrap(), r#""a""#);
        assert_eq!(serde_json::from_str::<Secret<String>>(r#""a""#).unwrap(), text);
    }
}
