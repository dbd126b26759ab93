//! Waiting for a condition, with a limit.

use std::{fmt, time::Duration};

use tokio::time;

/// Longer than anything that a test waits for takes on a busy machine.
pub(crate) const BOUND: Duration = Duration::from_secs(10);

/// Waits until `condition` is true. `what` is formatted only if it is not true in time.
pub(crate) async fn wait_for(what: impl fmt::Display, mut condition: impl FnMut() -> bool) {
    let waited = time::timeout(BOUND, async {
        while !condition() {
            time::sleep(Duration::from_millis(1)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}
