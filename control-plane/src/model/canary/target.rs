//! Where canaries may call. A definition comes by the API, so it must not lead the control plane to where only the
//! control plane can go: only hosts that the configuration names, at addresses that are checked after the name was
//! resolved and used as they were checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ::http::Uri;

use crate::platform::http_client::Guard;

const MAX_ENDPOINT_BYTES: usize = 2_000;

/// A URL with scheme, host and port, and no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// As it was typed, without a slash at the end.
    pub text: String,
    host: String,
    port: u16,
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a URL such as \"http://127.0.0.1:10000\"");
        let text = text.strip_suffix('/').unwrap_or(text);
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(format!("{text:?} must have no path"));
        }
        let (host, port) = host_and_port(&uri).ok_or_else(wrong)?;
        Ok(Self { text: text.to_owned(), host, port })
    }
}

/// The host, in lower case and without brackets, and the port of a URL without user and password.
fn host_and_port(uri: &Uri) -> Option<(String, u16)> {
    let usual = match uri.scheme_str()? {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let authority = uri.authority()?;
    if authority.as_str().contains('@') {
        return None;
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    (!host.is_empty()).then(|| (host, authority.port_u16().unwrap_or(usual)))
}

/// What may be called.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    hosts: Vec<(String, Option<u16>)>,
}

impl Allowed {
    /// The proxies that are tested, and more hosts, as `host` or `host:port`.
    ///
    /// # Errors
    /// Which is no host.
    pub fn new(proxies: &[Url], more: &[String]) -> Result<Self, String> {
        let mut hosts: Vec<_> = proxies.iter().map(|url| (url.host.clone(), Some(url.port))).collect();
        for text in more {
            let uri: Uri = format!("http://{text}/").parse().map_err(|_| format!("{text:?} is no host"))?;
            let (host, _) = host_and_port(&uri).ok_or_else(|| format!("{text:?} is no host"))?;
            hosts.push((host, uri.port_u16()));
        }
        Ok(Self { hosts })
    }

    /// Whether a test may have this endpoint: a path, or the URL of an allowed host.
    ///
    /// # Errors
    /// The reason why it is not permitted.
    pub fn check_endpoint(&self, endpoint: &str) -> Result<(), String> {
        if endpoint.len() > MAX_ENDPOINT_BYTES || !endpoint.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("must be at most {MAX_ENDPOINT_BYTES} visible ASCII characters"));
        }
        if endpoint.starts_with('/') {
            // Two slashes would begin a host.
            let is_path = !endpoint.starts_with("//") && !endpoint.contains('\\');
            return if is_path { Ok(()) } else { Err("is not a path such as /api/chat".into()) };
        }
        let uri: Uri = endpoint.parse().map_err(|_| "is neither a path nor a URL".to_owned())?;
        let (host, port) =
            host_and_port(&uri).ok_or("must be a path, or an http or https URL without user")?;
        self.permits(&host, port)
    }
}

impl Guard for Allowed {
    /// Whether a host may be called at a port.
    ///
    /// # Errors
    /// The reason why it is not permitted.
    fn permits(&self, host: &str, port: u16) -> Result<(), String> {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let is_named =
            |(name, only): &(String, Option<u16>)| *name == host && only.is_none_or(|only| only == port);
        if self.hosts.iter().any(is_named) {
            return Ok(());
        }
        Err(format!("{host}:{port} is not allowed; canary.allowed_hosts names the hosts that are"))
    }

    /// Whether an address may be called to which `host` resolved. Where a name leads is the matter of whoever serves it,
    /// so it may not lead into this machine, nor to where cloud providers answer; a private network is where proxies
    /// are. What the configuration names by its address, it may have.
    ///
    /// # Errors
    /// The reason why it is not permitted.
    fn permits_address(&self, host: &str, address: IpAddr) -> Result<(), String> {
        let address = canonical(address);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let is_literal = host.parse::<IpAddr>().is_ok_and(|named| canonical(named) == address);
        let never = match address {
            IpAddr::V4(v4) => never_v4(v4),
            IpAddr::V6(v6) => never_v6(v6),
        };
        if never {
            return Err(format!(
                "{host} resolves to {address}, a reserved address that canaries may not call"
            ));
        }
        if address.is_loopback() && !is_literal && host != "localhost" {
            return Err(format!("{host} is at {address}: a name must not lead into this machine"));
        }
        Ok(())
    }
}

/// An address without the ways of writing it as another one: mapped, compatible and translated IPv4 in IPv6 (RFC 4291,
/// RFC 7915), NAT64 (RFC 6052, RFC 8215), 6to4 (RFC 3056).
fn canonical(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let [a, b, c, d, e, f, g, h] = v6.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match (a, b, c, d, e, f) {
        (0, 0, 0, 0, 0, 0xffff) | (0, 0, 0, 0, 0xffff, 0) => v4(g, h),
        (0x64, 0xff9b, 0, 0, 0, 0) | (0x64, 0xff9b, 1, ..) => v4(g, h),
        (0, 0, 0, 0, 0, 0) if g != 0 => v4(g, h),
        (0x2002, ..) => v4(b, c),
        _ => address,
    }
}

/// Services of cloud providers for their machines, outside of 169.254.0.0/16: of Alibaba Cloud and Azure.
const PROVIDERS_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)];

/// What IANA's registry of special-purpose IPv4 addresses (RFC 6890) has as no unicast address that is routed: this network,
/// link-local (most metadata services are there), protocol assignments (Oracle Cloud's first one), the 6to4 relay, benchmarks,
/// multicast, reserved, broadcast; and [`PROVIDERS_V4`]. Not private and shared address space, where proxies are, nor
/// documentation, where nothing is.
fn never_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    address.is_link_local()
        || a == 0
        || a >= 224
        || (a, b, c) == (192, 0, 0)
        || (a, b, c) == (192, 88, 99)
        || (a == 198 && b & 0xfe == 18)
        || PROVIDERS_V4.contains(&address)
}

/// The same of IPv6: unspecified, multicast, link-local and the former site-local addresses, discard-only, protocol assignments
/// (Teredo, benchmarks, ORCHID), segment routing; and the metadata services of AWS and Google Cloud, which are in local ranges.
fn never_v6(address: Ipv6Addr) -> bool {
    let [a, b, c, d, ..] = address.segments();
    address.is_unspecified()
        || address.is_multicast()
        || a & 0xffc0 == 0xfe80
        || a & 0xffc0 == 0xfec0
        || (a, b, c, d) == (0x100, 0, 0, 0)
        || (a == 0x2001 && b & 0xfe00 == 0)
        || a == 0x5f00
        || (a, b) == (0xfd00, 0x0ec2)
        || (a, b) == (0xfd20, 0x00ce)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> Allowed {
        let proxies = ["http://127.0.0.1:10000".parse().unwrap(), "http://[::1]:10000".parse().unwrap()];
        Allowed::new(&proxies, &["api.example.com".into(), "10.1.2.3:8080".into()]).unwrap()
    }

    #[test]
    fn only_named_hosts_and_ports_are_called() {
        for good in [
            "/api/chat",
            "/api/chat?x=http://evil/",
            "http://127.0.0.1:10000/a",
            "http://[::1]:10000/a",
            "https://api.example.com/a",
            "http://API.example.com:81/a",
            "http://10.1.2.3:8080/",
        ] {
            assert_eq!(allowed().check_endpoint(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "api/chat",
            "//evil/api",
            "/\\evil",
            "http://127.0.0.1:9901/",
            "http://127.0.0.1/",
            "http://169.254.169.254/latest/meta-data",
            "http://api.example.com.evil/",
            "http://api.example.com@evil/",
            "http://evil#@api.example.com/",
            "http://user:password@api.example.com/",
            "http://2130706433:10000/",
            "http://0x7f.1:10000/",
            "http://127.1:10000/",
            "http://[::ffff:127.0.0.1]:10000/",
            "http://10.1.2.3/",
            "ftp://api.example.com/",
            "file:///etc/passwd",
            "gopher://127.0.0.1:10000/",
            "/a b",
            "/\r\nx: y",
        ] {
            assert!(allowed().check_endpoint(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_leads_to_no_address_that_it_must_not() {
        let says = |host: &str, address: &str| allowed().permits_address(host, address.parse().unwrap());
        for address in [
            "169.254.169.254",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "255.255.255.255",
            "127.0.0.1",
            "127.8.9.1",
            "::1",
            "::",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
            "::ffff:169.254.169.254",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "100.100.100.200",
            "::ffff:100.100.100.200",
            "192.0.0.192",
            "64:ff9b::c000:c0",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "168.63.129.16",
            "192.0.0.170",
            "192.88.99.1",
            "198.18.0.1",
            "240.0.0.1",
            "fd20:ce::254",
            "64:ff9b:1::7f00:1",
            "64:ff9b:1::a9fe:a9fe",
            "64:ff9b:1:5::7f00:1",
            "::ffff:0:7f00:1",
            "::ffff:0:a9fe:a9fe",
            "2001::1",
            "100::1",
            "fec0::1",
            "5f00::1",
        ] {
            assert!(says("api.example.com", address).is_err(), "{address}");
        }
        for address in ["10.1.2.3", "100.100.100.201", "192.168.0.7", "203.0.113.9", "2001:db8::1", "fd12::1"]
        {
            assert_eq!(says("api.example.com", address), Ok(()), "{address}");
        }
        assert_eq!(says("127.0.0.1", "127.0.0.1"), Ok(()));
        assert_eq!(says("[::1]", "::1"), Ok(()));
        assert_eq!(says("localhost", "127.0.0.1"), Ok(()));
        for metadata in ["169.254.169.254", "100.100.100.200", "192.0.0.192"] {
            assert!(says(metadata, metadata).is_err(), "{metadata}, not even by its address");
        }
    }
}
