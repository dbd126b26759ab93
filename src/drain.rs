//! The futures for a server's own graceful shutdown, and the listening for signals.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    thread,
};

use crate::{handle::Graceful, reached::Reached, report::Trigger, timeline::Edge};

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
    /// # Panics
    ///
    /// Inside a runtime that was built without IO, which signals need. Outside a runtime it does
    /// not panic; the handlers are then installed by the first poll.
    #[cfg(feature = "signal")]
    pub fn drain(&self) -> Drain {
        self.handle_signals();
        Drain::new(self, Cause::Signals)
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
    /// started by other means, or later. Calling it again changes nothing.
    ///
    /// The first signal starts the timeline. Each further one skips what is left of the present
    /// phase: the delay, then the drain, which is then cut, then the wait for what was cut. A
    /// SIGINT within 100 ms of another is the same Ctrl-C, delivered to the process and to its
    /// group.
    ///
    /// From then on a signal no longer ends the process by itself. On unix it does so again a second
    /// after the service has stopped, so that whatever `main` does then can be interrupted; but not
    /// once the lifecycle is gone, because tokio does not give its handlers back. So keep a handle,
    /// or what else [keeps it alive](Graceful), for as long as signals are to be answered. Where the
    /// operating system refuses the handlers, an error event is logged and signals end the process
    /// as before.
    ///
    /// # Panics
    ///
    /// Inside a runtime that was built without IO. Outside a runtime it does nothing.
    #[cfg(feature = "signal")]
    pub fn handle_signals(&self) {
        use crate::{events, signals::Signals};

        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        self.shared().drive();
        if !self.shared().claim_signals() {
            return;
        }
        let claim = SignalsClaim(self.shared().downgrade());
        match Signals::install() {
            Ok(signals) => {
                #[cfg(unix)]
                if let Some(watchdog) = self.shared().watchdog.get() {
                    watchdog.watch_signals();
                }
                drop(runtime.spawn(listen(signals, claim, self.subscribe())));
            }
            Err(error) => events::no_signals(&error),
        }
    }
}

/// Passes signals on for as long as the lifecycle lives.
#[cfg(feature = "signal")]
async fn listen(
    mut signals: crate::signals::Signals,
    claim: SignalsClaim,
    mut phases: tokio::sync::watch::Receiver<crate::phase::Phase>,
) {
    loop {
        let trigger = tokio::select! {
            trigger = signals.next() => trigger,
            gone = phases.changed() => match gone {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        crate::events::signal(trigger);
        match claim.0.upgrade() {
            Some(shared) if shared.is_long_stopped() => crate::signals::default_action(trigger),
            Some(shared) => shared.signal(trigger),
            None => return,
        }
    }
}

/// Given back when the task that listens ends, with its runtime for example: another call of
/// `handle_signals` then listens anew.
#[cfg(feature = "signal")]
struct SignalsClaim(crate::timeline::WeakShared);

#[cfg(feature = "signal")]
impl Drop for SignalsClaim {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            shared.release_signals();
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
    reached: Reached<Edge>,
}

/// What stops the service, apart from `shutdown()`.
enum Cause {
    #[cfg(feature = "signal")]
    Signals,
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
            reached: Reached::new(Edge::Connections),
        }
    }
}

impl Future for Drain {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.waiting.is_none() {
            this.waiting = Some(Waiting::new(&this.graceful));
            #[cfg(feature = "signal")]
            if matches!(this.cause, Cause::Signals) {
                // Outside a runtime `drain` could not.
                this.graceful.handle_signals();
            }
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
        ready!(this.reached.poll(cx, || graceful.shared().edges()));
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
