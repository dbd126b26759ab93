//! The layer and the probes as a user meets them: polled by hand, on a paused clock, inside axum
//! and without it. No sockets.

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
mod support;
mod unread;
