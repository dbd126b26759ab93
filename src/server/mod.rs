//! Connections: counted while they are open, cut when the time is over.
//!
//! A layer sees requests. What keeps a process from ending is often not one: half a request head,
//! a peer that reads nothing of its response, a WebSocket. [`Graceful::track`] wraps the IO of a
//! connection, and [`Graceful::listener`] wraps that of every connection that axum's server
//! accepts, so that the service knows how many there are, waits for them, and can end them.
//!
//! [`Graceful::track`]: crate::Graceful::track
//! [`Graceful::listener`]: crate::Graceful::listener

#[cfg(all(feature = "axum", feature = "signal"))]
mod accept;
#[cfg(feature = "axum")]
mod accept_queue;
#[cfg(all(feature = "axum", feature = "signal"))]
mod accepted;
#[cfg(all(feature = "axum", any(target_os = "linux", target_os = "android")))]
mod activation;
#[cfg(all(feature = "axum", feature = "signal"))]
mod connection;
#[cfg(feature = "axum")]
mod handshakes;
#[cfg_attr(not(all(feature = "axum", feature = "signal")), allow(dead_code))]
mod io;
mod linger;
#[cfg(feature = "axum")]
mod listener;
pub(crate) mod requests;
mod run;
mod send_queue;
#[cfg(all(feature = "axum", feature = "signal"))]
mod serve;
#[cfg(all(feature = "axum", feature = "signal"))]
mod settings;
#[cfg(feature = "axum")]
mod tracked;

#[cfg(feature = "axum")]
pub use self::handshakes::{HandshakeExt, Handshakes, TrackedHandshakes};
pub use self::io::GracefulIo;
#[cfg(feature = "axum")]
pub use self::listener::{GracefulListener, TrackedListener};
#[cfg(all(feature = "axum", feature = "signal"))]
pub use self::{
    accepted::Accepted,
    serve::{Serve, ServeFuture},
};
use crate::{
    connection::table::{self, UPGRADES},
    shutdown::Shared,
};

/// A connection, which keeps its lifecycle alive.
type ConnectionEntry = table::ConnectionEntry<Shared>;

impl ConnectionEntry {
    /// The peer's address, if it is known.
    pub(crate) fn peer(&self) -> Option<std::net::SocketAddr> {
        self.owner.connections.peer(self)
    }

    /// What follows is another protocol than HTTP.
    #[cold]
    fn upgraded(&self) {
        self.flags.set(UPGRADES);
        self.owner.upgraded.began(self.number(), self.peer());
    }
}
