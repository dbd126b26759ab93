//! Listeners whose connections are tracked: how they empty their accept queue and close. `listen` has
//! their `accept`.
//!
//! This file is long because all ways in which a listener closes are in it.

use std::{any::Any, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::serve::Listener;
use tokio::{
    sync::watch,
    time::{self, Instant},
};

use super::{
    accept_queue::{
        accept_all, attach_syn_filter, close_filtered, detach_syn_filter, into_socket, passed,
    },
    io::GracefulIo,
    linger, tracked,
};
use crate::{
    connection::{
        descriptors::{Passed, Socket},
        directive::Directive,
    },
    events,
    handle::graceful::Graceful,
    phase::Phase,
    shutdown::{closing::QUIET_BEFORE_CLOSE, state::ClosingStage},
    waiting::shielded_wait::ShieldedWait,
};

/// How long TCP handshakes that had begun before the filter may take to complete: a few round trips
/// between machines at one site.
pub(super) const HANDSHAKE: Duration = Duration::from_millis(5);

/// The interval at which a listener that waits for file descriptors tries again.
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// A listener that tracks its connections, and accepts the queued ones before it closes.
///
/// The kernel completes TCP handshakes before a server accepts the connections. When a listener is
/// closed, the kernel resets those still in its accept queue. So when this listener is to close, it
/// accepts until the queue is empty, keeps new TCP handshakes from beginning (only for a `TcpListener`
/// on Linux), and then closes. The service waits for that, and for a read of each accepted connection, before it
/// instructs the server to close its connections.
pub struct GracefulListener<L: Listener> {
    /// `None` after it was removed from the runtime or closed.
    pub(super) listener: Option<L>,
    /// Its socket, removed from the runtime, while handshakes are being completed or while the queue
    /// cannot be emptied because there are no file descriptors.
    pub(super) socket: Option<Arc<Socket>>,
    /// Connections from the queue that are accepted but not yet returned, the latest first.
    pub(super) last: Vec<(L::Io, L::Addr)>,
    pub(super) closing_stages: watch::Receiver<ClosingStage>,
    pub(super) closing: Closing,
    /// The socket is shared, or may have been passed by socket activation, so that other processes may
    /// accept from it.
    pub(super) is_passed: bool,
    /// For a shared socket: the phase. The listener closes when it is no longer `Serving`.
    pub(super) shared_phases: Option<watch::Receiver<Phase>>,
    pub(super) graceful: Graceful,
}

pub(super) enum Closing {
    /// Nothing has been accepted yet.
    Unused,
    No,
    /// Closes when the queue is empty, and at the latest at this instant.
    Until(Instant),
    /// Closes at this instant. A tokio listener has a filter, so that only handshakes that had begun
    /// complete; another listener keeps accepting.
    At(Instant),
    /// Closes when there are file descriptors for the rest of the queue.
    Starved,
    /// Closed, and the queue is empty or given up.
    Done,
}

impl<L: Listener> GracefulListener<L> {
    /// Makes a tracked listener for axum's server with connect info of your own. Otherwise use
    /// [`Graceful::listener`], which returns the same listener inside a `TapIo`.
    ///
    /// axum implements `Connected` for every `TapIo` generically, so the compiler rejects an
    /// implementation of your own for one (E0119).
    ///
    /// ```
    /// use axum::{extract::connect_info::Connected, serve::IncomingStream};
    /// use tokio::net::TcpListener;
    /// use tower_graceful::GracefulListener;
    ///
    /// #[derive(Clone)]
    /// struct NoDelay(bool);
    ///
    /// impl Connected<IncomingStream<'_, GracefulListener<TcpListener>>> for NoDelay {
    ///     fn connect_info(stream: IncomingStream<'_, GracefulListener<TcpListener>>) -> Self {
    ///         Self(stream.io().get_ref().nodelay().unwrap_or_default())
    ///     }
    /// }
    /// ```
    ///
    /// On a server of [`serve`](Graceful::serve), make connect info of your own from an
    /// [`Accepted`](crate::Accepted), which works with any listener.
    pub fn new(graceful: &Graceful, listener: L) -> Self {
        tracked::note::<L::Io>();
        Self::within(graceful.clone(), listener)
    }

    /// As [`new`](Self::new), but does not register the IO as tracked: for `serve`, which tracks the
    /// connections of this listener itself.
    pub(super) fn within(graceful: Graceful, listener: L) -> Self {
        let passed = passed(&listener);
        let is_shared = graceful.shared().policy().shared_listener;
        let is_shared = is_shared.unwrap_or(passed == Passed::Yes);
        Self {
            is_passed: is_shared || passed != Passed::No,
            shared_phases: is_shared.then(|| graceful.shared().phases()),
            listener: Some(listener),
            socket: None,
            last: Vec::new(),
            closing_stages: graceful.shared().closing_stages(),
            closing: Closing::Unused,
            graceful,
        }
    }

    pub(super) fn track(&self, io: L::Io, addr: &L::Addr) -> GracefulIo<L::Io> {
        let peer = (addr as &dyn Any).downcast_ref::<SocketAddr>();
        GracefulIo::new(&self.graceful, io, peer.copied(), Some(linger::close))
    }

    /// Whether the user has said that no other process has the socket. Then its filter stays until the close.
    fn is_sole(&self) -> bool {
        !self.is_passed && self.graceful.shared().policy().shared_listener == Some(false)
    }

    /// Closes a shared listener without emptying the queue, which the next process accepts from.
    pub(super) fn leave(&mut self) {
        self.listener = None;
        self.closed();
        events::listener_left();
    }

    /// Removes the listener from the runtime, and accepts what is queued. Closes it if that was all.
    pub(super) fn close(&mut self) {
        match self.take_socket() {
            Ok(Some(socket)) => self.accept_rest(Arc::new(socket)),
            Ok(None) => self.closed(),
            Err(error) => {
                self.closed();
                events::queue_lost(&error);
            }
        }
    }

    /// The socket of the listener, if it is a listener of tokio. Any other listener is closed.
    fn take_socket(&mut self) -> io::Result<Option<Socket>> {
        let Some(listener) = self.listener.take() else {
            return Ok(None);
        };
        let socket = into_socket(listener, self.is_passed);
        if socket.is_err() {
            // How many connections were in the queue is unknown. Those of a passed socket are left to
            // the next process.
            let reset = usize::from(!self.is_passed);
            self.graceful.shared().starved.count_reset(reset);
        }
        socket
    }

    /// Accepts what is queued. Then drops the socket, unless there are no file descriptors for the rest
    /// of the queue, or a filter was attached and handshakes are being completed.
    fn accept_rest(&mut self, socket: Arc<Socket>) {
        let filtered = matches!(self.closing, Closing::At(_));
        let queued = accept_all(&socket);
        let is_full = queued.is_full();
        self.last = queued.accepted;
        let starved = &self.graceful.shared().starved;
        starved.count_reset(queued.reset);
        if queued.is_starved {
            // The wait for descriptors may be long, and new connections must not be dropped that long.
            detach_syn_filter(&*socket);
            starved.add_waiting(&socket);
            self.socket = Some(socket);
            self.closing = Closing::Starved;
            self.close_idle();
        } else if !filtered && !self.is_passed && attach_syn_filter(&*socket) {
            self.closing = Closing::At(Instant::now() + HANDSHAKE);
            self.socket = Some(socket);
        } else if is_full {
            self.closing = Closing::At(Instant::now());
            self.socket = Some(socket);
        } else {
            starved.remove_waiting(&socket, true);
            self.socket = None;
            if filtered && !self.is_sole() {
                close_filtered(socket);
            } else {
                drop(socket);
            }
            if self.last.is_empty() {
                self.closed();
            }
        }
        // Last, because a subscriber may block.
        if let Some(error) = queued.error {
            events::queue_lost(&error);
        }
    }

    /// Waits until handshakes are complete or the next attempt is due, and accepts what is queued.
    ///
    /// Cancel safe: the socket stays where it is.
    pub(super) async fn accept_from_socket(&mut self, socket: Arc<Socket>) {
        let again = match self.closing {
            Closing::At(instant) => instant,
            _ => Instant::now() + TRY_AGAIN,
        };
        let over = self
            .closing_stages
            .wait_for(|closing_stage| *closing_stage >= ClosingStage::Connections);
        let is_over = time::timeout_at(again, ShieldedWait::new(over))
            .await
            .is_ok();
        if is_over && matches!(self.closing, Closing::Starved) {
            self.give_up();
            self.closed();
        } else {
            self.accept_rest(socket);
        }
    }

    /// Closes idle connections, because the queue needs their file descriptors. Connections of `serve`
    /// are instructed to close. The readers of other connections are woken, and check whether the
    /// connection is idle. Connections that were opened within the last [`QUIET_BEFORE_CLOSE`] are left out: their
    /// first request may be in transit.
    fn close_idle(&self) {
        let shared = self.graceful.shared();
        let Some(instructs) = shared.starved.begin_round() else {
            return;
        };
        let Some(before) = Instant::now().checked_sub(QUIET_BEFORE_CLOSE) else {
            return;
        };
        for entry in shared.connections.opened_before(before) {
            if !entry.is_served() {
                entry.state.wake_reader();
            } else if instructs {
                entry.state.instruct(Directive::Close);
            }
        }
    }

    /// Closes the socket whose queue could not be emptied. The connections that are reset are counted.
    fn give_up(&mut self) {
        let Some(socket) = self.socket.take() else {
            return;
        };
        let starved = &self.graceful.shared().starved;
        if matches!(self.closing, Closing::At(_)) {
            // With the filter on, no connection comes after the count.
            starved.close_unserved(Arc::clone(&socket));
            if !self.is_sole() {
                detach_syn_filter(&*socket);
            }
            drop(socket);
        } else {
            starved.remove_waiting(&socket, false);
            events::queue_given_up();
        }
    }

    /// Counts the connections that are reset in the queue, if the connections of the service are being
    /// closed and this listener has not been. The deadline passed before its task ran: the process was
    /// suspended, or every thread was blocked.
    fn abandon(&mut self) {
        let closes = *self.closing_stages.borrow() >= ClosingStage::Connections;
        if !closes || matches!(self.closing, Closing::Unused | Closing::Done) {
            return;
        }
        match self.take_socket() {
            Ok(Some(socket)) => self
                .graceful
                .shared()
                .starved
                .close_unserved(Arc::new(socket)),
            Ok(None) => {}
            Err(error) => events::queue_lost(&error),
        }
    }

    /// Records, once, that the listener accepts nothing more.
    pub(super) fn closed(&mut self) {
        if !matches!(self.closing, Closing::Unused | Closing::Done) {
            self.closing = Closing::Done;
            let shared = self.graceful.shared();
            shared.connections.listener_closed();
            shared.notify();
        }
    }
}

impl<L: Listener> Drop for GracefulListener<L> {
    fn drop(&mut self) {
        if let (Some(listener), Closing::At(_), false) =
            (&self.listener, &self.closing, self.is_sole())
        {
            detach_syn_filter(listener);
        }
        self.graceful.shared().starved.count_reset(self.last.len());
        self.abandon();
        self.give_up();
        self.closed();
    }
}

impl<L: Listener + fmt::Debug> fmt::Debug for GracefulListener<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GracefulListener")
            .field("listener", &self.listener)
            .field("graceful", &self.graceful)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::net::TcpStream;

    use tokio::net::TcpListener;

    use super::*;
    use crate::connection::descriptors::SocketKind;

    #[tokio::test]
    async fn a_connection_that_is_accepted_after_the_cut_is_counted_as_reset() {
        let graceful = Graceful::new();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let (io, addr) = tcp.accept().await.unwrap();
        let listener = GracefulListener::within(graceful.clone(), tcp);
        graceful.shared().connections.instruct(Directive::Cut, 0);
        drop(listener.track(io, &addr));
        assert_eq!(graceful.shared().starved.reset_queues(), 1);
    }

    #[tokio::test]
    async fn connections_that_were_taken_from_the_queue_and_not_returned_are_counted_as_reset() {
        let graceful = Graceful::new();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let mut listener = GracefulListener::within(graceful.clone(), tcp);
        graceful.shared().connections.listener_opened(false);
        listener.closing = Closing::No;
        let _clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
        listener.close();
        assert_eq!(listener.last.len(), 3);
        drop(listener);
        assert_eq!(graceful.shared().starved.reset_queues(), 3);
    }

    #[tokio::test]
    async fn a_handshake_that_completes_after_the_listener_is_dropped_is_counted_as_reset() {
        let graceful = Graceful::new();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        tcp.set_nonblocking(true).unwrap();
        let address = tcp.local_addr().unwrap();
        let unused = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut listener = GracefulListener::within(graceful.clone(), unused);
        graceful.shared().connections.listener_opened(false);
        listener.listener = None;
        let kind = SocketKind::Tcp(tcp);
        listener.socket = Some(Arc::new(Socket {
            kind,
            is_passed: false,
        }));
        listener.closing = Closing::At(Instant::now());
        let _client = TcpStream::connect(address).unwrap();
        drop(listener);
        assert_eq!(graceful.shared().starved.reset_queues(), 1);
    }
}
