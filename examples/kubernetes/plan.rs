//! The times of the service. `deployment.yaml` repeats some of them, and a test compares the two;
//! `README.md` derives each.

use std::time::Duration;

use tower_graceful::{ConfigError, Graceful};

/// The port when `PORT` is not set.
pub(crate) const PORT: u16 = 3000;

pub(crate) fn graceful() -> Result<Graceful, ConfigError> {
    Graceful::builder()
        .grace_period(Duration::from_secs(30)) // terminationGracePeriodSeconds
        .drain_delay(Duration::from_secs(5)) // until no node routes to this pod any more
        .drain_timeout(Duration::from_secs(15)) // the slowest request is to take 10 s
        .cleanup_timeout(Duration::from_secs(5)) // closing the database takes less than one
        .max_in_flight(1000) // 429 above
        .name_requests(true) // the report names what was cut
        .build()
}
