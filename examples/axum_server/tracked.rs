//! An address for `axum_server` whose listener tracks the connections it accepts, and middleware that
//! asks HTTP/2 clients to leave. The file is long because axum-server asks for an address type and a listener
//! type, each with a trait of its own. It can be copied as it is.

use std::{io, net::SocketAddr};

use axum::{
    Extension,
    extract::{Request, State, connect_info::Connected},
    http::Version,
    middleware::Next,
    response::Response,
    serve::Listener,
};
use axum_server::{AddrListener, Address, ConnectionShutdown};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Mutex,
};
use tower_graceful::{Graceful, GracefulIo, GracefulListener, Phase};

/// An address to listen on, or the address of a client.
#[derive(Clone)]
pub(crate) struct Tracked {
    graceful: Graceful,
    address: SocketAddr,
}

impl Tracked {
    pub(crate) fn new(graceful: &Graceful, address: SocketAddr) -> Self {
        Self {
            graceful: graceful.clone(),
            address,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Address for Tracked {
    type Stream = GracefulIo<TcpStream>;
    type Listener = TrackedListener;
}

pub(crate) struct TrackedListener {
    graceful: Graceful,
    address: SocketAddr,
    /// `axum_server` accepts in one task, so the lock is never contended.
    listener: Mutex<GracefulListener<TcpListener>>,
}

impl AddrListener<GracefulIo<TcpStream>, Tracked> for TrackedListener {
    async fn bind_to(Tracked { graceful, address }: Tracked) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        Ok(Self {
            address: listener.local_addr()?,
            listener: GracefulListener::new(&graceful, listener).into(),
            graceful,
        })
    }

    async fn accept_stream(&self) -> io::Result<(GracefulIo<TcpStream>, Tracked)> {
        let (io, peer) = self.listener.lock().await.accept().await;
        Ok((io, Tracked::new(&self.graceful, peer)))
    }

    fn get_local_addr(&self) -> io::Result<Tracked> {
        Ok(Tracked::new(&self.graceful, self.address))
    }
}

/// The address of the client, for handlers.
#[derive(Clone)]
pub(crate) struct Peer(pub(crate) SocketAddr);

impl Connected<Tracked> for Peer {
    fn connect_info(client: Tracked) -> Self {
        Self(client.address)
    }
}

/// Sends GOAWAY on an HTTP/2 connection with the first response after the stop has begun. Over HTTP/1
/// the layer sends `Connection: close`.
pub(crate) async fn ask_to_leave(
    State(graceful): State<Graceful>,
    Extension(connection): Extension<ConnectionShutdown>,
    request: Request,
    next: Next,
) -> Response {
    if graceful.phase() > Phase::Serving && request.version() == Version::HTTP_2 {
        connection.graceful_shutdown();
    }
    next.run(request).await
}
