//! The driver: the task that runs what needs a runtime, and that checks the deadlines where tokio's
//! clock is paused.
//!
//! Two parts check the deadlines. The *control thread* ([`control`](crate::control)) checks every
//! stop under way at its next deadline, and whenever it is notified of a change. The driver does
//! the same in a runtime, and also runs the hooks and the cleanup there. Where tokio's clock is
//! paused, only the driver checks the deadlines, because the control thread knows only the real
//! clock. Where both check, the second check finds nothing to do.
//!
//! The driver is spawned by the first call that happens inside a runtime. Until a stop is triggered
//! it only waits, without keeping the lifecycle alive, and it ends when the lifecycle is dropped.
//! So a service that is built and dropped leaves no task behind. From the trigger on, the driver
//! and the control thread keep the lifecycle alive.
//!
//! If the driver's runtime shuts down first, the control thread goes on with the timeline. The
//! tasks that wait for a phase are woken then, and the first of them that is polled in another
//! runtime spawns a new driver there. Tasks that can no longer be run are reported as not run or
//! cut.

use std::{future::pending, sync::Arc};

use tokio::{sync::oneshot, time};

use super::{Shared, WeakShared};
use crate::control::DriverWaker;

/// Sleeps until the next step is due, and takes it, until the service has stopped.
pub(super) struct Driver {
    gate: WeakShared,
    waker: Arc<DriverWaker>,
    /// The driver has been polled at least once.
    ran: bool,
}

impl Driver {
    pub(super) fn new(gate: WeakShared, waker: Arc<DriverWaker>) -> Self {
        Self {
            gate,
            waker,
            ran: false,
        }
    }

    /// Waits until a stop passes it the lifecycle, and then drives the stop. Ends at once if the
    /// lifecycle is dropped first.
    pub(super) async fn run(mut self, mut started: oneshot::Receiver<Shared>) {
        self.ran = true;
        let gate = loop {
            tokio::select! {
                gate = &mut started => match gate {
                    Ok(gate) => break gate,
                    Err(_) => return,
                },
                () = self.waker.notified() => {
                    #[cfg(feature = "signal")]
                    if let Some(gate) = self.gate.upgrade() {
                        gate.act_on_signals();
                    }
                }
            }
        };
        let mut hooked = false;
        let mut cleaning = None;
        let mut cleaned = false;
        while let Some(next) = gate.tick() {
            if !std::mem::replace(&mut hooked, true) {
                gate.start_hooks();
            }
            if cleaning.is_none() {
                let deadline = gate.cleanup_deadline();
                cleaning = deadline.map(|deadline| Box::pin(gate.clone().clean_up(deadline)));
            }
            tokio::select! {
                biased;
                () = self.waker.notified() => {}
                () = time::sleep_until(next) => {}
                () = optional(&mut cleaning), if cleaning.is_some() && !cleaned => {
                    cleaned = true;
                    gate.cleaned_up();
                }
            }
        }
        drop(cleaning);
        gate.give_up_work();
    }
}

/// Waits for the future. Without a future it never completes.
async fn optional(future: &mut Option<impl Future<Output = ()> + Unpin>) {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // If its runtime has shut down and the lifecycle is still alive, the control thread has to
        // take over.
        if let Some(gate) = self.gate.upgrade() {
            gate.driver_ended(self.ran);
        }
    }
}
