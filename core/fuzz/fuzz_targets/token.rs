//! The strict reader: any bytes as a header's value. What is read has one spelling.
#![no_main]

use keygate_core::token::credential::{self, Credential};
use keygate_core::token;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Credential::One(found) = credential::find([(b"authorization".as_slice(), bytes)]) {
        let _ = token::read(found);
    }
    if let Ok(read) = token::read(bytes) {
        assert_eq!([read.signing_input, b".", read.signature.as_bytes()].concat(), bytes);
        assert!(read.claims.exp > read.claims.iat);
    }
});
