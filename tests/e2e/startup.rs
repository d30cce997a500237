//! From the first moment that a port accepts connections: nothing passes that should not.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use keygate_e2e::{Connection, Request, SOON, Stack, Times, tier, wait_until};

/// Between two tries to connect. Much less than the millisecond that counts, and it leaves the processors
/// to what is starting.
const RETRY: Duration = Duration::from_micros(100);

/// What came back for a revoked key.
#[derive(Debug, Default)]
struct Counts {
    connected: AtomicU64,
    unavailable: AtomicU64,
    refused: AtomicU64,
    wrong: AtomicU64,
}

/// Connects as often as it can, and uses the key over each connection until that fails.
fn hammer(port: u16, request: &Request, over: &AtomicBool, counts: &Counts) {
    while !over.load(Ordering::Relaxed) {
        let Ok(mut connection) = Connection::open(port) else {
            std::thread::sleep(RETRY);
            continue;
        };
        counts.connected.fetch_add(1, Ordering::Relaxed);
        while let Ok(answer) = connection.try_send(request) {
            let count = match answer.status {
                503 => &counts.unavailable,
                401 => &counts.refused,
                _ => &counts.wrong,
            };
            count.fetch_add(1, Ordering::Relaxed);
            if over.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

/// How often Envoy is started. `scripts/bench revocation` has it done two hundred times.
fn starts() -> usize {
    let told = std::env::var("KEYGATE_STARTS").ok();
    told.map_or_else(|| tier::repeats(15, 60), |text| text.parse().expect("KEYGATE_STARTS is a number"))
}

#[test]
fn revoked_from_the_first_millisecond() {
    const HAMMERS: usize = 3;
    let starts = starts();

    let mut stack = Stack::builder().workers(2).without_envoy().start();
    let api = stack.api();
    let (good, revoked) = (api.issue("basic"), api.issue("basic"));
    api.revoke(&revoked.id);
    let request = Request::get("/api/chat").bearer(&revoked.token);
    let port = stack.envoy.port();

    let (over, counts) = (AtomicBool::new(false), Counts::default());
    let (mut listening, mut serving) = (Times::default(), Times::default());
    let all = Instant::now();
    std::thread::scope(|scope| {
        let _over = OverOnDrop(&over);
        for _ in 0..HAMMERS {
            scope.spawn(|| hammer(port, &request, &over, &counts));
        }
        for start in 0..starts {
            let (connected, refused) =
                (counts.connected.load(Ordering::Relaxed), counts.refused.load(Ordering::Relaxed));
            let begun = Instant::now();
            stack.launch_envoy();
            wait_until(SOON, "the port to accept", || counts.connected.load(Ordering::Relaxed) > connected);
            listening.add(begun.elapsed());
            wait_until(SOON, "the good key to be served", || {
                let request = Request::get("/api/chat").bearer(&good.token);
                let answer = Connection::open(port).and_then(|mut each| each.try_send(&request));
                answer.is_ok_and(|answer| {
                    assert!(matches!(answer.status, 200 | 503), "start {start}: {}", answer.status);
                    answer.status == 200
                })
            });
            serving.add(begun.elapsed());
            wait_until(SOON, "the revoked key to be refused", || {
                counts.refused.load(Ordering::Relaxed) > refused
            });
            assert_eq!(counts.wrong.load(Ordering::Relaxed), 0, "start {start}: {counts:?}");
            stack.envoy.kill();
        }
    });
    println!("{starts} starts in {:.1} s", all.elapsed().as_secs_f64());
    println!("started to listening: {listening}");
    println!("started to serving: {serving}");
    println!("the revoked key beside it: {counts:?}");
    assert_eq!(counts.wrong.load(Ordering::Relaxed), 0, "{counts:?}");
    let passed = stack.upstream.seen();
    assert_eq!(passed, starts as u64, "the good key's request at each start, and no other");
}

struct OverOnDrop<'a>(&'a AtomicBool);

impl Drop for OverOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
