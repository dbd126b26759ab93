use std::{any::Any, fmt, future, io, pin::pin, task::Poll, time::Duration};

use axum::serve::{Listener, ListenerExt, TapIo};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task,
    time::{self, Instant},
};

use super::io::GracefulIo;
use crate::{
    handle::Graceful,
    timeline::{Edge, LAST_ACCEPTS},
};

/// How long handshakes that had begun are given to be completed: a few round trips between the
/// machines of one site.
const HANDSHAKE: Duration = Duration::from_millis(5);

/// What [`Graceful::listener`] returns.
///
/// A `TapIo` that does nothing, because axum provides connect info for every listener inside one:
/// `into_make_service_with_connect_info::<SocketAddr>()` works as it does on a `TcpListener`.
pub type TrackedListener<L> = TapIo<GracefulListener<L>, fn(&mut GracefulIo<<L as Listener>::Io>)>;

impl Graceful {
    /// Tracks every connection that is accepted through `listener`, which may be any of axum's:
    /// TCP, Unix, TLS of your own.
    ///
    /// Connections count in [`connections`](Self::connections), upgraded ones until they close,
    /// and are cut at the drain deadline.
    ///
    /// Give it the `TcpListener` itself, and put `tap_io` after it: `graceful.listener(tcp).tap_io(…)`.
    /// The queue of a `TcpListener` can be emptied to the last connection before it is closed (on
    /// Linux exactly, elsewhere nearly so). Of a listener that wraps one, or that is of another
    /// kind, only what it accepts by itself is known, and connections that arrive in the moment of
    /// the close may be reset.
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
        let graceful = self.clone();
        GracefulListener::new(listener, graceful).tap_io(|_| ())
    }
}

/// A listener whose connections are tracked, and that accepts what is queued before it closes.
///
/// The kernel completes connections before a server accepts them, and resets those still in its
/// queue when the listener is closed. So when the time has come this accepts until nothing is
/// queued, has no more handshakes begun where the system can do that, and closes. The service waits for that, and for what was accepted to be read,
/// before the server is told to close its connections.
pub struct GracefulListener<L: Listener> {
    /// `None` once closed.
    listener: Option<L>,
    /// What was found in the queue when the listener was closed.
    last: Vec<(L::Io, L::Addr)>,
    edges: watch::Receiver<Edge>,
    closing: Closing,
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
    /// Closed, and nothing is left of the queue.
    Done,
}

impl<L: Listener> GracefulListener<L> {
    fn new(listener: L, graceful: Graceful) -> Self {
        Self {
            listener: Some(listener),
            last: Vec::new(),
            edges: graceful.shared().edges(),
            closing: Closing::Unused,
            graceful,
        }
    }

    /// Closes the listener. What is still queued can be accepted after that.
    fn close(&mut self) {
        if let Some(listener) = self.listener.take() {
            self.last = last_ones(listener);
        }
        if self.last.is_empty() {
            self.closed();
        }
    }

    /// Says, once, that nothing more will be accepted.
    fn closed(&mut self) {
        if let Closing::No | Closing::Until(_) | Closing::At(_) = self.closing {
            self.closing = Closing::Done;
            let shared = self.graceful.shared();
            shared.connections.listener_closed();
            shared.ring();
        }
    }
}

impl<L: Listener> Drop for GracefulListener<L> {
    fn drop(&mut self) {
        if let Some(listener) = &self.listener {
            let_in_handshakes(listener);
        }
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
            shared.connections.listener_opened();
        }
        loop {
            if let Some((io, addr)) = self.last.pop() {
                let io = self.graceful.track(io);
                if self.last.is_empty() {
                    self.closed();
                }
                return (io, addr);
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
                    if accepted.is_none() && turn_away_handshakes(listener) {
                        self.closing = Closing::At(Instant::now() + HANDSHAKE);
                        continue;
                    }
                    accepted
                }
                Closing::At(instant) => time::timeout_at(instant, listener.accept()).await.ok(),
                Closing::No | Closing::Unused | Closing::Done => {
                    tokio::select! {
                        accepted = listener.accept() => Some(accepted),
                        _ = self.edges.wait_for(|edge| *edge > Edge::Open) => {
                            self.closing = Closing::Until(Instant::now() + LAST_ACCEPTS);
                            continue;
                        }
                    }
                }
            };
            if let Some((io, addr)) = accepted {
                return (self.graceful.track(io), addr);
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

/// A connection that is in the accept queue now.
async fn queued<L: Listener>(listener: &mut L) -> Option<(L::Io, L::Addr)> {
    let mut accept = pin!(listener.accept());
    for look in 0..4 {
        if look > 0 {
            // The runtime asks the operating system for news before it goes on here.
            task::yield_now().await;
        }
        let accepted = future::poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx))).await;
        if let Poll::Ready(accepted) = accepted {
            return Some(accepted);
        }
    }
    None
}

/// Closes the listener, and returns whom the operating system had queued to the very last.
///
/// A `TcpListener` is asked directly: the runtime knows of a connection only since it last asked
/// for news, and a busy runtime may not have done so for milliseconds. Any other listener cannot be
/// asked, and is just closed.
fn last_ones<L: Listener>(listener: L) -> Vec<(L::Io, L::Addr)> {
    /// More than a queue holds, where nothing stops it from being filled.
    const MOST: usize = 4096;

    let tcp = cast::<L, TcpListener>(listener).and_then(|tcp| tcp.into_std().ok());
    let Some(tcp) = tcp else {
        return Vec::new();
    };
    let mut last = Vec::new();
    // Whoever made the socket, or shares it, may have made it blocking.
    if tcp.set_nonblocking(true).is_ok() {
        while last.len() < MOST {
            match tcp.accept() {
                Ok(accepted) => last.push(accepted),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => break,
            }
        }
    }
    let_in_handshakes(&tcp);
    drop(tcp);
    let connections = last.into_iter().rev().filter_map(|(stream, addr)| {
        stream.set_nonblocking(true).ok()?;
        let stream = TcpStream::from_std(stream).ok()?;
        Some((cast(stream)?, cast(addr)?))
    });
    connections.collect()
}

/// Has the kernel drop what would begin a new connection to this listener, and nothing else, so
/// that nobody slips in between the last look into the queue and the close. Says whether it does:
/// only for a `TcpListener`, on Linux.
///
/// The client tries again a second later, as after any lost packet, and is refused then.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn turn_away_handshakes(listener: &dyn Any) -> bool {
    use socket2::{SockFilter, SockRef};

    // Classic BPF (linux/bpf_common.h), on a packet that begins with its TCP header.
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    let filter = [
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS),
        SockFilter::new(JUMP_IF_SET, 0, 1, SYN),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ];
    listener
        .downcast_ref::<TcpListener>()
        .is_some_and(|tcp| SockRef::from(tcp).attach_filter(&filter).is_ok())
}

/// Takes back what `turn_away_handshakes` did. The filter is the socket's and not ours alone: a
/// socket that a supervisor passed on, or another process shares, must accept again after us.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn let_in_handshakes(listener: &dyn Any) {
    use socket2::SockRef;

    let socket = listener.downcast_ref::<TcpListener>().map(SockRef::from);
    let closing = || {
        listener
            .downcast_ref::<std::net::TcpListener>()
            .map(SockRef::from)
    };
    if let Some(socket) = socket.or_else(closing) {
        let _ = socket.detach_filter();
    }
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn turn_away_handshakes(_: &dyn Any) -> bool {
    false
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn let_in_handshakes(_: &dyn Any) {}

/// The value as a `B`, if that is what it is.
fn cast<A: 'static, B: 'static>(value: A) -> Option<B> {
    let mut value = Some(value);
    let value: &mut dyn Any = &mut value;
    value.downcast_mut::<Option<B>>()?.take()
}

impl<L: Listener + fmt::Debug> fmt::Debug for GracefulListener<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GracefulListener")
            .field("listener", &self.listener)
            .field("graceful", &self.graceful)
            .finish_non_exhaustive()
    }
}
