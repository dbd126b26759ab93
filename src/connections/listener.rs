use std::{fmt, io};

use axum::serve::{Listener, ListenerExt, TapIo};

use super::io::GracefulIo;
use crate::handle::Graceful;

/// What [`Graceful::listener`] returns.
///
/// A `TapIo` that does nothing, because axum provides connect info for every listener inside one:
/// `into_make_service_with_connect_info::<SocketAddr>()` works as it does on a `TcpListener`.
pub type TrackedListener<L> = TapIo<GracefulListener<L>, fn(&mut GracefulIo<<L as Listener>::Io>)>;

impl Graceful {
    /// Tracks every connection that is accepted through `listener`, which may be any of axum's:
    /// TCP, Unix, TLS of your own, with `tap_io` before or after.
    ///
    /// Connections count in [`connections`](Self::connections), upgraded ones until they close,
    /// and are cut at the drain deadline.
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
        GracefulListener { listener, graceful }.tap_io(|_| ())
    }
}

/// A listener whose connections are tracked.
pub struct GracefulListener<L> {
    listener: L,
    graceful: Graceful,
}

impl<L: Listener> Listener for GracefulListener<L> {
    type Io = GracefulIo<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (io, addr) = self.listener.accept().await;
        (self.graceful.track(io), addr)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl<L: fmt::Debug> fmt::Debug for GracefulListener<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GracefulListener")
            .field("listener", &self.listener)
            .field("graceful", &self.graceful)
            .finish()
    }
}
