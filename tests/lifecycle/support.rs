//! Helpers shared by the tests.

use std::{
    convert::Infallible,
    future::{self, pending},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::{
    runtime,
    task::JoinHandle,
    time::{Instant, sleep},
};
use tower::{Layer, Service, service_fn};
use tower_graceful::{Completion, Drain, Graceful, GracefulBuilder, GracefulFuture, Report};

/// The delay of [`graceful`].
pub(crate) const DELAY: Duration = Duration::from_secs(5);
/// When a shutdown of [`graceful`] reaches its drain deadline, from the trigger.
pub(crate) const DEADLINE: Duration = Duration::from_secs(15);
/// How long work that was cut may take to end.
pub(crate) const LET_GO: Duration = Duration::from_millis(250);

pub(crate) const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(crate) const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A delay of 5 s, a drain of 10 s.
pub(crate) fn plan() -> GracefulBuilder {
    Graceful::builder().drain_delay(DELAY).drain_timeout(s(10))
}

pub(crate) fn graceful() -> Graceful {
    plan().build().unwrap()
}

/// As [`graceful`], with no delay: the drain deadline is 10 s after the trigger.
pub(crate) fn without_delay() -> Graceful {
    plan().drain_delay(Duration::ZERO).build().unwrap()
}

type Handler = future::Pending<Result<Response<Empty<Bytes>>, Infallible>>;
pub(crate) type InFlight = GracefulFuture<Handler, Empty<Bytes>>;

/// A request whose handler never answers. If it was admitted, it is in flight until it is dropped.
#[must_use = "dropping it ends the request"]
pub(crate) fn request(graceful: &Graceful) -> InFlight {
    graceful
        .layer()
        .layer(service_fn(|_: Request<Empty<Bytes>>| pending()))
        .call(Request::new(Empty::new()))
}

/// Sends a request that is answered at once and read to its end.
pub(crate) async fn quick_request(graceful: &Graceful) -> http::StatusCode {
    let mut service = graceful
        .layer()
        .layer(service_fn(|_: Request<Empty<Bytes>>| {
            future::ready(Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())))
        }));
    let response = service.call(Request::new(Empty::new())).await.unwrap();
    response.status()
}

/// A server: a future that ends when its drain does.
pub(crate) fn server(graceful: &Graceful) -> Drain {
    graceful.drain_on(pending())
}

/// Runs `server`, and returns once it serves. The handle resolves to the report.
pub(crate) async fn serve<S>(graceful: &Graceful, server: S) -> JoinHandle<Report>
where
    S: Future<Output: Completion> + Send + 'static,
{
    let run = tokio::spawn(graceful.run(server));
    let_others_run().await;
    run
}

/// A future that records when it is polled and when it is dropped.
pub(crate) struct Watched<F> {
    future: Pin<Box<F>>,
    log: WatchLog,
}

#[derive(Clone, Default)]
pub(crate) struct WatchLog {
    polled: Arc<AtomicBool>,
    dropped: Arc<Mutex<Option<Instant>>>,
}

impl WatchLog {
    pub(crate) fn polled(&self) -> bool {
        self.polled.load(Ordering::Relaxed)
    }

    pub(crate) fn dropped(&self) -> Option<Instant> {
        *self.dropped.lock().unwrap()
    }
}

pub(crate) fn watched<F: Future>(future: F) -> (Watched<F>, WatchLog) {
    let log = WatchLog::default();
    let watched = Watched {
        future: Box::pin(future),
        log: log.clone(),
    };
    (watched, log)
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.log.polled.store(true, Ordering::Relaxed);
        self.future.as_mut().poll(cx)
    }
}

impl<F> Drop for Watched<F> {
    fn drop(&mut self) {
        *self.log.dropped.lock().unwrap() = Some(Instant::now());
    }
}

/// Lets all ready tasks run, without moving the clock.
pub(crate) async fn let_others_run() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

/// Lets time pass, and lets everything happen that is due at its end.
pub(crate) async fn pass(time: Duration) {
    sleep(time).await;
    let_others_run().await;
}

pub(crate) fn paused_runtime() -> runtime::Runtime {
    runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
}

/// Waits until another thread has reached a condition. Returns whether it has.
pub(crate) fn comes(condition: impl Fn() -> bool) -> bool {
    let begun = std::time::Instant::now();
    while !condition() {
        if begun.elapsed() > s(20) {
            return false;
        }
        thread::sleep(ms(1));
    }
    true
}

/// Runs a check that might hang on another thread, so that a hang is a failure.
pub(crate) fn does_not_hang(test: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match ended.recv_timeout(s(20)) {
        Ok(()) => thread.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs"),
        // The check panicked: so does the test.
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
    }
}
