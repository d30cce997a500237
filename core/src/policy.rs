//! The route policy: which requests need which key. Routes are tried in order, the first match wins, and
//! what matches none is refused.

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
    /// What a request costs of the key's quota.
    #[serde(default = "one")]
    pub cost: u32,
    /// What holds when the state is too old.
    #[serde(default)]
    pub stale: Stale,
}

fn one() -> u32 {
    1
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
    pub fn route(&self, method: &[u8], path: &[u8]) -> Option<&Route> {
        self.routes.iter().find(|route| route.matches(method, path))
    }

    /// Whether any route goes on without news from the control plane.
    pub fn allows_stale(&self) -> bool {
        self.routes.iter().any(|route| route.stale == Stale::Allow)
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
    // The proxy normalises the path before the policy sees it: these would never match.
    if path.contains("//") || fixed.split('/').any(|segment| segment == "." || segment == "..") {
        return Err("must be normalised: no '//', '.' or '..' segments");
    }
    Ok(())
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
    use super::*;

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
        for path in ["/", "/a", "/a/b"] {
            assert!(policy.route(b"GET", path.as_bytes()).is_some(), "{path}");
        }
    }

    #[test]
    fn every_error_is_named_at_once() {
        let policy = policy(
            r#"{"routes":[
                {"name":"","path":"x","methods":["get"],"access":"public","scopes":["a b"]},
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
