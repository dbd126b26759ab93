//! HTTPS that drains: TLS on the tracked listener, HTTP/2 and HTTP/1.1 by ALPN, a certificate that is
//! replaced on SIGHUP, and client certificates.
//!
//! ```sh
//! # Writes ca.pem, client.pem and server.pem into the current folder, or into FOLDER:
//! cargo run --example tls                                # or: -- 127.0.0.1:3443 FOLDER
//! curl -i --cacert ca.pem https://localhost:3443/        # hello, over HTTP/2
//! kill -HUP $(pgrep -x tls)                              # new connections get a new certificate
//! curl --cacert ca.pem --cert client.pem https://localhost:3443/whoami |
//!     xxd -r -p | openssl x509 -inform der -noout -subject -nameopt oneline    # CN = ada
//! kill -TERM $(pgrep -x tls)
//! curl -i --http1.1 --cacert ca.pem https://localhost:3443/   # for five seconds: Connection: close
//! ```
//!
//! The example is long because each of three things is complete: the reload of the certificate (the worker
//! `certificate`), client certificates for handlers (`Peer`), and the configuration of rustls (`load`).
//! `certificates.rs` makes certificates to try it out; a real service gets them from elsewhere.

mod certificates;

use std::{
    env,
    error::Error,
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, connect_info::Connected},
    routing::get,
    serve::Listener,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
    server::TlsStream,
};
use tower_graceful::{Accepted, Graceful, GracefulIo, HandshakeExt};

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error + Send + Sync>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let mut arguments = env::args().skip(1);
    let address = arguments.next().unwrap_or("127.0.0.1:3443".into());
    let folder = PathBuf::from(arguments.next().unwrap_or(".".into()));

    let authority = certificates::authority(&folder)?;
    certificates::renew(&authority, &folder)?;
    let (acceptors, acceptor) = watch::channel(load(&folder)?);

    let graceful = Graceful::new();
    #[cfg(unix)]
    graceful.worker("certificate", |stop| async move {
        use tokio::signal::unix::{SignalKind, signal};

        let mut hangups = signal(SignalKind::hangup())?;
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return Ok::<_, Box<dyn Error + Send + Sync>>(()),
                _ = hangups.recv() => {
                    match certificates::renew(&authority, &folder).and_then(|()| load(&folder)) {
                        Ok(acceptor) => {
                            acceptors.send_replace(acceptor);
                            tracing::info!("a new certificate");
                        }
                        // For example because not all files were written yet. The next SIGHUP tries again.
                        Err(error) => tracing::error!(%error, "the old certificate stays"),
                    }
                }
            }
        }
    })?;

    let app = Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/whoami", get(whoami))
        .route("/slow", get(slow))
        .layer(graceful.layer());
    let app = graceful.probes().merge(app);
    let app = app.into_make_service_with_connect_info::<Peer>();

    let tcp = TcpListener::bind(address).await?;
    println!("listening on {}", tcp.local_addr()?);
    let tls = graceful
        .listener(tcp)
        .handshakes(Duration::from_secs(10), move |io| {
            acceptor.borrow().accept(io)
        });
    let report = graceful.serve(tls, app).await;
    println!("{report}");
    Ok(report.into())
}

/// The connect info of handlers: the address and the certificate of the client.
#[derive(Clone)]
struct Peer {
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
async fn whoami(ConnectInfo(peer): ConnectInfo<Peer>) -> String {
    let Some(certificate) = peer.certificate else {
        return format!("{} without a certificate\n", peer.address);
    };
    certificate.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

async fn slow() -> &'static str {
    tokio::time::sleep(Duration::from_secs(7)).await;
    "finished, although the service was told to stop meanwhile\n"
}

/// Reads the certificate of the server, its key, and the authority of the clients.
fn load(folder: &Path) -> Result<TlsAcceptor, Box<dyn Error + Send + Sync>> {
    let server = fs::read(folder.join("server.pem"))?;
    let chain = CertificateDer::pem_slice_iter(&server).collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(&server)?;

    let mut clients = RootCertStore::empty();
    clients.add(CertificateDer::from_pem_file(folder.join("ca.pem"))?)?;
    let clients = WebPkiClientVerifier::builder(clients.into())
        .allow_unauthenticated()
        .build()?;

    let mut config = ServerConfig::builder()
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
