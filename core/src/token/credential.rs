//! Finding the one credential of a request among its headers.

/// The credential of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential<'r> {
    /// None, or none that could be a key.
    None,
    /// Exactly one.
    One(&'r [u8]),
    /// More than one. Which would count is a question whose answer differs from proxy to upstream.
    Many,
}

/// Reads `Authorization: Bearer` (RFC 6750 section 2.1, the scheme in any case) and `x-api-key`.
/// Another authorization scheme is no credential of ours; header names are compared in any case.
pub fn find<'r>(headers: impl IntoIterator<Item = (&'r [u8], &'r [u8])>) -> Credential<'r> {
    let mut found = Credential::None;
    for (name, value) in headers {
        let value = if name.eq_ignore_ascii_case(b"authorization") {
            match bearer(value) {
                Some(token) => token,
                None => continue,
            }
        } else if name.eq_ignore_ascii_case(b"x-api-key") {
            value.trim_ascii()
        } else {
            continue;
        };
        // Proxies fold repeated headers into one with a comma, which no token has.
        if found != Credential::None || value.contains(&b',') {
            return Credential::Many;
        }
        found = Credential::One(value);
    }
    found
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let value = value.trim_ascii();
    let (scheme, rest) = value.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"bearer") {
        // `Basic …, Bearer …` in one header: two credentials, the second one perhaps ours.
        return value.contains(&b',').then_some(b",");
    }
    match rest.first() {
        None => Some(rest),
        Some(b' ' | b'\t') => Some(rest.trim_ascii()),
        Some(b',') => Some(rest),
        Some(_) => None, // another scheme that begins with the same letters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of<'r>(headers: &[(&'r str, &'r str)]) -> Credential<'r> {
        find(headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
    }

    #[test]
    fn exactly_one_counts() {
        assert_eq!(of(&[]), Credential::None);
        assert_eq!(of(&[("x-other", "a")]), Credential::None);
        assert_eq!(of(&[("authorization", "Bearer a.b.c")]), Credential::One(b"a.b.c"));
        assert_eq!(of(&[("Authorization", "bEARER  a.b.c ")]), Credential::One(b"a.b.c"));
        assert_eq!(of(&[("x-api-key", "a.b.c")]), Credential::One(b"a.b.c"));
        assert_eq!(of(&[("authorization", "Bearer")]), Credential::One(b""));
        assert_eq!(of(&[("authorization", "Bearer ")]), Credential::One(b""));
        assert_eq!(of(&[("x-api-key", "")]), Credential::One(b""));
        assert_eq!(of(&[("authorization", "Bearer a"), ("x-api-key", "a")]), Credential::Many);
        assert_eq!(of(&[("authorization", "Bearer a, Bearer b")]), Credential::Many);
        assert_eq!(of(&[("authorization", "Basic a, Bearer b")]), Credential::Many);
        assert_eq!(of(&[("authorization", "Bearer a,b")]), Credential::Many);
        assert_eq!(of(&[("x-api-key", "a"), ("x-api-key", "a")]), Credential::Many);
        assert_eq!(of(&[("x-api-key", "a"), ("x-api-key", "")]), Credential::Many);
    }

    #[test]
    fn other_schemes_are_none_of_ours() {
        assert_eq!(of(&[("authorization", "Basic dXNlcjpwYXNz")]), Credential::None);
        assert_eq!(of(&[("authorization", "BearerToken abc")]), Credential::None);
        assert_eq!(of(&[("authorization", "")]), Credential::None);
        assert_eq!(of(&[("authorization", "Basic dXNlcjpwYXNz"), ("x-api-key", "k")]), Credential::One(b"k"));
    }

    #[test]
    fn bytes_that_are_no_text_are_a_credential_like_any_other() {
        let headers: [(&[u8], &[u8]); 1] = [(b"authorization", b"Bearer \xff")];
        assert_eq!(find(headers), Credential::One(b"\xff"));
        let headers: [(&[u8], &[u8]); 1] = [(b"authorization", b"\xff\xff\xff\xff\xff\xff\xff")];
        assert_eq!(find(headers), Credential::None);
    }
}
