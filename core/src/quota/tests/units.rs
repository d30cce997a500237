//! One thing at a time.

use super::*;
use crate::limits::{Left, Limit, Metered};

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

    fn spend(&mut self, cost: u32, now: u64) -> Verdict {
        self.workers[0].spend(&mut self.memory, account(HOUR_S), self.limit, cost, now)
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
    let mut ledger = Ledger::new(Terms::default(), 1);
    let mut sites: Vec<Site> = (0..sites).map(|proxy| Site::new(proxy, proxy + 100, limit)).collect();
    settle(&mut ledger, &mut sites, S);
    (ledger, sites)
}

/// Lets them talk for a second.
fn settle(ledger: &mut Ledger, sites: &mut [Site], now: u64) {
    for tick in 0..50 {
        for site in &mut *sites {
            site.talk(ledger, now + tick * 20 * MS);
        }
    }
}

/// Lets time pass, in which they stay in touch.
fn pass(ledger: &mut Ledger, sites: &mut [Site], from: u64, to: u64) {
    for now in (from..to).step_by(2_000_000_000) {
        for site in &mut *sites {
            site.talk(ledger, now);
        }
    }
}

#[test]
fn a_first_request_passes_and_a_quiet_key_is_never_spoken_of() {
    let (mut ledger, mut sites) = fleet(3, 1_000);
    for site in &mut sites {
        let notice = site.spend(1, 2 * S).notice();
        assert_eq!((notice.limit, notice.remaining, notice.basis), (1_000, 999, Basis::Lease));
        assert_eq!(notice.reset_ns, HOUR);
    }
    settle(&mut ledger, &mut sites, 3 * S);
    assert!(ledger.saved().pools.is_empty());
}

#[test]
fn all_of_a_limit_is_admitted_in_one_place_and_then_no_more() {
    let (mut ledger, mut sites) = fleet(3, 100);
    let (mut admitted, mut now) = (0, 2 * S);
    for _ in 0..200 {
        admitted += sites[1].burst(1, now);
        now += 10 * MS;
        sites.iter_mut().for_each(|site| {
            site.talk(&mut ledger, now);
        });
    }
    assert_eq!(admitted, 100);
    let Verdict::Refused(notice, Why::Exhausted) = sites[1].spend(1, now) else { panic!() };
    assert_eq!(notice.remaining, 0);
    // Retry-After is true: not before, but then.
    let back = now + notice.reset_ns;
    pass(&mut ledger, &mut sites, now, back - 1);
    assert!(!sites[1].spend(1, back - 1).is_admitted());
    assert!(sites[1].spend(1, back).is_admitted());
}

#[test]
fn a_refused_key_is_refused_without_the_shared_data() {
    let (_, mut sites) = fleet(1, 8);
    assert_eq!(sites[0].burst(50, 2 * S), 1);
    sites[0].memory = Memory::default();
    assert!(matches!(sites[0].spend(1, 2 * S), Verdict::Refused(_, Why::Exhausted)));
}

#[test]
fn without_a_share_nothing_passes() {
    let mut site = Site::new(1, 1, 100);
    assert!(matches!(site.spend(1, 0), Verdict::Refused(_, Why::NoShare)));
    let mut site = fleet(1, 100).1.remove(0);
    assert!(matches!(site.spend(101, 2 * S), Verdict::Refused(_, Why::TooDear)));
}

#[test]
fn a_decision_is_told_what_is_left_or_that_nothing_is_known() {
    let limit = Limit { units: 100, window_s: HOUR_S };
    let mut site = fleet(1, 100).1.remove(0);
    let left = Left { limit, remaining: 99, reset_s: 3_600 };
    assert_eq!(site.spend(1, 2 * S).metered(limit), Metered::Within(left));
    site.burst(200, 2 * S);
    // What is rounded up is never too early.
    let refused = Left { limit, remaining: 0, reset_s: 3_599 };
    assert_eq!(site.spend(1, 3 * S + 1).metered(limit), Metered::Beyond(refused));
    assert!(matches!(site.spend(101, 3 * S).metered(limit), Metered::Beyond(_)));
    assert_eq!(Site::new(1, 1, 100).spend(1, 0).metered(limit), Metered::Unknown, "it has no share");
}

#[test]
fn a_dear_request_gets_what_it_needs() {
    let (mut ledger, mut sites) = fleet(3, 100);
    assert!(!sites[0].spend(90, 2 * S).is_admitted());
    settle(&mut ledger, &mut sites, 2 * S);
    assert!(sites[0].spend(90, 4 * S).is_admitted());
    assert!(!sites[0].spend(90, 5 * S).is_admitted());
}

#[test]
fn a_vm_that_traps_takes_its_units_for_a_window() {
    let (_, mut sites) = fleet(1, 1_000);
    let site = &mut sites[0];
    assert_eq!(site.burst(3, 2 * S), 3);
    let before = site.record(|record, _| record.in_use()).unwrap();
    assert!(before > 3, "more was drawn than spent");
    site.workers[0] = Worker::new(3);
    assert!(site.spend(1, 5 * S).is_admitted());
    let after = |site: &mut Site| site.record(|record, _| record.spends.used()).unwrap();
    assert_eq!(after(site), before + 1, "what was drawn counts as spent");
    let back = |site: &mut Site| site.record(|record, _| record.spends.back_at(before, HOUR)).unwrap();
    assert_eq!(
        back(site),
        Some(5 * S + HOUR),
        "a window after the draw's end at 4 s, and no later than those beside it"
    );
}

#[test]
fn of_a_key_that_comes_rarely_nothing_is_drawn() {
    let (_, mut sites) = fleet(1, 1_000);
    let site = &mut sites[0];
    for now in [2 * S, 3 * S, 4 * S] {
        assert!(site.spend(1, now).is_admitted());
        assert_eq!(site.record(|record, _| record.draws.len()), Some(0));
        site.ask(now + 100 * MS);
        site.ask(now + 200 * MS);
    }
    assert_eq!(site.record(|record, _| record.in_use()), Some(3));
}

#[test]
fn of_a_large_limit_a_vm_keeps_units_while_the_key_comes_and_gives_them_back_when_not() {
    let (mut ledger, mut sites) = fleet(1, 100_000);
    let drawn = |site: &mut Site| site.record(|record, _| record.draws.first().map(|draw| draw.units));
    assert!(sites[0].spend(1, 2 * S).is_admitted());
    let units = drawn(&mut sites[0]).flatten().expect("the first request draws");
    for second in 3..40 {
        assert!(sites[0].spend(1, second * S).is_admitted());
        pass(&mut ledger, &mut sites, second * S + 1, second * S + S);
        assert!(drawn(&mut sites[0]).flatten().is_some(), "kept at {second} s");
    }
    let used = sites[0].record(|record, _| record.spends.used()).unwrap();
    assert!((10..38).contains(&used), "{used} of 38 were told so far");
    pass(&mut ledger, &mut sites, 40 * S, 46 * S);
    assert_eq!(drawn(&mut sites[0]), Some(None), "given back");
    assert_eq!(sites[0].record(|record, _| record.in_use()), Some(38), "{units} were drawn each time");
}

#[test]
fn a_tick_settles_so_many_accounts_that_nobody_waits_for_it() {
    let (_, mut sites) = fleet(1, 100_000);
    let Site { memory, workers: [worker, _], .. } = &mut sites[0];
    let accounts: Vec<Account> =
        (1..=150).map(|n| Account { key: KEY.wrapping_mul(n), ..account(HOUR_S) }).collect();
    for account in &accounts {
        assert!(worker.spend(memory, *account, 100_000, 1, 2 * S).is_admitted());
    }
    let mut holding = Vec::new();
    for tick in 0..4 {
        worker.on_tick(memory, 8 * S + tick * 90 * MS);
        let held = accounts.iter().filter(|account| {
            let draws = |page: &mut Page, _: &_| {
                Ok((page.find(**account)?.map(|record| record.draws.len()), Write::No))
            };
            page::change(memory, Page::index(**account), false, draws).unwrap().flatten() != Some(0)
        });
        holding.push(held.count());
    }
    assert_eq!(holding, [86, 22, 0, 0]);
}

#[test]
fn what_a_vm_drew_it_does_not_spend_when_it_holds_no_more() {
    let (mut ledger, mut sites) = fleet(3, 1_000);
    let mut now = 2 * S;
    for _ in 0..10 {
        sites[0].burst(40, now);
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    let site = &mut sites[0];
    assert!(site.cap(now) > 400, "more than its own");
    // The lease is nearly over: nothing is drawn that could be spent after it.
    let end = site.record(|record, standing| record.holds_until(standing, now)).unwrap();
    let lease = site.record(|record, standing| record.leased_ns + standing.lease_ns).unwrap();
    assert_eq!(end, lease);
    site.burst(2, lease - S);
    let until = site.record(|record, _| record.draws.iter().map(|draw| draw.until_ns).max()).unwrap();
    assert_eq!(until, Some(lease));
    site.spend(1, lease - 100 * MS);
    let purse_is_kept = site.record(|record, _| record.draws.len()).unwrap();
    assert_eq!(purse_is_kept, 1);
    site.spend(1, lease);
    let later = site.record(|record, _| record.draws.iter().map(|draw| draw.until_ns).max()).unwrap();
    assert!(later.is_none_or(|until| until > lease));
}

#[test]
fn a_clock_that_goes_backwards_gives_nothing_back() {
    let (_, mut sites) = fleet(1, 8);
    assert_eq!(sites[0].burst(5, 20 * S), 1);
    for now in [0, 10 * S, 19 * S] {
        assert!(!sites[0].spend(1, now).is_admitted());
    }
    assert_eq!(sites[0].record(|record, _| record.spends.back_at(1, HOUR)), Some(Some(20 * S + HOUR)));
}

#[test]
fn without_the_control_plane_a_proxy_has_its_fair_share() {
    let (mut ledger, mut sites) = fleet(3, 90);
    assert_eq!(sites[0].burst(200, 2 * S), 7, "a fourth of its share is spent without a word");
    let now = 2 * S + 2 * 30 * S;
    assert_eq!(sites[0].burst(200, now), 21, "15/16 of a third, and the rest when nothing is heard any more");
    assert_eq!(sites[1].burst(200, now), 28);
    assert_eq!(sites[0].spend(1, now).notice().basis, Basis::FairShare);
    // After so long, others may have it.
    assert!(matches!(sites[2].spend(1, 2 * S + 300 * S), Verdict::Refused(_, Why::NoShare)));
    settle(&mut ledger, &mut sites, now + S);
    let held: u32 = ledger.saved().pools[0].holders.iter().map(|(_, held, _)| held).sum();
    assert!((56..=90).contains(&held), "{held}");
}

#[test]
fn what_was_leased_ends_and_what_was_given_away_comes_back() {
    let terms = Terms { lease_s: 15, keep_s: 20_000, ..Terms::default() };
    let mut ledger = Ledger::new(terms, 1);
    let mut sites: Vec<Site> = (0..2).map(|proxy| Site::new(proxy, proxy, 100)).collect();
    settle(&mut ledger, &mut sites, S);
    let mut now = 2 * S;
    for _ in 0..30 {
        sites[0].burst(10, now);
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert_eq!((sites[0].cap(now), sites[1].cap(now)), (100, 0));
    let silence = now + 16 * S;
    assert_eq!((sites[0].cap(silence), sites[1].cap(silence)), (46, 0));
    // 3 leases and a window.
    let alone = now + 45 * S + HOUR;
    sites[1].burst(1, alone - S);
    assert_eq!(sites[1].burst(200, alone - S), 0);
    assert_eq!(sites[1].burst(200, alone + S), 46);
    // Heard of again: the ledger learns of it, and gives nobody what is in use there.
    let back = alone + 2 * S;
    for tick in 0..100 {
        sites[0].burst(5, back + tick * 100 * MS);
        for site in &mut sites {
            site.talk(&mut ledger, back + tick * 100 * MS);
        }
        assert!(sites[0].cap(back + tick * 100 * MS) <= 54);
    }
}

#[test]
fn only_the_answer_to_the_last_question_counts() {
    let (mut ledger, mut sites) = fleet(1, 100);
    let site = &mut sites[0];
    site.burst(20, 2 * S);
    let first = site.ask(2 * S).unwrap();
    let second = site.ask(2 * S + 6 * S).unwrap();
    assert!(second.number > first.number);
    let late = ledger.exchange(&first, 8 * S).unwrap().answer;
    assert!(late.grants[0].held.unwrap() > 0);
    let before = site.cap(8 * S);
    assert!(!site.leader.on_answer(&mut site.memory, &late, 8 * S));
    // Nor does a leader take it that was replaced meanwhile.
    let mut deposed = std::mem::replace(&mut site.leader, Leader::new(0, 100));
    let answer = ledger.exchange(&second, 8 * S).unwrap().answer;
    let third = site.ask(8 * S).unwrap();
    assert!(!deposed.on_answer(&mut site.memory, &answer, 8 * S));
    assert_eq!(site.cap(8 * S), before);
    assert_eq!(ledger.exchange(&second, 9 * S), Err(ExchangeError::Superseded));
    // One that comes too late does not either.
    let answer = ledger.exchange(&third, 9 * S).unwrap().answer;
    assert!(!site.leader.on_answer(&mut site.memory, &answer, 8 * S + ANSWER_NS + 1));
}

#[test]
fn a_share_is_lower_when_what_is_above_it_was_reported() {
    let (mut ledger, mut sites) = fleet(1, 1_000);
    // Out of touch, it uses all of its own of some keys.
    let now = 40 * S;
    for key in 0..600 {
        for _ in 0..200 {
            let account = Account { key: Dice(key).roll(), window_s: HOUR_S };
            let Site { workers, memory, .. } = &mut sites[0];
            workers[0].spend(memory, account, 1_000, 4, now);
        }
    }
    sites.push(Site::new(1, 7, 1_000));
    let mut lowered_at = None;
    for tick in 0..200 {
        let now = now + tick * 20 * MS;
        for site in &mut sites {
            site.talk(&mut ledger, now);
        }
        let saved = ledger.saved();
        let share = saved.members.iter().find(|saved| saved.member.proxy == 0).unwrap().share;
        if share < SHARES / 2 && lowered_at.is_none() {
            lowered_at = Some(tick);
            assert_eq!(saved.pools.len(), 600, "all of them were reported before");
        }
        for pool in &saved.pools {
            let held = |proxy| {
                pool.holders
                    .iter()
                    .find(|(member, ..)| member.proxy == proxy)
                    .map_or_else(|| 1_000, |(_, held, _)| *held)
            };
            if pool.holders.len() == 2 {
                assert!(held(0) + held(1) <= 1_000);
            }
        }
    }
    assert!(lowered_at.is_some());
}

#[test]
fn a_restart_of_a_proxy_loses_little() {
    let (mut ledger, mut sites) = fleet(1, 100);
    let mut now = 2 * S;
    for _ in 0..20 {
        assert_eq!(sites[0].burst(1, now), 1);
        settle(&mut ledger, &mut sites, now);
        now += 2 * S;
    }
    sites[0] = Site::new(0, 55, 100);
    settle(&mut ledger, &mut sites, now);
    let mut admitted = 0;
    for _ in 0..100 {
        admitted += sites[0].burst(2, now);
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert!((65..=80).contains(&admitted), "{admitted}: 20 were spent, 12 held ahead");
    // Of keys that it said nothing of, a fourth of what was its own is gone for a window.
    let fresh = Account { key: 1, window_s: HOUR_S };
    let mut admitted = 0;
    for _ in 0..100 {
        let Site { workers, memory, .. } = &mut sites[0];
        admitted += u32::from(workers[0].spend(memory, fresh, 100, 1, now).is_admitted());
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert!((70..=77).contains(&admitted), "{admitted}");
}

#[test]
fn a_limit_that_changes_holds() {
    let (mut ledger, mut sites) = fleet(2, 100);
    let mut now = 2 * S;
    let run = |ledger: &mut Ledger, sites: &mut Vec<Site>, now: &mut u64| {
        let mut admitted = 0;
        for _ in 0..60 {
            admitted += sites.iter_mut().map(|site| site.burst(20, *now)).sum::<u32>();
            settle(ledger, sites, *now);
            *now += S;
        }
        admitted
    };
    assert_eq!(run(&mut ledger, &mut sites, &mut now), 100);
    sites.iter_mut().for_each(|site| site.limit = 1_000);
    assert_eq!(run(&mut ledger, &mut sites, &mut now), 900, "an override adds at once");
    sites.iter_mut().for_each(|site| site.limit = 100);
    assert_eq!(run(&mut ledger, &mut sites, &mut now), 0, "and its end takes away");
    pass(&mut ledger, &mut sites, now, now + HOUR);
    now += HOUR;
    assert_eq!(run(&mut ledger, &mut sites, &mut now), 100);
}

#[test]
fn a_control_plane_goes_on_from_what_it_kept() {
    let (mut ledger, mut sites) = fleet(3, 1_000);
    let mut now = 2 * S;
    let mut admitted = 0;
    for round in 0..60 {
        if round % 7 == 3 {
            let json = serde_json::to_string(&ledger.saved()).unwrap();
            let saved: Saved = serde_json::from_str(&json).unwrap();
            assert_eq!(saved, ledger.saved());
            ledger = Ledger::resume(Terms::default(), &saved, round % 2 == 0, now);
        }
        admitted += sites.iter_mut().map(|site| site.burst(30, now)).sum::<u32>();
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert_eq!(admitted, 1_000);
}

#[test]
fn a_control_plane_that_forgot_hands_nothing_out_for_a_window() {
    let (mut ledger, mut sites) = fleet(3, 1_000);
    let mut now = 2 * S;
    let mut admitted = 0;
    for _ in 0..20 {
        admitted += sites[0].burst(50, now);
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert_eq!(admitted, 1_000);
    let mut ledger = Ledger::in_doubt(Terms::default(), 2, now);
    let lost_at = now;
    while now < lost_at + HOUR - 30 * S {
        let more: u32 = sites.iter_mut().map(|site| site.burst(50, now)).sum();
        assert_eq!(more, 0);
        settle(&mut ledger, &mut sites, now);
        now += 100 * S;
    }
    assert!(ledger.is_in_doubt(now));
    now = lost_at + HOUR + 310 * S;
    let mut admitted = 0;
    for _ in 0..130 {
        admitted += sites[2].burst(50, now);
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert!(!ledger.is_in_doubt(now));
    assert_eq!(admitted, 1_000);
}

#[test]
fn a_control_plane_that_was_away_for_long_finds_things_as_they_were() {
    let (mut ledger, mut sites) = fleet(3, 100);
    let mut now = 2 * S;
    for _ in 0..40 {
        sites[0].burst(2, now);
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    let spent = sites[0].record(|record, _| record.in_use()).unwrap();
    assert_eq!(spent, 80);
    now += 400 * S;
    assert!(!sites[0].spend(1, now).is_admitted());
    settle(&mut ledger, &mut sites, now);
    let shares: u32 = ledger.saved().members.iter().map(|saved| saved.share).sum();
    assert!(shares > SHARES / 10 * 9 && shares <= SHARES, "{shares}");
    let mut admitted = 0;
    for _ in 0..60 {
        admitted += sites.iter_mut().map(|site| site.burst(2, now)).sum::<u32>();
        settle(&mut ledger, &mut sites, now);
        now += S;
    }
    assert_eq!(admitted, 20);
}

#[test]
fn what_a_proxy_spent_while_it_was_lost_counts_when_it_is_back() {
    let (mut ledger, mut sites) = fleet(2, 100);
    let mut admitted = sites[0].burst(200, 250 * S);
    assert_eq!(admitted, 46);
    pass(&mut ledger, &mut sites[1..], 2 * S, 310 * S);
    let mut now = 310 * S;
    for _ in 0..60 {
        settle(&mut ledger, &mut sites, now);
        admitted += sites[1].burst(10, now);
        now += S;
    }
    assert_eq!(admitted, 100);
    assert_eq!(ledger.saved().members[0].member.term, 2);
}

#[test]
fn a_process_that_is_gone_ends_no_other() {
    let mut ledger = Ledger::new(Terms::default(), 1);
    let mut old = Site::new(5, 1, 100);
    assert_eq!(old.ask(S), None, "the first tick makes what is shared");
    let late = old.ask(S + 10 * MS).unwrap();
    let mut sites = vec![Site::new(5, 2, 100)];
    settle(&mut ledger, &mut sites, 2 * S);
    ledger.exchange(&late, 4 * S).unwrap();
    settle(&mut ledger, &mut sites, 4 * S);
    assert!(sites[0].spend(1, 6 * S).is_admitted());
    let ended = |ledger: &Ledger| -> Vec<_> {
        ledger.saved().members.iter().map(|saved| saved.ended_in_touch.is_some()).collect()
    };
    assert_eq!(ended(&ledger), [true, false]);
    // Nor does one that has heard an answer and is gone since.
    let mut ledger = Ledger::new(Terms::default(), 1);
    let mut old = Site::new(5, 1, 100);
    settle(&mut ledger, std::slice::from_mut(&mut old), S);
    let late = old.ask(3 * S).unwrap();
    let mut new = Site::new(5, 2, 100);
    assert!(!new.talk(&mut ledger, 3 * S) && new.talk(&mut ledger, 3 * S + 10 * MS));
    ledger.exchange(&late, 4 * S).unwrap();
    assert_eq!(ended(&ledger), [false, false]);
    settle(&mut ledger, std::slice::from_mut(&mut new), 4 * S);
    assert_eq!(ended(&ledger), [true, false]);
    // Where two processes may be there at a time, neither ends the other.
    let mut ledger = Ledger::new(Terms { hot_restart: true, ..Terms::default() }, 1);
    let mut sites = vec![Site::new(5, 1, 100), Site::new(5, 2, 100)];
    settle(&mut ledger, &mut sites, 2 * S);
    assert_eq!(ended(&ledger), [false, false]);
}

/// Drains a proxy; how long that took.
fn drain(ledger: &mut Ledger, sites: &mut [Site], at: usize, now: u64) -> u64 {
    assert!(ledger.drain(u64::try_from(at).unwrap(), now));
    for tick in 1..500 {
        let now = now + tick * 10 * MS;
        for site in &mut *sites {
            site.talk(ledger, now);
        }
        if ledger.is_drained(u64::try_from(at).unwrap()) {
            return tick * 10 * MS;
        }
    }
    panic!("not drained after 5 s");
}

#[test]
fn a_proxy_that_is_drained_takes_nothing_along_but_what_it_spent() {
    let (mut ledger, mut sites) = fleet(2, 1_000);
    // Of one account more than its own is held, of another a little is spent without a word.
    for step in 0..40 {
        sites[0].burst(20, 2 * S + step * 20 * MS);
        sites.iter_mut().for_each(|site| {
            site.talk(&mut ledger, 2 * S + step * 20 * MS);
        });
    }
    let quiet = Account { key: !KEY, ..account(HOUR_S) };
    let site = &mut sites[0];
    assert!(site.workers[0].spend(&mut site.memory, quiet, 1_000, 1, 3 * S).is_admitted());
    assert!(!ledger.is_drained(0));
    let took = drain(&mut ledger, &mut sites, 0, 4 * S);
    assert!(took < S, "{took} ns");
    let saved = ledger.saved();
    let gone = saved.members.iter().find(|saved| saved.member.proxy == 0).unwrap();
    assert_eq!(gone.share, 0);
    let held: Vec<u32> = saved
        .pools
        .iter()
        .flat_map(|pool| &pool.holders)
        .filter(|(member, ..)| member.proxy == 0)
        .map(|(_, held, _)| *held)
        .collect();
    // Of which a VM may hold a few that it drew and did not spend.
    assert!((801..=804).contains(&held.iter().sum::<u32>()), "{held:?}");
    // It is not ready for more, and says that it is not the limit which is used up.
    assert!(matches!(sites[0].spend(1, 5 * S), Verdict::Refused(_, Why::NoShare)));
    assert!(!has_share(&mut sites[0].memory, 5 * S));
    // A new process of it is like any other, also one that the control plane has heard of before it restarts.
    sites[0] = Site::new(0, 7, 1_000);
    settle(&mut ledger, &mut sites, 6 * S);
    assert!(sites[0].spend(1, 7 * S).is_admitted() && has_share(&mut sites[0].memory, 7 * S));
    drain(&mut ledger, &mut sites, 0, 8 * S);
    let mut ledger = Ledger::resume(Terms::default(), &ledger.saved(), true, 9 * S);
    sites[0] = Site::new(0, 8, 1_000);
    settle(&mut ledger, &mut sites, 10 * S);
    assert!(sites[0].spend(1, 11 * S).is_admitted());
    // Longer terms come in between, as when another control plane joins.
    assert!(ledger.drain(0, 12 * S));
    ledger.lengthen(Terms { keep_s: 3_600, ..Terms::default() }, 12 * S);
    drain(&mut ledger, &mut sites, 0, 12 * S);
    let mut later = sites[0].ask(14 * S).map(|question| ledger.exchange(&question, 14 * S).unwrap().answer);
    assert_eq!(later.take().map(|answer| (answer.share, answer.keep_s)), Some((0, 3_600)));
}

#[test]
fn proxies_that_are_drained_and_replaced_leave_the_limit_whole() {
    let (mut ledger, mut sites) = fleet(3, 1_000);
    let (mut now, mut ids) = (2 * S, [0, 1, 2]);
    for generation in 1..20 {
        for at in 0..3 {
            let id = ids[at];
            sites[at].burst(2, now);
            assert!(ledger.drain(id, now));
            let end = now + 2 * S;
            while now < end && !ledger.is_drained(id) {
                now += 10 * MS;
                sites.iter_mut().for_each(|site| {
                    site.talk(&mut ledger, now);
                });
            }
            assert!(ledger.is_drained(id));
            ids[at] = generation * 10 + u64::try_from(at).unwrap();
            sites[at] = Site::new(ids[at], 1, 1_000);
            settle(&mut ledger, &mut sites, now);
            now += S;
        }
    }
    // 57 proxies were drained; each had spent two units.
    let mut admitted = 0;
    for _ in 0..4_000 {
        admitted += sites[1].burst(1, now);
        now += 20 * MS;
        sites.iter_mut().for_each(|site| {
            site.talk(&mut ledger, now);
        });
    }
    assert!((1_000 - 114..=1_000 - 110).contains(&admitted), "{admitted}");
}

#[test]
fn who_is_not_known_joins_anew() {
    let (_, mut sites) = fleet(1, 100);
    let mut other = Ledger::new(Terms::default(), 9);
    let site = &mut sites[0];
    assert!(site.talk(&mut other, 2 * S));
    assert!(!site.spend(1, 2 * S).is_admitted());
    settle(&mut other, &mut sites, 3 * S);
    assert!(sites[0].spend(1, 4 * S).is_admitted());
    assert_eq!(other.saved().members[0].member.term, 2);
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
fn terms_are_checked() {
    assert_eq!(Terms::default().validate(), Ok(()));
    let errors = Terms { lease_s: 1, keep_s: 0, longest_window_s: 0, hot_restart: false }.validate();
    assert_eq!(errors.unwrap_err().len(), 3);
    assert!(u64::from(MIN_LEASE_S) * S >= 3 * ANSWER_NS);
}

#[test]
fn a_unit_is_back_after_a_window_and_not_before() {
    let window = 3_600 * S;
    let mut spends = Spends::default();
    for at in 0..1_000 {
        spends.add(at * window / 1_000, 1, window);
    }
    let at_once = window / 1_000;
    spends.expire(window - 1, window);
    assert_eq!(spends.used(), 1_000);
    // At most one slot late.
    for part in 1..=10 {
        let now = window + part * window / 10;
        spends.expire(now, window);
        let due = u32::try_from(1_000 - (part * 100).min(1_000)).unwrap();
        assert!((due..=due + 9).contains(&spends.used()), "{part}: {} of {due}", spends.used());
    }
    assert!(at_once > 0 && spends.is_empty());
}

#[test]
fn messages_are_read_strictly() {
    let question = Question {
        format: FORMAT,
        member: Member { proxy: u64::MAX, incarnation: u64::MAX, term: u64::MAX },
        number: u64::MAX,
        applied: u64::MAX,
        era: u64::MAX,
        share: SHARES,
        reports: vec![
            Report {
                account: Account { key: u64::MAX, window_s: MAX_WINDOW_S },
                limit: u32::MAX,
                held: u32::MAX,
                used: u32::MAX,
                wanted: u32::MAX,
                dearest: u32::MAX,
                own: true,
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
    assert_eq!(wrong(&|q| q.format = 2), MessageError::Format(2));
    assert_eq!(wrong(&|q| q.share = SHARES + 1), MessageError::Invalid("share: more than all"));
    assert_eq!(wrong(&|q| q.reports.push(q.reports[0])), MessageError::Invalid("more than 256 accounts"));
    for window_s in [0, MAX_WINDOW_S + 1] {
        assert!(matches!(wrong(&|q| q.reports[3].account.window_s = window_s), MessageError::Invalid(_)));
    }
    let answer = Answer {
        format: FORMAT,
        number: u64::MAX,
        era: u64::MAX,
        rejoin: false,
        share: SHARES,
        lease_s: u32::MAX,
        keep_s: u32::MAX,
        grants: vec![
            Grant {
                account: Account { key: u64::MAX, window_s: 1 },
                limit: u32::MAX,
                held: Some(u32::MAX),
                elsewhere: u32::MAX,
            };
            MAX_ENTRIES
        ],
        recalls: vec![
            Recall {
                account: Account { key: u64::MAX, window_s: 1 },
                limit: u32::MAX,
                at_most: u32::MAX,
            };
            MAX_ENTRIES
        ],
    };
    let bytes = answer.encode();
    assert!(bytes.len() <= MAX_BYTES, "{}", bytes.len());
    assert_eq!(Answer::decode(&bytes), Ok(answer));
    assert_eq!(Answer::decode(&vec![b' '; MAX_BYTES + 1]), Err(MessageError::TooLong));
    assert!(matches!(Answer::decode(b"{}"), Err(MessageError::Json(_))));
}

#[test]
fn a_damaged_page_admits_nothing() {
    let (_, mut sites) = fleet(1, 100);
    let site = &mut sites[0];
    let page = Page::index(account(HOUR_S));
    site.memory.set(&format!("keygate/1/quota/page/{page}"), b"what?", None).unwrap();
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
            prop_assert_eq!(sum, u64::from(limit), "nothing is left over that somebody may have");
        }
    }

    /// What one VM writes another reads, whatever else it finds.
    #[test]
    fn pages_are_read_totally(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0_usize..200, to: u8) {
        let read = |bytes: Vec<u8>| Page::decode(bytes).is_ok_and(|mut page| page.records().is_ok());
        read(bytes);
        let mut page = Page::default();
        for key in 0..3 {
            let record = page.record(Account { key, window_s: 60 }, 5).unwrap();
            record.holding = record::Holding::Agreed { held: 3, of: 4 };
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

    /// However late spends are told of: none comes back early, and a value stays small.
    #[test]
    fn spends_are_never_forgotten_early(times in prop::collection::vec(0_u64..3_000, 1..600), now in 0_u64..5_000) {
        let window = 1_000;
        let mut spends = Spends::default();
        for at in &times {
            spends.add(*at, 1, window);
        }
        spends.expire(now, window);
        let inside = times.iter().filter(|at| **at + window > now).count();
        prop_assert!(usize::try_from(spends.used()).unwrap() >= inside);
        let mut bytes = Vec::new();
        spends.encode(&mut bytes);
        prop_assert!(bytes.len() < 132 * 13);
        prop_assert_eq!(Spends::decode(&mut crate::wire::Reader::new(&bytes)).unwrap(), spends);
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
    let mut fullest = pages.into_values().max_by_key(Vec::len).unwrap();
    let mut page = Page::default();
    while fullest.len() < 255 {
        fullest.push(Account { key: dice.roll(), window_s: HOUR_S });
    }
    for account in &fullest {
        page.record(*account, 100).unwrap();
    }
    // All of a full page are read again, and one more is refused.
    let mut read = Page::decode(page.encode()).unwrap();
    assert_eq!(read.records().unwrap().len(), fullest.len());
    let one_more = Account { key: dice.roll(), window_s: HOUR_S };
    assert_eq!(read.record(one_more, 100).err(), Some(page::PageError::Crowded));
    assert!(fullest.iter().all(|account| read.find(*account).unwrap().is_some()));
}
