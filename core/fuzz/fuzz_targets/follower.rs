//! Following a control plane that answers anything: never an older version, never a panic, never an end.
#![no_main]

use keygate_core::revocation::gate::ShardSource;
use keygate_core::shm::Publication;
use keygate_core::sync::{Ask, Follower, Outcome, Step};
use keygate_core::version::Version;

struct Nothing;

impl ShardSource for Nothing {
    fn shard(&mut self, _: u16) -> Option<Vec<u8>> {
        None
    }
}

/// Does the steps that there are.
fn steps(follower: &mut Follower) -> Option<Publication> {
    loop {
        match follower.step(&mut Nothing) {
            Ok(Step::Differs | Step::Stage { .. }) => {}
            Ok(Step::Publish(publication)) => return Some(publication),
            Ok(Step::Wait) | Err(_) => return None,
        }
    }
}

libfuzzer_sys::fuzz_target!(|answers: Vec<Vec<u8>>| {
    let mut enforced = Version { source: 1, seq: 1 };
    let mut follower = Follower::from(Some(enforced));
    for answer in answers {
        let publication = match follower.ask() {
            Ask::Poll { .. } => match follower.on_answer(&answer, || None) {
                Ok(Outcome::Publish(publication)) => Some(publication),
                Ok(Outcome::TakeOver) => steps(&mut follower),
                Ok(Outcome::Current { .. }) | Err(_) => None,
            },
            Ask::Shards(_) => follower.on_shards(answer).ok().and_then(|()| steps(&mut follower)),
            Ask::Nothing => panic!("all steps were done"),
        };
        if let Some(publication) = publication {
            assert!(publication.version >= enforced);
            enforced = publication.version;
            follower.published(enforced);
        }
    }
});
