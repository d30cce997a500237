//! Shared data with anything in it: a worker finds no state rather than a wrong one, and never panics.
#![no_main]

use std::collections::BTreeMap;

use keygate_core::decide::State;
use keygate_core::worker::replica::Replica;
use keygate_core::revocation::{Fingerprint, Revocations};
use keygate_core::shm::{self, Conflict, SharedData};

struct Memory(BTreeMap<String, Vec<u8>>);

impl SharedData for Memory {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.0.get(key).map(|value| (value.clone(), 1))
    }

    fn set(&mut self, key: &str, value: &[u8], _: Option<u32>) -> Result<(), Conflict> {
        self.0.insert(key.to_owned(), value.to_vec());
        Ok(())
    }
}

libfuzzer_sys::fuzz_target!(|values: Vec<(u8, Vec<u8>)>| {
    const KEYS: [&str; 9] = [
        "keygate/1/beacon",
        "keygate/1/rules",
        "keygate/1/lease",
        "keygate/1/roster",
        "keygate/1/incarnation",
        "keygate/1/starts",
        "keygate/1/shard/0/0",
        "keygate/1/shard/1/0",
        "keygate/1/log/1",
    ];
    let named = values.into_iter().map(|(key, value)| (KEYS[usize::from(key) % KEYS.len()].to_owned(), value));
    let mut data = Memory(named.collect());
    shm::hold_lease(&mut data, 7, 1);
    shm::roll_call(&mut data, 7, 1, 1);
    shm::count_start(&mut data);
    shm::incarnation(&mut data, 7);
    let mut replica = Replica::default();
    for now_ns in [0, 10_000_000, u64::MAX] {
        replica.refresh(&mut data, now_ns);
        let (state, mut revocations) = replica.view(&mut data, now_ns);
        if let State::Fresh(_) = state {
            let _ = revocations.standing(Fingerprint(now_ns));
        }
        replica.derive_gate(&mut data);
    }
});
