//! The address of the peer that sent a request, if it is known.

use std::net::IpAddr;

use http::Request;

#[cfg(all(feature = "axum", feature = "signal"))]
use crate::{connection::entry::ConnectionEntry, shutdown::Shared};

/// The connection of a request, as an extension of it, on a server of `serve`. `serve` sets it if a rule or a
/// route needs the address of the peer (`wants_peers`). To find the address may take the lock of the table of
/// connections.
#[cfg(all(feature = "axum", feature = "signal"))]
#[derive(Clone)]
pub(crate) struct TrackedPeer(pub(crate) std::sync::Arc<ConnectionEntry<Shared>>);

/// The address and port of the peer. An IPv4 address that is mapped to IPv6 is not converted here.
#[cfg(feature = "axum")]
pub(crate) fn socket_addr<B>(request: &Request<B>) -> Option<std::net::SocketAddr> {
    use std::net::SocketAddr;

    use axum::extract::ConnectInfo;

    // First, because behind the PROXY protocol this extension has the address of the client.
    #[cfg(feature = "signal")]
    if let Some(TrackedPeer(entry)) = request.extensions().get() {
        let peer = entry.owner.connections.peer(entry);
        if peer.is_some() {
            return peer;
        }
    }
    let info = request.extensions().get::<ConnectInfo<SocketAddr>>()?;
    Some(info.0)
}

/// The address of the peer. An IPv4 address that is mapped to IPv6 is returned as IPv4.
#[cfg(feature = "axum")]
pub(super) fn address<B>(request: &Request<B>) -> Option<IpAddr> {
    socket_addr(request).map(|peer| peer.ip().to_canonical())
}

#[cfg(not(feature = "axum"))]
pub(super) fn address<B>(_: &Request<B>) -> Option<IpAddr> {
    None
}
