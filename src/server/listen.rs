//! `Graceful::listener`, and the `accept` of the listener that it makes.

use std::{future, io, pin::pin, time::Duration};

use axum::serve::{Listener, ListenerExt, TapIo};
use tokio::{
    sync::watch,
    time::{self, Instant},
};

use super::{
    accept_queue::{attach_syn_filter, can_empty_queue, detach_syn_filter, queued},
    io::GracefulIo,
    listener::{Closing, GracefulListener, HANDSHAKE},
};
use crate::{
    handle::graceful::Graceful, phase::Phase, shutdown::state::ClosingStage,
    waiting::shielded_wait::ShieldedWait,
};

/// How long a listener may take to empty its accept queue, from the moment its task runs.
const LAST_ACCEPTS: Duration = Duration::from_millis(100);

/// How long a listener keeps accepting if its queue cannot be emptied, because it is not tokio's.
const OTHER_LISTENER_ACCEPTS: Duration = Duration::from_millis(60);

/// What [`Graceful::listener`] returns.
///
/// For TLS, or anything else that comes before HTTP, put
/// [`handshakes`](crate::HandshakeExt::handshakes) after it. For connect info of your own on axum's
/// server, see [`GracefulListener::new`].
///
/// This is an alias of axum's `TapIo` with a callback that does nothing. It is not a type of this crate,
/// so that `into_make_service_with_connect_info::<SocketAddr>()` works on axum's server: axum implements
/// `Connected` for its own listeners and for every listener inside a `TapIo`, and no other crate may
/// implement it for `SocketAddr` (E0117: the trait, `SocketAddr` and `IncomingStream` are all foreign).
/// Use the name of the alias, and do not rely on the type of the callback.
pub type TrackedListener<L> = TapIo<GracefulListener<L>, fn(&mut GracefulIo<<L as Listener>::Io>)>;

impl Graceful {
    /// Tracks every connection that `listener` accepts. `listener` may be any listener of axum: TCP,
    /// Unix, or one of your own.
    ///
    /// Each connection counts in [`connections`](Self::connections) until it closes, also after an
    /// upgrade, and is cut at the drain deadline. If `L::Io` is a `TcpStream` on which something has
    /// been written, the cut is a reset, so that the peer does not take a partial response for a
    /// complete one.
    ///
    /// ```no_run
    /// # #[tokio::main]
    /// # async fn main() -> std::io::Result<std::process::ExitCode> {
    /// # let app = axum::Router::new();
    /// # let graceful = tower_graceful::Graceful::new();
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    /// let server = axum::serve(graceful.listener(listener), app)
    ///     .with_graceful_shutdown(graceful.drain());
    /// let report = graceful.run(server).await;
    /// # Ok(report.into())
    /// # }
    /// ```
    ///
    /// axum's server ends when it has dropped its connections. Their last bytes may be on the way then, and
    /// [`run`](Self::run) also waits until the connections are closed. Without it, end the runtime only when
    /// [`stopped`](Self::stopped) has resolved.
    ///
    /// # Wrapped listeners
    ///
    /// Pass the `TcpListener` itself, and put `tap_io` and TLS after it: `graceful.listener(tcp).tap_io(…)`,
    /// [`graceful.listener(tcp).handshakes(…)`](crate::HandshakeExt::handshakes). Connections in the
    /// accept queue of a `TcpListener` or `UnixListener` are accepted before it closes. For a
    /// `TcpListener` on Linux that includes connections that arrive during the close, except within a few
    /// microseconds (see below). For a `UnixListener`, and on other systems, a connection that arrives
    /// between the last `accept` and the close is reset. A wrapped listener keeps accepting for 60 ms; a connection that arrives later may be
    /// reset.
    ///
    /// # Shared sockets
    ///
    /// A listener whose socket is shared with the next process is closed at the start of the stop, and
    /// its queue is left to that process: see
    /// [`shared_listener`](crate::GracefulBuilder::shared_listener). This is the default for a socket
    /// that was passed by socket activation (`LISTEN_FDS`).
    ///
    /// # Socket filter
    ///
    /// On Linux, closing a `TcpListener` attaches a socket filter for a few milliseconds, which drops
    /// packets that begin a new connection. No filter is attached to a shared socket, or to one that
    /// may have been passed by socket activation, because the next process accepts from it. The first
    /// `accept` detaches any filter from the socket, because a killed process may have left one. To
    /// keep a filter of your own, lock it (`SO_LOCK_FILTER`).
    ///
    /// The filter is detached just before the close, because another process may have the socket too. A
    /// connection that arrives in the few microseconds between detaching and closing is reset. With
    /// [`shared_listener(false)`](crate::GracefulBuilder::shared_listener) the filter stays until the
    /// close, and no connection is reset.
    ///
    /// # File descriptors
    ///
    /// If the process has no file descriptors left when the listener is to close, idle connections are
    /// closed to make room for the connections in the queue. The listener closes when the queue is
    /// empty, and at the latest 250 ms before the drain deadline. Connections that are reset then are
    /// reported as [`queued`](crate::Remaining::queued).
    pub fn listener<L: Listener>(&self, listener: L) -> TrackedListener<L> {
        GracefulListener::new(self, listener).tap_io(|_| ())
    }
}

impl<L: Listener> Listener for GracefulListener<L> {
    type Io = GracefulIo<L::Io>;
    type Addr = L::Addr;

    /// Accepts a connection. After the listener has closed, the future stays pending.
    ///
    /// Cancel safe if the inner listener is.
    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        if matches!(self.closing, Closing::Unused) {
            self.closing = Closing::No;
            let shared = self.graceful.shared();
            shared.mark_served();
            shared
                .connections
                .listener_opened(self.shared_phases.is_some());
            if let Some(listener) = &self.listener {
                // A killed process may have left its filter on the socket.
                detach_syn_filter(listener);
            }
        }
        loop {
            if let Some((io, addr)) = self.last.pop() {
                let io = self.track(io, &addr);
                if self.last.is_empty() && self.socket.is_none() {
                    self.closed();
                }
                return (io, addr);
            }
            if let Some(socket) = self.socket.clone() {
                self.accept_from_socket(socket).await;
                continue;
            }
            let Some(listener) = &mut self.listener else {
                return future::pending().await;
            };
            let accepted = match self.closing {
                Closing::Until(deadline) => {
                    let accepted = if Instant::now() < deadline {
                        queued(listener).await
                    } else {
                        None
                    };
                    if accepted.is_none() && !self.is_passed && attach_syn_filter(listener) {
                        self.closing = Closing::At(Instant::now() + HANDSHAKE);
                        continue;
                    }
                    accepted
                }
                Closing::At(instant) => time::timeout_at(instant, listener.accept()).await.ok(),
                Closing::No | Closing::Unused | Closing::Starved | Closing::Done => {
                    let can_empty = can_empty_queue(listener);
                    let leaves = can_empty && self.shared_phases.is_some();
                    if leaves && self.graceful.phase() > Phase::Serving {
                        self.leave();
                        continue;
                    }
                    let mut accept = pin!(listener.accept());
                    let close_due =
                        close_due(&mut self.closing_stages, self.shared_phases.as_mut());
                    let accepted = tokio::select! {
                        accepted = &mut accept => Some(accepted),
                        () = close_due => None,
                    };
                    let now = Instant::now();
                    match accepted {
                        Some(accepted) => Some(accepted),
                        None if leaves => continue,
                        None if can_empty => {
                            self.closing = Closing::Until(now + LAST_ACCEPTS);
                            continue;
                        }
                        // The same future is polled on, because it may be in the middle of a handshake.
                        None => {
                            self.closing = Closing::At(now + OTHER_LISTENER_ACCEPTS);
                            time::timeout_at(now + OTHER_LISTENER_ACCEPTS, accept)
                                .await
                                .ok()
                        }
                    }
                }
            };
            if let Some((io, addr)) = accepted {
                return (self.track(io, &addr), addr);
            }
            self.close();
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        match &self.listener {
            Some(listener) => listener.local_addr(),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// Resolves when the listener is to be closed.
async fn close_due(
    closing_stages: &mut watch::Receiver<ClosingStage>,
    shared: Option<&mut watch::Receiver<Phase>>,
) {
    // An error would mean that the lifecycle was dropped, but the listener keeps it alive.
    if let Some(phases) = shared {
        let stops = phases.wait_for(|phase| *phase > Phase::Serving);
        drop(ShieldedWait::new(stops).await);
    } else {
        let closes = closing_stages.wait_for(|closing_stage| *closing_stage > ClosingStage::Open);
        drop(ShieldedWait::new(closes).await);
    }
}
