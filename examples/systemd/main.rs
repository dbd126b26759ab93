//! A service under systemd, with socket activation and the notifications of `Type=notify`.
//!
//! It sends `READY` when it serves, and `STOPPING` at the start of the stop. Its units are `app.service` and
//! `app.socket` in this folder. A restart refuses no connection, because systemd keeps the socket open. But
//! systemd starts the new process when the old one has ended: until then new clients wait. So the drain is
//! short here, and requests that take longer than 5 s are cut. For longer ones see the example `restart`.
//!
//! ```sh
//! cargo build --example systemd
//! systemd-socket-activate --listen=127.0.0.1:3000 target/debug/examples/systemd &
//! curl localhost:3000/                 # starts the service
//! kill -TERM $(pgrep -f 'examples/systemd$')
//! ```

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("systemd runs on Linux");
}

#[cfg(target_os = "linux")]
fn main() -> std::io::Result<std::process::ExitCode> {
    linux::main()
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        env,
        io::{self, Error},
        process::{self, ExitCode},
        time::Duration,
    };

    use axum::{Router, routing::get};
    use listenfd::ListenFd;
    use sd_notify::NotifyState;
    use tower_graceful::Graceful;

    #[tokio::main]
    pub(super) async fn main() -> io::Result<ExitCode> {
        tracing_subscriber::fmt().with_writer(io::stderr).init();
        let graceful = Graceful::builder()
            .grace_period(Duration::from_secs(30)) // `TimeoutStopSec=` of the unit
            .drain_timeout(Duration::from_secs(5)) // so long new clients may have to wait
            .build()
            .map_err(Error::other)?;

        // The socket of `app.socket`. The crate recognises from `LISTEN_FDS` that the socket outlives
        // the process. So at SIGTERM this process stops accepting, and leaves the queue to the next.
        let is_activated = env::var_os("LISTEN_FDS").is_some();
        let listener = match ListenFd::from_env().take_tcp_listener(0)? {
            Some(listener) => listener,
            // systemd has the port, so `bind` would only say that it is in use.
            None if is_activated => {
                return Err(Error::other(
                    "LISTEN_FDS is set, but no socket was passed to this process: is LISTEN_PID another \
                     process, such as a shell that did not start the service with `exec`?",
                ));
            }
            None => std::net::TcpListener::bind("127.0.0.1:3000")?,
        };
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;

        let stopping = async { sd_notify::notify(&[NotifyState::Stopping]) };
        graceful
            .on_lame_duck("tell systemd", Duration::from_secs(1), stopping)
            .map_err(Error::other)?;

        let app = Router::new()
            .route(
                "/",
                get(async || format!("hello from process {}\n", process::id())),
            )
            .layer(graceful.layer());
        let app = graceful.probes().merge(app);
        let served = graceful.serve(listener, app);
        // Signals are handled from here on. New connections wait in the socket's queue until `serve`
        // accepts them.
        sd_notify::notify(&[NotifyState::Ready])?;
        let report = served.await;
        tracing::info!("{report}");
        Ok(report.into())
    }
}
