//! `Graceful::run`: runs a server until the service has stopped, and returns the report.

use std::{future::poll_fn, pin::pin, task::Poll};

use crate::{
    events,
    handle::graceful::Graceful,
    phase::Phase,
    report::Report,
    shutdown::state::{ClosingStage, ServerEnd},
    tasks::completion::{self, Completion},
    waiting::shielded_wait::ShieldedWait,
};

impl Graceful {
    /// Runs `server` until the service has stopped, and returns the [`Report`].
    ///
    /// `server` is any future that ends after its shutdown signal: axum's `serve`, hyper or tonic with
    /// [`drain`](Self::drain) or [`drain_on`](Self::drain_on) as the signal. `run` itself handles no signals,
    /// and stops the service only if the server ends. It does three things that `server.await` does not:
    ///
    /// - the service counts as [stopped](Self::stopped) only when the server has ended, with all
    ///   its bytes sent;
    /// - a server that does not end is dropped shortly after the drain deadline, and the report says
    ///   [`Forced`](crate::Outcome::Forced). Handlers that the server owns are dropped with it, before the
    ///   first cleanup step. Further SIGINTs can drop the server earlier: if one of them ends the wait for
    ///   it, the report says [`Abandoned`](crate::Outcome::Abandoned), and no cleanup step runs;
    /// - a server that ends before a stop was requested, whether normally, with an error or by a panic,
    ///   stops the service, and the report gives the reason. A panic is propagated.
    ///
    /// Several servers may run on one `Graceful`: each `run` waits for all of them and returns the
    /// same report. If a stop was requested before the first poll of `run`, by a signal or a
    /// [`shutdown`](Self::shutdown) during start-up, the server is dropped without being polled. Dropping the future of `run` drops the server and triggers nothing.
    ///
    /// Do not pass a server to `run` that ends on [`stopped`](Self::stopped), such as one that serves
    /// metrics until the end: the two would wait for each other until the deadline. Spawn such a server,
    /// and await it after `run`.
    ///
    /// ```no_run
    /// # #[tokio::main]
    /// # async fn main() -> std::io::Result<std::process::ExitCode> {
    /// # let app = axum::Router::new();
    /// use tower_graceful::Graceful;
    ///
    /// let graceful = Graceful::new();
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    /// let server = axum::serve(graceful.listener(listener), app.layer(graceful.layer()))
    ///     .with_graceful_shutdown(graceful.drain());
    /// let report = graceful.run(server).await;
    /// println!("{report}");
    /// Ok(report.into())
    /// # }
    /// ```
    pub fn run<S>(&self, server: S) -> impl Future<Output = Report> + use<S>
    where
        S: IntoFuture,
        S::Output: Completion,
    {
        let graceful = self.clone();
        let server = server.into_future();
        async move {
            if graceful.phase() == Phase::Serving {
                graceful.run_server(server).await;
            } else {
                drop(server);
                // Records a server that has ended. If there is no other server, the
                // lame-duck phase ends at once.
                drop(ServerGuard::take(&graceful));
            }
            graceful.stopped().await;
            let report = graceful.shared().report().unwrap_or_else(|| {
                unreachable!("the report is written before the phase becomes Stopped")
            });
            // The process may exit as soon as this returns. `report` takes the state lock, and the last
            // events are queued before that lock is released, so `flush` includes them.
            events::flush(graceful.plan().margin);
            report
        }
    }

    /// Polls the server until it ends or the service stops waiting for it.
    async fn run_server(&self, server: impl Future<Output: Completion>) {
        let mut guard = ServerGuard::take(self);
        let mut closing_stages = self.shared().closing_stages();
        let given_up = closing_stages.wait_for(|stage| *stage == ClosingStage::Servers);
        let mut given_up = pin!(ShieldedWait::new(given_up));
        let mut stopped = pin!(ShieldedWait::new(self.stopped()));
        let mut server = pin!(server);
        let end = poll_fn(|cx| {
            // The guard reports this end if the server panics, or its error when it is read or dropped.
            // The wait below panics if the driver's runtime has ended and this one has no timers.
            guard.end = ServerEnd::Failed("the server panicked".to_owned());
            if let Poll::Ready(output) = server.as_mut().poll(cx) {
                let error = completion::error(output);
                return Poll::Ready(error.map_or(ServerEnd::Finished, ServerEnd::Failed));
            }
            // If the driver's runtime ends, this wait is woken and spawns a driver in the runtime of this
            // task. When it is over, `given_up` is over too, but a waker that blocks may keep its channel from
            // waking this task.
            let has_stopped = stopped.as_mut().poll(cx).is_ready();
            guard.end = ServerEnd::Dropped;
            if has_stopped || given_up.as_mut().poll(cx).is_ready() {
                return Poll::Ready(ServerEnd::Dropped);
            }
            Poll::Pending
        })
        .await;
        guard.end = end;
    }
}

/// Counts a running server. Dropping the guard reports how the server ended.
struct ServerGuard {
    graceful: Graceful,
    end: ServerEnd,
}

impl ServerGuard {
    fn take(graceful: &Graceful) -> Self {
        graceful.shared().server_began();
        Self {
            graceful: graceful.clone(),
            end: ServerEnd::Dropped,
        }
    }
}

impl Drop for ServerGuard {
    fn drop(&mut self) {
        self.graceful.shared().server_ended(&self.end);
    }
}
