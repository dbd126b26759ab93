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
//! the old process. `.ci/restart` does this twenty times under load. `service.rs` is the
//! program, and `echo.rs` shows how a WebSocket is closed at a restart.
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

#[cfg(unix)]
mod echo;
#[cfg(unix)]
mod service;

#[cfg(not(unix))]
fn main() {
    eprintln!("ecdysis runs on Unix");
}

#[cfg(unix)]
fn main() -> std::io::Result<std::process::ExitCode> {
    service::main()
}
