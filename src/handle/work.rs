//! The registration of workers, hooks and cleanup steps.
//!
//! Most of this file is documentation of public items.

use std::{
    borrow::Cow,
    error::Error,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::runtime;

use super::graceful::{Graceful, PhaseReached};
use crate::{
    phase::Phase,
    report::{TaskKind, Trigger},
    shutdown::{Spawned, has_shut_down},
    tasks::{
        completion::{self, Completion},
        list::Name,
    },
};

impl Graceful {
    /// Spawns a worker: a task that runs as long as the service.
    ///
    /// The closure gets a [`Stop`], which tells the worker of two moments. When draining starts, the
    /// `Stop` itself resolves: stop taking work from outside. When nothing is in flight any more,
    /// [`stop.idle()`](Stop::idle) resolves: no request can add work any more, so finish the queued
    /// work and end.
    ///
    /// A worker whose queue is filled by requests processes jobs until the second moment, and then empties
    /// the queue. Every job
    /// that was answered with 202 is done, if the backlog takes no longer than
    /// [`worker_timeout`](crate::GracefulBuilder::worker_timeout); so make the channel no longer than
    /// what the worker can finish in that time:
    ///
    /// ```
    /// use axum::{extract::State, http::StatusCode};
    /// use tokio::sync::mpsc;
    /// # use tower_graceful::{Graceful, RegisterError};
    /// # async fn process(_: String) {}
    ///
    /// async fn submit(State(jobs): State<mpsc::Sender<String>>, job: String) -> StatusCode {
    ///     match jobs.try_send(job) {
    ///         Ok(()) => StatusCode::ACCEPTED,
    ///         Err(_) => StatusCode::SERVICE_UNAVAILABLE, // the queue is full
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), RegisterError> {
    /// # let graceful = Graceful::new();
    /// let (sender, mut jobs) = mpsc::channel(100); // the sender is the router's state
    /// graceful.worker("jobs", |stop| async move {
    ///     let mut idle = stop.idle();
    ///     loop {
    ///         tokio::select! {
    ///             () = &mut idle => break,
    ///             Some(job) = jobs.recv() => process(job).await,
    ///         }
    ///     }
    ///     jobs.close(); // after a forced cut, a handler may still be sending
    ///     while let Some(job) = jobs.recv().await {
    ///         process(job).await;
    ///     }
    /// })?;
    /// # submit(State(sender), "job".to_owned()).await;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// If `process` may panic, use [`critical_worker`](Self::critical_worker): otherwise the service would go on
    /// without its worker, and lose the jobs in the queue.
    ///
    /// A worker that takes work from outside, such as a consumer of a message broker, ends at the
    /// first moment. `next_message` must be cancel-safe, because it is dropped then:
    ///
    /// ```
    /// # use tower_graceful::{Graceful, RegisterError};
    /// # async fn next_message() -> u32 { 1 }
    /// # async fn handle(_: u32) {}
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), RegisterError> {
    /// # let graceful = Graceful::new();
    /// graceful.worker("consumer", |mut stop| async move {
    ///     loop {
    ///         tokio::select! {
    ///             () = &mut stop => break,
    ///             message = next_message() => handle(message).await,
    ///         }
    ///     }
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The service waits for workers after the last request and hold have ended and before the
    /// first [cleanup](Self::cleanup) step, for at most
    /// [`worker_timeout`](crate::GracefulBuilder::worker_timeout). A worker that has not ended by
    /// then is cut: its future is dropped, and the outcome is [`Forced`](crate::Outcome::Forced). A
    /// worker that ends, fails or panics before the stop is logged at once and reported; it does
    /// not stop the service. A worker that is dropped because its runtime shuts down is logged and reported in the same
    /// way, as cut.
    ///
    /// Register one worker for each kind of work when the service starts. For a single job use
    /// [`spawn`](Self::spawn).
    ///
    /// The future must be able to end. A future that only loops does not compile, because its output is not a
    /// [`Completion`]. Await the `Stop` in the loop, as above, and leave the loop:
    ///
    /// ```compile_fail,E0277
    /// # use tower_graceful::{Graceful, RegisterError};
    /// # async fn refresh() {}
    /// # fn main() -> Result<(), RegisterError> {
    /// # let graceful = Graceful::new();
    /// graceful.worker("cache", |_stop| async {
    ///     loop {
    ///         refresh().await; // in a `select!` with `&mut stop`, it could be stopped
    ///     }
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// In editions before 2024 the error is that of a lint. Compilers before Rust 1.92 only warn there.
    ///
    /// # Errors
    ///
    /// Returns an error, and runs nothing, if workers have already been told to stop, outside a runtime, or in a
    /// runtime that has shut down.
    pub fn worker<F, W>(
        &self,
        name: impl Into<Cow<'static, str>>,
        work: F,
    ) -> Result<(), RegisterError>
    where
        F: FnOnce(Stop) -> W + Send + 'static,
        W: Future<Output: Completion> + Send + 'static,
    {
        self.register_worker(name.into(), work, false)
    }

    /// Spawns a [worker](Self::worker) that the service cannot do without: if it ends before any
    /// trigger, normally, with an error or by a panic, the service stops. The shutdown of its runtime is not
    /// such an end.
    ///
    /// ```
    /// # use tower_graceful::{Graceful, RegisterError};
    /// # async fn consume() -> Result<(), std::io::Error> { Ok(()) }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), RegisterError> {
    /// # let graceful = Graceful::new();
    /// graceful.critical_worker("consumer", |stop| async move {
    ///     tokio::select! {
    ///         () = stop => Ok(()),
    ///         result = consume() => result,
    ///     }
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The trigger in the report is then [`WorkerEnded`](Trigger::WorkerEnded), and the worker's
    /// row shows how it ended. The outcome is [`CleanupFailed`](crate::Outcome::CleanupFailed) if
    /// it failed or panicked. If it ended without an error, the outcome can still be
    /// [`Clean`](crate::Outcome::Clean). If the worker is dropped because its runtime shuts down, it has not ended, and
    /// does not start the stop.
    ///
    /// # Errors
    ///
    /// As those of [`worker`](Self::worker).
    pub fn critical_worker<F, W>(
        &self,
        name: impl Into<Cow<'static, str>>,
        work: F,
    ) -> Result<(), RegisterError>
    where
        F: FnOnce(Stop) -> W + Send + 'static,
        W: Future<Output: Completion> + Send + 'static,
    {
        self.register_worker(name.into(), work, true)
    }

    fn register_worker<F, W>(
        &self,
        name: Name,
        work: F,
        critical: bool,
    ) -> Result<(), RegisterError>
    where
        F: FnOnce(Stop) -> W + Send + 'static,
        W: Future<Output: Completion> + Send + 'static,
    {
        let runtime = runtime::Handle::try_current().ok();
        let Some(runtime) = runtime.filter(|it| !has_shut_down(it)) else {
            return Err(RegisterError::NoRuntime { name });
        };
        let shared = self.shared();
        shared.drive();
        let in_time = self.phase() < Phase::Draining;
        let Some(key) = in_time
            .then(|| shared.work.add_worker(name.clone()))
            .flatten()
        else {
            return Err(self.too_late(name));
        };
        let draining = PhaseReached::at_once(self, Phase::Draining);
        let stop = Stop { draining };
        let spawned = Spawned::worker(shared.clone(), key);
        // A runtime that shuts down meanwhile drops the worker here.
        let handle = runtime.spawn(async move {
            let outcome = completion::outcome(async move { work(stop).await }).await;
            spawned.end(outcome);
            if critical {
                // Has no effect if a stop is under way.
                spawned.shared.trigger(Trigger::WorkerEnded);
            }
        });
        shared.work.spawned(key, handle.abort_handle());
        Ok(())
    }

    /// Registers a hook that runs when the lame-duck phase begins. To deregister from service
    /// discovery, for example, or to stop a consumer.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_graceful::{Graceful, RegisterError};
    /// # async fn deregister() -> Result<(), std::io::Error> { Ok(()) }
    /// # let graceful = Graceful::new();
    /// graceful.on_lame_duck("deregister", Duration::from_secs(2), deregister())?;
    /// # Ok::<(), RegisterError>(())
    /// ```
    ///
    /// The hook runs alongside the lame-duck phase and does not prolong it. It is dropped when
    /// `timeout` or the delay is over, whichever comes first; without a delay, at its first `await`
    /// that is pending. Several hooks run concurrently. A hook that is dropped is reported as cut and does not
    /// change the outcome. A hook that fails or panics makes it [`CleanupFailed`](crate::Outcome::CleanupFailed).
    ///
    /// # Errors
    ///
    /// Returns an error if a stop has already been triggered.
    pub fn on_lame_duck<F>(
        &self,
        name: impl Into<Cow<'static, str>>,
        timeout: Duration,
        hook: F,
    ) -> Result<(), RegisterError>
    where
        F: Future<Output: Completion> + Send + 'static,
    {
        let in_time = self.phase() == Phase::Serving;
        self.register(TaskKind::LameDuck, name.into(), timeout, hook, in_time)
    }

    /// Registers a cleanup step. To close the database, for example, or to flush logs.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_graceful::{Graceful, RegisterError};
    /// # struct Pool;
    /// # impl Pool { async fn close(self) {} }
    /// # let (graceful, pool) = (Graceful::new(), Pool);
    /// graceful.cleanup("database", Duration::from_secs(2), async move {
    ///     pool.close().await;
    /// })?;
    /// # Ok::<(), RegisterError>(())
    /// ```
    ///
    /// Steps run after the last request, hold and worker has ended, one at a time, in the order of
    /// their registration, and before the service counts as [stopped](Self::stopped).
    ///
    /// A step that does not end within `timeout` is dropped. A step that is dropped, fails or
    /// panics makes the outcome [`CleanupFailed`](crate::Outcome::CleanupFailed), and the following
    /// steps still run. A drain cannot use up the share of the grace period that is reserved for
    /// cleanup. If the sum of the timeouts is more than the time left until the margin, each step gets
    /// a proportional part.
    ///
    /// Steps run on a tokio runtime and only while the process lives: await [`run`](Self::run),
    /// [`serve`](Self::serve) or [`stopped`](Self::stopped) before `main` returns.
    ///
    /// # Errors
    ///
    /// Returns an error if the service is already closing, so that cleanup may have begun.
    pub fn cleanup<F>(
        &self,
        name: impl Into<Cow<'static, str>>,
        timeout: Duration,
        step: F,
    ) -> Result<(), RegisterError>
    where
        F: Future<Output: Completion> + Send + 'static,
    {
        let in_time = self.phase() < Phase::Closing;
        self.register(TaskKind::Cleanup, name.into(), timeout, step, in_time)
    }

    fn register<F>(
        &self,
        kind: TaskKind,
        name: Name,
        timeout: Duration,
        future: F,
        in_time: bool,
    ) -> Result<(), RegisterError>
    where
        F: Future<Output: Completion> + Send + 'static,
    {
        self.shared().drive();
        let job = Box::pin(completion::outcome(future));
        if in_time
            && self
                .shared()
                .work
                .register(kind, name.clone(), timeout, job)
        {
            Ok(())
        } else {
            Err(self.too_late(name))
        }
    }

    fn too_late(&self, name: Name) -> RegisterError {
        RegisterError::TooLate {
            name,
            phase: self.phase(),
        }
    }
}

/// Notifies a [worker](Graceful::worker) that it should stop. There are two moments:
///
/// | moment | wait for it with | what a worker does |
/// |---|---|---|
/// | draining has begun | the `Stop` itself, or [`draining`](Self::draining) | takes no more work from outside |
/// | nothing is in flight any more | [`idle`](Self::idle) | finishes the queue that requests have filled, and ends |
///
/// Clones resolve at the same moments. Waiting is cancel safe: a future that is dropped and made
/// again, or polled again after it was ready, misses nothing.
#[derive(Clone, Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Stop {
    draining: PhaseReached,
}

impl Stop {
    /// Returns a future that resolves when draining has begun, as the `Stop` itself does. Requests
    /// in flight go on, and new requests are rejected.
    ///
    /// [`drain_spread`](crate::GracefulBuilder::drain_spread) does not delay it.
    pub fn draining(&self) -> PhaseReached {
        self.draining.clone()
    }

    /// Returns a future that resolves when no request and no hold is in flight any more, and the
    /// service is about to wait for its workers. From then on no request that was in flight adds work
    /// to a queue.
    ///
    /// If the drain does not end by itself, this resolves when it is cut, at the drain deadline or
    /// by a further SIGINT. A handler that was cut may run for a moment longer, so close the queue
    /// before you empty it. Requests that the drain does not wait for, to
    /// [`probes`](Graceful::probes) and to routes outside the layer, may also come later.
    ///
    /// [`worker_timeout`](crate::GracefulBuilder::worker_timeout) also applies to a worker that
    /// waits for this. The timeout begins after this future has resolved.
    pub fn idle(&self) -> PhaseReached {
        PhaseReached::at_once(&self.draining.graceful, Phase::Closing)
    }

    /// Whether draining has begun.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.draining.graceful.phase() >= Phase::Draining
    }
}

impl Future for Stop {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.draining).poll(cx)
    }
}

/// The reason why a task was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterError {
    /// The task was registered too late to be run.
    TooLate {
        /// The name of the task.
        name: Cow<'static, str>,
        /// The phase of the service.
        phase: Phase,
    },
    /// A worker was registered outside a tokio runtime, which is needed to spawn it, or in a runtime that has shut
    /// down.
    NoRuntime {
        /// The name of the task.
        name: Cow<'static, str>,
    },
}

impl fmt::Display for RegisterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLate { name, phase } => write!(
                f,
                "{name:?} was registered too late: the service is {phase} already"
            ),
            Self::NoRuntime { name } => write!(
                f,
                "worker {name:?} was registered outside a tokio runtime, or in one that has shut down; \
                 it needs a runtime to run"
            ),
        }
    }
}

impl Error for RegisterError {}
