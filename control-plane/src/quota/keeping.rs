//! The ledger of limits: divides them among proxies, so that none of them asks on a request and the fleet stays within
//! them. The arithmetic is [`keygate_core::quota`]; here it has a clock and a disk.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keygate_core::limits::Limits;
use keygate_core::quota::{
    Account, Answer, ExchangeError, HOLD_NS, Ledger, MAX_KEEP_S, Question, Saved, Terms,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use super::book::{Book, BookError, Head, Page};
use crate::app::App;
use crate::state::State;

/// How long an agreement holds that gives a proxy more than its own share.
const LEASE_S: u32 = 30;

/// Why a question is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuotaError {
    /// A later one came before it.
    #[error("a later question was answered already")]
    Superseded,
    /// It could not be kept, so nothing is handed out.
    #[error("what is leased could not be kept; ask again")]
    NotKept,
    /// Another control plane keeps the ledger now.
    #[error("another control plane keeps the limits now; ask again")]
    Over,
}

/// The ledger, while it is kept here.
#[derive(Debug)]
pub struct Keeping {
    ledger: Arc<Mutex<Ledger>>,
    book: Arc<Book>,
    kept: Mutex<Kept>,
    /// One exchange at a time: what is written is in the order in which it was agreed. Whoever gave up holds it until
    /// what they agreed on is written.
    exchanging: Arc<tokio::sync::Mutex<()>>,
    /// Changes with each exchange.
    exchanges: watch::Sender<u64>,
    since: u64,
    over: AtomicBool,
}

/// How this control plane came to keep the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Began {
    /// The stamp of the change that made it so. What was kept by another one is not known to be all that is out.
    pub since: u64,
    /// What it was kept by until then, if this one kept it.
    pub before: Option<u64>,
    /// Whether there was none in the fleet before, unless there is one here.
    pub first: bool,
}

/// What the book has besides members and pools.
#[derive(Debug, Clone, Copy)]
struct Kept {
    terms: Terms,
    in_doubt: bool,
    /// A write failed: what was agreed since then is not in it.
    behind: bool,
}

/// What the terms follow from.
#[derive(Debug, Clone, Copy)]
pub struct Basis<'b> {
    /// How long proxies go on without news.
    pub hard_age: Duration,
    /// The limits.
    pub limits: &'b Limits,
    /// Whether some routes are served beyond the hard age.
    pub allows_stale: bool,
    /// Whether two processes of one proxy may serve at a time.
    pub hot_restart: bool,
    /// Whether there are other control planes, which may be there when this one is not.
    pub has_peers: bool,
}

impl Keeping {
    /// Goes on from what was kept. `era` tells a ledger that begins from all others.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn open(dir: &Path, basis: Basis<'_>, era: u64, began: Began) -> Result<Self, BookError> {
        let Began { since, before, first } = began;
        let terms = basis.terms();
        let (boot, now_ns) = (boot(), monotonic_ns());
        let had_one = Book::began(dir);
        let (book, ledger) = match Book::open(dir) {
            Ok((book, Some((head, saved)))) if head.since == since || before == Some(head.since) => {
                (book, Ledger::resume(terms, &saved, !boot.is_empty() && head.boot == boot, now_ns))
            }
            Ok((book, None)) if first && !had_one => (book, Ledger::new(terms, era)),
            Ok((book, kept)) if kept.is_some() || !had_one => {
                tracing::warn!(
                    "what was leased of limits elsewhere or since then is not known: nothing more is until all of it has ended"
                );
                (book, Ledger::in_doubt(terms, era, now_ns))
            }
            Ok((book, _)) => {
                tracing::error!(
                    "what was leased of limits is lost: nothing more is until all of it has ended"
                );
                (book, Ledger::in_doubt(terms, era, now_ns))
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    "what was leased of limits cannot be read: nothing more is until all of it has ended"
                );
                Book::put_aside(dir);
                (Book::open(dir)?.0, Ledger::in_doubt(terms, era, now_ns))
            }
        };
        let saved = ledger.saved();
        book.begin(&head_of(&saved, since), &saved)?;
        Book::note_begin(dir)?;
        let kept = Kept { terms: saved.terms, in_doubt: saved.in_doubt, behind: false };
        Ok(Self {
            ledger: Arc::new(Mutex::new(ledger)),
            book: Arc::new(book),
            kept: Mutex::new(kept),
            exchanging: Arc::default(),
            exchanges: watch::Sender::new(0),
            since,
            over: AtomicBool::new(false),
        })
    }

    /// Answers a question, once there is something to say or a moment has passed.
    ///
    /// # Errors
    /// See [`QuotaError`].
    pub async fn answer(
        &self,
        question: &Question,
        basis: Basis<'_>,
        mut stopping: watch::Receiver<bool>,
    ) -> Result<Answer, QuotaError> {
        let wanted = basis.terms();
        if question.reports.is_empty() {
            let mut exchanges = self.exchanges.subscribe();
            let news = async {
                while !self.is_to_be_answered(question) {
                    if exchanges.changed().await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = news => {}
                () = tokio::time::sleep(Duration::from_nanos(HOLD_NS)) => {}
                _ = stopping.wait_for(|stop| *stop) => {}
            }
        }
        let one_at_a_time = Arc::clone(&self.exchanging).lock_owned().await;
        let (answer, write) = self.exchange(question, wanted)?;
        if let Some(write) = write {
            let (book, since) = (Arc::clone(&self.book), self.since);
            // Nobody else exchanges before it is written, also when who asked is gone.
            let written = tokio::task::spawn_blocking(move || {
                let _one_at_a_time = one_at_a_time;
                match &write {
                    Write::Page(page) => book.write(page),
                    Write::Whole(saved) => book.begin(&head_of(saved, since), saved),
                }
                .map(|()| write)
            });
            // Should this be cut short, the next one writes the whole.
            self.kept().behind = true;
            match written.await {
                Ok(Ok(Write::Page(_))) => self.kept().behind = false,
                Ok(Ok(Write::Whole(saved))) => {
                    *self.kept() = Kept { terms: saved.terms, in_doubt: saved.in_doubt, behind: false };
                }
                Ok(Err(error)) => {
                    tracing::error!(%error, "nothing more is leased of limits");
                    return Err(QuotaError::NotKept);
                }
                Err(_) => return Err(QuotaError::NotKept),
            }
        }
        self.exchanges.send_modify(|count| *count = count.wrapping_add(1));
        Ok(answer)
    }

    /// What is answered, and what has to be written before.
    fn exchange(&self, question: &Question, wanted: Terms) -> Result<(Answer, Option<Write>), QuotaError> {
        let (mut ledger, kept) = (self.ledger(), *self.kept());
        if self.over.load(Ordering::Acquire) {
            return Err(QuotaError::Over);
        }
        let now_ns = monotonic_ns();
        let is_longer = |of: fn(&Terms) -> u32| of(&wanted) > of(&kept.terms);
        let is_other = is_longer(|terms| terms.longest_window_s) || is_longer(|terms| terms.keep_s);
        if is_other {
            ledger.lengthen(wanted, now_ns);
        }
        let exchange = ledger.exchange(question, now_ns).map_err(|error| match error {
            ExchangeError::Superseded => QuotaError::Superseded,
        })?;
        let is_over = kept.in_doubt && !ledger.is_in_doubt(now_ns);
        if is_other || is_over || kept.behind {
            return Ok((exchange.answer, Some(Write::Whole(Box::new(ledger.saved())))));
        }
        let mut page = Page::default();
        for member in exchange.members_changed {
            let saved = ledger.member(&member);
            page.members.push((member, saved));
        }
        for account in exchange.pools_changed {
            page.pools.push((account, ledger.pool(account)));
        }
        let is_empty = page.members.is_empty() && page.pools.is_empty();
        Ok((exchange.answer, (!is_empty).then_some(Write::Page(page))))
    }

    /// By which change it is kept here.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Nothing more is handed out.
    pub fn end(&self) {
        let _what_is_under_way_comes_first = self.ledger();
        self.over.store(true, Ordering::Release);
        self.exchanges.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Has a proxy give back what it has of limits and did not spend, since it is about to end; whether it has, after a
    /// while, or `None` if it is not known.
    pub async fn drain(&self, proxy: u64, within: Duration) -> Option<bool> {
        let mut exchanges = self.exchanges.subscribe();
        if !self.ledger().drain(proxy, monotonic_ns()) {
            return None;
        }
        self.exchanges.send_modify(|count| *count = count.wrapping_add(1));
        let drained = async {
            while !self.ledger().is_drained(proxy) {
                if exchanges.changed().await.is_err() {
                    return;
                }
            }
        };
        Some(tokio::time::timeout(within, drained).await.is_ok())
    }

    /// Whether there is news for who asks, or a later question of theirs was answered, or none is any more.
    fn is_to_be_answered(&self, question: &Question) -> bool {
        if self.over.load(Ordering::Acquire) {
            return true;
        }
        let ledger = self.ledger();
        let is_over = ledger.member(&question.member).is_some_and(|known| known.number >= question.number);
        is_over || ledger.has_news(&question.member, monotonic_ns())
    }

    /// The accounts of which the greatest part of their limit is in use, with that and the limit.
    pub fn busiest(&self, count: usize) -> Vec<(Account, u32, u32)> {
        let mut all: Vec<_> = self.ledger().usage().filter(|(_, used, _)| *used > 0).collect();
        let part = |(_, used, limit): &(Account, u32, u32)| {
            u64::from(*used) * 1_000_000 / u64::from((*limit).max(1))
        };
        all.sort_by_key(|account| std::cmp::Reverse((part(account), account.1)));
        all.truncate(count);
        all
    }

    /// Whether nothing is handed out for now.
    pub fn is_in_doubt(&self) -> bool {
        self.ledger().is_in_doubt(monotonic_ns())
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is to be written.
enum Write {
    /// What an exchange changed.
    Page(Page),
    /// Everything.
    Whole(Box<Saved>),
}

/// How long proxies that serve some routes beyond the hard age have something of limits.
const STALE_KEEP_S: u32 = 24 * 3_600;

/// The same where there are other control planes: as long as an operator may need to have another one keep the ledger.
const KEEP_S: u32 = 3_600;

impl<'b> Basis<'b> {
    /// What it is now.
    pub fn of(app: &App, state: &'b State) -> Self {
        Self {
            hard_age: app.config.hard_age,
            limits: &state.rules.limits,
            allows_stale: state.rules.policy.allows_stale(),
            hot_restart: app.config.hot_restart,
            has_peers: state.has_peers(),
        }
    }

    /// A proxy that hears nothing for the hard age serves no limited keys, so its share need not last longer, unless a
    /// route goes on without news, or there is news from a control plane that does not keep the ledger.
    fn terms(&self) -> Terms {
        let hard_age_s = u32::try_from(self.hard_age.as_secs()).unwrap_or(u32::MAX);
        let least_s = match (self.allows_stale, self.has_peers) {
            (true, _) => STALE_KEEP_S,
            (false, true) => KEEP_S,
            (false, false) => LEASE_S,
        };
        let keep_s = hard_age_s.max(least_s);
        Terms {
            lease_s: LEASE_S,
            keep_s: keep_s.min(MAX_KEEP_S),
            longest_window_s: self.limits.longest_window_s(),
            hot_restart: self.hot_restart,
        }
    }
}

fn head_of(saved: &Saved, since: u64) -> Head {
    Head { era: saved.era, terms: saved.terms, in_doubt: saved.in_doubt, boot: boot(), since }
}

/// Nanoseconds of a clock that nobody sets, since the machine started.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// Which start of the machine that is; empty when it cannot be told.
fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Began = Began { since: 0, before: None, first: true };

    fn open(dir: &Path, began: Began) -> Keeping {
        let limits = Limits::default();
        let basis = Basis {
            hard_age: Duration::from_secs(300),
            limits: &limits,
            allows_stale: false,
            hot_restart: false,
            has_peers: false,
        };
        Keeping::open(dir, basis, 7, began).unwrap()
    }

    #[test]
    fn a_ledger_that_is_lost_or_damaged_leases_nothing_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!open(dir.path(), FIRST).is_in_doubt(), "there was none before");
        assert!(!open(dir.path(), FIRST).is_in_doubt(), "it goes on from what was kept");
        std::fs::remove_file(dir.path().join("quota.redb")).unwrap();
        assert!(open(dir.path(), FIRST).is_in_doubt(), "lost");
        assert!(open(dir.path(), FIRST).is_in_doubt(), "that is kept, too");

        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), FIRST));
        std::fs::write(dir.path().join("quota.redb"), b"none of ours").unwrap();
        assert!(open(dir.path(), FIRST).is_in_doubt(), "damaged");
        assert!(dir.path().join("quota.redb.broken").exists());
    }

    #[test]
    fn a_ledger_that_was_kept_elsewhere_meanwhile_leases_nothing_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let later = |since| Began { since, before: None, first: false };
        drop(open(dir.path(), FIRST));
        // Alone at first, then one of several.
        assert!(!open(dir.path(), Began { since: 5, before: Some(0), first: true }).is_in_doubt());
        assert!(!open(dir.path(), later(5)).is_in_doubt());
        assert!(open(dir.path(), later(9)).is_in_doubt(), "another kept it between 5 and 9");
        let dir = tempfile::tempdir().unwrap();
        assert!(open(dir.path(), later(9)).is_in_doubt(), "there was one, but not here");
    }
}
