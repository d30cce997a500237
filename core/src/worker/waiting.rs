//! Requests of a worker that wait for units of their limit: how many may, for how long, and which are looked at next.

use std::collections::VecDeque;

/// The most requests that wait at one worker. Each holds what its client sends meanwhile, up to the proxy's limit for
/// a connection.
pub const MAX_WAITING: usize = 256;
/// The most requests that are looked at in one turn, but for those whose time is over. To wake one and decide on it takes
/// some 17 µs, and its worker serves others between two turns.
pub const LOOKS_PER_TURN: usize = 64;

/// Names a request on its list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// The requests that wait at one worker, in the order in which they are looked at. `W` wakes one.
#[derive(Debug)]
pub struct WaitingList<W> {
    entries: VecDeque<Entry<W>>,
    next: u64,
}

#[derive(Debug)]
struct Entry<W> {
    ticket: Ticket,
    until_ns: u64,
    /// It was woken, and not looked at since.
    woken: bool,
    waker: W,
}

impl<W> Default for WaitingList<W> {
    fn default() -> Self {
        Self { entries: VecDeque::new(), next: 0 }
    }
}

impl<W> WaitingList<W> {
    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether one more may wait.
    pub fn has_room(&self) -> bool {
        self.entries.len() < MAX_WAITING
    }

    /// Adds a request, to be looked at last, that waits until `until_ns`. `None` when there is no room.
    pub fn join(&mut self, until_ns: u64, waker: W) -> Option<Ticket> {
        if !self.has_room() {
            return None;
        }
        let ticket = Ticket(self.next);
        self.next = self.next.wrapping_add(1);
        self.entries.push_back(Entry { ticket, until_ns, woken: false, waker });
        Some(ticket)
    }

    /// Takes a request off the list; what wakes it, if it was there.
    pub fn leave(&mut self, ticket: Ticket) -> Option<W> {
        self.entries.remove(self.place(ticket)?).map(|entry| entry.waker)
    }

    /// Until when a request waits; `None` when it is not on the list.
    pub fn until_ns(&self, ticket: Ticket) -> Option<u64> {
        self.entries.get(self.place(ticket)?).map(|entry| entry.until_ns)
    }

    /// Puts a request that was looked at behind all others; whether it was there. All keep their order when all of
    /// them are looked at.
    pub fn stay(&mut self, ticket: Ticket) -> bool {
        let Some(entry) = self.place(ticket).and_then(|place| self.entries.remove(place)) else {
            return false;
        };
        self.entries.push_back(Entry { woken: false, ..entry });
        true
    }

    /// Wakes those that are to be looked at now: the next [`LOOKS_PER_TURN`], and every one whose time is over. One that
    /// was woken is not woken again before it was looked at, so that a slow worker gets no more than it can do.
    pub fn wake(&mut self, now_ns: u64, wake: impl Fn(&W)) {
        let under_way = self.entries.iter().filter(|entry| entry.woken).count();
        let mut left = LOOKS_PER_TURN.saturating_sub(under_way);
        for entry in self.entries.iter_mut().filter(|entry| !entry.woken) {
            if left > 0 || entry.until_ns <= now_ns {
                left = left.saturating_sub(1);
                entry.woken = true;
                wake(&entry.waker);
            }
        }
    }

    fn place(&self, ticket: Ticket) -> Option<usize> {
        self.entries.iter().position(|entry| entry.ticket == ticket)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// A list of requests by number, and their tickets.
    fn list(requests: usize, until_ns: u64) -> (WaitingList<usize>, Vec<Ticket>) {
        let mut list = WaitingList::default();
        let tickets = (0..requests).map(|request| list.join(until_ns, request).unwrap()).collect();
        (list, tickets)
    }

    fn woken(list: &mut WaitingList<usize>, now_ns: u64) -> Vec<usize> {
        let woken = RefCell::new(Vec::new());
        list.wake(now_ns, |request| woken.borrow_mut().push(*request));
        woken.into_inner()
    }

    #[test]
    fn those_that_came_first_are_looked_at_first_and_keep_their_order() {
        let (mut list, tickets) = list(5, 100);
        for _ in 0..3 {
            assert_eq!(woken(&mut list, 10), [0, 1, 2, 3, 4]);
            assert!(woken(&mut list, 10).is_empty(), "not before they were looked at");
            for ticket in &tickets {
                assert!(list.stay(*ticket));
            }
        }
        assert_eq!(list.leave(tickets[0]), Some(0));
        let late = list.join(100, 5).unwrap();
        assert_eq!(woken(&mut list, 10), [1, 2, 3, 4, 5]);
        assert!(list.stay(late) && list.stay(tickets[1]));
        assert_eq!(woken(&mut list, 10), [5, 1], "the others are still to be looked at");
    }

    #[test]
    fn a_turn_wakes_so_many_and_the_next_one_goes_on_after_them() {
        let (mut list, tickets) = list(2 * LOOKS_PER_TURN + 2, 100);
        let first: Vec<usize> = (0..LOOKS_PER_TURN).collect();
        assert_eq!(woken(&mut list, 0), first);
        assert!(woken(&mut list, 0).is_empty(), "the worker has not come to any of them");
        list.stay(tickets[0]);
        list.leave(tickets[1]);
        assert_eq!(woken(&mut list, 0), [LOOKS_PER_TURN, LOOKS_PER_TURN + 1]);
        for ticket in &tickets {
            list.stay(*ticket);
        }
        assert_eq!(woken(&mut list, 0).first(), Some(&0));
    }

    #[test]
    fn one_whose_time_is_over_is_looked_at_whatever_comes_before_it() {
        let (mut list, _) = list(MAX_WAITING - 1, 100);
        let short = list.join(50, usize::MAX).unwrap();
        assert_eq!(list.until_ns(short), Some(50));
        assert_eq!(woken(&mut list, 49).len(), LOOKS_PER_TURN);
        assert_eq!(woken(&mut list, 50), [usize::MAX]);
        assert_eq!(woken(&mut list, 100).len(), MAX_WAITING - 1 - LOOKS_PER_TURN);
    }

    #[test]
    fn no_more_wait_than_may_and_one_that_left_is_not_there() {
        let (mut list, tickets) = list(MAX_WAITING, 100);
        assert!(!list.has_room() && !list.is_empty());
        assert_eq!(list.join(100, 0), None);
        assert_eq!(list.leave(tickets[7]), Some(7));
        assert_eq!((list.leave(tickets[7]), list.until_ns(tickets[7])), (None, None));
        assert!(!list.stay(tickets[7]), "it does not come back");
        let ticket = list.join(100, 0).unwrap();
        assert!(!tickets.contains(&ticket), "each has a ticket of its own");
        for ticket in tickets {
            list.leave(ticket);
        }
        list.leave(ticket);
        assert!(list.is_empty() && woken(&mut list, 1_000).is_empty());
    }
}
