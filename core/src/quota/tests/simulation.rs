//! Fleets in simulated time: with every fault at once, and without any.

use super::*;

/// Shared data where another VM comes between a read and a write.
struct Racing<'m> {
    memory: &'m mut Memory,
    other: &'m mut Worker,
    turn: (Account, u32, u64),
    left: u32,
    admitted: u32,
}

impl SharedData for Racing<'_> {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        let value = self.memory.get(key);
        if self.left > 0 {
            self.left -= 1;
            let (account, limit, now) = self.turn;
            if self.other.spend(self.memory, account, (limit, 1, false), now).is_admitted() {
                self.admitted += 1;
            }
        }
        value
    }

    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
        self.memory.set(key, value, cas)
    }
}

/// Shared data of a VM that traps after some writes.
struct Dying<'m> {
    memory: &'m mut Memory,
    writes: u64,
}

impl SharedData for Dying<'_> {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.memory.get(key)
    }

    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
        self.writes = self.writes.checked_sub(1).ok_or(Conflict)?;
        self.memory.set(key, value, cas)
    }
}

struct Proxy {
    memory: Memory,
    workers: Vec<Worker>,
    leader: Leader,
    id: u64,
    incarnation: u64,
    /// Added to the time: clocks of proxies do not agree.
    clock_ns: u64,
    limit: u32,
    cut_off_until: u64,
    leaves: bool,
    /// Units that it may spend beyond what the ledger counts, since it hears nothing.
    silent: Option<(u64, u32)>,
}

impl Proxy {
    /// Units that it may have in use of an account: by its cap, or by its share.
    fn may_use(&mut self, account: Account) -> u32 {
        let Some((standing, _)) = standing::Standing::read(&mut self.memory) else { return 0 };
        let limit = self.limit;
        let record = page::change(&mut self.memory, Page::index(account), false, |page, _| {
            Ok((page.find(account)?.map(|record| record.cap.max(record.in_use())), Write::No))
        });
        let own = standing.own(limit);
        record.ok().flatten().flatten().unwrap_or(0).max(own)
    }
}

#[derive(Debug, Clone)]
enum Message {
    Question(usize, Vec<u8>),
    Answer(usize, u64, u64, Vec<u8>),
}

/// Frequency of faults, in thousandths.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    lost: u64,
    slow: u64,
    /// For each tick.
    trap: u64,
    leader: u64,
    kill: u64,
    restart: u64,
    loss: u64,
    away: u64,
    cut_off: u64,
    limit: u64,
    race: u64,
    pause: u64,
    drain: u64,
}

/// What a control plane keeps of its ledger.
#[derive(Debug, Default)]
struct Kept {
    recovering: bool,
    members: BTreeMap<Member, MemberRow>,
    holders: BTreeMap<(Account, Member), HolderRow>,
    spends: BTreeMap<SpendKey, SpendRow>,
}

impl Kept {
    fn write(&mut self, ledger: &mut Ledger) {
        let changes = ledger.take_changes();
        self.recovering = ledger.saves_recovering();
        for member in changes.members {
            self.members.remove(&member);
            self.members.extend(ledger.member(&member).map(|row| (member, row)));
        }
        for (account, member) in changes.holders {
            self.holders.remove(&(account, member));
            self.holders.extend(ledger.holder(account, &member).map(|row| ((account, member), row)));
        }
        for key in changes.spends {
            self.spends.remove(&key);
            self.spends.extend(ledger.spend(&key).map(|row| (key, row)));
        }
    }

    fn read(&self, era: u64) -> Saved {
        Saved {
            era,
            recovering: self.recovering,
            members: self.members.values().copied().collect(),
            holders: self.holders.values().copied().collect(),
            spends: self.spends.values().copied().collect(),
        }
    }
}

struct Fleet {
    now: u64,
    dice: Dice,
    faults: Faults,
    account: Account,
    limits: Vec<u32>,
    proxies: Vec<Proxy>,
    ledger: Ledger,
    kept: Kept,
    away_until: u64,
    /// Ticks in which no ledger answered, and all.
    away: (u64, u64),
    parked: BTreeMap<usize, (u64, Question)>,
    mail: BTreeMap<(u64, u64), Message>,
    next: u64,
    spends: Vec<(u64, u32)>,
    /// Of a second account, which is used now and then.
    other_spends: Vec<(u64, u32)>,
    /// Limits in use, and when.
    used_limits: Vec<(u64, u32)>,
    /// From when to when so many units may be admitted once more.
    allowances: Vec<(u64, u64, u32)>,
    exhausted: u64,
    pending: u64,
    /// Refusals as exhausted while units were left.
    early: u64,
    cost: u32,
    quiet_until: Vec<u64>,
    /// Requests that come, in thousandths.
    due: u64,
}

impl Fleet {
    fn new(seed: u64, faults: Faults, window_s: u32, limit: u32, proxies: usize) -> Self {
        let mut fleet = Self {
            now: S,
            dice: Dice(seed),
            faults,
            account: account(window_s),
            limits: vec![limit],
            proxies: Vec::new(),
            ledger: Ledger::new(1, false, S),
            kept: Kept::default(),
            away_until: 0,
            away: (0, 0),
            parked: BTreeMap::new(),
            mail: BTreeMap::new(),
            next: 0,
            spends: Vec::new(),
            other_spends: Vec::new(),
            used_limits: Vec::new(),
            allowances: Vec::new(),
            exhausted: 0,
            pending: 0,
            early: 0,
            cost: 1,
            quiet_until: vec![0; proxies],
            due: 0,
        };
        for id in 0..proxies {
            let proxy = fleet.start(u64::try_from(id).unwrap() + 1, limit);
            fleet.proxies.push(proxy);
        }
        fleet
    }

    fn start(&mut self, id: u64, limit: u32) -> Proxy {
        let incarnation = self.dice.roll();
        Proxy {
            memory: Memory::default(),
            workers: (0..4).map(|_| Worker::new(self.dice.roll())).collect(),
            leader: Leader::new(id, incarnation),
            id,
            incarnation,
            clock_ns: self.dice.below(1_000_000 * S),
            limit,
            cut_off_until: 0,
            leaves: false,
            silent: None,
        }
    }

    fn send(&mut self, message: Message) {
        if self.dice.chance(self.faults.lost) {
            return;
        }
        let slow = self.dice.chance(self.faults.slow);
        // Sometimes so late that it must not count any more.
        let delay = if slow { self.dice.below(2_500) * if self.dice.chance(100) { 8 } else { 1 } } else { 0 };
        self.next += 1;
        let at = self.now + (1 + self.dice.below(3) + delay) * MS;
        self.mail.insert((at, self.next), message);
    }

    fn deliver(&mut self, until: u64) {
        while let Some(entry) = self.mail.first_entry()
            && entry.key().0 <= until
        {
            let ((at, _), message) = entry.remove_entry();
            self.now = self.now.max(at);
            match message {
                Message::Question(from, bytes) => {
                    if self.now < self.away_until {
                        continue;
                    }
                    let question = Question::decode(&bytes).unwrap();
                    if question.reports.is_empty() && !self.ledger.has_news(&question, self.now) {
                        self.parked.insert(from, (self.now, question));
                    } else {
                        self.answer(from, &question);
                    }
                    self.unpark();
                }
                Message::Answer(to, incarnation, number, bytes) => {
                    let proxy = &mut self.proxies[to];
                    if proxy.incarnation != incarnation {
                        continue;
                    }
                    let answer = Answer::decode(&bytes).unwrap();
                    assert_eq!(answer.number, number);
                    let now = self.now + proxy.clock_ns;
                    if self.dice.chance(self.faults.leader * 10) {
                        let writes = self.dice.below(4);
                        let mut dying = Dying { memory: &mut proxy.memory, writes };
                        proxy.leader.on_answer(&mut dying, &answer, now);
                        proxy.leader = Leader::new(proxy.id, proxy.incarnation);
                    } else {
                        proxy.leader.on_answer(&mut proxy.memory, &answer, now);
                    }
                }
            }
        }
        self.now = self.now.max(until);
    }

    fn answer(&mut self, to: usize, question: &Question) {
        self.parked.remove(&to);
        let exchanged = self.ledger.exchange(question, self.now);
        // What is said to have changed is all that is kept.
        self.kept.write(&mut self.ledger);
        let Ok(Exchange { answer, .. }) = exchanged else { return };
        let incarnation = question.member.incarnation;
        self.send(Message::Answer(to, incarnation, answer.number, answer.encode()));
    }

    fn unpark(&mut self) {
        let due: Vec<_> = self
            .parked
            .iter()
            .filter(|(_, (since, question))| {
                self.now >= since + self.ledger.hold_ns() || self.ledger.has_news(question, self.now)
            })
            .map(|(from, (_, question))| (*from, question.clone()))
            .collect();
        for (from, question) in due {
            self.answer(from, &question);
        }
    }

    fn request(&mut self, at: usize, worker: usize) {
        // It may hear nothing for a moment between two ticks.
        self.note_silence(at);
        let Fleet { proxies, dice, .. } = self;
        let proxy = &mut proxies[at];
        let now = self.now + proxy.clock_ns;
        let limit = proxy.limit;
        if self.faults.race > 0 && dice.chance(200) {
            // Seldom much, and then all at once.
            let other = Account { key: !KEY, ..self.account };
            for _ in 0..1 + dice.below(3) * dice.below(20) {
                let verdict =
                    proxy.workers[worker].spend(&mut proxy.memory, other, (limit, self.cost, false), now);
                self.used_limits.push((self.now, limit));
                if verdict.is_admitted() {
                    self.other_spends.push((self.now, self.cost));
                }
            }
        }
        let race = dice.chance(self.faults.race);
        self.used_limits.push((self.now, limit));
        let verdict = if race {
            let mut other = proxy.workers.remove((worker + 1) % 4);
            let place = if worker == 3 { 2 } else { worker };
            let left = 1 + u32::try_from(dice.below(2)).unwrap();
            let turn = (self.account, limit, now);
            let mut racing = Racing { memory: &mut proxy.memory, other: &mut other, turn, left, admitted: 0 };
            let verdict =
                proxy.workers[place].spend(&mut racing, self.account, (limit, self.cost, false), now);
            let admitted = racing.admitted;
            proxy.workers.insert((worker + 1) % 4, other);
            if admitted > 0 {
                self.spends.push((self.now, admitted));
            }
            verdict
        } else {
            proxy.workers[worker].spend(&mut proxy.memory, self.account, (limit, self.cost, false), now)
        };
        match verdict {
            Verdict::Admitted(_) => self.spends.push((self.now, self.cost)),
            Verdict::Pending(_) => self.pending += 1,
            Verdict::Refused(_, Why::Exhausted) => {
                self.exhausted += 1;
                self.early += u64::from(self.in_use() + self.cost <= limit);
            }
            Verdict::Refused(..) => {}
        }
    }

    /// Units in use over the fleet, exactly.
    fn in_use(&self) -> u32 {
        let from = self.now.saturating_sub(self.account.window_ns());
        self.spends.iter().rev().take_while(|(at, _)| *at > from).map(|(_, units)| units).sum()
    }

    /// A tick of all VMs.
    fn tick(&mut self) {
        for at in 0..self.proxies.len() {
            let Fleet { proxies, dice, faults, .. } = self;
            let proxy = &mut proxies[at];
            let now = self.now + proxy.clock_ns;
            for worker in &mut proxy.workers {
                worker.on_tick(&mut proxy.memory, now);
            }
            if dice.chance(faults.trap) {
                let place = usize::try_from(dice.below(4)).unwrap();
                proxy.workers[place] = Worker::new(dice.roll());
            }
            if dice.chance(faults.leader) {
                let mut dying = Dying { memory: &mut proxy.memory, writes: dice.below(6) };
                if let Some(question) = proxy.leader.on_tick(&mut dying, now)
                    && dice.chance(500)
                {
                    self.next += 1;
                    self.mail.insert((self.now + MS, self.next), Message::Question(at, question.encode()));
                }
                proxy.leader = Leader::new(proxy.id, proxy.incarnation);
            }
            let cut_off = self.now < proxy.cut_off_until;
            // While the leader goes through pages, workers serve.
            let left = if dice.chance(faults.race) { u32::try_from(dice.below(40)).unwrap() } else { 0 };
            let turn = (self.account, proxy.limit, now);
            let other = &mut proxy.workers[3];
            let mut racing = Racing { memory: &mut proxy.memory, other, turn, left, admitted: 0 };
            let question = proxy.leader.on_tick(&mut racing, now);
            if racing.admitted > 0 {
                self.spends.push((self.now, racing.admitted));
                self.used_limits.push((self.now, proxy.limit));
            }
            if let Some(question) = question
                && !cut_off
            {
                self.send(Message::Question(at, question.encode()));
            }
            self.note_silence(at);
        }
        self.away.1 += 1;
        if self.now >= self.away_until {
            self.unpark();
        } else {
            self.away.0 += 1;
        }
        self.ledger.on_time(self.now);
        self.kept.write(&mut self.ledger);
    }

    /// A proxy that hears nothing may spend its cap or share once more.
    fn note_silence(&mut self, at: usize) {
        let account = self.account;
        let proxy = &mut self.proxies[at];
        let now = self.now + proxy.clock_ns;
        let standing = standing::Standing::read(&mut proxy.memory).map(|(standing, _)| standing);
        let is_silent = standing.is_some_and(|standing| standing.joined && !standing.in_touch(now));
        let may_use = proxy.may_use(account).max(proxy.may_use(Account { key: !KEY, ..account }));
        match (is_silent, proxy.silent) {
            (true, None) => proxy.silent = Some((self.now - 200 * MS, may_use)),
            (true, Some((since, units))) => proxy.silent = Some((since, units.max(may_use))),
            (false, Some((since, units))) => {
                proxy.silent = None;
                self.allowances.push((since, self.now + S, units));
            }
            (false, None) => {}
        }
    }

    fn kill(&mut self, at: usize) {
        let account = self.account;
        let proxy = &mut self.proxies[at];
        let may_use = proxy.may_use(account).max(proxy.may_use(Account { key: !KEY, ..account }));
        let since = proxy.silent.map_or(self.now, |(since, _)| since);
        self.allowances.push((since, self.now, may_use.max(proxy.silent.map_or(0, |(_, units)| units))));
    }

    /// Lets faults happen.
    fn misfortune(&mut self) {
        let Faults { kill, restart, loss, away, cut_off, limit, pause, drain, .. } = self.faults;
        for at in 0..self.proxies.len() {
            if self.dice.chance(kill) {
                self.kill(at);
                let limit = *self.limits.last().unwrap();
                let id = self.proxies[at].id;
                self.proxies[at] = self.start(id, limit);
            }
            let id = self.proxies[at].id;
            if self.dice.chance(drain) && self.now >= self.away_until {
                self.proxies[at].leaves = self.ledger.drain(id);
            }
            // One that left is replaced by another one, or by itself; or it stays.
            if self.proxies[at].leaves && self.ledger.has_left(id) && self.dice.chance(50) {
                let limit = *self.limits.last().unwrap();
                let next = if self.dice.chance(500) { self.dice.roll() } else { id };
                if let Some((since, units)) = self.proxies[at].silent {
                    self.allowances.push((since, self.now, units));
                }
                self.proxies[at] = self.start(next, limit);
            }
            if self.dice.chance(cut_off) {
                self.proxies[at].cut_off_until = self.now + self.dice.below(90) * S;
            }
            if self.dice.chance(limit * 20) {
                // Rules reach proxies one by one.
                self.proxies[at].limit = *self.limits.last().unwrap();
            }
            if self.dice.chance(pause) {
                self.quiet_until[at] = self.now + self.dice.below(30) * S;
            }
        }
        if self.dice.chance(limit) {
            let next = [10, 50, 64, 200, 1_000][usize::try_from(self.dice.below(5)).unwrap()];
            self.limits.push(next);
        }
        if self.dice.chance(restart) {
            let saved = self.kept.read(self.ledger.era());
            self.ledger = Ledger::resume(&saved, false, self.now);
            self.parked.clear();
        }
        if self.dice.chance(loss) {
            // Spends of proxies that are gone are lost with it.
            let is_there = |row: &&SpendRow| {
                self.proxies.iter().any(|proxy| proxy.incarnation == row.member.incarnation)
            };
            let gone = self.kept.spends.values().filter(|row| !is_there(row));
            let gone: u32 = gone.map(|row| row.units).sum();
            self.allowances.push((self.now, self.now, gone));
            self.ledger = Ledger::recovering(self.dice.roll(), false, self.now);
            self.kept = Kept { recovering: true, ..Kept::default() };
            self.parked.clear();
        }
        if self.dice.chance(away) {
            self.away_until = self.now + self.dice.below(90) * S;
        }
    }

    /// Lets requests come: so many in 1,000 ticks, spread over proxies and workers by weights.
    fn run(&mut self, ticks: u64, tick_ns: u64, requests_per_1000_ticks: u64, weights: &[u64]) {
        let total: u64 = weights.iter().sum();
        for _ in 0..ticks {
            let end = self.now + tick_ns;
            self.due += requests_per_1000_ticks;
            let mut times = Vec::new();
            while self.due >= 1_000 {
                self.due -= 1_000;
                times.push(self.now + self.dice.below(tick_ns));
            }
            times.sort_unstable();
            for time in times {
                self.deliver(time);
                let mut draw = self.dice.below(total);
                let at = weights
                    .iter()
                    .position(|weight| {
                        let here = draw < *weight;
                        draw = draw.saturating_sub(*weight);
                        here
                    })
                    .unwrap();
                // Connections are not spread evenly over workers either.
                let worker = [0, 0, 0, 0, 1, 1, 2, 3][usize::try_from(self.dice.below(8)).unwrap()];
                if self.now >= self.quiet_until[at] {
                    self.request(at, worker);
                }
            }
            self.deliver(end);
            self.tick();
            self.misfortune();
        }
    }

    fn excess(&self) -> i64 {
        self.excess_of(&self.spends).max(self.excess_of(&self.other_spends))
    }

    fn excess_of(&self, spends: &[(u64, u32)]) -> i64 {
        let window = self.account.window_ns();
        let silent = self.proxies.iter().filter_map(|proxy| proxy.silent);
        let silent = silent.map(|(since, units)| (since, self.now, units));
        let allowances: Vec<_> = self.allowances.iter().copied().chain(silent).collect();
        worst_excess(spends, window, |at| {
            let end = self.used_limits.partition_point(|(when, _)| *when <= at);
            let begin = self.used_limits.partition_point(|(when, _)| when + window <= at);
            // A proxy goes by a limit from one request to the next.
            let before = begin.saturating_sub(50);
            let limit = self.used_limits[before..end].iter().map(|(_, limit)| *limit).max().unwrap_or(0);
            let lost = allowances.iter().filter(|(from, to, _)| *from <= at && at < to + window);
            u64::from(limit) + lost.map(|(.., units)| u64::from(*units)).sum::<u64>()
        })
    }
}

/// Five times as much is asked for as is allowed, unevenly. What is admitted of the limit, in 10,000ths, and the part of
/// the refusals as exhausted that came while units were unused somewhere.
fn steady(window_s: u32, limit: u32, weights: &[u64], seed: u64) -> (u64, u64) {
    let mut fleet = Fleet::new(seed, Faults::default(), window_s, limit, weights.len());
    let tick_ns = (u64::from(window_s) * S / 3_600).clamp(20 * MS, S);
    let ticks_per_window = u64::from(window_s) * S / tick_ns;
    fleet.run(20 * S / tick_ns.min(S), tick_ns, 0, weights);
    let rate = u64::from(limit) * 5 * 1_000 / ticks_per_window;
    // Not measured: the time to find the division.
    let windows = if window_s < 60 { 40 } else { 2 };
    fleet.run(ticks_per_window * if window_s < 60 { 10 } else { 1 }, tick_ns, rate, weights);
    let first: u64 = fleet.spends.iter().map(|(_, units)| u64::from(*units)).sum();
    if window_s >= 60 {
        assert!(first * 100 >= u64::from(limit) * 98, "{first} of {limit} in the first window");
    }
    let before = fleet.spends.len();
    let (refused, early) = (fleet.exhausted, fleet.early);
    fleet.run(ticks_per_window * windows, tick_ns, rate, weights);
    assert!(fleet.excess() <= 0, "{} too many", fleet.excess());
    let admitted: u64 = fleet.spends[before..].iter().map(|(_, units)| u64::from(*units)).sum();
    let early = (fleet.early - early) * 10_000 / (fleet.exhausted - refused).max(1);
    (admitted * 10_000 / (u64::from(limit) * windows), early)
}

#[test]
fn under_overload_what_is_allowed_is_admitted() {
    for (name, window_s, limit, least) in [
        ("100 an hour", 3_600, 100, 9_800),
        ("1,000 an hour", 3_600, 1_000, 9_800),
        ("10,000 an hour", 3_600, 10_000, 9_800),
        ("50 a second", 1, 50, 9_500),
    ] {
        for weights in [&[1, 1, 1][..], &[80, 15, 5], &[100, 0, 0]] {
            let (admitted, early) = steady(window_s, limit, weights, 7);
            println!(
                "{name}, {weights:?}: {}.{:02} % admitted; {}.{:02} % of refusals as exhausted came while units were unused",
                admitted / 100,
                admitted % 100,
                early / 100,
                early % 100
            );
            assert!(admitted >= least, "{name} {weights:?}: {admitted}");
        }
    }
}

/// Clients that try again after a second, as `Retry-After` says, get each unit of a small limit, wherever the units are.
#[test]
fn a_client_that_heeds_retry_after_gets_the_last_units_of_a_small_limit() {
    for seed in 0..500 {
        for limit in [1, 2, 5, 8] {
            let mut fleet = Fleet::new(seed, Faults::default(), 3_600, limit, 3);
            fleet.run(50, 10 * MS, 0, &[1; 3]);
            for turn in 0..limit {
                let at = usize::try_from(turn % 3).unwrap();
                let pause = fleet.dice.below(4);
                fleet.run(pause, 10 * MS, 0, &[1; 3]);
                let mut tries = 0;
                loop {
                    let worker = usize::try_from(fleet.dice.below(4)).unwrap();
                    fleet.request(at, worker);
                    tries += 1;
                    if fleet.in_use() > turn {
                        break;
                    }
                    assert!(tries < 3, "seed {seed}, limit {limit}, turn {turn}: not in three tries");
                    fleet.run(100, 10 * MS, 0, &[1; 3]);
                }
            }
            assert!(fleet.excess() <= 0);
        }
    }
}

/// Thirty proxies are replaced one after the other within ten minutes, under load, every third one without a word.
#[test]
fn proxies_replaced_under_load_leave_the_limits_whole() {
    for (window_s, limit) in [(600, 600), (3_600, 1_000)] {
        let mut fleet = Fleet::new(11, Faults::default(), window_s, limit, 6);
        fleet.run(50, 100 * MS, 0, &[1; 6]);
        let begun = fleet.now;
        let rate = u64::from(limit) * 5 * 1_000 / (u64::from(window_s) * 10).min(600);
        let mut killed = 0;
        for turn in 0..30 {
            let at = turn % 6;
            fleet.run(100, 100 * MS, rate, &[3, 1, 1, 2, 1, 1]);
            if turn % 3 == 2 {
                fleet.kill(at);
                killed += 1;
            } else {
                let id = fleet.proxies[at].id;
                assert!(fleet.ledger.drain(id));
                let begun = fleet.now;
                while !fleet.ledger.has_left(id) {
                    fleet.run(1, 100 * MS, rate, &[3, 1, 1, 2, 1, 1]);
                    assert!(fleet.now < begun + 5 * S, "drained in time");
                }
            }
            let limit = fleet.proxies[at].limit;
            let id = fleet.dice.roll();
            fleet.proxies[at] = fleet.start(id, limit);
            fleet.run(100, 100 * MS, rate, &[3, 1, 1, 2, 1, 1]);
        }
        assert!(fleet.excess() <= 0, "{} too many", fleet.excess());
        let window = fleet.account.window_ns();
        let over = worst_excess(&fleet.spends, window, |_| limit.into());
        // Every window that is over, from when the load began.
        let mut least = u32::MAX;
        let mut end = begun + window.min(600 * S);
        while end <= fleet.now {
            let begin = end.saturating_sub(window);
            let within = fleet.spends.iter().filter(|(at, _)| (begin..end).contains(at));
            least = least.min(within.map(|(_, units)| *units).sum());
            end += (window / 4).max(S);
        }
        println!(
            "{limit} in {window_s} s: at least {least} admitted in a window, at most {} beyond the limit after {killed} kills",
            over.max(0)
        );
        assert!(u64::from(least) * 100 >= u64::from(limit) * 98, "{least} of {limit} in {window_s} s");
    }
}

const HARSH: Faults = Faults {
    lost: 100,
    slow: 200,
    trap: 5,
    leader: 10,
    kill: 1,
    restart: 2,
    loss: 0,
    away: 2,
    cut_off: 2,
    limit: 0,
    race: 200,
    pause: 3,
    drain: 0,
};
/// Without what the contract lets admit units once more, as long as no answer is missing for three seconds.
const ORDERLY: Faults = Faults { lost: 20, slow: 50, kill: 0, away: 0, cut_off: 0, ..HARSH };

fn survives(seed: u64, faults: Faults, window_s: u32, limit: u32, cost: u32) -> Result<(), TestCaseError> {
    let mut fleet = Fleet::new(seed, faults, window_s, limit, 3);
    fleet.cost = cost;
    let rate = u64::from(limit) * 3_000 / 10 / u64::from(window_s);
    for _ in 0..6 {
        let weights: [u64; 3] =
            std::array::from_fn(|_| [0, 1, 1, 20][usize::try_from(fleet.dice.below(4)).unwrap()]);
        let weights = if weights == [0; 3] { [1, 0, 0] } else { weights };
        fleet.run(400, 100 * MS, rate.max(1_000), &weights);
    }
    prop_assert!(fleet.excess() <= 0, "{} too many with {faults:?}", fleet.excess());
    // Refusing everything is no way to keep a limit.
    let admitted: u64 = fleet.spends.iter().map(|(_, units)| u64::from(*units)).sum();
    let enough = admitted >= u64::from(limit) / 2 || u64::from(limit) < 4 * u64::from(cost);
    let mostly_away = fleet.away.0 * 2 > fleet.away.1;
    prop_assert!(enough || mostly_away, "{admitted}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is lost, late or restarted: above the limit only by what the contract allows.
    #[test]
    fn above_the_limit_only_by_what_lost_proxies_had(
        seed: u64,
        window_s in 1_u32..6,
        limit in 1_u32..120,
        cost in 1_u32..4,
    ) {
        survives(seed, HARSH, window_s, limit, cost)?;
    }

    /// In touch, restarts in order included: never above the limit.
    #[test]
    fn never_above_the_limit_in_touch(seed: u64, window_s in 1_u32..6, limit in 1_u32..120, cost in 1_u32..4) {
        survives(seed, ORDERLY, window_s, limit, cost)?;
        survives(seed, Faults { drain: 20, ..ORDERLY }, window_s, limit, cost)?;
        survives(seed, Faults { drain: 20, ..Faults::default() }, window_s, limit, cost)?;
    }

    /// Another ledger that knows nothing takes over.
    #[test]
    fn never_above_the_limit_when_the_ledger_is_lost(seed: u64, window_s in 1_u32..6, limit in 1_u32..120) {
        survives(seed, Faults { loss: 3, ..HARSH }, window_s, limit, 1)?;
        survives(seed, Faults { loss: 5, drain: 5, ..ORDERLY }, window_s, limit, 1)?;
    }

    /// Limits change.
    #[test]
    fn never_above_the_largest_limit_in_force(seed: u64, window_s in 1_u32..6) {
        survives(seed, Faults { limit: 5, ..HARSH }, window_s, 64, 1)?;
        survives(seed, Faults { limit: 5, ..ORDERLY }, window_s, 64, 1)?;
    }

    /// Proxies hear nothing for long, and nothing else goes wrong.
    #[test]
    fn above_the_limit_only_by_the_share_of_silent_proxies(
        seed: u64,
        window_s in 1_u32..3,
        limit in 10_u32..120,
    ) {
        let faults = Faults { cut_off: 6, pause: 10, race: 0, ..Faults::default() };
        survives(seed, faults, window_s, limit, 1)?;
    }

    /// A limit of which VMs hold many units.
    #[test]
    fn never_above_a_large_limit(seed: u64) {
        survives(seed, HARSH, 60, 8_192, 100)?;
        survives(seed, ORDERLY, 60, 8_192, 100)?;
    }
}
