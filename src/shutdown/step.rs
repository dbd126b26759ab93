//! The steps of the timeline: which of them are due, and in which order they are taken.
//!
//! This file is long because the order of the steps is one decision, and each step depends on the others.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Lifecycle,
    closing::{CHECK_INTERVAL, MOST_UNREAD},
    state::{ASK_ALL_BEFORE, ClosingStage, Cut, Shutdown, State},
};
use crate::{
    admission::Word,
    config::plan::instant_after,
    events::{Event, Reason, Transition},
    phase::Phase,
    report::{GivenUp, LeftEarly, Remaining, TaskKind, TaskOutcome},
    sync::lock,
    tasks::{list::ABORT_TIME, table::Work},
};

/// How much the delay may be extended for a listener that waits for file descriptors. Work that is
/// told to end only when draining starts may be using them.
const STARVED_DELAY: Duration = Duration::from_secs(1);

/// How long to wait until servers that were told to end ([`ClosingStage::Servers`]) have been
/// dropped.
const DROPPED: Duration = Duration::from_millis(50);

/// The number of slots in which long-lived work is told to end if `drain_spread` is set.
const SLOTS: u32 = 100;

/// The shortest slot: the resolution of the runtime's timers.
const LEAST_SLOT: Duration = Duration::from_millis(1);

/// The next step.
enum Step {
    /// Enter this phase.
    To(Phase, Reason),
    /// Enter the closing phase, and cut what is in flight at that moment.
    Cut(Reason),
    /// Wait until then, or until something changes.
    Until(Instant),
}

/// After the driver's runtime has shut down, another runtime has this long to take over the
/// cleanup.
const TAKE_OVER: Duration = Duration::from_millis(250);

/// The step during the cleanup. The driver runs the steps, but its runtime may be blocked or may have shut down.
/// Workers need no driver: each may have a runtime of its own.
fn settle_cleanup(
    shutdown: &mut Shutdown,
    events: &mut Vec<Event>,
    work: &Work,
    driver_gone: Option<Instant>,
    now: Instant,
) -> Step {
    let skip_phase = std::mem::take(&mut shutdown.skip_phase);
    let Some(cleanup) = &mut shutdown.cleanup else {
        return Step::Until(now);
    };
    if now >= cleanup.workers_until {
        // `step_by` aborts them. What is left later blocks its thread, or nothing drives its runtime.
        let aborted = *cleanup.workers_aborted.get_or_insert(now);
        if now >= instant_after(aborted, ABORT_TIME) {
            let workers = work.keys_awaited(TaskKind::Worker).into_iter();
            let cut = workers.filter_map(|key| work.ended(key, TaskOutcome::Cut, false));
            events.extend(cut.map(|task| Event::Task(Box::new(task))));
        }
    }
    let (lost, next) = if work.awaits(TaskKind::Worker) {
        let aborted = cleanup.workers_aborted;
        let cut = aborted.map(|aborted| instant_after(aborted, ABORT_TIME));
        (None, Some(cut.unwrap_or(cleanup.workers_until)))
    } else {
        let lost = driver_gone.map(|gone| instant_after(gone.max(cleanup.begun), TAKE_OVER));
        (lost, lost)
    };
    if !work.has_cleanup_or_closes() {
        Step::To(Phase::Stopped, cleanup.after)
    } else if skip_phase {
        Step::To(Phase::Stopped, Reason::Signal)
    } else if lost.is_some_and(|lost| now >= lost) {
        Step::To(Phase::Stopped, Reason::NoRuntime)
    } else if now >= cleanup.until {
        Step::To(Phase::Stopped, Reason::CleanupOverdue)
    } else {
        Step::Until(next.map_or(cleanup.until, |next| next.min(cleanup.until)))
    }
}

impl Lifecycle {
    /// Takes every step that is due at `now`. Returns when to check again, if ever.
    pub(super) fn settle(&self, state: &mut State, now: Instant) -> Option<Instant> {
        loop {
            let phase = self.phase();
            let servers = state.servers;
            let nothing_serves = state.servers_so_far > 0 && servers == 0 && state.drains == 0;
            let driver_gone = state.driver_gone;
            let worker_timeout = self.policy().worker_timeout;
            let shutdown = state.shutdown.as_mut()?;
            let step = match phase {
                Phase::Serving => Step::To(Phase::LameDuck, Reason::Triggered(shutdown.trigger)),
                Phase::LameDuck => self.settle_lame_duck(shutdown, nothing_serves, now),
                Phase::Draining => self.settle_draining(shutdown, now),
                Phase::Closing if shutdown.cleanup.is_some() => {
                    settle_cleanup(shutdown, &mut state.events, &self.work, driver_gone, now)
                }
                Phase::Closing => self.settle_closing(shutdown, servers, now),
                Phase::Stopped => return None,
            };
            if matches!(step, Step::To(Phase::Stopped, _)) {
                shutdown.drop_servers(servers);
                // The connections that could close have closed, so file descriptors are free now.
                shutdown.queued = self.starved.reset_queues();
            }
            match step {
                Step::Until(instant) => return Some(self.next_slot(state, now).min(instant)),
                Step::To(Phase::Stopped, reason)
                    if shutdown.begins_cleanup(reason, now, &self.work, worker_timeout) => {}
                Step::To(phase, reason) => self.enter(state, phase, reason, false, now),
                Step::Cut(reason) => self.enter(state, Phase::Closing, reason, true, now),
            }
        }
    }

    fn settle_lame_duck(
        &self,
        shutdown: &mut Shutdown,
        nothing_serves: bool,
        now: Instant,
    ) -> Step {
        let planned = (shutdown.ask_all_at, shutdown.delay_until, Reason::DelayOver);
        let early = self
            .leaves_at()
            .filter(|(at, _)| *at < shutdown.delay_until);
        let (ask_all_at, until, over) = early.map_or(planned, |(at, why)| {
            let ask_all_at = at.checked_sub(ASK_ALL_BEFORE).unwrap_or(now);
            (
                ask_all_at.min(shutdown.ask_all_at),
                at,
                Reason::LeftEarly(why),
            )
        });
        let skipped = std::mem::take(&mut shutdown.skip_phase);
        if skipped && shutdown.delay_over.is_some() {
            // The delay is over already: the signal ends the waits below.
            return Step::To(Phase::Draining, Reason::Signal);
        }
        let reason = if skipped {
            Reason::Signal
        } else if let Some(reason) = shutdown.delay_over {
            reason
        } else if now >= until {
            over
        } else if nothing_serves {
            Reason::EveryServerEnded
        } else if self.has_handed_over() {
            Reason::HandedOver
        } else if now < ask_all_at {
            return Step::Until(ask_all_at);
        } else {
            // An early end may be put off by a request, and with it the end of a spread.
            shutdown.asks_all |= now >= shutdown.ask_all_at || !self.policy().is_spread();
            return Step::Until(until);
        };
        shutdown.delay_over = Some(reason);
        // Connections in the accept queue are still served. Draining, which rejects requests,
        // starts only after the listeners have closed.
        let listeners_close = self.shares_listeners() || !self.policy().keep_listening;
        if listeners_close {
            if let Some(until) = self.advance_closing(shutdown, now) {
                let begun = shutdown.closing_begun.unwrap_or(now);
                if now < begun + STARVED_DELAY {
                    return Step::Until(until.min(begun + STARVED_DELAY));
                }
            }
        }
        if let (true, Some(since)) = (listeners_close, shutdown.closes_since) {
            // A request may arrive before the task of its connection has noticed that it is to close,
            // and is still served: load balancers send a refused connection to another server, and pass a
            // 503 on. Tasks of other servers do not say when they have noticed. There, no such request can
            // arrive once every connection has a request in flight.
            let until = shutdown.drain_until.min(since + MOST_UNREAD);
            let waits = || {
                self.connections.has_close_unnoticed()
                    || self.connections.may_be_idle(self.in_flight())
            };
            if now < until && waits() {
                return Step::Until(until.min(now + CHECK_INTERVAL));
            }
        }
        Step::To(Phase::Draining, reason)
    }

    /// When the lame-duck phase may end before its delay is over, and why. `None` until every hook
    /// has ended, because a hook that deregisters the service informs the load balancer of the
    /// stop.
    fn leaves_at(&self) -> Option<(Instant, LeftEarly)> {
        let rules = self.policy().leave_early;
        if !rules.is_on() || self.work.has_hook() {
            return None;
        }
        self.evidence.leaves_at(rules, self.policy().close_spread)
    }

    fn settle_draining(&self, shutdown: &mut Shutdown, now: Instant) -> Step {
        if self.is_idle() {
            // The signal was meant for the phase that has just ended.
            shutdown.skip_phase = false;
            Step::To(Phase::Closing, Reason::Idle)
        } else if std::mem::take(&mut shutdown.skip_phase) {
            Step::Cut(Reason::Signal)
        } else if now >= shutdown.drain_until {
            Step::Cut(Reason::Deadline)
        } else if now < shutdown.close_idle_at {
            Step::Until(shutdown.close_idle_at)
        } else if !self.connections.has_any() {
            Step::Until(shutdown.drain_until)
        } else {
            // Idle connections are to be closed before the others are cut.
            let next_check = self.advance_closing(shutdown, now);
            // `next_check` is not later than the drain deadline.
            Step::Until(next_check.unwrap_or(shutdown.drain_until))
        }
    }

    fn settle_closing(&self, shutdown: &mut Shutdown, servers: usize, now: Instant) -> Step {
        if shutdown.closing_stage < ClosingStage::Connections
            && std::mem::take(&mut shutdown.skip_phase)
        {
            // The connections have not been told to close yet. The signal ends that wait, and cuts
            // nothing.
            shutdown.close_connections(now);
        }
        let next_check = self.advance_closing(shutdown, now);
        let closed =
            servers == 0 && self.connections.len() == 0 && self.is_idle() && next_check.is_none();
        let until = shutdown.ends(Phase::Closing).unwrap_or(now);
        if closed {
            let reason = if shutdown.closing_stage == ClosingStage::Servers {
                Reason::CutWorkGivenUp
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
                shutdown.drop_servers(servers);
                // A server that owns its handlers drops them when it is dropped. This has to happen
                // before the cleanup begins.
                let dropped = instant_after(until, DROPPED);
                if servers > 0 && now < dropped {
                    Step::Until(dropped)
                } else {
                    Step::To(Phase::Stopped, Reason::CutWorkGivenUp)
                }
            } else {
                Step::Until(until)
            };
        }
        if skipped || now >= until {
            self.cut(shutdown, self.settled_word(), now);
            return self.settle_closing(shutdown, servers, now);
        }
        let next = next_check.or_else(|| shutdown.expire(until, now));
        Step::Until(next.map_or(until, |next| next.min(until)))
    }

    /// When the next slot of the drain spread is due.
    fn next_slot(&self, state: &State, now: Instant) -> Instant {
        let never = instant_after(now, Duration::MAX);
        let spread = self.policy().drain_spread;
        let Some(since) = state.draining_since() else {
            return never;
        };
        let end = instant_after(since, spread);
        if now >= end {
            return never;
        }
        // The length of a slot changes only how evenly the notifications are spread. All of them
        // are sent at `end` at the latest.
        end.min(instant_after(now, LEAST_SLOT.max(spread / SLOTS)))
    }

    fn enter(&self, state: &mut State, to: Phase, reason: Reason, cuts: bool, now: Instant) {
        let Some(shutdown) = &mut state.shutdown else {
            return;
        };
        if to == Phase::Stopped {
            let error = state.server_error.take();
            let figures = self.since_serving();
            let lost = self.connections.lost_so_far();
            let tasks = self.work.tasks();
            let tasks = (tasks, self.work.unlisted());
            let mut report = shutdown.report(reason, error, figures, lost, tasks, now);
            report.warnings = lock!(self.warnings).as_slice().into();
            state.report = Some(report);
            if let Some(cut) = &mut shutdown.cut {
                // The entries keep the lifecycle alive.
                cut.connections.clear();
            }
        } else {
            shutdown.entered.push(now);
        }
        if to == Phase::Draining {
            state.notifies_draining = self.notifies_draining();
        }
        if to == Phase::LameDuck {
            self.asked_since.get_or_init(|| now);
        }
        let before = self.advance(to);
        if let (Phase::LameDuck, Some(before)) = (to, before) {
            shutdown.in_flight = before.count();
            // Activity before the stop does not count.
            self.connections.take_activity();
        }
        if cuts {
            let word = before.unwrap_or_else(|| self.settled_word());
            self.cut(shutdown, word, now);
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
        state.events.push(Event::Transition(Transition {
            to,
            reason,
            after: now.saturating_duration_since(shutdown.entered[0]),
            time_left: until.saturating_duration_since(now),
            in_flight: self.in_flight(),
            connections: self.connections.len(),
        }));
        if shutdown.queued > 0 {
            state.events.push(Event::QueueReset(shutdown.queued));
        }
    }

    /// Cuts everything that is left, and records it for the report. `word` has the requests in flight.
    fn cut(&self, shutdown: &mut Shutdown, word: Word, now: Instant) {
        // They are counted before `connections.cut` reads which responses are unsent: a response that ends in
        // between counts twice and not never. `dropped` is read right after that count: a request that is no longer counted there
        // is included here, and as few as possible are in both.
        let requests = word.count();
        let dropped = self.since_serving().dropped;
        let given_up = GivenUp {
            // Listed after the count, so that no request that has ended since is named.
            requests: self.request_table.list(now),
            unnamed: requests > 0 && !word.is_named(),
            holds: self.work.list_holds(now),
            connections: Vec::new(),
        };
        let connections = self.connections.cut(now);
        shutdown.cleans_up = self.work.steps() > 0;
        shutdown.cut = Some(Cut {
            at: now,
            remaining: Remaining {
                requests,
                holds: given_up.holds.len(),
                ..Remaining::default()
            },
            dropped,
            pieces: self.pieces(),
            given_up,
            connections,
        });
    }
}
