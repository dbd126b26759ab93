//! Stops at random moments of random load. What the clients saw is compared with what the server noted and
//! with what its report counts, request by request.
//!
//! Each stop has a seed. The seed decides the settings of the server, the clients, and when signals
//! are sent. What the machine decides differs from run to run.
//!
//! ```sh
//! CHAOS_STOPS=1000 cargo test --release --test blackbox -- --ignored chaos   # 500 with each server
//! CHAOS_SEED=17 cargo test --release --test blackbox -- --ignored chaos      # this stop alone
//! CHAOS_SEED=17 CHAOS_STOPS=100 CHAOS_AT_ONCE=1 ...                          # 50 from this seed on
//! ```
//!
//! These rules hold in every stop:
//!
//! - If the report says that nothing was cut, no response is truncated, unless its client left. The client of every
//!   admitted and of every refused request has received a whole response. A WebSocket gets
//!   its close frame.
//! - A request that was sent before draining began is answered, unless connections were lost in the queue
//!   or the drain was cut.
//! - The numbers of the report are those of the server's notes. If something was cut, it is at least what
//!   the clients miss.
//! - No request is admitted while draining, and none is answered after the end.
//! - The exit code is the one of the outcome, and the outcome is clean only if nothing was given up.
//! - The process ends in time: the delay, the drain, the time for closing, and the time for which it was
//!   stopped by SIGSTOP.

mod clients;
mod notes;
pub(crate) mod record;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    env,
    fmt::Write as _,
    net::{SocketAddr, TcpListener},
    ops::RangeInclusive,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use tower_graceful::Phase;

use self::{
    clients::{Client, Role, Seen, Shared, Sight, relay},
    notes::{End, Note, Tally},
};
use crate::{
    Test,
    many::Chance,
    process::{Exit, Server},
    server::Form,
};

pub(crate) const ALONE: &[Test] = &[(
    "chaos::clients_and_report_agree_on_every_request",
    Form::CUTTING,
    stops,
)];

const MS: fn(u64) -> Duration = Duration::from_millis;
/// What a stop may take longer: closing and cutting, on a machine that is busy with other stops.
const CLOSING: Duration = Duration::from_secs(3);

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {text}")),
    )
}

fn stops(form: Form) {
    let first = number("CHAOS_SEED");
    // Half of them with each form.
    let count =
        number("CHAOS_STOPS").map_or(if first.is_some() { 1 } else { 12 }, |all| all.div_ceil(2));
    let at_once = number("CHAOS_AT_ONCE").unwrap_or(4).min(count);
    let first = first.unwrap_or(1);
    let next = AtomicU64::new(first);
    let sums = Mutex::new(Sums::default());
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    match stop(form, seed) {
                        Ok(one) => sums.lock().unwrap().add(&one),
                        Err(found) => {
                            eprintln!("{found}");
                            failed.lock().unwrap().push(seed);
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    let sums = sums.into_inner().unwrap();
    println!("chaos, {form:?}, seeds from {first}: {sums:?}");
    assert!(
        failed.is_empty(),
        "differences in the stops with these seeds: {failed:?}"
    );
    if count >= 12 {
        sums.assert_many_kinds();
    }
}

/// What happened in all stops.
#[derive(Debug, Default)]
struct Sums {
    stops: usize,
    clean: usize,
    requests: usize,
    in_flight: usize,
    whole: usize,
    refused: usize,
    truncated: usize,
    unanswered: usize,
    abandoned: usize,
    cut: usize,
    dropped: usize,
    queued: usize,
    /// Stops that cut connections or servers, and no request.
    cut_without_requests: usize,
}

impl Sums {
    /// A client that no longer works must not make the comparison pass.
    fn assert_many_kinds(&self) {
        assert!(self.clean > 0 && self.refused > 0, "{self:?}");
        assert!(self.whole > 20 * self.stops, "{self:?}");
        // Rarer in a stop.
        if self.stops >= 100 {
            let rare = [self.cut, self.dropped, self.abandoned];
            assert!(rare.iter().all(|count| *count > 0), "{self:?}");
        }
    }

    fn sees(&mut self, sight: &Sight) {
        match sight {
            Sight::Whole => self.whole += 1,
            Sight::Refused(_) => self.refused += 1,
            Sight::Truncated(_) => self.truncated += 1,
            Sight::Nothing(_) => self.unanswered += 1,
            Sight::Abandoned => self.abandoned += 1,
            Sight::Unsent | Sight::Wrong(_) => {}
        }
    }

    fn add(&mut self, one: &Self) {
        self.stops += one.stops;
        self.clean += one.clean;
        self.requests += one.requests;
        self.in_flight += one.in_flight;
        self.whole += one.whole;
        self.refused += one.refused;
        self.truncated += one.truncated;
        self.unanswered += one.unanswered;
        self.abandoned += one.abandoned;
        self.cut += one.cut;
        self.dropped += one.dropped;
        self.queued += one.queued;
        self.cut_without_requests += one.cut_without_requests;
    }
}

/// Everything that the seed decides about a stop, except what each client does.
#[derive(Debug)]
struct Plan {
    knobs: Vec<String>,
    delay: Duration,
    drain: Duration,
    load: Duration,
    roles: Vec<Role>,
    relayed: Vec<bool>,
    resets: bool,
    busy: bool,
    /// SIGSTOP this long after SIGTERM, or before it, and for how long.
    pauses: Vec<(i64, Duration)>,
    further_terminate: Option<Duration>,
    interrupts: Vec<Duration>,
}

impl Plan {
    fn new(chance: &mut Chance) -> Self {
        let delay = MS(chance.within(0..400));
        let drain = MS(chance.within(150..1500));
        let mut knobs = vec![
            "chaos=true".to_owned(),
            // Otherwise a connection that arrives in the last microseconds before the close is reset.
            "shared=false".to_owned(),
            format!("delay={}", delay.as_millis()),
            format!("drain={}", drain.as_millis()),
            format!("threads={}", [0, 1, 2, 4][index(chance, 4)]),
        ];
        let mut sometimes = |one_of: u64, knob: &str, chance: &mut Chance| {
            let chosen = chance.within(0..one_of) == 0;
            if chosen {
                knobs.push(knob.to_owned());
            }
            chosen
        };
        sometimes(3, "keep_listening=false", chance);
        sometimes(3, "names=true", chance);
        sometimes(4, "watchdog=true", chance);
        if delay > MS(100) {
            sometimes(4, "spread=100", chance);
        }
        sometimes(4, "drain_spread=50", chance);
        sometimes(8, "limit=10", chance);
        if delay > MS(100) {
            sometimes(8, "quiet=50:40", chance);
        }
        sometimes(8, "half_close=true", chance);
        let few_files = sometimes(7, "files=40", chance);
        let mut roles = Vec::new();
        let add = |roles: &mut Vec<Role>, role, count| (0..count).for_each(|_| roles.push(role));
        add(&mut roles, Role::KeepAlive, chance.within(1..5));
        add(&mut roles, Role::Each, chance.within(1..4));
        add(&mut roles, Role::Http2, chance.within(0..3));
        for (role, one_of, most) in [
            (Role::Pipelines, 2, 3),
            (Role::Uploads, 2, 3),
            (Role::Slow, 2, 3),
            (Role::Leaves, 2, 3),
            (Role::HalfHead, 3, 3),
            (Role::Silent, 3, 4),
            (Role::VanishesIdle, 3, 3),
            (Role::VanishesBusy, 10, 2),
            (Role::Events, 3, 3),
            (Role::Socket, 2, 4),
            (Role::Http2Slow, 3, 2),
            (Role::Http2Cancels, 3, 2),
        ] {
            if chance.within(0..one_of) == 0 {
                add(&mut roles, role, chance.within(1..most));
            }
        }
        if few_files {
            add(&mut roles, Role::Silent, chance.within(0..30));
            add(&mut roles, Role::Each, chance.within(5..20));
        }
        let relays = chance.within(0..3) == 0;
        let relayed = roles
            .iter()
            .map(|_| relays && chance.within(0..2) == 0)
            .collect();
        let pauses = match chance.within(0..6) {
            0 => vec![signed(chance, -100..500)],
            1 => vec![signed(chance, -50..100), signed(chance, 300..1500)],
            _ => Vec::new(),
        };
        let pauses = pauses
            .into_iter()
            .map(|at| (at, MS(chance.within(5..700))))
            .collect();
        let interrupts = match chance.within(0..12) {
            0 => 1,
            1 => 3,
            _ => 0,
        };
        Self {
            knobs,
            delay,
            drain,
            load: MS(chance.within(20..500)),
            roles,
            relayed,
            resets: chance.within(0..4) > 0,
            busy: chance.within(0..4) == 0,
            pauses,
            further_terminate: (chance.within(0..8) == 0).then(|| MS(chance.within(0..600))),
            interrupts: (0..interrupts)
                .map(|which| MS(which * 150 + chance.within(110..400)))
                .collect(),
        }
    }
}

fn index(chance: &mut Chance, of: u64) -> usize {
    usize::try_from(chance.within(0..of)).unwrap()
}

fn signed(chance: &mut Chance, range: std::ops::Range<i64>) -> i64 {
    let length = u64::try_from(range.end - range.start).unwrap();
    range.start + i64::try_from(chance.within(0..length)).unwrap()
}

/// What a stop left behind.
struct Stop {
    seed: u64,
    form: Form,
    plan: Plan,
    seen: Vec<Seen>,
    notes: HashMap<u64, Note>,
    tally: Tally,
    cut_paths: Vec<String>,
    /// The undelivered bytes by peer.
    cut_connections: HashMap<SocketAddr, u64>,
    signalled: Instant,
    /// For how long the process was stopped by SIGSTOP.
    paused: Duration,
    exit: Exit,
}

fn stop(form: Form, seed: u64) -> Result<Sums, String> {
    let mut chance = Chance::new(seed);
    let plan = Plan::new(&mut chance);
    let knobs: Vec<_> = plan.knobs.iter().map(String::as_str).collect();
    let mut server = Server::start(form, &knobs);
    let pid = Pid::from_raw(server.pid().try_into().unwrap());
    let address = server.address;
    let shared = Shared::new();
    let shared = &shared;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relayed = listener.local_addr().unwrap();
    let (signalled, paused, exit) = thread::scope(|scope| {
        scope.spawn(move || relay(&listener, address, shared, seed));
        if plan.busy {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !shared.over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
        }
        for (number, (&role, &by_relay)) in plan.roles.iter().zip(&plan.relayed).enumerate() {
            let number = number as u64 + 1;
            let mut client = Client {
                role,
                address: if by_relay { relayed } else { address },
                relayed: by_relay,
                resets: plan.resets,
                next: number * 1_000_000,
                chance: Chance::new(seed * 1000 + number),
                shared,
            };
            scope.spawn(move || client.run());
        }
        thread::sleep(plan.load);
        // What follows, in milliseconds after SIGTERM.
        let mut events: Vec<(i64, Signal)> = vec![(0, Signal::SIGTERM)];
        let millis = |time: &Duration| i64::try_from(time.as_millis()).unwrap();
        for (at, length) in &plan.pauses {
            events.push((*at, Signal::SIGSTOP));
            events.push((at + millis(length), Signal::SIGCONT));
        }
        events.extend(
            plan.further_terminate
                .iter()
                .map(|at| (millis(at), Signal::SIGTERM)),
        );
        events.extend(
            plan.interrupts
                .iter()
                .map(|at| (millis(at), Signal::SIGINT)),
        );
        events.sort_by_key(|(at, _)| *at);
        let begun = Instant::now();
        let earliest = events[0].0;
        let mut signalled = None;
        let (mut paused, mut stopped_at) = (Duration::ZERO, None::<Instant>);
        for (at, which) in events {
            let due = begun + MS((at - earliest).unsigned_abs());
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if which == Signal::SIGTERM {
                signalled.get_or_insert_with(Instant::now);
                shared.stopping.store(true, Ordering::Relaxed);
                server.mark_triggered();
            }
            // The process may have ended. It is not waited for yet, so that its number is not used again.
            let _ = signal::kill(pid, which);
            match which {
                Signal::SIGSTOP => stopped_at = stopped_at.or(Some(Instant::now())),
                Signal::SIGCONT => {
                    paused += stopped_at.take().map_or(Duration::ZERO, |at| at.elapsed());
                }
                _ => {}
            }
        }
        let _ = signal::kill(pid, Signal::SIGCONT);
        let exit = server.exit();
        shared.over.store(true, Ordering::Relaxed);
        (signalled.expect("SIGTERM is sent"), paused, exit)
    });
    let mut found = Stop {
        seed,
        form,
        plan,
        seen: std::mem::take(&mut *shared.seen.lock().unwrap()),
        notes: HashMap::new(),
        tally: Tally::default(),
        cut_paths: Vec::new(),
        cut_connections: HashMap::new(),
        signalled,
        paused,
        exit,
    };
    found.parse();
    found.judge()
}

/// A number of which the notes know the least and the most.
#[derive(Debug, Default)]
struct Between {
    least: usize,
    most: usize,
}

impl Between {
    fn count(&mut self, certain: bool, possible: bool) {
        self.least += usize::from(certain);
        self.most += usize::from(possible);
    }

    fn range(&self) -> RangeInclusive<usize> {
        self.least..=self.most
    }
}

impl Stop {
    fn parse(&mut self) {
        let mut tallied = false;
        for line in &self.exit.output {
            let Some((what, rest)) = line.split_once(' ') else {
                continue;
            };
            match what {
                "note" => {
                    let (id, note) = rest.split_once(' ').unwrap();
                    self.notes.insert(id.parse().unwrap(), Note::decode(note));
                }
                "tally" => {
                    self.tally = Tally::decode(rest);
                    tallied = true;
                }
                "cut-request" => self.cut_paths.push(rest.to_owned()),
                "cut-connection" => {
                    let (peer, bytes) = rest.split_once(' ').unwrap();
                    self.cut_connections
                        .insert(peer.parse().unwrap(), bytes.parse().unwrap());
                }
                _ => {}
            }
        }
        assert!(tallied, "no report, seed {}: {:?}", self.seed, self.exit);
    }

    fn judge(&self) -> Result<Sums, String> {
        let mut wrong = Vec::new();
        self.ends(&mut wrong);
        self.numbers(&mut wrong);
        let sums = self.clients(&mut wrong);
        if wrong.is_empty() {
            return Ok(sums);
        }
        let mut text = format!(
            "\nchaos, {:?}, CHAOS_SEED={}: {} differences\n{:?}\n{:?}\n{:?}, paused {:?}\n{}\n",
            self.form,
            self.seed,
            wrong.len(),
            self.plan,
            self.tally,
            self.exit.status,
            self.paused,
            self.exit.report.replace(" |", "\n"),
        );
        let shown: Vec<_> = self.exit.log.lines().rev().take(25).collect();
        for line in shown.iter().rev() {
            let _ = writeln!(text, "  {line}");
        }
        for line in wrong.iter().take(20) {
            let _ = writeln!(text, "- {line}");
        }
        Err(text)
    }

    /// The exit code, the outcome, and the time.
    fn ends(&self, wrong: &mut Vec<String>) {
        let tally = &self.tally;
        if self.exit.status.code() != i32::try_from(tally.exit_code).ok() {
            wrong.push(format!("the exit code is {:?}", self.exit.status));
        }
        let interrupted = !self.plan.interrupts.is_empty();
        let expected = match tally.given_up() {
            0 => tally.exit_code == 0,
            _ => tally.exit_code == 1,
        };
        let abandoned = interrupted && tally.exit_code == 3;
        if !expected && !abandoned {
            wrong.push(format!(
                "exit code {} for {} given up",
                tally.exit_code,
                tally.given_up()
            ));
        }
        if tally.exit_code == 0 && tally.cut > 0 {
            wrong.push("clean, although requests were cut".to_owned());
        }
        let most = self.plan.delay + self.plan.drain + self.paused + CLOSING;
        let took = self.exit.took();
        if took > most {
            wrong.push(format!(
                "the stop took {took:?}, and at most {most:?} was planned"
            ));
        }
        // h2 has an assertion for its own tests, in debug builds alone, that fails when a connection is cut
        // while streams are open.
        let mut panics = self
            .exit
            .log
            .lines()
            .filter(|line| line.contains("panicked at"));
        if panics.any(|line| !line.contains("/h2-")) {
            wrong.push("the server panicked".to_owned());
        }
    }

    /// The server's notes beside the numbers of its report.
    fn numbers(&self, wrong: &mut Vec<String>) {
        let [mut in_flight, mut admitted, mut refused] = [(); 3].map(|()| Between::default());
        let [mut counted, mut dropped, mut cut] = [(); 3].map(|()| Between::default());
        for (id, note) in &self.notes {
            let [called, ended] = [note.called, note.ended];
            let late = called[0] == Phase::Stopped;
            if late && self.tally.exit_code == 0 {
                wrong.push(format!("request {id} came after the end: {note:?}"));
            }
            if !note.admitted {
                let is_refused = matches!(note.status, 429 | 503);
                refused.count(
                    is_refused && called[0] > Phase::Serving && called[1] < Phase::Stopped,
                    // The client may have left before the refusal was answered.
                    (is_refused || note.status == 0) && called[1] > Phase::Serving,
                );
                continue;
            }
            if called[0] >= Phase::Draining {
                wrong.push(format!(
                    "request {id} was admitted while draining: {note:?}"
                ));
            }
            // Whether it was in flight at the trigger or later.
            let open = note.end == End::Open;
            let (certain, possible) = (
                open || ended[0] > Phase::Serving,
                open || ended[1] > Phase::Serving,
            );
            counted.count(certain, possible);
            in_flight.count(
                certain && called[1] == Phase::Serving,
                possible && called[0] == Phase::Serving,
            );
            admitted.count(called[0] > Phase::Serving, called[1] > Phase::Serving);
            let failed = matches!(note.end, End::Failed | End::Unanswered);
            dropped.count(
                failed && certain && ended[1] < Phase::Closing,
                failed && possible && ended[0] < Phase::Closing,
            );
            // In flight when the phase changes to Closing. Without a cut there are none.
            cut.count(
                open || ended[0] >= Phase::Closing,
                open || ended[1] >= Phase::Closing,
            );
        }
        let tally = &self.tally;
        for (what, number, range) in [
            ("in flight", tally.in_flight, in_flight.range()),
            ("admitted", tally.admitted, admitted.range()),
            (
                "in flight and admitted",
                tally.in_flight + tally.admitted,
                counted.range(),
            ),
            ("refused", tally.refused, refused.range()),
            ("dropped", tally.dropped, dropped.range()),
            ("cut in flight", tally.requests, cut.range()),
        ] {
            if !range.contains(&number) {
                wrong.push(format!(
                    "{what}: the report says {number}, the notes {range:?}"
                ));
            }
        }
        let sum = tally.finished + tally.cut + tally.dropped;
        if sum != tally.in_flight + tally.admitted {
            wrong.push(format!("finished, cut and dropped are {sum}"));
        }
        // Besides the requests in flight, responses that were not delivered.
        let most = tally.requests + tally.connections;
        if !(tally.requests..=most).contains(&tally.cut) {
            wrong.push(format!(
                "cut: {}, and not between {} and {most}",
                tally.cut, tally.requests
            ));
        }
        let left = self
            .seen
            .iter()
            .filter(|seen| seen.sight == Sight::Abandoned);
        if tally.half_closed > left.count() {
            wrong.push("more half-closed requests than clients that left".to_owned());
        }
        // A request may end between the count and the list of names.
        if self.cut_paths.len() > tally.requests {
            wrong.push(format!("{} cut requests have a name", self.cut_paths.len()));
        }
    }

    /// Draining does not begin before.
    fn draining(&self) -> Instant {
        let mut knobs = self.plan.knobs.iter();
        let early = knobs.any(|knob| knob.starts_with("quiet"));
        if early || !self.plan.interrupts.is_empty() {
            self.signalled
        } else {
            self.signalled + self.plan.delay
        }
    }

    /// What the report counts.
    fn sums(&self) -> Sums {
        let tally = &self.tally;
        Sums {
            stops: 1,
            clean: usize::from(tally.exit_code == 0),
            requests: self.seen.len(),
            in_flight: tally.in_flight + tally.admitted,
            cut: tally.cut,
            dropped: tally.dropped,
            queued: tally.queued,
            cut_without_requests: usize::from(
                tally.cut + tally.queued == 0 && tally.connections + tally.servers > 0,
            ),
            ..Sums::default()
        }
    }

    /// What client and server say of a request.
    fn about(&self, seen: &Seen) -> String {
        let Seen {
            id, kind, sight, ..
        } = seen;
        let sent = match seen.sent {
            None => "not sent completely".to_owned(),
            Some(at) if at < self.signalled => {
                format!("sent {:?} before SIGTERM", self.signalled - at)
            }
            Some(at) => format!("sent {:?} after SIGTERM", at - self.signalled),
        };
        let by = seen
            .address
            .map_or("a relay".to_owned(), |address| address.to_string());
        let note = match self.notes.get(id) {
            Some(note) => format!("{note:?}"),
            None => "the server does not know it".to_owned(),
        };
        format!("{id} ({kind}) of {by}, {sent}: {sight:?}; {note}")
    }

    /// What the clients saw beside the server's notes and the report.
    fn clients(&self, wrong: &mut Vec<String>) -> Sums {
        let tally = &self.tally;
        let nothing_lost =
            tally.cut == 0 && tally.requests == 0 && tally.queued == 0 && tally.exit_code != 3;
        let draining = self.draining();
        let mut sums = self.sums();
        let mut known = HashSet::new();
        // What clients miss of admitted requests: those in flight at the cut, and the others by connection.
        let mut missed = 0;
        let mut missed_after: BTreeMap<Option<SocketAddr>, Vec<&Seen>> = BTreeMap::new();
        let mut may_be_missed = 0;
        for seen in &self.seen {
            known.insert(seen.id);
            let note = self.notes.get(&seen.id);
            sums.sees(&seen.sight);
            if let Sight::Wrong(why) = &seen.sight {
                wrong.push(format!("a wrong response, {why}: {}", self.about(seen)));
            }
            let whole = matches!(seen.sight, Sight::Whole | Sight::Refused(_));
            let reads = seen.sight != Sight::Abandoned;
            if whole {
                let status = note.map_or(0, |note| note.status);
                let agrees = match seen.sight {
                    Sight::Refused(status_seen) => status == status_seen,
                    _ => status == 200 || status == 101,
                };
                // A request that is called after a cut may still be refused, on a connection that is gone.
                if note.is_some_and(|note| note.called[0] == Phase::Stopped) {
                    wrong.push(format!("answered after the end: {}", self.about(seen)));
                }
                if !agrees {
                    wrong.push(format!(
                        "the server did not answer that: {}",
                        self.about(seen)
                    ));
                }
                continue;
            }
            let is_admitted = note.is_some_and(|note| note.admitted);
            if is_admitted && !reads {
                may_be_missed += 1;
            }
            if !reads {
                continue;
            }
            if let Some(note) = note {
                let in_flight_at_cut = note.end == End::Open || note.ended[1] >= Phase::Closing;
                // A refusal may be lost with its connection at the cut.
                if nothing_lost && (is_admitted || tally.exit_code == 0) {
                    wrong.push(format!(
                        "not whole, and nothing was cut: {}",
                        self.about(seen)
                    ));
                } else if is_admitted && in_flight_at_cut {
                    missed += 1;
                } else {
                    missed_after.entry(seen.address).or_default().push(seen);
                }
            } else if matches!(seen.sight, Sight::Truncated(_)) {
                wrong.push(format!("a response without a note: {}", self.about(seen)));
            }
            let lost_early =
                seen.address.is_some() && seen.sent.is_some_and(|sent| sent < draining);
            if lost_early && nothing_lost && !matches!(seen.sight, Sight::Unsent) && note.is_none()
            {
                wrong.push(format!(
                    "sent {:?} before draining, and not answered: {}",
                    draining - seen.sent.unwrap_or(draining),
                    self.about(seen)
                ));
            }
        }
        if let Some((id, note)) = self.notes.iter().find(|(id, _)| !known.contains(id)) {
            wrong.push(format!("no client knows request {id}: {note:?}"));
        }
        // A connection whose response is not delivered counts once, whatever is left on it.
        let behind: usize = missed_after
            .iter()
            .map(|(address, seen)| if address.is_some() { 1 } else { seen.len() })
            .sum();
        let least = missed;
        let most = tally.requests.max(missed + behind + may_be_missed) + tally.connections;
        if !nothing_lost && !(least..=most).contains(&tally.cut) {
            wrong.push(format!(
                "cut: {}, clients miss {least} to {most}",
                tally.cut
            ));
        }
        for (address, seen) in &missed_after {
            let is_cut = |address| self.cut_connections.contains_key(address);
            if address.as_ref().is_some_and(|it| !is_cut(it)) && tally.queued == 0 {
                wrong.extend(seen.iter().map(|seen| {
                    let note = self.notes.get(&seen.id);
                    format!(
                        "not whole, and its connection was not cut, admitted: {:?}, called in {:?}: {}",
                        note.map(|note| note.admitted),
                        note.map(|note| note.called),
                        self.about(seen)
                    )
                }));
            }
        }
        sums
    }
}
