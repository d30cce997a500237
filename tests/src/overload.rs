//! Load beyond a limit, at a steady rate.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::envoy::Envoy;
use crate::http::{Connection, Request};

/// Sends requests at a rate, over connections to all workers of some proxies; the first proxies get more than the last.
pub fn admitted(envoys: &[&Envoy], request: &Request, during: Duration, per_second: u32) -> Admitted {
    let (times, stop) = (Mutex::new(Vec::new()), AtomicBool::new(false));
    let refused = Mutex::new(0_u64);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for (place, envoy) in envoys.iter().enumerate() {
            // Skewed: half of the load to the first, a third to the second, and so on.
            let share = [6, 3, 1][place.min(2)];
            let (times, stop, refused) = (&times, &stop, &refused);
            scope.spawn(move || {
                let mut connections: Vec<Connection> =
                    (0..envoy.workers()).map(|_| envoy.connect()).collect();
                let pause = Duration::from_secs(10) / (per_second * share);
                let mut next = Instant::now();
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let count = connections.len();
                    let sent = Instant::now();
                    let answer = connections[turn % count].send(request);
                    match answer.status {
                        200 => times.lock().expect("times").push((sent, Instant::now())),
                        429 => *refused.lock().expect("a count") += 1,
                        other => panic!("{other}: {}", answer.text()),
                    }
                    next += pause;
                    if let Some(left) = next.checked_duration_since(Instant::now()) {
                        crate::wait::pass(left);
                    }
                }
            });
        }
        crate::wait::pass(during);
        stop.store(true, Ordering::Relaxed);
    });
    let mut times = times.into_inner().expect("times");
    times.sort();
    Admitted { times, refused: refused.into_inner().expect("a count"), took: begun.elapsed() }
}

/// Requests that were admitted.
pub struct Admitted {
    /// Times at which each was sent and answered: it was decided on between.
    pub times: Vec<(Instant, Instant)>,
    /// Requests that were refused.
    pub refused: u64,
    /// Time of all of it.
    pub took: Duration,
}

impl Admitted {
    /// The most that were surely decided on within one window.
    pub fn most_in(&self, window: Duration) -> usize {
        let (mut within, mut most) = (VecDeque::new(), 0);
        let mut by_end: Vec<_> = self.times.clone();
        by_end.sort_by_key(|(_, answered)| *answered);
        for (sent, answered) in by_end {
            within.push_back((sent, answered));
            // What was sent more than a window before this one was answered may be outside.
            within.retain(|(before, _)| answered.duration_since(*before) < window);
            most = most.max(within.len());
        }
        most
    }
}
