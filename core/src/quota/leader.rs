//! What the leader of a proxy's VMs does: asks the control plane, and writes down what it answers.
//!
//! All that must outlive it stands in the shared data, so that another VM can go on at any point. Two leaders at
//! once do no harm: a question takes its number from the shared data, and an answer counts only where the last
//! number that was written is its own.

use std::collections::{BTreeSet, VecDeque};

use super::message::{Answer, FORMAT, Grant, MAX_ENTRIES, Member, Question, Recall, Report};
use super::page::{self, ABSENT, PAGES, Page, Write};
use super::record::{Holding, Record};
use super::standing::Standing;
use super::{Account, SECOND_NS, bell, fair_share};
use crate::shared::SharedData;

/// An answer that comes later than so long after the question is not taken. It must be less than a lease; see
/// [`super::MIN_LEASE_S`].
pub const ANSWER_NS: u64 = 5_000_000_000;
/// The control plane may hold back the answer to a question without reports for so long, if there is no news.
pub const HOLD_NS: u64 = 3_000_000_000;
/// How often pages are looked at, and how many: all of them in 6.4 s.
const SCAN_NS: u64 = 100_000_000;
const PAGES_PER_SCAN: u16 = 16;
/// The same while a share is being lowered.
const PAGES_PER_SWEEP: u16 = 128;

/// The leader.
#[derive(Debug)]
pub struct Leader {
    proxy: u64,
    incarnation: u64,
    queue: VecDeque<Account>,
    queued: BTreeSet<Account>,
    asking: Option<Asking>,
    /// When to renew what is leased. What is missing here is found when all pages are gone through.
    renewals: BTreeSet<(u64, Account)>,
    next_page: u16,
    next_scan_ns: u64,
    sweep: Sweep,
    /// What the sweep found that was not answered yet.
    swept: BTreeSet<Account>,
}

/// A question that was not answered yet.
#[derive(Debug)]
struct Asking {
    number: u64,
    /// What it says of the share.
    share: u32,
    asked_ns: u64,
    accounts: Vec<Account>,
}

/// How far the lowering of a share is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sweep {
    /// Nothing known yet.
    Unknown,
    /// Pages before this one fit the share.
    At { page: u16, share: u32 },
    /// All pages were looked at.
    Done { share: u32 },
}

impl Leader {
    /// A leader that has just taken over. `proxy` is a fingerprint of what names the proxy, `incarnation` the number
    /// that was drawn for the process.
    pub fn new(proxy: u64, incarnation: u64) -> Self {
        Self {
            proxy,
            incarnation,
            queue: VecDeque::new(),
            queued: BTreeSet::new(),
            asking: None,
            renewals: BTreeSet::new(),
            next_page: 0,
            next_scan_ns: 0,
            sweep: Sweep::Unknown,
            swept: BTreeSet::new(),
        }
    }

    /// The question to ask now, if there is one. To be called often: every 10 ms or so, since it is
    /// cheap, and a key that is new to the proxy waits for it. A question that is still out
    /// is given up then: its answer will not be taken.
    pub fn on_tick(&mut self, data: &mut impl SharedData, now_ns: u64) -> Option<Question> {
        let Some((mut standing, cas)) = Standing::read(data) else {
            let standing = Standing { term: 1, ..Standing::default() };
            // If another VM made it meanwhile, so much the better.
            let _raced = standing.write(data, ABSENT);
            return None;
        };
        if standing.applied > 0 && !standing.belongs(now_ns) {
            standing = Standing {
                term: standing.term.saturating_add(1),
                share: 0,
                reported: 0,
                applied: 0,
                ..standing
            };
            let _raced = standing.write(data, cas);
            return None;
        }
        for page in bell::answer(data) {
            self.visit(data, page, now_ns);
        }
        self.sweep(data, &standing, now_ns);
        if now_ns >= self.next_scan_ns {
            self.next_scan_ns = now_ns.saturating_add(SCAN_NS);
            for _ in 0..PAGES_PER_SCAN {
                self.visit(data, self.next_page, now_ns);
                self.next_page = self.next_page.saturating_add(1).checked_rem(PAGES).unwrap_or(0);
            }
        }
        while let Some(renewal) = self.renewals.pop_first() {
            if renewal.0 > now_ns {
                self.renewals.insert(renewal);
                break;
            }
            self.enqueue(renewal.1);
        }
        self.is_due(&standing, now_ns).then(|| self.ask(data, now_ns)).flatten()
    }

    /// Takes an answer; whether it was to the last question and in time.
    pub fn on_answer(&mut self, data: &mut impl SharedData, answer: &Answer, now_ns: u64) -> bool {
        let Some(asking) = self.asking.take_if(|asking| asking.number == answer.number) else { return false };
        let Some((standing, cas)) = Standing::read(data) else { return false };
        let late = now_ns.saturating_sub(asking.asked_ns) > ANSWER_NS;
        if standing.question != answer.number || late {
            self.requeue(asking);
            return false;
        }
        if answer.rejoin {
            let term = standing.term.saturating_add(1);
            let next = Standing { term, share: 0, reported: 0, applied: 0, ..standing };
            return next.write(data, cas).is_ok();
        }
        let seconds = |s: u32| u64::from(s).saturating_mul(SECOND_NS);
        // Less comes before longer: nothing that was taken back is renewed.
        for recall in &answer.recalls {
            if take_back(data, answer.era, recall, now_ns).is_err() {
                self.requeue(asking);
                return false;
            }
            self.enqueue(recall.account);
        }
        for grant in &answer.grants {
            take(data, answer, grant, asking.asked_ns, now_ns);
            if grant.held.is_some_and(|held| held > fair_share(grant.limit, answer.share)) {
                let third_ns = seconds(answer.lease_s).checked_div(3).unwrap_or(0);
                self.renewals.insert((asking.asked_ns.saturating_add(third_ns), grant.account));
            }
        }
        let answered: BTreeSet<Account> = answer.grants.iter().map(|grant| grant.account).collect();
        for account in asking.accounts {
            if answered.contains(&account) {
                self.swept.remove(&account);
            } else {
                self.enqueue(account);
            }
        }
        let next = Standing {
            share: answer.share,
            reported: standing.reported.max(answer.share),
            era: answer.era,
            lease_ns: seconds(answer.lease_s),
            keep_ns: seconds(answer.keep_s),
            asked_ns: asking.asked_ns,
            heard_ns: now_ns,
            applied: answer.number,
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
        for account in asking.accounts {
            self.enqueue(account);
        }
    }

    fn enqueue(&mut self, account: Account) {
        if self.queued.insert(account) {
            self.queue.push_back(account);
        }
    }

    /// Looks through a page for accounts to ask about, and forgets what is over.
    fn visit(&mut self, data: &mut impl SharedData, index: u16, now_ns: u64) {
        let out = self.asking.as_ref().map_or(0, |asking| asking.number);
        let found = page::change(data, index, false, |page, standing| {
            let mut wanted = Vec::new();
            for record in page.records()? {
                record.roll(standing, now_ns);
                if is_to_report(record, standing, out, now_ns) {
                    wanted.push(record.account);
                }
            }
            let write = if page.tidy() { Write::Yes } else { Write::No };
            Ok((wanted, write))
        });
        for account in found.ok().flatten().unwrap_or_default() {
            self.enqueue(account);
        }
    }

    /// While the share is being lowered: fixes what uses more than the lower one, so that it is reported before
    /// the control plane may count on the lower one.
    fn sweep(&mut self, data: &mut impl SharedData, standing: &Standing, now_ns: u64) {
        if standing.reported <= standing.share {
            self.sweep = Sweep::Unknown;
            return;
        }
        let share = standing.share;
        let first = match self.sweep {
            Sweep::At { page, share: of } if of == share => page,
            Sweep::Done { share: of } if of == share => {
                if self.swept.is_empty() {
                    let Some((current, cas)) = Standing::read(data) else { return };
                    if current.share == share {
                        let _raced = Standing { reported: share, ..current }.write(data, cas);
                    }
                }
                return;
            }
            _ => {
                self.swept.clear();
                0
            }
        };
        let last = first.saturating_add(PAGES_PER_SWEEP).min(PAGES);
        for index in first..last {
            // Written in any case: what a worker is about to write by the share before will fail.
            let swept = page::change(data, index, false, |page, standing| {
                let mut wanted = Vec::new();
                for record in page.records()? {
                    record.roll(standing, now_ns);
                    if record.in_use() > record.cap(standing, now_ns) {
                        record.unreported = true;
                    }
                    if record.unreported || record.asked > 0 {
                        wanted.push(record.account);
                    }
                }
                Ok((wanted, Write::Yes))
            });
            let Ok(swept) = swept else {
                self.sweep = Sweep::At { page: index, share };
                return;
            };
            for account in swept.unwrap_or_default() {
                self.swept.insert(account);
                self.enqueue(account);
            }
        }
        self.sweep = if last >= PAGES { Sweep::Done { share } } else { Sweep::At { page: last, share } };
    }

    fn is_due(&self, standing: &Standing, now_ns: u64) -> bool {
        match &self.asking {
            None => true,
            // It may be held back, but not for long if there is something to say.
            Some(asking) if asking.accounts.is_empty() && !self.queue.is_empty() => true,
            Some(asking) if asking.accounts.is_empty() && asking.share != standing.reported => true,
            Some(asking) if standing.question != asking.number => true,
            Some(asking) => now_ns.saturating_sub(asking.asked_ns) > ANSWER_NS,
        }
    }

    fn ask(&mut self, data: &mut impl SharedData, now_ns: u64) -> Option<Question> {
        if let Some(asking) = self.asking.take() {
            self.requeue(asking);
        }
        let (standing, cas) = Standing::read(data)?;
        let number = standing.question.saturating_add(1);
        Standing { question: number, question_ns: now_ns, ..standing }.write(data, cas).ok()?;
        let mut reports = Vec::new();
        let mut crowded_out = Vec::new();
        // Each account once, whatever comes back into the queue.
        for _ in 0..self.queue.len() {
            if reports.len() >= MAX_ENTRIES {
                break;
            }
            let Some(account) = self.queue.pop_front() else { break };
            self.queued.remove(&account);
            match report(data, account, number, now_ns) {
                Ok(Some(report)) => reports.push(report),
                Ok(None) => {
                    self.swept.remove(&account);
                }
                Err(_) => crowded_out.push(account),
            }
        }
        for account in crowded_out {
            self.enqueue(account);
        }
        let accounts = reports.iter().map(|report| report.account).collect();
        self.asking = Some(Asking { number, share: standing.reported, asked_ns: now_ns, accounts });
        Some(Question {
            format: FORMAT,
            member: Member { proxy: self.proxy, incarnation: self.incarnation, term: standing.term },
            number,
            applied: standing.applied,
            era: standing.era,
            share: standing.reported,
            reports,
        })
    }
}

/// Whether there is something to say of an account; `out` is the number of the question that is out.
fn is_to_report(record: &Record, standing: &Standing, out: u64, now_ns: u64) -> bool {
    if record.asked > 0 {
        return record.asked != out;
    }
    let in_excess = record.in_use() > record.cap(standing, now_ns) && record.holding == Holding::Own;
    if record.rung || record.unreported || in_excess || record.wants_more(standing, now_ns) {
        return true;
    }
    let Holding::Agreed { held, .. } = record.holding else { return false };
    let refresh_ns = if held > standing.own(record.limit) {
        standing.lease_ns.checked_div(3).unwrap_or(0)
    } else {
        record.account.window_ns().checked_div(4).unwrap_or(0).clamp(1_000_000_000, 60_000_000_000)
    };
    now_ns >= record.reported_ns.saturating_add(refresh_ns)
}

/// The report on an account, which is fixed at that until it is answered.
fn report(
    data: &mut impl SharedData,
    account: Account,
    number: u64,
    now_ns: u64,
) -> Result<Option<Report>, page::PageError> {
    let report = page::change(data, Page::index(account), false, |page, standing| {
        let Some(record) = page.find(account)? else { return Ok((None, Write::No)) };
        record.roll(standing, now_ns);
        let own = record.holding == Holding::Own;
        record.fix(standing, now_ns);
        record.asked = number;
        record.rung = false;
        record.reported_ns = now_ns;
        record.forget_refused_if_over(now_ns);
        let used = record.in_use();
        let report = Report {
            account,
            limit: record.limit,
            held: record.cap(standing, now_ns).max(used),
            used,
            wanted: record.demand(now_ns),
            dearest: record.dearest,
            own,
        };
        Ok((Some(report), Write::Yes))
    })?;
    Ok(report.flatten())
}

/// Keeps no more than others leave.
fn take_back(
    data: &mut impl SharedData,
    era: u64,
    recall: &Recall,
    now_ns: u64,
) -> Result<(), page::PageError> {
    let Recall { account, limit, at_most } = *recall;
    page::change(data, Page::index(account), true, |page, standing| {
        let record = page.record(account, limit)?;
        record.roll(standing, now_ns);
        record.next_ask_ns = 0;
        if at_most < u32::MAX {
            // Also if that is no less: it must not become more with a larger share.
            let goes_by = record.limit;
            record.limit = goes_by.max(limit);
            let held = record.cap(standing, now_ns).min(at_most);
            record.fix(standing, now_ns);
            record.holding = Holding::Agreed { held, of: record.limit };
            record.era = era;
            record.limit = goes_by;
        }
        record.unreported = true;
        Ok(((), Write::Yes))
    })?;
    Ok(())
}

/// Holds what was granted.
fn take(data: &mut impl SharedData, answer: &Answer, grant: &Grant, asked_ns: u64, now_ns: u64) {
    // Without it, the proxy has what it reported, and the control plane counts no less.
    let _held = page::change(data, Page::index(grant.account), false, |page, standing| {
        let Some(record) = page.find(grant.account)? else { return Ok(((), Write::No)) };
        // Another leader has asked since, or fewer are left since a recall.
        if record.asked != answer.number {
            return Ok(((), Write::No));
        }
        record.holding = match grant.held {
            Some(held) => Holding::Agreed { held, of: grant.limit },
            None => Holding::Own,
        };
        record.leased_ns = asked_ns;
        record.era = answer.era;
        record.term = standing.term;
        record.asked = 0;
        record.unreported = false;
        record.elsewhere = grant.elsewhere;
        record.forget_refused(standing, now_ns);
        let again_ns =
            grant.account.window_ns().checked_div(8).unwrap_or(0).clamp(200_000_000, 10_000_000_000);
        // There is nothing more to be had now for whom there was not enough.
        let enough = record.has_headroom(standing, now_ns);
        record.next_ask_ns = if enough { now_ns } else { now_ns.saturating_add(again_ns) };
        Ok(((), Write::Yes))
    });
}
