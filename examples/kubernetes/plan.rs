//! The durations and limits of the service. `deployment.yaml` repeats some of them, and a test compares
//! the two. `README.md` derives each number.

use std::time::Duration;

use tower_graceful::{ConfigError, Graceful};

/// The port if `PORT` is not set.
pub(crate) const PORT: u16 = 3000;
/// The longest request body, in bytes. A longer one is refused with 413.
pub(crate) const BODY: usize = 256 * 1024;
/// Further requests are refused with 429. 250 of the longest bodies take less than half of the pod's memory limit.
pub(crate) const IN_FLIGHT: usize = 250;

pub(crate) fn graceful() -> Result<Graceful, ConfigError> {
    Graceful::builder()
        .grace_period(Duration::from_secs(30)) // terminationGracePeriodSeconds
        .drain_delay(Duration::from_secs(5)) // until no node routes to this pod any more
        .drain_timeout(Duration::from_secs(15)) // the slowest request may take 10 s
        .cleanup_timeout(Duration::from_secs(5)) // closing the database takes at most 4 s
        .max_in_flight(IN_FLIGHT)
        .name_requests(true) // the report names the requests that were cut
        .build()
}
