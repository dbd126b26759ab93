//! A restart in place. SIGHUP starts the program again on the same listening socket, and the old process
//! completes its requests and exits. No connection is refused or reset, and neither a supervisor nor a
//! load balancer is needed. If you replace the binary first, this is a deploy.
//!
//! `ecdysis` starts the new process, passes it the socket, and waits until it is ready. This crate stops
//! the old process. `.ci/restart` does this twenty times under load.
//!
//! ```sh
//! cargo build -p tower-graceful-example-restart --example restart
//! target/debug/examples/restart 127.0.0.1:3000 &
//! curl localhost:3000/                    # hello from process 1234
//! kill -HUP $(pgrep -xo restart)          # the oldest process is the one that serves
//! curl localhost:3000/                    # hello from process 1250
//! chmod -x target/debug/examples/restart  # a new process that does not start changes nothing
//! kill -HUP $(pgrep -xo restart)
//! curl localhost:3000/                    # hello from process 1250
//! kill -TERM $(pgrep -xo restart)         # the last process stops, and the port is closed
//! ```

#[cfg(not(unix))]
fn main() {
    eprintln!("ecdysis runs on Unix");
}

#[cfg(unix)]
fn main() -> std::io::Result<std::process::ExitCode> {
    unix::main()
}

#[cfg(unix)]
mod unix {
    use std::{
        env,
        io::{self, Error, Write},
        net::SocketAddr,
        process::{self, ExitCode},
        time::Duration,
    };

    use axum::{
        Router,
        extract::{
            State,
            ws::{CloseFrame, Message, WebSocketUpgrade, close_code},
        },
        response::Response,
        routing::{any, get},
    };
    use ecdysis::tokio_ecdysis::{SignalKind, TokioEcdysisBuilder};
    use tower_graceful::Graceful;

    #[tokio::main]
    pub(super) async fn main() -> io::Result<ExitCode> {
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
            .merge(graceful.probes())
            .with_state(graceful.clone());
        let served = graceful.serve(listener, app);

        // Tells the old process, if there is one, that this process is ready.
        let (_ecdysis, replaced) = ecdysis.ready()?;
        writeln!(io::stdout(), "process {} serves", process::id())?;
        tokio::spawn(async move {
            // This does not resolve if the new process fails to start. The old process then continues.
            match replaced.await {
                Ok(_) => graceful.shutdown(),
                Err(error) => tracing::error!("no more restarts in place: {error}"),
            }
        });
        let report = served.await;
        tracing::info!("{report}");
        Ok(report.into())
    }

    /// Echoes messages. When the process is replaced, it closes the socket and asks the client to
    /// reconnect.
    async fn echo(upgrade: WebSocketUpgrade, State(graceful): State<Graceful>) -> Response {
        let hold = graceful.hold("echo");
        upgrade.on_upgrade(move |mut socket| async move {
            let mut draining = graceful.draining();
            loop {
                tokio::select! {
                    () = &mut draining => break,
                    message = socket.recv() => match message {
                        Some(Ok(message)) => drop(socket.send(message).await),
                        _ => return,
                    },
                }
            }
            let goodbye = CloseFrame {
                code: close_code::AWAY,
                reason: "restart".into(),
            };
            let close = Message::Close(Some(goodbye));
            hold.close_socket(socket, close, Duration::from_secs(2))
                .await;
        })
    }
}
