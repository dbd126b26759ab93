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
//! runtime spawns a new driver there. It goes on with what has not ended, which `tasks::list` knows: a
//! driver owns no work. Tasks that can no longer be run are reported as not run or cut.
//!
//! 1. *A task that waits for a phase notices the end of a driver.* The end is recorded before the
//!    registered tasks are woken, and a task looks for a driver after it has registered. If the
//!    waking does not find its registration, the lock of the shard orders the record before the
//!    look.
//! 2. *A task does not wake itself for ever.* A handle of a runtime still polls futures after the
//!    runtime has shut down. A driver that is spawned there ends at once, and would wake the task
//!    that has spawned it. So no driver is spawned in a runtime that has shut down.

use std::{
    future::pending,
    pin::Pin,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use tokio::{
    runtime,
    sync::oneshot,
    task,
    time::{self, Instant},
};

use super::{CONTROL, Lifecycle, Shared, state::Clock};
use crate::{
    background::Job,
    control::{DriverWaker, clock},
    phase::Phase,
};

/// Sleeps until the next step is due, and takes it, until the service has stopped.
struct Driver {
    shared: Weak<Lifecycle>,
    waker: Arc<DriverWaker>,
}

impl Driver {
    /// Waits until a stop passes it the lifecycle, and then drives the stop. Ends at once if the
    /// lifecycle is dropped first.
    async fn run(self, mut started: oneshot::Receiver<Shared>) {
        let shared = loop {
            tokio::select! {
                shared = &mut started => match shared {
                    Ok(shared) => break shared,
                    Err(_) => return,
                },
                () = self.waker.notified() => {
                    #[cfg(feature = "signal")]
                    if let Some(shared) = self.shared.upgrade() {
                        shared.act_on_signals();
                    }
                }
            }
        };
        let mut cleans = false;
        let mut cleaning: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(pending());
        while let Some(next) = shared.tick() {
            // A later call finds only hooks that had not begun when their runtime ended.
            shared.start_hooks();
            if let (false, Some(deadline)) = (cleans, shared.cleanup_deadline()) {
                cleans = true;
                cleaning = Box::pin(shared.clone().clean_up(deadline));
            }
            tokio::select! {
                biased;
                // First, because the driver may be notified again and again.
                () = &mut cleaning => cleaning = Box::pin(pending()),
                () = self.waker.notified() => {}
                () = time::sleep_until(next) => {}
            }
            // `notified` alone never lets the other tasks of this thread run.
            task::consume_budget().await;
        }
        drop(cleaning);
        shared.drop_jobs();
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // If its runtime has shut down and the lifecycle is still alive, the control thread has to
        // take over.
        if let Some(shared) = self.shared.upgrade() {
            shared.driver_ended();
        }
    }
}

impl Lifecycle {
    /// Spawns a driver if there is none and the caller is inside a runtime. Starts it if a stop is
    /// under way.
    pub(crate) fn drive(self: &Arc<Self>) {
        self.spawn_driver();
        self.start_driver();
    }

    pub(super) fn spawn_driver(self: &Arc<Self>) {
        let Ok(runtime) = runtime::Handle::try_current() else {
            return;
        };
        let clock = clock_here();
        {
            let mut state = self.state();
            let driven = self.is_driven();
            if clock == Clock::Tokio && driven {
                // The clock was paused after the driver had been spawned.
                state.clock = clock;
            }
            if driven || state.report.is_some() {
                return;
            }
        }
        // `sleep` panics if the runtime has no timers. Here the panic reaches the caller. In the
        // driver task it would stay unnoticed.
        drop(time::sleep(Duration::ZERO));
        if has_shut_down(&runtime) {
            return;
        }
        let (start, started) = oneshot::channel();
        {
            let mut state = self.state();
            if self.is_driven() || state.report.is_some() {
                return;
            }
            self.driven.store(true, Ordering::Release);
            state.clock = clock;
            state.driver_gone = None;
            state.start = Some(start);
        }
        let driver = Driver {
            shared: Arc::downgrade(self),
            waker: Arc::clone(&self.driver_waker),
        };
        // After the lock is released: a runtime that has begun to shut down since drops the driver
        // here, which calls `driver_ended`.
        drop(runtime.spawn(driver.run(started)));
    }

    /// Records that the driver has ended, because its runtime has shut down or because nothing is
    /// left to do.
    fn driver_ended(self: &Arc<Self>) {
        let stopping = {
            let mut state = self.state();
            self.driven.store(false, Ordering::Release);
            state.clock = Clock::Real;
            if state.report.is_some() {
                drop(state);
                // If the control thread took the last step, the driver may not have been polled after it.
                self.drop_jobs();
                return;
            }
            state.driver_gone = Some(Instant::now());
            state.shutdown.is_some()
        };
        let is_awaited = self.waiters.any(Phase::Stopped);
        // One of the waiting tasks may run in another runtime, and spawns a driver there.
        if self.waiters.make_all_due() {
            CONTROL.run_elsewhere(self.waking());
        }
        self.change(|_, _| ());
        if stopping && !is_awaited {
            // `main` may be about to return.
            self.warn_of_runtime();
        }
    }

    /// A job that wakes the due tasks. Before it begins, it queues itself again, because a waker may block: see
    /// `publishing`.
    fn waking(self: &Arc<Self>) -> Job {
        let shared = self.clone();
        Box::new(move || {
            if shared.waiters.has_due() {
                CONTROL.run_elsewhere(shared.waking());
                shared.waiters.wake_due();
            }
        })
    }

    /// Passes the lifecycle to the driver if a stop is under way. The driver then keeps it alive,
    /// so that the stop completes even if every handle is dropped.
    pub(super) fn start_driver(self: &Arc<Self>) {
        let start = {
            let mut state = self.state();
            if state.shutdown.is_none() {
                return;
            }
            state.start.take()
        };
        if let Some(start) = start {
            // If the driver has ended, `send` returns the lifecycle, and it is dropped here.
            drop(start.send(self.clone()));
        }
    }

    /// Takes every step that is due. Called by the driver. Returns when to check again, if ever.
    fn tick(self: &Arc<Self>) -> Option<Instant> {
        let clock = clock_here();
        #[cfg(feature = "signal")]
        self.act_on_signals();
        self.step(|state, _| state.clock = clock)
    }
}

/// Whether the runtime takes no more tasks.
pub(crate) fn has_shut_down(runtime: &runtime::Handle) -> bool {
    // Such a runtime drops a task within `spawn`. This one does not end by itself.
    let task = runtime.spawn(pending::<()>());
    let dropped = task.is_finished();
    task.abort();
    dropped
}

fn clock_here() -> Clock {
    if clock::is_real() {
        Clock::Real
    } else {
        Clock::Tokio
    }
}
