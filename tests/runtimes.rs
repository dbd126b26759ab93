//! The runtime in which a lifecycle was first used ends, in any way and at any moment. Tasks that wait on another
//! runtime are still notified in time.

#![cfg(feature = "signal")]

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
    time,
};
use tower_graceful::{Graceful, Outcome, Phase, Report, TaskOutcome};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// The timeout of waits that end by themselves, long enough for a busy machine.
const BOUND: Duration = Duration::from_secs(20);

/// The grace period of [`graceful`]. A stop is over by then, apart from delays of a busy machine.
const END: Duration = Duration::from_millis(1_500);

fn graceful() -> Graceful {
    Graceful::builder()
        .grace_period(END)
        .drain_delay(MS(30))
        .drain_timeout(MS(60))
        .cleanup_timeout(MS(400))
        .build()
        .unwrap()
}

fn runtime(threads: usize) -> Runtime {
    let mut builder = match threads {
        0 => Builder::new_current_thread(),
        threads => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(threads);
            builder
        }
    };
    builder.enable_all().build().unwrap()
}

/// A generator of numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        // Knuth's constants.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// Waits for the service on a separate runtime. Returns the report, and the times from the call until `draining`
/// and `stopped` resolved.
fn waits_elsewhere(graceful: &Graceful) -> thread::JoinHandle<(Report, [Duration; 2])> {
    let graceful = graceful.clone();
    thread::spawn(move || {
        runtime(1).block_on(async {
            let begun = Instant::now();
            let draining = async {
                graceful.draining().await;
                begun.elapsed()
            };
            let stopped = async {
                graceful.stopped().await;
                begun.elapsed()
            };
            let run = graceful.run(graceful.drain_on(pending()));
            let all = async { tokio::join!(run, draining, stopped) };
            let (report, draining, stopped) = time::timeout(BOUND, all).await.expect("it hangs");
            (report, [draining, stopped])
        })
    })
}

fn ends_at_random(seed: u64) {
    let mut random = Random(seed);
    let threads = usize::try_from(random.below(3)).unwrap();
    let first = runtime(threads);
    let graceful = graceful();
    let ran = Arc::new(AtomicBool::new(false));
    let register = {
        let (graceful, ran) = (graceful.clone(), Arc::clone(&ran));
        async move {
            graceful
                .on_lame_duck("hook", MS(20), async { time::sleep(MS(5)).await })
                .unwrap();
            graceful.worker("worker", |stop| stop).unwrap();
            graceful
                .cleanup("step", MS(200), async move {
                    time::sleep(MS(20)).await;
                    ran.store(true, Relaxed);
                })
                .unwrap();
            tokio::spawn(graceful.stopped());
            tokio::spawn(graceful.run(graceful.drain_on(pending())));
            tokio::task::yield_now().await;
        }
    };
    first.block_on(register);
    let driven = threads == 0 && random.below(2) == 0;
    let stops_first = random.below(2) == 0;
    if stops_first {
        graceful.shutdown();
    }
    let elsewhere = waits_elsewhere(&graceful);
    // The runtime ends during the delay, the drain or the cleanup, or after the stop.
    let moment = Duration::from_micros(random.below(150_000));
    if driven {
        first.block_on(async { time::sleep(moment).await });
    } else {
        thread::sleep(moment);
    }
    match random.below(3) {
        0 => drop(first),
        1 => first.shutdown_background(),
        _ => first.shutdown_timeout(MS(random.below(10))),
    }
    let begun = Instant::now();
    graceful.shutdown();
    let (report, [draining, stopped]) = elsewhere.join().unwrap();
    let what = format!("seed {seed}, {threads} threads, after {moment:?}: {report}");
    assert_eq!(graceful.phase(), Phase::Stopped, "{what}");
    assert!(draining <= stopped, "{what}");
    assert!(begun.elapsed() < 2 * END + MS(2_000), "{what}");
    // The report tells the truth about the step.
    let step = report.tasks().iter().find(|task| task.name == "step");
    let outcome = &step.unwrap().outcome;
    match outcome {
        TaskOutcome::Done => assert!(ran.load(Relaxed), "{what}"),
        TaskOutcome::Cut | TaskOutcome::NotRun => {
            assert_ne!(report.outcome(), Outcome::Clean, "{what}");
        }
        other => panic!("{other:?}: {what}"),
    }
}

#[test]
fn a_stop_completes_in_time_however_the_first_runtime_ends() {
    let tasks: Vec<_> = (0..10)
        .map(|task| thread::spawn(move || (0..15).for_each(|n| ends_at_random(task * 15 + n))))
        .collect();
    for task in tasks {
        task.join().unwrap();
    }
}

/// The driver on that runtime never runs. The tasks that were to run there are reported as cut or not run.
#[test]
fn a_runtime_that_is_kept_but_not_driven_does_not_hang_a_stop() {
    let first = runtime(0);
    let graceful = graceful();
    first.block_on(async {
        graceful.on_lame_duck("hook", MS(20), async {}).unwrap();
        graceful.worker("worker", |stop| stop).unwrap();
        graceful.cleanup("step", MS(200), async {}).unwrap();
    });
    let elsewhere = waits_elsewhere(&graceful);
    graceful.shutdown();
    let (report, [draining, stopped]) = elsewhere.join().unwrap();
    assert!(draining < MS(1_000), "{report}");
    assert!(stopped < 2 * END, "{report}");
    assert_eq!(
        outcomes(&report),
        [TaskOutcome::NotRun, TaskOutcome::Cut, TaskOutcome::NotRun],
        "{report}"
    );
    assert_eq!(report.outcome(), Outcome::Forced);
    drop(first);
}

/// How long a stop may take here if it waits for nothing: far less than the grace period of [`long`].
const SOON: Duration = Duration::from_secs(10);

/// A stop that waits for its cleanup in vain takes thrice as long as [`SOON`].
fn long() -> Graceful {
    let builder = Graceful::builder().grace_period(3 * SOON);
    builder.drain_delay(Duration::ZERO).build().unwrap()
}

fn outcomes(report: &Report) -> Vec<TaskOutcome> {
    let tasks = report.tasks().iter();
    tasks.map(|task| task.outcome.clone()).collect()
}

/// A handle of a runtime still polls futures after the runtime has ended, but tasks cannot be spawned there any more.
#[test]
fn a_task_that_is_polled_in_a_runtime_that_has_ended_does_not_prolong_the_stop() {
    let first = runtime(1);
    let graceful = long();
    first.block_on(async {
        graceful.cleanup("step", MS(200), async {}).unwrap();
        time::sleep(MS(20)).await;
    });
    let handle = first.handle().clone();
    drop(first);
    // Polls it there, and keeps it registered.
    let mut waits = Box::pin(graceful.stopped());
    let polled = handle.block_on(async { futures_util::poll!(&mut waits) });
    assert!(polled.is_pending());
    let begun = Instant::now();
    graceful.shutdown();
    handle.block_on(waits);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let report = handle.block_on(graceful.run(pending::<()>()));
    assert_eq!(outcomes(&report), [TaskOutcome::NotRun], "{report}");
}

/// The driver on that runtime is dropped before it was polled.
#[test]
fn another_runtime_takes_over_from_one_that_ended_without_being_driven() {
    for waits in [true, false] {
        let first = runtime(0);
        let graceful = long();
        first.block_on(async { graceful.cleanup("step", MS(200), async {}).unwrap() });
        let other = runtime(1);
        let mut stopped = Box::pin(graceful.stopped());
        if waits {
            let polled = other.block_on(async { futures_util::poll!(&mut stopped) });
            assert!(polled.is_pending());
        }
        let waiting = waits.then(|| other.spawn(stopped));
        drop(first);
        let begun = Instant::now();
        graceful.shutdown();
        while graceful.phase() < Phase::Stopped {
            assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
            thread::sleep(MS(1));
        }
        let report = other.block_on(graceful.run(pending::<()>()));
        let expected = if waits {
            TaskOutcome::Done
        } else {
            TaskOutcome::NotRun
        };
        assert_eq!(outcomes(&report), [expected], "{report}");
        drop(waiting);
    }
}

/// Nothing but `run` waits on the last runtime, and its server has nothing to do when the other runtimes end.
#[test]
fn the_runtime_of_run_takes_over_a_hook() {
    let [first, second, last] = [1, 1, 1].map(runtime);
    let builder = Graceful::builder().grace_period(3 * SOON);
    let graceful = first.block_on(async { builder.drain_delay(SOON).build().unwrap() });
    let (ends, ended) = oneshot::channel();
    let hook = async move {
        time::sleep(MS(5)).await;
        ends.send(()).unwrap();
    };
    graceful.on_lame_duck("hook", SOON, hook).unwrap();
    // The delay ends when the only server has ended, and the server ends after the hook.
    let run = last.spawn(graceful.run(async { drop(ended.await) }));
    second.spawn(graceful.stopped());
    for other in [first, second] {
        thread::sleep(MS(20));
        drop(other);
    }
    let begun = Instant::now();
    graceful.shutdown();
    let report = last.block_on(run).unwrap();
    assert_eq!(outcomes(&report), [TaskOutcome::Done], "{report}");
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
}

/// Nothing but the control thread is left.
#[test]
fn a_stop_completes_where_no_runtime_is_left() {
    let graceful = graceful();
    let first = runtime(1);
    first.block_on(async {
        graceful.cleanup("step", MS(200), async {}).unwrap();
        tokio::task::yield_now().await;
    });
    graceful.shutdown();
    drop(first);
    let begun = Instant::now();
    while graceful.phase() < Phase::Stopped {
        assert!(begun.elapsed() < BOUND, "it hangs");
        thread::sleep(MS(1));
    }
    assert!(begun.elapsed() < END, "{:?}", begun.elapsed());
    // `run` gives the report to whatever asks.
    let mut run = Box::pin(graceful.run(pending::<()>()));
    let report = loop {
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        if let std::task::Poll::Ready(report) = run.as_mut().poll(&mut cx) {
            break report;
        }
    };
    assert_eq!(report.tasks()[0].outcome, TaskOutcome::NotRun);
    assert_eq!(report.outcome(), Outcome::CleanupFailed);
}
