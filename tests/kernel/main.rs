//! Random connections over a kernel in memory, on a paused clock: a response is lost only where the report or the
//! documentation says so.
//!
//! A response is not delivered when its last byte has been written. The kernel may hold the rest, and
//! discards it if the socket is closed while its peer still sends. [`kernel`] simulates that. A schedule has
//! a server, a stop, and clients of HTTP/1.1 and HTTP/2 that pipeline, upload, read slowly, send PINGs
//! and window updates, close, half-close, leave or vanish. [`world`] plays it, and [`rules`] compares
//! what the clients have received with the report.
//!
//! The IO is no `TcpStream`, so the server does not know how much of a response its client has
//! acknowledged. So a loss is allowed after the waits that the page of `GracefulIo` documents.
//!
//! A request that the server could have read is lost too if it is not answered: see `rules::to_read`.
//!
//! proptest prints a failing schedule after shrinking it. [`known`] is where such a schedule is kept.
//! `PROPTEST_CASES=20000 cargo test --release --test kernel` runs for some minutes.

#![cfg(all(feature = "axum", feature = "signal"))]

mod arrivals;
mod client;
mod http1;
mod kernel;
mod known;
#[path = "../pipes/mod.rs"]
mod pipes;
mod rules;
mod schedule;
mod world;

use std::time::Duration;

use proptest::{
    prelude::*,
    test_runner::{Config, FileFailurePersistence},
};

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

proptest! {
    #![proptest_config(Config {
        cases: 400,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..Config::default()
    })]

    #[test]
    fn no_response_is_lost_unreported(schedule in schedule::schedules()) {
        let played = world::play(&schedule);
        rules::check(&schedule, &played)?;
    }
}
