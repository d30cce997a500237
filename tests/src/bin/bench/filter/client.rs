//! A client that costs little: connections that are kept, prerendered requests, one thread that does nothing else.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fd::OwnedFd;
use rustix::thread::set_current_timer_slack;

/// No answer here is longer.
const ANSWER_BYTES: usize = 4 * 1024;
/// When no answer has come for so long, none will.
const LOST: Duration = Duration::from_secs(20);

/// A request as it is sent, and what must come back.
#[derive(Debug, Clone, Copy)]
pub struct Shot<'a> {
    pub request: &'a [u8],
    pub expected: Expected,
    /// Whether its time is looked at.
    pub timed: bool,
}

/// What must come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// A 200 of the upstream with that body.
    Upstream(&'static [u8]),
    /// Only a status.
    Status(u16),
}

/// What came back.
#[derive(Debug)]
pub struct Answers {
    /// How many that were right.
    pub right: u64,
    /// Statuses of others.
    pub wrong: BTreeMap<u16, u64>,
    /// From the first request to the last answer.
    pub took: Duration,
    /// Microseconds from when a request was to be sent to the end of its answer, of those that are timed.
    pub times: Histogram<u64>,
    /// How many had to wait for a connection.
    pub crowded: u64,
}

impl Answers {
    pub fn new() -> Self {
        // A microsecond to a minute, three digits.
        let times = Histogram::new_with_bounds(1, 60_000_000, 3).expect("good bounds");
        Self { right: 0, wrong: BTreeMap::new(), took: Duration::ZERO, times, crowded: 0 }
    }

    /// Panics unless all are right, and there are some.
    #[track_caller]
    pub fn expect_right(self, what: &str) -> Self {
        assert!(self.right > 0 || !self.wrong.is_empty(), "{what}: there was not one answer");
        self.check(what)
    }

    /// Panics unless all that there are, if any, are right.
    #[track_caller]
    pub fn check(self, what: &str) -> Self {
        let Self { right, wrong, .. } = &self;
        assert!(wrong.is_empty(), "{what}: {right} right answers, and wrong ones by status: {wrong:?}");
        self
    }

    /// A second.
    pub fn rate(&self) -> f64 {
        self.right as f64 / self.took.as_secs_f64()
    }
}

/// Connections to one port.
#[derive(Debug)]
pub struct Client {
    epoll: OwnedFd,
    wires: Vec<Wire>,
    idle: Vec<usize>,
}

/// One connection.
#[derive(Debug)]
struct Wire {
    stream: TcpStream,
    answer: Vec<u8>,
    filled: usize,
    expected: Expected,
    /// When what is under way was to be sent, if that is looked at.
    due: Option<Instant>,
}

impl Client {
    /// Connects.
    #[track_caller]
    pub fn connect(port: u16, connections: usize) -> Self {
        // What is due is sent then, not up to 50 µs later to save a wake-up.
        set_current_timer_slack(NonZeroU64::new(1)).expect("a thread may set its own");
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll");
        let wires: Vec<Wire> = (0..connections).map(|_| Wire::open(port)).collect();
        for (place, wire) in wires.iter().enumerate() {
            let data = epoll::EventData::new_u64(place as u64);
            epoll::add(&epoll, &wire.stream, data, epoll::EventFlags::IN).expect("a socket");
        }
        Self { epoll, idle: (0..connections).collect(), wires }
    }

    /// Each connection sends the next request once its answer is there.
    #[track_caller]
    pub fn closed<'a>(&mut self, mut shots: impl Iterator<Item = Shot<'a>>) -> Answers {
        let mut answers = Answers::new();
        let begun = Instant::now();
        while let Some(place) = self.idle.pop() {
            let Some(shot) = shots.next() else {
                self.idle.push(place);
                break;
            };
            self.wires[place].send(shot, None);
        }
        let mut events = Vec::with_capacity(self.wires.len());
        while self.idle.len() < self.wires.len() {
            self.events(LOST, &mut events);
            assert!(!events.is_empty(), "no answer within {LOST:?}");
            for place in events.drain(..) {
                if self.wires[place].receive(&mut answers) {
                    match shots.next() {
                        Some(shot) => self.wires[place].send(shot, None),
                        None => self.idle.push(place),
                    }
                }
            }
        }
        answers.took = begun.elapsed();
        answers
    }

    /// Requests are sent at a steady rate, whatever comes of those before.
    #[track_caller]
    pub fn open<'a>(&mut self, per_second: f64, mut shots: impl Iterator<Item = Shot<'a>>) -> Answers {
        let mut answers = Answers::new();
        let begun = Instant::now();
        let due_at = |number: u64| begun + Duration::from_secs_f64(number as f64 / per_second);
        let mut next = shots.next();
        let mut sent = 0;
        let mut events = Vec::with_capacity(self.wires.len());
        let mut heard = begun;
        while next.is_some() || self.idle.len() < self.wires.len() {
            let mut now = Instant::now();
            while let Some(shot) = next.filter(|_| due_at(sent) <= now) {
                let Some(place) = self.idle.pop() else {
                    answers.crowded += 1;
                    break;
                };
                self.wires[place].send(shot, Some(due_at(sent)));
                sent += 1;
                next = shots.next();
                now = Instant::now();
            }
            let until_due = due_at(sent).saturating_duration_since(now);
            self.wait(if next.is_some() && !self.idle.is_empty() { until_due } else { LOST });
            self.events(Duration::ZERO, &mut events);
            if !events.is_empty() {
                heard = Instant::now();
            }
            assert!(heard.elapsed() < LOST, "no answer within {LOST:?}");
            for place in events.drain(..) {
                if self.wires[place].receive(&mut answers) {
                    self.idle.push(place);
                }
            }
        }
        answers.took = begun.elapsed();
        answers
    }

    /// Until an answer comes. `poll`, since `epoll_wait` counts in milliseconds.
    fn wait(&self, within: Duration) {
        match poll(&mut [PollFd::new(&self.epoll, PollFlags::IN)], Some(&timespec(within))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }

    /// The connections on which something came.
    fn events(&self, within: Duration, places: &mut Vec<usize>) {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 64];
        match epoll::wait(&self.epoll, &mut events, Some(&timespec(within))) {
            Ok((ready, _)) => places.extend(ready.iter().map(|event| event.data.u64() as usize)),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("epoll: {error}"),
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() }
}

impl Wire {
    fn open(port: u16) -> Self {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .unwrap_or_else(|error| panic!("Envoy does not listen on {port}: {error}"));
        stream.set_nodelay(true).expect("a socket");
        stream.set_nonblocking(true).expect("a socket");
        Self { stream, answer: vec![0; ANSWER_BYTES], filled: 0, expected: Expected::Status(0), due: None }
    }

    fn send(&mut self, shot: Shot<'_>, due: Option<Instant>) {
        self.expected = shot.expected;
        self.due = due.filter(|_| shot.timed);
        // Nothing else is under way on it, and a socket takes more than a request.
        let written = self.stream.write(shot.request).expect("Envoy keeps the connection");
        assert_eq!(written, shot.request.len(), "a request that a socket does not take");
    }

    /// Whether the answer is whole now.
    fn receive(&mut self, answers: &mut Answers) -> bool {
        match self.stream.read(&mut self.answer[self.filled..]) {
            Ok(0) => panic!("Envoy closed a connection"),
            Ok(more) => self.filled += more,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return false,
            Err(error) => panic!("Envoy closed a connection: {error}"),
        }
        let Some((status, body)) = answer(&self.answer[..self.filled]) else { return false };
        let right = match self.expected {
            Expected::Upstream(wanted) => status == 200 && body == wanted,
            Expected::Status(wanted) => status == wanted,
        };
        if right {
            answers.right += 1;
        } else {
            *answers.wrong.entry(status).or_default() += 1;
        }
        if let Some(due) = self.due.take() {
            answers.times.saturating_record(due.elapsed().as_micros() as u64);
        }
        self.filled = 0;
        true
    }
}

/// The status and the body of an answer that is whole; `None` while it is not.
#[track_caller]
fn answer(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let (head, body) = bytes.split_at(end);
    let status = head.get(9..12).and_then(|status| std::str::from_utf8(status).ok()?.parse().ok());
    let length = head.split(|byte| *byte == b'\n').find_map(|line| {
        let value = line.strip_prefix(b"content-length: ")?.strip_suffix(b"\r")?;
        std::str::from_utf8(value).ok()?.parse().ok()
    });
    let length: usize = length.expect("every answer has a content-length");
    assert!(body.len() <= length, "more than one answer to one request");
    (body.len() == length).then(|| (status.expect("an answer begins with its status"), body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_with_its_last_byte() {
        let whole = b"HTTP/1.1 401 Unauthorized\r\nserver: envoy\r\ncontent-length: 2\r\n\r\nno";
        for end in 0..whole.len() {
            assert_eq!(answer(&whole[..end]), None, "{end}");
        }
        assert_eq!(answer(whole), Some((401, b"no".as_slice())));
    }
}
