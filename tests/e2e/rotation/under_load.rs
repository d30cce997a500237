//! Rotations under load: no good key is ever refused, of whichever secret.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use keygate_e2e::load::Answers;
use keygate_e2e::{Load, Request, SOON, Stack, wait_until};

use super::{all_workers, assert_all_answer, chat, kid_of, rotated};

/// To each proxy.
const PER_SECOND: u32 = 300;

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn keys_of_every_secret_so_far_pass_on_three_envoys_while_secrets_are_rotated() {
    const ROTATIONS: usize = 6;

    let stack = Stack::builder().workers(2).start();
    let others = [stack.another_envoy("envoy-2", 2), stack.another_envoy("envoy-3", 1)];
    let envoys = [&stack.envoy, &others[0], &others[1]];
    let api = stack.api();
    wait_until(SOON, "three proxies in the fleet", || api.fleet().len() == envoys.len());
    let mut workers = all_workers(&envoys);
    let first = api.issue("basic");
    let used = Arc::new(RwLock::new(vec![chat(&first)]));
    let loads = envoys.map(|envoy| {
        // Each goes to the worker that has fewest.
        let connections = (0..envoy.workers()).map(|_| envoy.connect()).collect();
        let (used, mut turn) = (Arc::clone(&used), 0);
        Load::start(connections, PER_SECOND, move || {
            turn += 1;
            let used: &Vec<Request> = &used.read().unwrap_or_else(PoisonError::into_inner);
            used[turn % used.len()].clone()
        })
    });

    let (stop, at_once) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Instant::now();
    let mut kids = vec![kid_of(&first)];
    let mut issuers_workers: Vec<_> = envoys.iter().map(|envoy| envoy.connect()).collect();
    std::thread::scope(|scope| {
        // If this thread panics, the other must end for the scope to end.
        let _stop = StopOnDrop(&stop);
        // Whenever a key is issued, it is good everywhere at once: the moment at which the signing secret changes, too.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_all_answer(&mut issuers_workers, &api.issue("basic"), 200);
                at_once.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..ROTATIONS {
            let kid = rotated(&api);
            assert!(!kids.contains(&kid));
            let key = api.issue("basic");
            assert_eq!(kid_of(&key), kid);
            assert_all_answer(&mut workers, &key, 200);
            used.write().unwrap_or_else(PoisonError::into_inner).push(chat(&key));
            kids.push(kid);
        }
        // Those of the last one are used as well.
        let answered = loads.each_ref().map(Load::answered);
        for (load, answered) in loads.iter().zip(answered) {
            load.wait_answered(answered + kids.len() as u64);
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    let answers = loads.into_iter().map(Load::stop).fold(Answers::default(), Answers::and);
    let at_once = at_once.into_inner();
    println!(
        "{ROTATIONS} rotations in {seconds:.1} s; {} requests: {}",
        answers.times.count(),
        answers.times
    );
    println!("{at_once} keys issued meanwhile, each used at once on all three proxies");
    assert!(answers.times.count() as u64 >= 1_000, "there was hardly any traffic");
    assert!(at_once >= 100, "there were hardly any new keys");
    answers.expect_all(200);
    for envoy in envoys {
        envoy.assert_no_vm_died();
    }
}
