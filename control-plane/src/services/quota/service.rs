//! The ledger of limits, where it is kept: the arithmetic is [`keygate_core::quota`]; here it has a clock, a disk and
//! callers that wait.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use keygate_core::quota::{Account, Answer, ExchangeError, Ledger, Member, Question, Saved};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, oneshot, watch};

use super::disk::{Disk, DiskError, Head, Rows};
use crate::observe::metrics::Doubts;

/// A question is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QuotaError {
    /// A later one came before it.
    #[error("a later question was answered already")]
    Superseded,
    /// It could not be written to disk, so nothing is granted.
    #[error("the ledger of limits could not be written to disk; ask again")]
    NotKept,
    /// Another control plane keeps the ledger now.
    #[error("another control plane keeps the ledger of limits now; ask again")]
    Over,
    /// Another control plane may keep the ledger now.
    #[error("it is not known whether another control plane keeps the ledger of limits now; ask again")]
    Suspended,
}

/// The basis of a ledger that is opened.
#[derive(Debug, Clone, Copy)]
pub enum Origin<'o> {
    /// The file of this control plane, if it was kept here by the change with this stamp, or by the one before.
    Disk {
        /// The stamp of the change that says who keeps the ledger.
        since: u64,
        /// Another stamp by which it may have been kept here.
        before: Option<u64>,
        /// There was no ledger in the fleet before, unless there is one here.
        first: bool,
    },
    /// The ledger as the control plane before handed it over.
    Handover {
        /// The stamp of the change that says who keeps the ledger.
        since: u64,
        /// The ledger, by the clock of [`now_ns`].
        saved: &'o Saved,
        /// Nothing was granted since then.
        whole: bool,
    },
}

/// The ledger, while it is kept here.
#[derive(Debug)]
pub struct LedgerService {
    ledger: Mutex<Ledger>,
    writer: Mutex<Option<Writer>>,
    /// A write failed: what was changed since then is not on disk.
    behind: Arc<AtomicBool>,
    waiting: Mutex<HashMap<Member, Arc<Notify>>>,
    /// Changes with each exchange.
    exchanges: watch::Sender<u64>,
    since: u64,
    over: AtomicBool,
    suspended: AtomicBool,
}

/// Writes what changed, in the order in which it was agreed, and many changes at once.
#[derive(Debug)]
struct Writer {
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

struct Job {
    work: Work,
    done: oneshot::Sender<bool>,
}

enum Work {
    Rows(Rows),
    Everything(Box<(Head, Saved)>),
}

impl LedgerService {
    /// Opens the ledger from what was kept. `era` distinguishes a ledger that begins from all others.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub fn open(dir: &Path, hot_restart: bool, era: u64, origin: Origin<'_>) -> Result<Self, DiskError> {
        let now_ns = now_ns();
        let had_one = Disk::began(dir);
        let opened = Disk::open(dir);
        let (disk, kept) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                tracing::error!(%error, "the ledger of limits cannot be read; it is put aside, and proxies tell what they have");
                Disk::put_aside(dir);
                Disk::open(dir)?
            }
        };
        let (since, ledger) = match origin {
            Origin::Disk { since, before, first } => {
                let is_ours = |head: &Head| head.since == since || before == Some(head.since);
                let ledger = match kept {
                    Some((head, saved)) if is_ours(&head) => {
                        Ledger::resume(&rebased(saved, &head, now_ns), hot_restart, now_ns)
                    }
                    None if first && !had_one => Ledger::new(era, hot_restart, now_ns),
                    _ => {
                        tracing::warn!(
                            "what was granted of limits is not known; limits do not grow at any proxy for 15 s, until proxies have told"
                        );
                        Ledger::recovering(era, hot_restart, now_ns)
                    }
                };
                (since, ledger)
            }
            Origin::Handover { since, saved, whole: true } => {
                (since, Ledger::resume(saved, hot_restart, now_ns))
            }
            Origin::Handover { since, saved, whole: false } => {
                (since, Ledger::take_over(saved, era, hot_restart, now_ns))
            }
        };
        let saved = ledger.saved();
        disk.replace(&head_of(&saved, since), &saved)?;
        Disk::note_begin(dir)?;
        let behind = Arc::new(AtomicBool::new(false));
        let writer = Writer::start(disk, Arc::clone(&behind))?;
        Ok(Self {
            ledger: Mutex::new(ledger),
            writer: Mutex::new(Some(writer)),
            behind,
            waiting: Mutex::default(),
            exchanges: watch::Sender::new(0),
            since,
            over: AtomicBool::new(false),
            suspended: AtomicBool::new(false),
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
            let hold = Duration::from_nanos(self.ledger().hold_ns());
            let notify = Arc::clone(lock(&self.waiting).entry(question.member).or_default());
            let news = async {
                loop {
                    let notified = notify.notified();
                    tokio::pin!(notified);
                    notified.as_mut().enable();
                    if self.is_to_be_answered(question) {
                        return;
                    }
                    notified.await;
                }
            };
            tokio::select! {
                () = news => {}
                () = tokio::time::sleep(hold) => {}
                _ = stopping.wait_for(|stop| *stop) => {}
            }
        }
        let (answer, written) = self.exchange(question)?;
        if let Some(written) = written
            && !written.await.unwrap_or(false)
        {
            return Err(QuotaError::NotKept);
        }
        self.exchanges.send_modify(|count| *count = count.wrapping_add(1));
        Ok(answer)
    }

    /// The answer, and when it may be sent.
    fn exchange(&self, question: &Question) -> Result<(Answer, Option<oneshot::Receiver<bool>>), QuotaError> {
        let mut ledger = self.ledger();
        if self.over.load(Ordering::Acquire) {
            return Err(QuotaError::Over);
        }
        if self.suspended.load(Ordering::Acquire) {
            return Err(QuotaError::Suspended);
        }
        let exchange = ledger.exchange(question, now_ns()).map_err(|error| match error {
            ExchangeError::Superseded => QuotaError::Superseded,
        })?;
        // In the order of the exchanges: the ledger is locked.
        let written = self.write(&mut ledger);
        drop(ledger);
        let waiting = lock(&self.waiting);
        match &exchange.wake {
            None => waiting.values().for_each(|notify| notify.notify_waiters()),
            Some(members) => {
                members
                    .iter()
                    .filter_map(|member| waiting.get(member))
                    .for_each(|notify| notify.notify_waiters());
            }
        }
        Ok((exchange.answer, written))
    }

    /// Has what changed written, if anything did.
    fn write(&self, ledger: &mut Ledger) -> Option<oneshot::Receiver<bool>> {
        let changes = ledger.take_changes();
        let behind = self.behind.swap(false, Ordering::AcqRel);
        if changes.is_empty() && !behind {
            return None;
        }
        let work = if behind {
            let saved = ledger.saved();
            Work::Everything(Box::new((head_of(&saved, self.since), saved)))
        } else {
            Work::Rows(Rows::of(ledger, &changes))
        };
        let (done, written) = oneshot::channel();
        let writer = lock(&self.writer);
        // Without a writer, the answer says that nothing was written.
        if let Some(writer) = &*writer {
            let _ended = writer.jobs.send(Job { work, done });
        }
        Some(written)
    }

    /// Does what is due at a time. To be called several times a second.
    pub fn on_tick(&self) {
        let mut ledger = self.ledger();
        let recovers = ledger.saves_recovering();
        let any = ledger.on_time(now_ns());
        if recovers && !ledger.saves_recovering() {
            tracing::info!("limits grow again: proxies had time to tell what they have");
            self.behind.store(true, Ordering::Release);
        }
        drop(self.write(&mut ledger));
        if any {
            lock(&self.waiting).retain(|member, notify| {
                notify.notify_waiters();
                ledger.knows(member)
            });
        }
    }

    /// The stamp of the change by which it is kept here.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Nothing more is granted; returns when everything is on disk and the file is closed.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
        let ledger = self.ledger();
        lock(&self.waiting).values().for_each(|notify| notify.notify_waiters());
        drop(ledger);
        if let Some(Writer { jobs, thread }) = lock(&self.writer).take() {
            drop(jobs);
            let _panicked = thread.join();
        }
        self.exchanges.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Grants nothing, or does so again: whether another control plane keeps the ledger now is not known.
    pub fn suspend(&self, suspended: bool) {
        if self.suspended.swap(suspended, Ordering::AcqRel) != suspended {
            if suspended {
                tracing::error!(
                    "neither Redis nor the other control planes can be reached: proxies go by their shares of limits"
                );
            } else {
                tracing::info!("limits are divided again");
            }
        }
    }

    /// Whether it grants nothing, see [`LedgerService::suspend`].
    pub fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Acquire)
    }

    /// Has a proxy leave: it reports what it spent, and gives back the rest. Whether it has after a while, or `None` if it
    /// is not known.
    pub async fn drain(&self, proxy: u64, within: Duration) -> Option<bool> {
        let mut exchanges = self.exchanges.subscribe();
        if !self.ledger().drain(proxy) {
            return None;
        }
        lock(&self.waiting).values().for_each(|notify| notify.notify_waiters());
        let drained = async {
            while !self.ledger().has_left(proxy) {
                if exchanges.changed().await.is_err() {
                    return;
                }
            }
        };
        Some(tokio::time::timeout(within, drained).await.is_ok())
    }

    /// Whether a process of a proxy was drained: it refuses limited keys.
    pub fn is_drained(&self, member: &Member) -> bool {
        self.ledger().leaves(member)
    }

    /// Whether a question is to be answered now: there is news, or a later one was answered, or none is any more.
    fn is_to_be_answered(&self, question: &Question) -> bool {
        self.over.load(Ordering::Acquire) || self.ledger().has_news(question, now_ns())
    }

    /// The accounts of which the greatest part of their limit is in use, with that and the limit.
    pub fn busiest(&self, count: usize) -> Vec<(Account, u32, u32)> {
        let ledger = self.ledger();
        let mut all: Vec<_> = ledger.usage(now_ns()).filter(|(_, used, _)| *used > 0).collect();
        drop(ledger);
        let part = |(_, used, limit): &(Account, u32, u32)| {
            u64::from(*used) * 1_000_000 / u64::from((*limit).max(1))
        };
        all.sort_by_key(|account| std::cmp::Reverse((part(account), account.1)));
        all.truncate(count);
        all
    }

    /// Proxies that the ledger does not hear, and whether limits grow.
    pub fn doubts(&self) -> Doubts {
        let ledger = self.ledger();
        let now_ns = now_ns();
        Doubts {
            silent: ledger.silent(now_ns),
            recovers_in: Duration::from_nanos(ledger.recovers_in_ns(now_ns)),
            suspended: self.is_suspended(),
            released_proxies: ledger.released_members(),
            released_units: ledger.released_units(),
        }
    }

    /// Everything that another control plane needs to go on.
    pub fn saved(&self) -> Saved {
        self.ledger().saved()
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }
}

impl Drop for LedgerService {
    fn drop(&mut self) {
        self.end();
    }
}

impl Writer {
    fn start(disk: Disk, behind: Arc<AtomicBool>) -> Result<Self, DiskError> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let run = move || {
            while let Ok(first) = queue.recv() {
                let mut batch = vec![first];
                batch.extend(queue.try_iter());
                let mut written = true;
                let mut rows = Vec::new();
                for job in &batch {
                    match &job.work {
                        Work::Rows(more) => rows.push(more),
                        Work::Everything(everything) => {
                            rows.clear();
                            let (head, saved) = &**everything;
                            written = note(disk.replace(head, saved));
                        }
                    }
                }
                if !rows.is_empty() && written {
                    written = note(disk.write(rows.into_iter()));
                }
                if !written {
                    behind.store(true, Ordering::Release);
                }
                for job in batch {
                    let _gave_up = job.done.send(written);
                }
            }
        };
        let thread = std::thread::Builder::new().name("limits".into()).spawn(run)?;
        Ok(Self { jobs, thread })
    }
}

/// Whether a write was done.
fn note(result: Result<(), DiskError>) -> bool {
    if let Err(error) = &result {
        tracing::error!(%error, "nothing more is granted of limits until the disk takes it");
    }
    result.is_ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn head_of(saved: &Saved, since: u64) -> Head {
    Head { era: saved.era, recovering: saved.recovering, since, boot: boot(), clocks: (now_ns(), unix_ms()) }
}

/// The kept rows by this start's monotonic clock: times of another start of the machine are moved by the wall clock.
fn rebased(saved: Saved, head: &Head, now_ns: u64) -> Saved {
    if !head.boot.is_empty() && head.boot == boot() {
        return saved;
    }
    moved(saved, head.clocks, (now_ns, unix_ms()))
}

/// A ledger whose times are moved from one pair of clocks to another.
pub fn moved(saved: Saved, from: (u64, u64), to: (u64, u64)) -> Saved {
    let passed_ns = to.1.saturating_sub(from.1).saturating_mul(1_000_000);
    let at = |last_ns: u64| {
        let age_ns = i128::from(from.0) + i128::from(passed_ns) - i128::from(last_ns);
        u64::try_from(i128::from(to.0) - age_ns.max(0)).unwrap_or(0)
    };
    let spends =
        saved.spends.iter().map(|row| keygate_core::quota::SpendRow { last_ns: at(row.last_ns), ..*row });
    Saved { spends: spends.collect(), ..saved }
}

/// Nanoseconds of a clock that is never set, from 40 days before the machine started: so that a spend of the longest window
/// ago has a time, too.
pub fn now_ns() -> u64 {
    const BEFORE_NS: u64 = 40 * 86_400 * 1_000_000_000;
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let since_ns =
        seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0));
    since_ns.saturating_add(BEFORE_NS)
}

/// Unix milliseconds.
pub fn unix_ms() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000).saturating_add(u64::try_from(now.tv_nsec / 1_000_000).unwrap_or(0))
}

/// The start of the machine; empty when it cannot be told.
fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use keygate_core::quota::{FORMAT, Report, SpendRow};

    use super::*;

    const FIRST: Origin<'_> = Origin::Disk { since: 0, before: None, first: true };

    fn open(dir: &Path, origin: Origin<'_>) -> LedgerService {
        LedgerService::open(dir, false, 7, origin).unwrap()
    }

    fn recovers(dir: &Path, origin: Origin<'_>) -> bool {
        !open(dir, origin).doubts().recovers_in.is_zero()
    }

    #[test]
    fn a_ledger_that_is_lost_or_damaged_recovers() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!recovers(dir.path(), FIRST), "there was none before");
        assert!(!recovers(dir.path(), FIRST), "what was kept is used");
        std::fs::remove_file(dir.path().join("quota.redb")).unwrap();
        assert!(recovers(dir.path(), FIRST), "lost");
        assert!(recovers(dir.path(), FIRST), "that is kept, too");

        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), FIRST));
        std::fs::write(dir.path().join("quota.redb"), b"none of ours").unwrap();
        assert!(recovers(dir.path(), FIRST), "damaged");
        assert!(dir.path().join("quota.redb.broken").exists());
    }

    #[test]
    fn a_ledger_that_was_kept_elsewhere_meanwhile_recovers() {
        let dir = tempfile::tempdir().unwrap();
        let later = |since| Origin::Disk { since, before: None, first: false };
        drop(open(dir.path(), FIRST));
        // Alone at first, then one of several.
        assert!(!recovers(dir.path(), Origin::Disk { since: 5, before: Some(0), first: true }));
        assert!(!recovers(dir.path(), later(5)));
        assert!(recovers(dir.path(), later(9)), "another kept it between 5 and 9");
        let dir = tempfile::tempdir().unwrap();
        assert!(recovers(dir.path(), later(9)), "there was one, but not here");
        let saved = Saved { era: 3, ..Saved::default() };
        let handed_over = |whole| Origin::Handover { since: 12, saved: &saved, whole };
        assert!(!recovers(dir.path(), handed_over(true)));
        assert!(recovers(dir.path(), handed_over(false)));
    }

    #[tokio::test]
    async fn caps_and_spends_are_on_disk_before_the_answer() {
        let dir = tempfile::tempdir().unwrap();
        let account = Account { key: 5, window_s: 3_600 };
        let member = Member { proxy: 1, incarnation: 2 };
        let question = |number, era, share, reports| Question {
            format: FORMAT,
            member,
            number,
            era,
            new: number == 1,
            void: false,
            share,
            left: false,
            reports,
        };
        let service = open(dir.path(), FIRST);
        let stopping = watch::channel(false).1;
        let joined = service.answer(&question(1, 0, 0, Vec::new()), stopping.clone()).await.unwrap();
        assert!(joined.share > 0);
        let report = Report {
            account,
            limit: 100,
            cap: 100,
            used: 30,
            spent: 30,
            age_ms: 10,
            wanted: 30,
            lacks: 0,
            idle: false,
        };
        let asked = question(2, joined.era, joined.share, vec![report]);
        service.answer(&asked, stopping.clone()).await.unwrap();
        assert_eq!(service.answer(&asked, stopping.clone()).await, Err(QuotaError::Superseded));
        // As after a kill: nothing is closed in order.
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(dir.path().join("quota.redb"), copy.path().join("quota.redb")).unwrap();
        let again = open(copy.path(), FIRST);
        assert_eq!(again.busiest(3), [(account, 30, 100)]);
        assert_eq!(again.saved().holders.len(), 1);
        assert_eq!(again.doubts().recovers_in, Duration::ZERO);
        service.end();
        assert_eq!(service.answer(&asked, stopping).await, Err(QuotaError::Over));
    }

    #[test]
    fn times_of_another_start_of_the_machine_keep_their_age() {
        let row = |last_ns| SpendRow {
            account: Account { key: 5, window_s: 3_600 },
            member: Member { proxy: 1, incarnation: 2 },
            limit: 100,
            last_ns,
            units: 1,
        };
        let saved = Saved { spends: vec![row(900), row(1_000)], ..Saved::default() };
        // Written 100 ns after the first; 2 ms later by the wall clock the machine has another clock.
        let now = moved(saved.clone(), (1_000, 50), (70_000_000, 52));
        assert_eq!(now.spends, [row(67_999_900), row(68_000_000)]);
        // A wall clock that was set back makes nothing younger than it was.
        let now = moved(saved, (1_000, 50), (70_000_000, 10));
        assert_eq!(now.spends, [row(69_999_900), row(70_000_000)]);
    }
}
