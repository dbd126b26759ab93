//! The layer and the probes as a user sees them: polled by hand, on a paused clock, with and
//! without axum. No sockets.

mod body;
mod composition;
mod exempt;
mod future;
mod lame_duck;
mod named;
#[cfg(feature = "axum")]
mod pre_stop;
#[cfg(feature = "axum")]
mod probes;
mod refusal;
mod routing;
mod support;
mod unread;
