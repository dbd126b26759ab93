//! The data of a stop under way. This file takes no step.
//!
//! Half of this file is the documentation of its fields.

use std::time::Duration;

use tokio::{sync::oneshot, time::Instant};

use super::Shared;
use crate::{
    config::plan::{Deadlines, instant_after},
    connection::entry::OpenAtCut,
    events::{Event, Origin, Reason},
    phase::Phase,
    report::{GivenUp, Remaining, Report, TaskKind, Trigger},
    tasks::{list::ABORT_TIME, table::Work},
};

/// How long connections have to close: after the last request has ended, even past the drain
/// deadline; and after a cut, until the service stops waiting for them.
const CLOSING_TIME: Duration = Duration::from_millis(250);

/// The part of that time that they have even past the end of the plan. It fits into the margin of
/// every grace period of 1.5 s or more. With the 50 ms that servers have to be dropped after a cut, it fits if
/// the grace period is 3 s or more.
const LEAST_CLOSING_TIME: Duration = Duration::from_millis(50);

/// How long the service waits for a connection without a request in flight after it was told to
/// close: the time in which a peer that is alive answers the ping that accompanies a GOAWAY.
const EXPIRY: Duration = Duration::from_secs(1);

/// Such a connection is closed at the latest this long before the cut.
const BEFORE_CUT: Duration = Duration::from_millis(50);

/// The shortest timeout of a step. Every step runs, even if no time is left.
pub(super) const LEAST_TIMEOUT: Duration = Duration::from_millis(10);

/// How long after the end of the plan the last step ends at the latest, whatever the steps do, as
/// long as the runtime is not blocked: see `clean_up`.
fn most_overtime(steps: usize) -> Duration {
    let waits = u32::try_from(steps).unwrap_or(u32::MAX).saturating_add(3);
    (LEAST_TIMEOUT + ABORT_TIME).saturating_mul(waits)
}

/// How long before the end of the delay all remaining HTTP/2 peers are asked to leave.
pub(super) const ASK_ALL_BEFORE: Duration = Duration::from_millis(25);

/// How long before the drain deadline idle connections are closed: long enough to empty a
/// listener's queue and to read requests in transit.
const CLOSE_IDLE_BEFORE: Duration = Duration::from_millis(250);

#[derive(Default)]
pub(crate) struct State {
    /// Passes the lifecycle to the driver, which waits for a stop to begin.
    pub(crate) start: Option<oneshot::Sender<Shared>>,
    /// When the last driver ended because its runtime shut down. `None` while there is a driver.
    pub(crate) driver_gone: Option<Instant>,
    pub(crate) clock: Clock,
    /// Signals that the driver has to handle, because the clock is paused.
    #[cfg(feature = "signal")]
    pub(crate) pending_signals: Vec<Trigger>,
    /// Events of the step under way.
    pub(crate) events: Vec<Event>,
    /// The subscriber of the last step that was not taken by the control thread. Events of the
    /// control thread go there.
    pub(crate) origin: Option<Origin>,
    /// When the log next says what the drain waits for.
    pub(crate) progress_at: Option<Instant>,
    pub(crate) shutdown: Option<Shutdown>,
    /// The number of servers given to `run` that have not ended.
    pub(crate) servers: usize,
    /// The number of servers given to `run` so far.
    pub(crate) servers_so_far: usize,
    /// The number of drain futures that are waiting. Each stands for a server that may run outside
    /// of `run`.
    pub(crate) drains: usize,
    /// The number of drain futures so far.
    pub(crate) drains_so_far: usize,
    /// When draining began, a task that may close a connection was notified of it.
    pub(crate) notifies_draining: bool,
    /// Since when, in the drain, there have been upgraded connections and no holds.
    pub(crate) unheld_since: Option<Instant>,
    pub(crate) warned_of_unheld: bool,
    pub(crate) server_error: Option<String>,
    pub(crate) report: Option<Report>,
}

/// The clock by which a stop runs, and the part that checks its deadlines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The real clock: the control thread, and also the driver.
    #[default]
    Real,
    /// The paused clock of a tokio runtime: only the driver in that runtime.
    Tokio,
}

impl State {
    /// When the service began to drain, if it has.
    pub(crate) fn draining_since(&self) -> Option<Instant> {
        self.shutdown.as_ref()?.entered.get(1).copied()
    }
}

/// What the servers have to do, in this order. Only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ClosingStage {
    /// Accept.
    Open,
    /// Accept the queued connections, and close the listener.
    Listeners,
    /// Read every connection once more.
    Reads,
    /// Close each connection after its last response.
    Connections,
    /// Cleanup begins. Servers that have not ended are dropped, with the handlers that they own.
    Servers,
}

/// The progress of [`ClosingStage::Reads`].
pub(super) struct Reads {
    pub(super) begun: Instant,
    /// The number of connections that have not been read, and when it last fell.
    pub(super) left: usize,
    pub(super) fell: Instant,
}

/// A stop under way.
pub(crate) struct Shutdown {
    pub(crate) trigger: Trigger,
    pub(crate) closing_stage: ClosingStage,
    /// When the listeners were told to close.
    pub(crate) closing_begun: Option<Instant>,
    /// Present once the connections have been told to read once more.
    pub(super) reads: Option<Reads>,
    /// When the connections were told to close.
    pub(crate) closes_since: Option<Instant>,
    /// When activity on a connection was last seen. Checked only while the listeners close.
    pub(crate) last_activity: Option<Instant>,
    /// When a handshake was last seen in progress. Checked only while the listeners close.
    pub(crate) last_handshake: Option<Instant>,
    /// When idle connections are next told to expire. Set when the connections are told to close,
    /// and `None` after the last time.
    expiry: Option<Instant>,
    /// How often idle connections have been told to expire.
    pub(crate) expiries: u32,
    /// When each phase so far was entered: lame duck, draining, closing.
    pub(crate) entered: Vec<Instant>,
    /// The moment, shortly before the end of the delay, when all peers that have not been asked to
    /// leave are asked. Then the requests that they are sending are not rejected.
    pub(crate) ask_all_at: Instant,
    pub(crate) asks_all: bool,
    pub(crate) delay_until: Instant,
    /// The moment, shortly before the drain deadline, when idle connections are closed. Then only
    /// connections with requests in flight are cut.
    pub(crate) close_idle_at: Instant,
    pub(crate) drain_until: Instant,
    /// The end of the plan. The margin follows, and then the end of the grace period.
    pub(crate) end: Instant,
    /// The reason for the end of the delay, once it is over.
    pub(crate) delay_over: Option<Reason>,
    /// A further signal was received that ends the present phase.
    pub(crate) skip_phase: bool,
    pub(crate) cut: Option<Cut>,
    /// Set when the joining of the workers begins.
    pub(crate) cleanup: Option<Cleanup>,
    /// The number of requests in flight when the stop began.
    pub(crate) in_flight: usize,
    /// Cleanup steps were registered at the time of the cut.
    pub(crate) cleans_up: bool,
    /// The number of connections that were reset in the queues of listeners.
    pub(crate) queued: usize,
    /// The number of servers that had not ended when `run` was told to drop them.
    pub(crate) servers_left: usize,
    #[cfg(feature = "signal")]
    pub(crate) last_interrupt: Option<Instant>,
}

/// How the future of a server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ServerEnd {
    /// The future was dropped before it completed.
    Dropped,
    /// The future completed without an error.
    Finished,
    /// The future completed with this error.
    Failed(String),
}

pub(crate) struct Cut {
    pub(crate) at: Instant,
    /// The number of requests that were dropped without a response before the cut. Requests that
    /// the cut itself drops count as cut.
    pub(crate) dropped: usize,
    /// The number of pieces of responses that the servers held.
    pub(crate) pieces: usize,
    pub(crate) remaining: Remaining,
    /// What was given up, except the connections.
    pub(crate) given_up: GivenUp,
    /// The connections that were open at the cut. Whether one of them lost data is known only after
    /// it has closed.
    pub(crate) connections: Vec<OpenAtCut<Shared>>,
}

/// The cleanup: the workers are joined, and then the cleanup steps run.
pub(crate) struct Cleanup {
    pub(crate) begun: Instant,
    /// How the closing of the connections ended.
    pub(crate) after: Reason,
    /// Until when the workers may run.
    pub(super) workers_until: Instant,
    /// When they were aborted, because that time was over.
    pub(super) workers_aborted: Option<Instant>,
    /// When the service stops waiting for the cleanup. A driver whose runtime is not blocked is
    /// done before.
    pub(crate) until: Instant,
}

impl Shutdown {
    pub(crate) fn new(trigger: Trigger, now: Instant, deadlines: Deadlines) -> Self {
        // `lead` before the end of a phase, or an eighth of the phase if that is shorter.
        let before = |end: Duration, phase: Duration, lead: Duration| {
            instant_after(now, end.saturating_sub(lead.min(phase / 8)))
        };
        Self {
            trigger,
            closing_stage: ClosingStage::Open,
            closing_begun: None,
            reads: None,
            closes_since: None,
            last_activity: None,
            last_handshake: None,
            expiry: None,
            expiries: 0,
            entered: Vec::with_capacity(3),
            ask_all_at: before(deadlines.delay, deadlines.delay, ASK_ALL_BEFORE),
            asks_all: false,
            delay_until: instant_after(now, deadlines.delay),
            close_idle_at: before(
                deadlines.drain,
                deadlines.drain.saturating_sub(deadlines.delay),
                CLOSE_IDLE_BEFORE,
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
            servers_left: 0,
            #[cfg(feature = "signal")]
            last_interrupt: None,
        }
    }

    /// When this phase ends at the latest, if it has an end. In Closing this is the time of the
    /// cut, and after the cut the time at which the service stops waiting for what was cut.
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

    /// Tells `run` to drop the servers that have not ended.
    pub(super) fn drop_servers(&mut self, servers: usize) {
        self.closing_stage = ClosingStage::Servers;
        // Those that have been dropped since the first call are no longer in `servers`.
        self.servers_left = self.servers_left.max(servers);
    }

    /// Tells the servers to close their connections.
    pub(crate) fn close_connections(&mut self, now: Instant) {
        self.closing_stage = ClosingStage::Connections;
        self.closes_since = Some(now);
        self.expiry = Some(instant_after(now, EXPIRY));
    }

    /// Tells idle connections to expire: [`EXPIRY`] after they were told to close and after nothing
    /// is in flight any more, and at the latest [`BEFORE_CUT`] before everything is cut. Returns
    /// when to check again.
    pub(crate) fn expire(&mut self, cut: Instant, now: Instant) -> Option<Instant> {
        let expiry = self.expiry?;
        let closing = self.entered.last().map_or(now, |closing| *closing + EXPIRY);
        let before_cut = cut.checked_sub(BEFORE_CUT).unwrap_or(cut);
        let due = expiry.max(closing).min(before_cut);
        if now < due {
            return Some(due);
        }
        self.expiries += 1;
        // The next time would be after the cut.
        self.expiry = (now < before_cut).then(|| instant_after(now, EXPIRY));
        self.expiry.map(|next| next.min(before_cut))
    }

    fn closing_until(&self, begun: Instant) -> Instant {
        let end = self.end.max(begun + LEAST_CLOSING_TIME);
        end.min(begun + CLOSING_TIME)
    }

    /// When the service stops waiting for what was cut. If there are cleanup steps, the wait takes
    /// only a part of the time that is kept for them.
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

    /// Whether the time of the workers is over.
    pub(super) fn aborts_workers(&self) -> bool {
        let cleanup = self.cleanup.as_ref();
        cleanup.is_some_and(|cleanup| cleanup.workers_aborted.is_some())
    }

    /// How long the cleanup waits for workers. The steps keep the time that they have asked for, but at most half of
    /// the time that is left.
    fn workers_share(&self, timeout: Option<Duration>, now: Instant, work: &Work) -> Duration {
        let left = self.end.saturating_duration_since(now);
        let most = left.saturating_sub(work.asked_by_steps().min(left / 2));
        timeout.unwrap_or(most).min(most)
    }

    /// Whether a cleanup has to run before the service has stopped. If so, records that it begins.
    pub(crate) fn begins_cleanup(
        &mut self,
        after: Reason,
        now: Instant,
        work: &Work,
        worker_timeout: Option<Duration>,
    ) -> bool {
        // A signal that ends the wait for what was cut skips the cleanup too.
        let begins = self.cleanup.is_none()
            && !matches!(after, Reason::Signal)
            && work.has_cleanup_or_closes();
        if begins {
            // The signal was meant for the phase that has just ended.
            self.skip_phase = false;
            let workers_until = instant_after(now, self.workers_share(worker_timeout, now, work));
            work.await_until(TaskKind::Worker, workers_until);
            self.cleanup = Some(Cleanup {
                begun: now,
                after,
                workers_until,
                workers_aborted: None,
                until: instant_after(self.end.max(now), most_overtime(work.steps())),
            });
        }
        begins
    }
}
