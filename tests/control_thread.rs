//! The control thread exists only while something needs it, and there is one for any number of lifecycles.
//! A separate test program, because the test counts the threads of the whole process.

#![cfg(target_os = "linux")]

use std::{
    fs::{self, File},
    io, thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tower_graceful::{Graceful, Phase};

const BOUND: Duration = Duration::from_secs(60);
const MANY: usize = 20_000;

/// The number of threads of this crate. Only the start of a name is compared, because the kernel keeps 15 bytes
/// of it.
fn threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .filter(|name| name.starts_with("graceful-"))
        .count()
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < BOUND, "waited too long for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn without_delay() -> Graceful {
    let builder = Graceful::builder().drain_delay(Duration::ZERO);
    builder.build().unwrap()
}

/// Whether a handler for SIGTERM is installed.
fn is_sigterm_caught() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let caught = status.lines().find_map(|it| it.strip_prefix("SigCgt:"));
    let caught = u64::from_str_radix(caught.unwrap().trim(), 16).unwrap();
    caught & (1 << (Signal::SIGTERM as u64 - 1)) != 0
}

/// Handles signals where the process may open only `count` more files.
fn handle_signals_with(count: usize) -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let files = u64::try_from(descriptors()).unwrap() + 16;
    setrlimit(Resource::RLIMIT_NOFILE, files, hard).unwrap();
    let mut all: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(all.len() > count, "there was room for more");
    all.truncate(all.len() - count);
    let result = without_delay().handle_signals();
    drop(all);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    result
}

/// A program that cannot handle signals yet is still ended by them, and may try again.
fn without_descriptors_signals_keep_their_default_action() {
    let before = descriptors();
    // A socket has two, and the handler of each signal has a clone of one.
    for few in 0..4 {
        let error = handle_signals_with(few).unwrap_err().to_string();
        assert!(error.starts_with("no socket for signals: "), "{error}");
        assert!(!is_sigterm_caught(), "with {few}");
        assert_eq!(descriptors(), before, "with {few}");
        assert_eq!(threads(), 0, "with {few}");
    }
    handle_signals_with(4).unwrap();
    assert!(is_sigterm_caught());
    wait_for("the thread to end", || threads() == 0);
}

#[test]
fn there_is_one_thread_while_something_needs_it() {
    without_descriptors_signals_keep_their_default_action();
    let before = descriptors();
    let mut all: Vec<_> = (0..MANY).map(|_| without_delay()).collect();
    assert_eq!(threads(), 0, "nothing needs one");

    for graceful in &all {
        graceful.handle_signals().unwrap();
    }
    wait_for("the thread", || threads() == 1);
    assert!(descriptors() <= before + 8, "a socket, and its clones");
    // The thread also runs on after some of the lifecycles have been dropped.
    all.truncate(MANY / 2);
    assert_eq!(threads(), 1);

    let begun = Instant::now();
    kill(Pid::this(), Signal::SIGTERM).unwrap();
    wait_for("all of them to stop", || {
        all.iter().all(|it| it.phase() == Phase::Stopped)
    });
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    // The control thread lives for one more second, in which a signal still counts as one for the last stop. The
    // threads that run wakers and write the log end before.
    wait_for("the other threads to end", || threads() == 1);
    wait_for("the thread to end", || threads() == 0);

    // A stop, a lifecycle that listens for signals, and a watchdog each start a new thread.
    let graceful = without_delay();
    let hold = graceful.hold("work");
    graceful.shutdown();
    wait_for("the thread", || threads() == 1);
    drop(hold);
    wait_for("the stop", || graceful.phase() == Phase::Stopped);
    wait_for("the thread to end", || threads() == 0);

    let graceful = without_delay();
    graceful.handle_signals().unwrap();
    wait_for("the thread", || threads() == 1);
    drop(graceful);
    wait_for("the thread to end", || threads() == 0);
    assert!(descriptors() <= before + 8, "no more than at first");

    // A watchdog needs it from the start.
    let builder = Graceful::builder().watchdog(true);
    let graceful = builder.build().unwrap();
    wait_for("the thread", || threads() == 1);
    drop(graceful);
    wait_for("the thread to end", || threads() == 0);
}
