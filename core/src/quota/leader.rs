//! The leader of a proxy's VMs: reports to the ledger, and writes down what it grants.
//!
//! Whatever must outlive the leader is in shared data, so that another VM can go on at any point. Two leaders at once do no
//! harm: a question takes its number from shared data, and an answer counts only where the last number that was written is
//! its own.

use std::collections::{BTreeMap, BTreeSet};

use super::message::{Answer, FORMAT, Grant, MAX_ENTRIES, Member, Question, Recall, Report};
use super::page::{self, ABSENT, PAGES, Page, PageError, Write};
use super::standing::Standing;
use super::{ANSWER_NS, Account, RECOVER_NS, dirty, is_same_ledger};
use crate::shm::SharedData;

/// Time that a spend takes from a VM to the leader's queue: a tick of the VM and one of the leader.
const TICKS_NS: u64 = 60_000_000;
/// Interval at which the leader looks at pages that nobody marked, and how many: all of them in 6.4 s.
const SCAN_NS: u64 = 100_000_000;
const PAGES_PER_SCAN: u16 = 16;
/// Pages per tick while all of them have to be looked at.
const PAGES_PER_HURRY: u16 = 128;
/// Pause before the ledger is asked again about an account of which the proxy has no more units: while units are left
/// elsewhere, and when the limit was exhausted.
const SOON_NS: u64 = 100_000_000;
const EXHAUSTED_NS: u64 = 500_000_000;
const MS: u64 = 1_000_000;

/// The leader.
#[derive(Debug)]
pub struct Leader {
    member: Member,
    /// Accounts to report; true: at once.
    queue: BTreeMap<Account, bool>,
    asking: Option<Asking>,
    /// Accounts with a refused request to ask the ledger about, and when: it was asked a moment before.
    later: BTreeSet<(u64, Account)>,
    /// Time by which the queue is reported.
    report_at_ns: u64,
    /// All pages before this one were looked at since this VM leads, since what was granted is void, or, while the proxy
    /// leaves, since something was in use.
    looked_at: u16,
    /// Every record is to be reported.
    report_all: bool,
    next_page: u16,
    next_scan_ns: u64,
    /// The epoch of the standing that was seen last.
    epoch: u64,
}

/// Records of a page that the leader looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Records {
    All,
    Marked,
}

/// A question that was not answered yet.
#[derive(Debug)]
struct Asking {
    number: u64,
    said: u32,
    sent_ns: u64,
    accounts: BTreeSet<Account>,
}

impl Leader {
    /// A leader that has just taken over. `proxy` is the fingerprint of the proxy's node id, `incarnation` the number that
    /// was drawn for the process.
    pub fn new(proxy: u64, incarnation: u64) -> Self {
        Self {
            member: Member { proxy, incarnation },
            queue: BTreeMap::new(),
            asking: None,
            later: BTreeSet::new(),
            report_at_ns: 0,
            looked_at: 0,
            report_all: false,
            next_page: 0,
            next_scan_ns: 0,
            epoch: 0,
        }
    }

    /// The question to send now, if there is one. To be called every 10 ms or so: a key that is new to the proxy may wait
    /// for it. A question that is still out is given up then; its answer will not be taken.
    pub fn on_tick(&mut self, data: &mut impl SharedData, now_ns: u64) -> Option<Question> {
        let Some((standing, _)) = Standing::read(data) else {
            // If another VM wrote it meanwhile, so much the better.
            let _raced = Standing::default().write(data, ABSENT);
            return None;
        };
        if self.epoch != standing.epoch {
            self.epoch = standing.epoch;
            self.look_at_all(self.report_all);
        }
        for page in dirty::drain(data) {
            self.visit(data, page, Records::Marked, now_ns);
        }
        while self.later.first().is_some_and(|(at_ns, _)| *at_ns <= now_ns) {
            if let Some((_, account)) = self.later.pop_first() {
                self.visit(data, Page::index(account), Records::Marked, now_ns);
            }
        }
        self.look_on(data, &standing, now_ns);
        if now_ns >= self.next_scan_ns {
            self.next_scan_ns = now_ns.saturating_add(SCAN_NS);
            for _ in 0..PAGES_PER_SCAN {
                self.visit(data, self.next_page, Records::All, now_ns);
                self.next_page = self.next_page.saturating_add(1).checked_rem(PAGES).unwrap_or(0);
            }
        }
        if self.queue.is_empty() {
            self.report_at_ns = now_ns.saturating_add(standing.report_ns.saturating_sub(TICKS_NS));
        }
        let is_due = self.queue.values().any(|urgent| *urgent) || now_ns >= self.report_at_ns;
        let has_reports = is_due && !self.queue.is_empty();
        let asks = match &self.asking {
            None => true,
            Some(asking) if standing.question != asking.number => true,
            // It may be held back, but not if there is something to say.
            Some(asking) if asking.accounts.is_empty() && has_reports => true,
            Some(asking) if asking.accounts.is_empty() && self.may_say(&standing) != asking.said => true,
            Some(asking) if asking.accounts.is_empty() && standing.leaving && self.may_leave(&standing) => {
                true
            }
            Some(asking) => now_ns.saturating_sub(asking.sent_ns) > ANSWER_NS,
        };
        asks.then(|| self.ask(data, has_reports, now_ns)).flatten()
    }

    /// Takes an answer; whether it was to the last question and in time.
    pub fn on_answer(&mut self, data: &mut impl SharedData, answer: &Answer, now_ns: u64) -> bool {
        let Some(asking) = self.asking.take_if(|asking| asking.number == answer.number) else { return false };
        let Some((standing, cas)) = Standing::read(data) else { return false };
        if standing.question != answer.number || now_ns.saturating_sub(asking.sent_ns) > ANSWER_NS {
            self.requeue(asking);
            return false;
        }
        let is_other = standing.era != 0 && !is_same_ledger(standing.era, answer.era);
        // A ledger between the two may have ended its recovery without this proxy, and granted what it had.
        let is_void = is_other && now_ns >= standing.sent_ns.saturating_add(RECOVER_NS);
        if answer.rejoin || is_void {
            let next = Standing {
                epoch: standing.epoch.saturating_add(1),
                era: 0,
                share: 0,
                said: 0,
                leaving: false,
                ..standing
            };
            self.look_at_all(true);
            return next.write(data, cas).is_ok();
        }
        // Less comes before more: by the larger share or caps, nothing that was recalled may be spent.
        for recall in &answer.recalls {
            if recalled(data, recall, now_ns).is_err() {
                self.requeue(asking);
                return false;
            }
            self.queue.insert(recall.account, true);
        }
        for grant in &answer.grants {
            // If that fails, the proxy has what it reported, and the ledger counts no less.
            if granted(data, answer, grant, now_ns) != Ok(Some(false)) {
                self.queue.insert(grant.account, true);
            }
        }
        let answered: BTreeSet<Account> = answer.grants.iter().map(|grant| grant.account).collect();
        for account in asking.accounts.difference(&answered) {
            self.queue.insert(*account, true);
        }
        if !is_same_ledger(standing.era, answer.era) {
            self.look_at_all(true);
        }
        if answer.leave && !standing.leaving {
            self.look_at_all(false);
        }
        let next = Standing {
            share: answer.share,
            said: asking.said.max(answer.share),
            joined: true,
            // Another ledger may not know of it; what the one before it gave to others is not to be spent again.
            leaving: standing.leaving || answer.leave,
            shared: standing.shared || answer.share > 0,
            era: answer.era,
            sent_ns: asking.sent_ns,
            heard_ns: now_ns,
            report_ns: u64::from(answer.report_ms).saturating_mul(MS),
            ..standing
        };
        next.write(data, cas).is_ok()
    }

    /// The question was not answered, or not in a way that can be read.
    pub fn on_failure(&mut self, number: u64) {
        if let Some(asking) = self.asking.take_if(|asking| asking.number == number) {
            self.requeue(asking);
        }
    }

    fn requeue(&mut self, asking: Asking) {
        self.queue.extend(asking.accounts.into_iter().map(|account| (account, true)));
    }

    fn look_at_all(&mut self, report: bool) {
        self.looked_at = 0;
        self.report_all = report;
    }

    /// Goes on to look at all pages.
    fn look_on(&mut self, data: &mut impl SharedData, standing: &Standing, now_ns: u64) {
        let last = self.looked_at.saturating_add(PAGES_PER_HURRY).min(PAGES);
        for page in self.looked_at..last {
            let in_use = self.visit(data, page, Records::All, now_ns);
            if in_use && standing.leaving {
                // VMs return what they hold within a tick.
                self.looked_at = page;
                return;
            }
        }
        self.looked_at = last;
        if last == PAGES {
            self.report_all = false;
        }
    }

    /// Queues the accounts of a page that are to be reported, and drops records without use; whether VMs hold units of any
    /// of `which`.
    fn visit(&mut self, data: &mut impl SharedData, index: u16, which: Records, now_ns: u64) -> bool {
        let out = self.asking.as_ref().map_or(0, |asking| asking.number);
        let report_all = self.report_all;
        let found = page::change(data, index, false, |page, standing| {
            let (mut due, mut later, mut held, mut changed) = (Vec::new(), Vec::new(), false, false);
            let records = match which {
                Records::All => page.records()?,
                Records::Marked => page.marked()?,
            };
            for record in records {
                record.roll(standing, now_ns);
                held |= !record.draws.is_empty();
                match record.is_due(standing, out, now_ns) {
                    Some(urgent) => due.push((record.account, urgent)),
                    None if report_all && record.asked == 0 => due.push((record.account, true)),
                    None => {
                        if let Some(at_ns) = record.asks_at(now_ns) {
                            // It stays marked until then.
                            later.push((at_ns, record.account));
                            changed |= !std::mem::replace(&mut record.marked, true);
                            continue;
                        }
                    }
                }
                // From now on a worker marks the page again.
                changed |= std::mem::take(&mut record.marked);
            }
            let write = if page.tidy() || changed { Write::Yes } else { Write::No };
            Ok(((due, later, held), write))
        });
        let Ok(Some((due, later, held))) = found else { return found.is_err() };
        self.later.extend(later);
        for (account, urgent) in due {
            *self.queue.entry(account).or_default() |= urgent;
        }
        held
    }

    /// The share that the next question may say: see the proof, "a share that shrinks".
    fn may_say(&self, standing: &Standing) -> u32 {
        if self.queue.is_empty() && self.looked_at == PAGES { standing.share } else { standing.said }
    }

    fn may_leave(&self, standing: &Standing) -> bool {
        standing.leaving && self.looked_at == PAGES && self.queue.is_empty()
    }

    fn ask(&mut self, data: &mut impl SharedData, mut has_reports: bool, now_ns: u64) -> Option<Question> {
        if let Some(asking) = self.asking.take() {
            has_reports |= !asking.accounts.is_empty();
            self.requeue(asking);
        }
        let (standing, cas) = Standing::read(data)?;
        let number = standing.question.saturating_add(1);
        let standing = Standing { question: number, ..standing };
        standing.write(data, cas).ok()?;
        let mut reports = Vec::new();
        let mut contended = Vec::new();
        while has_reports && reports.len() < MAX_ENTRIES {
            let Some((account, _)) = self.queue.pop_first() else { break };
            match report(data, account, number, now_ns) {
                Ok(Some(report)) => reports.push(report),
                Ok(None) => {}
                Err(_) => contended.push((account, true)),
            }
        }
        self.queue.extend(contended);
        let said = self.may_say(&standing);
        let left = reports.is_empty() && self.may_leave(&standing);
        let accounts = reports.iter().map(|report| report.account).collect();
        self.asking = Some(Asking { number, said, sent_ns: now_ns, accounts });
        Some(Question {
            format: FORMAT,
            member: self.member,
            number,
            era: standing.era,
            new: !standing.joined,
            void: standing.era != 0 && now_ns >= standing.granted_until_ns(),
            share: said,
            left,
            reports,
        })
    }
}

/// The report of an account. From then until the answer, the proxy goes by the cap that it says.
fn report(
    data: &mut impl SharedData,
    account: Account,
    number: u64,
    now_ns: u64,
) -> Result<Option<Report>, PageError> {
    let report = page::change(data, Page::index(account), false, |page, standing| {
        let Some(record) = page.find(account)? else { return Ok((None, Write::No)) };
        record.roll(standing, now_ns);
        let idle = record.is_unused(now_ns) && record.refused == 0;
        if idle {
            record.cap = record.cap.min(standing.own(record.limit));
        }
        record.asked = number;
        record.reported_ns = now_ns;
        record.unreported = false;
        record.urgent = false;
        let report = Report {
            account,
            limit: record.limit,
            cap: record.cap.min(record.limit),
            used: record.in_use(),
            spent: record.spent,
            age_ms: now_ns.saturating_sub(record.spends.last_ns()).checked_div(MS).unwrap_or(0),
            wanted: if idle { 0 } else { record.demand(now_ns) },
            lacks: record.refused.min(record.limit),
            idle,
        };
        Ok((Some(report), Write::Yes))
    })?;
    Ok(report.flatten())
}

/// Keeps no more than the ledger leaves.
fn recalled(data: &mut impl SharedData, recall: &Recall, now_ns: u64) -> Result<(), PageError> {
    let Recall { account, limit, keep } = *recall;
    page::change(data, Page::index(account), true, |page, standing| {
        let record = page.record(account, limit, standing)?;
        record.roll(standing, now_ns);
        record.set_limit(limit, standing);
        record.cap = record.cap.min(keep);
        record.agreed = true;
        record.unreported = true;
        record.urgent = true;
        Ok(((), Write::Yes))
    })?;
    Ok(())
}

/// Goes by the cap that was granted; whether the record is to be reported again.
fn granted(
    data: &mut impl SharedData,
    answer: &Answer,
    grant: &Grant,
    now_ns: u64,
) -> Result<Option<bool>, PageError> {
    page::change(data, Page::index(grant.account), false, |page, standing| {
        let Some(record) = page.find(grant.account)? else { return Ok((false, Write::No)) };
        // It was reported by another question since then, or what it is based on is void.
        if record.asked != 0 && record.asked != answer.number || record.epoch != standing.epoch {
            return Ok((false, Write::No));
        }
        record.asked = 0;
        match grant.cap {
            Some(cap) => {
                // A larger limit than that of the rules here was divided: there may be fewer units.
                let is_other = grant.limit > record.limit;
                let cap = if is_other { cap.min(record.cap) } else { cap };
                record.unreported |= is_other;
                record.urgent |= is_other;
                // What it has no more is free for others once that is reported.
                let less = cap < record.cap;
                record.unreported |= less;
                record.urgent |= less;
                record.cap = cap;
                record.agreed = true;
            }
            // The ledger counts the share from now on.
            None => {
                record.cap = record.cap.min(standing.own(record.limit));
                record.agreed = false;
                let used = !record.is_unused(now_ns);
                record.unreported |= used;
                record.urgent |= used;
            }
        }
        record.elsewhere = grant.elsewhere;
        record.elsewhere_until_ns = if grant.elsewhere > 0 {
            now_ns.saturating_add(grant.elsewhere_ms.saturating_mul(MS))
        } else {
            0
        };
        // The ledger tells when there is more for whom there was not enough. What others spend it does not tell.
        let left = record.limit.saturating_sub(record.elsewhere(now_ns)).saturating_sub(record.spends.used());
        if record.cap > record.in_use() || left == 0 {
            record.refused = 0;
        }
        let pause_ns = if record.cap > record.in_use() {
            0
        } else if left > 0 {
            SOON_NS
        } else {
            EXHAUSTED_NS
        };
        record.next_ask_ns = now_ns.saturating_add(pause_ns);
        Ok((record.urgent, Write::Yes))
    })
}
