//! A service's life on a paused clock: phases, futures, servers, connections, plans, misuse and
//! the log. Public API only; no signals, no sockets, no waiting for the real clock.

// Constants of this test, whose differences are positive.
#![allow(clippy::unchecked_time_subtraction)]

mod connections;
#[cfg(feature = "tracing")]
mod events;
mod futures;
mod leave_early;
mod long_lived;
mod misuse;
mod phases;
mod plan;
mod run;
mod support;
#[path = "../wakers/mod.rs"]
mod wakers;
mod warnings;
mod work;
