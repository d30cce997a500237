//! The route policy: which requests need which key. Routes are tried in order, the first match wins, and
//! what matches none is refused.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::token;

/// The most routes of a policy.
pub const MAX_ROUTES: usize = 1_000;

/// The policy document, as operators write it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Whether refusals are carried out.
    #[serde(default)]
    pub mode: Mode,
    /// The routes, in order.
    pub routes: Vec<Route>,
}

/// Whether refusals are carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Refuse what is to be refused.
    #[default]
    Enforce,
    /// Decide and count everything, refuse nothing.
    Shadow,
}

/// Who may pass a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Anybody; no key is looked at.
    Public,
    /// Whoever has a key with the route's scopes and one of its roles.
    Key,
}

/// What a proxy does that has not heard of its control plane for longer than the hard age.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stale {
    /// Refuse with 503.
    #[default]
    Deny,
    /// Go on with the state that it has. Revocations may then be missed for as long as it is cut off.
    Allow,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Its name in metrics and logs.
    pub name: String,
    /// A path, or one that ends in `/*` for it and everything below.
    pub path: String,
    /// The methods it is about; none named, all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
    /// Who may pass.
    pub access: Access,
    /// Scopes that the key must have, all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scopes: Vec<String>,
    /// Roles of which the key must have one; none named, any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<String>,
    /// Units that a request takes of its limit; 0: it is not counted.
    #[serde(default = "one")]
    pub cost: u32,
    /// What holds when the state is too old.
    #[serde(default)]
    pub stale: Stale,
    /// What the upstream is told of the key; not named, all of it.
    #[serde(default, skip_serializing_if = "Told::is_all")]
    pub forward: Told,
}

fn one() -> u32 {
    1
}

/// One thing that an upstream can be told of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// `x-keygate-key-id`.
    KeyId,
    /// `x-keygate-role`.
    Role,
    /// `x-keygate-scopes`.
    Scopes,
    /// `x-keygate-owner`.
    Owner,
}

impl Identity {
    const ALL: [Self; 4] = [Self::KeyId, Self::Role, Self::Scopes, Self::Owner];
}

/// What a route's upstream is told of a key: all of it, unless the policy names less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Identity>", into = "Vec<Identity>")]
pub struct Told([bool; Identity::ALL.len()]);

impl Told {
    /// Whether it is all.
    pub fn is_all(&self) -> bool {
        *self == Self::default()
    }

    /// The parts that are told.
    pub fn parts(self) -> impl Iterator<Item = Identity> {
        Identity::ALL.into_iter().zip(self.0).filter_map(|(part, told)| told.then_some(part))
    }
}

impl Default for Told {
    fn default() -> Self {
        Self([true; Identity::ALL.len()])
    }
}

impl From<Vec<Identity>> for Told {
    fn from(parts: Vec<Identity>) -> Self {
        Self(Identity::ALL.map(|part| parts.contains(&part)))
    }
}

impl From<Told> for Vec<Identity> {
    fn from(told: Told) -> Self {
        told.parts().collect()
    }
}

/// What is wrong with a policy, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{at}: {problem}")]
pub struct PolicyError {
    /// The place, such as `routes[3].path`.
    pub at: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl Policy {
    /// The first route that matches. `path` has no query.
    ///
    /// Letters that are percent-encoded without need are the letters that they stand for (RFC 3986 section
    /// 6.2.2.2), and a path that an upstream could read as another one matches nothing: see
    /// [`canonical_path`]. Else `/%61dmin` would be public where `/admin` is not.
    pub fn route(&self, method: &[u8], path: &[u8]) -> Option<&Route> {
        let path = canonical_path(path)?;
        self.routes.iter().find(|route| route.matches(method, &path))
    }

    /// Whether anything goes on without news from the control plane: a route that says so, or all of them
    /// in shadow mode, which refuses nothing.
    pub fn allows_stale(&self) -> bool {
        self.mode == Mode::Shadow || self.routes.iter().any(|route| route.stale == Stale::Allow)
    }

    /// Everything that is wrong with it.
    ///
    /// # Errors
    /// At least one, each with its place.
    pub fn validate(&self) -> Result<(), Vec<PolicyError>> {
        let mut errors = Vec::new();
        if self.routes.len() > MAX_ROUTES {
            errors.push(PolicyError {
                at: "routes".into(),
                problem: format!("{} routes; at most {MAX_ROUTES}", self.routes.len()),
            });
        }
        for (index, route) in self.routes.iter().enumerate() {
            let mut wrong = |member: &str, problem: String| {
                errors.push(PolicyError { at: format!("routes[{index}].{member}"), problem });
            };
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.';
            if !(1..=64).contains(&route.name.len()) || !route.name.bytes().all(plain) {
                wrong("name", "must be 1 to 64 letters, digits, '_', '-' or '.'".into());
            }
            if self.routes.iter().take(index).any(|other| other.name == route.name) {
                wrong("name", format!("{:?} stands twice; names tell routes apart in metrics", route.name));
            }
            if let Err(problem) = check_path(&route.path) {
                wrong("path", problem.into());
            }
            for method in &route.methods {
                if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-') {
                    wrong("methods", format!("{method:?} is no method; write it in capitals, as in \"GET\""));
                }
            }
            for scope in &route.scopes {
                if scope.is_empty() || scope.contains(' ') || !token::is_scope(scope) {
                    wrong("scopes", format!("{scope:?} is no scope; one word of visible ASCII"));
                }
            }
            for role in &route.roles {
                if !token::is_identifier(role) {
                    wrong("roles", format!("{role:?} is no role; one word of visible ASCII"));
                }
            }
            if route.access == Access::Public && !route.forward.is_all() {
                wrong("forward", "a public route looks at no key and tells nothing of one; drop it".into());
            }
            if route.access == Access::Public && !(route.scopes.is_empty() && route.roles.is_empty()) {
                wrong(
                    "access",
                    "a public route looks at no key: drop its scopes and roles, or say \"key\"".into(),
                );
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    let fixed = path.strip_suffix("/*").unwrap_or(path);
    if !path.starts_with('/') {
        return Err("must begin with '/'");
    }
    if fixed.contains('*') {
        return Err("'*' may stand only at the end, as in \"/api/*\"");
    }
    if path.bytes().any(|b| !b.is_ascii_graphic() || b == b'?' || b == b'#') {
        return Err("must be visible ASCII without query or fragment");
    }
    match canonical_path(fixed.as_bytes()) {
        Some(canonical) if *canonical == *fixed.as_bytes() => Ok(()),
        _ => Err("would never match: no '.', '..' or empty segments, no encoded letters or slashes"),
    }
}

/// A path with its needlessly percent-encoded letters decoded. `None` when upstreams may differ about which
/// path it is: dot segments, empty segments, backslashes, encoded slashes, backslashes, percent signs or
/// zero bytes, and encodings that are none. The shipped Envoy configuration normalises most of these before
/// the filter sees them; this is for configurations that do not.
pub fn canonical_path(path: &[u8]) -> Option<Cow<'_, [u8]>> {
    let path = if path.contains(&b'%') { Cow::Owned(decode_unreserved(path)?) } else { Cow::Borrowed(path) };
    if path.contains(&b'\\') {
        return None;
    }
    let mut segments = path.split(|byte| *byte == b'/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        if matches!(segment, b"." | b"..") || (segment.is_empty() && !last) {
            return None;
        }
    }
    Some(path)
}

fn decode_unreserved(path: &[u8]) -> Option<Vec<u8>> {
    let hex = |digit: &u8| char::from(*digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'%' {
            out.push(*byte);
            continue;
        }
        let (digits, tail) = rest.split_first_chunk::<2>()?;
        rest = tail;
        let value = hex(&digits[0])?.wrapping_shl(4) | hex(&digits[1])?;
        match value {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(value),
            b'/' | b'\\' | b'%' | 0 => return None,
            _ => {
                out.push(b'%');
                out.extend_from_slice(&digits.map(|digit| digit.to_ascii_uppercase()));
            }
        }
    }
    Some(out)
}

impl Route {
    /// A route that needs a key with these scopes, for deciding about something that is no proxied
    /// request, such as a call of the control plane's own API.
    pub fn keyed(name: &str, scopes: &[&str]) -> Self {
        Self {
            name: name.into(),
            path: "/*".into(),
            methods: Vec::new(),
            access: Access::Key,
            scopes: scopes.iter().map(|scope| (*scope).into()).collect(),
            roles: Vec::new(),
            cost: 1,
            stale: Stale::Deny,
            forward: Told::default(),
        }
    }

    fn matches(&self, method: &[u8], path: &[u8]) -> bool {
        let path_matches = match self.path.strip_suffix("/*") {
            Some(tree) => match path.strip_prefix(tree.as_bytes()) {
                Some(rest) => rest.is_empty() || rest.starts_with(b"/"),
                None => false,
            },
            None => path == self.path.as_bytes(),
        };
        path_matches && (self.methods.is_empty() || self.methods.iter().any(|m| m.as_bytes() == method))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_canonical_path_is_canonical(path in prop::collection::vec(any::<u8>(), 0..60), slashes in "[/.%a2fF5cC]{0,20}") {
            for path in [path, slashes.into_bytes()] {
                if let Some(once) = canonical_path(&path) {
                    let twice = canonical_path(&once).map(Cow::into_owned);
                    prop_assert_eq!(twice.as_deref(), Some(&*once));
                }
            }
        }
    }

    fn policy(json: &str) -> Policy {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_first_match_wins_by_path_segments_and_method() {
        let policy = policy(
            r#"{"routes":[
                {"name":"home","path":"/","access":"public"},
                {"name":"read","path":"/api/chat","methods":["GET","HEAD"],"access":"key","scopes":["chat:read"]},
                {"name":"write","path":"/api/chat","access":"key"},
                {"name":"tree","path":"/api/admin/*","access":"key"}]}"#,
        );
        for (method, path, name) in [
            ("GET", "/", Some("home")),
            ("GET", "/x", None),
            ("GET", "/api/chat", Some("read")),
            ("HEAD", "/api/chat", Some("read")),
            ("POST", "/api/chat", Some("write")),
            ("get", "/api/chat", Some("write")),
            ("GET", "/api/chat/", None),
            ("GET", "/api/Chat", None),
            ("GET", "/api/admin", Some("tree")),
            ("GET", "/api/admin/", Some("tree")),
            ("GET", "/api/admin/keys/1", Some("tree")),
            ("GET", "/api/administrator", None),
            ("GET", "", None),
        ] {
            let found = policy.route(method.as_bytes(), path.as_bytes()).map(|r| r.name.as_str());
            assert_eq!(found, name, "{method} {path}");
        }
        assert!(policy.validate().is_ok());
    }

    #[test]
    fn a_star_alone_matches_everything() {
        let policy = policy(r#"{"routes":[{"name":"all","path":"/*","access":"public"}]}"#);
        assert!(policy.validate().is_ok());
        for path in ["/", "/a", "/a/b", "/a/b/"] {
            assert!(policy.route(b"GET", path.as_bytes()).is_some(), "{path}");
        }
    }

    #[test]
    fn a_path_in_another_spelling_is_the_same_path_or_none() {
        for (path, canonical) in [
            ("/", Some("/")),
            ("/a/b/", Some("/a/b/")),
            ("/%61dmin", Some("/admin")),
            ("/%41%2D%2e%5F%7E%30", Some("/A-._~0")),
            ("/a%20b%c3%A4", Some("/a%20b%C3%A4")),
            ("/...", Some("/...")),
            ("/.well-known/x", Some("/.well-known/x")),
            ("", Some("")),
            ("*", Some("*")),
            ("/a/../b", None),
            ("/a/%2e%2E/b", None),
            ("/a/.", None),
            ("/..", None),
            ("//admin", None),
            ("/a//b", None),
            ("/a%2fb", None),
            ("/a%2Fb", None),
            ("/a%5cb", None),
            ("/a\\b", None),
            ("/a%00", None),
            ("/a%2561", None),
            ("/a%", None),
            ("/a%6", None),
            ("/a%6g", None),
        ] {
            let found = canonical_path(path.as_bytes()).map(|p| String::from_utf8(p.into_owned()).unwrap());
            assert_eq!(found.as_deref(), canonical, "{path}");
        }
        let policy = policy(
            r#"{"routes":[{"name":"admin","path":"/admin/*","access":"key"},{"name":"all","path":"/*","access":"public"}]}"#,
        );
        let name = |path: &str| policy.route(b"GET", path.as_bytes()).map(|route| route.name.as_str());
        assert_eq!(name("/%61dmin/x"), Some("admin"));
        assert_eq!(name("/x/../admin"), None);
        assert_eq!(name("//admin"), None);
        assert_eq!(name("/x"), Some("all"));
    }

    #[test]
    fn what_a_route_tells_is_a_list_of_names() {
        let read = |json: &str| serde_json::from_str::<Told>(json);
        assert!(read(r#"["owner", "key_id", "role", "scopes"]"#).unwrap().is_all());
        let some = read(r#"["owner", "key_id"]"#).unwrap();
        assert!(!some.is_all());
        assert_eq!(serde_json::to_string(&some).unwrap(), r#"["key_id","owner"]"#);
        assert_eq!(serde_json::to_string(&read("[]").unwrap()).unwrap(), "[]");
        assert!(read(r#"["name"]"#).unwrap_err().to_string().contains("`key_id`, `role`, `scopes`, `owner`"));
    }

    #[test]
    fn every_error_is_named_at_once() {
        let policy = policy(
            r#"{"routes":[
                {"name":"","path":"x","methods":["get"],"access":"public","scopes":["a b"],"forward":[]},
                {"name":"a","path":"/a*b","access":"key","roles":[""]},
                {"name":"a","path":"/a/../b","access":"key"},
                {"name":"b","path":"/a?x=1","access":"key"}]}"#,
        );
        let places: Vec<String> = policy.validate().unwrap_err().into_iter().map(|e| e.at).collect();
        assert_eq!(
            places,
            [
                "routes[0].name",
                "routes[0].path",
                "routes[0].methods",
                "routes[0].scopes",
                "routes[0].forward",
                "routes[0].access",
                "routes[1].path",
                "routes[1].roles",
                "routes[2].name",
                "routes[2].path",
                "routes[3].path",
            ]
        );
    }

    #[test]
    fn unknown_members_and_words_are_refused() {
        for json in [
            r#"{"routes":[],"x":1}"#,
            r#"{"routes":[{"name":"a","path":"/","access":"open"}]}"#,
            r#"{"routes":[{"name":"a","path":"/"}]}"#,
            r#"{"routes":[{"name":"a","path":"/","access":"key","scope":"x"}]}"#,
            r#"{"mode":"off","routes":[]}"#,
        ] {
            assert!(serde_json::from_str::<Policy>(json).is_err(), "{json}");
        }
    }
}
