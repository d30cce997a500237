//! Many requests of one client at once.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::envoy::Envoy;
use crate::http::{Request, Response};

/// Seconds of `Retry-After`.
#[track_caller]
pub fn retry_after(answer: &Response) -> u64 {
    answer.header("retry-after").and_then(|seconds| seconds.parse().ok()).expect("when to retry")
}

/// The answers to a burst.
pub struct Burst {
    /// Requests admitted.
    pub admitted: usize,
    /// Requests told to come again in a second, as units are left elsewhere.
    pub pending: usize,
    /// Requests told that the limit is spent.
    pub exhausted: usize,
    /// Requests admitted when the first one was told that the limit is spent.
    pub before_exhausted: usize,
    /// Time from the first request to the last answer.
    pub took: Duration,
}

/// Sends requests over some connections, as fast as answers come.
#[track_caller]
pub fn burst(envoy: &Envoy, request: &Request, requests: usize, connections: usize) -> Burst {
    let answers = Mutex::new(Vec::new());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for connection in 0..connections {
            let share = requests / connections + usize::from(connection < requests % connections);
            let answers = &answers;
            scope.spawn(move || {
                let mut connection = envoy.connect();
                for _ in 0..share {
                    let answer = connection.send(request);
                    let wait = (answer.status == 429).then(|| retry_after(&answer));
                    assert!(matches!(answer.status, 200 | 429), "{}: {}", answer.status, answer.text());
                    answers.lock().expect("answers").push((Instant::now(), wait));
                }
            });
        }
    });
    let took = begun.elapsed();
    let mut answers = answers.into_inner().expect("answers");
    answers.sort();
    let admitted =
        |answers: &[(Instant, Option<u64>)]| answers.iter().filter(|(_, wait)| wait.is_none()).count();
    let is_exhausted = |wait: &Option<u64>| wait.is_some_and(|wait| wait > 1);
    let first = answers.iter().position(|(_, wait)| is_exhausted(wait)).unwrap_or(answers.len());
    let exhausted = answers.iter().filter(|(_, wait)| is_exhausted(wait)).count();
    Burst {
        admitted: admitted(&answers),
        pending: answers.len() - admitted(&answers) - exhausted,
        exhausted,
        before_exhausted: admitted(&answers[..first]),
        took,
    }
}
