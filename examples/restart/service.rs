//! The service, and its restart by ecdysis.

use std::{
    env,
    io::{self, Error, Write},
    net::SocketAddr,
    process::{self, ExitCode},
};

use axum::{
    Router,
    routing::{any, get},
};
use ecdysis::tokio_ecdysis::{SignalKind, TokioEcdysisBuilder};
use tower_graceful::Graceful;

use crate::echo::echo;

#[tokio::main]
pub(crate) async fn main() -> io::Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    let ecdysis = TokioEcdysisBuilder::new(SignalKind::hangup())?;
    let address = env::args().nth(1).unwrap_or("127.0.0.1:3000".into());
    let address: SocketAddr = address.parse().map_err(Error::other)?;
    // A new process receives the socket that the old process has bound to this address.
    let listener = ecdysis
        .std_ecdysis()
        .build_listen_tcp(address, |socket, address| {
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(4096)?; // length of the accept queue
            Ok(socket.into())
        })?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;

    // From the start of the stop, the next process accepts new connections.
    let graceful = Graceful::builder()
        .shared_listener(true)
        .build()
        .map_err(Error::other)?;
    let app = Router::new()
        .route(
            "/",
            get(async || format!("hello from process {}\n", process::id())),
        )
        .route("/echo", any(echo))
        .layer(graceful.layer())
        .with_state(graceful.clone());
    let app = graceful.probes().merge(app);
    let served = graceful.serve(listener, app);

    // Tells the old process, if there is one, that this process is ready.
    let (ecdysis, replaced) = ecdysis.ready()?;
    writeln!(io::stdout(), "process {} serves", process::id())?;
    tokio::spawn(async move {
        let mut phases = graceful.subscribe();
        tokio::select! {
            // This does not resolve if the new process fails to start. The old process then continues.
            replaced = replaced => match replaced {
                Ok(_) => graceful.shutdown(),
                Err(error) => tracing::error!("no more restarts in place: {error}"),
            },
            _ = phases.changed() => {} // SIGTERM: the service stops without a new process
        }
        drop(ecdysis); // its copy of the socket, which would let clients connect until the exit
    });
    let report = served.await;
    tracing::info!("{report}");
    Ok(report.into())
}
