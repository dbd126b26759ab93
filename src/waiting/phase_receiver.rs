//! A public receiver for changes of the phase.

use std::fmt;

use tokio::sync::watch;

use super::shielded_wait::ShieldedWait;
use crate::phase::Phase;

/// Receives the phases of a service, one after another. Use it to react to the shutdown outside of
/// a request: to update a metric, or to inform another system.
///
/// [`Graceful::subscribe`](crate::Graceful::subscribe) makes one. The phase is copied out, so
/// nothing that is done with it delays the service. A receiver does not keep the lifecycle alive. A
/// clone continues from the position of the original.
///
/// ```
/// use tower_graceful::{Graceful, Phase};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let graceful = Graceful::new();
/// let mut phases = graceful.subscribe();
/// assert_eq!(phases.phase(), Phase::Serving);
/// graceful.shutdown();
/// assert!(phases.reached(Phase::Draining).await);
/// # }
/// ```
#[derive(Clone)]
pub struct PhaseReceiver(watch::Receiver<Phase>);

impl PhaseReceiver {
    pub(crate) fn new(phases: watch::Receiver<Phase>) -> Self {
        Self(phases)
    }

    /// The current phase. A later call of [`changed`](Self::changed) still returns it if it has not
    /// done so yet.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Waits until the phase differs from the one that this method returned last (at first: from
    /// the phase when the receiver was made), and returns the new phase. If the phase has changed
    /// several times since, only the latest one is returned. Returns `None` when the lifecycle is
    /// gone, that is, when all its handles, layers and futures have been dropped.
    ///
    /// Cancel safe: a dropped future does not lose a change.
    pub async fn changed(&mut self) -> Option<Phase> {
        ShieldedWait::new(self.0.changed()).await.ok()?;
        Some(*self.0.borrow_and_update())
    }

    /// Waits until `phase` or a later phase has been reached, and returns true. Returns false if
    /// the lifecycle is gone before that.
    ///
    /// Cancel safe.
    pub async fn reached(&mut self, phase: Phase) -> bool {
        while *self.0.borrow_and_update() < phase {
            if self.changed().await.is_none() {
                return false;
            }
        }
        true
    }

    /// Whether the lifecycle is gone, so that the phase cannot change any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.has_changed().is_err()
    }
}

impl fmt::Debug for PhaseReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PhaseReceiver")
            .field("phase", &self.phase())
            .field("closed", &self.is_closed())
            .finish()
    }
}
