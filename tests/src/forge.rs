//! Tokens that somebody else made from a good one.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde_json::Value;

/// A token in its three parts, decoded; the first two as the JSON text they are, since what is forged
/// may be no valid JSON.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The header.
    pub header: String,
    /// The claims.
    pub claims: String,
    /// The signature.
    pub signature: Vec<u8>,
}

impl Parts {
    /// Takes a token apart; panics when it is not well-formed.
    #[track_caller]
    pub fn of(token: &str) -> Self {
        let parts: Vec<Vec<u8>> =
            token.split('.').map(|part| BASE64URL.decode(part).expect("base64url")).collect();
        let [header, claims, signature] = parts.try_into().expect("three parts");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        Self { header: text(header), claims: text(claims), signature }
    }

    /// Puts it together again.
    pub fn token(&self) -> String {
        format!("{}.{}", self.signed(), BASE64URL.encode(&self.signature))
    }

    /// What a signature is made over.
    pub fn signed(&self) -> String {
        format!("{}.{}", BASE64URL.encode(&self.header), BASE64URL.encode(&self.claims))
    }

    /// With a member of the header set.
    pub fn with_header(&self, member: &str, value: impl Into<Value>) -> Self {
        Self { header: set(&self.header, member, Some(value.into())), ..self.clone() }
    }

    /// With a claim set.
    pub fn with_claim(&self, member: &str, value: impl Into<Value>) -> Self {
        Self { claims: set(&self.claims, member, Some(value.into())), ..self.clone() }
    }

    /// Without a claim.
    pub fn without_claim(&self, member: &str) -> Self {
        Self { claims: set(&self.claims, member, None), ..self.clone() }
    }

    /// Without a member of the header.
    pub fn without_header(&self, member: &str) -> Self {
        Self { header: set(&self.header, member, None), ..self.clone() }
    }

    /// With raw JSON text put at the end of the claims.
    pub fn with_raw_claim(&self, text: &str) -> Self {
        Self { claims: append(&self.claims, text), ..self.clone() }
    }

    /// With raw JSON text put at the end of the header.
    pub fn with_raw_header(&self, text: &str) -> Self {
        Self { header: append(&self.header, text), ..self.clone() }
    }

    /// A claim's value.
    pub fn claim(&self, member: &str) -> Value {
        serde_json::from_str::<Value>(&self.claims).expect("JSON")[member].clone()
    }
}

fn set(json: &str, member: &str, value: Option<Value>) -> String {
    let mut object: serde_json::Map<String, Value> = serde_json::from_str(json).expect("an object");
    match value {
        Some(value) => object.insert(member.to_owned(), value),
        None => object.remove(member),
    };
    Value::from(object).to_string()
}

fn append(json: &str, text: &str) -> String {
    let open = json.trim_end().strip_suffix('}').expect("an object");
    format!("{open},{text}}}")
}
