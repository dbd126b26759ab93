use std::{any::Any, fmt, future, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::serve::{Listener, ListenerExt, TapIo};
use tokio::{
    sync::watch,
    time::{self, Instant},
};

use super::{
    accept_queue::{
        accept_all, into_socket, is_asked, let_in_handshakes, passed, queued, turn_away_handshakes,
    },
    io::GracefulIo,
    linger, tracked,
};
use crate::{
    connection::{
        descriptors::{Passed, Socket},
        state::Directive,
    },
    events,
    handle::graceful::Graceful,
    phase::Phase,
    shutdown::{state::ClosingStage, step::LINGER},
};

/// How long a listener may take to empty its accept queue, from the moment its task runs.
const LAST_ACCEPTS: Duration = Duration::from_millis(100);

/// How long handshakes that had begun are given to be completed: a few round trips between the
/// machines of one site.
const HANDSHAKE: Duration = Duration::from_millis(5);

/// How long a listener that cannot be asked for its queue goes on accepting.
const UNASKED: Duration = Duration::from_millis(60);

/// How often a listener that waits for descriptors tries again.
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// What [`Graceful::listener`] returns.
///
/// For TLS, or anything else that comes before HTTP, put
/// [`handshakes`](crate::HandshakeExt::handshakes) after it. For connect info of your own on axum's
/// server, see [`GracefulListener::new`].
///
/// An alias of axum's `TapIo` with a callback that does nothing, and not a type of this crate, because
/// of `into_make_service_with_connect_info::<SocketAddr>()` on axum's server. axum implements
/// `Connected` for the listeners inside a `TapIo` and for its own, and no other crate may implement it for
/// `SocketAddr` (E0117: the trait, `SocketAddr` and `IncomingStream` are all foreign to it). Do not rely
/// on the callback's type; name the alias.
pub type TrackedListener<L> = TapIo<GracefulListener<L>, fn(&mut GracefulIo<<L as Listener>::Io>)>;

impl Graceful {
    /// Tracks every connection that is accepted through `listener`, which may be any of axum's:
    /// TCP, Unix, one of your own.
    ///
    /// Connections count in [`connections`](Self::connections), upgraded ones until they close,
    /// and are cut at the drain deadline. Where `L::Io` is a `TcpStream` and something has been
    /// written on it, the cut is a reset, so that no half response looks like a whole one.
    ///
    /// Give it the `TcpListener` itself, and put `tap_io` after it: `graceful.listener(tcp).tap_io(…)`.
    /// The queue of a `TcpListener` can be emptied to the last connection before it is closed: on
    /// Linux exactly, elsewhere and for a `UnixListener` but for who comes between the last look
    /// and the close. A listener that wraps one goes on accepting for 60 ms; who comes after that may
    /// be reset. So put TLS after it as well:
    /// [`graceful.listener(tcp).handshakes(…)`](crate::HandshakeExt::handshakes).
    ///
    /// A listener whose socket the next process has too is closed at the start of the stop, with its
    /// queue as it is: see [`shared_listener`](crate::GracefulBuilder::shared_listener). That is the
    /// default for a socket that was passed by socket activation (`LISTEN_FDS`).
    ///
    /// On Linux the close of any other listener uses a socket filter for some milliseconds, which
    /// drops what would begin a new connection. Not on a socket that may have been passed by socket
    /// activation, since the next process accepts from it. A `TcpListener` that accepts for the first time has any
    /// filter detached that a killed process may have left on its socket. To keep a filter of your
    /// own, lock it (`SO_LOCK_FILTER`).
    ///
    /// If the process has no file descriptors left when the listener is to be closed, idle
    /// connections are closed to make room for those in the queue. The listener closes when the
    /// queue is empty, and at the latest 250 ms before the drain deadline; what is reset then is
    /// reported as [`queued`](crate::Remaining::queued).
    ///
    /// ```no_run
    /// # #[tokio::main]
    /// # async fn main() -> std::io::Result<()> {
    /// # let app = axum::Router::new();
    /// # let graceful = tower_graceful::Graceful::new();
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    /// axum::serve(graceful.listener(listener), app)
    ///     .with_graceful_shutdown(graceful.drain())
    ///     .await
    /// # }
    /// ```
    pub fn listener<L: Listener>(&self, listener: L) -> TrackedListener<L> {
        GracefulListener::new(self, listener).tap_io(|_| ())
    }
}

/// A listener whose connections are tracked, and that accepts what is queued before it closes.
///
/// The kernel completes connections before a server accepts them, and resets those still in its
/// queue when the listener is closed. So when the time has come this accepts until nothing is
/// queued, has no more handshakes begun where the system can do that, and closes. The service waits
/// for that, and for what was accepted to be read, before the server is told to close its
/// connections.
pub struct GracefulListener<L: Listener> {
    /// `None` once it was taken from the runtime, or closed.
    listener: Option<L>,
    /// What is left of it while its queue cannot be emptied for want of descriptors.
    socket: Option<Arc<Socket>>,
    /// What was found in the queue when the listener was closed.
    last: Vec<(L::Io, L::Addr)>,
    closing_stages: watch::Receiver<ClosingStage>,
    closing: Closing,
    /// It was passed to the process by socket activation, as far as is known, and other processes
    /// accept from it.
    is_passed: bool,
    /// The next process accepts from it at the start of the stop, which is told here.
    shared: Option<watch::Receiver<Phase>>,
    /// There was no descriptor for some of the queue. What is accepted later may be too late.
    was_starved: bool,
    graceful: Graceful,
}

enum Closing {
    /// Nothing has been accepted yet.
    Unused,
    No,
    /// As soon as nothing is queued, and at this instant whatever is.
    Until(Instant),
    /// At this instant. No handshake begins any more, and those that had begun are being completed.
    At(Instant),
    /// When the process has descriptors again for the rest of the queue.
    Starved,
    /// Closed, and nothing is left of the queue.
    Done,
}

impl<L: Listener> GracefulListener<L> {
    /// What [`Graceful::listener`] makes, outside a `TapIo`: for connect info of your own on axum's
    /// server.
    ///
    /// axum implements `Connected` for every `TapIo`, for the type of the listener's addresses alone,
    /// and the compiler allows no other implementation beside that one (E0119).
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
    /// On a server of [`serve`](Graceful::serve) connect info of your own is made from an
    /// [`Accepted`](crate::Accepted), whatever the listener.
    pub fn new(graceful: &Graceful, listener: L) -> Self {
        tracked::note::<L::Io>();
        Self::within(graceful.clone(), listener)
    }

    /// Its IO is wrapped again by whoever uses it.
    pub(super) fn within(graceful: Graceful, listener: L) -> Self {
        let passed = passed(&listener);
        let is_shared = graceful.policy().shared_listener;
        let is_shared = is_shared.unwrap_or(passed == Passed::Yes);
        Self {
            is_passed: is_shared || passed != Passed::No,
            shared: is_shared.then(|| graceful.shared().phases()),
            listener: Some(listener),
            socket: None,
            last: Vec::new(),
            closing_stages: graceful.shared().closing_stages(),
            closing: Closing::Unused,
            was_starved: false,
            graceful,
        }
    }

    fn track(&self, io: L::Io, addr: &L::Addr) -> GracefulIo<L::Io> {
        let peer = (addr as &dyn Any).downcast_ref::<SocketAddr>();
        let io = GracefulIo::new(&self.graceful, io, peer.copied(), Some(linger::io));
        if self.was_starved && io.is_cut() {
            // The cut has made room for it.
            self.graceful.shared().starved.were_reset(1);
        }
        io
    }

    /// Has no more handshakes begun with this listener, if that harms no other process. Says
    /// whether it does.
    fn turn_away(&self, listener: &dyn Any) -> bool {
        !self.is_passed && turn_away_handshakes(listener)
    }

    /// Closes the listener, and leaves its queue to the next process.
    fn leave(&mut self) {
        self.listener = None;
        events::listener_left();
        self.closed();
    }

    /// Closes the listener. What is still queued can be accepted after that.
    fn close(&mut self) {
        let listener = self.listener.take();
        let socket = listener.and_then(|listener| into_socket(listener, self.is_passed));
        if let Some(socket) = socket {
            self.accept_rest(Arc::new(socket));
        }
        if self.last.is_empty() && self.socket.is_none() {
            self.closed();
        }
    }

    /// Takes what can be accepted, and drops the socket if that was all.
    fn accept_rest(&mut self, socket: Arc<Socket>) {
        let filtered = matches!(self.closing, Closing::At(_));
        let (last, want) = accept_all(&socket);
        self.last = last;
        let starved = &self.graceful.shared().starved;
        if want.is_some() {
            self.was_starved = true;
            // For as long as this may last, nobody is to be kept away.
            let_in_handshakes(&*socket);
            starved.begins(&socket);
            self.socket = Some(socket);
            self.closing = Closing::Starved;
            self.close_idle();
        } else if !filtered && self.turn_away(&*socket) {
            self.closing = Closing::At(Instant::now() + HANDSHAKE);
            self.socket = Some(socket);
        } else {
            if filtered {
                let_in_handshakes(&*socket);
            }
            starved.ends(&socket, true);
            self.socket = None;
        }
    }

    /// Waits for what the socket waits for, and takes what can be accepted.
    ///
    /// Cancel safe: the socket stays where it is.
    async fn accept_starved(&mut self, socket: Arc<Socket>) {
        let again = match self.closing {
            Closing::At(instant) => instant,
            _ => Instant::now() + TRY_AGAIN,
        };
        let over = self
            .closing_stages
            .wait_for(|closing_stage| *closing_stage >= ClosingStage::Connections);
        if time::timeout_at(again, over).await.is_ok() {
            self.give_up();
            self.closed();
            return;
        }
        self.accept_rest(socket);
        if self.last.is_empty() && self.socket.is_none() {
            self.closed();
        }
    }

    /// Has idle connections closed, whose descriptors the queue needs: by their server where it is
    /// `serve`, and others by a look at their activity. New ones have as long to begin a request as
    /// they have at any other close.
    fn close_idle(&self) {
        let shared = self.graceful.shared();
        let Some(tells) = shared.starved.begin_round() else {
            return;
        };
        let before = Instant::now() - LINGER;
        for line in shared.connections.opened_before(before) {
            if !line.is_served() {
                line.state.wake_reader();
            } else if tells {
                line.state.instruct(Directive::Close);
            }
        }
    }

    /// Leaves the queue as it is.
    fn give_up(&mut self) {
        if let Some(socket) = self.socket.take() {
            if matches!(self.closing, Closing::At(_)) {
                let_in_handshakes(&*socket);
            }
            self.graceful.shared().starved.ends(&socket, false);
            events::queue_given_up();
        }
    }

    /// Says, once, that nothing more will be accepted.
    fn closed(&mut self) {
        if !matches!(self.closing, Closing::Unused | Closing::Done) {
            self.closing = Closing::Done;
            let shared = self.graceful.shared();
            shared.connections.listener_closed();
            shared.notify();
        }
    }
}

/// Resolves when the listener is to be closed.
async fn told(
    closing_stages: &mut watch::Receiver<ClosingStage>,
    shared: Option<&mut watch::Receiver<Phase>>,
) {
    // An error means that the service is gone, which the listener keeps alive.
    match shared {
        Some(phases) => drop(phases.wait_for(|phase| *phase > Phase::Serving).await),
        None => drop(
            closing_stages
                .wait_for(|closing_stage| *closing_stage > ClosingStage::Open)
                .await,
        ),
    }
}

impl<L: Listener> Drop for GracefulListener<L> {
    fn drop(&mut self) {
        if let (Some(listener), Closing::At(_)) = (&self.listener, &self.closing) {
            let_in_handshakes(listener);
        }
        if self.was_starved {
            self.graceful.shared().starved.were_reset(self.last.len());
        }
        self.give_up();
        self.closed();
    }
}

impl<L: Listener> Listener for GracefulListener<L> {
    type Io = GracefulIo<L::Io>;
    type Addr = L::Addr;

    /// Accepts a connection; once the listener is closed, never again.
    ///
    /// Cancel safe if the listener inside is.
    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        if matches!(self.closing, Closing::Unused) {
            self.closing = Closing::No;
            let shared = self.graceful.shared();
            shared.mark_served();
            shared.connections.listener_opened(self.shared.is_some());
            if let Some(listener) = &self.listener {
                // A process may have been killed before it could do that.
                let_in_handshakes(listener);
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
                self.accept_starved(socket).await;
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
                    if accepted.is_none() && !self.is_passed && turn_away_handshakes(listener) {
                        self.closing = Closing::At(Instant::now() + HANDSHAKE);
                        continue;
                    }
                    accepted
                }
                Closing::At(instant) => time::timeout_at(instant, listener.accept()).await.ok(),
                Closing::No | Closing::Unused | Closing::Starved | Closing::Done => {
                    let asked = is_asked(listener);
                    if asked && self.shared.is_some() && self.graceful.phase() > Phase::Serving {
                        self.leave();
                        continue;
                    }
                    let mut accept = pin!(listener.accept());
                    let told = told(&mut self.closing_stages, self.shared.as_mut());
                    let accepted = tokio::select! {
                        accepted = &mut accept => Some(accepted),
                        () = told => None,
                    };
                    let now = Instant::now();
                    match accepted {
                        Some(accepted) => Some(accepted),
                        None if asked && self.shared.is_some() => continue,
                        None if asked => {
                            self.closing = Closing::Until(now + LAST_ACCEPTS);
                            continue;
                        }
                        // What it has begun, a handshake perhaps, it may finish.
                        None => {
                            self.closing = Closing::At(now + UNASKED);
                            time::timeout_at(now + UNASKED, accept).await.ok()
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

impl<L: Listener + fmt::Debug> fmt::Debug for GracefulListener<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GracefulListener")
            .field("listener", &self.listener)
            .field("graceful", &self.graceful)
            .finish_non_exhaustive()
    }
}
