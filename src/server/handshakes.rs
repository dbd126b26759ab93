//! Handshakes (TLS, the PROXY protocol, and others) that run in their own tasks while the listener accepts.
//!
//! Most of this file is documentation of public items.

use std::{any::Any, error::Error, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::serve::{Listener, ListenerExt, TapIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
    time,
};

use super::{ConnectionEntry, io::GracefulIo, requests, tracked};
use crate::{
    background::shielded,
    connection::flags::{ACTIVE, HANDSHAKE, INSPECTED},
    events,
};

/// A listener that performs a handshake on each connection of the tracked listener `L`, and returns the
/// IO of type `T` that the handshake returns. See [`HandshakeExt::handshakes`].
///
/// [`HandshakeExt::handshakes`] returns it inside a [`TapIo`], for `ConnectInfo<SocketAddr>`. For connect
/// info of your own on axum's server use [`Handshakes::new`].
pub struct Handshakes<L: Listener, T: 'static> {
    listener: L,
    begin: Box<Begin<L, T>>,
    running: Running<L, T>,
}

/// The tasks of handshakes that are running, or have ended since the last accept.
type Running<L, T> = JoinSet<Option<(GracefulIo<T>, <L as Listener>::Addr)>>;

/// Spawns the task of a handshake.
type Begin<L, T> = dyn FnMut(<L as Listener>::Io, <L as Listener>::Addr, &mut Running<L, T>) + Send;

/// The return type of [`HandshakeExt::handshakes`]: [`Handshakes`] inside a `TapIo` with a callback that
/// does nothing. [`TrackedListener`](crate::TrackedListener) gives the reason for the `TapIo`.
pub type TrackedHandshakes<L, T> = TapIo<Handshakes<L, T>, fn(&mut GracefulIo<T>)>;

/// Adds [`handshakes`](Self::handshakes) to every listener whose connections are tracked.
pub trait HandshakeExt<I: Send + 'static>: Listener<Io = GracefulIo<I>> + Sized
where
    Self::Addr: 'static,
{
    /// Performs a handshake on each accepted connection before the server gets it: TLS with any library,
    /// the PROXY protocol, or anything else that comes before HTTP. Use it with
    /// [`serve`](crate::Graceful::serve) or with axum's server.
    ///
    /// `handshake` is called with the accepted IO. Its future returns the IO that the server gets, or an
    /// error. `timeout` is the longest time for one handshake, from the accept of its connection.
    ///
    /// ```
    /// use std::{sync::Arc, time::Duration};
    ///
    /// use axum::{Router, routing::get};
    /// use tokio::net::TcpListener;
    /// use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
    /// use tower_graceful::{Graceful, HandshakeExt, Report};
    ///
    /// async fn serve(tcp: TcpListener, mut config: ServerConfig) -> Report {
    ///     config.alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
    ///     let acceptor = TlsAcceptor::from(Arc::new(config));
    ///     let graceful = Graceful::new();
    ///     let app = Router::new()
    ///         .route("/", get(|| async { "hello" }))
    ///         .layer(graceful.layer());
    ///     let tls = graceful
    ///         .listener(tcp)
    ///         .handshakes(Duration::from_secs(10), move |io| acceptor.accept(io));
    ///     graceful.serve(tls, app).await
    /// }
    /// ```
    ///
    /// `cargo run --example tls` also shows reloaded certificates and client certificates.
    ///
    /// # What to expect
    ///
    /// - Each handshake runs in its own task, so a slow or silent peer does not delay other peers. Only the
    ///   number of file descriptors limits how many handshakes run at once. A silent peer holds its
    ///   descriptor and a few kilobytes until the timeout.
    /// - A connection counts once in [`connections`](crate::Graceful::connections), from its accept. At the
    ///   drain deadline the accepted socket, below any TLS, is reset. Otherwise it is closed as [`GracefulIo`] describes.
    /// - A handshake that fails or times out closes its connection, so that a peer that is alive receives what the
    ///   handshake has written, such as a TLS alert. It is logged at `DEBUG`. It is not in the report, because no request
    ///   has been made. A panic is logged at `WARN` and ends only that handshake.
    /// - When the service stops, connections in the accept queue are still accepted. If a peer has sent
    ///   something, the service waits for its handshake for at most 1 s. It does not wait for a peer that
    ///   has sent nothing within 25 ms after it connected. Handshakes that still run afterwards are dropped.
    ///
    /// # The PROXY protocol
    ///
    /// [`GracefulIo::set_peer`] inside the handshake sets the address that the listener returns, where that
    /// is a `SocketAddr`. Handshakes can be chained, for example TLS after the PROXY protocol.
    ///
    /// Any peer that reaches the port can send the header, with any address. Where that is not only the
    /// balancer, compare [`GracefulIo::peer`] with its address first.
    ///
    /// ```
    /// use std::{io, time::Duration};
    ///
    /// use axum::serve::Listener;
    /// use proxy_header::{ParseConfig, io::ProxiedStream};
    /// use tokio::net::{TcpListener, TcpStream};
    /// use tower_graceful::{Graceful, GracefulIo, HandshakeExt};
    ///
    /// async fn proxied(
    ///     io: GracefulIo<TcpStream>,
    /// ) -> io::Result<ProxiedStream<GracefulIo<TcpStream>>> {
    ///     let io = ProxiedStream::create_from_tokio(io, ParseConfig::default()).await?;
    ///     if let Some(address) = io.proxy_header().proxied_address() {
    ///         io.get_ref().set_peer(address.source);
    ///     }
    ///     Ok(io)
    /// }
    ///
    /// fn listener(graceful: &Graceful, tcp: TcpListener) -> impl Listener {
    ///     graceful.listener(tcp).handshakes(Duration::from_secs(3), proxied)
    /// }
    /// ```
    ///
    /// # Connect info of your own
    ///
    /// On a server of `serve`, implement `Connected` for [`Accepted`](crate::Accepted):
    ///
    /// ```
    /// use axum::{extract::connect_info::Connected, serve::Listener};
    /// use tokio::net::TcpStream;
    /// use tokio_rustls::server::TlsStream;
    /// use tower_graceful::{Accepted, GracefulIo};
    ///
    /// type Tls = GracefulIo<TlsStream<GracefulIo<TcpStream>>>;
    ///
    /// /// The client's certificate, as DER.
    /// #[derive(Clone)]
    /// struct Certificate(Option<Vec<u8>>);
    ///
    /// impl<L: Listener<Io = Tls>> Connected<Accepted<'_, L>> for Certificate {
    ///     fn connect_info(accepted: Accepted<'_, L>) -> Self {
    ///         let (_, tls) = accepted.io().get_ref().get_ref();
    ///         let chain = tls.peer_certificates();
    ///         Self(chain.and_then(|chain| Some(chain.first()?.to_vec())))
    ///     }
    /// }
    /// ```
    ///
    /// On axum's server, see [`Handshakes::new`].
    ///
    /// # Cancel safety
    ///
    /// Dropping a future of `accept` loses no connection, if `accept` of the inner listener is cancel safe.
    /// Dropping the listener drops its handshakes.
    fn handshakes<T, E, F, Fut>(self, timeout: Duration, handshake: F) -> TrackedHandshakes<Self, T>
    where
        F: Fn(GracefulIo<I>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<T, E>> + Send,
        E: Into<Box<dyn Error + Send + Sync>>,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Handshakes::new(self, timeout, handshake).tap_io(|_| ())
    }
}

impl<L, I> HandshakeExt<I> for L
where
    L: Listener<Io = GracefulIo<I>>,
    L::Addr: 'static,
    I: Send + 'static,
{
}

impl<L, I, T> Handshakes<L, T>
where
    L: Listener<Io = GracefulIo<I>>,
    L::Addr: 'static,
    I: Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    /// Makes the listener for axum's server with connect info of your own. Otherwise use
    /// [`HandshakeExt::handshakes`], which returns the same listener inside a `TapIo`: axum implements
    /// `Connected` for every `TapIo`, so the compiler rejects an implementation of your own. Without a
    /// handshake, use a [`GracefulListener`].
    ///
    /// ```
    /// use std::net::SocketAddr;
    ///
    /// use axum::{extract::connect_info::Connected, serve::IncomingStream};
    /// use tokio::net::{TcpListener, TcpStream};
    /// use tokio_rustls::server::TlsStream;
    /// use tower_graceful::{GracefulIo, GracefulListener, Handshakes};
    ///
    /// type Tls = Handshakes<GracefulListener<TcpListener>, TlsStream<GracefulIo<TcpStream>>>;
    ///
    /// #[derive(Clone)]
    /// struct Peer {
    ///     address: SocketAddr,
    ///     server_name: Option<String>,
    /// }
    ///
    /// impl Connected<IncomingStream<'_, Tls>> for Peer {
    ///     fn connect_info(stream: IncomingStream<'_, Tls>) -> Self {
    ///         let (_, tls) = stream.io().get_ref().get_ref();
    ///         Self {
    ///             address: *stream.remote_addr(),
    ///             server_name: tls.server_name().map(str::to_owned),
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// [`GracefulListener`]: crate::GracefulListener
    pub fn new<E, F, Fut>(listener: L, timeout: Duration, handshake: F) -> Self
    where
        F: Fn(GracefulIo<I>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<T, E>> + Send,
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        tracked::note::<T>();
        let handshake = Arc::new(handshake);
        let begin = move |io: GracefulIo<I>, mut addr: L::Addr, running: &mut Running<L, T>| {
            let handshake = Arc::clone(&handshake);
            let marker = RunningHandshake::new(&io);
            // `handshake` is called inside the task, so that its panic ends only this task. The timeout
            // begins here, because a busy runtime may run the task late.
            let result = time::timeout(timeout, async move { handshake(io).await });
            running.spawn(async move {
                let error = match result.await {
                    Ok(Ok(io)) => {
                        let entry = marker.done();
                        set_addr(&mut addr, &entry);
                        return Some((GracefulIo::above(io, &entry), addr));
                    }
                    Ok(Err(error)) => Some(error.into()),
                    Err(_) => None,
                };
                let peer = marker.0.peer();
                events::handshake_failed(peer, error);
                None
            });
        };
        Self {
            listener,
            begin: Box::new(begin),
            running: JoinSet::new(),
        }
    }
}

/// Marks a connection whose handshake is running, until it is dropped.
struct RunningHandshake(Arc<ConnectionEntry>);

impl RunningHandshake {
    fn new<I>(io: &GracefulIo<I>) -> Self {
        let entry = Arc::clone(io.entry());
        // The bytes are not HTTP yet, so they are not searched for requests. The listener may have read some.
        entry.flags.take(INSPECTED);
        requests::end(&entry);
        entry.flags.set(HANDSHAKE);
        Self(entry)
    }

    /// Resets the connection entry to the state of a new connection, which its server has not polled.
    fn done(&self) -> Arc<ConnectionEntry> {
        self.0.state.forget_all();
        self.0.flags.set(ACTIVE);
        Arc::clone(&self.0)
    }
}

impl Drop for RunningHandshake {
    fn drop(&mut self) {
        self.0.flags.take(HANDSHAKE);
    }
}

/// Sets the address that the listener returns to the peer's address that the handshake has set.
fn set_addr(addr: &mut dyn Any, entry: &Arc<ConnectionEntry>) {
    if let (Some(addr), Some(peer)) = (addr.downcast_mut::<SocketAddr>(), entry.peer()) {
        *addr = peer;
    }
}

impl<L, I, T> Listener for Handshakes<L, T>
where
    L: Listener<Io = GracefulIo<I>>,
    L::Addr: 'static,
    I: 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Io = GracefulIo<T>;
    type Addr = L::Addr;

    /// Accepts a connection whose handshake has succeeded.
    ///
    /// Cancel safe if the inner listener is.
    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            tokio::select! {
                biased;
                Some(ended) = self.running.join_next() => match ended {
                    Ok(Some(accepted)) => return accepted,
                    Err(error) if error.is_panic() => {
                        events::handshake_panicked();
                        // The destructor of what it has panicked with may panic too.
                        shielded(|| drop(error));
                    }
                    Ok(None) | Err(_) => {}
                },
                (io, addr) = self.listener.accept() => (self.begin)(io, addr, &mut self.running),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl<L: Listener + fmt::Debug, T> fmt::Debug for Handshakes<L, T>
where
    L::Addr: 'static,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handshakes")
            .field("listener", &self.listener)
            .field("running", &self.running.len())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;
    use crate::Graceful;

    #[tokio::test]
    async fn what_a_listener_has_read_before_a_handshake_is_not_kept() {
        let graceful = Graceful::new();
        let (mut client, server) = duplex(100);
        let mut io = graceful.track(server);
        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        io.read_exact(&mut [0; 16]).await.unwrap();
        let handshake = RunningHandshake::new(&io);
        let number = io.entry().number();
        assert!(graceful.shared().requests.take(number).is_none());
        drop(handshake);
    }
}
