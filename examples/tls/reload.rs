//! The configuration of rustls, and the worker that loads it again on SIGHUP.

use std::{error::Error, fs, path::Path, sync::Arc};

use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

#[cfg(unix)]
use crate::certificates::{self, Authority};

/// Reads the certificate of the server, its key, and the authority of the clients.
pub(crate) fn load(folder: &Path) -> Result<TlsAcceptor, Box<dyn Error + Send + Sync>> {
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

/// Replaces the certificate and loads it on each SIGHUP. New connections get the new one.
#[cfg(unix)]
pub(crate) async fn on_hangup(
    mut stop: tower_graceful::Stop,
    acceptors: tokio::sync::watch::Sender<TlsAcceptor>,
    authority: Authority,
    folder: std::path::PathBuf,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut hangups = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            () = &mut stop => return Ok(()),
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
}
