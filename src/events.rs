//! Log events: the plan once, one event per transition, one per repeated signal, and a progress
//! line while the stop waits. Without the `tracing` feature, nothing is logged.
//!
//! The timeline (`shutdown`) and the server log here. A subscriber may block, and may panic: a
//! subscriber that writes to a closed pipe panics, and closed pipes are common at shutdown. So no
//! step of the timeline logs directly. A step queues its events under its lock, in order, and a
//! thread that exists only while there are events writes them afterwards. That thread uses the
//! subscriber of the thread that took the step. If the control thread took the step, it uses the
//! subscriber of the last other thread that took one.
//!
//! While tokio's clock is paused there is no such thread, because a test expects to find the events
//! of a step right after it. There, the task that takes a step writes the queued events after it
//! has released all locks.

#[cfg(feature = "tracing")]
use std::{collections::VecDeque, sync::LazyLock};
use std::{fmt, time::Duration};

#[cfg(feature = "tracing")]
use tracing::{Dispatch, dispatcher, level_filters::LevelFilter, subscriber::NoSubscriber};

#[cfg(feature = "tracing")]
use crate::{
    background::{JobThreads, shielded},
    sync::{Mutex, lock},
};
use crate::{
    config::plan::EffectivePlan,
    phase::Phase,
    report::{CutRequest, LeftEarly, TaskOutcome, Trigger, Warning},
    tasks::table::{Awaited, Task},
};

#[cfg(feature = "tracing")]
static LOG: LazyLock<JobThreads> = LazyLock::new(|| JobThreads::new("graceful-log", 1));

/// A log event.
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

/// The subscriber that receives the events of a thread.
#[derive(Clone)]
pub(crate) struct Origin(#[cfg(feature = "tracing")] Dispatch);

impl Origin {
    /// The subscriber of this thread, if it has one. Inside of an event no thread has one.
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

/// Events that have not been written yet, in order.
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
    /// Queues events for [`write`](Self::write), or with `aside`, for the log thread.
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

    /// Writes the queued events on this thread, and makes the log thread write its own. Must be
    /// called without any lock.
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

/// Makes the log thread write the events that are queued for it.
pub(crate) fn work() {
    #[cfg(feature = "tracing")]
    LOG.work();
}

/// Waits until the log thread has written its events, for at most 100 ms: a subscriber may block,
/// and the process may be about to end.
pub(crate) fn flush() {
    #[cfg(feature = "tracing")]
    LOG.flush(Duration::from_millis(100));
}

/// Writes an event that belongs to no lifecycle, on the log thread.
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

/// Emits one event of this crate: its level, its fields, its message.
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

/// Logs the durations from which the deadlines of a stop are derived.
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
    /// Time since the trigger.
    pub(crate) after: Duration,
    /// Time until the phase just entered ends at the latest.
    pub(crate) time_left: Duration,
    pub(crate) in_flight: usize,
    pub(crate) connections: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Reason {
    Triggered(Trigger),
    DelayOver,
    LeftEarly(LeftEarly),
    EveryServerEnded,
    HandedOver,
    Signal,
    Idle,
    Deadline,
    Closed,
    Cut,
    CutWorkGivenUp,
    /// The cleanup did not end in time.
    CleanupOverdue,
    /// The runtime of the cleanup steps has ended.
    NoRuntime,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Triggered(trigger) => trigger.fmt(f),
            Self::DelayOver => f.write_str("the delay is over"),
            Self::LeftEarly(why) => why.fmt(f),
            Self::EveryServerEnded => f.write_str("every server has ended"),
            Self::HandedOver => {
                f.write_str("every connection has closed, and the next process accepts")
            }
            Self::Signal => f.write_str("a further signal"),
            Self::Idle => f.write_str("nothing is in flight"),
            Self::Deadline => f.write_str("the drain deadline has passed"),
            Self::Closed => f.write_str("everything is closed"),
            Self::Cut => f.write_str("the remaining work was cut"),
            Self::CutWorkGivenUp => f.write_str("cut work did not end in time"),
            Self::CleanupOverdue => f.write_str("the cleanup did not end in time"),
            Self::NoRuntime => f.write_str("the runtime of the cleanup steps has ended"),
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
        Reason::Cut | Reason::CutWorkGivenUp | Reason::CleanupOverdue | Reason::NoRuntime
    );
    if gives_up || forced {
        transition_event!(warn);
    } else {
        transition_event!(info);
    }
}

/// What the stop waits for.
pub(crate) struct Progress {
    pub(crate) phase: Phase,
    pub(crate) in_flight: usize,
    pub(crate) connections: usize,
    pub(crate) time_left: Duration,
    pub(crate) oldest: Vec<CutRequest>,
    pub(crate) awaited: Awaited,
}

fn progress(progress: &Progress) {
    let Progress {
        phase,
        in_flight,
        connections,
        time_left,
        oldest,
        awaited,
    } = progress;
    let oldest: Vec<_> = oldest.iter().map(CutRequest::to_string).collect();
    let oldest = match &*oldest {
        [] => String::new(),
        oldest => format!(", oldest {}", oldest.join("; ")),
    };
    // A field without a value is left out.
    let waits_for = (!awaited.is_nothing()).then(|| awaited.to_string());
    let waits_for = waits_for.as_deref();
    let named = waits_for.map_or_else(String::new, |names| format!(", waits for {names}"));
    event!(
        info,
        {
            phase = phase.as_str(),
            in_flight = *in_flight,
            connections = *connections,
            seconds_left = seconds(*time_left),
            waits_for = waits_for,
        },
        "shutdown: {phase}, in flight {in_flight}, connections {connections}{oldest}{named}"
    );
}

/// Logs the end of a worker, a hook or a cleanup step.
fn task(task: &Task) {
    let kind = task.kind.as_str();
    let Some((_, outcome)) = &task.ended else {
        return;
    };
    let name = &*task.name;
    let error = match outcome {
        TaskOutcome::Failed(error) | TaskOutcome::Panicked(error) => Some(&**error),
        TaskOutcome::Done | TaskOutcome::EndedEarly | TaskOutcome::Cut | TaskOutcome::NotRun => {
            None
        }
    };
    macro_rules! task_event {
        ($level:ident) => {
            event!(
                $level,
                { kind = kind, name = name, outcome = &*outcome.to_string(), error = error },
                "shutdown: {kind} {name}: {outcome}"
            )
        };
    }
    if matches!(outcome, TaskOutcome::Done) {
        task_event!(info);
    } else {
        task_event!(warn);
    }
}

/// Logs that the rest of a listener's queue cannot be accepted.
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

/// Logs that the rest of a listener's queue could not be accepted for lack of file descriptors.
#[cfg(feature = "axum")]
pub(crate) fn queue_given_up() {
    event!(
        warn,
        {},
        "a listener is closed before its queue is empty: there are no file descriptors left"
    );
}

/// Logs a failed handshake. Without an error, the handshake was too slow.
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

/// A call of the preStop route was refused.
#[cfg(feature = "axum")]
pub(crate) fn pre_stop_refused(reason: &str) {
    event!(
        warn,
        { reason = reason },
        "a call of the preStop route is refused: {reason}"
    );
}

/// Logs how many connections were reset in the queues of listeners.
fn queue_reset(queued: usize) {
    event!(
        warn,
        { queued = queued },
        "connections reset in the accept queue: {queued}"
    );
}

/// Logs a mistake in the setup.
fn warning(warning: &Warning) {
    event!(warn, {}, "{warning}");
}

/// What a signal after the first one did.
#[cfg(feature = "signal")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum Effect {
    /// A further SIGTERM, or any signal after the end. It has no effect.
    Nothing,
    /// The same Ctrl-C, delivered twice.
    Doubled,
    /// Ended the rest of this phase.
    Ended(Phase),
    /// Ended the wait for the cleanup.
    EndedCleanup,
}

#[cfg(feature = "signal")]
impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("changes nothing"),
            Self::Doubled => f.write_str("is a duplicate of the last one, and changes nothing"),
            Self::Ended(Phase::Draining) => f.write_str("cuts the work in flight"),
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

/// Logs a signal that arrives shortly after the last service has stopped.
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

/// Seconds, rounded to the millisecond, so that they are easy to read and to add.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}
