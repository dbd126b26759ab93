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
//! `reload.rs` configures rustls and reloads the certificate, and `peer.rs` has the client certificates for handlers.
//! `certificates.rs` makes certificates to try it out; a real service gets them from elsewhere.

mod certificates;
mod peer;
mod reload;

use std::{env, error::Error, path::PathBuf, process::ExitCode, time::Duration};

use axum::{Router, routing::get};
use tokio::{net::TcpListener, sync::watch};
use tower_graceful::{Graceful, HandshakeExt};

use peer::{Peer, whoami};

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
    let (acceptors, acceptor) = watch::channel(reload::load(&folder)?);

    let graceful = Graceful::new();
    #[cfg(unix)]
    graceful.worker("certificate", |stop| {
        reload::on_hangup(stop, acceptors, authority, folder)
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

async fn slow() -> &'static str {
    tokio::time::sleep(Duration::from_secs(7)).await;
    "finished, although the service was told to stop meanwhile\n"
}
