//! One lifecycle after another in one process, and the signals of the process. A program of its own,
//! because signals are for all of it.

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
use tokio::{task, time};
use tower_graceful::{Graceful, Outcome, Trigger};

const BOUND: Duration = Duration::from_secs(10);

fn without_delay() -> Graceful {
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    builder.build().unwrap()
}

/// The first was stopped and dropped, the second dropped without a stop: neither has a say in what the
/// signal does to the third.
#[tokio::test]
async fn a_signal_is_for_the_lifecycles_that_are_alive() {
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

    // Longer than a service that has stopped keeps signals to itself.
    time::sleep(Duration::from_millis(1_200)).await;
    let third = without_delay();
    let run = tokio::spawn(third.run(third.drain()));
    // On the one thread there is, it serves from here on.
    task::yield_now().await;
    kill(Pid::this(), Signal::SIGTERM).unwrap();
    let report = time::timeout(BOUND, run).await.expect("in time").unwrap();
    assert_eq!(report.trigger(), Trigger::Terminate);
    assert_eq!(report.outcome(), Outcome::Clean);
    assert!(!ran.load(Relaxed));
}
