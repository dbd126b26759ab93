//! Running a server to its end, and the report of it.

use std::{future::poll_fn, pin::pin, task::Poll};

use crate::{
    events,
    handle::graceful::Graceful,
    phase::Phase,
    report::Report,
    shutdown::state::{ClosingStage, ServerEnd},
    tasks::table::{self, Completion},
};

impl Graceful {
    /// Runs `server` until the service has stopped, and reports.
    ///
    /// `server` is any future that ends once it has been told to: axum's `serve` or hyper or tonic
    /// with [`drain`](Self::drain) or [`drain_on`](Self::drain_on) as its shutdown signal. `run`
    /// itself stops nothing and listens for nothing. It adds three things to awaiting the server:
    ///
    /// - the service counts as [stopped](Self::stopped) only when the server has ended, with all
    ///   its bytes sent;
    /// - a server that does not end is dropped shortly after the drain deadline, or when further
    ///   signals say so, and the report says [`Forced`](crate::Outcome::Forced). Handlers that the
    ///   server owns are dropped with it, before the first cleanup step;
    /// - a server that ends although nothing asked it to, in good order, with an error or by a
    ///   panic, stops the service, and the report says why. The panic itself goes on.
    ///
    /// Several servers may run on one `Graceful`: each `run` waits for all of them and returns the
    /// same report. A `run` that is first polled after something has asked for a stop drops its
    /// server unpolled, so that a signal or a [`shutdown`](Self::shutdown) during start-up is not
    /// followed by serving. Dropping the future of `run` drops the server and triggers nothing.
    ///
    /// A server that ends on [`stopped`](Self::stopped), such as one for metrics that answers to
    /// the end, must not be given to `run`: the two would wait for each other until the deadline.
    /// Spawn it, and await it after `run`.
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
                graceful.watch(server).await;
            } else {
                drop(server);
                // If nobody else serves either, there is nothing to delay.
                drop(ServerGuard::take(&graceful));
            }
            graceful.stopped().await;
            let report = graceful.shared().report().unwrap_or_else(|| {
                unreachable!("the report is written before the phase becomes Stopped")
            });
            // The process may end as soon as this returns. After the lock that the report is taken
            // under: the phase is there a moment before the last events are.
            events::flush();
            report
        }
    }

    /// Polls the server until it ends or the service stops waiting for it.
    async fn watch(&self, server: impl Future<Output: Completion>) {
        let mut seat = ServerGuard::take(self);
        let mut closing_stages = self.shared().closing_stages();
        let mut given_up = pin!(closing_stages.wait_for(|stage| *stage == ClosingStage::Servers));
        let mut server = pin!(server);
        let end = poll_fn(|cx| {
            // If the server panics this is what became of it.
            seat.end = ServerEnd::Failed("the server panicked".to_owned());
            let polled = server.as_mut().poll(cx);
            seat.end = ServerEnd::Dropped;
            if let Poll::Ready(output) = polled {
                let error = table::error(output);
                return Poll::Ready(error.map_or(ServerEnd::Finished, ServerEnd::Failed));
            }
            given_up.as_mut().poll(cx).map(|_| ServerEnd::Dropped)
        })
        .await;
        seat.end = end;
    }
}

/// A server that is running. Dropping it says that it no longer is.
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
