//! The steps of the timeline: which are due, and in what order.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Shared,
    state::{ClosingStage, Cut, LAST_WORDS, Shutdown, State},
};
use crate::{
    config::plan::instant_after,
    events::{Reason, Transition},
    phase::Phase,
    report::{GivenUp, LeftEarly, Remaining},
    sync::lock,
};

/// How long nothing may have been heard, neither a new connection nor a byte on an old one, before
/// the server is told to close: a server told so closes silent connections at once, and with them
/// requests that are on their way. Measured on loopback, where without it a third of the requests
/// that race with the stop are lost.
pub(crate) const LINGER: Duration = Duration::from_millis(25);

/// How long it waits for that, for clients that are never quiet.
const MOST_LINGER: Duration = Duration::from_millis(150);

/// How long it waits for connections that no task has read yet: on a busy machine the runtime comes to
/// them late, and each may have a request waiting. And for handshakes whose peers have begun to speak.
const MOST_UNREAD: Duration = Duration::from_secs(1);

/// How often it looks whether such handshakes still run, and whether connections have closed.
const LOOK: Duration = Duration::from_millis(5);

/// How much longer the delay may be for a listener that waits for descriptors: what holds them may
/// be work that is told to end only when draining starts.
const STARVED_DELAY: Duration = Duration::from_secs(1);

/// How long servers that are given up have to be dropped.
const DROPPED: Duration = Duration::from_millis(50);

/// In how many turns long-lived work is told to end, where that is spread.
const TURNS: u32 = 100;

/// How long a turn is at least: what a timer of the runtime can tell apart.
const LEAST_TURN: Duration = Duration::from_millis(1);

/// What is due.
enum Step {
    To(Phase, Reason),
    /// Nothing until then, or until something changes.
    Until(Instant),
}

/// How long after its runtime has ended another one may take over the cleanup.
const TAKE_OVER: Duration = Duration::from_millis(250);

/// The driver cleans up, and says when that is done. Its runtime may be blocked, or gone.
fn settle_cleanup(shutdown: &mut Shutdown, driver_gone: Option<Instant>, now: Instant) -> Step {
    let skip_phase = std::mem::take(&mut shutdown.skip_phase);
    let Some(cleanup) = &shutdown.cleanup else {
        return Step::Until(now);
    };
    let lost = driver_gone.map(|gone| instant_after(gone.max(cleanup.begun), TAKE_OVER));
    if cleanup.done {
        Step::To(Phase::Stopped, cleanup.after)
    } else if skip_phase {
        Step::To(Phase::Stopped, Reason::Signal)
    } else if lost.is_some_and(|lost| now >= lost) {
        Step::To(Phase::Stopped, Reason::NoRuntime)
    } else if now >= cleanup.until {
        Step::To(Phase::Stopped, Reason::CleanupOverdue)
    } else {
        Step::Until(lost.map_or(cleanup.until, |lost| lost.min(cleanup.until)))
    }
}

impl Shared {
    /// Takes every step that is due at `now`. Says when to look again, if ever.
    pub(super) fn settle(
        &self,
        state: &mut State,
        now: Instant,
        transitions: &mut Vec<Transition>,
    ) -> Option<Instant> {
        loop {
            let phase = self.phase();
            let servers = state.servers.unwrap_or(0);
            let nobody_serves = state.servers == Some(0) && state.drains == 0;
            let driver_gone = state.driver_gone;
            let shutdown = state.shutdown.as_mut()?;
            let step = match phase {
                Phase::Serving => Step::To(Phase::LameDuck, Reason::Triggered(shutdown.trigger)),
                Phase::LameDuck => self.settle_lame_duck(shutdown, nobody_serves, now),
                Phase::Draining => self.settle_draining(shutdown, servers, now),
                Phase::Closing if shutdown.cleanup.is_some() => {
                    settle_cleanup(shutdown, driver_gone, now)
                }
                Phase::Closing => self.settle_closing(shutdown, servers, now),
                Phase::Stopped => return None,
            };
            if matches!(step, Step::To(Phase::Stopped, _)) {
                shutdown.closing_stage = ClosingStage::Servers;
                // Connections are gone, as far as they will be.
                shutdown.queued = self.starved.reset_queues();
            }
            match step {
                Step::Until(instant) => return Some(self.next_turn(state, now).min(instant)),
                Step::To(Phase::Stopped, reason)
                    if shutdown.begins_cleanup(reason, now, &self.work) => {}
                Step::To(phase, reason) => self.enter(state, phase, reason, now, transitions),
            }
        }
    }

    fn settle_lame_duck(&self, shutdown: &mut Shutdown, nobody_serves: bool, now: Instant) -> Step {
        let planned = (shutdown.last_words, shutdown.delay_until, Reason::DelayOver);
        let early = self
            .leaves_at()
            .filter(|(at, _)| *at < shutdown.delay_until);
        let (last_words, until, over) = early.map_or(planned, |(at, why)| {
            let last_words = at.checked_sub(LAST_WORDS).unwrap_or(now);
            (
                last_words.min(shutdown.last_words),
                at,
                Reason::LeftEarly(why),
            )
        });
        let reason = if std::mem::take(&mut shutdown.skip_phase) {
            Reason::Signal
        } else if let Some(reason) = shutdown.delay_over {
            reason
        } else if now >= until {
            over
        } else if nobody_serves {
            Reason::EveryServerEnded
        } else if self.has_moved() {
            Reason::Moved
        } else if now < last_words {
            return Step::Until(last_words);
        } else {
            shutdown.asks_all = true;
            return Step::Until(until);
        };
        shutdown.delay_over = Some(reason);
        // What is in the accept queue is served, and only then is work refused.
        let shared = self.shares_listeners();
        if shared || !self.policy.keep_listening {
            if let Some(until) = self.advance_closing(shutdown, now) {
                let begun = shutdown.closing_begun.unwrap_or(now);
                if now < begun + STARVED_DELAY {
                    return Step::Until(until.min(begun + STARVED_DELAY));
                }
            }
        }
        if let (true, Some(since)) = (shared, shutdown.closes_since) {
            // A request that comes before its connection knows of the close is served, too. Once every
            // connection that is left has a request in flight, none can come.
            let until = shutdown.drain_until.min(since + MOST_UNREAD);
            if now < until && self.connections.len() > self.in_flight() {
                return Step::Until(until.min(now + LOOK));
            }
        }
        Step::To(Phase::Draining, reason)
    }

    /// When the lame-duck phase may end before its delay is over, and why. Not before every hook has
    /// ended: a hook that deregisters is how a balancer learns of the stop.
    fn leaves_at(&self) -> Option<(Instant, LeftEarly)> {
        let rules = self.policy.leave_early;
        if !rules.is_on() || self.work.has_hook() {
            return None;
        }
        self.evidence.leaves_at(rules)
    }

    fn settle_draining(&self, shutdown: &mut Shutdown, servers: usize, now: Instant) -> Step {
        if self.is_idle() {
            // Whatever it wanted to hurry is over.
            shutdown.skip_phase = false;
            Step::To(Phase::Closing, Reason::Idle)
        } else if std::mem::take(&mut shutdown.skip_phase) {
            self.cut(shutdown, servers, now);
            Step::To(Phase::Closing, Reason::Signal)
        } else if now >= shutdown.drain_until {
            self.cut(shutdown, servers, now);
            Step::To(Phase::Closing, Reason::Deadline)
        } else if now < shutdown.last_call {
            Step::Until(shutdown.last_call)
        } else if !self.connections.has_any() {
            Step::Until(shutdown.drain_until)
        } else {
            // Who has been answered is to be gone before the others are cut.
            let told = self.advance_closing(shutdown, now);
            // That is no later than the drain deadline.
            Step::Until(told.unwrap_or(shutdown.drain_until))
        }
    }

    fn settle_closing(&self, shutdown: &mut Shutdown, servers: usize, now: Instant) -> Step {
        if shutdown.closing_stage < ClosingStage::Connections
            && std::mem::take(&mut shutdown.skip_phase)
        {
            // Nobody has been told to close yet: they are now.
            shutdown.close_connections(now);
        }
        let told = self.advance_closing(shutdown, now);
        let closed =
            servers == 0 && self.connections.len() == 0 && self.is_idle() && told.is_none();
        let until = shutdown.ends(Phase::Closing).unwrap_or(now);
        if closed {
            let reason = if shutdown.closing_stage == ClosingStage::Servers {
                Reason::LetGo
            } else if shutdown.cut.is_some() {
                Reason::Cut
            } else {
                Reason::Closed
            };
            return Step::To(Phase::Stopped, reason);
        }
        let skipped = std::mem::take(&mut shutdown.skip_phase);
        if shutdown.cut.is_some() {
            return if skipped {
                Step::To(Phase::Stopped, Reason::Signal)
            } else if now >= until {
                shutdown.closing_stage = ClosingStage::Servers;
                // A server that owns its handlers drops them with itself, before anything is cleaned up.
                let dropped = instant_after(until, DROPPED);
                if servers > 0 && now < dropped {
                    Step::Until(dropped)
                } else {
                    Step::To(Phase::Stopped, Reason::LetGo)
                }
            } else {
                Step::Until(until)
            };
        }
        if skipped || now >= until {
            self.cut(shutdown, servers, now);
            if let Some(cut) = &mut shutdown.cut {
                cut.skipped = skipped;
            }
            return self.settle_closing(shutdown, servers, now);
        }
        let next = told.or_else(|| shutdown.expire(until, now));
        Step::Until(next.map_or(until, |next| next.min(until)))
    }

    /// When more of the long-lived work is to be told to end.
    fn next_turn(&self, state: &State, now: Instant) -> Instant {
        let never = instant_after(now, Duration::MAX);
        let spread = self.policy.drain_spread;
        let Some(since) = state.draining_since() else {
            return never;
        };
        let end = instant_after(since, spread);
        if now >= end {
            return never;
        }
        // Looking more often tells nobody later. Looking once more after the end tells nobody twice.
        end.min(instant_after(now, LEAST_TURN.max(spread / TURNS)))
    }

    fn enter(
        &self,
        state: &mut State,
        to: Phase,
        reason: Reason,
        now: Instant,
        transitions: &mut Vec<Transition>,
    ) {
        let Some(shutdown) = &mut state.shutdown else {
            return;
        };
        if to == Phase::Stopped {
            let error = state.server_error.take();
            let figures = self.since_serving();
            let half_closed = self.connections.count_half_closed();
            let tasks = self.work.tasks();
            let tasks = (tasks, self.work.unlisted());
            let mut report = shutdown.report(reason, error, figures, half_closed, tasks, now);
            report.warnings = lock!(self.warnings).as_slice().into();
            state.report = Some(report);
            if let Some(cut) = &mut shutdown.cut {
                // They keep the lifecycle alive.
                cut.connections.clear();
            }
        } else {
            shutdown.entered.push(now);
        }
        if to == Phase::Draining {
            state.tells_somebody = self.tells_somebody();
        }
        if let Some(before) = self.advance(to) {
            if to == Phase::LameDuck {
                shutdown.in_flight = before.count();
                // What came before is of no interest.
                self.connections.take_activity();
            }
        }
        let until = shutdown.ends(to).unwrap_or(now);
        if to == Phase::LameDuck || to == Phase::Draining {
            let servers = self.servers(state);
            let warning = (self.outside).warning(self.has_ever_admitted(), servers, true);
            state.events.extend(warning.map(|it| self.warn(it)));
        }
        let Some(shutdown) = &state.shutdown else {
            return;
        };
        transitions.push(Transition {
            to,
            reason,
            after: now.saturating_duration_since(shutdown.entered[0]),
            time_left: until.saturating_duration_since(now),
            in_flight: self.in_flight(),
            connections: self.connections.len(),
        });
    }

    /// Has the listeners closed, and then the servers told to close their connections. Says when
    /// to look again, if that is not done.
    fn advance_closing(&self, shutdown: &mut Shutdown, now: Instant) -> Option<Instant> {
        if shutdown.closing_stage >= ClosingStage::Connections {
            return None;
        }
        let begun = *shutdown.closing_begun.get_or_insert(now);
        shutdown.closing_stage = ClosingStage::Listeners;
        let listeners = self.connections.listeners();
        // Without a listener of ours there is no knowing what is accepted when.
        if listeners.so_far > 0 && shutdown.cut.is_none() && !self.has_moved() {
            // The listener stops by itself soon after its task runs. On a machine that is
            // overloaded the task may run late.
            let mut last_accepts = begun + MOST_UNREAD;
            if self.starved.is_waiting() {
                last_accepts = last_accepts.max(shutdown.last_call);
            }
            let last_accepts = shutdown.drain_until.min(last_accepts);
            if listeners.open > 0 && now < last_accepts {
                return Some(last_accepts);
            }
            let begun = self.starved.over().map_or(begun, |over| over.max(begun));
            let most = shutdown.drain_until.min(begun + MOST_UNREAD);
            if now < most && self.connections.has_handshakes() {
                shutdown.shook = Some(now);
                return Some(most.min(now + LOOK));
            }
            let unread = self.connections.has_unread();
            let most = begun + if unread { MOST_UNREAD } else { MOST_LINGER };
            // A request comes with the last of its handshake, or right after it.
            let shook = shutdown.shook.map_or(most, |shook| shook + LOOK + LINGER);
            let most = shutdown.drain_until.min(most.max(shook));
            if self.connections.take_activity() || unread {
                shutdown.heard = Some(now);
            }
            let heard = shutdown.heard.max(shutdown.entered.first().copied());
            let until = heard.map_or(now, |heard| heard + LINGER).min(most);
            if now < until {
                return Some(until);
            }
        }
        shutdown.close_connections(now);
        None
    }

    /// Ends by force what is still there.
    fn cut(&self, shutdown: &mut Shutdown, servers: usize, now: Instant) {
        let given_up = GivenUp {
            requests: self.request_table.list(now),
            holds: self.work.list_holds(now),
            connections: Vec::new(),
        };
        let connections = self.connections.list(now);
        shutdown.cleans_up = self.work.has_steps();
        shutdown.cut = Some(Cut {
            at: now,
            remaining: Remaining {
                requests: self.settled_word().count(),
                holds: given_up.holds.len(),
                connections: connections.len(),
                servers,
                ..Remaining::default()
            },
            // After the count, so that no request that has left it is missing here.
            dropped: self.since_serving().dropped,
            pieces: self.pieces(),
            given_up,
            connections,
            skipped: false,
        });
    }
}
