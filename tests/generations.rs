//! One lifecycle after another in one process, and the signals of the process. A separate test program,
//! because a signal goes to the whole process.

#![cfg(unix)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{sync::Mutex, task, time};
use tower_graceful::{Graceful, Outcome, Phase, Trigger};

const BOUND: Duration = Duration::from_secs(10);

fn without_delay() -> Graceful {
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    builder.build().unwrap()
}

/// One test at a time: a signal is for the whole process.
static SIGNALS: Mutex<()> = Mutex::const_new(());

/// The first lifecycle was stopped and dropped, the second dropped without a stop. Neither changes what the
/// signal does to the third.
#[tokio::test]
async fn a_signal_is_for_the_lifecycles_that_are_alive() {
    let _alone = SIGNALS.lock().await;
    let first = without_delay();
    let drain = first.drain();
    first.shutdown();
    drain.await;
    first.stopped().await;
    drop(first);

    let second = without_delay();
    let ran = Arc::new(AtomicBool::new(false));
    let step = {
        let ran = Arc::clone(&ran);
        async move { ran.store(true, Relaxed) }
    };
    second.cleanup("of the second", BOUND, step).unwrap();
    let mut phases = second.subscribe();
    drop(second.drain());
    drop(second);
    let gone = time::timeout(BOUND, phases.changed()).await;
    assert!(gone.expect("in time").is_none());
    assert_eq!(Arc::strong_count(&ran), 1, "its step is gone with it");

    // For one second after a stop, a signal counts as one for the service that has stopped. This is longer.
    time::sleep(Duration::from_millis(1_200)).await;
    let third = without_delay();
    let run = tokio::spawn(third.run(third.drain()));
    // The runtime has one thread, so the server has been polled after this.
    task::yield_now().await;
    kill(Pid::this(), Signal::SIGTERM).unwrap();
    let report = time::timeout(BOUND, run).await.expect("in time").unwrap();
    assert_eq!(report.trigger(), Trigger::Terminate);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert!(!ran.load(Relaxed));
}

/// A lifecycle that stopped long ago still exists, and does not change what the signals do.
#[tokio::test]
async fn a_signal_is_for_the_lifecycles_that_have_not_stopped() {
    let _alone = SIGNALS.lock().await;
    let first = without_delay();
    first.handle_signals().unwrap();
    let lasting = without_delay();
    lasting.handle_signals().unwrap();
    first.shutdown();
    first.stopped().await;
    // Longer than signals are kept after the last one.
    time::sleep(Duration::from_millis(1_200)).await;
    let held = lasting.hold("work");
    for signal in [Signal::SIGTERM, Signal::SIGTERM] {
        kill(Pid::this(), signal).unwrap();
        time::timeout(BOUND, lasting.draining())
            .await
            .expect("in time");
        // As long as a second signal may take.
        time::sleep(Duration::from_millis(50)).await;
        assert_eq!(lasting.phase(), Phase::Draining);
    }
    let ran = Arc::new(AtomicBool::new(false));
    let step = {
        let ran = Arc::clone(&ran);
        async move { ran.store(true, Relaxed) }
    };
    lasting.cleanup("of the second", BOUND, step).unwrap();
    kill(Pid::this(), Signal::SIGINT).unwrap();
    let report = time::timeout(BOUND, lasting.run(async {})).await;
    let report = report.expect("in time");
    drop(held);
    assert_eq!(report.trigger(), Trigger::Terminate);
    assert_eq!(report.outcome(), Outcome::Forced);
    assert!(ran.load(Relaxed), "its cleanup has run");
}

/// Each lifecycle stops independently of the others.
#[tokio::test]
async fn a_signal_is_for_all_lifecycles() {
    let _alone = SIGNALS.lock().await;
    let all: Vec<_> = (0..3).map(|_| without_delay()).collect();
    for graceful in &all {
        graceful.handle_signals().unwrap();
    }
    kill(Pid::this(), Signal::SIGINT).unwrap();
    for graceful in &all {
        let stopped = time::timeout(BOUND, graceful.stopped()).await;
        stopped.expect("in time");
    }
}

/// In a runtime with a paused clock, the phases after a signal follow that clock.
#[tokio::test(start_paused = true)]
async fn a_signal_starts_the_timeline_of_a_paused_clock() {
    let _alone = SIGNALS.lock().await;
    time::advance(Duration::from_secs(3_600)).await;
    let delay = Duration::from_secs(5);
    let graceful = Graceful::builder().drain_delay(delay).build().unwrap();
    graceful.handle_signals().unwrap();
    drop(graceful.track(()));
    kill(Pid::this(), Signal::SIGTERM).unwrap();
    let begun = time::Instant::now();
    while graceful.phase() == Phase::Serving {
        // The clock stands still as long as there is something to do.
        task::yield_now().await;
    }
    assert_eq!(begun.elapsed(), Duration::ZERO);
    graceful.draining().await;
    assert_eq!(begun.elapsed(), delay);
    graceful.stopped().await;
}
