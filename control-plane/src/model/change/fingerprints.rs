//! Many fingerprints as one member of a change.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use keygate_core::revocation::Fingerprint;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Fingerprints of tokens; in JSON base64url of eight bytes each, big-endian.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fingerprints(pub Vec<Fingerprint>);

impl Serialize for Fingerprints {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|fingerprint| fingerprint.0.to_be_bytes()).collect();
        serializer.serialize_str(&BASE64URL.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for Fingerprints {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = BASE64URL.decode(text).map_err(de::Error::custom)?;
        let (fingerprints, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() {
            return Err(de::Error::custom("fingerprints have eight bytes each"));
        }
        Ok(Self(fingerprints.iter().map(|bytes| Fingerprint(u64::from_be_bytes(*bytes))).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_as_they_are_written() {
        let some = Fingerprints(vec![Fingerprint(1), Fingerprint(u64::MAX)]);
        let text = serde_json::to_string(&some).unwrap();
        assert_eq!(text, "\"AAAAAAAAAAH__________w\"");
        assert_eq!(serde_json::from_str::<Fingerprints>(&text).unwrap(), some);
        assert_eq!(serde_json::to_string(&Fingerprints::default()).unwrap(), "\"\"");
        assert!(serde_json::from_str::<Fingerprints>("\"AAAA\"").is_err());
    }
}
