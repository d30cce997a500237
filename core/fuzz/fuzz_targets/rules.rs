//! Rules: whatever is accepted can be decided with.
#![no_main]

use keygate_core::decide::cache::TokenCache;
use keygate_core::token::credential::Credential;
use keygate_core::decide::{Judge, Request, State, decide};
use keygate_core::revocation::ExactSet;
use keygate_core::decide::rules::{Rules, Ruleset};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(rules) = Rules::decode(bytes) else { return };
    let Ok(rules) = Ruleset::try_from(rules) else { return };
    keygate_core::token::crypto::native::install();
    let request = Request { method: b"GET", path: bytes, credential: Credential::One(bytes), client: None };
    let set = ExactSet::default();
    let judge = Judge { cache: &mut TokenCache::new(1_000), revocations: &set, now: 0, meter: (), trace: &mut () };
    let _ = decide(State::Fresh(&rules), request, judge);
});
