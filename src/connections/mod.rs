//! Connections: counted while they are open, cut when the time is over.
//!
//! A layer sees requests. What keeps a process from ending is often not one: half a request head,
//! a peer that reads nothing of its response, a WebSocket. [`Graceful::track`] wraps the IO of a
//! connection, and [`Graceful::listener`] wraps that of every connection that axum's server
//! accepts, so that the service knows how many there are, waits for them, and can end them.
//!
//! [`Graceful::track`]: crate::Graceful::track
//! [`Graceful::listener`]: crate::Graceful::listener

#[cfg(all(feature = "axum", feature = "signal"))]
mod accepted;
#[cfg(all(feature = "axum", feature = "signal"))]
mod connection;
#[cfg_attr(not(all(feature = "axum", feature = "signal")), allow(dead_code))]
mod io;
#[cfg(feature = "axum")]
mod listener;
#[cfg(feature = "axum")]
mod queue;
#[cfg(all(feature = "axum", feature = "signal"))]
mod serve;

#[cfg(all(feature = "axum", feature = "signal"))]
pub use self::accepted::Accepted;
pub use self::io::GracefulIo;
#[cfg(feature = "axum")]
pub use self::listener::{GracefulListener, TrackedListener};
use crate::{registry, timeline::Shared};

/// A connection, which keeps its lifecycle alive.
type Line = registry::Line<Shared>;
