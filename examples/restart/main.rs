//! A restart in place. SIGHUP starts the program again on the same listening socket, and the old process
//! completes its requests and exits. No connection is refused or reset, and no load balancer is needed. If
//! you replace the binary first, this is a deploy.
//!
//! The new process is a child of the old one. **Do not run this as the main process of a systemd unit or of a
//! container**: when the old process exits, both kill the new one. Under systemd, ecdysis needs its feature
//! `systemd_notify`, `Type=notify-reload` and systemd 253. In a container, use a load balancer in place of a
//! restart. ecdysis kills a new process that is not ready within 5 s, and the old one continues.
//!
//! `ecdysis` starts the new process, passes it the socket, and waits until it is ready. This crate stops
//! the old process. `.ci/restart` does this twenty times under load. The example is long because the program
//! makes its socket through ecdysis, and also shows how a WebSocket is closed at a restart.
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
//! chmod +x target/debug/examples/restart
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

    /// Echoes messages. When the process is replaced, it closes the socket and asks the client to
    /// reconnect.
    async fn echo(upgrade: WebSocketUpgrade, State(graceful): State<Graceful>) -> Response {
        let hold = graceful.hold("echo");
        upgrade.on_upgrade(move |mut socket| async move {
            let echo = async {
                while let Some(Ok(message)) = socket.recv().await {
                    if socket.send(message).await.is_err() {
                        break;
                    }
                }
            };
            tokio::select! {
                () = graceful.draining() => {} // even if the echo waits for a client that does not read
                () = echo => return,
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
