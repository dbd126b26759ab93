//! What the log is told: the plan once, one event per transition, one per repeated signal, and a line
//! while the drain waits. Without the `tracing` feature, nothing.
//!
//! A subscriber may block, and may panic: one that writes to a closed pipe does, and closed pipes are
//! common at shutdown. So nothing is logged inside a step. A step queues its events under its lock, in
//! order, and they are written afterwards by a thread that exists only while there are any. It uses
//! the subscriber of the thread that took the step, or, where that was the control thread, of the last
//! other one.
//!
//! Where tokio's clock is paused there is no such thread, because a test wants to find the events of a
//! step when that has been taken: whoever takes a step writes what is queued, when no lock is held.

#[cfg(feature = "tracing")]
use std::{collections::VecDeque, sync::LazyLock};
use std::{fmt, time::Duration};

#[cfg(feature = "tracing")]
use tracing::{Dispatch, dispatcher, level_filters::LevelFilter, subscriber::NoSubscriber};

#[cfg(feature = "tracing")]
use crate::{
    background::{Aside, shielded},
    sync::{Mutex, lock},
};
use crate::{
    config::plan::EffectivePlan,
    phase::Phase,
    report::{CutRequest, TaskKind, TaskOutcome, Trigger, Warning},
    tasks::table::Task,
};

#[cfg(feature = "tracing")]
static LOG: LazyLock<Aside> = LazyLock::new(|| Aside::new("graceful-log", 1));

/// Something that the log is told.
pub(crate) enum Event {
    Plan(EffectivePlan),
    Transition(Transition),
    Progress(Progress),
    Task(Box<Task>),
    /// Connections that were reset in accept queues.
    QueueReset(usize),
    Warning(Warning),
    #[cfg(feature = "signal")]
    Signal(Trigger, Effect),
}

/// The subscriber that events of a thread go to.
#[derive(Clone)]
pub(crate) struct Origin(#[cfg(feature = "tracing")] Dispatch);

impl Origin {
    /// The one of this thread, if it has any. Within an event no thread has.
    pub(crate) fn here() -> Option<Self> {
        #[cfg(feature = "tracing")]
        {
            let dispatch = dispatcher::get_default(Dispatch::clone);
            (!dispatch.is::<NoSubscriber>()).then_some(Self(dispatch))
        }
        #[cfg(not(feature = "tracing"))]
        None
    }
}

/// Events that are still to be written, in their order.
#[derive(Default)]
pub(crate) struct Queue {
    #[cfg(feature = "tracing")]
    events: Mutex<Queued>,
}

#[cfg(feature = "tracing")]
#[derive(Default)]
struct Queued {
    waiting: VecDeque<Event>,
    /// One thread writes at a time.
    written: bool,
}

impl Queue {
    /// Queues events for [`write`](Self::write), or where `aside`, for the thread.
    #[cfg_attr(not(feature = "tracing"), expect(clippy::unused_self))]
    pub(crate) fn push(&self, events: Vec<Event>, aside: bool, origin: Option<&Origin>) {
        #[cfg(feature = "tracing")]
        if LevelFilter::current() == LevelFilter::OFF || events.is_empty() {
        } else if aside {
            let origin = origin.cloned();
            LOG.queue(Box::new(move || match origin {
                Some(Origin(dispatch)) => {
                    dispatcher::with_default(&dispatch, || write_all(&events));
                }
                None => write_all(&events),
            }));
        } else {
            lock!(self.events).waiting.extend(events);
        }
        #[cfg(not(feature = "tracing"))]
        let _ = (events, aside, origin);
    }

    /// Writes what is queued, here or on the thread. Without any lock.
    #[cfg_attr(not(feature = "tracing"), expect(clippy::unused_self))]
    pub(crate) fn write(&self) {
        work();
        #[cfg(feature = "tracing")]
        {
            let mut mine = false;
            loop {
                let mut events = lock!(self.events);
                if events.written && !mine {
                    return;
                }
                let next = events.waiting.pop_front();
                mine = next.is_some();
                events.written = mine;
                drop(events);
                let Some(event) = next else { return };
                event.write();
            }
        }
    }
}

#[cfg(feature = "tracing")]
fn write_all(events: &[Event]) {
    for event in events {
        event.write();
    }
}

/// Has the thread write what is queued for it.
pub(crate) fn work() {
    #[cfg(feature = "tracing")]
    LOG.work();
}

/// Waits until what is queued for the thread has been written, but not for a subscriber that blocks:
/// the process may be about to end.
pub(crate) fn flush() {
    #[cfg(feature = "tracing")]
    LOG.flush(Duration::from_millis(100));
}

/// Has what was not of a lifecycle written by the thread.
#[cfg(feature = "signal")]
fn aside(event: Event) {
    Queue::default().push(vec![event], true, None);
    work();
}

impl Event {
    #[cfg_attr(not(feature = "tracing"), expect(dead_code))]
    fn write(&self) {
        match self {
            Self::Plan(it) => plan(it),
            Self::Transition(it) => transition(it),
            Self::Progress(it) => progress(it),
            Self::Task(it) => task(it),
            Self::QueueReset(queued) => queue_reset(*queued),
            Self::Warning(it) => warning(it),
            #[cfg(feature = "signal")]
            Self::Signal(it, effect) => signal(*it, *effect),
        }
    }
}

/// One event of this crate: its level, its fields, its message.
macro_rules! event {
    ($level:ident, { $($name:ident = $value:expr),* $(,)? }, $($message:tt)+) => {{
        #[cfg(feature = "tracing")]
        shielded(|| {
            tracing::$level!(target: "tower_graceful", $($name = $value,)* $($message)+);
        });
        #[cfg(not(feature = "tracing"))]
        let _ = (stringify!($level), $($value,)* format_args!($($message)+));
    }};
}

/// Whether any subscriber wants events of the debug level.
pub(crate) fn wants_debug() -> bool {
    #[cfg(feature = "tracing")]
    let wanted = LevelFilter::current() >= LevelFilter::DEBUG;
    #[cfg(not(feature = "tracing"))]
    let wanted = false;
    wanted
}

/// The durations that the deadlines of a stop are made of.
fn plan(plan: &EffectivePlan) {
    event!(
        debug,
        {
            grace_period = seconds(plan.grace_period),
            drain_delay = seconds(plan.drain_delay),
            interrupt_delay = seconds(plan.interrupt_delay),
            drain_deadline = seconds(plan.drain_deadline),
            cleanup_timeout = seconds(plan.cleanup_timeout),
            margin = seconds(plan.margin),
        },
        "shutdown plan, in seconds"
    );
}

/// One step of the timeline.
pub(crate) struct Transition {
    pub(crate) to: Phase,
    pub(crate) reason: Reason,
    /// Since the trigger.
    pub(crate) after: Duration,
    /// Until the phase just entered ends at the latest.
    pub(crate) time_left: Duration,
    pub(crate) in_flight: usize,
    pub(crate) connections: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Reason {
    Triggered(Trigger),
    DelayOver,
    NobodyServes,
    Moved,
    Signal,
    Idle,
    Deadline,
    Closed,
    Cut,
    LetGo,
    /// The end of the cleanup was not heard of in time.
    CleanupOverdue,
    /// What was to be cleaned up has no runtime any more.
    NoRuntime,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Triggered(trigger) => trigger.fmt(f),
            Self::DelayOver => f.write_str("the delay is over"),
            Self::NobodyServes => f.write_str("every server has ended"),
            Self::Moved => f.write_str("every connection has closed, and the next process accepts"),
            Self::Signal => f.write_str("a further signal"),
            Self::Idle => f.write_str("nothing is in flight"),
            Self::Deadline => f.write_str("the drain deadline has passed"),
            Self::Closed => f.write_str("everything is closed"),
            Self::Cut => f.write_str("what was left has been cut"),
            Self::LetGo => f.write_str("what was cut did not end in time"),
            Self::CleanupOverdue => f.write_str("the cleanup did not end in time"),
            Self::NoRuntime => f.write_str("the runtime that cleans up has ended"),
        }
    }
}

fn transition(transition: &Transition) {
    let phase = transition.to.as_str();
    let reason = &*transition.reason.to_string();
    macro_rules! transition_event {
        ($level:ident) => {
            event!(
                $level,
                {
                    phase = phase,
                    reason = reason,
                    in_flight = transition.in_flight,
                    connections = transition.connections,
                    seconds = seconds(transition.after),
                    seconds_left = seconds(transition.time_left),
                },
                "shutdown: {phase}, because {reason}"
            )
        };
    }
    let gives_up = transition.to >= Phase::Closing && transition.in_flight > 0;
    let forced = matches!(
        transition.reason,
        Reason::Cut | Reason::LetGo | Reason::CleanupOverdue | Reason::NoRuntime
    );
    if gives_up || forced {
        transition_event!(warn);
    } else {
        transition_event!(info);
    }
}

/// What a drain waits for.
pub(crate) struct Progress {
    pub(crate) phase: Phase,
    pub(crate) in_flight: usize,
    pub(crate) connections: usize,
    pub(crate) time_left: Duration,
    pub(crate) oldest: Vec<CutRequest>,
}

fn progress(progress: &Progress) {
    let Progress {
        phase,
        in_flight,
        connections,
        time_left,
        oldest,
    } = progress;
    let oldest: Vec<_> = oldest.iter().map(CutRequest::to_string).collect();
    let oldest = match &*oldest {
        [] => String::new(),
        oldest => format!(", oldest {}", oldest.join("; ")),
    };
    event!(
        info,
        {
            phase = phase.as_str(),
            in_flight = *in_flight,
            connections = *connections,
            seconds_left = seconds(*time_left),
        },
        "shutdown: {phase}, in flight {in_flight}, connections {connections}{oldest}"
    );
}

/// The end of a worker, a hook or a cleanup step.
fn task(task: &Task) {
    let kind = match task.kind {
        TaskKind::LameDuck => "hook",
        TaskKind::Worker => "worker",
        TaskKind::Cleanup => "cleanup",
    };
    let Some((_, outcome)) = &task.ended else {
        return;
    };
    let name = &*task.name;
    macro_rules! task_event {
        ($level:ident, $error:expr) => {
            event!(
                $level,
                { kind = kind, name = name, outcome = &*outcome.to_string(), error = $error },
                "shutdown: {kind} {name}: {outcome}"
            )
        };
    }
    match outcome {
        TaskOutcome::Done => task_event!(info, ""),
        TaskOutcome::Failed(error) | TaskOutcome::Panicked(error) => task_event!(warn, &**error),
        TaskOutcome::EndedEarly | TaskOutcome::Cut | TaskOutcome::NotRun => task_event!(warn, ""),
    }
}

/// The last of a listener's queue cannot be accepted.
#[cfg(feature = "axum")]
pub(crate) fn queue_lost(error: &std::io::Error) {
    event!(
        warn,
        { error = &*error.to_string() },
        "a listener is closed before its queue is empty: {error}"
    );
}

/// The listener is closed at the start of the stop, with its queue as it is.
#[cfg(feature = "axum")]
pub(crate) fn listener_left() {
    event!(
        debug,
        {},
        "shutdown: a shared listening socket is left to the next process"
    );
}

/// The last of a listener's queue could not be accepted for want of descriptors.
#[cfg(feature = "axum")]
pub(crate) fn queue_given_up() {
    event!(
        warn,
        {},
        "a listener is closed before its queue is empty: there are no file descriptors left"
    );
}

/// A handshake has failed, or was too slow if there is no error.
#[cfg(feature = "axum")]
pub(crate) fn handshake_failed(
    peer: Option<std::net::SocketAddr>,
    error: Option<Box<dyn std::error::Error + Send + Sync>>,
) {
    if !wants_debug() {
        return;
    }
    let error = match error {
        Some(error) => crate::tasks::table::with_sources(&*error),
        None => "it took too long".to_owned(),
    };
    let peer = peer.map_or_else(|| "a peer".to_owned(), |peer| peer.to_string());
    event!(
        debug,
        { peer = &*peer, error = &*error },
        "the handshake with {peer} has failed: {error}"
    );
}

#[cfg(feature = "axum")]
pub(crate) fn handshake_panicked() {
    event!(warn, {}, "a handshake has panicked");
}

/// What became of the queues of such listeners.
fn queue_reset(queued: usize) {
    event!(
        warn,
        { queued = queued },
        "connections reset in the accept queue, for want of file descriptors: {queued}"
    );
}

/// A mistake in the set-up.
fn warning(warning: &Warning) {
    event!(warn, {}, "{warning}");
}

/// What a signal did that was not the first.
#[cfg(feature = "signal")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Effect {
    /// A further SIGTERM, or any signal after the end.
    Nothing,
    /// The same Ctrl-C again.
    Doubled,
    /// Ended what was left of this phase.
    Ended(Phase),
    /// Ended the waiting for the cleanup.
    EndedCleanup,
}

#[cfg(feature = "signal")]
impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("changes nothing"),
            Self::Doubled => f.write_str("is the one before, delivered twice, and changes nothing"),
            Self::Ended(Phase::Draining) => f.write_str("cuts what is in flight"),
            Self::Ended(Phase::Closing) => f.write_str("ends the wait for connections to close"),
            Self::Ended(phase) => write!(f, "ends the phase {phase}"),
            Self::EndedCleanup => f.write_str("ends the wait for the cleanup"),
        }
    }
}

#[cfg(feature = "signal")]
fn signal(trigger: Trigger, effect: Effect) {
    event!(
        info,
        { signal = &*trigger.to_string(), effect = &*effect.to_string() },
        "shutdown: a further {trigger} {effect}"
    );
}

/// A signal after the last service has stopped, but not long after.
#[cfg(feature = "signal")]
pub(crate) fn late_signal(trigger: Trigger) {
    aside(Event::Signal(trigger, Effect::Nothing));
}

#[cfg(feature = "signal")]
pub(crate) fn no_signals(error: &std::io::Error) {
    event!(
        error,
        { error = &*error.to_string() },
        "cannot listen for signals; they will end the process at once: {error}"
    );
}

/// Seconds, to the millisecond: what a person can read and a machine can add.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}
