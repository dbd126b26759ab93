//! Which clock applies on a thread: the real clock, or the paused clock of a tokio runtime.

use tokio::time::Instant;

/// Whether tokio's clock is the real clock on this thread. It is not inside a runtime whose clock
/// is paused or has been paused with `tokio::time::pause` (feature `test-util`).
///
/// A reading of the real clock lies between two other readings of it. A paused clock stands still,
/// so it passes the check twice only if it is equal to both the last reading of the first round and
/// the first reading of the second.
pub(crate) fn is_real() -> bool {
    (0..2).all(|_| {
        let before = std::time::Instant::now();
        let now = Instant::now().into_std();
        before <= now && now <= std::time::Instant::now()
    })
}

/// The current instant of the real clock, whatever the runtime.
pub(crate) fn real_now() -> Instant {
    Instant::from_std(std::time::Instant::now())
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{thread, time::Duration};

    use tokio::time;

    use super::*;

    #[test]
    fn the_clock_is_real_outside_a_runtime() {
        assert!((0..1_000).all(|_| is_real()));
    }

    #[tokio::test]
    async fn a_clock_is_real_until_it_is_paused() {
        assert!((0..1_000).all(|_| is_real()));
        time::pause();
        assert!((0..1_000).all(|_| !is_real()));
        time::advance(Duration::from_millis(1)).await;
        assert!((0..1_000).all(|_| !is_real()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_resumed_is_not_the_real_one() {
        assert!((0..1_000).all(|_| !is_real()));
        time::advance(Duration::from_secs(1)).await;
        time::resume();
        thread::sleep(Duration::from_millis(1));
        assert!((0..1_000).all(|_| !is_real()));
    }
}
