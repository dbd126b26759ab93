//! The time that each peer adds to a request, on one thread and on two threads that share a layer.
//! All peers take their turn in each round, so that other programs on the machine disturb all alike.

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
const SLOT: Duration = Duration::from_millis(10);
const THREADS: [usize; 2] = [1, 2];
/// The budgets on one thread and on two, as ratios to tower-http.
const MOST: [f64; 2] = [0.85, 0.25];

/// Nanoseconds of one call of `once`, which `threads` threads call at the same time.
fn time(threads: usize, once: impl Fn(usize) + Sync) -> f64 {
    /// Calls between two readings of the clock.
    const TIMES: u32 = 200;

    let started = AtomicUsize::new(0);
    let measure = |thread| {
        // The threads spin and do not sleep: the kernel often wakes a thread on the core of the
        // thread that woke it, and then both would share that core.
        started.fetch_add(1, Ordering::Relaxed);
        while started.load(Ordering::Relaxed) < threads {
            hint::spin_loop();
        }
        let start = Instant::now();
        let mut done = 0_u32;
        loop {
            (0..TIMES).for_each(|_| once(thread));
            done += TIMES;
            let elapsed = start.elapsed();
            if elapsed >= SLOT {
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
    #[expect(clippy::cast_precision_loss)] // the number is 1 or 2
    let threads = threads as f64;
    total / threads
}

/// A peer, and the times of its rounds on one thread and on two.
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

/// All peers around `$handler`, each driven by `$request`.
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
    let mut inlined = all!(Handler, request_of_a_clone);
    for all in [&mut served, &mut inlined] {
        run(all);
    }
    compare(rows, "requests", &served);
    compare(rows, "inlined requests", &inlined);

    let (table, bars) = tabulate(&served);
    let title = "Nanoseconds for a request without a layer, and nanoseconds that each layer adds:";
    rows.table(title, table);
    rows.plot(Plot::new(bars));
    let (table, _) = tabulate(&inlined);
    let title = "The same if the compiler inlines handler and layer:";
    rows.table(title, table);
    cache_lines(rows);
}

fn run(all: &mut [Timed]) {
    for round in 0..ROUNDS {
        for (i, threads) in THREADS.into_iter().enumerate() {
            // Each round begins with another peer.
            for i_peer in 0..all.len() {
                let next = (i_peer + round) % all.len();
                let time = (all[next].time)(threads);
                all[next].times[i].push(time);
            }
        }
    }
}

/// The nanoseconds that a peer adds to a request, for each round.
fn added(all: &[Timed], peer: usize, i: usize) -> Figures {
    pairs(&all[peer].times[i], &all[NONE].times[i], |with, without| {
        with - without
    })
}

/// Adds the rows of `all`: the time that the layer adds beside tower-http's, and the contention.
fn compare(rows: &mut Rows, name: &str, all: &[Timed]) {
    let ns = |figures: &Figures| format!("{} ns", figures.text());
    for (i, threads) in ["1 thread", "2 threads"].into_iter().enumerate() {
        let [ours, peer] = [OURS, PEER].map(|peer| added(all, peer, i));
        let row = format!("{name}, {threads}");
        let ratio = ours.median() / peer.median();
        rows.add(&row, &ns(&ours), &ns(&peer), ratio, Budget::AtMost(MOST[i]));
    }
    // Two threads slow each other down even without shared data, on some machines by half. So the
    // ratio is divided by that of the bare handler.
    let [alone, both] = [0, 1].map(|i| Figures::new(all[NONE].times[i].clone()).median());
    for (index, budget) in [(OURS, Budget::AtMost(1.25)), (PEER, Budget::None)] {
        let [one, two] = [0, 1].map(|i| added(all, index, i).median());
        let ours = format!("+{two:.1} ns on {both:.1} by 2 threads");
        let peer = format!("+{one:.1} ns on {alone:.1} by 1");
        let row = format!("contention, {name}, {}", all[index].name);
        rows.add(&row, &ours, &peer, two / one / (both / alone), budget);
    }
}

/// The table of the times that each peer adds, and the bars of the plot.
fn tabulate(all: &[Timed]) -> (String, Vec<(&'static str, [f64; 2])>) {
    let mut table = String::from("| | 1 thread | 2 threads |\n|---|---|---|\n");
    let mut bars = Vec::new();
    for (index, peer) in all.iter().enumerate() {
        let figures = if index == NONE {
            peer.times.clone().map(Figures::new)
        } else {
            let added = [0, 1].map(|i| added(all, index, i));
            bars.push((peer.name, added.clone().map(|added| added.median())));
            added
        };
        let plus = if index == NONE { "" } else { "+" };
        let [one, two] = figures.map(|figures| figures.text());
        let _ = writeln!(table, "| {} | {plus}{one} | {plus}{two} |", peer.name);
    }
    (table, bars)
}

/// A word on a cache line of its own. The alignment is larger than a line, because processors may fetch
/// several neighbouring lines at a time.
#[repr(align(256))]
struct Line(AtomicU64);

/// Measures an addition on a cache line that is shared or not, and the transfer of a line.
fn cache_lines(rows: &mut Rows) {
    let lines = [const { Line(AtomicU64::new(0)) }; 2];
    let add = |line: usize| {
        black_box(&lines[line].0).fetch_add(1, Ordering::Relaxed);
    };
    let rounds = |once: &dyn Fn() -> f64| Figures::new((0..ROUNDS).map(|_| once()).collect());
    let own = rounds(&|| time(2, add));
    let shared = rounds(&|| time(2, |_| add(0)));
    let handed = rounds(&transfer_time);
    let table = format!(
        "| | ns |\n|---|---|\n| two threads, each on its own cache line | {} |\n\
         | two threads on one cache line | {} |\n| a cache line handed from one thread to the other | {} |\n",
        own.text(),
        shared.text(),
        handed.text()
    );
    rows.table(
        "Nanoseconds for an atomic addition, and for the transfer of a cache line:",
        table,
    );
    // The lower quartile, because other programs on the machine only make it longer.
    let transfer = handed.percentile(25) / 1e3;
    rows.table(
        "**A model, not a measurement:** microseconds that the layer adds to a request of 10 µs, by \
         the number of cores and of cache-line transfers per request:",
        model(transfer),
    );
}

/// The table of the model. `BENCHMARKS.md` derives the formula.
fn model(transfer: f64) -> String {
    const REST_OF_REQUEST: f64 = 10.0;

    let mut table = String::from("| transfers | 1 core | 8 | 32 | 64 |\n|---|---|---|---|---|\n");
    for transfers in [1.0, 2.0, 4.0] {
        let _ = write!(table, "| {transfers} ");
        let demand = transfers * transfer;
        for cores in [1.0, 8.0, 32.0, 64.0] {
            // With one core, the line never moves.
            let added = if cores > 1.0 {
                demand.max(cores * demand - REST_OF_REQUEST)
            } else {
                0.0
            };
            let _ = write!(table, "| {added:.2} ");
        }
        table.push_str("|\n");
    }
    table
}

/// Nanoseconds until a core sees what another core has written: half of a round trip.
fn transfer_time() -> f64 {
    const TIMES: u32 = 10_000;

    let line = AtomicU32::new(0);
    let wait_until = |value: u32| {
        // If both threads share a core, the other one has to run.
        let mut spins = 0_u32;
        while line.load(Ordering::Acquire) != value {
            spins += 1;
            if spins % 100_000 == 0 {
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..TIMES {
                wait_until(2 * round + 1);
                line.store(2 * round + 2, Ordering::Release);
            }
        });
        let start = Instant::now();
        for round in 0..TIMES {
            line.store(2 * round + 1, Ordering::Release);
            wait_until(2 * round + 2);
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(2 * TIMES)
    })
}
