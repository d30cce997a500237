//! The account of a client that shows no key: by its address, an IPv6 address by its prefix, since one client may have all
//! addresses of a prefix (RFC 4941, RFC 6177).
//!
//! ```text
//! account = first 8 bytes, big-endian, of SHA-256 of its name
//!   "client" NUL "4" 4 bytes              IPv4, also IPv4-mapped IPv6 (RFC 4291 section 2.5.5.2)
//!   "client" NUL "6" prefix 16 bytes      IPv6; prefix is one byte, bits beyond it are 0
//!   "client" NUL "?" bytes                what is no address, such as nothing
//! ```

use std::net::{IpAddr, Ipv6Addr};

use sha2::{Digest, Sha256};

/// The leading bits of an IPv6 address that make a client, unless set: what a provider gives to one subscriber's network.
pub const DEFAULT_IPV6_PREFIX: u8 = 64;

/// A client's address as the proxy has it: text without the port, in brackets or with a zone (RFC 4007) perhaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientAddress<'a>(&'a [u8]);

impl<'a> ClientAddress<'a> {
    /// The address in these bytes; none, if there are none.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        (!bytes.is_empty()).then_some(Self(bytes))
    }

    /// The bytes; of an address that is not known, none. All clients without one are one client.
    #[inline]
    pub(super) fn bytes_of(address: Option<Self>) -> &'a [u8] {
        address.map_or(&[], |Self(bytes)| bytes)
    }
}

/// The account of the client with this address, which may have brackets and a zone (RFC 4007) but no port. What cannot
/// be read as an address is an account by its bytes. `ipv6_prefix` beyond 128 is 128.
pub fn account(address: &[u8], ipv6_prefix: u8) -> u64 {
    let name = Sha256::new().chain_update(b"client\0");
    let name = match read(address) {
        Some(IpAddr::V4(address)) => name.chain_update(b"4").chain_update(address.octets()),
        Some(IpAddr::V6(address)) => {
            let network = network(address, ipv6_prefix);
            name.chain_update([b'6', ipv6_prefix]).chain_update(network.octets())
        }
        None => name.chain_update(b"?").chain_update(address),
    };
    let digest: [u8; 32] = name.finalize().into();
    u64::from_be_bytes(digest.first_chunk().copied().unwrap_or_default())
}

/// An address from its text; an IPv4-mapped one as the IPv4 address that it is.
fn read(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let without_zone = bare.split_once('%').map_or(bare, |(address, _zone)| address);
    // Only an IPv6 address has brackets or a zone.
    if without_zone.len() < text.len() {
        return without_zone.parse().ok().map(|address: Ipv6Addr| IpAddr::V6(address).to_canonical());
    }
    text.parse().ok().map(|address: IpAddr| address.to_canonical())
}

/// The network of an address: its leading bits.
fn network(address: Ipv6Addr, prefix: u8) -> Ipv6Addr {
    let host_bits = 128_u32.saturating_sub(prefix.into());
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    Ipv6Addr::from(u128::from(address) & mask)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(address: &str) -> u64 {
        account(address.as_bytes(), DEFAULT_IPV6_PREFIX)
    }

    #[test]
    fn an_ipv4_address_is_one_client_however_it_is_written() {
        for same in ["::ffff:192.0.2.7", "::FFFF:c000:207", "[::ffff:192.0.2.7]", "0:0:0:0:0:ffff:192.0.2.7"]
        {
            assert_eq!(of(same), of("192.0.2.7"), "{same}");
        }
        for other in
            ["192.0.2.8", "::192.0.2.7", "::ffff:192.0.2.8", "[192.0.2.7]", "192.0.2.7%eth0", "192.0.2.07"]
        {
            assert_ne!(of(other), of("192.0.2.7"), "{other}");
        }
    }

    #[test]
    fn an_ipv6_address_is_counted_by_its_prefix() {
        for same in [
            "2001:db8:0:1::2",
            "[2001:db8:0:1:ffff::]",
            "2001:DB8:0:1:0:0:0:9",
            "2001:db8:0:1::1%eth0",
            "[2001:db8:0:1::1%25eth0]",
        ] {
            assert_eq!(of(same), of("2001:db8:0:1::1"), "{same}");
        }
        assert_ne!(of("2001:db8:0:2::1"), of("2001:db8:0:1::1"));
        let within =
            |prefix, other: &str| account(b"2001:db8:0:1::1", prefix) == account(other.as_bytes(), prefix);
        assert!(within(56, "2001:db8:0:2::1") && !within(56, "2001:db8:0:100::1"));
        assert!(within(128, "2001:db8:0:1::1") && !within(128, "2001:db8:0:1::2"));
        assert!(within(1, "::1") && !within(1, "8000::1"));
        // Neither can come from rules; no address makes them a panic.
        assert!(within(0, "ffff::1") && within(255, "2001:db8:0:1::1") && !within(255, "2001:db8:0:1::2"));
    }

    #[test]
    fn what_is_no_address_is_a_client_by_its_bytes() {
        let garbage: [&[u8]; 9] =
            [b"", b"[", b"]", b"[]", b"%", b"unix:/tmp/x", b"\xff\xfe", b"[2001:db8::1", b"2001:db8::1]"];
        let accounts: std::collections::BTreeSet<u64> =
            garbage.iter().map(|bytes| account(bytes, DEFAULT_IPV6_PREFIX)).collect();
        assert_eq!(accounts.len(), garbage.len());
    }

    #[test]
    fn golden_accounts() {
        assert_eq!(of("192.0.2.7"), 0x59a4_d6ef_b602_9c64);
        assert_eq!(of("2001:db8::1"), 0xd195_aa97_5b68_890d);
        assert_eq!(of(""), 0x20d7_d26f_f91b_106a);
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..60), prefix in any::<u8>()) {
            account(&bytes, prefix);
        }

        #[test]
        fn addresses_of_one_prefix_are_one_client(bits in any::<u128>(), other in any::<u128>(), prefix in 1..=128_u8) {
            let mask = u128::MAX << (128 - u32::from(prefix));
            let (one, other) = (Ipv6Addr::from(bits), Ipv6Addr::from(bits & mask | other & !mask));
            prop_assume!(one.to_ipv4_mapped().is_none() && other.to_ipv4_mapped().is_none());
            let of = |address: Ipv6Addr| account(address.to_string().as_bytes(), prefix);
            prop_assert_eq!(of(one), of(other));
        }
    }
}
