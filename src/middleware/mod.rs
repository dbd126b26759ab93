//! The middleware: a request is in flight from the call to the end of its response body.
//!
//! A request takes its ticket in `call` and keeps it through the response future and then the
//! response body. It gives it up when the body has ended (a last frame, unless that is large or the
//! service stops; the end of the stream; or an error) or when whichever of the two holds it is dropped: a panic, a timeout, a client that
//! went away. A body that is empty from the start gives it up with the response's head.
//!
//! When draining has begun, or the limit is reached, `call` does not reach the inner service.
//! While draining, the refusal first reads the request's body, within limits, because a client that
//! is still sending would see a broken connection instead of the answer. Above the limit it answers
//! at once.

mod arrivals;
mod body;
pub(crate) mod connection_close;
mod future;
mod layer;
mod named;
pub(crate) mod peer;
#[cfg(feature = "axum")]
pub(crate) mod pre_stop;
pub(crate) mod probe_route;
pub(crate) mod probes;
mod refusal;
mod service;
mod slow_path;

pub use self::{
    body::GracefulBody, future::GracefulFuture, layer::GracefulLayer, service::GracefulService,
};
