//! Where Redis is: what an operator typed as `--redis`.
//!
//! ```text
//! redis://[[user]:password@]host[:port][/database]
//! redis+sentinel://[[user]:password@]host[:port][,host[:port]…][/master name][/database]
//! redis+cluster://[[user]:password@]host[:port][,host[:port]…]
//! ```
//!
//! `rediss` instead of `redis` is with TLS, to Sentinels too; `?ca=FILE` names the roots to trust. User and
//! password are for the Redis servers, `?sentinel_username=` and `?sentinel_password=` for the Sentinels.
//! What may be part of a password is percent-encoded, and no error repeats a piece of the URL: a password
//! with a bare `/` or `@` in it makes any piece look like something else.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use keygate_core::secret::Secret;

const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// The name of the master that Sentinel's own example configuration gives it.
const MASTER_NAME: &str = "mymaster";

/// Where Redis is and how to get in. `Display` and `Debug` print its URL without the passwords.
#[derive(Clone)]
pub struct Target {
    pub(crate) servers: Servers,
    pub(crate) credentials: Credentials,
    pub(crate) database: u32,
    pub(crate) tls: Option<Tls>,
}

/// The servers that are named, at least one each.
#[derive(Clone)]
pub(crate) enum Servers {
    One(Address),
    Sentinels { addresses: Vec<Address>, master: String, credentials: Credentials },
    Cluster { seeds: Vec<Address> },
}

/// A host, without brackets if it is an IPv6 address, and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// What to log in with; nothing for the default user without a password.
#[derive(Clone, Default)]
pub(crate) struct Credentials {
    pub(crate) user: Option<String>,
    pub(crate) password: Option<Secret<String>>,
}

/// With TLS, verified by these roots; by those of browsers if none are named.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    pub(crate) ca: Option<PathBuf>,
}

/// Why a URL does not say where Redis is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Another scheme, or none.
    #[error(
        "the URL must begin with redis://, rediss:// (TLS), redis+sentinel://, rediss+sentinel://, redis+cluster:// or rediss+cluster://"
    )]
    Scheme,
    /// A user without a password.
    #[error(
        "what stands before the '@' must be user:password, or :password without a user; in them '%', '/', '?', '#' and ':' are written %25, %2F, %3F, %23 and %3A"
    )]
    Credentials,
    /// A `%` without two hexadecimal digits that give UTF-8.
    #[error("a '%' must begin a percent-encoded character, like %2F for '/'; '%' itself is written %25")]
    Percent,
    /// A `#`.
    #[error("a '#' must be written %23")]
    Fragment,
    /// No host, or one that is none.
    #[error(
        "a host must be a name or an address, IPv6 in brackets; if it is part of the password, write its '@', '/', '?' and '#' as %40, %2F, %3F and %23"
    )]
    Host,
    /// Several hosts where one is expected.
    #[error("several hosts are for redis+sentinel:// or redis+cluster://")]
    Hosts,
    /// No port number.
    #[error(
        "a port must be a number from 1 to 65535; if it is part of the password, write its '@', '/', '?' and '#' as %40, %2F, %3F and %23"
    )]
    Port,
    /// No database number.
    #[error("the database must be a number, as in redis://host:6379/0")]
    Database,
    /// A database in a Cluster.
    #[error("a cluster has no database but 0: nothing may follow the hosts, except '?' and parameters")]
    ClusterDatabase,
    /// An empty master's name, or too many parts.
    #[error("after the hosts come the master's name and the database, as in /mymaster/0")]
    Master,
    /// A parameter that is unknown, without a value, or there twice.
    #[error("the parameters are ca=FILE, sentinel_username=NAME and sentinel_password=PASSWORD, each once")]
    Parameter,
    /// `ca` without TLS.
    #[error("ca= is for TLS: write rediss:// instead of redis://")]
    CaWithoutTls,
    /// Sentinel parameters without Sentinels.
    #[error("sentinel_username= and sentinel_password= are for redis+sentinel://")]
    NoSentinels,
    /// A Sentinel user without a password.
    #[error("sentinel_username= needs sentinel_password= too")]
    SentinelPassword,
}

impl Target {
    /// Whether it is a Cluster.
    pub fn is_cluster(&self) -> bool {
        matches!(self.servers, Servers::Cluster { .. })
    }

    /// Whether it is found by Sentinels.
    pub fn is_sentinel(&self) -> bool {
        matches!(self.servers, Servers::Sentinels { .. })
    }

    /// The number of the database.
    pub fn database(&self) -> u32 {
        self.database
    }

    /// The file with the roots to trust, if one is named.
    pub(crate) fn ca(&self) -> Option<&Path> {
        self.tls.as_ref()?.ca.as_deref()
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(url: &str) -> Result<Self, TargetError> {
        let (scheme, rest) = url.trim().split_once("://").ok_or(TargetError::Scheme)?;
        let (tls, kind) = scheme_of(scheme).ok_or(TargetError::Scheme)?;
        if rest.contains('#') {
            return Err(TargetError::Fragment);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (credentials, hosts) = match authority.rsplit_once('@') {
            Some((login, hosts)) => (Credentials::parse(login)?, hosts),
            None => (Credentials::default(), authority),
        };
        let parameters = Parameters::parse(query)?;
        let path: Vec<&str> = path.trim_end_matches('/').split('/').filter(|_| !path.is_empty()).collect();
        let (servers, database) = match kind {
            Kind::One => {
                let [address] = <[Address; 1]>::try_from(addresses(hosts, REDIS_PORT)?)
                    .map_err(|_| TargetError::Hosts)?;
                let database = match path[..] {
                    [] => 0,
                    [number] => database(number)?,
                    _ => return Err(TargetError::Database),
                };
                (Servers::One(address), database)
            }
            Kind::Sentinel => {
                let (name, number) = match path[..] {
                    [] => (MASTER_NAME, 0),
                    [name] => (name, 0),
                    [name, number] => (name, database(number)?),
                    _ => return Err(TargetError::Master),
                };
                if name.is_empty() {
                    return Err(TargetError::Master);
                }
                let servers = Servers::Sentinels {
                    addresses: addresses(hosts, SENTINEL_PORT)?,
                    master: decode(name)?.expose().clone(),
                    credentials: parameters.sentinel.clone(),
                };
                (servers, number)
            }
            Kind::Cluster => {
                if !matches!(path[..], [] | ["0"]) {
                    return Err(TargetError::ClusterDatabase);
                }
                (Servers::Cluster { seeds: addresses(hosts, REDIS_PORT)? }, 0)
            }
        };
        if parameters.ca.is_some() && !tls {
            return Err(TargetError::CaWithoutTls);
        }
        if parameters.sentinel.password.is_some() && !matches!(kind, Kind::Sentinel) {
            return Err(TargetError::NoSentinels);
        }
        Ok(Self { servers, credentials, database, tls: tls.then_some(Tls { ca: parameters.ca }) })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, addresses) = match &self.servers {
            Servers::One(address) => ("", std::slice::from_ref(address)),
            Servers::Sentinels { addresses, .. } => ("+sentinel", addresses.as_slice()),
            Servers::Cluster { seeds } => ("+cluster", seeds.as_slice()),
        };
        write!(f, "redis{}{kind}://", if self.tls.is_some() { "s" } else { "" })?;
        if self.credentials.password.is_some() {
            write!(f, "{}:***@", self.credentials.user.as_deref().unwrap_or_default())?;
        }
        f.write_str(&addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(","))?;
        if let Servers::Sentinels { master, .. } = &self.servers {
            write!(f, "/{master}")?;
        }
        if self.database != 0 {
            write!(f, "/{}", self.database)?;
        }
        let mut parameters = Vec::new();
        if let Some(ca) = self.ca() {
            parameters.push(format!("ca={}", ca.display()));
        }
        if let Servers::Sentinels { credentials: Credentials { user, password: Some(_) }, .. } = &self.servers
        {
            parameters.extend(user.iter().map(|user| format!("sentinel_username={user}")));
            parameters.push("sentinel_password=***".to_owned());
        }
        if !parameters.is_empty() {
            write!(f, "?{}", parameters.join("&"))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Credentials {
    fn parse(text: &str) -> Result<Self, TargetError> {
        let (user, password) = text.split_once(':').ok_or(TargetError::Credentials)?;
        if password.is_empty() || password.contains(':') {
            return Err(TargetError::Credentials);
        }
        let user = Some(user).filter(|user| !user.is_empty()).map(decode).transpose()?;
        Ok(Self { user: user.map(|user| user.expose().clone()), password: Some(decode(password)?) })
    }
}

#[derive(Clone, Copy)]
enum Kind {
    One,
    Sentinel,
    Cluster,
}

/// Whether it is with TLS, and what it leads to.
fn scheme_of(scheme: &str) -> Option<(bool, Kind)> {
    Some(match scheme.to_ascii_lowercase().as_str() {
        "redis" => (false, Kind::One),
        "rediss" => (true, Kind::One),
        "redis+sentinel" | "redis-sentinel" => (false, Kind::Sentinel),
        "rediss+sentinel" | "rediss-sentinel" => (true, Kind::Sentinel),
        "redis+cluster" | "redis-cluster" => (false, Kind::Cluster),
        "rediss+cluster" | "rediss-cluster" => (true, Kind::Cluster),
        _ => return None,
    })
}

#[derive(Default)]
struct Parameters {
    ca: Option<PathBuf>,
    sentinel: Credentials,
}

impl Parameters {
    fn parse(query: &str) -> Result<Self, TargetError> {
        let mut parameters = Self::default();
        for parameter in query.split('&').filter(|_| !query.is_empty()) {
            let (name, value) = parameter.split_once('=').ok_or(TargetError::Parameter)?;
            let value = decode(value)?;
            let sentinel = &mut parameters.sentinel;
            let given_before = match name {
                _ if value.expose().is_empty() => true,
                "ca" => parameters.ca.replace(value.expose().into()).is_some(),
                "sentinel_username" => sentinel.user.replace(value.expose().clone()).is_some(),
                "sentinel_password" => sentinel.password.replace(value).is_some(),
                _ => true,
            };
            if given_before {
                return Err(TargetError::Parameter);
            }
        }
        if parameters.sentinel.user.is_some() && parameters.sentinel.password.is_none() {
            return Err(TargetError::SentinelPassword);
        }
        Ok(parameters)
    }
}

fn addresses(text: &str, default_port: u16) -> Result<Vec<Address>, TargetError> {
    text.split(',').map(|text| address(text, default_port)).collect()
}

fn address(text: &str, default_port: u16) -> Result<Address, TargetError> {
    let (host, port) = match text.strip_prefix('[') {
        Some(text) => {
            let (host, rest) = text.split_once(']').ok_or(TargetError::Host)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| TargetError::Host)?;
            let port = match rest.strip_prefix(':') {
                Some(port) => Some(port),
                None if rest.is_empty() => None,
                None => return Err(TargetError::Host),
            };
            (host, port)
        }
        None => {
            let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
            let in_a_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
            if host.is_empty() || !host.chars().all(in_a_name) {
                return Err(TargetError::Host);
            }
            (host, port)
        }
    };
    let port = match port {
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or(TargetError::Port)?,
        None => default_port,
    };
    Ok(Address { host: host.to_owned(), port })
}

fn database(text: &str) -> Result<u32, TargetError> {
    text.parse().map_err(|_| TargetError::Database)
}

/// Percent-decodes (RFC 3986, section 2.1), strictly: what a lenient reader would let pass is most likely
/// a password that was not encoded.
fn decode(text: &str) -> Result<Secret<String>, TargetError> {
    let mut bytes = Secret::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.expose_mut().push(byte);
            continue;
        }
        let (digits, after) = rest.split_first_chunk::<2>().ok_or(TargetError::Percent)?;
        let digit = |digit: u8| char::from(digit).to_digit(16).ok_or(TargetError::Percent);
        bytes.expose_mut().push((digit(digits[0])? * 16 + digit(digits[1])?) as u8);
        rest = after;
    }
    let text = std::str::from_utf8(bytes.expose()).map_err(|_| TargetError::Percent)?;
    Ok(Secret::new(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_is_understood() {
        for (url, printed) in [
            ("redis://localhost", "redis://localhost:6379"),
            ("redis://localhost/", "redis://localhost:6379"),
            (" rediss://r.example.com:6380/3 ", "rediss://r.example.com:6380/3"),
            ("redis://:pw@10.0.0.1:7000", "redis://:***@10.0.0.1:7000"),
            ("redis://keygate:pw@[::1]/2", "redis://keygate:***@[::1]:6379/2"),
            ("rediss://a:b@h?ca=/etc/ca%20file.pem", "rediss://a:***@h:6379?ca=/etc/ca file.pem"),
            ("redis+sentinel://s1", "redis+sentinel://s1:26379/mymaster"),
            (
                "redis-sentinel://u:pw@s1,[fe80::1]:7,s3:26380/main/1",
                "redis+sentinel://u:***@s1:26379,[fe80::1]:7,s3:26380/main/1",
            ),
            (
                "rediss+sentinel://s1/m?sentinel_username=u&sentinel_password=secret",
                "rediss+sentinel://s1:26379/m?sentinel_username=u&sentinel_password=***",
            ),
            ("redis+cluster://h1:7000,h2:7001/0", "redis+cluster://h1:7000,h2:7001"),
            ("REDISS+CLUSTER://h1", "rediss+cluster://h1:6379"),
        ] {
            let target: Target = url.parse().unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(target.to_string(), printed, "{url}");
            assert_eq!(format!("{target:?}"), format!("Target({printed})"));
        }
    }

    #[test]
    fn passwords_are_decoded() {
        let target: Target = "redis://na%3Ame:p%40ss%2F%25w@rd@h".parse().unwrap();
        assert_eq!(target.credentials.user.as_deref(), Some("na:me"));
        assert_eq!(
            target.credentials.password.as_ref().map(|text| text.expose().as_str()),
            Some("p@ss/%w@rd")
        );
        let target: Target = "redis+sentinel://:a@h?sentinel_password=%C3%A9".parse().unwrap();
        let Servers::Sentinels { credentials, .. } = target.servers else { panic!("no Sentinels") };
        assert_eq!(credentials.password.as_ref().map(|text| text.expose().as_str()), Some("é"));
        assert_eq!(target.credentials.password.as_ref().map(|text| text.expose().as_str()), Some("a"));
    }

    #[test]
    fn what_is_wrong_is_said_and_no_piece_of_a_password_with_it() {
        // "sec" and "ret" are pieces of the password "sec/ret" and the like.
        for (url, error) in [
            ("", TargetError::Scheme),
            ("localhost:6379", TargetError::Scheme),
            ("secret@localhost", TargetError::Scheme),
            ("http://h", TargetError::Scheme),
            ("unix:///run/redis.sock", TargetError::Scheme),
            ("redis://secret@h", TargetError::Credentials),
            ("redis://u:@h", TargetError::Credentials),
            ("redis://u:sec:ret@h", TargetError::Credentials),
            ("redis://u:sec%ret@h", TargetError::Percent),
            ("redis://u:secret%F@h", TargetError::Percent),
            ("redis://u:secret%ff@h", TargetError::Percent),
            ("redis://u:sec#ret@h", TargetError::Fragment),
            ("redis://u:sec/ret@h", TargetError::Port),
            ("redis://u:sec?ret@h", TargetError::Parameter),
            ("redis://", TargetError::Host),
            ("redis://:6379", TargetError::Host),
            ("redis://:secret@", TargetError::Host),
            ("redis://::1", TargetError::Host),
            ("redis://[h]:1", TargetError::Host),
            ("redis://[::1", TargetError::Host),
            ("redis://[::1]6379", TargetError::Host),
            ("redis://a b", TargetError::Host),
            ("redis://h:0", TargetError::Port),
            ("redis://h:65536", TargetError::Port),
            ("redis://h:", TargetError::Port),
            ("redis://h:1:2", TargetError::Port),
            ("redis://a,b", TargetError::Hosts),
            ("redis://h/x", TargetError::Database),
            ("redis://h/-1", TargetError::Database),
            ("redis://h/1/2", TargetError::Database),
            ("redis+sentinel://h,", TargetError::Host),
            ("redis+sentinel://h//1", TargetError::Master),
            ("redis+sentinel://h/m/x", TargetError::Database),
            ("redis+sentinel://h/m/1/2", TargetError::Master),
            ("redis+sentinel://h?sentinel_username=u", TargetError::SentinelPassword),
            ("redis://h?sentinel_password=secret", TargetError::NoSentinels),
            ("redis+cluster://h/1", TargetError::ClusterDatabase),
            ("redis://h?ca=/x", TargetError::CaWithoutTls),
            ("rediss://h?ca=", TargetError::Parameter),
            ("rediss://h?ca=a&ca=b", TargetError::Parameter),
            ("rediss://h?CA=a", TargetError::Parameter),
            ("rediss://h?secret", TargetError::Parameter),
        ] {
            let found = url.parse::<Target>().expect_err(url);
            assert_eq!(found, error, "{url}");
            let said = format!("{found} {found:?}");
            assert!(!said.contains("sec") && !said.contains("ret@"), "{url}: {said}");
        }
    }
}
