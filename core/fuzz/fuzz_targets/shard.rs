//! Shards: what decodes encodes to the same bytes, and the view says the same as the shard.
#![no_main]

use keygate_core::revocation::{Shard, ShardView};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(view) = ShardView::new(bytes) else {
        assert!(Shard::decode(bytes).is_err());
        return;
    };
    if let Ok(shard) = Shard::decode(bytes) {
        assert_eq!(shard.encode(), bytes);
        assert_eq!(shard.len(), view.len());
        for fingerprint in shard.fingerprints() {
            assert_eq!(shard.standing(fingerprint), view.standing(fingerprint));
        }
    }
});
