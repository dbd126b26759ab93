//! Zero-downtime shutdown for axum and tower.
//!
//! When a deploy replaces a process, its load balancer must learn of it first, in-flight requests
//! must complete, and the process must exit before it is killed. This crate does that for
//! [axum](https://docs.rs/axum), for other [tower](https://docs.rs/tower) services, and for hyper.
//!
//! # A service that drains
//!
//! ```no_run
//! use axum::{Router, routing::get};
//! use tower_graceful::GracefulLayer;
//!
//! #[tokio::main]
//! async fn main() -> Result<std::process::ExitCode, Box<dyn std::error::Error>> {
//!     let layer = GracefulLayer::new(); // the same as Graceful::new().layer()
//!     let graceful = layer.handle();
//!     let app = Router::new()
//!         .route("/", get(|| async { "hello" }))
//!         .layer(layer);
//!     let app = graceful.probes().merge(app); // adds GET /livez and /readyz
//!     let listener = tokio::net::TcpListener::bind("0.0.0.0:3000").await?;
//!     Ok(graceful.serve(listener, app).await.into()) // the report becomes the exit code
//! }
//! ```
//!
//! # The parts
//!
//! Use only the parts that you need.
//!
//! - [`GracefulLayer`] counts in-flight requests until their response bodies have ended, and
//!   answers new ones with 503 once draining has begun.
//! - [`Graceful`] is the handle: it stops the service, reads its [`Phase`] and its counts, and makes
//!   all other parts. [`GracefulBuilder`] sets durations and limits.
//! - [`Graceful::probes`] answers `/livez` and `/readyz`. [`Graceful::readiness`] and
//!   [`Graceful::liveness`] are the services behind them.
//! - [`GracefulBuilder::leave_when_quiet`] and [`GracefulBuilder::leave_when_noticed`] end the
//!   lame-duck phase early; `Graceful::pre_stop` is the route for the `preStop` hook of Kubernetes.
//! - [`Graceful::drain`] is the signal-driven future for axum's `with_graceful_shutdown`.
//! - [`Graceful::listener`] and [`Graceful::track`] count connections and cut them at the drain
//!   deadline. [`HandshakeExt::handshakes`] adds TLS or another handshake to a tracked listener.
//! - [`Graceful::hold`], [`Graceful::spawn`], [`Graceful::worker`], [`Graceful::on_lame_duck`] and
//!   [`Graceful::cleanup`] are for work beside requests, and for the order in which it ends.
//! - [`Graceful::draining`] notifies long-lived work. [`Graceful::until_draining`] ends a stream,
//!   [`Hold::close_socket`] closes a WebSocket.
//! - [`Graceful::run`] runs a server to its end and returns a [`Report`].
//! - [`Graceful::serve`] runs a server: listener, drain and run in one call. Add the layer and the
//!   probes yourself. It owns its connections, so that it can also ask HTTP/2 clients to leave.
//!   [`Serve`] has the settings of that server.
//!
//! # The phases
//!
//! `Serving → LameDuck → Draining → Closing → Stopped`, never back.
//!
//! | phase | readiness | a new request | HTTP/1 responses | ends when |
//! |---|---|---|---|---|
//! | [`Serving`](Phase::Serving) | 200 | served | unchanged | a [trigger](Graceful#triggers): the first signal, `shutdown()` and others |
//! | [`LameDuck`](Phase::LameDuck) | 503 | served | `Connection: close` | the delay is over, a rule for leaving early holds, a further SIGINT, or every server has ended |
//! | [`Draining`](Phase::Draining) | 503 | 503 | `Connection: close` | nothing is in flight, or the deadline, or a further SIGINT |
//! | [`Closing`](Phase::Closing) | – | – | – | every connection is closed or cut, workers have ended, cleanup steps are done |
//! | [`Stopped`](Phase::Stopped) | | | | |
//!
//! # Guide
//!
#![cfg_attr(doc, doc = "The module [`guide`] has a page for each question:")]
//! what happens on SIGTERM, which numbers to set, layer order, workers, streams, TLS, testing, exit
//! codes, limits, migration and more.
//!
//! # Features
//!
//! A feature adds API and never changes behaviour. `axum`, `signal` and `tracing` are on by default.
//!
//! - `axum`: [`Graceful::probes`], `Graceful::pre_stop`, [`Graceful::listener`], [`HandshakeExt`], and with
//!   `signal` [`Graceful::serve`].
//! - `signal`: [`Graceful::drain`], [`Graceful::handle_signals`], [`GracefulBuilder::watchdog`] and
//!   [`Report::exit_by_signal`].
//! - `tracing`: log events with the target `tower_graceful`: each change of phase (`INFO`, or `WARN`
//!   where something is cut or the cleanup does not end in time), a line every two seconds while draining or closing, and once the
//!   [plan](Graceful::plan) (`DEBUG`).
//! - `serde`, off by default: `Serialize` for [`Report`](Report#json), [`Snapshot`] and what they
//!   hold.
//!
//! # Questions
//!
//! *Why are requests served after SIGTERM?* Because they still arrive. Kubernetes removes the
//! endpoint and sends the signal at the same time, and a polling load balancer learns of it at its
//! next probe. A service that refuses at once turns each request in between into an error.
//!
//! *Why is `/livez` not 503 while draining?* Because liveness decides whether the process is
//! killed, and a draining process must not be.
//!
//! *Why is there a limit on requests in this crate?* Because the drain counts the requests in flight anyway,
//! and the limit uses that count, so it is exact. Without a limit each thread counts separately, which
//! costs less if several threads serve requests.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod admission;
mod background;
mod config;
mod connection;
mod control;
mod events;
#[cfg(any(doc, doctest))]
pub mod guide;
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
pub use crate::server::{Accepted, Serve, ServeFuture};
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
        probe_body::ProbeBody,
        probes::{Probe, ProbeFuture},
    },
    phase::Phase,
    report::{
        CutConnection, CutHold, CutRequest, LeftEarly, Outcome, OutsideLayer, Remaining, Report,
        Requests, TaskKind, TaskOutcome, TaskReport, Trigger, UnlistedWorkers, UpgradedConnection,
        Warning,
    },
    server::GracefulIo,
    tasks::completion::Completion,
    waiting::phase_receiver::PhaseReceiver,
};

/// The programs in the README compile.
#[cfg(all(doctest, feature = "axum", feature = "signal"))]
#[doc = include_str!("../README.md")]
struct Readme;
