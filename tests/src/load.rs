//! Traffic at a steady rate beside what a test does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::figures::Times;
use crate::http::{Connection, Request};
use crate::wait::wait_until;

/// More than any number of requests in these tests takes, on a busy machine.
const A_LONG_TIME: Duration = Duration::from_secs(120);

/// One thread that sends requests in turn over connections in turn. It ends when dropped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<Answers>>,
}

/// What came back.
#[derive(Debug, Default)]
pub struct Answers {
    /// From sending to the whole answer.
    pub times: Times,
    /// How many of each status.
    pub statuses: BTreeMap<u16, u64>,
}

impl Answers {
    /// Those of both.
    pub fn and(mut self, other: Self) -> Self {
        self.times.extend(other.times);
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self
    }

    /// Panics unless there are some, all with that status.
    #[track_caller]
    pub fn expect_all(self, status: u16) -> Self {
        assert_eq!(self.statuses.keys().copied().collect::<Vec<_>>(), [status], "{:?}", self.statuses);
        self
    }
}

impl Load {
    /// Sends what `next` gives, `per_second` times a second or as often as the answers come.
    pub fn start(
        mut connections: Vec<Connection>,
        per_second: u32,
        mut next: impl FnMut() -> Request + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let (stopping, count) = (Arc::clone(&stop), Arc::clone(&answered));
        let thread = std::thread::spawn(move || {
            let mut answers = Answers::default();
            let interval = Duration::from_secs(1) / per_second;
            let mut due = Instant::now();
            let mut turn = 0;
            while !stopping.load(Ordering::Relaxed) {
                let request = next();
                let begun = Instant::now();
                let worker = turn % connections.len();
                let answer = connections[worker].send(&request);
                answers.times.add(begun.elapsed());
                *answers.statuses.entry(answer.status).or_default() += 1;
                count.fetch_add(1, Ordering::Relaxed);
                turn += 1;
                // What was missed while an answer was late is not made up for.
                due = (due + interval).max(Instant::now());
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            answers
        });
        Self { stop, answered, thread: Some(thread) }
    }

    /// How many requests have been answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until so many requests have been answered.
    #[track_caller]
    pub fn wait_answered(&self, count: u64) {
        wait_until(A_LONG_TIME, "requests to be answered", || {
            let thread = self.thread.as_ref();
            assert!(thread.is_some_and(|thread| !thread.is_finished()), "the load has ended by itself");
            self.answered() >= count
        });
    }

    /// Ends it.
    #[track_caller]
    pub fn stop(mut self) -> Answers {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it is stopped once").join().expect("every request is answered")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
