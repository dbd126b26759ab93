//! The time a request adds, by one thread and by two on one layer: rounds of all peers in turn, so
//! that whatever else the machine does is shared among them.

use std::{
    fmt::Write as _,
    hint::{self, black_box},
    sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use super::{
    figures::{Figures, pairs},
    peers::{self, Boxed, Handler, Peer, request_behind_pointers, request_of_a_clone},
    plot::Plot,
    rows::{Budget, Rows},
};

const ROUNDS: usize = 51;
const TURN: Duration = Duration::from_millis(10);
const THREADS: [usize; 2] = [1, 2];

/// Nanoseconds that one takes, in each of so many threads at a time.
fn time(threads: usize, once: impl Fn(usize) + Sync) -> f64 {
    /// Between looks at the clock.
    const TIMES: u32 = 200;

    let here = AtomicUsize::new(0);
    let measure = |thread| {
        // Not asleep: who is woken is often put where the waker runs, and they would share a core.
        here.fetch_add(1, Ordering::Relaxed);
        while here.load(Ordering::Relaxed) < threads {
            hint::spin_loop();
        }
        let start = Instant::now();
        let mut done = 0_u32;
        loop {
            (0..TIMES).for_each(|_| once(thread));
            done += TIMES;
            let elapsed = start.elapsed();
            if elapsed >= TURN {
                return elapsed.as_secs_f64() * 1e9 / f64::from(done);
            }
        }
    };
    let measure = &measure;
    let total: f64 = thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || measure(thread)))
            .collect();
        all.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    #[expect(clippy::cast_precision_loss)] // of one or two
    let threads = threads as f64;
    total / threads
}

/// A peer, and the times of its rounds by one thread and by two.
struct Timed {
    name: &'static str,
    time: Box<dyn Fn(usize) -> f64>,
    times: [Vec<f64>; 2],
}

fn timed<P: Peer>(name: &'static str, peer: P, request: fn(&P)) -> Timed {
    Timed {
        name,
        time: Box::new(move |threads| time(threads, |_| request(&peer))),
        times: [const { Vec::new() }; 2],
    }
}

const NONE: usize = 0;
const PEER: usize = 1;
const OURS: usize = 2;

/// All peers around a handler, each driven in the same way.
macro_rules! all {
    ($handler:expr, $request:path) => {
        [
            timed("no layer", $handler, $request),
            timed(
                "tower-http InFlightRequests",
                peers::tower_http($handler),
                $request,
            ),
            timed("GracefulLayer", peers::graceful($handler), $request),
            timed(
                "GracefulLayer, max_in_flight",
                peers::graceful_limited($handler),
                $request,
            ),
            timed(
                "tower ConcurrencyLimit",
                peers::concurrency_limit($handler),
                $request,
            ),
            timed("TaskTracker", peers::task_tracker($handler), $request),
            timed(
                "CancellationToken",
                peers::cancellation_token($handler),
                $request,
            ),
        ]
    };
}

pub(crate) fn measure(rows: &mut Rows) {
    let mut served = all!(Boxed, request_behind_pointers);
    let mut seen_through = all!(Handler, request_of_a_clone);
    for all in [&mut served, &mut seen_through] {
        run(all);
    }
    compare(rows, "requests", &served, 0.6);
    compare(rows, "requests seen through", &seen_through, 0.6);

    let (table, bars) = tabulate(&served);
    let title = "Nanoseconds for a request without a layer, and what each adds, for each thread:";
    rows.table(title, table);
    rows.plot(Plot::new(bars));
    let (table, _) = tabulate(&seen_through);
    let title = "The same where the compiler sees through handler and layer:";
    rows.table(title, table);
    lines(rows);
}

fn run(all: &mut [Timed]) {
    for round in 0..ROUNDS {
        for (i, threads) in THREADS.into_iter().enumerate() {
            // Nobody always comes after the same one.
            for turn in 0..all.len() {
                let next = (turn + round) % all.len();
                let time = (all[next].time)(threads);
                all[next].times[i].push(time);
            }
        }
    }
}

/// What a peer adds to each request.
fn added(all: &[Timed], peer: usize, i: usize) -> Figures {
    pairs(&all[peer].times[i], &all[NONE].times[i], |with, without| {
        with - without
    })
}

/// `most_by_two`: what two threads may take of what the peer does.
fn compare(rows: &mut Rows, name: &str, all: &[Timed], most_by_two: f64) {
    let ns = |figures: &Figures| format!("{} ns", figures.text());
    for (i, (threads, budget)) in [("1 thread", 1.0), ("2 threads", most_by_two)]
        .into_iter()
        .enumerate()
    {
        let [ours, peer] = [OURS, PEER].map(|who| added(all, who, i));
        let row = format!("{name}, {threads}");
        let ratio = ours.median() / peer.median();
        rows.add(&row, &ns(&ours), &ns(&peer), ratio, Budget::AtMost(budget));
    }
    // Two threads slow each other down also where they share nothing, on some machines by half.
    let [alone, both] = [0, 1].map(|i| Figures::new(all[NONE].times[i].clone()).median());
    for (who, budget) in [(OURS, Budget::AtMost(1.25)), (PEER, Budget::None)] {
        let [one, two] = [0, 1].map(|i| added(all, who, i).median());
        let ours = format!("+{two:.1} ns on {both:.1} by 2 threads");
        let peer = format!("+{one:.1} ns on {alone:.1} by 1");
        let row = format!("contention, {name}, {}", all[who].name);
        rows.add(&row, &ours, &peer, two / one / (both / alone), budget);
    }
}

/// A table of what each adds, and its bars.
fn tabulate(all: &[Timed]) -> (String, Vec<(&'static str, [f64; 2])>) {
    let mut table = String::from("| | 1 thread | 2 threads |\n|---|---|---|\n");
    let mut bars = Vec::new();
    for (who, peer) in all.iter().enumerate() {
        let figures = if who == NONE {
            peer.times.clone().map(Figures::new)
        } else {
            let added = [0, 1].map(|i| added(all, who, i));
            bars.push((peer.name, added.clone().map(|added| added.median())));
            added
        };
        let plus = if who == NONE { "" } else { "+" };
        let [one, two] = figures.map(|figures| figures.text());
        let _ = writeln!(table, "| {} | {plus}{one} | {plus}{two} |", peer.name);
    }
    (table, bars)
}

/// On lines of their own, however many of them the processor fetches at a time.
#[repr(align(256))]
struct Line(AtomicU64);

/// What it costs that a cache line is somewhere else.
fn lines(rows: &mut Rows) {
    let lines = [const { Line(AtomicU64::new(0)) }; 2];
    let add = |line: usize| {
        black_box(&lines[line].0).fetch_add(1, Ordering::Relaxed);
    };
    let rounds = |once: &dyn Fn() -> f64| Figures::new((0..ROUNDS).map(|_| once()).collect());
    let own = rounds(&|| time(2, add));
    let shared = rounds(&|| time(2, |_| add(0)));
    let handed = rounds(&hand_over);
    let table = format!(
        "| | ns |\n|---|---|\n| two threads, each on a line of its own | {} |\n\
         | two threads on one line | {} |\n| a line handed from one to the other | {} |\n",
        own.text(),
        shared.text(),
        handed.text()
    );
    rows.table(
        "An atomic addition, and the transfer of a cache line:",
        table,
    );
    // Whatever else the machine does only adds to it.
    let transfer = handed.percentile(25) / 1e3;
    rows.table(
        "**A model, not a measurement:** microseconds a request adds where each core's next request \
         takes 10 µs besides, by how many transfers of a cache line it needs:",
        model(transfer),
    );
}

/// `BENCHMARKS.md` says where the formula is from.
fn model(transfer: f64) -> String {
    const BESIDES: f64 = 10.0;

    let mut table = String::from("| transfers | 1 core | 8 | 32 | 64 |\n|---|---|---|---|---|\n");
    for transfers in [1.0, 2.0, 4.0] {
        let _ = write!(table, "| {transfers} ");
        let demand = transfers * transfer;
        for cores in [1.0, 8.0, 32.0, 64.0] {
            // On one core nothing is ever elsewhere.
            let added = if cores > 1.0 {
                demand.max(cores * demand - BESIDES)
            } else {
                0.0
            };
            let _ = write!(table, "| {added:.2} ");
        }
        table.push_str("|\n");
    }
    table
}

/// Nanoseconds until a core sees what another has written, there and back halved.
fn hand_over() -> f64 {
    const TIMES: u32 = 10_000;

    let line = AtomicU32::new(0);
    let await_turn = |turn: u32| {
        // Where there is but one core for both, the other must come to run.
        let mut spins = 0_u32;
        while line.load(Ordering::Acquire) != turn {
            spins += 1;
            if spins % 100_000 == 0 {
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0..TIMES {
                await_turn(2 * turn + 1);
                line.store(2 * turn + 2, Ordering::Release);
            }
        });
        let start = Instant::now();
        for turn in 0..TIMES {
            line.store(2 * turn + 1, Ordering::Release);
            await_turn(2 * turn + 2);
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(2 * TIMES)
    })
}
