//! The task that lets time pass.

use std::{
    convert::Infallible,
    future::{pending, poll_fn},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    sync::{Notify, oneshot},
    time::{self, Instant, MissedTickBehavior},
};

use super::{Shared, WeakShared};
use crate::{events, phase::Phase, plan::instant_after};

/// How often a drain says what it is waiting for.
const PROGRESS: Duration = Duration::from_secs(2);

/// Sleeps until the next step is due, and takes it.
pub(super) struct Driver {
    gate: WeakShared,
    bell: Arc<Notify>,
}

impl Driver {
    pub(super) fn new(gate: WeakShared, bell: Arc<Notify>) -> Self {
        Self { gate, bell }
    }

    /// Begins when it is given the service to drive. If that is gone it never will be, and ends.
    pub(super) async fn run(self, started: oneshot::Receiver<Shared>) {
        let Ok(gate) = started.await else {
            return;
        };
        let _clock = Clock::start(Arc::clone(&self.bell));
        let mut progress = time::interval_at(instant_after(Instant::now(), PROGRESS), PROGRESS);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut phase = Phase::Serving;
        // Once the gate has said so it stays so, and need not be asked again.
        let mut idle = false;
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
            let before = std::mem::replace(&mut phase, gate.phase());
            let draining = phase >= Phase::Draining;
            if draining && before < Phase::Draining {
                progress.reset();
            }
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                () = time::sleep_until(next) => {}
                () = poll_fn(|cx| gate.poll_idle(cx)), if draining && !idle => idle = true,
                () = optional(&mut cleaning), if cleaning.is_some() && !cleaned => {
                    cleaned = true;
                    gate.cleaned_up();
                }
                _ = progress.tick(), if draining => gate.progress(),
            }
        }
        drop(cleaning);
        gate.give_up_work();
    }
}

/// Rings the bell every now and then, from a thread of its own, until it is dropped.
///
/// Of the threads of a runtime one at a time waits for timers and sockets. If a task that it runs
/// does not return, nobody does until another has reason to; a ring from outside is one. On a
/// runtime of a single thread nothing would help.
struct Clock(#[expect(dead_code)] Option<mpsc::Sender<Infallible>>);

impl Clock {
    const TICK: Duration = Duration::from_millis(50);

    fn start(bell: Arc<Notify>) -> Self {
        if Handle::current().runtime_flavor() != RuntimeFlavor::MultiThread {
            return Self(None);
        }
        let (alive, dropped) = mpsc::channel();
        let clock = thread::Builder::new().name("graceful-clock".to_owned());
        let ticking = clock.spawn(move || {
            while dropped.recv_timeout(Self::TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
                bell.notify_one();
            }
        });
        // Without it there is still the runtime's own.
        Self(ticking.is_ok().then_some(alive))
    }
}

/// The future, if there is one.
async fn optional(future: &mut Option<impl Future<Output = ()> + Unpin>) {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Its runtime may be gone while the service lives: the next call starts another.
        if let Some(gate) = self.gate.upgrade() {
            gate.state().driven = false;
        }
    }
}

impl Shared {
    fn progress(&self) {
        let phase = self.phase();
        if let Some(time_left) = self.time_left(phase) {
            let mut oldest = self.roll.list(Instant::now());
            oldest.truncate(3);
            let connections = self.connections.len();
            events::progress(phase, self.in_flight(), connections, time_left, &oldest);
        }
    }
}
