//! The futures for a server's own graceful shutdown, and the listening for signals.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    thread,
};

use super::graceful::Graceful;
use crate::{report::Trigger, shutdown::state::ClosingStage, waiting::watch_until::WatchUntil};

impl Graceful {
    /// A future for axum's `with_graceful_shutdown` that stops the service on SIGTERM or SIGINT
    /// (on Windows Ctrl-C, Ctrl-Break, and the close, logoff and shutdown events) and resolves
    /// when the server may close.
    ///
    /// That is when nothing is in flight any more, at the drain deadline at the latest, and where
    /// connections are tracked up to 250 ms before it, so that those on which nothing is in flight
    /// are closed and only the others are cut. With
    /// [`keep_listening(false)`](crate::GracefulBuilder::keep_listening) it is when draining starts.
    /// Without a signal it is pending for ever, unless [`shutdown`](Self::shutdown) is called.
    ///
    /// The handlers are installed by this call, not by the first poll: a SIGTERM during a slow
    /// start-up leads to an orderly exit if this was called before it. A signal that comes before
    /// anything serves finds nobody to wait for and skips the delay, so that a server started
    /// afterwards ends at once. Something serves when this future has been polled, a connection is
    /// tracked, a request was let in, or readiness has said yes.
    ///
    /// The future may be polled again after it is ready, and stays ready. Dropping it has no
    /// effect; the handlers stay.
    ///
    /// ```no_run
    /// # #[tokio::main]
    /// # async fn main() -> std::io::Result<()> {
    /// # let app = axum::Router::new();
    /// use tower_graceful::Graceful;
    ///
    /// let graceful = Graceful::new();
    /// let drain = graceful.drain(); // from here on SIGTERM is ours
    /// let app = app.layer(graceful.layer());
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    /// axum::serve(listener, app).with_graceful_shutdown(drain).await
    /// # }
    /// ```
    ///
    /// Where signals cannot be listened for, an error event is logged and they end the process as
    /// before; [`handle_signals`](Self::handle_signals) returns the error.
    #[cfg(feature = "signal")]
    pub fn drain(&self) -> Drain {
        self.handle_signals_or_log();
        Drain::new(self, Cause::Nothing)
    }

    /// As [`drain`](Self::drain), but what stops the service is `future`, not a signal: it is
    /// polled with the drain, and once it resolves, or panics, the timeline starts.
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
        Drain::new(self, Cause::Future(Box::pin(future)))
    }

    /// Listens for signals from now on, as [`drain`](Self::drain) does: for a server that is
    /// started by other means, or later. Calling it again changes nothing. It needs no runtime.
    ///
    /// The first SIGTERM or SIGINT starts the timeline. A further SIGTERM changes nothing, however
    /// often and however soon it comes: `timeout`, process managers and wrappers send it twice. Each
    /// further SIGINT ends the present phase: the delay, then the drain, which is then cut, then the
    /// wait for the cleanup. A SIGINT within 100 ms of another is the same Ctrl-C, delivered to the
    /// process and to its group. Every further signal is logged with what it did.
    ///
    /// Signals are received by a thread of this crate's own, so they take effect even while handlers
    /// block every thread of the runtime. Where several lifecycles listen, a signal is for all that
    /// have not stopped. A second after the last of them has stopped, or as soon as it is gone, a signal
    /// does on unix what it does by default: it ends the process. Until then it is taken for one of the
    /// shutdown's own.
    ///
    /// # Errors
    ///
    /// When the operating system refuses a signal handler, a socket or a thread. Signals end the
    /// process as before then. ([`drain`](Self::drain) and [`serve`](Self::serve) log such an error.)
    #[cfg(feature = "signal")]
    pub fn handle_signals(&self) -> std::io::Result<()> {
        self.shared().drive();
        self.shared().listen()
    }

    /// As [`handle_signals`](Self::handle_signals), where an error can only be logged.
    #[cfg(feature = "signal")]
    pub(crate) fn handle_signals_or_log(&self) {
        if let Err(error) = self.handle_signals() {
            crate::events::no_signals(&error);
        }
    }
}

/// Resolves when the server may close. Made by [`Graceful::drain`] and [`Graceful::drain_on`].
#[must_use = "futures do nothing unless polled; give this one to `with_graceful_shutdown`"]
pub struct Drain {
    graceful: Graceful,
    cause: Cause,
    /// From the first poll to the end.
    waiting: Option<Waiting>,
    reached: WatchUntil<ClosingStage>,
}

/// What stops the service, apart from signals and `shutdown()`.
enum Cause {
    Future(Pin<Box<dyn Future<Output = ()> + Send>>),
    Nothing,
}

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
        if let Cause::Future(future) = &mut this.cause {
            let unwinding = TriggerOnPanic(&this.graceful);
            let ready = future.as_mut().poll(cx).is_ready();
            drop(unwinding);
            if ready {
                this.cause = Cause::Nothing;
                this.graceful.shared().trigger(Trigger::Future);
            }
        }
        let graceful = &this.graceful;
        ready!(this.reached.poll(cx, || graceful.shared().closing_stages()));
        this.cause = Cause::Nothing;
        if let Some(waiting) = &mut this.waiting {
            waiting.end();
        }
        Poll::Ready(())
    }
}

/// A future that panics will never say when to stop, and whoever polls it is about to: axum takes
/// the end of the task for the signal.
struct TriggerOnPanic<'a>(&'a Graceful);

impl Drop for TriggerOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.shared().trigger(Trigger::Future);
        }
    }
}

/// A server that waits for the drain.
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
