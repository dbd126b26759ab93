//! The programs of the guide that need axum-server, as they are printed there.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use axum::{Router, extract::State, routing::get};
use axum_server::{
    Handle,
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time,
};
use tokio_rustls::{
    TlsConnector,
    rustls::pki_types::{CertificateDer, ServerName},
};
use tower_graceful::{Graceful, Outcome, Report};

use super::{BOUND, client_config};
use tracked::Tracked;

#[path = "../../tracked.rs"]
#[allow(dead_code)]
mod tracked;

/// The program of `docs/tls.md` and of the README of this example.
#[rustfmt::skip]
async fn serve(graceful: Graceful, address: SocketAddr, config: RustlsConfig, app: Router) -> Report {
    // Printed from here
    let handle = Handle::new();
    let server = axum_server::bind(Tracked::new(&graceful, address)).handle(handle.clone());
    let drain = graceful.drain();       // from here on SIGTERM starts the stop
    tokio::spawn(async move {
        drain.await;                    // nothing is in flight, or the drain deadline is near
        handle.graceful_shutdown(None); // no second deadline: `graceful` cuts what is left
    });
    let server = server.acceptor(RustlsAcceptor::new(config));
    let report = graceful.run(server.serve(app.into_make_service())).await;
    // to here.
    println!("{report}");
    report
}

/// The program without this crate, from which `docs/migration.md` begins.
#[rustfmt::skip]
async fn serve_without(address: SocketAddr, config: RustlsConfig, app: Router) -> io::Result<()> {
    // Printed from here
    // before
    let handle = axum_server::Handle::new();
    tokio::spawn(stop_on_signal(handle.clone())); // handle.graceful_shutdown(Some(Duration::from_secs(10)))
    axum_server::bind_rustls(address, config).handle(handle).serve(app.into_make_service()).await?;
    // to here.
    Ok(())
}

/// Stops as soon as the server listens, in place of a signal.
async fn stop_on_signal(handle: Handle<SocketAddr>) {
    handle.listening().await;
    handle.graceful_shutdown(Some(Duration::from_secs(10)));
}

async fn certificate() -> (CertificateDer<'static>, RustlsConfig) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".into()]).unwrap();
    let chain = vec![cert.der().to_vec()];
    let config = RustlsConfig::from_der(chain, signing_key.serialize_der()).await;
    (cert.der().clone(), config.unwrap())
}

async fn until_draining(State(graceful): State<Graceful>) -> &'static str {
    graceful.draining().await;
    "finished"
}

#[tokio::test]
async fn the_program_completes_a_request_and_ends() {
    let (certificate, config) = certificate().await;
    let graceful = Graceful::builder().drain_delay(Duration::ZERO);
    let graceful = graceful.build().unwrap();
    let app = Router::new()
        .route("/", get(until_draining))
        .layer(graceful.layer())
        .with_state(graceful.clone());
    // The server binds the address itself. This socket does not listen, and keeps the port from others.
    let reserved = TcpSocket::new_v4().unwrap();
    reserved.set_reuseaddr(true).unwrap();
    reserved.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = reserved.local_addr().unwrap();
    let server = tokio::spawn(serve(graceful.clone(), address, config, app));

    let client = async {
        let tcp = loop {
            match TcpStream::connect(address).await {
                Ok(tcp) => break tcp,
                Err(error) => assert!(!server.is_finished(), "{error}"),
            }
            time::sleep(Duration::from_millis(1)).await;
        };
        let tls = TlsConnector::from(client_config(certificate, "http/1.1"));
        let name = ServerName::try_from("localhost").unwrap();
        let mut tls = tls.connect(name, tcp).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
        tls.write_all(request).await.unwrap();
        while graceful.in_flight() == 0 {
            time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(graceful.connections(), 1);
        graceful.shutdown();
        let mut response = String::new();
        tls.read_to_string(&mut response).await.unwrap();
        response
    };
    let response = time::timeout(BOUND, client).await.expect("no response");
    assert!(response.starts_with("HTTP/1.1 200 OK"), "{response}");
    assert!(response.ends_with("\r\n\r\nfinished"), "{response}");
    let report = time::timeout(BOUND, server).await.expect("it does not end");
    let report = report.unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    assert_eq!(report.requests().finished, 1, "{report}");
    assert!(report.warnings().is_empty(), "{report}");
}

#[tokio::test]
async fn the_program_without_this_crate_ends() {
    let (_, config) = certificate().await;
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let server = serve_without(address, config, Router::new());
    time::timeout(BOUND, server).await.unwrap().unwrap();
}

/// The lines of `text` without their indents.
fn lines(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join("\n")
}

/// The blocks of `page` that are no doc tests.
fn blocks(page: &str) -> Vec<String> {
    let blocks = page.split("```rust,ignore\n").skip(1);
    blocks
        .map(|it| lines(it.split("```").next().unwrap()))
        .collect()
}

#[test]
fn the_pages_print_these_programs() {
    let file = lines(include_str!("mod.rs"));
    let tls = blocks(include_str!("../../../../docs/tls.md"));
    let readme = blocks(include_str!("../../README.md"));
    let migration = blocks(include_str!("../../../../docs/migration.md"));
    // The other block of this page is an excerpt of a program with tokio-graceful.
    assert_eq!((tls.len(), readme.len(), migration.len()), (1, 1, 2));
    assert!(migration[1].contains("tokio_graceful::"));
    for printed in [&tls[0], &readme[0], &migration[0]] {
        let printed = format!("// Printed from here\n{printed}\n// to here.\n");
        assert!(file.contains(&printed), "{printed}");
    }
}
