//! The ledger of limits: divides them among proxies, so that none of them asks on a request and the fleet stays within
//! them. The arithmetic is [`keygate_core::quota`]; here it has a clock and a disk.

mod book;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keygate_core::limits::Limits;
use keygate_core::quota::{Account, Answer, ExchangeError, HOLD_NS, Ledger, Question, Terms};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

pub use self::book::BookError;
use self::book::{Book, Head, Page};

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
}

/// Who may do how much.
#[derive(Debug)]
pub struct Quotas {
    ledger: Mutex<Ledger>,
    terms: Mutex<Terms>,
    book: Arc<Book>,
    /// One exchange at a time: what is written is in the order in which it was agreed.
    exchanging: tokio::sync::Mutex<()>,
    /// Changes with each exchange.
    exchanges: watch::Sender<u64>,
}

impl Quotas {
    /// Goes on from what was kept. `era` tells a ledger that begins from all others.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn open(dir: &Path, hard_age: Duration, limits: &Limits, era: u64) -> Result<Self, BookError> {
        let terms = terms(hard_age, limits);
        let (boot, now_ns) = (boot(), monotonic_ns());
        let (book, ledger) = match Book::open(dir) {
            Ok((book, None)) => (book, Ledger::new(terms, era)),
            Ok((book, Some((head, saved)))) => {
                (book, Ledger::resume(terms, &saved, !boot.is_empty() && head.boot == boot, now_ns))
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    "what was leased of limits cannot be read: nothing is handed out until all of it has ended"
                );
                Book::put_aside(dir);
                (Book::open(dir)?.0, Ledger::in_doubt(terms, era, now_ns))
            }
        };
        let saved = ledger.saved();
        let head = Head { era: saved.era, terms: saved.terms, in_doubt: saved.in_doubt, boot };
        book.begin(&head, &saved)?;
        Ok(Self {
            ledger: Mutex::new(ledger),
            terms: Mutex::new(saved.terms),
            book: Arc::new(book),
            exchanging: tokio::sync::Mutex::new(()),
            exchanges: watch::Sender::new(0),
        })
    }

    /// Answers a question, once there is something to say or a moment has passed.
    ///
    /// # Errors
    /// See [`QuotaError`].
    pub async fn answer(
        &self,
        question: &Question,
        mut stopping: watch::Receiver<bool>,
    ) -> Result<Answer, QuotaError> {
        if question.reports.is_empty() {
            let mut exchanges = self.exchanges.subscribe();
            let news = async {
                while !self.ledger().has_news(&question.member, monotonic_ns()) {
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
        let _one_at_a_time = self.exchanging.lock().await;
        let (answer, page) = {
            let mut ledger = self.ledger();
            let exchange = ledger.exchange(question, monotonic_ns()).map_err(|error| match error {
                ExchangeError::Superseded => QuotaError::Superseded,
            })?;
            let mut page = Page::default();
            for member in exchange.members_changed {
                let saved = ledger.member(&member);
                page.members.push((member, saved));
            }
            for account in exchange.pools_changed {
                page.pools.push((account, ledger.pool(account)));
            }
            (exchange.answer, page)
        };
        if !page.members.is_empty() || !page.pools.is_empty() {
            let book = Arc::clone(&self.book);
            match tokio::task::spawn_blocking(move || book.write(&page)).await {
                Ok(Ok(())) => {}
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

    /// Goes by limits with longer windows, or another hard age, from now on.
    pub fn go_by(&self, hard_age: Duration, limits: &Limits) {
        let wanted = terms(hard_age, limits);
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted.longest_window_s > terms.longest_window_s || wanted.keep_s > terms.keep_s {
            let mut ledger = self.ledger();
            let now_ns = monotonic_ns();
            *ledger = Ledger::resume(wanted, &ledger.saved(), true, now_ns);
            let saved = ledger.saved();
            *terms = saved.terms;
            let head = Head { era: saved.era, terms: saved.terms, in_doubt: saved.in_doubt, boot: boot() };
            if let Err(error) = self.book.begin(&head, &saved) {
                tracing::error!(%error, "that limits have longer windows could not be kept");
            }
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A proxy that hears nothing for the hard age serves no keys, so its share need not last longer.
fn terms(hard_age: Duration, limits: &Limits) -> Terms {
    let keep_s = u32::try_from(hard_age.as_secs()).unwrap_or(u32::MAX).clamp(LEASE_S, 31 * 86_400);
    Terms { lease_s: LEASE_S, keep_s, longest_window_s: limits.longest_window_s(), hot_restart: false }
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
