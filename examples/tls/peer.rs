//! The address and the certificate of a client, for handlers.

use std::{fmt::Write as _, net::SocketAddr};

use axum::{
    extract::{ConnectInfo, connect_info::Connected},
    serve::Listener,
};
use tokio::net::TcpStream;
use tokio_rustls::{rustls::pki_types::CertificateDer, server::TlsStream};
use tower_graceful::{Accepted, GracefulIo};

/// The connect info of handlers: the address and the certificate of the client.
#[derive(Clone)]
pub(crate) struct Peer {
    address: SocketAddr,
    certificate: Option<CertificateDer<'static>>,
}

impl<L> Connected<Accepted<'_, L>> for Peer
where
    L: Listener<Io = GracefulIo<TlsStream<GracefulIo<TcpStream>>>, Addr = SocketAddr>,
{
    fn connect_info(accepted: Accepted<'_, L>) -> Self {
        let (_, tls) = accepted.io().get_ref().get_ref();
        let chain = tls.peer_certificates();
        Self {
            address: *accepted.remote_addr(),
            certificate: chain.and_then(|chain| Some(chain.first()?.clone().into_owned())),
        }
    }
}

/// The client's certificate as hexadecimal DER, or its address.
pub(crate) async fn whoami(ConnectInfo(peer): ConnectInfo<Peer>) -> String {
    let Some(certificate) = peer.certificate else {
        return format!("{} without a certificate\n", peer.address);
    };
    certificate.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
