//! What needs the control thread, and what it has to do now. Protected by the lock of `Control`.

use std::sync::Arc;
#[cfg(feature = "signal")]
use std::{collections::HashMap, sync::Weak};

use tokio::time::Instant;

use super::{FALLBACK_CHECK, Subject, deadlines::Deadlines, thread_state::ThreadState};
#[cfg(feature = "signal")]
use super::{Id, signals::Signals};
use crate::config::plan::instant_after;
#[cfg(feature = "signal")]
use crate::report::Trigger;

/// Everything that the thread knows.
pub(super) struct Needs<S: Subject> {
    pub(super) thread: ThreadState,
    /// Until when the thread sleeps.
    pub(super) sleeps_until: Option<Instant>,
    pub(super) deadlines: Deadlines<Arc<S>>,
    #[cfg(feature = "signal")]
    pub(super) listening: SignalListeners<S>,
    /// The lifecycles with a watchdog.
    #[cfg(all(unix, feature = "signal"))]
    pub(super) watched: HashMap<Id, Watched<S>>,
}

/// A lifecycle with a watchdog.
#[cfg(all(unix, feature = "signal"))]
pub(super) struct Watched<S> {
    /// When the process must have ended, once a stop has begun.
    pub(super) until: Option<Instant>,
    pub(super) subject: Weak<S>,
    /// Set when the service has stopped and has given up work. That work may block the process although the
    /// program has dropped the lifecycle.
    pub(super) kept: Option<Arc<S>>,
}

/// The lifecycles that listen for signals.
#[cfg(feature = "signal")]
pub(super) struct SignalListeners<S: Subject> {
    pub(super) signals: Option<Signals>,
    pub(super) listeners: HashMap<Id, Weak<S>>,
    /// Set when the last listener has stopped, and unset when there is another: until then signals are not given
    /// back to the operating system.
    pub(super) late_until: Option<Instant>,
}

/// What the thread has to do now.
pub(super) struct DueWork<S: Subject> {
    pub(super) checks: Vec<Arc<S>>,
    #[cfg(feature = "signal")]
    pub(super) signals: Vec<Trigger>,
    #[cfg(feature = "signal")]
    pub(super) listeners: Vec<Weak<S>>,
    #[cfg(feature = "signal")]
    pub(super) is_late: bool,
    #[cfg(all(unix, feature = "signal"))]
    pub(super) overdue: Vec<Arc<S>>,
}

impl<S: Subject> Needs<S> {
    pub(super) fn new() -> Self {
        Self {
            thread: ThreadState::new(),
            sleeps_until: None,
            deadlines: Deadlines::default(),
            #[cfg(feature = "signal")]
            listening: SignalListeners {
                signals: None,
                listeners: HashMap::new(),
                late_until: None,
            },
            #[cfg(all(unix, feature = "signal"))]
            watched: HashMap::new(),
        }
    }

    pub(super) fn take(&mut self, now: Instant) -> DueWork<S> {
        #[cfg(feature = "signal")]
        let signals = self.listening.signals.as_ref().map(Signals::take);
        #[cfg(feature = "signal")]
        let signals = signals.unwrap_or_default();
        DueWork {
            checks: self.deadlines.take(now, instant_after(now, FALLBACK_CHECK)),
            #[cfg(feature = "signal")]
            listeners: if signals.is_empty() {
                Vec::new()
            } else {
                self.listening.listeners.values().cloned().collect()
            },
            #[cfg(feature = "signal")]
            signals,
            #[cfg(feature = "signal")]
            is_late: self.listening.late_until.is_some(),
            #[cfg(all(unix, feature = "signal"))]
            overdue: self.take_overdue(now),
        }
    }

    #[cfg(all(unix, feature = "signal"))]
    fn take_overdue(&mut self, now: Instant) -> Vec<Arc<S>> {
        let mut overdue = Vec::new();
        self.watched.retain(|_, watched| {
            let is_over = watched.until.is_some_and(|until| until <= now);
            if is_over {
                overdue.extend(watched.subject.upgrade());
            }
            !is_over
        });
        overdue
    }

    pub(super) fn has_need(&self) -> bool {
        #[cfg(feature = "signal")]
        if !self.listening.listeners.is_empty() || self.listening.late_until.is_some() {
            return true;
        }
        #[cfg(all(unix, feature = "signal"))]
        if !self.watched.is_empty() {
            return true;
        }
        !self.deadlines.is_empty()
    }

    pub(super) fn next(&self) -> Option<Instant> {
        let next = self.deadlines.next().into_iter();
        #[cfg(feature = "signal")]
        let next = next.chain(self.listening.late_until);
        #[cfg(all(unix, feature = "signal"))]
        let next = next.chain(self.watched.values().filter_map(|it| it.until));
        next.min()
    }
}

#[cfg(feature = "signal")]
impl<S: Subject> SignalListeners<S> {
    /// If no lifecycle listens, a signal does from now on what it did before this crate first listened. A handler
    /// that the program has installed later does not keep the default action away.
    pub(super) fn give_back_if_unused(&self) {
        if self.listeners.is_empty() {
            if let Some(signals) = &self.signals {
                signals.give_back();
            }
        }
    }
}

impl<S: Subject> DueWork<S> {
    pub(super) fn is_empty(&self) -> bool {
        #[cfg(feature = "signal")]
        if !self.signals.is_empty() {
            return false;
        }
        #[cfg(all(unix, feature = "signal"))]
        if !self.overdue.is_empty() {
            return false;
        }
        self.checks.is_empty()
    }
}
