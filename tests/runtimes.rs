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
    let outcomes: Vec<_> = report
        .tasks()
        .iter()
        .map(|task| task.outcome.clone())
        .collect();
    assert_eq!(
        outcomes,
        [TaskOutcome::NotRun, TaskOutcome::Cut, TaskOutcome::NotRun],
        "{report}"
    );
    assert_eq!(report.outcome(), Outcome::Forced);
    drop(first);
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
