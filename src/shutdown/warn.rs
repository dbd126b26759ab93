//! Detects mistakes in the set-up. Each kind of mistake is logged and reported once.

use std::time::Duration;

use tokio::time::Instant;

use super::{Lifecycle, state::State};
use crate::{
    config::plan::instant_after,
    connection::outside::Servers,
    events::{self, Event},
    phase::Phase,
    report::Warning,
    sync::{Ordering, lock},
};

/// How long there must have been no hold before the warning about upgraded connections. A handler
/// may drop its hold shortly before its socket.
const UNHELD: Duration = Duration::from_millis(100);

/// How long a handler has to close its socket after it may have been notified of draining. Such a
/// handler needs no hold.
const NOTIFIED: Duration = Duration::from_secs(1);

impl Lifecycle {
    /// Keeps a warning for the report. Returns its event for the log.
    pub(super) fn warn(&self, warning: Warning) -> Event {
        lock!(self.warnings).push(warning.clone());
        Event::Warning(warning)
    }

    /// The number of servers so far, by kind.
    pub(super) fn servers(&self, state: &State) -> Servers {
        Servers {
            run: state.servers_so_far,
            drains: state.drains_so_far,
            listeners: self.connections.listeners().so_far,
            tracks: self.tracks.load(Ordering::Relaxed),
        }
    }

    /// Warns of requests outside the layer, as soon as the mistake is certain.
    pub(crate) fn warn_of_outside(&self) {
        let servers = self.servers(&self.state());
        let warning = (self.outside).warning(self.has_ever_admitted(), servers, false);
        if let Some(warning) = warning {
            let event = self.warn(warning);
            self.log_event(event);
        }
    }

    /// Warns that the runtime of the driver ends in a stop that nothing awaits, if work has not ended. It is in the log
    /// when this returns, unless a subscriber is slow, because the log thread ends with the process.
    pub(super) fn warn_of_runtime(&self) {
        let awaited = self.work.not_ended();
        if !awaited.is_nothing() {
            self.log_event(Event::RuntimeEnds(awaited));
            events::flush(self.plan().effective().margin);
        }
    }

    /// Whether a task that may close a connection is notified that draining starts.
    pub(super) fn notifies_draining(&self) -> bool {
        self.waiters.any(Phase::Draining) || self.phases.receiver_count() > 0
    }

    /// Warns of upgraded connections that are open in the drain although there is no hold for them.
    /// Returns when to check again, if that is known.
    pub(super) fn warn_of_unheld(
        &self,
        state: &mut State,
        draining: Instant,
        now: Instant,
    ) -> Option<Instant> {
        if state.warned_of_unheld {
            return None;
        }
        if self.work.holds() > 0 || !self.upgraded.any() {
            state.unheld_since = None;
            return None;
        }
        let since = *state.unheld_since.get_or_insert(now);
        let mut at = instant_after(since, UNHELD);
        let is_cut = state.shutdown.as_ref().is_some_and(|it| it.cut.is_some());
        if state.notifies_draining && !is_cut {
            let notified = instant_after(draining, self.policy().drain_spread);
            at = at.max(instant_after(notified, NOTIFIED));
        }
        if now < at {
            return Some(at);
        }
        state.warned_of_unheld = true;
        let unheld = Warning::UpgradesNotHeld(self.upgraded.list(now));
        let event = self.warn(unheld);
        state.events.push(event);
        None
    }
}
