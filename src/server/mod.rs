//! Servers and connections: this room accepts, counts and closes connections, and cuts them at the drain
//! deadline.
//!
//! A layer sees only requests. A process may also be kept from ending by an incomplete request head, by
//! a peer that does not read its response, or by a WebSocket. So [`Graceful::track`] and
//! [`Graceful::listener`] wrap the IO of connections. [`Graceful::serve`] is a whole server, and
//! [`Graceful::run`] runs any other.
//!
//! This module promises that queued connections are accepted before a listener closes, that a response
//! is not lost to a reset, and that after the cut every read and write fails. The module
//! uses `connection` for entries and directives, and `shutdown` for phases and closing stages. Users
//! call its methods of `Graceful`. No other room imports from here.
//!
//! Do not reorder the calls in `io` that register wakers before they poll: `connection::state` has the
//! argument and the models.
//!
//! [`Graceful::track`]: crate::Graceful::track
//! [`Graceful::listener`]: crate::Graceful::listener
//! [`Graceful::serve`]: crate::Graceful::serve
//! [`Graceful::run`]: crate::Graceful::run

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
mod entry_guard;
#[cfg(feature = "axum")]
mod handshakes;
#[cfg_attr(not(all(feature = "axum", feature = "signal")), allow(dead_code))]
mod io;
mod linger;
#[cfg(feature = "axum")]
mod listen;
#[cfg(feature = "axum")]
mod listener;
pub(crate) mod requests;
mod run;
mod send_queue;
#[cfg(all(feature = "axum", feature = "signal"))]
mod serve;
#[cfg(all(feature = "axum", feature = "signal"))]
mod settings;
mod socket;
mod track;
#[cfg(feature = "axum")]
mod tracked;

#[cfg(feature = "axum")]
pub use self::handshakes::{HandshakeExt, Handshakes, TrackedHandshakes};
pub use self::io::GracefulIo;
#[cfg(all(feature = "axum", feature = "signal"))]
pub use self::{
    accepted::Accepted,
    serve::{Serve, ServeFuture},
};
#[cfg(feature = "axum")]
pub use self::{listen::TrackedListener, listener::GracefulListener};
use crate::{
    connection::{
        directive::Directive,
        entry,
        flags::{MAY_DROP, UPGRADED, UPGRADES},
        upgraded::Upgrade,
    },
    phase::Phase,
    shutdown::Shared,
};

/// The entry of a connection. It keeps the lifecycle alive.
type ConnectionEntry = entry::ConnectionEntry<Shared>;

impl ConnectionEntry {
    /// The peer's address, if it is known.
    pub(crate) fn peer(&self) -> Option<std::net::SocketAddr> {
        self.owner.connections.peer(self)
    }

    /// Counts a request that was dropped without a response because its client has closed its writing
    /// side: the client may still wait for the response. Counts only while the service stops, and not
    /// after the cut: cut connections are reported as such.
    #[cold]
    fn dropped_unanswered(&self) {
        let shared = &self.owner;
        if self.sniffer.has_ended()
            && shared.phase() > Phase::Serving
            && self.state.directive() < Directive::Cut
            && !self.flags.has(MAY_DROP)
        {
            shared.connections.half_closed();
        }
    }

    /// Records that the answer to a request that asked for an upgrade was none. The flag [`UPGRADES`] stays, because
    /// hyper keeps in mind that the connection has asked.
    #[cold]
    fn not_upgraded(&self) {
        let connection = Upgrade::Connection(self.number());
        self.owner.upgraded.not_begun(connection);
    }

    /// Records that the connection no longer speaks HTTP.
    #[cold]
    fn upgraded(&self) {
        self.flags.set(UPGRADED | UPGRADES);
        let connection = Upgrade::Connection(self.number());
        self.owner.upgraded.began(connection, self.peer());
    }
}
