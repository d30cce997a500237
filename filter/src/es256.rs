//! ES256 by the proxy: BoringSSL behind Envoy's foreign function `verify_signature`, twenty times as fast
//! as the same in WebAssembly.
//!
//! Its arguments and result are the protobuf messages `VerifySignatureArguments` (hash_function = 1,
//! public_key = 2, signature = 3, text = 4) and `VerifySignatureResult` (result = 1), written and read
//! here by hand: five fields are no reason for a protobuf library in every proxy.

use jsonwebtoken::crypto::CryptoProvider;
use keygate_core::crypto::{Es256, ecdsa_der, p256_spki, provider};

use crate::host;

static PROVIDER: CryptoProvider = provider::<ByProxy>();

struct ByProxy;

impl Es256 for ByProxy {
    fn verify(point: &[u8], message: &[u8], signature: &[u8]) -> bool {
        let (Some(key), Some(signature)) = (p256_spki(point), ecdsa_der(signature)) else { return false };
        let mut arguments = Vec::new();
        for (field, value) in [(1, b"sha256".as_slice()), (2, &key), (3, &signature), (4, message)] {
            bytes_field(&mut arguments, field, value);
        }
        // Only the result counts: a bad signature is an answer, not an error. `true` is field 1, a varint
        // of 1, and stands first.
        host::foreign_function("verify_signature", &arguments)
            .is_some_and(|result| result.starts_with(&[0x08, 0x01]))
    }

    fn sign(_: &[u8], _: &[u8]) -> Option<Vec<u8>> {
        None // A proxy has nothing to sign with.
    }
}

/// A length-delimited field of a protobuf message.
fn bytes_field(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    const LENGTH_DELIMITED: u8 = 2;
    out.push(field.wrapping_shl(3) | LENGTH_DELIMITED);
    let mut length = value.len();
    while length >= 0x80 {
        out.push(u8::try_from(length & 0x7f).unwrap_or(0) | 0x80);
        length >>= 7;
    }
    out.push(u8::try_from(length).unwrap_or(0));
    out.extend_from_slice(value);
}

/// Gives `jsonwebtoken` its algorithms in this VM, and finds out whether the proxy can verify.
///
/// # Errors
/// When the proxy does not accept a good signature, or accepts a bad one.
pub fn install() -> Result<(), &'static str> {
    let _already_installed = PROVIDER.install_default();
    // Known answer: RFC 6979, appendix A.2.5, SHA-256 of "sample".
    let point = [&[4], POINT_X.as_slice(), POINT_Y.as_slice()].concat();
    let mut signature = [SIGNATURE_R, SIGNATURE_S].concat();
    if !ByProxy::verify(&point, b"sample", &signature) {
        return Err("this proxy has no working 'verify_signature' function; Envoy 1.40 or newer is needed");
    }
    signature.reverse();
    if ByProxy::verify(&point, b"sample", &signature) {
        return Err("this proxy's 'verify_signature' function accepts a bad signature");
    }
    Ok(())
}

const POINT_X: [u8; 32] = [
    0x60, 0xfe, 0xd4, 0xba, 0x25, 0x5a, 0x9d, 0x31, 0xc9, 0x61, 0xeb, 0x74, 0xc6, 0x35, 0x6d, 0x68, 0xc0,
    0x49, 0xb8, 0x92, 0x3b, 0x61, 0xfa, 0x6c, 0xe6, 0x69, 0x62, 0x2e, 0x60, 0xf2, 0x9f, 0xb6,
];
const POINT_Y: [u8; 32] = [
    0x79, 0x03, 0xfe, 0x10, 0x08, 0xb8, 0xbc, 0x99, 0xa4, 0x1a, 0xe9, 0xe9, 0x56, 0x28, 0xbc, 0x64, 0xf2,
    0xf1, 0xb2, 0x0c, 0x2d, 0x7e, 0x9f, 0x51, 0x77, 0xa3, 0xc2, 0x94, 0xd4, 0x46, 0x22, 0x99,
];
const SIGNATURE_R: [u8; 32] = [
    0xef, 0xd4, 0x8b, 0x2a, 0xac, 0xb6, 0xa8, 0xfd, 0x11, 0x40, 0xdd, 0x9c, 0xd4, 0x5e, 0x81, 0xd6, 0x9d,
    0x2c, 0x87, 0x7b, 0x56, 0xaa, 0xf9, 0x91, 0xc3, 0x4d, 0x0e, 0xa8, 0x4e, 0xaf, 0x37, 0x16,
];
const SIGNATURE_S: [u8; 32] = [
    0xf7, 0xcb, 0x1c, 0x94, 0x2d, 0x65, 0x7c, 0x41, 0xd4, 0x36, 0xc7, 0xa1, 0xb6, 0xe2, 0x9f, 0x65, 0xf3,
    0xe9, 0x00, 0xdb, 0xb9, 0xaf, 0xf4, 0x06, 0x4d, 0xc4, 0xab, 0x2f, 0x84, 0x3a, 0xcd, 0xa8,
];
