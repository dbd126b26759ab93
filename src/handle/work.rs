//! What is registered to run beside requests: workers, hooks and cleanup steps.

use std::{
    borrow::Cow,
    error::Error,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{runtime, sync::oneshot};

use super::graceful::{Graceful, PhaseReached};
use crate::{
    phase::Phase,
    report::{TaskKind, Trigger},
    tasks::table::{self, Completion, Name},
};

impl Graceful {
    /// Spawns a worker: a task that lives as long as the service.
    ///
    /// The closure gets a [`Stop`], which has two moments. When draining starts, `Stop` itself
    /// resolves: stop taking work from outside. When nothing is in flight any more,
    /// [`stop.idle()`](Stop::idle) resolves: no request can add work any more, so finish what is
    /// queued and end.
    ///
    /// A queue that requests fill is served until the second moment, and then drained. Every job
    /// that was answered with 202 is done:
    ///
    /// ```
    /// use axum::{extract::State, http::StatusCode};
    /// use tokio::sync::mpsc;
    /// # use tower_graceful::{Graceful, RegisterError};
    /// # async fn process(_: String) {}
    ///
    /// async fn submit(State(jobs): State<mpsc::Sender<String>>, job: String) -> StatusCode {
    ///     match jobs.send(job).await {
    ///         Ok(()) => StatusCode::ACCEPTED,
    ///         Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), RegisterError> {
    /// # let graceful = Graceful::new();
    /// let (sender, mut jobs) = mpsc::channel(1000); // the sender is the router's state
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
    /// A worker that takes work from outside, such as a consumer of a message broker, ends at the
    /// first moment:
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
    /// Workers are joined after the last request and hold have ended, and before the first
    /// [cleanup](Self::cleanup) step, for at most
    /// [`worker_timeout`](crate::GracefulBuilder::worker_timeout). A worker that has not ended by
    /// then is cut: its future is dropped, and the outcome is [`Forced`](crate::Outcome::Forced). A
    /// worker that fails, panics or ends before the stop is logged at once and reported; it does not
    /// stop the service.
    ///
    /// Register one worker for each kind of work, when the service starts. For a single job use
    /// [`spawn`](Self::spawn). The future must be able to end: a future that only loops does not
    /// compile, because its output is not a [`Completion`].
    ///
    /// # Errors
    ///
    /// When workers have been told to stop already, and outside a runtime. Nothing is run then.
    pub fn worker<F, W>(
        &self,
        name: impl Into<Cow<'static, str>>,
        work: F,
    ) -> Result<(), RegisterError>
    where
        F: FnOnce(Stop) -> W + Send + 'static,
        W: Future<Output: Completion> + Send + 'static,
    {
        self.employ(name.into(), work, false)
    }

    /// Spawns a [worker](Self::worker) without which the service is of no use: if it ends before
    /// anything has asked for a stop, in whatever way, the service stops.
    ///
    /// The report's trigger is then [`WorkerEnded`](Trigger::WorkerEnded), and its row says how the worker ended.
    /// The outcome is [`CleanupFailed`](crate::Outcome::CleanupFailed) if it failed or panicked; a
    /// worker that ends in good order leaves it [`Clean`](crate::Outcome::Clean).
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
        self.employ(name.into(), work, true)
    }

    fn employ<F, W>(&self, name: Name, work: F, critical: bool) -> Result<(), RegisterError>
    where
        F: FnOnce(Stop) -> W + Send + 'static,
        W: Future<Output: Completion> + Send + 'static,
    {
        let Ok(runtime) = runtime::Handle::try_current() else {
            return Err(RegisterError::NoRuntime { name });
        };
        self.shared().drive();
        let shared = self.shared().clone();
        let stop = Stop::new(self);
        let spawn = move |permission: oneshot::Receiver<usize>| {
            runtime.spawn(async move {
                let Ok(key) = permission.await else { return };
                let outcome = table::outcome(async move { work(stop).await }).await;
                shared.task_ended(key, outcome);
                if critical {
                    // Changes nothing where a stop is under way.
                    shared.trigger(Trigger::WorkerEnded);
                }
            })
        };
        let in_time = self.phase() < Phase::Draining;
        if in_time && self.shared().work.employ(name.clone(), spawn) {
            Ok(())
        } else {
            Err(self.too_late(name))
        }
    }

    /// Registers a hook that runs when the lame-duck phase begins, beside it: to deregister from
    /// service discovery, or to stop a consumer.
    ///
    /// It is dropped when `timeout` or the delay is over, whichever comes first; where there is no
    /// delay, at its first wait. Several hooks run beside one another.
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
    /// # Errors
    ///
    /// When a stop has been asked for already.
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

    /// Registers a cleanup step: to close the database, or to flush the logs. Steps run after the
    /// last request, hold and worker has gone, one at a time, in the order registered, and before
    /// the service counts as [stopped](Self::stopped).
    ///
    /// A step that does not end within `timeout` is dropped, and like one that fails or panics it is
    /// reported as [`CleanupFailed`](crate::Outcome::CleanupFailed) and does not stop the rest. The
    /// share of the grace period that is kept for cleanup cannot be used up by a drain; where the
    /// steps' timeouts are more than what is left of it, each has its part in proportion.
    ///
    /// Steps run on tokio's runtime and within the life of the process: await
    /// [`run`](Self::run), [`serve`](Self::serve) or [`stopped`](Self::stopped) before `main`
    /// returns.
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
    /// # Errors
    ///
    /// When the service is closing already, so that cleaning up may have begun.
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
        let job = Box::pin(table::outcome(future));
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

/// Tells a [worker](Graceful::worker) to stop. It has two moments:
///
/// | moment | wait for it with | what a worker does |
/// |---|---|---|
/// | draining has begun | the `Stop` itself, or [`draining`](Self::draining) | takes no more work from outside |
/// | nothing is in flight any more | [`idle`](Self::idle) | finishes the queue that requests have filled, and ends |
///
/// Clones resolve at the same moments. Waiting is cancel safe: a future that is dropped and made
/// anew, or polled again after it was ready, misses nothing.
#[derive(Clone, Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Stop {
    graceful: Graceful,
    draining: PhaseReached,
}

impl Stop {
    fn new(graceful: &Graceful) -> Self {
        Self {
            graceful: graceful.clone(),
            draining: PhaseReached::at_once(graceful, Phase::Draining),
        }
    }

    /// Resolves when draining has begun, as the `Stop` itself does: requests in flight go on, new
    /// requests are refused.
    ///
    /// [`drain_spread`](crate::GracefulBuilder::drain_spread) does not delay it.
    pub fn draining(&self) -> PhaseReached {
        self.draining.clone()
    }

    /// Resolves when no request and no hold is in flight any more, and workers are about to be
    /// joined: what a request could add to a queue has been added.
    ///
    /// Where the drain does not end by itself, this resolves when it is cut, at the drain deadline or
    /// by a further SIGINT. A handler that was cut may run for a moment longer, so close the queue
    /// before you drain it. Requests that the drain does not wait for, those of
    /// [`probes`](Graceful::probes) and of routes outside the layer, may also come later.
    ///
    /// A worker that waits for this is still subject to
    /// [`worker_timeout`](crate::GracefulBuilder::worker_timeout), which begins afterwards.
    pub fn idle(&self) -> PhaseReached {
        PhaseReached::at_once(&self.graceful, Phase::Closing)
    }

    /// Whether draining has begun.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.graceful.phase() >= Phase::Draining
    }
}

impl Future for Stop {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.draining).poll(cx)
    }
}

/// Work that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegisterError {
    /// The service has come too far for it to be done.
    TooLate {
        /// The name it was given.
        name: Cow<'static, str>,
        /// How far the service has come.
        phase: Phase,
    },
    /// A worker has to be spawned, and there is no tokio runtime here.
    NoRuntime {
        /// The name it was given.
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
                "worker {name:?} was registered outside a tokio runtime, which is to run it"
            ),
        }
    }
}

impl Error for RegisterError {}
