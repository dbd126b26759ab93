//! Graceful shutdown for axum and tower that nobody notices.
//!
//! When a deploy replaces a process, its load balancer has to be told first, the requests that
//! have arrived have to be answered, and the process has to end by itself before it is killed.
//! This crate does that for [axum](https://docs.rs/axum), for any other
//! [tower](https://docs.rs/tower) service, and for hyper directly.
//!
//! # A service that drains
//!
//! ```no_run
//! use axum::{Router, routing::get};
//! use tower_graceful::GracefulLayer;
//!
//! #[tokio::main]
//! async fn main() -> std::io::Result<std::process::ExitCode> {
//!     let layer = GracefulLayer::new();
//!     let graceful = layer.handle();
//!     let app = Router::new()
//!         .route("/", get(|| async { "hello" }))
//!         .layer(layer)
//!         .merge(graceful.probes()); // GET /livez and /readyz
//!     let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
//!     Ok(graceful.serve(listener, app).await.into()) // the report becomes the exit code
//! }
//! ```
//!
//! # The parts
//!
//! Each works without the others.
//!
//! - [`GracefulLayer`] counts requests in flight, to the end of their response bodies, and
//!   refuses new ones once draining has begun.
//! - [`Graceful`] is the handle: it stops the service, tells its [`Phase`] and its counts, and
//!   makes all the other parts. [`GracefulBuilder`] sets its times and limits.
//! - [`Graceful::probes`] answers `/livez` and `/readyz`; [`Graceful::readiness`] and
//!   [`Graceful::liveness`] are the services behind them.
//! - [`GracefulBuilder::leave_when_quiet`] and [`GracefulBuilder::leave_when_noticed`] end the
//!   lame-duck phase early; `Graceful::pre_stop` is the route for the `preStop` hook of Kubernetes.
//! - [`Graceful::drain`] is the future for axum's `with_graceful_shutdown`, driven by signals.
//! - [`Graceful::listener`] and [`Graceful::track`] count connections and cut them at the
//!   deadline.
//! - [`HandshakeExt::handshakes`] puts TLS, or whatever else comes before HTTP, on a tracked listener.
//! - [`Graceful::hold`], [`Graceful::worker`], [`Graceful::on_lame_duck`] and
//!   [`Graceful::cleanup`] are for work besides requests, and for the order in which it ends.
//! - [`Graceful::draining`] tells long-lived work that the time has come:
//!   [`Graceful::until_draining`] ends a stream then, and [`Hold::close_socket`] says goodbye on a
//!   WebSocket.
//! - [`Graceful::run`] runs a server to its end and returns a [`Report`].
//! - [`Graceful::serve`] is all of the above in one call, on connections of its own: over HTTP/2
//!   only who owns a connection can ask its peer to leave.
//!
//! # The phases
//!
//! `Serving → LameDuck → Draining → Closing → Stopped`, never backwards.
//!
//! | phase | readiness | a new request | HTTP/1 responses | ends when |
//! |---|---|---|---|---|
//! | [`Serving`](Phase::Serving) | yes | served | untouched | first signal, or `shutdown()` |
//! | [`LameDuck`](Phase::LameDuck) | no | served | `Connection: close` | the delay is over, a rule for leaving early holds, or a further SIGINT |
//! | [`Draining`](Phase::Draining) | no | 503 | `Connection: close` | nothing is in flight, or the deadline, or a further SIGINT |
//! | [`Closing`](Phase::Closing) | – | – | – | connections are closed, those left at the deadline cut; then workers have ended and cleanup steps are done |
//! | [`Stopped`](Phase::Stopped) | | | | |
//!
//! # Features
//!
//! All on by default. A feature adds to the API and never changes behaviour.
//!
//! - `axum`: [`Graceful::probes`], [`Graceful::listener`], and with `signal` [`Graceful::serve`].
//! - `signal`: [`Graceful::drain`], [`Graceful::handle_signals`]; on unix also
//!   `GracefulBuilder::watchdog` and `Report::exit_by_signal`.
//! - `tracing`: an event with target `tower_graceful` for each change of phase, at `INFO` or,
//!   where something is given up, `WARN`; while draining a line every two seconds;
//!   and once, at `DEBUG`, the [plan](Graceful::plan).
//!
//! # Questions
//!
//! *Why does it go on serving after SIGTERM?* Because requests go on arriving. Kubernetes removes
//! the endpoint and sends the signal at the same time, and a balancer that polls finds out at its
//! next probe. A service that refuses at once turns each request in between into an error.
//!
//! *Why no 503 from `/livez` while draining?* Because liveness asks whether to kill the process.
//!
//! *Why is a limit on requests in here?* Because it is the same count: what may be admitted and
//! what must be waited for are one word, so the limit is exact and costs nothing more.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod admission;
mod background;
mod config;
mod connection;
mod control;
mod events;
mod handle;
mod middleware;
mod phase;
mod report;
mod server;
mod shutdown;
mod sync;
mod tasks;
mod waiting;

#[cfg(feature = "axum")]
pub use crate::middleware::pre_stop::{PreStop, PreStopFuture};
#[cfg(all(feature = "axum", feature = "signal"))]
pub use crate::server::Accepted;
#[cfg(feature = "axum")]
pub use crate::server::{
    GracefulListener, HandshakeExt, Handshakes, TrackedHandshakes, TrackedListener,
};
pub use crate::{
    config::{
        leave_early::LeaveEarlyError,
        plan::{ConfigError, EffectivePlan, Misfit},
        rejection::{Rejection, RejectionReason},
    },
    handle::{
        builder::GracefulBuilder,
        drain::Drain,
        graceful::{Graceful, PhaseReached, Snapshot},
        hold::Hold,
        until_draining::UntilDraining,
        work::{RegisterError, Stop},
    },
    middleware::{
        GracefulBody, GracefulFuture, GracefulLayer, GracefulService,
        probes::{Probe, ProbeBody, ProbeFuture},
    },
    phase::Phase,
    report::{
        CutConnection, CutHold, CutRequest, LeftEarly, Outcome, OutsideLayer, Remaining, Report,
        Requests, TaskKind, TaskOutcome, TaskReport, Trigger, UnlistedWorkers, UpgradedConnection,
        Warning,
    },
    server::GracefulIo,
    tasks::table::Completion,
    waiting::phase_receiver::PhaseReceiver,
};

/// The programs in the README compile.
#[cfg(all(doctest, feature = "axum", feature = "signal"))]
#[doc = include_str!("../README.md")]
struct Readme;
