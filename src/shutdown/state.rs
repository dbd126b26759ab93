//! What is known of a shutdown under way, and what becomes of it in the report. No step is taken
//! here.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};

use super::{Shared, cleanup};
use crate::{
    admission::SinceServing,
    config::plan::{Deadlines, instant_after},
    connection::table::Left,
    events::{Event, Origin, Reason},
    phase::Phase,
    report::{
        GivenUp, Outcome, Remaining, Report, Requests, TaskKind, TaskOutcome, TaskReport, Trigger,
        UnlistedWorkers,
    },
    tasks::table::{Task, Work},
};

/// How long connections are given to close: after the last request has left, even when the drain
/// deadline comes sooner, and after a cut before the service stops waiting for them.
const CLOSING_TIME: Duration = Duration::from_millis(250);

/// How long of that they are given in any case, even past the end of the plan. It fits the margin
/// of every grace period of 1.5 s and more.
const LEAST_CLOSING_TIME: Duration = Duration::from_millis(50);

/// How long a connection on which nothing is in flight is waited for once it was told to close: for a
/// peer that is there, to answer the ping that comes with a GOAWAY.
const EXPIRY: Duration = Duration::from_secs(1);

/// How long before the cut it is closed in any case.
const BEFORE_CUT: Duration = Duration::from_millis(50);

/// How long before the end of the delay peers on HTTP/2 are asked to leave that have not been.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(25);

/// How long before the drain deadline connections are closed on which nothing is in flight: long
/// enough to empty a listener's queue, and to hear what is on its way.
const LAST_CALL: Duration = Duration::from_millis(250);

#[derive(Default)]
pub(crate) struct State {
    /// A driver is alive.
    pub(crate) driven: bool,
    /// It waits for a shutdown to begin.
    pub(crate) start: Option<oneshot::Sender<Shared>>,
    /// The last driver has ended with its runtime.
    pub(crate) driver_gone: Option<Instant>,
    pub(crate) clock: Clock,
    /// Signals that the driver is to act upon.
    #[cfg(feature = "signal")]
    pub(crate) heard: Vec<Trigger>,
    /// Events of the step under way.
    pub(crate) events: Vec<Event>,
    /// Where the log of the last step went that the control thread did not take.
    pub(crate) origin: Option<Origin>,
    /// When the log is told what the drain waits for.
    pub(crate) progress_at: Option<Instant>,
    pub(crate) shutdown: Option<Shutdown>,
    /// Servers given to `run` that have not ended. `None`: there never were any.
    pub(crate) servers: Option<usize>,
    /// All there ever were.
    pub(crate) servers_so_far: usize,
    /// Drain futures that are waiting, each for a server that may be run by other means.
    pub(crate) drains: usize,
    /// All there ever were.
    pub(crate) drains_so_far: usize,
    /// Somebody is told that draining starts.
    pub(crate) tells_somebody: bool,
    /// Since when connections have been upgraded and nothing has been held, while draining.
    pub(crate) unheld_since: Option<Instant>,
    pub(crate) warned_of_unheld: bool,
    /// Responses that had a turn of their own.
    pub(crate) spread_responses: u64,
    pub(crate) server_error: Option<String>,
    pub(crate) report: Option<Report>,
}

/// Who lets time pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The control thread, and the driver beside it.
    #[default]
    Real,
    /// The driver, in a runtime whose clock is paused.
    Tokio,
}

impl State {
    /// When the service began to drain, if it has.
    pub(crate) fn draining_since(&self) -> Option<Instant> {
        self.shutdown.as_ref()?.entered.get(1).copied()
    }
}

/// What the servers are told, in this order. Only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ClosingStage {
    /// Accept.
    Open,
    /// Accept what has been queued, and close the listener.
    Listeners,
    /// Close the connections, each when its last response is out.
    Connections,
    /// Cleanup begins: servers that have not ended are dropped, with the handlers that they own.
    Servers,
}

/// A shutdown under way.
pub(crate) struct Shutdown {
    pub(crate) trigger: Trigger,
    pub(crate) closing_stage: ClosingStage,
    /// When the listeners were told to close.
    pub(crate) closing_begun: Option<Instant>,
    /// When the connections were told to close.
    pub(crate) closes_since: Option<Instant>,
    /// When a connection was last heard, as far as that was asked.
    pub(crate) heard: Option<Instant>,
    /// When a handshake was last seen to run, as far as that was asked.
    pub(crate) shook: Option<Instant>,
    /// When connections are next looked at for those on which there is nothing to wait for. Known once
    /// they have been told to close.
    expiry: Option<Instant>,
    /// How often they have been so far.
    pub(crate) expiries: u32,
    /// When each phase so far was entered: lame duck, draining, closing.
    pub(crate) entered: Vec<Instant>,
    /// A little before the end of the delay: who has not been asked to leave by then is asked, so
    /// that what he sends meanwhile is not refused.
    pub(crate) last_words: Instant,
    pub(crate) asks_all: bool,
    pub(crate) delay_until: Instant,
    /// A little before the drain deadline: connections on which nothing is in flight are closed, so
    /// that only the others are cut.
    pub(crate) last_call: Instant,
    pub(crate) drain_until: Instant,
    /// The end of what is planned: the margin, and then the end of the grace period, follow.
    pub(crate) end: Instant,
    /// Why the delay is over, once it is.
    pub(crate) delay_over: Option<Reason>,
    /// A further signal wants the present phase to end now.
    pub(crate) skip_phase: bool,
    pub(crate) cut: Option<Cut>,
    /// From the moment workers are joined.
    pub(crate) cleanup: Option<Cleanup>,
    /// Requests when the stop was asked for.
    pub(crate) in_flight: usize,
    /// Cleanup steps are registered, as far as is known at the cut.
    pub(crate) cleans_up: bool,
    /// Connections that were reset in listeners' queues.
    pub(crate) queued: usize,
    #[cfg(feature = "signal")]
    pub(crate) last_interrupt: Option<Instant>,
}

/// How a server's future came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ServerEnd {
    /// Dropped before it was ready.
    Dropped,
    /// Ready.
    Finished,
    /// Ready, with an error.
    Failed(String),
}

pub(crate) struct Cut {
    pub(crate) at: Instant,
    /// Requests dropped without a response until then: those that the cut drops are cut.
    pub(crate) dropped: usize,
    /// Pieces of responses that servers held.
    pub(crate) pieces: usize,
    pub(crate) remaining: Remaining,
    /// But for the connections.
    pub(crate) given_up: GivenUp,
    /// What becomes of them is known when they have been closed.
    pub(crate) connections: Vec<Left<Shared>>,
    /// A signal called for it while the connections were being closed, and no deadline.
    pub(crate) skipped: bool,
}

/// The workers are joined, and then the cleanup steps run.
pub(crate) struct Cleanup {
    pub(crate) begun: Instant,
    /// How what came before ended.
    pub(crate) after: Reason,
    pub(crate) done: bool,
    /// When it is given up. A driver that runs is done before.
    pub(crate) until: Instant,
}

impl Shutdown {
    pub(crate) fn new(trigger: Trigger, now: Instant, deadlines: Deadlines) -> Self {
        // So long before the end of a phase, and in its last eighth in any case.
        let before = |end: Duration, phase: Duration, lead: Duration| {
            instant_after(now, end.saturating_sub(lead.min(phase / 8)))
        };
        Self {
            trigger,
            closing_stage: ClosingStage::Open,
            closing_begun: None,
            closes_since: None,
            heard: None,
            shook: None,
            expiry: None,
            expiries: 0,
            entered: Vec::with_capacity(3),
            last_words: before(deadlines.delay, deadlines.delay, LAST_WORDS),
            asks_all: false,
            delay_until: instant_after(now, deadlines.delay),
            last_call: before(
                deadlines.drain,
                deadlines.drain.saturating_sub(deadlines.delay),
                LAST_CALL,
            ),
            drain_until: instant_after(now, deadlines.drain),
            end: instant_after(now, deadlines.end),
            delay_over: None,
            skip_phase: false,
            cut: None,
            cleanup: None,
            in_flight: 0,
            cleans_up: false,
            queued: 0,
            #[cfg(feature = "signal")]
            last_interrupt: None,
        }
    }

    /// When this phase ends at the latest, if it has an end: in closing, when what is still open
    /// is cut, and after that, when the service stops waiting for it.
    pub(crate) fn ends(&self, phase: Phase) -> Option<Instant> {
        match (phase, &self.cut) {
            (Phase::LameDuck, _) => Some(self.delay_until),
            (Phase::Draining, _) => Some(self.drain_until),
            (Phase::Closing, _) if self.cleanup.is_some() => Some(self.end),
            (Phase::Closing, Some(cut)) => Some(self.let_go_at(cut.at)),
            (Phase::Closing, None) => {
                let begun = *self.entered.last()?;
                Some(self.drain_until.max(self.closing_until(begun)))
            }
            (Phase::Serving | Phase::Stopped, _) => None,
        }
    }

    /// Has the servers close their connections.
    pub(crate) fn close_connections(&mut self, now: Instant) {
        self.closing_stage = ClosingStage::Connections;
        self.closes_since = Some(now);
        self.expiry = Some(instant_after(now, EXPIRY));
    }

    /// Has the connections close on which there is nothing to wait for, a while after they were told
    /// to, nothing is in flight any more, and before everything is cut. Says when to look again.
    pub(crate) fn expire(&mut self, cut: Instant, now: Instant) -> Option<Instant> {
        let expiry = self.expiry?;
        let closing = self.entered.last().map_or(now, |closing| *closing + EXPIRY);
        let before_cut = cut.checked_sub(BEFORE_CUT).unwrap_or(cut);
        let due = expiry.max(closing).min(before_cut);
        if now < due {
            return Some(due);
        }
        self.expiries += 1;
        // Once more would be after the cut.
        self.expiry = (now < before_cut).then(|| instant_after(now, EXPIRY));
        self.expiry
    }

    fn closing_until(&self, begun: Instant) -> Instant {
        let end = self.end.max(begun + LEAST_CLOSING_TIME);
        end.min(begun + CLOSING_TIME)
    }

    /// When what was cut is no longer waited for: out of the time that is kept for cleaning up it
    /// takes no more than a part.
    fn let_go_at(&self, cut: Instant) -> Instant {
        if !self.cleans_up {
            return self.closing_until(cut);
        }
        let kept = self.end.saturating_duration_since(cut);
        let least = if kept.is_zero() {
            LEAST_CLOSING_TIME
        } else {
            LEAST_CLOSING_TIME.min(kept / 2)
        };
        cut + CLOSING_TIME.min(kept / 8).max(least)
    }

    /// Whether there is cleaning up to be done before the service has stopped. Notes that it
    /// begins.
    pub(crate) fn begins_cleanup(&mut self, after: Reason, now: Instant, work: &Work) -> bool {
        // A signal that ends the wait for what was cut does not wait for this either.
        let begins = self.cleanup.is_none()
            && !matches!(after, Reason::Signal)
            && work.has_cleanup_or_closes();
        if begins {
            // Whatever it wanted to hurry is over.
            self.skip_phase = false;
            self.cleanup = Some(Cleanup {
                begun: now,
                after,
                done: false,
                until: instant_after(self.end.max(now), cleanup::most_overtime(work.steps())),
            });
        }
        begins
    }

    pub(crate) fn report(
        &self,
        reason: Reason,
        server_error: Option<String>,
        figures: SinceServing,
        half_closed: usize,
        (tasks, unlisted_workers): (Vec<Task>, UnlistedWorkers),
        now: Instant,
    ) -> Report {
        let tasks: Arc<[_]> = tasks
            .into_iter()
            .map(|task| self.describe(task, now))
            .collect();
        let cut = self.cut.as_ref();
        let mut remaining = cut.map_or_else(Remaining::default, |cut| cut.remaining);
        // One that lingered and has delivered everything has lost nothing.
        let left = || cut.into_iter().flat_map(|cut| &cut.connections);
        let lost = || left().filter(|left| !left.lingered() || left.undelivered() > 0);
        remaining.connections = lost().count();
        let given_up = cut.map(|cut| GivenUp {
            connections: lost().map(Left::describe).collect(),
            ..cut.given_up.clone()
        });
        // Where a server has let go of a connection no request is counted for what it owes.
        let owing = |lingered: bool| {
            // What was answered before the stop is not among its requests.
            let owing = left().filter(|left| left.undelivered() > 0 && left.responded());
            owing.filter(|left| left.lingered() == lingered).count()
        };
        // A response may be in several pieces.
        let open = left().filter(|left| !left.lingered()).count();
        let pieces = cut.map_or(0, |cut| cut.pieces.min(open));
        let requests_cut = owing(true) + owing(false).max(pieces).max(remaining.requests);
        let nothing_else =
            remaining.requests == 0 && remaining.holds == 0 && remaining.connections == 0;
        let closed = self
            .cleanup
            .as_ref()
            .map_or(reason, |cleanup| cleanup.after);
        if nothing_else && cut.is_some_and(|cut| cut.skipped) && matches!(closed, Reason::Cut) {
            // They were about to end, and they have.
            remaining.servers = 0;
        }
        remaining.queued = self.queued;
        remaining.half_closed = half_closed;
        remaining.workers = tasks.iter().filter(|task| task.is_cut_worker()).count();
        let outcome = if matches!(reason, Reason::Signal) {
            Outcome::Abandoned
        } else if !remaining.is_nothing() {
            Outcome::Forced
        } else if server_error.is_some() {
            Outcome::ServerFailed
        } else if tasks.iter().any(TaskReport::is_failure) {
            // A failure that is not listed was pushed out by others that are.
            Outcome::CleanupFailed
        } else {
            Outcome::Clean
        };
        let closed = self.cleanup.as_ref().map_or(now, |cleanup| cleanup.begun);
        let mut ends = self.entered.iter().skip(1).copied().chain([closed]);
        let mut phases = [Duration::ZERO; 3];
        for (phase, begun) in phases.iter_mut().zip(&self.entered) {
            let ended = ends.next().unwrap_or(now);
            *phase = ended.saturating_duration_since(*begun);
        }
        // What is left of them after the cut has not been answered.
        let begun = self.in_flight + figures.admitted;
        let dropped = cut.map_or(figures.dropped, |cut| cut.dropped);
        Report {
            trigger: self.trigger,
            outcome,
            left_early: match self.delay_over {
                Some(Reason::LeftEarly(why)) => Some(why),
                _ => None,
            },
            phases,
            cleanup: now.saturating_duration_since(closed),
            requests: Requests {
                in_flight: self.in_flight,
                admitted: figures.admitted,
                finished: begun.saturating_sub(requests_cut + dropped),
                refused: figures.refused,
                cut: requests_cut.min(begun),
                dropped,
            },
            remaining,
            given_up: Arc::new(given_up.unwrap_or_default()),
            tasks,
            unlisted_workers,
            server_error,
            warnings: Arc::default(),
        }
    }

    fn describe(&self, task: Task, now: Instant) -> TaskReport {
        let entered = |phase: usize| self.entered.get(phase).copied();
        let asked = entered(0).unwrap_or(now);
        let (ended, outcome) = match task.ended {
            Some((ended, outcome)) => (ended, outcome),
            None if task.began.is_none() => (now, TaskOutcome::NotRun),
            None => (now, TaskOutcome::Cut),
        };
        let began = match task.kind {
            // From when it was told.
            TaskKind::Worker => entered(1).unwrap_or(now),
            TaskKind::LameDuck | TaskKind::Cleanup => task.began.unwrap_or(now),
        };
        let began = began.min(ended).max(asked);
        TaskReport {
            name: task.name.into_owned(),
            kind: task.kind,
            began: began - asked,
            took: ended.saturating_duration_since(began),
            outcome,
        }
    }
}
