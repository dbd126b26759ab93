//! A pass of the timeline under the lock, and what it publishes when the lock is released.
//!
//! Each of the published values only moves forward, so an older update that is published late changes
//! nothing.
//!
//! Wakers may block, so under the real clock neither the control thread nor the driver publishes, and neither
//! does a server or a drain future that ends. A thread of [`background`](crate::background) does: see `publishing`.

use std::{
    sync::Arc,
    task::{Context, Waker},
};

use tokio::{sync::watch, time::Instant};

use super::{
    CONTROL, Lifecycle,
    publishing::{Published, Publisher},
    state::{Clock, ClosingStage, Shutdown, State},
};
#[cfg(feature = "signal")]
use crate::report::Trigger;
use crate::{
    background::{Job, drop_each, shielded},
    connection::{directive::Directive, stagger::Place},
    control::Subject,
    events::{self, Origin},
    phase::Phase,
    report::TaskKind,
    waiting::waiters::Moment,
};

/// What a step publishes after the lock is released. A later update is the greater one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Update {
    connections: Directive,
    /// How often connections with nothing left to wait for were told to close
    /// ([`Directive::Expire`]).
    expiries: u32,
    closing_stage: ClosingStage,
    moment: Moment,
}

impl Update {
    /// What is published before a stop begins.
    pub(super) const SERVING: Self = Self {
        connections: Directive::Stay,
        expiries: 0,
        closing_stage: ClosingStage::Open,
        moment: Moment {
            phase: Phase::Serving,
            place: Place::LAST,
        },
    };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// A call that changes something, or the driver.
    User,
    /// The control thread.
    Control,
}

impl Subject for Lifecycle {
    fn take_due_steps(self: &Arc<Self>) -> Option<Job> {
        self.driver_waker.begins_check();
        self.driver_waker.wake_driver();
        self.control_step(|_, _| ())
    }

    #[cfg(feature = "signal")]
    fn on_signal(self: &Arc<Self>, trigger: Trigger) -> Option<Job> {
        {
            let mut state = self.state();
            if state.clock == Clock::Tokio {
                // Only the driver can read the paused clock.
                state.pending_signals.push(trigger);
                drop(state);
                self.notify();
                return None;
            }
        }
        let publish = self.control_step(|state, now| self.handle_signal(state, trigger, now));
        self.start_driver();
        self.notify();
        publish
    }

    #[cfg(all(unix, feature = "signal"))]
    fn describe(&self) -> Option<String> {
        self.describe_end()
    }
}

impl Publisher for Lifecycle {
    type Update = Update;

    fn published(&self) -> &Published<Update> {
        &self.published
    }

    /// A panic in one of the wakers does not keep the others from being notified.
    fn wake_tasks(&self, update: Update) {
        let connections = &self.connections;
        shielded(|| connections.instruct(update.connections, update.expiries));
        shielded(|| advance(&self.closing_stages, update.closing_stage));
        shielded(|| advance(&self.phases, update.moment.phase));
        if update.moment.phase > Phase::LameDuck {
            self.waiters.notify(update.moment);
        }
        self.log.write();
    }

    fn run_elsewhere(&self, job: Job) {
        CONTROL.run_elsewhere(job);
    }
}

impl Lifecycle {
    /// Makes a change, takes every step that is then due, and notifies the driver.
    pub(super) fn change(self: &Arc<Self>, change: impl FnOnce(&mut State, Instant)) {
        self.step(change);
        self.notify();
    }

    /// As [`change`](Self::change), and has published the steps when it returns. Starts the driver if a stop has begun.
    pub(super) fn change_at_once(self: &Arc<Self>, change: impl FnOnce(&mut State, Instant)) {
        let (_, update, subscribers) = self.step_by(By::User, change);
        // First, because a waker may block this thread.
        self.start_driver();
        self.notify();
        self.publish(update);
        drop_each(subscribers);
    }

    pub(super) fn step(
        self: &Arc<Self>,
        change: impl FnOnce(&mut State, Instant),
    ) -> Option<Instant> {
        let mut is_real = false;
        let (next, update, subscribers) = self.step_by(By::User, |state, now| {
            change(state, now);
            is_real = state.clock == Clock::Real;
        });
        if !is_real {
            self.publish(update);
        } else if let Some(publish) = self.to_publish(update) {
            CONTROL.run_elsewhere(publish);
        }
        drop_each(subscribers);
        next
    }

    /// As [`step`](Self::step), for the control thread. Returns what is to be done on another thread.
    fn control_step(self: &Arc<Self>, change: impl FnOnce(&mut State, Instant)) -> Option<Job> {
        let (_, update, subscribers) = self.step_by(By::Control, change);
        if !subscribers.is_empty() {
            CONTROL.run_elsewhere(Box::new(move || drop_each(subscribers)));
        }
        self.to_publish(update)
    }

    /// Makes a change and takes every step that is then due. Returns when to check again, the update
    /// that the caller must publish, and references to log subscribers, which the caller must drop where
    /// their destructors may run.
    fn step_by(
        self: &Arc<Self>,
        by: By,
        change: impl FnOnce(&mut State, Instant),
    ) -> (Option<Instant>, Update, Vec<Origin>) {
        let now = Instant::now();
        let origin = (by == By::User).then(Origin::here).flatten();
        let mut state = self.state();
        change(&mut state, now);
        let is_real = state.clock == Clock::Real;
        let stopping = state.shutdown.is_some() && state.report.is_none();
        let keeps_time = stopping && is_real;
        let was_engaged = self.driver_waker.engage(keeps_time);
        let next = if by == By::Control && !is_real {
            None
        } else {
            if stopping {
                // Registered before the check, so that work that ends after the check notifies the
                // driver.
                let waker = Waker::from(Arc::clone(&self.driver_waker));
                let _ = self.poll_idle(&mut Context::from_waker(&waker));
            }
            let mut next = self.settle(&mut state, now);
            if let (Some(step), Some(draining)) = (next, state.draining_since()) {
                let progress = self.note_progress(&mut state, draining, now);
                let unheld = self.warn_of_unheld(&mut state, draining, now);
                next = Some(step.min(progress).min(unheld.unwrap_or(step)));
            }
            next
        };
        let ended = match next {
            Some(next) if is_real => {
                CONTROL.schedule(self.driver_waker.id(), self, next, self.is_driven());
                None
            }
            _ if was_engaged || keeps_time => {
                self.driver_waker.engage(false);
                CONTROL.end(self.driver_waker.id())
            }
            _ => None,
        };
        let stopped = stopping && state.report.is_some();
        #[cfg(feature = "signal")]
        if stopped {
            CONTROL.stopped(self.driver_waker.id(), self.has_ended());
        }
        // Taken in any case: a service that has stopped keeps no reference to a subscriber.
        let mut kept = state.origin.take();
        let former = origin.and_then(|origin| kept.replace(origin));
        let events = std::mem::take(&mut state.events);
        self.log.push(events, is_real, kept.as_ref());
        if stopping && !stopped {
            state.origin = kept.take();
        }
        let update = Update {
            connections: self.directive(&state),
            expiries: state.shutdown.as_ref().map_or(0, |it| it.expiries),
            closing_stage: state
                .shutdown
                .as_ref()
                .map_or(ClosingStage::Open, |it| it.closing_stage),
            moment: self.moment(&state, now),
        };
        let aborts_workers = state
            .shutdown
            .as_ref()
            .is_some_and(Shutdown::aborts_workers);
        drop(state);
        drop(ended);
        // An abort runs no code of the task.
        if stopped {
            self.work.give_up();
            if !self.is_driven() {
                let shared = self.clone();
                CONTROL.run_elsewhere(Box::new(move || shared.drop_jobs()));
            }
        } else if aborts_workers {
            self.work.abort(TaskKind::Worker);
        }
        if is_real {
            // The log thread writes the events, because a subscriber is user code.
            events::work();
        }
        (next, update, former.into_iter().chain(kept).collect())
    }

    /// The moment up to which waiters are notified: the phase, and during a spread drain the place
    /// in it.
    fn moment(&self, state: &State, now: Instant) -> Moment {
        let phase = self.phase();
        let spreading = (phase == Phase::Draining).then(|| state.draining_since());
        let place = spreading.flatten().map_or(Place::LAST, |since| {
            let elapsed = now.saturating_duration_since(since);
            Place::after(elapsed, self.policy().drain_spread)
        });
        Moment { phase, place }
    }

    /// The directive for all connections.
    fn directive(&self, state: &State) -> Directive {
        let Some(shutdown) = &state.shutdown else {
            return Directive::Stay;
        };
        // A connection that is registered after the stop is cut as well.
        if shutdown.cut.is_some() || state.report.is_some() {
            return Directive::Cut;
        }
        let phase = self.phase();
        if shutdown.expiries > 0 {
            Directive::Expire
        } else if shutdown.closing_stage >= ClosingStage::Connections {
            Directive::Close
        } else if shutdown.closing_stage >= ClosingStage::Reads {
            Directive::Read
        } else if phase >= Phase::Draining || shutdown.asks_all {
            Directive::Leave
        } else if phase == Phase::LameDuck && self.policy().is_spread() {
            Directive::LeaveInSlot
        } else {
            Directive::Stopping
        }
    }
}

/// Moves a watched value forward, never back. Values are published after the lock is released, so a
/// newer value may have been published before an older one.
fn advance<T: Ord + Copy>(watched: &watch::Sender<T>, to: T) {
    watched.send_if_modified(|value| {
        let moves = *value < to;
        *value = to.max(*value);
        moves
    });
}
