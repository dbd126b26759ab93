//! Handshakes beside accepting: TLS, the PROXY protocol, and whatever else comes before HTTP.

use std::{any::Any, error::Error, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::serve::{Listener, ListenerExt, TapIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
    time,
};

use super::{ConnectionEntry, io::GracefulIo, tracked};
use crate::{
    connection::table::{ACTIVE, HANDSHAKE, LOOKED_AT},
    events,
};

/// A listener that shakes hands on each connection of the tracked listener `L`, as
/// [`HandshakeExt::handshakes`] says, and returns what the handshakes make of them: IO of type `T`.
///
/// [`HandshakeExt::handshakes`] returns it inside a [`TapIo`], for `ConnectInfo<SocketAddr>`. For connect
/// info of your own on axum's server use [`Handshakes::new`].
pub struct Handshakes<L: Listener, T: 'static> {
    listener: L,
    begin: Box<Begin<L, T>>,
    running: Running<L, T>,
}

/// Connections on which handshakes run, or have ended since the last accept.
type Running<L, T> = JoinSet<Option<(GracefulIo<T>, <L as Listener>::Addr)>>;

/// Begins a handshake.
type Begin<L, T> = dyn FnMut(<L as Listener>::Io, <L as Listener>::Addr, &mut Running<L, T>) + Send;

/// What [`HandshakeExt::handshakes`] returns: [`Handshakes`] in a `TapIo` that does nothing, as
/// [`TrackedListener`](crate::TrackedListener) is.
pub type TrackedHandshakes<L, T> = TapIo<Handshakes<L, T>, fn(&mut GracefulIo<T>)>;

/// Adds [`handshakes`](Self::handshakes) to every listener whose connections are tracked.
pub trait HandshakeExt<I: Send + 'static>: Listener<Io = GracefulIo<I>> + Sized
where
    Self::Addr: 'static,
{
    /// Shakes hands on each accepted connection before the server gets it: TLS of any library, the
    /// PROXY protocol, or anything else that comes before HTTP. Use it with a server of
    /// [`serve`](crate::Graceful::serve) or of axum.
    ///
    /// `handshake` is called with the accepted IO. Its future returns the IO that the server gets, or an
    /// error. `timeout` is the time for each handshake, from the accept of its connection.
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
    /// `cargo run --example tls` has more: a certificate that is reloaded, and client certificates.
    ///
    /// # What to expect
    ///
    /// - Each handshake runs in a task of its own, so that a peer that is slow or silent delays no other.
    ///   There is no limit to how many run at once but the number of file descriptors. A silent peer holds
    ///   its descriptor and some kilobytes until the timeout.
    /// - A connection counts in [`connections`](crate::Graceful::connections) from its accept, and once.
    ///   It is reset at the cut and closed as [`GracefulIo`] says, beneath what the handshake has made of
    ///   it.
    /// - A handshake that fails, or takes too long, closes its connection. It is logged at `DEBUG`, and in
    ///   no report: nobody has asked for anything. A panic is logged at `WARN` and ends that handshake
    ///   alone.
    /// - When the service stops, connections in the accept queue are accepted as ever, and their
    ///   handshakes are waited for: a second at most, where the peer has begun to speak. A peer that has
    ///   said nothing for 25 ms is not waited for. Then the handshakes that still run are dropped.
    ///
    /// # The PROXY protocol
    ///
    /// [`GracefulIo::set_peer`] inside the handshake sets the address that the listener returns, where that
    /// is a `SocketAddr`. Handshakes can follow one another: TLS after this.
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
    /// Dropping a future of `accept` loses no connection. Dropping the listener drops its handshakes.
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
    /// What [`HandshakeExt::handshakes`] makes, outside a `TapIo`: for connect info of your own on axum's
    /// server, which leaves no room for it on a `TapIo`. Use a [`GracefulListener`] where there is no
    /// handshake.
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
            let shaking = Shaking::new(&io);
            running.spawn(async move {
                // The call is in there too: what panics is this task alone.
                let shaken = time::timeout(timeout, async { handshake(io).await });
                let error = match shaken.await {
                    Ok(Ok(io)) => {
                        let line = shaking.done();
                        set_addr(&mut addr, &line);
                        return Some((GracefulIo::above(io, &line), addr));
                    }
                    Ok(Err(error)) => Some(error.into()),
                    Err(_) => None,
                };
                let peer = shaking.peer();
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

/// A handshake that runs.
struct Shaking(Arc<ConnectionEntry>);

impl Shaking {
    fn new<I>(io: &GracefulIo<I>) -> Self {
        let line = Arc::clone(io.line());
        // What passes is not HTTP yet.
        line.flags.take(LOOKED_AT);
        line.flags.set(HANDSHAKE);
        Self(line)
    }

    fn peer(&self) -> Option<SocketAddr> {
        self.0.peer()
    }

    /// The connection is as good as new: its server has not polled it yet.
    fn done(&self) -> Arc<ConnectionEntry> {
        self.0.state.forget_all();
        self.0.flags.set(ACTIVE);
        Arc::clone(&self.0)
    }
}

impl Drop for Shaking {
    fn drop(&mut self) {
        self.0.flags.take(HANDSHAKE);
    }
}

/// Has the listener return the peer that the handshake has found out.
fn set_addr(addr: &mut dyn Any, line: &Arc<ConnectionEntry>) {
    if let (Some(addr), Some(peer)) = (addr.downcast_mut::<SocketAddr>(), line.peer()) {
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
    /// Cancel safe if the listener inside is.
    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            tokio::select! {
                biased;
                Some(ended) = self.running.join_next() => match ended {
                    Ok(Some(accepted)) => return accepted,
                    Err(error) if error.is_panic() => events::handshake_panicked(),
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
