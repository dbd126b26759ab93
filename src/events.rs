//! What the log is told: one event per transition and a line while the drain waits. Without the
//! `tracing` feature, nothing.
//!
//! A subscriber may panic, and one that writes to a closed pipe does; closed pipes are common at
//! shutdown. No such panic leaves this file, because it would stop the timeline.

#[cfg(feature = "tracing")]
use std::panic::{self, AssertUnwindSafe};
use std::{fmt, time::Duration};

use crate::{
    phase::Phase,
    report::{CutRequest, Fate, TaskKind, Trigger},
    work::Task,
};

/// One event of this crate: its level, its fields, its message.
macro_rules! event {
    ($level:ident, { $($name:ident = $value:expr),* $(,)? }, $($message:tt)+) => {{
        #[cfg(feature = "tracing")]
        let _ = panic::catch_unwind(AssertUnwindSafe(|| {
            tracing::$level!(target: "tower_graceful", $($name = $value,)* $($message)+);
        }));
        #[cfg(not(feature = "tracing"))]
        let _ = (stringify!($level), $($value,)* format_args!($($message)+));
    }};
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
    Signal,
    Idle,
    Deadline,
    Closed,
    Cut,
    LetGo,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Triggered(trigger) => trigger.fmt(f),
            Self::DelayOver => f.write_str("the delay is over"),
            Self::NobodyServes => f.write_str("every server has ended"),
            Self::Signal => f.write_str("a further signal"),
            Self::Idle => f.write_str("nothing is in flight"),
            Self::Deadline => f.write_str("the drain deadline has passed"),
            Self::Closed => f.write_str("everything is closed"),
            Self::Cut => f.write_str("what was left has been cut"),
            Self::LetGo => f.write_str("what was cut did not end in time"),
        }
    }
}

pub(crate) fn transition(transition: &Transition) {
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
    if gives_up || matches!(transition.reason, Reason::Cut | Reason::LetGo) {
        transition_event!(warn);
    } else {
        transition_event!(info);
    }
}

pub(crate) fn progress(
    phase: Phase,
    in_flight: usize,
    connections: usize,
    time_left: Duration,
    oldest: &[CutRequest],
) {
    let oldest: Vec<_> = oldest.iter().map(CutRequest::to_string).collect();
    let oldest = match &*oldest {
        [] => String::new(),
        oldest => format!(", oldest {}", oldest.join("; ")),
    };
    event!(
        info,
        {
            phase = phase.as_str(),
            in_flight = in_flight,
            connections = connections,
            seconds_left = seconds(time_left),
        },
        "shutdown: {phase}, in flight {in_flight}, connections {connections}{oldest}"
    );
}

/// The end of a worker, a hook or a cleanup step.
pub(crate) fn task(task: &Task) {
    let kind = match task.kind {
        TaskKind::LameDuck => "hook",
        TaskKind::Worker => "worker",
        TaskKind::Cleanup => "cleanup",
    };
    let Some((_, fate)) = &task.ended else { return };
    let name = &*task.name;
    macro_rules! task_event {
        ($level:ident, $error:expr) => {
            event!(
                $level,
                { kind = kind, name = name, fate = &*fate.to_string(), error = $error },
                "shutdown: {kind} {name}: {fate}"
            )
        };
    }
    match fate {
        Fate::Done => task_event!(info, ""),
        Fate::Failed(error) | Fate::Panicked(error) => task_event!(warn, &**error),
        Fate::EndedEarly | Fate::Cut | Fate::NotRun => task_event!(warn, ""),
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

/// The last of a listener's queue could not be accepted for want of descriptors.
#[cfg(feature = "axum")]
pub(crate) fn queue_given_up() {
    event!(
        warn,
        {},
        "a listener is closed before its queue is empty: there are no file descriptors left"
    );
}

/// What became of the queues of such listeners.
pub(crate) fn queue_reset(queued: usize) {
    event!(
        warn,
        { queued = queued },
        "connections reset in the accept queue, for want of file descriptors: {queued}"
    );
}

#[cfg(feature = "signal")]
pub(crate) fn signal(trigger: Trigger) {
    event!(
        debug,
        { signal = &*trigger.to_string() },
        "received a signal"
    );
}

#[cfg(feature = "signal")]
pub(crate) fn no_signals(error: &std::io::Error) {
    event!(
        error,
        { error = &*error.to_string() },
        "cannot listen for signals; they will end the process at once"
    );
}

/// Seconds, to the millisecond: what a person can read and a machine can add.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}
