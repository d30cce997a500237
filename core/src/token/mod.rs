//! Reading a key strictly: the bytes of a compact JWS (RFC 7515 section 7.1) to [`Token`], or the
//! reason why not. Nothing here is verified yet; [`crate::decide`] does that with what stands here.
//!
//! The reader refuses whatever leaves room for two readings: duplicate members, other types, unknown
//! header members, non-canonical base64url, padding, white space (RFC 8725 lists what such room led
//! to). Keygate issues every key that it accepts, so being strict costs nothing.

pub mod credential;
pub mod crypto;
pub mod json;
pub mod jti;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde::Serialize;

use self::json::Value;
use crate::revocation::Fingerprint;
use crate::token::crypto::Algorithm;

/// The longest token read, in bytes. The longest issued one has about 900.
pub const MAX_TOKEN_BYTES: usize = 4096;
/// The `typ` of a key's header (RFC 8725 section 3.11: explicit typing).
pub const TYPE: &str = "apikey+jwt";
/// The largest time read: the last second of the year 9999, beyond which RFC 3339 has no text.
pub const MAX_TIME: u64 = 253_402_300_799;
/// The longest identifier (`sub`, `jti`, `kid`, `role`, `iss`, `aud`, `own`, `lrole`), in bytes.
pub const MAX_IDENTIFIER_BYTES: usize = 256;

/// The claims of a key (RFC 7519 section 4.1, RFC 9068 for `scope`). Field order is the order in which
/// they are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Claims {
    /// Who issued it.
    pub iss: String,
    /// The key's id.
    pub sub: String,
    /// The token's id; revocation knows it by its [`Fingerprint`].
    pub jti: String,
    /// Issued at, Unix seconds.
    pub iat: u64,
    /// Expires at, Unix seconds: the first second at which it is refused.
    pub exp: u64,
    /// Not before, Unix seconds. Never issued; honoured if there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbf: Option<u64>,
    /// For whom, when the deployment has an audience.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aud: Option<String>,
    /// The key's role.
    pub role: String,
    /// Space-separated scopes.
    pub scope: String,
    /// The key's owner, an opaque identifier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own: Option<String>,
    /// The role whose limit holds for the key, when that is not the limit of its own role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lrole: Option<String>,
}

impl Claims {
    /// What revocation knows this token by.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.jti)
    }
}

/// A token as it was read: well-formed, not verified.
#[derive(Debug, PartialEq, Eq)]
pub struct Token<'t> {
    /// The header's algorithm; to be compared with the key id's record.
    pub alg: Algorithm,
    /// The header's key id.
    pub kid: String,
    /// The claims.
    pub claims: Claims,
    /// What was signed.
    pub signing_input: &'t [u8],
    /// The signature, base64url, of the length of `alg`.
    pub signature: &'t str,
}

/// Why bytes are no token. A client is never told which; metrics and logs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Malformed {
    /// More than [`MAX_TOKEN_BYTES`].
    #[error("longer than {MAX_TOKEN_BYTES} bytes")]
    TooLong,
    /// Not three parts of canonical base64url.
    #[error("not three parts of canonical base64url without padding")]
    Encoding,
    /// The header is no JSON object with distinct members.
    #[error("header is not a JSON object with distinct members")]
    HeaderJson,
    /// A header member that is missing, unknown, or not what a key has.
    #[error("header has an unexpected, missing or wrong member")]
    Header,
    /// The claims are no JSON object with distinct members.
    #[error("claims are not a JSON object with distinct members")]
    ClaimsJson,
    /// A claim that is missing, of the wrong type, or out of its range.
    #[error("a claim is missing, of the wrong type or out of range")]
    Claim,
    /// The signature has not its algorithm's length.
    #[error("signature is not of its algorithm's length")]
    Signature,
}

/// Reads a compact JWS.
///
/// # Errors
/// See [`Malformed`].
pub fn read(token: &[u8]) -> Result<Token<'_>, Malformed> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(Malformed::TooLong);
    }
    let text = std::str::from_utf8(token).map_err(|_| Malformed::Encoding)?;
    let (signed, signature) = text.rsplit_once('.').ok_or(Malformed::Encoding)?;
    let (header, claims) = signed.split_once('.').ok_or(Malformed::Encoding)?;
    // A third dot would be in `claims`, and is no letter of the alphabet.
    let header = BASE64URL.decode(header).map_err(|_| Malformed::Encoding)?;
    let claims = BASE64URL.decode(claims).map_err(|_| Malformed::Encoding)?;
    let signature_bytes = BASE64URL.decode(signature).map_err(|_| Malformed::Encoding)?;

    let (alg, kid) = read_header(&header)?;
    if signature_bytes.len() != alg.signature_bytes() {
        return Err(Malformed::Signature);
    }
    Ok(Token { alg, kid, claims: read_claims(&claims)?, signing_input: signed.as_bytes(), signature })
}

/// A header is exactly `alg`, `kid` and `typ`: so no `crit`, no `b64`, and no key that the token
/// brings along (`jwk`, `jku`, `x5c`, `x5u`).
fn read_header(text: &[u8]) -> Result<(Algorithm, String), Malformed> {
    let members = json::object(text).map_err(|_| Malformed::HeaderJson)?;
    let (mut alg, mut kid, mut typ) = (None, None, None);
    for (name, value) in members {
        let Value::String(value) = value else { return Err(Malformed::Header) };
        match name.as_str() {
            "alg" => alg = Some(Algorithm::from_name(&value).ok_or(Malformed::Header)?),
            "kid" => kid = Some(value),
            "typ" => typ = Some(value),
            _ => return Err(Malformed::Header),
        }
    }
    match (alg, kid, typ) {
        (Some(alg), Some(kid), Some(typ)) if typ == TYPE && is_identifier(&kid) => Ok((alg, kid)),
        _ => Err(Malformed::Header),
    }
}

fn read_claims(text: &[u8]) -> Result<Claims, Malformed> {
    let mut members = json::object(text).map_err(|_| Malformed::ClaimsJson)?;
    let mut take = |name: &str| {
        let position = members.iter().position(|(other, _)| other == name)?;
        Some(members.swap_remove(position).1)
    };
    let claims = Claims {
        iss: required(identifier(take("iss"))?)?,
        sub: required(identifier(take("sub"))?)?,
        jti: required(identifier(take("jti"))?)?,
        iat: required(time(take("iat"))?)?,
        exp: required(time(take("exp"))?)?,
        nbf: time(take("nbf"))?,
        aud: identifier(take("aud"))?,
        role: required(identifier(take("role"))?)?,
        scope: match take("scope") {
            Some(Value::String(scope)) if is_scope(&scope) => scope,
            _ => return Err(Malformed::Claim),
        },
        own: identifier(take("own"))?,
        lrole: identifier(take("lrole"))?,
    };
    if claims.exp <= claims.iat {
        return Err(Malformed::Claim);
    }
    Ok(claims)
}

fn required<T>(claim: Option<T>) -> Result<T, Malformed> {
    claim.ok_or(Malformed::Claim)
}

fn identifier(claim: Option<Value>) -> Result<Option<String>, Malformed> {
    match claim {
        None => Ok(None),
        Some(Value::String(text)) if is_identifier(&text) => Ok(Some(text)),
        Some(_) => Err(Malformed::Claim),
    }
}

fn time(claim: Option<Value>) -> Result<Option<u64>, Malformed> {
    match claim {
        None => Ok(None),
        Some(Value::Unsigned(seconds)) if seconds <= MAX_TIME => Ok(Some(seconds)),
        Some(_) => Err(Malformed::Claim),
    }
}

/// Whether a text may be an identifier in a token: visible ASCII, 1 to [`MAX_IDENTIFIER_BYTES`] bytes.
/// It travels in HTTP headers to the upstream, so nothing else can be allowed.
pub fn is_identifier(text: &str) -> bool {
    (1..=MAX_IDENTIFIER_BYTES).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

/// Whether a text is a list of scopes: scope tokens (RFC 6749 section 3.3) with one space between, or
/// empty.
pub fn is_scope(text: &str) -> bool {
    text.is_empty()
        || text.split(' ').all(|scope| {
            !scope.is_empty() && scope.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\')
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decide::limits::Holder;

    const HEADER: &str = r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt"}"#;
    const CLAIMS: &str = r#"{"iss":"keygate","sub":"key_1","jti":"j1","iat":1000,"exp":2000,"role":"basic","scope":"chat:read chat:write"}"#;

    fn token(header: &str, claims: &str) -> String {
        token_with(header, claims, &[0; 64])
    }

    fn token_with(header: &str, claims: &str, signature: &[u8]) -> String {
        [header.as_bytes(), claims.as_bytes(), signature].map(|part| BASE64URL.encode(part)).join(".")
    }

    fn error(token: &str) -> Malformed {
        read(token.as_bytes()).unwrap_err()
    }

    #[test]
    fn a_good_token_is_read() {
        let text = token(HEADER, CLAIMS);
        let read = read(text.as_bytes()).unwrap();
        assert_eq!(read.alg, Algorithm::ES256);
        assert_eq!(read.kid, "k1");
        assert_eq!(read.claims.sub, "key_1");
        assert_eq!((read.claims.iat, read.claims.exp), (1000, 2000));
        assert_eq!(read.claims.own, None);
        assert_eq!(read.signing_input, text.rsplit_once('.').unwrap().0.as_bytes());
        // What is written is read back the same.
        assert_eq!(serde_json::to_string(&read.claims).unwrap(), CLAIMS);
        assert_eq!(read.claims.holder(), Holder { key_id: "key_1", owner: None, limit_role: "basic" });
    }

    #[test]
    fn a_key_may_have_an_owner_and_the_limit_of_another_role() {
        let claims = CLAIMS.replace('}', r#","own":"acme","lrole":"contributor"}"#);
        let text = token(HEADER, &claims);
        let read = read(text.as_bytes()).unwrap();
        let holder = Holder { key_id: "key_1", owner: Some("acme"), limit_role: "contributor" };
        assert_eq!(read.claims.holder(), holder);
        assert_eq!(serde_json::to_string(&read.claims).unwrap(), claims);
        for wrong in [r#""""#, r#""a b""#, "1", "null"] {
            let claims = CLAIMS.replace('}', &format!(r#","lrole":{wrong}}}"#));
            assert_eq!(error(&token(HEADER, &claims)), Malformed::Claim, "{wrong}");
        }
    }

    #[test]
    fn a_header_says_alg_kid_and_typ_and_nothing_else() {
        for header in [
            r#"{"alg":"none","kid":"k1","typ":"apikey+jwt"}"#,
            r#"{"alg":"None","kid":"k1","typ":"apikey+jwt"}"#,
            r#"{"alg":"RS256","kid":"k1","typ":"apikey+jwt"}"#,
            r#"{"alg":"es256","kid":"k1","typ":"apikey+jwt"}"#,
            r#"{"kid":"k1","typ":"apikey+jwt"}"#,
            r#"{"alg":"ES256","typ":"apikey+jwt"}"#,
            r#"{"alg":"ES256","kid":"k1"}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"JWT"}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"application/apikey+jwt"}"#,
            r#"{"alg":"ES256","kid":"","typ":"apikey+jwt"}"#,
            r#"{"alg":"ES256","kid":1,"typ":"apikey+jwt"}"#,
            r#"{"alg":["ES256"],"kid":"k1","typ":"apikey+jwt"}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","crit":["exp"]}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","crit":[]}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","b64":false}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","b64":true}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","jwk":{}}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","jku":"https://a"}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","x5c":["a"]}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","x5t#S256":"a"}"#,
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt","cty":"JWT"}"#,
        ] {
            assert_eq!(error(&token(header, CLAIMS)), Malformed::Header, "{header}");
        }
        for header in [
            "",
            "[]",
            "\"a\"",
            r#"{"alg":"ES256","kid":"k1","typ":"apikey+jwt"} x"#,
            r#"{"alg":"none","alg":"ES256","kid":"k1","typ":"apikey+jwt"}"#,
            r#"{"alg":"ES256","kid":"k1","k\u0069d":"k2","typ":"apikey+jwt"}"#,
        ] {
            assert_eq!(error(&token(header, CLAIMS)), Malformed::HeaderJson, "{header}");
        }
    }

    #[test]
    fn a_claim_is_there_of_its_type_and_in_range() {
        for (from, to) in [
            (r#""iss":"keygate""#, r#""iss":["keygate"]"#),
            (r#""iss":"keygate","#, ""),
            (r#""sub":"key_1","#, ""),
            (r#""jti":"j1","#, ""),
            (r#""iat":1000,"#, ""),
            (r#""exp":2000,"#, ""),
            (r#""jti":"j1""#, r#""jti":["j1"]"#),
            (r#""jti":"j1""#, r#""jti":"""#),
            (r#""jti":"j1""#, r#""jti":null"#),
            (r#""jti":"j1""#, r#""jti":"a b""#),
            (r#""jti":"j1""#, r#""jti":"a\n""#),
            (r#""jti":"j1""#, r#""jti":"ä""#),
            (r#""exp":2000"#, r#""exp":"2000""#),
            (r#""exp":2000"#, r#""exp":2000.0"#),
            (r#""exp":2000"#, r#""exp":2e3"#),
            (r#""exp":2000"#, r#""exp":-1"#),
            (r#""exp":2000"#, r#""exp":18446744073709551615"#),
            (r#""exp":2000"#, r#""exp":99999999999999999999"#),
            (r#""exp":2000"#, r#""exp":253402300800"#),
            (r#""exp":2000"#, r#""exp":1000"#),
            (r#""exp":2000"#, r#""exp":2000,"nbf":"0""#),
            (r#""role":"basic""#, r#""role":{}"#),
            (r#""role":"basic","#, ""),
            (r#""scope":"chat:read chat:write""#, r#""scope":["chat:read"]"#),
            (r#""scope":"chat:read chat:write""#, r#""scope":"a  b""#),
            (r#""scope":"chat:read chat:write""#, r#""scope":" a""#),
            (r#""scope":"chat:read chat:write""#, r#""scope":"a\"b""#),
            (r#""role":"basic""#, r#""role":"basic","aud":["a"]"#),
            (r#""role":"basic""#, r#""role":"basic","own":1"#),
        ] {
            let claims = CLAIMS.replace(from, to);
            assert_ne!(claims, CLAIMS, "{from}");
            assert_eq!(error(&token(HEADER, &claims)), Malformed::Claim, "{to}");
        }
        for (from, to) in [
            (r#""jti":"j1""#, r#""jti":"j1","jti":"j1""#),
            (r#""jti":"j1""#, r#""jti":"j1","\u006ati":"j2""#),
            (r#""jti":"j1""#, r#""jti":"j1","x":{"a":1,"a":2}"#),
        ] {
            assert_eq!(error(&token(HEADER, &CLAIMS.replace(from, to))), Malformed::ClaimsJson, "{to}");
        }
    }

    #[test]
    fn only_canonical_base64url_in_three_parts() {
        let good = token(HEADER, CLAIMS);
        let last = good.chars().last().unwrap();
        assert_eq!(last, 'A');
        let bent = format!("{}B", &good[..good.len() - 1]); // same bytes, other trailing bits
        for bad in [
            String::new(),
            ".".into(),
            "a.b.c.d".into(),
            format!("{good}="),
            format!("{good}=="),
            format!(" {good}"),
            format!("{good}\n"),
            format!("{good}."),
            format!(".{good}"),
            good.replacen('.', "..", 1),
            good.replacen('e', "+", 1),
            good.replacen('e', "/", 1),
            bent,
        ] {
            assert!(matches!(error(&bad), Malformed::Encoding), "{bad}: {:?}", error(&bad));
        }
        assert_eq!(read(b"\xff.\xff.\xff").unwrap_err(), Malformed::Encoding);
        assert_eq!(error(&token_with(HEADER, CLAIMS, &[0; 63])), Malformed::Signature);
        assert_eq!(error(&token_with(HEADER, CLAIMS, &[])), Malformed::Signature);
        assert_eq!(error(&"a".repeat(MAX_TOKEN_BYTES + 1)), Malformed::TooLong);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = read(&bytes);
        }

        #[test]
        fn any_json_is_read_without_panic(header in ".{0,80}", claims in ".{0,200}") {
            let _ = read(token(&header, &claims).as_bytes());
        }

        /// One changed byte never yields a token with the same signed bytes and the same signature: the
        /// encoding has one spelling.
        #[test]
        fn a_changed_byte_is_another_token(position in 0usize..200, byte in any::<u8>()) {
            let good = token(HEADER, CLAIMS).into_bytes();
            let mut bent = good.clone();
            let position = position % bent.len();
            prop_assume!(bent[position] != byte);
            bent[position] = byte;
            if let Ok(read) = read(&bent) {
                let original = super::read(&good).unwrap();
                prop_assert!(read.signing_input != original.signing_input || read.signature != original.signature);
            }
        }
    }
}
