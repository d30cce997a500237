//! What a refused client is told. Little: the precise reason is for metrics and logs
//! ([`crate::decide::Reason`]).

/// How a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The route needs a key and there is none.
    MissingCredential,
    /// There is a key and it does not count, for whatever reason.
    InvalidToken,
    /// More than one credential.
    TooManyCredentials,
    /// The key counts but may not do this.
    InsufficientScope,
    /// The policy has no such route.
    NoRoute,
    /// The key's quota is spent.
    RateLimited,
    /// Keygate itself cannot decide now. Never a client's fault, so never a 401.
    Unavailable,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::MissingCredential,
        Self::InvalidToken,
        Self::TooManyCredentials,
        Self::InsufficientScope,
        Self::NoRoute,
        Self::RateLimited,
        Self::Unavailable,
    ];

    /// The HTTP status.
    pub const fn status(self) -> u16 {
        match self {
            Self::MissingCredential | Self::InvalidToken => 401,
            Self::TooManyCredentials => 400,
            Self::InsufficientScope | Self::NoRoute => 403,
            Self::RateLimited => 429,
            Self::Unavailable => 503,
        }
    }

    /// The stable code of the problem document.
    pub const fn code(self) -> &'static str {
        match self {
            Self::MissingCredential => "missing_credential",
            Self::InvalidToken => "invalid_token",
            Self::TooManyCredentials => "too_many_credentials",
            Self::InsufficientScope => "insufficient_scope",
            Self::NoRoute => "no_route",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::MissingCredential | Self::InvalidToken => "Unauthorized",
            Self::TooManyCredentials => "Bad Request",
            Self::InsufficientScope | Self::NoRoute => "Forbidden",
            Self::RateLimited => "Too Many Requests",
            Self::Unavailable => "Service Unavailable",
        }
    }

    /// One sentence that says what the client can do.
    pub const fn detail(self) -> &'static str {
        match self {
            Self::MissingCredential => {
                "Send an API key in the header 'Authorization: Bearer <key>' or 'x-api-key: <key>'."
            }
            Self::InvalidToken => "The API key is not valid.",
            Self::TooManyCredentials => "Send exactly one API key, in one header.",
            Self::InsufficientScope => "The API key does not permit this request.",
            Self::NoRoute => "This path and method are not offered.",
            Self::RateLimited => "The API key's rate limit is reached; retry later.",
            Self::Unavailable => "API keys cannot be checked at the moment; retry later.",
        }
    }

    /// The body, a problem document (RFC 9457).
    pub fn body(self) -> String {
        format!(
            r#"{{"type":"about:blank","title":"{}","status":{},"code":"{}","detail":"{}"}}"#,
            self.title(),
            self.status(),
            self.code(),
            self.detail(),
        )
    }

    /// The `WWW-Authenticate` challenge (RFC 6750 section 3), for those that have one. `realm` must be
    /// free of quotes and backslashes; `scopes` are those of the route.
    pub fn challenge(self, realm: &str, scopes: &[String]) -> Option<String> {
        let error = match self {
            Self::MissingCredential => return Some(format!("Bearer realm=\"{realm}\"")),
            Self::InvalidToken => "invalid_token",
            Self::TooManyCredentials => "invalid_request",
            Self::InsufficientScope => "insufficient_scope",
            Self::NoRoute | Self::RateLimited | Self::Unavailable => return None,
        };
        let mut challenge =
            format!("Bearer realm=\"{realm}\", error=\"{error}\", error_description=\"{}\"", self.detail());
        if self == Self::InsufficientScope && !scopes.is_empty() {
            challenge.push_str(&format!(", scope=\"{}\"", scopes.join(" ")));
        }
        Some(challenge)
    }

    /// Seconds for `Retry-After`, for those that have one and do not compute it.
    pub const fn retry_after(self) -> Option<u32> {
        match self {
            Self::Unavailable => Some(1),
            Self::MissingCredential
            | Self::InvalidToken
            | Self::TooManyCredentials
            | Self::InsufficientScope
            | Self::NoRoute
            | Self::RateLimited => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_json_with_the_status_and_the_code() {
        for refusal in Refusal::ALL {
            let body: serde_json::Value = serde_json::from_str(&refusal.body()).unwrap();
            assert_eq!(body["status"], refusal.status());
            assert_eq!(body["code"], refusal.code());
        }
    }

    #[test]
    fn challenges_are_those_of_rfc_6750() {
        let of = |refusal: Refusal| refusal.challenge("api", &["a:read".into(), "b".into()]);
        assert_eq!(of(Refusal::MissingCredential).unwrap(), "Bearer realm=\"api\"");
        assert_eq!(
            of(Refusal::InvalidToken).unwrap(),
            "Bearer realm=\"api\", error=\"invalid_token\", error_description=\"The API key is not valid.\""
        );
        assert!(of(Refusal::TooManyCredentials).unwrap().contains("error=\"invalid_request\""));
        assert!(of(Refusal::InsufficientScope).unwrap().ends_with("scope=\"a:read b\""));
        assert_eq!(of(Refusal::NoRoute), None);
        assert_eq!(of(Refusal::Unavailable), None);
    }
}
