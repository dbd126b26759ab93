//! The address that a request came from, as far as it is known.

use std::net::IpAddr;

use http::Request;

/// The peer of a tracked connection, as an extension of its requests. Set by `serve` where something
/// asks for it.
#[cfg(all(feature = "axum", feature = "signal"))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct TrackedPeer(pub(crate) std::net::SocketAddr);

/// The address and port of the peer, with an IPv4 address mapped into IPv6 as the IPv4 address.
#[cfg(feature = "axum")]
pub(super) fn socket<B>(request: &Request<B>) -> Option<std::net::SocketAddr> {
    use std::net::SocketAddr;

    use axum::extract::ConnectInfo;

    // First, because behind the PROXY protocol it is the client.
    #[cfg(feature = "signal")]
    if let Some(TrackedPeer(peer)) = request.extensions().get() {
        return Some(*peer);
    }
    let info = request.extensions().get::<ConnectInfo<SocketAddr>>()?;
    Some(info.0)
}

#[cfg(feature = "axum")]
pub(super) fn address<B>(request: &Request<B>) -> Option<IpAddr> {
    socket(request).map(|peer| peer.ip().to_canonical())
}

#[cfg(not(feature = "axum"))]
pub(super) fn address<B>(_: &Request<B>) -> Option<IpAddr> {
    None
}
