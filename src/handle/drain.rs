//! The futures for a server's own graceful shutdown, and the registration of signal handlers.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    thread,
};

use super::graceful::Graceful;
use crate::{report::Trigger, shutdown::state::ClosingStage, waiting::watch_until::WatchUntil};

impl Graceful {
    /// Returns a future for axum's `with_graceful_shutdown`. It stops the service on SIGTERM or
    /// SIGINT (on Windows: Ctrl-C, Ctrl-Break, and the close, logoff and shutdown events), and
    /// resolves when the server may close.
    ///
    /// ```no_run
    /// # #[tokio::main]
    /// # async fn main() -> std::io::Result<()> {
    /// # let app = axum::Router::new();
    /// use tower_graceful::Graceful;
    ///
    /// let graceful = Graceful::new();
    /// let drain = graceful.drain(); // from here on the service handles SIGTERM
    /// let app = app.layer(graceful.layer());
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    /// axum::serve(listener, app).with_graceful_shutdown(drain).await
    /// # }
    /// ```
    ///
    /// The server may close when nothing is in flight any more, at the latest at the drain
    /// deadline. If connections are tracked, it may close up to 250 ms before the deadline, so that
    /// connections with nothing in flight are closed and only the others are cut. With
    /// [`keep_listening(false)`](crate::GracefulBuilder::keep_listening) the server may close when
    /// the delay is over, just before draining starts. Until something [triggers](Self#triggers) a stop, the future stays pending.
    ///
    /// This call installs the signal handlers, before the first poll of the future. Call it before
    /// a slow start-up, so that a SIGTERM during the start-up leads to an orderly exit. A signal
    /// that arrives before anything serves skips the delay, because there is no traffic to wait
    /// for, and a server started afterwards ends at once. Something serves when this future has
    /// been polled, [`run`](Self::run) or [`serve`](Self::serve) has begun, a tracked listener has
    /// been polled, a connection is tracked, a request was admitted, or the readiness probe has
    /// succeeded.
    ///
    /// The future may be polled again after it is ready, and stays ready. Dropping it has no
    /// effect; the handlers stay installed. axum keeps it in a task of its own. If you drop or abort axum's
    /// server before a stop, that task keeps the future, and signals still go to this service, until the runtime
    /// ends or the service is stopped. To stop the service, call [`shutdown`](Self::shutdown).
    ///
    /// If signal handlers cannot be installed, an error is logged, and signals end the process as
    /// before. [`handle_signals`](Self::handle_signals) returns that error.
    #[cfg(feature = "signal")]
    pub fn drain(&self) -> Drain {
        self.handle_signals_or_log();
        Drain::new(self, None)
    }

    /// As [`drain`](Self::drain), but the trigger is `future` instead of a signal. `future` is
    /// polled together with the returned future. When it resolves or panics, the shutdown starts.
    ///
    /// ```no_run
    /// # #[tokio::main]
    /// # async fn main() -> std::io::Result<()> {
    /// # let app = axum::Router::new();
    /// # let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    /// use tower_graceful::Graceful;
    ///
    /// let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    /// let graceful = Graceful::new();
    /// let drain = graceful.drain_on(async {
    ///     let _ = stopped.await;
    /// });
    /// axum::serve(listener, app.layer(graceful.layer()))
    ///     .with_graceful_shutdown(drain)
    ///     .await
    /// # }
    /// ```
    pub fn drain_on<F>(&self, future: F) -> Drain
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Drain::new(self, Some(Box::pin(future)))
    }

    /// Listens for signals from now on, as [`drain`](Self::drain) does. For a server that is
    /// started in another way, or later. Further calls change nothing. No runtime is needed.
    ///
    /// The first SIGTERM or SIGINT starts the shutdown. A further SIGTERM changes nothing, because
    /// `timeout`, process managers and wrappers send it twice. Each further SIGINT ends the current
    /// phase: first the delay; then the drain, which is cut; then the wait for workers and cleanup. Two
    /// SIGINTs within 100 ms count as one Ctrl-C that was delivered to the process and to its
    /// group. Every further signal is logged with its effect.
    ///
    /// A thread of this crate receives the signals, so they take effect even while handlers block
    /// every thread of the runtime. If several lifecycles listen, a signal goes to all of them that
    /// have not stopped. One second after the last of them has stopped, or as soon as it is
    /// dropped without having stopped, signals on Unix have their default action again: they end the process. During that
    /// second a signal counts as one that was meant for the shutdown. Exception on Linux: if the program
    /// handled or ignored a signal before the first call of this method in the process, the program does so
    /// again. If the program installs a handler later, the signal still ends the process.
    ///
    /// # Errors
    ///
    /// Returns an error if the operating system does not allow a signal handler, a socket or a
    /// thread. Signals then do what they did before. ([`drain`](Self::drain) and
    /// [`serve`](Self::serve) log such an error.)
    #[cfg(feature = "signal")]
    pub fn handle_signals(&self) -> std::io::Result<()> {
        self.shared().drive();
        self.shared().listen()
    }

    /// As [`handle_signals`](Self::handle_signals), for callers that can only log an error.
    #[cfg(feature = "signal")]
    pub(crate) fn handle_signals_or_log(&self) {
        if let Err(error) = self.handle_signals() {
            crate::events::no_signals(&error);
        }
    }
}

/// Resolves when the server may close. [`Graceful::drain`] and [`Graceful::drain_on`] make it.
#[must_use = "futures do nothing unless polled; give this one to `with_graceful_shutdown`"]
pub struct Drain {
    graceful: Graceful,
    cause: Cause,
    /// `None` before the first poll. Its count ends when the drain resolves or is dropped.
    waiting: Option<Waiting>,
    reached: WatchUntil<ClosingStage>,
}

/// A trigger in addition to signals and `shutdown()`.
type Cause = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

impl Drain {
    fn new(graceful: &Graceful, cause: Cause) -> Self {
        graceful.shared().drive();
        Self {
            graceful: graceful.clone(),
            cause,
            waiting: None,
            reached: WatchUntil::new(ClosingStage::Connections),
        }
    }
}

impl Future for Drain {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.waiting.is_none() {
            this.waiting = Some(Waiting::new(&this.graceful));
        }
        if let Some(future) = &mut this.cause {
            let unwinding = TriggerOnPanic(&this.graceful);
            let ready = future.as_mut().poll(cx).is_ready();
            drop(unwinding);
            if ready {
                this.cause = None;
                this.graceful.shared().trigger(Trigger::Future);
            }
        }
        let graceful = &this.graceful;
        ready!(this.reached.poll(cx, || graceful.shared().closing_stages()));
        this.cause = None;
        if let Some(waiting) = &mut this.waiting {
            waiting.end();
        }
        Poll::Ready(())
    }
}

/// Triggers the shutdown if the user's future panics. Such a future cannot resolve any more, and
/// the panic ends the task that polls it, which axum takes for the signal to stop.
struct TriggerOnPanic<'a>(&'a Graceful);

impl Drop for TriggerOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.shared().trigger(Trigger::Future);
        }
    }
}

/// Counts a server that waits for the drain.
struct Waiting(Option<Graceful>);

impl Waiting {
    fn new(graceful: &Graceful) -> Self {
        graceful.shared().drain_began();
        Self(Some(graceful.clone()))
    }

    fn end(&mut self) {
        if let Some(graceful) = self.0.take() {
            graceful.shared().drain_ended();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Drain")
            .field("graceful", &self.graceful)
            .finish_non_exhaustive()
    }
}
