//! The layer, the probes, the timeline and the tracked connections of this crate on `axum_server`, with
//! and without its TLS. HTTP/2 clients are asked to leave with their next response.
//!
//! ```sh
//! cargo run --example axum_server                        # HTTP; or: -- 127.0.0.1:3000
//! openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem -out cert.pem \
//!     -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE
//! cargo run --example axum_server -- 127.0.0.1:3000 cert.pem key.pem                      # HTTPS
//! curl -i --cacert cert.pem https://localhost:3000/slow/3 &       # completes during the stop
//! kill -TERM $(pgrep -x axum_server); curl -i --cacert cert.pem https://localhost:3000/readyz # 503
//! ```

mod tracked;

use std::{env, error::Error, process::ExitCode, time::Duration};

use axum::{
    Router,
    extract::{ConnectInfo, Path},
    middleware::from_fn_with_state,
    routing::get,
};
use axum_server::{
    Handle,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use tower_graceful::Graceful;
use tracked::{Peer, Tracked, ask_to_leave};

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args: Vec<_> = env::args().skip(1).collect();
    let address = args.first().map_or("127.0.0.1:3000", String::as_str);
    let graceful = Graceful::builder()
        .drain_delay(Duration::from_secs(1)) // to try it out: the default is 5 s, for a load balancer
        .drain_timeout(Duration::from_secs(5)) // to try it out: the default is the rest of 30 s
        .exempt("/status")
        .build()?;
    let status = graceful.clone();
    let app = Router::new()
        .route("/", get(hello))
        .route("/slow/{seconds}", get(slow))
        .layer(from_fn_with_state(graceful.clone(), ask_to_leave))
        .layer(graceful.layer())
        .route("/status", get(async move || format!("{status:?}\n")));
    let app = graceful.probes().merge(app);
    let app = app.into_make_service_with_connect_info::<Peer>();

    let handle = Handle::new();
    let mut server =
        axum_server::bind(Tracked::new(&graceful, address.parse()?)).handle(handle.clone());
    let mut http1 = server.http_builder().http1();
    http1.header_read_timeout(Duration::from_secs(30)); // without it axum-server waits without a limit
    let drain = graceful.drain(); // from here on SIGTERM starts the stop
    tokio::spawn(async move {
        if let Some(bound) = handle.listening().await {
            println!("listening on {}", bound.address());
        }
        drain.await;
        handle.graceful_shutdown(None); // no timeout: `graceful` cuts at its deadline
    });
    let report = if let [_, certificate, key] = &args[..] {
        let tls = RustlsAcceptor::new(RustlsConfig::from_pem_file(certificate, key).await?);
        graceful.run(server.acceptor(tls).serve(app)).await
    } else {
        graceful.run(server.serve(app)).await
    };
    println!("{report}");
    Ok(report.into())
}

async fn hello(ConnectInfo(Peer(address)): ConnectInfo<Peer>) -> String {
    format!("hello, {address}\n")
}

async fn slow(Path(seconds): Path<u64>) -> &'static str {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    "finished\n"
}
