//! One thing at a time.

use super::*;
use crate::decide::limits::{Left, Limit, Metered};

/// A proxy with two VMs, whose leader speaks with a ledger whenever it is told to.
struct Site {
    memory: Memory,
    workers: [Worker; 2],
    leader: Leader,
    limit: u32,
}

impl Site {
    fn new(proxy: u64, incarnation: u64, limit: u32) -> Self {
        Self {
            memory: Memory::default(),
            workers: [Worker::new(1), Worker::new(2)],
            leader: Leader::new(proxy, incarnation),
            limit,
        }
    }

    fn ask(&mut self, now: u64) -> Option<Question> {
        for worker in &mut self.workers {
            worker.on_tick(&mut self.memory, now);
        }
        self.leader.on_tick(&mut self.memory, now)
    }

    /// A question and its answer; whether there was one.
    fn talk(&mut self, ledger: &mut Ledger, now: u64) -> bool {
        let Some(question) = self.ask(now) else { return false };
        let exchange = ledger.exchange(&question, now + 1).unwrap();
        self.leader.on_answer(&mut self.memory, &exchange.answer, now + 2)
    }

    fn spend_of(&mut self, account: Account, cost: u32, now: u64) -> Verdict {
        self.workers[0].spend(&mut self.memory, account, (self.limit, cost, false), now)
    }

    fn spend(&mut self, cost: u32, now: u64) -> Verdict {
        self.spend_of(account(HOUR_S), cost, now)
    }

    /// How many of some requests pass.
    fn burst(&mut self, requests: u32, now: u64) -> u32 {
        (0..requests).filter(|_| self.spend(1, now).is_admitted()).count().try_into().unwrap()
    }

    fn record<R>(&mut self, look: impl Fn(&record::Record, &standing::Standing) -> R) -> Option<R> {
        let account = account(HOUR_S);
        page::change(&mut self.memory, Page::index(account), false, |page, standing| {
            Ok((page.find(account)?.map(|record| look(record, standing)), Write::No))
        })
        .unwrap()
        .flatten()
    }

    fn cap(&mut self, now: u64) -> u32 {
        self.record(|record, standing| record.cap(standing, now)).unwrap()
    }
}

const HOUR_S: u32 = 3_600;
const HOUR: u64 = 3_600 * S;

fn fleet(sites: u64, limit: u32) -> (Ledger, Vec<Site>) {
    let mut ledger = Ledger::new(1, false, 0);
    let mut sites: Vec<Site> = (0..sites).map(|proxy| Site::new(proxy, proxy + 100, limit)).collect();
    settle(&mut ledger, &mut sites, S);
    (ledger, sites)
}

/// Lets them talk for a second.
fn settle(ledger: &mut Ledger, sites: &mut [Site], now: u64) {
    for tick in 0..100 {
        for site in &mut *sites {
            site.talk(ledger, now + tick * 10 * MS);
        }
    }
}

/// Lets time pass, in which they stay in touch.
fn pass(ledger: &mut Ledger, sites: &mut [Site], from: u64, to: u64) {
    for now in (from..to).step_by(1_000_000_000) {
        for site in &mut *sites {
            site.talk(ledger, now);
        }
    }
}

/// What a client that heeds the answer does until it is admitted; how long that took.
fn retry(ledger: &mut Ledger, sites: &mut [Site], at: usize, cost: u32, mut now: u64) -> u64 {
    let begun = now;
    loop {
        match sites[at].spend(cost, now) {
            Verdict::Admitted(_) => return now - begun,
            Verdict::Pending(status) => assert_eq!(status.reset_ns, S),
            Verdict::Refused(status, why) => panic!("{why:?} {status:?}"),
        }
        assert!(now < begun + S, "pending for a second");
        now += 10 * MS;
        sites.iter_mut().for_each(|site| {
            site.talk(ledger, now);
        });
    }
}

#[test]
fn alone_a_burst_gets_the_whole_limit_at_once() {
    for limit in [1, 3, 100, 1_000] {
        let (mut ledger, mut sites) = fleet(1, limit);
        let first = sites[0].spend(1, 2 * S).status();
        assert_eq!((first.limit, first.remaining, first.basis), (limit, limit - 1, Basis::Cap));
        assert_eq!(first.reset_ns, HOUR);
        let now = 2 * S + MS;
        assert_eq!(sites[0].burst(limit + 60, now), limit - 1);
        let Verdict::Refused(status, Why::Exhausted) = sites[0].spend(1, now) else { panic!() };
        assert_eq!(status.remaining, 0);
        // Retry-After is true: not before, but then.
        let back = now + status.reset_ns;
        pass(&mut ledger, &mut sites, now, back - 1);
        assert!(!sites[0].spend(1, back - 1).is_admitted());
        assert!(sites[0].spend(1, back + HOUR / 128).is_admitted());
    }
}

#[test]
fn a_burst_at_one_of_three_proxies_gets_the_whole_limit_within_a_few_exchanges() {
    for limit in [100, 1_000] {
        let (mut ledger, mut sites) = fleet(3, limit);
        let (mut admitted, mut now) = (0, 2 * S);
        while admitted < limit {
            match sites[1].spend(1, now) {
                Verdict::Admitted(_) => admitted += 1,
                Verdict::Pending(_) => {
                    now += 10 * MS;
                    sites.iter_mut().for_each(|site| {
                        site.talk(&mut ledger, now);
                    });
                }
                Verdict::Refused(_, why) => panic!("{why:?} after {admitted}"),
            }
            assert!(now < 2 * S + 300 * MS, "{admitted} after 300 ms");
        }
        assert!(matches!(sites[1].spend(1, now), Verdict::Refused(_, Why::Exhausted)));
        // The others know once they asked.
        for _ in 0..2 {
            assert!(matches!(sites[0].spend(1, now), Verdict::Pending(_)));
            settle(&mut ledger, &mut sites, now);
            now += S;
        }
        let Verdict::Refused(status, Why::Exhausted) = sites[0].spend(1, now) else { panic!() };
        assert!((HOUR - 4 * S..=HOUR).contains(&status.reset_ns), "{}", status.reset_ns);
    }
}

#[test]
fn small_limits_over_three_proxies_are_admitted_whole_and_no_more() {
    for limit in [1, 2, 5, 8] {
        let (mut ledger, mut sites) = fleet(3, limit);
        for turn in 0..limit {
            let at = usize::try_from(turn % 3).unwrap();
            let took = retry(&mut ledger, &mut sites, at, 1, (2 + u64::from(turn)) * S);
            assert!(took <= 100 * MS, "{took} ns for {turn} of {limit}");
        }
        for now in [20 * S, 22 * S] {
            assert!(sites.iter_mut().all(|site| !site.spend(1, now).is_admitted()));
            settle(&mut ledger, &mut sites, now);
        }
        for site in &mut sites {
            assert!(matches!(site.spend(1, 24 * S), Verdict::Refused(_, Why::Exhausted)));
        }
    }
}

#[test]
fn dear_requests_get_what_they_need() {
    let (_, mut sites) = fleet(1, 100);
    assert!(sites[0].spend(50, 2 * S).is_admitted() && sites[0].spend(50, 2 * S).is_admitted());
    assert!(matches!(sites[0].spend(50, 2 * S), Verdict::Refused(_, Why::Exhausted)));
    let (mut ledger, mut sites) = fleet(3, 100);
    retry(&mut ledger, &mut sites, 0, 90, 2 * S);
    settle(&mut ledger, &mut sites, 3 * S);
    let Verdict::Refused(status, Why::Exhausted) = sites[0].spend(90, 5 * S) else { panic!() };
    assert_eq!(status.remaining, 10, "units are left, but not so many");
    retry(&mut ledger, &mut sites, 0, 10, 5 * S);
    assert!(matches!(sites[0].spend(101, 6 * S), Verdict::Refused(_, Why::TooDear)));
}

#[test]
fn a_key_used_everywhere_within_the_shares_moves_no_units() {
    let (mut ledger, mut sites) = fleet(3, 900);
    let mut now = 2 * S;
    for _ in 0..100 {
        for site in &mut sites {
            assert!(site.spend(1, now).is_admitted());
        }
        now += 100 * MS;
        sites.iter_mut().for_each(|site| {
            site.talk(&mut ledger, now);
        });
    }
    assert_eq!(ledger.usage(now).map(|(_, used, _)| used).collect::<Vec<_>>(), [300]);
    settle(&mut ledger, &mut sites, now);
    // `remaining` counts what the others used.
    let remaining = sites[0].spend(1, now + S).status().remaining;
    assert!((599..=650).contains(&remaining), "{remaining}");
}

#[test]
fn an_exhausted_key_is_refused_without_the_shared_data() {
    let (_, mut sites) = fleet(1, 8);
    assert_eq!(sites[0].burst(50, 2 * S), 8);
    sites[0].memory = Memory::default();
    assert!(matches!(sites[0].spend(1, 2 * S), Verdict::Refused(_, Why::Exhausted)));
}

#[test]
fn before_the_ledger_answered_nothing_is_decided() {
    let mut site = Site::new(1, 1, 100);
    assert!(matches!(site.spend(1, 0), Verdict::Refused(_, Why::NotMember)));
    assert!(!is_ready(&mut site.memory));
    let limit = Limit { units: 100, window_s: HOUR_S };
    assert_eq!(site.spend(1, 0).metered(limit), Metered::Unknown);
}

#[test]
fn a_decision_is_told_what_is_left() {
    let limit = Limit { units: 100, window_s: HOUR_S };
    let mut site = fleet(1, 100).1.remove(0);
    let left = Left { limit, remaining: 99, reset_s: 3_600 };
    assert_eq!(site.spend(1, 2 * S).metered(limit), Metered::Within(left));
    site.burst(200, 2 * S);
    // What is rounded up is never too early.
    let refused = Left { limit, remaining: 0, reset_s: 3_599 };
    assert_eq!(site.spend(1, 3 * S + 1).metered(limit), Metered::Beyond(refused));
    let mut site = fleet(3, 2).1.remove(0);
    let left = Left { limit, remaining: 2, reset_s: 1 };
    assert_eq!(site.spend(1, 2 * S).metered(limit), Metered::Pending(left));
}

#[test]
fn units_that_another_vm_holds_are_pending_and_come_with_its_next_tick() {
    let (mut ledger, mut sites) = fleet(1, 1_000);
    let Site { memory, workers: [first, second], .. } = &mut sites[0];
    for _ in 0..200 {
        assert!(first.spend(memory, account(HOUR_S), (1_000, 1, false), 2 * S).is_admitted());
    }
    let mut admitted = 200;
    let mut pending = 0;
    for _ in 0..900 {
        match second.spend(memory, account(HOUR_S), (1_000, 1, false), 2 * S) {
            Verdict::Admitted(_) => admitted += 1,
            Verdict::Pending(_) => pending += 1,
            Verdict::Refused(_, why) => panic!("{why:?} after {admitted}"),
        }
    }
    assert!(admitted >= 980 && pending > 0, "{admitted}");
    sites[0].talk(&mut ledger, 2 * S + 100 * MS);
    assert_eq!(admitted + sites[0].burst(1_000, 2 * S + 110 * MS), 1_000);
}

#[test]
fn a_vm_that_traps_loses_what_it_held() {
    let (_, mut sites) = fleet(1, 10_000);
    let site = &mut sites[0];
    assert_eq!(site.burst(50, 2 * S), 50);
    let before = site.record(|record, _| record.in_use()).unwrap();
    assert!(before > 50, "more was drawn than spent");
    site.workers[0] = Worker::new(3);
    assert!(site.spend(1, 5 * S).is_admitted());
    let spent = site.record(|record, _| record.spends.used()).unwrap();
    assert_eq!(spent, before + 1, "what was drawn counts as spent");
    let back = site.record(|record, _| record.spends.back_at(before, HOUR)).unwrap();
    assert_eq!(back, Some(5 * S + HOUR), "a window after the draw's end, and no later than those beside it");
}

#[test]
fn a_tick_settles_so_many_accounts_that_requests_do_not_wait() {
    let (_, mut sites) = fleet(1, 100_000);
    let Site { memory, workers: [worker, _], .. } = &mut sites[0];
    let accounts: Vec<Account> =
        (1..=150).map(|n| Account { key: KEY.wrapping_mul(n), ..account(HOUR_S) }).collect();
    for account in &accounts {
        // The second one draws.
        for _ in 0..2 {
            assert!(worker.spend(memory, *account, (100_000, 1, false), 2 * S).is_admitted());
        }
    }
    let mut holding = Vec::new();
    for tick in 0..6 {
        worker.on_tick(memory, 3 * S + tick * 90 * MS);
        let held = accounts.iter().filter(|account| {
            let draws = |page: &mut Page, _: &_| {
                Ok((page.find(**account)?.map(|record| record.draws.len()), Write::No))
            };
            page::change(memory, Page::index(**account), false, draws).unwrap().flatten() != Some(0)
        });
        holding.push(held.count());
    }
    assert_eq!(holding.last(), Some(&0), "{holding:?}");
    assert!(holding[0] >= 86, "{holding:?}");
}

#[test]
fn a_clock_that_goes_backwards_frees_nothing() {
    let (_, mut sites) = fleet(1, 100);
    assert_eq!(sites[0].burst(200, 2 * HOUR), 100);
    for now in [HOUR, 2 * HOUR, 3 * HOUR - 1] {
        assert!(!sites[0].spend(1, now).is_admitted());
    }
}

#[test]
fn without_answers_a_proxy_spends_what_it_was_granted_and_then_its_share() {
    let (mut ledger, mut sites) = fleet(3, 90);
    let quiet = Account { key: !KEY, ..account(HOUR_S) };
    let mut now = 2 * S;
    retry(&mut ledger, &mut sites, 0, 60, now);
    now += S;
    settle(&mut ledger, &mut sites, now);
    let heard = sites[0].record(|_, standing| standing.heard_ns).unwrap();
    assert_eq!(sites[0].spend(1, heard + SILENCE_NS - 1).status().basis, Basis::Cap);
    let silent = heard + SILENCE_NS;
    assert_eq!(sites[0].spend(1, silent).status().basis, Basis::FairShare);
    assert!(sites[0].cap(silent) > 30, "what it was granted");
    let ended = sites[0].record(|_, standing| standing.granted_until_ns()).unwrap();
    assert_eq!(sites[0].cap(ended), 30, "its share");
    // One that had given away its share has it, too.
    assert_eq!(sites[1].burst(100, silent), 30);
    let admitted = (0..100).filter(|_| sites[2].spend_of(quiet, 1, ended).is_admitted()).count();
    assert_eq!(admitted, 30, "of a key that nobody used, too");
    assert!(matches!(sites[2].spend_of(quiet, 1, ended), Verdict::Pending(_)), "units are left elsewhere");

    // Back within 30 s: it goes by what was agreed, and what it spent is reported.
    settle(&mut ledger, &mut sites, silent + S);
    let used: u32 = ledger.usage(silent + 2 * S).map(|(_, used, _)| used).max().unwrap();
    assert!(used > 90, "{used}: admitted once more, and counted");
    for site in &mut sites {
        assert!(!site.spend(1, silent + 3 * S).is_admitted());
    }
}

#[test]
fn a_proxy_that_is_lost_is_released_after_thirty_seconds_and_comes_back_with_nothing() {
    let (mut ledger, mut sites) = fleet(2, 100);
    let mut now = 2 * S;
    retry(&mut ledger, &mut sites, 1, 20, now);
    settle(&mut ledger, &mut sites, now);
    let heard = now + S;
    // Half of a key that nobody used is the lost one's for 30 s, and then it is not.
    let spare = |at: u64| Account { key: at, ..account(HOUR_S) };
    let lost = sites.pop().unwrap();
    while now < heard + 29 * S {
        now += 10 * MS;
        sites[0].talk(&mut ledger, now);
    }
    assert_eq!(ledger.silent(now).len(), 1);
    assert!(ledger.silent(now)[0].units > 0);
    let admitted = (0..100).filter(|_| sites[0].spend_of(spare(5), 1, now).is_admitted()).count();
    assert_eq!(admitted, 50);
    while now < heard + 31 * S {
        now += 10 * MS;
        sites[0].talk(&mut ledger, now);
    }
    let admitted = (0..100).filter(|_| sites[0].spend_of(spare(6), 1, now).is_admitted()).count();
    assert_eq!(admitted, 100);
    assert_eq!((ledger.silent(now).len(), ledger.released_members()), (0, 1));
    // What it reported counts.
    let mut admitted = 0;
    for _ in 0..50 {
        admitted += sites[0].burst(10, now);
        now += 10 * MS;
        sites[0].talk(&mut ledger, now);
    }
    assert_eq!(admitted, 80);

    // It comes back: nothing that it had before is its own, and what it spent meanwhile is counted.
    sites.push(lost);
    let alone = sites[1].burst(100, now);
    assert_eq!(alone, 30, "its share of 50, of which it had spent 20");
    settle(&mut ledger, &mut sites, now);
    now += S;
    assert!(sites.iter_mut().all(|site| !site.spend(1, now).is_admitted()));
    let used = ledger.usage(now).find(|(of, ..)| *of == account(HOUR_S)).unwrap().1;
    assert_eq!(used, 130, "what it had reported before is counted once");
    assert_eq!(sites[1].record(|_, standing| standing.share), Some(SHARES / 2));
}

#[test]
fn only_the_answer_to_the_last_question_counts() {
    let (mut ledger, mut sites) = fleet(1, 100);
    let site = &mut sites[0];
    site.burst(20, 2 * S);
    let first = site.ask(2 * S + 200 * MS).unwrap();
    let second = site.ask(2 * S + 6 * S).unwrap();
    assert!(second.number > first.number && first.reports.len() == 1 && second.reports.len() == 1);
    let late = ledger.exchange(&first, 8 * S).unwrap().answer;
    assert!(!site.leader.on_answer(&mut site.memory, &late, 8 * S));
    // A leader that was replaced meanwhile does not take it either.
    let mut deposed = std::mem::replace(&mut site.leader, Leader::new(0, 100));
    let answer = ledger.exchange(&second, 8 * S).unwrap().answer;
    let third = site.ask(8 * S).unwrap();
    assert!(!deposed.on_answer(&mut site.memory, &answer, 8 * S));
    assert_eq!(ledger.exchange(&second, 9 * S), Err(ExchangeError::Superseded));
    // One that comes too late does not count.
    let answer = ledger.exchange(&third, 9 * S).unwrap().answer;
    assert!(!site.leader.on_answer(&mut site.memory, &answer, 8 * S + ANSWER_NS + 1));
}

#[test]
fn a_share_is_smaller_for_the_ledger_once_all_records_are_known() {
    let (mut ledger, mut sites) = fleet(1, 1_000);
    let now = 3 * S;
    let keys: Vec<Account> =
        (0..600).map(|key| Account { key: Dice(key).roll(), window_s: HOUR_S }).collect();
    for key in &keys {
        assert!(sites[0].spend_of(*key, 800, now).is_admitted());
    }
    sites.push(Site::new(1, 7, 1_000));
    let mut shared_at = None;
    for tick in 0..200 {
        let now = now + tick * 10 * MS;
        for site in &mut sites {
            site.talk(&mut ledger, now);
        }
        let saved = ledger.saved();
        let share = |proxy| saved.members.iter().find(|row| row.member.proxy == proxy).map(|row| row.share);
        if share(1) > Some(0) {
            shared_at.get_or_insert(tick);
            assert_eq!(share(0), Some(SHARES / 2));
            for key in &keys {
                let caps = saved.holders.iter().filter(|row| row.account == *key);
                let caps: Vec<u32> = caps.map(|row| row.cap).collect();
                assert!(caps.len() == 2 && caps.iter().sum::<u32>() <= 1_000, "{caps:?}");
            }
        }
    }
    assert!(shared_at.is_some());
    // The new one gets what is left of each key.
    retry(&mut ledger, &mut sites, 1, 200, 6 * S);
}

#[test]
fn a_proxy_that_is_killed_and_starts_again_leaves_the_limits_whole() {
    let (mut ledger, mut sites) = fleet(1, 100);
    let mut now = 2 * S;
    for generation in 0..10 {
        let fresh = Account { key: generation + 7, ..account(HOUR_S) };
        let admitted = (0..160).filter(|_| sites[0].spend_of(fresh, 1, now).is_admitted()).count();
        assert_eq!(admitted, 100, "start {generation}");
        let last = sites[0].burst(20, now);
        assert_eq!(last, if generation < 5 { 20 } else { 0 }, "start {generation}");
        now += 100 * MS;
        sites[0].talk(&mut ledger, now);
        sites[0] = Site::new(0, generation + 200, 100);
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert_eq!((ledger.released_members(), ledger.proxies()), (10, 1));
}

#[test]
fn a_limit_that_changes_holds() {
    let (mut ledger, mut sites) = fleet(2, 100);
    let mut now = 2 * S;
    let mut run = |sites: &mut Vec<Site>| {
        let mut admitted = 0;
        for _ in 0..200 {
            admitted += sites.iter_mut().map(|site| site.burst(2, now)).sum::<u32>();
            now += 10 * MS;
            sites.iter_mut().for_each(|site| {
                site.talk(&mut ledger, now);
            });
        }
        admitted
    };
    assert_eq!(run(&mut sites), 100);
    sites.iter_mut().for_each(|site| site.limit = 50);
    assert_eq!(run(&mut sites), 0);
    sites.iter_mut().for_each(|site| site.limit = 300);
    assert_eq!(run(&mut sites), 200);
    sites.iter_mut().for_each(|site| site.limit = 310);
    assert_eq!(run(&mut sites), 10);
}

#[test]
fn a_proxy_that_was_told_to_leave_leaves_whichever_ledger_answers() {
    let (mut ledger, mut sites) = fleet(2, 100);
    assert_eq!(sites[0].burst(10, 2 * S), 10);
    settle(&mut ledger, &mut sites, 2 * S);
    assert!(ledger.drain(0));
    settle(&mut ledger, &mut sites, 3 * S);
    assert!(ledger.has_left(0));
    let mut ledger = Ledger::recovering(9, false, 4 * S);
    settle(&mut ledger, &mut sites, 4 * S);
    assert!(ledger.knows(&Member { proxy: 0, incarnation: 100 }) && ledger.has_left(0));
    assert!(matches!(sites[0].spend(1, 5 * S), Verdict::Refused(_, Why::NotMember)));
}

#[test]
fn a_question_that_comes_late_from_a_process_that_ended_releases_nobody() {
    let (mut ledger, mut sites) = fleet(2, 100);
    // One process ends before its first question is heard, and the next one takes its place.
    let mut ended = Site::new(7, 1, 100);
    ended.ask(2 * S);
    let late = ended.ask(2 * S).unwrap();
    assert!(late.new);
    sites.push(Site::new(7, 2, 100));
    settle(&mut ledger, &mut sites, 2 * S);
    let caps = |ledger: &Ledger| ledger.saved().holders.iter().map(|row| row.cap).sum::<u32>();
    retry(&mut ledger, &mut sites, 2, 90, 3 * S);
    settle(&mut ledger, &mut sites, 4 * S);
    let before = caps(&ledger);
    ledger.exchange(&late, 5 * S).unwrap();
    settle(&mut ledger, &mut sites, 5 * S);
    assert_eq!((caps(&ledger), ledger.released_members()), (before, 0));
    // The process after that takes the place of both.
    sites[2] = Site::new(7, 3, 100);
    settle(&mut ledger, &mut sites, 6 * S);
    assert_eq!(ledger.released_members(), 2);
    assert_eq!(ledger.saved().members.len(), 3);
    // What the ended one asked last comes late, too.
    let last = Question { number: 1_000, era: 1, new: false, ..late };
    let of_ended = Question { member: Member { proxy: 7, incarnation: 2 }, ..last };
    let answer = ledger.exchange(&of_ended, 7 * S).unwrap().answer;
    assert!(answer.rejoin);
    assert_eq!(ledger.saved().members.len(), 3);
}

#[test]
fn a_control_plane_that_restarts_goes_on_from_what_it_kept() {
    let (mut ledger, mut sites) = fleet(2, 100);
    let mut now = 2 * S;
    retry(&mut ledger, &mut sites, 0, 70, now);
    settle(&mut ledger, &mut sites, now);
    now += 2 * S;
    let mut ledger = Ledger::resume(&ledger.saved(), false, now);
    assert!(!ledger.is_recovering(now));
    settle(&mut ledger, &mut sites, now);
    now += 2 * S;
    let mut admitted = 0;
    for _ in 0..50 {
        admitted += sites[1].burst(3, now);
        now += 10 * MS;
        sites.iter_mut().for_each(|site| {
            site.talk(&mut ledger, now);
        });
    }
    assert_eq!(admitted, 30);
    // Spends of a proxy that is gone count after the restart, too.
    sites.remove(0);
    pass(&mut ledger, &mut sites, now, now + 40 * S);
    now += 40 * S;
    let mut ledger = Ledger::resume(&ledger.saved(), false, now);
    settle(&mut ledger, &mut sites, now);
    assert_eq!(sites[0].burst(50, now + 2 * S), 0);
    assert_eq!(ledger.usage(now + 2 * S).map(|(_, used, _)| used).collect::<Vec<_>>(), [100]);
}

#[test]
fn after_a_restart_a_question_that_comes_late_takes_nothing_back() {
    let (mut ledger, mut sites) = fleet(2, 100);
    assert_eq!(sites[0].burst(10, 2 * S), 10);
    let mut questions = (0..50).filter_map(|tick| sites[0].ask(2 * S + tick * 10 * MS));
    let late = questions.find(|question| question.reports.len() == 1).unwrap();
    sites[0].leader.on_failure(late.number);
    retry(&mut ledger, &mut sites, 0, 70, 3 * S);
    settle(&mut ledger, &mut sites, 4 * S);
    let cap = |ledger: &Ledger| {
        let member = Member { proxy: 0, incarnation: 100 };
        ledger.holder(account(HOUR_S), &member).unwrap().cap
    };
    let before = cap(&ledger);
    assert!(before >= 80);
    assert!(matches!(ledger.exchange(&late, 5 * S), Err(ExchangeError::Superseded)));
    // Two runs later.
    let ledger = Ledger::resume(&ledger.saved(), false, 5 * S);
    let mut ledger = Ledger::resume(&ledger.saved(), false, 5 * S);
    ledger.exchange(&late, 5 * S).unwrap();
    ledger.exchange(&Question { number: late.number + 1, left: true, ..late.clone() }, 5 * S).unwrap();
    let void = Question { number: late.number + 2, void: true, reports: Vec::new(), ..late };
    ledger.exchange(&void, 5 * S).unwrap();
    assert_eq!(cap(&ledger), before);
    settle(&mut ledger, &mut sites, 6 * S);
    assert_eq!(sites[0].record(|_, standing| standing.era), Some(ledger.era()));
    let admitted: u32 = (0..50)
        .map(|tick| {
            settle(&mut ledger, &mut sites, 8 * S + tick * S);
            sites[1].burst(3, 9 * S + tick * S)
        })
        .sum();
    assert_eq!(admitted, 20);
}

#[test]
fn a_proxy_that_missed_a_ledger_drops_what_it_had() {
    for (silent, cap) in [(10 * S, 70), (20 * S, 0)] {
        let (mut ledger, mut sites) = fleet(2, 100);
        retry(&mut ledger, &mut sites, 0, 70, 2 * S);
        settle(&mut ledger, &mut sites, 3 * S);
        let mut ledger = Ledger::recovering(9, false, 4 * S + silent);
        settle(&mut ledger, &mut sites[..1], 4 * S + silent);
        let now = 5 * S + silent;
        assert!(ledger.is_recovering(now));
        assert!((cap..=100).contains(&sites[0].cap(now)) && (sites[0].cap(now) == 0) == (cap == 0));
    }
}

#[test]
fn another_ledger_takes_over_what_proxies_have_and_grants_more_after_fifteen_seconds() {
    for knows in [true, false] {
        let (mut ledger, mut sites) = fleet(2, 100);
        let mut now = 2 * S;
        retry(&mut ledger, &mut sites, 0, 70, now);
        settle(&mut ledger, &mut sites, now);
        now += 2 * S;
        let begun = now;
        // One that knows that there was a ledger before, and one that hears of it.
        let mut ledger = if knows { Ledger::recovering(9, false, now) } else { Ledger::new(9, false, now) };
        settle(&mut ledger, &mut sites, now);
        assert!(ledger.is_recovering(now + S));
        now += S;
        assert_eq!(sites[0].record(|_, standing| standing.era), Some(9));
        let caps: u32 = ledger.saved().holders.iter().map(|row| row.cap).sum();
        assert!((70..=100).contains(&caps), "{caps}");
        let mut admitted = 0;
        while now < begun + 14 * S {
            admitted += sites[1].burst(3, now);
            now += 10 * MS;
            sites.iter_mut().for_each(|site| {
                site.talk(&mut ledger, now);
            });
        }
        assert!(admitted <= 30, "{admitted}");
        while now < begun + 16 * S {
            admitted += sites[1].burst(3, now);
            now += 10 * MS;
            sites.iter_mut().for_each(|site| {
                site.talk(&mut ledger, now);
            });
        }
        assert_eq!(admitted, 30);
        assert_eq!(ledger.saved().members.iter().map(|row| row.share).sum::<u32>(), SHARES);
    }
}

/// Drains a proxy; how long that took.
fn drain(ledger: &mut Ledger, sites: &mut [Site], proxy: u64, now: u64) -> u64 {
    assert!(ledger.drain(proxy));
    for tick in 1..500 {
        let now = now + tick * 10 * MS;
        for site in &mut *sites {
            site.talk(ledger, now);
        }
        if ledger.has_left(proxy) {
            return tick * 10 * MS;
        }
    }
    panic!("not drained after 5 s");
}

#[test]
fn a_proxy_that_is_drained_leaves_its_spends_and_nothing_else() {
    let (mut ledger, mut sites) = fleet(2, 1_000);
    for step in 0..40 {
        sites[0].burst(20, 2 * S + step * 20 * MS);
        sites.iter_mut().for_each(|site| {
            site.talk(&mut ledger, 2 * S + step * 20 * MS);
        });
    }
    let quiet = Account { key: !KEY, ..account(HOUR_S) };
    assert!(sites[0].spend_of(quiet, 1, 3 * S).is_admitted());
    assert!(!ledger.has_left(0));
    let took = drain(&mut ledger, &mut sites, 0, 4 * S);
    assert!(took < S, "{took} ns");
    let used: Vec<u32> = ledger.usage(5 * S).map(|(_, used, _)| used).collect();
    assert!(used.contains(&800) && used.contains(&1), "{used:?}");
    assert_eq!(ledger.saved().members.len(), 1);
    assert!(matches!(sites[0].spend(1, 5 * S), Verdict::Refused(_, Why::NotMember)));
    assert!(!is_ready(&mut sites[0].memory));
    settle(&mut ledger, &mut sites, 5 * S);
    assert!(!is_ready(&mut sites[0].memory), "it stays out");
    assert!(retry(&mut ledger, &mut sites, 1, 200, 7 * S) <= 20 * MS);
    // A new process of it is like any other.
    sites[0] = Site::new(0, 7, 1_000);
    settle(&mut ledger, &mut sites, 8 * S);
    assert!(is_ready(&mut sites[0].memory));
    assert_eq!((ledger.released_members(), ledger.released_units()), (0, 0));
}

#[test]
fn proxies_that_are_drained_and_replaced_leave_the_limit_whole() {
    let (mut ledger, mut sites) = fleet(3, 1_000);
    let (mut now, mut ids) = (2 * S, [0, 1, 2]);
    for generation in 1..20 {
        for at in 0..3 {
            assert_eq!(sites[at].burst(2, now), 2);
            now += drain(&mut ledger, &mut sites, ids[at], now);
            ids[at] = generation * 10 + u64::try_from(at).unwrap();
            sites[at] = Site::new(ids[at], 1, 1_000);
            settle(&mut ledger, &mut sites, now);
            now += S;
        }
    }
    // 57 proxies were drained; each had spent two units.
    let mut admitted = 0;
    for _ in 0..1_000 {
        admitted += sites[1].burst(2, now);
        now += 20 * MS;
        sites.iter_mut().for_each(|site| {
            site.talk(&mut ledger, now);
        });
    }
    assert_eq!(admitted, 1_000 - 114);
}

#[test]
fn accounts_out_of_use_are_forgotten_everywhere() {
    let (mut ledger, mut sites) = fleet(3, 100);
    retry(&mut ledger, &mut sites, 0, 90, 2 * S);
    settle(&mut ledger, &mut sites, 3 * S);
    assert_eq!(ledger.saved().holders.len(), 3);
    let now = 2 * S + HOUR + HOUR / 64;
    for tick in 0..6_000 {
        let now = now + tick * 100 * MS;
        for site in &mut sites {
            site.talk(&mut ledger, now);
        }
    }
    let later = now + 600 * S;
    assert_eq!((ledger.saved().holders, ledger.saved().spends), (vec![], vec![]));
    assert!(sites.iter_mut().all(|site| site.record(|_, _| ()).is_none()));
    // And each has its share of it again, at once.
    assert!(sites.iter_mut().all(|site| site.burst(100, later) == 33));
}

#[test]
fn only_what_is_asked_for_is_granted_again() {
    // A fleet of 20: the shares leave a reserve, and a proxy that joins gets a share.
    let (mut ledger, mut sites) = fleet(20, 1_000);
    let share = |site: &mut Site| standing::Standing::read(&mut site.memory).unwrap().0.share;
    assert!(sites.iter_mut().all(|site| share(site) > SHARES / 24));
    sites.push(Site::new(77, 1, 1_000));
    settle(&mut ledger, &mut sites, 3 * S);
    assert!(sites.iter_mut().all(|site| share(site) > SHARES / 24));
    assert!(sites.iter_mut().map(share).sum::<u32>() <= SHARES);
}

#[test]
fn fair_shares_are_no_more_than_the_limit() {
    for limit in [0, 1, 3, 99, 100, 1_000, u32::MAX] {
        for proxies in 1..50 {
            let share = SHARES / proxies;
            let all = u64::from(fair_share(limit, share)) * u64::from(proxies);
            assert!(all <= u64::from(limit));
        }
        assert_eq!(fair_share(limit, SHARES), limit);
    }
}

#[test]
fn a_unit_is_free_after_a_window_and_not_before() {
    let window = 3_600 * S;
    let mut spends = Spends::default();
    for at in 0..1_000 {
        spends.add(at * window / 1_000, 1, window);
    }
    let at_once = window / 1_000;
    spends.expire(window - 1, window, drop);
    assert_eq!(spends.used(), 1_000);
    // At most one slot late.
    for part in 1..=10 {
        let now = window + part * window / 10;
        spends.expire(now, window, drop);
        let due = u32::try_from(1_000 - (part * 100).min(1_000)).unwrap();
        assert!((due..=due + 9).contains(&spends.used()), "{part}: {} of {due}", spends.used());
    }
    assert!(at_once > 0 && spends.is_empty());
}

#[test]
fn messages_are_read_strictly() {
    let question = Question {
        format: FORMAT,
        member: Member { proxy: u64::MAX, incarnation: u64::MAX },
        number: u64::MAX,
        era: u64::MAX,
        new: true,
        void: true,
        share: SHARES,
        left: true,
        reports: vec![
            Report {
                account: Account { key: u64::MAX, window_s: MAX_WINDOW_S },
                limit: u32::MAX,
                cap: u32::MAX,
                used: u32::MAX,
                spent: u64::MAX,
                age_ms: u64::MAX,
                wanted: u32::MAX,
                lacks: u32::MAX,
                idle: true,
            };
            MAX_ENTRIES
        ],
    };
    let bytes = question.encode();
    assert!(bytes.len() <= MAX_BYTES, "{}", bytes.len());
    assert_eq!(Question::decode(&bytes), Ok(question.clone()));
    let wrong = |change: &dyn Fn(&mut Question)| {
        let mut question = question.clone();
        change(&mut question);
        Question::decode(&question.encode()).unwrap_err()
    };
    assert_eq!(wrong(&|q| q.format = 1), MessageError::Format(1));
    assert_eq!(wrong(&|q| q.share = SHARES + 1), MessageError::Invalid("share: more than all"));
    assert!(matches!(wrong(&|q| q.reports.push(q.reports[0])), MessageError::Invalid(_)));
    for window_s in [0, MAX_WINDOW_S + 1] {
        assert!(matches!(wrong(&|q| q.reports[3].account.window_s = window_s), MessageError::Invalid(_)));
    }
    let account = Account { key: u64::MAX, window_s: 1 };
    let grant =
        Grant { account, limit: u32::MAX, cap: Some(u32::MAX), elsewhere: u32::MAX, elsewhere_ms: u64::MAX };
    let answer = Answer {
        format: FORMAT,
        number: u64::MAX,
        era: u64::MAX,
        rejoin: true,
        leave: true,
        share: SHARES,
        report_ms: u32::MAX,
        grants: vec![grant; MAX_ENTRIES * 2],
        recalls: vec![Recall { account, limit: u32::MAX, keep: u32::MAX }; MAX_ENTRIES],
    };
    let bytes = answer.encode();
    assert!(bytes.len() <= MAX_BYTES, "{}", bytes.len());
    assert_eq!(Answer::decode(&bytes), Ok(answer));
    assert_eq!(Answer::decode(&vec![b' '; MAX_BYTES + 1]), Err(MessageError::TooLong));
    assert!(matches!(Answer::decode(b"{}"), Err(MessageError::Json(_))));
}

#[test]
fn a_cap_that_an_answer_lowers_is_reported_at_once() {
    let (mut ledger, mut sites) = fleet(1, 100);
    let site = &mut sites[0];
    assert!(site.spend(1, 3 * S).is_admitted());
    let ticks = (0..20).map(|tick| 3 * S + tick * 10 * MS);
    let asked = |site: &mut Site, now| Some((site.ask(now)?, now)).filter(|(it, _)| !it.reports.is_empty());
    let (question, now) = ticks.clone().find_map(|now| asked(site, now)).unwrap();
    let mut answer = ledger.exchange(&question, now).unwrap().answer;
    answer.grants[0].cap = Some(50);
    assert!(site.leader.on_answer(&mut site.memory, &answer, now + MS));
    let next = site.ask(now + 10 * MS).unwrap();
    assert_eq!(next.reports.iter().map(|report| report.cap).collect::<Vec<_>>(), [50]);
}

#[test]
fn a_damaged_page_admits_nothing() {
    let (_, mut sites) = fleet(1, 100);
    let site = &mut sites[0];
    let page = Page::index(account(HOUR_S));
    site.memory.set(&page::key(page), b"what?", None).unwrap();
    assert!(matches!(site.spend(1, 2 * S), Verdict::Refused(_, Why::Unknown)));
}

proptest! {
    #[test]
    fn divided_is_what_there_is(
        limit in 0_u32..100_000,
        needs in prop::collection::vec((0_u32..200_000, 0_u32..50_000), 1..12),
    ) {
        let needs: Vec<_> =
            needs.into_iter().map(|(wanted, most)| division::Need { wanted, most }).collect();
        let parts = division::divide(limit, &needs);
        prop_assert_eq!(parts.len(), needs.len());
        let sum: u64 = parts.iter().map(|part| u64::from(*part)).sum();
        prop_assert!(sum <= u64::from(limit));
        let room: u64 = needs.iter().map(|need| u64::from(need.most)).sum();
        if room >= u64::from(limit) {
            prop_assert_eq!(sum, u64::from(limit), "nothing is left over that may be used");
        }
    }

    /// A VM reads what another one wrote, and refuses anything else.
    #[test]
    fn pages_are_read_totally(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0_usize..200, to: u8) {
        let read = |bytes: Vec<u8>| Page::decode(bytes).is_ok_and(|mut page| page.records().is_ok());
        read(bytes);
        let mut page = Page::default();
        for key in 0..3 {
            let record = page.record(Account { key, window_s: 60 }, 5, &standing::Standing::default()).unwrap();
            (record.cap, record.agreed, record.elsewhere_until_ns) = (3, key == 1, u64::MAX);
            record.draws.push(record::Draw { vm: 7, units: 2, until_ns: 9 * S });
            for step in 0..20 {
                record.spends.add(step * S, 1, 60 * S);
            }
        }
        let mut bytes = page.encode();
        let mut again = Page::decode(bytes.clone()).unwrap();
        // Untouched ones are passed on as they are.
        let first = Account { key: 0, window_s: 60 };
        prop_assert!(again.find(first).unwrap().is_some());
        prop_assert_eq!(&again.encode(), &bytes);
        prop_assert_eq!(again.records().unwrap(), page.records().unwrap());
        if let Some(byte) = bytes.get_mut(at) {
            *byte = to;
        }
        let _ = Question::decode(&bytes);
        read(bytes);
    }

    /// Spends are never free early, in whatever order they are noted, and their bytes stay few.
    #[test]
    fn spends_are_never_forgotten_early(times in prop::collection::vec(0_u64..3_000, 1..600), now in 0_u64..5_000) {
        let window = 1_000;
        let mut spends = Spends::default();
        for at in &times {
            spends.add(*at, 1, window);
        }
        spends.expire(now, window, drop);
        let inside = times.iter().filter(|at| **at + window > now).count();
        prop_assert!(usize::try_from(spends.used()).unwrap() >= inside);
        let mut bytes = Vec::new();
        spends.encode(&mut bytes);
        prop_assert!(bytes.len() < 132 * 13);
        prop_assert_eq!(Spends::decode(&mut crate::bytes::Reader::new(&bytes)).unwrap(), spends);
    }
}

#[test]
fn two_hundred_thousand_accounts_have_room_and_a_page_that_is_full_says_so() {
    let mut dice = Dice(1);
    let mut pages: BTreeMap<u16, Vec<Account>> = BTreeMap::new();
    for _ in 0..200_000 {
        let account = Account { key: dice.roll(), window_s: HOUR_S };
        pages.entry(Page::index(account)).or_default().push(account);
    }
    let standing = standing::Standing::default();
    let mut fullest = pages.into_values().max_by_key(Vec::len).unwrap();
    let mut page = Page::default();
    while fullest.len() < 255 {
        fullest.push(Account { key: dice.roll(), window_s: HOUR_S });
    }
    for account in &fullest {
        page.record(*account, 100, &standing).unwrap();
    }
    // All of a full page are read again, and one more is refused.
    let mut read = Page::decode(page.encode()).unwrap();
    assert_eq!(read.records().unwrap().len(), fullest.len());
    let one_more = Account { key: dice.roll(), window_s: HOUR_S };
    assert_eq!(read.record(one_more, 100, &standing).err(), Some(page::PageError::Crowded));
    assert!(fullest.iter().all(|account| read.find(*account).unwrap().is_some()));
}
