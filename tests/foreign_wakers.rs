//! Wakers that run code of their user when they are cloned, dropped or woken. That code may stop the service, or block.

mod waits;

use std::{
    future::{Future, pending},
    pin::{Pin, pin},
    sync::{Arc, Mutex, mpsc},
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use cooked_waker::{IntoWaker, Wake, WakeRef};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, empty},
    runtime::{self, Runtime},
};
use tower_graceful::{Graceful, Phase, Report, TaskOutcome};

use crate::waits::{BOUND, wait_for};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Cloned,
    Dropped,
}

/// Each clone counts as another task.
struct Calls {
    when: When,
    code: Arc<dyn Fn() + Send + Sync>,
}

impl Clone for Calls {
    fn clone(&self) -> Self {
        if self.when == When::Cloned {
            (self.code)();
        }
        let code = Arc::clone(&self.code);
        Self { code, ..*self }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        if self.when == When::Dropped {
            (self.code)();
        }
    }
}

impl WakeRef for Calls {
    fn wake_by_ref(&self) {}
}

impl Wake for Calls {}

fn waker(when: When, code: impl Fn() + Send + Sync + 'static) -> Waker {
    let code = Arc::new(code);
    Box::new(Calls { when, code }).into_waker()
}

fn graceful() -> Graceful {
    let builder = Graceful::builder()
        .drain_delay(Duration::ZERO)
        .drain_timeout(Duration::from_millis(300));
    builder.build().unwrap()
}

fn current_thread() -> Runtime {
    let mut builder = runtime::Builder::new_current_thread();
    builder.enable_all().build().unwrap()
}

/// Polls twice, so that wakers are stored, and then replaced.
type Polls = fn(&Graceful, &Waker);

fn poll_connection(graceful: &Graceful, waker: &Waker) {
    let mut io = pin!(graceful.track(empty()));
    let cx = &mut Context::from_waker(waker);
    for _ in 0..2 {
        let _ = io.as_mut().poll_read(cx, &mut ReadBuf::new(&mut [0]));
        let _ = io.as_mut().poll_write(cx, b"x");
    }
}

fn poll_draining(graceful: &Graceful, waker: &Waker) {
    let mut draining = pin!(graceful.draining());
    let cx = &mut Context::from_waker(waker);
    for _ in 0..2 {
        let _ = Pin::new(&mut draining).poll(cx);
    }
}

const ALL: [(Polls, When); 4] = [
    (poll_connection, When::Cloned),
    (poll_connection, When::Dropped),
    (poll_draining, When::Cloned),
    (poll_draining, When::Dropped),
];

/// Runs code that may never return.
fn assert_returns(code: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    let runs = thread::spawn(move || {
        code();
        done.send(()).unwrap();
    });
    let is_done = is_done.recv_timeout(2 * BOUND);
    assert_ne!(is_done, Err(mpsc::RecvTimeoutError::Timeout));
    runs.join().unwrap();
}

#[test]
fn a_waker_may_stop_the_service_when_it_is_cloned_or_dropped() {
    for (polls, when) in ALL {
        assert_returns(move || {
            let graceful = graceful();
            let stops = graceful.clone();
            polls(&graceful, &waker(when, move || stops.shutdown()));
            assert!(graceful.phase() > Phase::Serving, "{when:?}");
        });
    }
}

/// With a listener, the stop also waits for connections that were never read.
#[cfg(feature = "axum")]
async fn listen(graceful: &Graceful) {
    use axum::serve::Listener;
    use futures_util::FutureExt;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    assert!(
        graceful
            .listener(listener)
            .accept()
            .now_or_never()
            .is_none()
    );
}

#[cfg(not(feature = "axum"))]
fn listen(_: &Graceful) -> std::future::Ready<()> {
    std::future::ready(())
}

#[test]
fn a_waker_that_blocks_when_it_is_cloned_or_dropped_does_not_delay_the_stop() {
    for (polls, when) in ALL {
        let runtime = current_thread();
        let graceful = graceful();
        runtime.block_on(listen(&graceful));
        let (release, blocked) = mpsc::channel::<()>();
        let (calls, is_called) = mpsc::channel();
        let blocked = Mutex::new(blocked);
        let waker = waker(when, move || {
            let _ = calls.send(());
            let _ = blocked.lock().unwrap().recv();
        });
        let waits = graceful.clone();
        let poller = thread::spawn(move || polls(&waits, &waker));
        is_called.recv_timeout(BOUND).unwrap();
        let stops = graceful.clone();
        // A thread of its own, because the thread that stops the service wakes tasks, which drops their wakers.
        let stopper = thread::spawn(move || stops.shutdown());
        assert_returns(move || {
            let is_stopped = || graceful.phase() == Phase::Stopped;
            runtime.block_on(wait_for(format!("{when:?}"), is_stopped));
        });
        drop(release);
        poller.join().unwrap();
        stopper.join().unwrap();
    }
}

/// A waker that blocks when it is woken, a channel that tells each time, and one that releases it when it is dropped.
fn blocking() -> (Waker, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (release, blocked) = mpsc::channel();
    let (woken, is_woken) = mpsc::channel();
    let waker = Waker::from(Arc::new(Blocks(woken, blocked.into())));
    (waker, is_woken, release)
}

struct Blocks(mpsc::Sender<()>, Mutex<mpsc::Receiver<()>>);

impl std::task::Wake for Blocks {
    fn wake(self: Arc<Self>) {
        let _ = self.0.send(());
        let _ = self.1.lock().unwrap().recv();
    }
}

/// Keeps no waker.
struct Silent;

impl AsyncRead for Silent {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Poll::Pending
    }
}

/// Tasks that are polled once, outside of every runtime.
type Tasks = fn(&Graceful, &mut Context<'_>) -> Box<dyn Send>;

fn connections(graceful: &Graceful, cx: &mut Context<'_>) -> Box<dyn Send> {
    let tasks = [(); BLOCKED].map(|()| {
        let mut io = graceful.track(Silent);
        let read = Pin::new(&mut io).poll_read(cx, &mut ReadBuf::new(&mut [0]));
        assert!(read.is_pending());
        io
    });
    Box::new(tasks)
}

fn drainings(graceful: &Graceful, cx: &mut Context<'_>) -> Box<dyn Send> {
    let tasks = [(); BLOCKED].map(|()| {
        let mut draining = Box::pin(graceful.draining());
        assert!(draining.as_mut().poll(cx).is_pending());
        draining
    });
    Box::new(tasks)
}

fn outcomes(report: &Report) -> Vec<TaskOutcome> {
    let tasks = report.tasks().iter();
    tasks.map(|task| task.outcome.clone()).collect()
}

/// More than the threads that would wake them in any case: that of the caller, and one of the control thread.
const BLOCKED: usize = 5;

#[test]
fn a_waker_that_blocks_when_it_is_woken_delays_neither_the_stop_nor_its_cleanup() {
    let all: [Tasks; 2] = [connections, drainings];
    for tasks in all {
        let runtime = current_thread();
        let graceful = graceful();
        let (waker, is_woken, release) = blocking();
        let tasks = tasks(&graceful, &mut Context::from_waker(&waker));
        let step = Duration::from_secs(1);
        graceful.cleanup("step", step, async {}).unwrap();
        let stops = graceful.clone();
        assert_returns(move || {
            let (report, stopper) = runtime.block_on(async {
                let run = graceful.run(graceful.drain_on(pending()));
                let stopper = async { thread::spawn(move || stops.shutdown()) };
                tokio::join!(run, stopper)
            });
            assert_eq!(outcomes(&report), [TaskOutcome::Done], "{report}");
            for _ in 0..BLOCKED {
                is_woken.recv_timeout(BOUND).unwrap();
            }
            drop(release);
            stopper.join().unwrap();
        });
        drop(tasks);
    }
}

/// The channel of the closing stages wakes its tasks one after another.
#[test]
fn a_waker_that_blocks_when_it_is_woken_does_not_keep_run_from_returning() {
    // Tokio spreads the tasks that wait for a channel over a few lists at random.
    const DRAINS: usize = 100;

    let runtime = current_thread();
    let graceful = graceful();
    let (waker, is_woken, release) = blocking();
    let drains = [(); DRAINS].map(|()| {
        let mut drain = graceful.drain_on(pending());
        let polled = Pin::new(&mut drain).poll(&mut Context::from_waker(&waker));
        assert!(polled.is_pending());
        drain
    });
    assert_returns(move || {
        let stops = graceful.clone();
        let stopper = runtime.block_on(async {
            let run = graceful.run(pending::<()>());
            let stopper = async { thread::spawn(move || stops.shutdown()) };
            tokio::join!(run, stopper).1
        });
        is_woken.recv_timeout(BOUND).unwrap();
        drop(release);
        stopper.join().unwrap();
    });
    drop(drains);
}

fn subscriptions(graceful: &Graceful, cx: &mut Context<'_>) -> Box<dyn Send> {
    let tasks = [(); BLOCKED].map(|()| {
        let mut phases = graceful.subscribe();
        let mut changes = Box::pin(async move { phases.changed().await });
        assert!(changes.as_mut().poll(cx).is_pending());
        changes
    });
    Box::new(tasks)
}

/// Nothing but `stopped` waits, which was polled before the stop begins.
#[test]
fn a_waker_that_blocks_the_caller_of_shutdown_keeps_no_hook_from_running() {
    // These tasks are woken when the delay is over, or when it begins.
    let all: [(Tasks, u64); 3] = [(connections, 0), (drainings, 0), (subscriptions, 300)];
    for (tasks, delay) in all {
        let runtime = current_thread();
        let builder = Graceful::builder()
            .grace_period(BOUND)
            .drain_delay(Duration::from_millis(delay))
            .drain_timeout(Duration::from_millis(300));
        let graceful = builder.build().unwrap();
        let (waker, is_woken, release) = blocking();
        let tasks = tasks(&graceful, &mut Context::from_waker(&waker));
        graceful.on_lame_duck("hook", BOUND, async {}).unwrap();
        graceful.cleanup("step", BOUND, async {}).unwrap();
        assert_returns(move || {
            let stops = graceful.clone();
            let (stopper, report) = runtime.block_on(async {
                let stopper = async { thread::spawn(move || stops.shutdown()) };
                let ((), stopper) = tokio::join!(graceful.stopped(), stopper);
                (stopper, graceful.run(pending::<()>()).await)
            });
            assert_eq!(outcomes(&report), [TaskOutcome::Done, TaskOutcome::Done]);
            is_woken.recv_timeout(BOUND).unwrap();
            drop(release);
            stopper.join().unwrap();
        });
        drop(tasks);
    }
}

/// The tasks are woken in the order in which this thread has polled them.
#[test]
fn a_waker_that_blocks_does_not_keep_another_runtime_from_taking_over() {
    assert_returns(|| {
        let [first, other] = [(); 2].map(|()| current_thread());
        let builder = Graceful::builder().drain_delay(Duration::from_secs(1));
        let graceful = first.block_on(async { builder.build().unwrap() });
        graceful.cleanup("step", BOUND, async {}).unwrap();
        let (waker, is_woken, release) = blocking();
        let tasks = drainings(&graceful, &mut Context::from_waker(&waker));
        let (report, stopper) = other.block_on(async {
            let run = graceful.run(graceful.drain_on(pending()));
            let stops = graceful.clone();
            let stopper = async {
                thread::spawn(move || {
                    drop(first);
                    stops.shutdown();
                })
            };
            tokio::join!(run, stopper)
        });
        assert_eq!(outcomes(&report), [TaskOutcome::Done], "{report}");
        is_woken.recv_timeout(BOUND).unwrap();
        drop(release);
        stopper.join().unwrap();
        drop(tasks);
    });
}
