//! The middleware: it admits or rejects requests, and counts a request as in flight from the call to
//! the end of its response body. The probes and the preStop route are here too.
//!
//! A request gets its permit in `call`. The permit moves from the response future into the response
//! body, and is released when the body ends or fails, or when the future or body is dropped (a
//! panic, a timeout, a client that went away). `body` defines the end of a body: a large last frame
//! counts longer, and an empty body releases the permit with the response's head.
//!
//! From draining on, and above the limit, `call` does not reach the inner service, except for
//! probes and exempt paths: `refusal` answers. `admission` decides and counts, `config` has the
//! rules, and `server` uses `connection_close`.
//!
//! The permit is declared after the inner future or body, so that they are dropped first. The fast
//! path (`admit`, `GracefulFuture`, `GracefulBody`) is measured in instructions: change its inlining
//! only with a benchmark.

mod arrivals;
mod body;
pub(crate) mod body_poll;
#[cfg(feature = "axum")]
mod callers;
pub(crate) mod connection_close;
mod future;
mod layer;
mod named;
pub(crate) mod peer;
#[cfg(feature = "axum")]
pub(crate) mod pre_stop;
pub(crate) mod probe_body;
pub(crate) mod probe_route;
pub(crate) mod probes;
mod refusal;
mod service;
mod slow_body;
mod slow_path;

pub use self::{
    body::GracefulBody, future::GracefulFuture, layer::GracefulLayer, service::GracefulService,
};
