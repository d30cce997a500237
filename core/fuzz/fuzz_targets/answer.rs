//! Answers of the control plane: what decodes encodes to the same bytes.
#![no_main]

use keygate_core::sync::wire::{self, Answer};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(answer) = Answer::decode(bytes) {
        assert_eq!(answer.encode(), bytes);
    }
    if let Ok(shards) = wire::decode_shards(bytes) {
        assert_eq!(wire::encode_shards(shards.into_iter().map(|place| &bytes[place])), bytes);
    }
    let _ = keygate_core::token::json::object(bytes);
});
