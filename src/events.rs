//! What the log is told: one event per transition and a line while the drain waits. Without the
//! `tracing` feature, nothing.

use std::{fmt, time::Duration};

use crate::{
    phase::Phase,
    timeline::{Reason, Transition},
};

/// One event of this crate: its level, its fields, its message.
macro_rules! event {
    ($level:ident, { $($name:ident = $value:expr),* $(,)? }, $($message:tt)+) => {{
        #[cfg(feature = "tracing")]
        tracing::$level!(target: "tower_graceful", $($name = $value,)* $($message)+);
        #[cfg(not(feature = "tracing"))]
        let _ = (stringify!($level), $($value,)* format_args!($($message)+));
    }};
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
    let gives_up = transition.to == Phase::Closing && transition.in_flight > 0;
    if gives_up || matches!(transition.reason, Reason::Cut | Reason::LetGo) {
        transition_event!(warn);
    } else {
        transition_event!(info);
    }
}

pub(crate) fn progress(phase: Phase, in_flight: usize, connections: usize, time_left: Duration) {
    event!(
        info,
        {
            phase = phase.as_str(),
            in_flight = in_flight,
            connections = connections,
            seconds_left = seconds(time_left),
        },
        "shutdown: {phase}, in flight {in_flight}, connections {connections}"
    );
}

#[cfg(feature = "signal")]
pub(crate) fn signal(trigger: crate::report::Trigger) {
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
