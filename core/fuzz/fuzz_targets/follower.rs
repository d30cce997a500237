//! Following a control plane that answers anything: never an older version, never a panic.
#![no_main]

use keygate_core::gate::ShardSource;
use keygate_core::sync::{Ask, Follower, Outcome};
use keygate_core::version::Version;

struct Nothing;

impl ShardSource for Nothing {
    fn shard(&mut self, _: u16) -> Option<Vec<u8>> {
        None
    }
}

libfuzzer_sys::fuzz_target!(|answers: Vec<Vec<u8>>| {
    let mut enforced = Version { source: 1, seq: 1 };
    let mut follower = Follower::from(Some(enforced));
    for answer in answers {
        let outcome = match follower.ask() {
            Ask::Poll { .. } => follower.on_answer(&answer, &mut Nothing),
            Ask::Shards(_) => follower.on_shards(&answer),
        };
        if let Ok(Outcome::Publish(publication)) = outcome {
            assert!(publication.version >= enforced);
            enforced = publication.version;
            follower.published(enforced);
        }
    }
});
