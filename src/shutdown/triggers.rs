//! What starts and hastens a stop: calls, signals, servers and drain futures that end.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

#[cfg(feature = "signal")]
use super::CONTROL;
use super::{
    Lifecycle,
    state::{ServerEnd, Shutdown, State},
};
#[cfg(feature = "signal")]
use crate::events::{Effect, Event};
use crate::report::Trigger;
#[cfg(all(unix, feature = "signal"))]
use crate::{config::plan::instant_after, control::clock};

/// Two SIGINTs within this time count as one signal. A terminal delivers Ctrl-C to the whole
/// process group, and a parent process may forward it as well.
#[cfg(feature = "signal")]
const DOUBLED: Duration = Duration::from_millis(100);

impl Lifecycle {
    /// Records that a drain future waits. The server that it stands for may run outside of `run`.
    pub(crate) fn drain_began(self: &Arc<Self>) {
        self.server_begins();
        let mut state = self.state();
        state.drains += 1;
        state.drains_so_far += 1;
    }

    /// Panics in a runtime without timers, and if a log subscriber does. So nothing is counted before.
    fn server_begins(self: &Arc<Self>) {
        self.drive();
        self.log_plan();
        self.mark_served();
    }

    /// Records that a drain future that called `drain_began` has ended.
    pub(crate) fn drain_ended(self: &Arc<Self>) {
        self.change(|state, _| state.drains -= 1);
    }

    /// Starts the timeline, unless it has started already.
    pub(crate) fn trigger(self: &Arc<Self>, trigger: Trigger) {
        // First, because it determines the clock that the step uses.
        self.spawn_driver();
        self.change_at_once(|state, now| self.start(state, trigger, now));
    }

    fn start(&self, state: &mut State, trigger: Trigger, now: Instant) {
        if state.shutdown.is_some() {
            return;
        }
        let delay = match trigger {
            // Nothing has been served yet, so no load balancer sends traffic to this process.
            Trigger::Terminate | Trigger::Interrupt if !self.word().has_served() => Duration::ZERO,
            Trigger::Interrupt => self.plan.interrupt_delay(),
            Trigger::Terminate
            | Trigger::Shutdown
            | Trigger::Future
            | Trigger::ServerEnded
            | Trigger::WorkerEnded
            | Trigger::PreStop => self.plan().drain_delay(),
        };
        state.events.extend(self.plan_event());
        if self.policy().leave_early.is_on() {
            self.evidence.begin(now);
        }
        state.shutdown = Some(Shutdown::new(trigger, now, self.plan.deadlines(delay)));
        #[cfg(all(unix, feature = "signal"))]
        CONTROL.watch_until(
            self.driver_waker.id(),
            instant_after(clock::real_now(), self.plan.last_moment()),
        );
    }

    /// Passes signals to this lifecycle from now on, unless it has stopped.
    #[cfg(feature = "signal")]
    pub(crate) fn listen(self: &Arc<Self>) -> std::io::Result<()> {
        self.log_plan();
        // Under the lock, so that the service cannot stop between the check and the registration.
        let state = self.state();
        if state.report.is_some() {
            return Ok(());
        }
        CONTROL.listen(self.driver_waker.id(), Arc::downgrade(self))
    }

    /// Activates the watchdog: it ends the process near the end of the grace period if the service
    /// has not stopped by then.
    #[cfg(all(unix, feature = "signal"))]
    pub(crate) fn watch_grace_period(self: &Arc<Self>) -> std::io::Result<()> {
        CONTROL.watch(self.driver_waker.id(), Arc::downgrade(self))
    }

    /// Handles a signal as the control thread does under the real clock. Called by the driver and
    /// by tests.
    #[cfg(feature = "signal")]
    pub(crate) fn signal(self: &Arc<Self>, trigger: Trigger) {
        self.spawn_driver();
        self.change_at_once(|state, now| self.handle_signal(state, trigger, now));
    }

    /// Handles the signals that were left for the driver.
    #[cfg(feature = "signal")]
    pub(super) fn act_on_signals(self: &Arc<Self>) {
        // A separate statement: in the `for` expression the lock would be held during the loop.
        let signals = std::mem::take(&mut self.state().pending_signals);
        for trigger in signals {
            self.signal(trigger);
        }
    }

    /// The first signal starts the timeline. A further SIGTERM changes nothing. A further SIGINT
    /// ends the present phase.
    #[cfg(feature = "signal")]
    pub(super) fn handle_signal(&self, state: &mut State, trigger: Trigger, now: Instant) {
        let first = state.shutdown.is_none();
        self.start(state, trigger, now);
        let stopped = state.report.is_some();
        let Some(shutdown) = &mut state.shutdown else {
            return;
        };
        let interrupt = trigger == Trigger::Interrupt;
        let doubled = interrupt
            && shutdown
                .last_interrupt
                .is_some_and(|last| now.saturating_duration_since(last) < DOUBLED);
        if interrupt && !doubled {
            shutdown.last_interrupt = Some(now);
        }
        if first {
            return;
        }
        let effect = if doubled {
            Effect::Doubled
        } else if !interrupt || stopped {
            Effect::Nothing
        } else if shutdown.cleanup.is_some() {
            Effect::EndedCleanup
        } else {
            Effect::Ended(self.phase())
        };
        shutdown.skip_phase |= matches!(effect, Effect::EndedCleanup | Effect::Ended(_));
        state.events.push(Event::Signal(trigger, effect));
    }

    pub(crate) fn server_began(self: &Arc<Self>) {
        self.server_begins();
        let mut state = self.state();
        state.servers += 1;
        state.servers_so_far += 1;
    }

    pub(crate) fn server_ended(self: &Arc<Self>, end: &ServerEnd) {
        self.change(|state, now| {
            state.servers -= 1;
            if let ServerEnd::Failed(error) = end {
                state.server_error.get_or_insert_with(|| error.clone());
            }
            if *end != ServerEnd::Dropped {
                self.start(state, Trigger::ServerEnded, now);
            }
        });
        self.start_driver();
    }
}
