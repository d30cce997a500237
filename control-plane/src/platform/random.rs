//! Randomness from the operating system.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;

/// Random bytes. The operating system not giving any is no state to go on in.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

/// A random identifier of 128 bits: letters, digits, `-` and `_`.
pub fn identifier() -> String {
    BASE64URL.encode(bytes::<16>())
}
