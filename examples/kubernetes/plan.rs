//! The durations and limits of the service. `deployment.yaml` repeats some of them, and a test compares
//! the two. `README.md` derives each number.

use std::time::Duration;

use tower_graceful::{ConfigError, Graceful};

/// The port if `PORT` is not set.
pub(crate) const PORT: u16 = 3000;

pub(crate) fn graceful() -> Result<Graceful, ConfigError> {
    Graceful::builder()
        .grace_period(Duration::from_secs(30)) // terminationGracePeriodSeconds
        .drain_delay(Duration::from_secs(5)) // until no node routes to this pod any more
        .drain_timeout(Duration::from_secs(15)) // the slowest request may take 10 s
        .cleanup_timeout(Duration::from_secs(5)) // closing the database takes at most 4 s
        .max_in_flight(1000) // further requests are refused with 429
        .name_requests(true) // the report names the requests that were cut
        .build()
}
