//! The connections of a server: how many there may be, which one gives way to a new one, and which are overdue.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::watched::UnderWay;

/// The bounds of a server.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The most connections.
    pub connections: usize,
    /// The most of one address.
    pub of_peer: usize,
    /// The time that a request's head may take.
    pub head: Duration,
    /// The time for which a connection may have no request.
    pub idle: Duration,
    /// The time for which a connection with a request may move no byte: longer than the longest answer is held back.
    pub stalled: Duration,
}

/// The connections.
#[derive(Debug)]
pub struct Connections {
    bounds: Bounds,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    all: HashMap<u64, Arc<Connection>>,
    of_peer: HashMap<IpAddr, usize>,
}

impl Connections {
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, open: Mutex::default() }
    }

    /// Takes a connection in. Where there are too many, the oldest one without a whole request is closed: of the same
    /// peer, or of the one that has the most. `None`: there is none such.
    pub fn enter(self: &Arc<Self>, peer: IpAddr, now: Instant) -> Option<Place> {
        let mut open = lock(&self.open);
        let of_peer = open.of_peer.get(&peer).copied().unwrap_or(0);
        if of_peer >= self.bounds.of_peer {
            open.give_way(peer)?;
        } else if open.all.len() >= self.bounds.connections {
            open.make_room()?;
        }
        let number = open.next;
        open.next += 1;
        let connection = Arc::new(Connection::new(number, peer, now));
        open.all.insert(number, Arc::clone(&connection));
        *open.of_peer.entry(peer).or_insert(0) += 1;
        Some(Place { connection, connections: Arc::clone(self) })
    }

    /// Closes the oldest connection without a whole request of the peer that has the most.
    pub fn make_room(&self) {
        let _none = lock(&self.open).make_room();
    }

    /// Closes those whose time is over.
    pub fn close_overdue(&self, now: Instant) {
        for connection in lock(&self.open).all.values() {
            if connection.is_overdue(&self.bounds, now) {
                connection.close.notify_one();
            }
        }
    }

    pub fn len(&self) -> usize {
        lock(&self.open).all.len()
    }
}

impl Open {
    fn make_room(&mut self) -> Option<()> {
        let mut peers: Vec<(usize, IpAddr)> =
            self.of_peer.iter().map(|(peer, count)| (*count, *peer)).collect();
        peers.sort_unstable_by(|a, b| b.cmp(a));
        peers.into_iter().find_map(|(_, peer)| self.give_way(peer))
    }

    fn give_way(&mut self, peer: IpAddr) -> Option<()> {
        let waiting =
            self.all.values().filter(|connection| connection.peer == peer && connection.may_give_way());
        let oldest = waiting.min_by_key(|connection| connection.number)?.number;
        let connection = self.remove(oldest)?;
        connection.close.notify_one();
        Some(())
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Connection>> {
        let connection = self.all.remove(&number)?;
        if let Some(count) = self.of_peer.get_mut(&connection.peer) {
            *count -= 1;
            if *count == 0 {
                self.of_peer.remove(&connection.peer);
            }
        }
        Some(connection)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place of a connection among the others, for as long as it is open.
#[derive(Debug)]
pub struct Place {
    connection: Arc<Connection>,
    connections: Arc<Connections>,
}

impl Place {
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.connections.open).remove(self.connection.number);
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    number: u64,
    peer: IpAddr,
    state: Mutex<State>,
    close: Notify,
}

#[derive(Debug)]
struct State {
    /// Requests that are not answered in full.
    requests: usize,
    /// Those of them whose body is still coming.
    unread: usize,
    /// Whether any request came yet.
    any: bool,
    /// Since when a head is coming.
    head_since: Option<Instant>,
    /// Since when there is no request.
    quiet_since: Instant,
    /// When a byte moved last.
    moved: Instant,
    /// Whether it speaks HTTP/2, whose frames may be no heads.
    is_http2: bool,
}

impl Connection {
    fn new(number: u64, peer: IpAddr, now: Instant) -> Self {
        let state = State {
            requests: 0,
            unread: 0,
            any: false,
            head_since: None,
            quiet_since: now,
            moved: now,
            is_http2: false,
        };
        Self { number, peer, state: Mutex::new(state), close: Notify::new() }
    }

    /// Waits until it is to be closed.
    pub async fn closing(&self) {
        self.close.notified().await;
    }

    /// Notes that bytes came.
    pub fn read(&self, bytes: &[u8], now: Instant) {
        let mut state = lock(&self.state);
        state.moved = now;
        if !state.any && state.head_since.is_none() {
            state.is_http2 = bytes.starts_with(b"PRI ");
        }
        let may_be_head = state.requests == 0 && !(state.any && state.is_http2);
        if may_be_head && state.head_since.is_none() {
            state.head_since = Some(now);
        }
    }

    /// Notes that bytes were sent.
    pub fn wrote(&self, now: Instant) {
        lock(&self.state).moved = now;
    }

    /// Notes that a request's head has come whole.
    pub fn begin(self: &Arc<Self>) -> UnderWay {
        let mut state = lock(&self.state);
        state.requests += 1;
        state.any = true;
        state.head_since = None;
        drop(state);
        UnderWay::new(Arc::clone(self))
    }

    /// Notes that a request was answered, or given up.
    pub fn end(&self, now: Instant) {
        let mut state = lock(&self.state);
        state.requests -= 1;
        state.quiet_since = now;
    }

    /// Notes that the body of a request is still coming, or no more.
    pub fn set_unread(&self, is_unread: bool) {
        let mut state = lock(&self.state);
        if is_unread {
            state.unread += 1;
        } else {
            state.unread -= 1;
        }
    }

    /// Whether no whole request of it is being answered.
    fn may_give_way(&self) -> bool {
        let state = lock(&self.state);
        state.requests <= state.unread
    }

    fn is_overdue(&self, bounds: &Bounds, now: Instant) -> bool {
        let state = lock(&self.state);
        if state.requests > 0 {
            return now.saturating_duration_since(state.moved) >= bounds.stalled;
        }
        let since = |since| now.saturating_duration_since(since);
        state.head_since.is_some_and(|head| since(head) >= bounds.head)
            || since(state.quiet_since) >= bounds.idle
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn peer(last: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, last))
    }

    fn connections(total: usize, of_peer: usize) -> Arc<Connections> {
        let s = Duration::from_secs;
        let bounds = Bounds { connections: total, of_peer, head: s(10), idle: s(60), stalled: s(1_000) };
        Arc::new(Connections::new(bounds))
    }

    fn is_closed(place: &Place) -> bool {
        use std::task::{Context, Poll, Waker};
        let notified = std::pin::pin!(place.connection.close.notified());
        matches!(Future::poll(notified, &mut Context::from_waker(Waker::noop())), Poll::Ready(()))
    }

    #[test]
    fn the_oldest_one_of_the_peer_without_a_whole_request_gives_way() {
        let (connections, now) = (connections(10, 2), Instant::now());
        let enter = |last| connections.enter(peer(last), now).unwrap();
        let (one, two, other) = (enter(1), enter(1), enter(2));
        let under_way = one.connection.begin();
        let three = enter(1);
        assert!(is_closed(&two) && !is_closed(&one) && !is_closed(&other));
        let also = three.connection.begin();
        assert!(connections.enter(peer(1), now).is_none(), "each has a request");
        three.connection.set_unread(true);
        let four = enter(1);
        assert!(is_closed(&three) && !is_closed(&four), "its body is still coming");
        drop((under_way, also));
    }

    #[test]
    fn where_there_are_too_many_one_of_the_peer_with_the_most_gives_way() {
        let (connections, now) = (connections(4, 4), Instant::now());
        let enter = |last| connections.enter(peer(last), now).unwrap();
        let (other, first, second, third) = (enter(9), enter(1), enter(1), enter(1));
        let new = enter(2);
        assert!(is_closed(&first) && !is_closed(&other) && !is_closed(&second) && !is_closed(&third));
        assert_eq!(connections.len(), 4);
        drop((first, new, third, second));
        assert_eq!(connections.len(), 1);
        assert_eq!(lock(&connections.open).of_peer.len(), 1);
    }

    #[test]
    fn a_head_must_come_and_an_idle_connection_ends() {
        let (connections, now) = (connections(4, 4), Instant::now());
        let later = |s| now + Duration::from_secs(s);
        let place = connections.enter(peer(1), now).unwrap();
        let overdue = |s| place.connection.is_overdue(&connections.bounds, later(s));
        assert!(!overdue(59) && overdue(60));
        place.connection.read(b"GET", later(50));
        place.connection.read(b" /", later(59));
        assert!(!overdue(59) && overdue(60), "10 s after its first byte");
        let under_way = place.connection.begin();
        assert!(!overdue(900), "it waits for its answer");
        assert!(overdue(1_059), "but not for ever");
        place.connection.end(later(100));
        std::mem::forget(under_way);
        assert!(!overdue(159) && overdue(160));
    }
}
