//! TLS for the servers and clients of `throughput` and `scale`.

use std::{fmt::Write as _, io, str, sync::Arc};

use axum::serve::Listener;
use rcgen::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor, TlsConnector, client,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    },
    server,
};

/// A certificate of the parent process, and its key, as hexadecimal text for the command line.
pub(crate) struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Identity {
    pub(crate) fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]);
        let CertifiedKey { cert, signing_key } = made.expect("a certificate");
        Self {
            certificate: cert.der().clone(),
            key: signing_key.serialize_der().into(),
        }
    }

    pub(crate) fn to_text(&self) -> String {
        let hex = |bytes: &[u8]| {
            let mut text = String::new();
            for byte in bytes {
                let _ = write!(text, "{byte:02x}");
            }
            text
        };
        let key = hex(self.key.secret_pkcs8_der());
        format!("{}:{key}", hex(&self.certificate))
    }

    pub(crate) fn of(text: &str) -> Self {
        let bytes = |hex: &str| -> Vec<u8> {
            let digits = hex.as_bytes().chunks(2);
            let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
            digits.map(|pair| byte(pair).expect("a byte")).collect()
        };
        let (certificate, key) = text.split_once(':').expect("a certificate and a key");
        Self {
            certificate: bytes(certificate).into(),
            key: bytes(key).into(),
        }
    }

    pub(crate) fn server(self) -> Arc<ServerConfig> {
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate], PrivateKeyDer::from(self.key))
            .expect("a configuration");
        config.alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
        Arc::new(config)
    }

    /// The TLS of a client that trusts this certificate alone, and offers the protocol `alpn` if there is
    /// one.
    pub(crate) fn connector(&self, alpn: Option<&str>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("a root");
        let mut config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.map(Into::into).into_iter().collect();
        TlsConnector::from(Arc::new(config))
    }
}

/// Performs the handshake of a client.
pub(crate) async fn connect(
    connector: &TlsConnector,
    tcp: TcpStream,
) -> io::Result<client::TlsStream<TcpStream>> {
    let name = "localhost".try_into().expect("a name");
    connector.connect(name, tcp).await
}

/// A listener that performs each handshake inside of `accept`: the shortest way to TLS with axum alone.
/// The clients of `throughput` keep their connections, so the handshakes are not measured.
pub(crate) struct TlsListener {
    pub(crate) tcp: TcpListener,
    pub(crate) acceptor: TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = server::TlsStream<TcpStream>;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (tcp, address) = Listener::accept(&mut self.tcp).await;
            if let Ok(tls) = self.acceptor.accept(tcp).await {
                return (tls, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}
