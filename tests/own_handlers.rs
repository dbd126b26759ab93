//! What the program did with a signal before the first lifecycle listened, it does again after the last one has
//! stopped. A separate test program, because the first lifecycle of a process finds that out.

#![cfg(target_os = "linux")]

use std::{
    env, fs,
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time,
};
use tower_graceful::{Graceful, Outcome, Phase, Trigger};

const BOUND: Duration = Duration::from_secs(60);

/// Stops a lifecycle by `signal`, and waits until the signal belongs to the program again: then the thread of the
/// crate ends.
async fn stop_by(signal: Signal, trigger: Trigger) {
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    let graceful = builder.build().unwrap();
    let drain = graceful.drain();
    kill(Pid::this(), signal).unwrap();
    let report = time::timeout(BOUND, graceful.run(drain)).await;
    let report = report.expect("in time");
    assert_eq!(report.trigger(), trigger);
    assert_eq!(report.outcome(), Outcome::Clean);

    let begun = Instant::now();
    while has_thread() {
        assert!(begun.elapsed() < BOUND, "the thread lives on");
        time::sleep(Duration::from_millis(10)).await;
    }
}

/// Only the start of the name is compared, because the kernel keeps 15 bytes of it.
fn has_thread() -> bool {
    let mut tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks.any(|task| {
        let name = fs::read_to_string(task.unwrap().path().join("comm"));
        name.is_ok_and(|it| it.starts_with("graceful-contro"))
    })
}

#[tokio::test]
async fn a_signal_with_a_handler_of_the_program_goes_to_that_handler_again() {
    let mut stream = signal(SignalKind::terminate()).unwrap();
    stop_by(Signal::SIGTERM, Trigger::Terminate).await;
    // This one has stopped the lifecycle.
    stream.recv().await.unwrap();
    kill(Pid::this(), Signal::SIGTERM).unwrap();
    let received = time::timeout(BOUND, stream.recv()).await;
    assert_eq!(received, Ok(Some(())));
    // Its handler has ended on every thread by then.
    time::sleep(Duration::from_millis(100)).await;
    // It was meant for the program, and not for a service that is made later.
    let graceful = Graceful::new();
    let _drain = graceful.drain();
    time::sleep(Duration::from_millis(200)).await;
    assert_eq!(graceful.phase(), Phase::Serving);
}

/// As of a program that a shell has started with `&`.
#[tokio::test]
async fn a_signal_that_was_ignored_is_ignored_again() {
    const CHILD: &str = "OWN_HANDLERS_CHILD";
    if env::var_os(CHILD).is_some() {
        stop_by(Signal::SIGINT, Trigger::Interrupt).await;
        kill(Pid::this(), Signal::SIGINT).unwrap();
        // Another thread may receive it.
        time::sleep(Duration::from_millis(200)).await;
        return;
    }
    let mut child = Command::new("sh");
    child
        .args(["-c", "trap '' INT; exec \"$0\" --exact \"$1\""])
        .arg(env::current_exe().unwrap())
        .arg("a_signal_that_was_ignored_is_ignored_again")
        .env(CHILD, "yes");
    let output = child.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let output = String::from_utf8(output.stdout).unwrap();
    assert!(output.contains("1 passed"), "{output}");
}
