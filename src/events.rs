//! What the log is told: one event per transition and a line while the drain waits. Without the
//! `tracing` feature, nothing.

#[cfg(feature = "tracing")]
mod enabled {
    use std::{fmt, io, time::Duration};

    use crate::{
        phase::Phase,
        report::Trigger,
        timeline::{Reason, Transition},
    };

    const TARGET: &str = "tower_graceful";

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
                Self::LetGo => f.write_str("what was cut did not end in time"),
            }
        }
    }

    pub(crate) fn transition(transition: &Transition) {
        let Transition {
            to,
            reason,
            after,
            time_left,
            in_flight,
            connections,
        } = transition;
        macro_rules! event {
            ($level:ident) => {
                tracing::$level!(
                    target: TARGET,
                    phase = %to,
                    %reason,
                    in_flight,
                    connections,
                    seconds = seconds(*after),
                    seconds_left = seconds(*time_left),
                    "shutdown: {to}, because {reason}",
                )
            };
        }
        // Work that was begun is given up.
        if *to == Phase::Closing && *in_flight > 0 || matches!(reason, Reason::LetGo) {
            event!(warn);
        } else {
            event!(info);
        }
    }

    pub(crate) fn progress(phase: Phase, in_flight: usize, connections: usize, left: Duration) {
        tracing::info!(
            target: TARGET,
            %phase,
            in_flight,
            connections,
            seconds_left = seconds(left),
            "shutdown: {phase}, in flight {in_flight}, connections {connections}",
        );
    }

    /// Seconds, to the millisecond: what a person can read and a machine can add.
    fn seconds(duration: Duration) -> f64 {
        (duration.as_secs_f64() * 1000.0).round() / 1000.0
    }

    #[cfg(feature = "signal")]
    pub(crate) fn signal(trigger: Trigger) {
        tracing::debug!(target: TARGET, signal = %trigger, "received a signal");
    }

    #[cfg(feature = "signal")]
    pub(crate) fn no_signals(error: &io::Error) {
        tracing::error!(target: TARGET, %error, "cannot listen for signals; they will end the process at once");
    }
}

#[cfg(feature = "tracing")]
pub(crate) use enabled::*;

#[cfg(not(feature = "tracing"))]
mod disabled {
    use std::{io, time::Duration};

    use crate::{phase::Phase, report::Trigger, timeline::Transition};

    pub(crate) fn transition(transition: &Transition) {
        let Transition {
            to: _,
            reason: _,
            after: _,
            time_left: _,
            in_flight: _,
            connections: _,
        } = transition;
    }

    pub(crate) fn progress(_: Phase, _in_flight: usize, _connections: usize, _left: Duration) {}

    #[cfg(feature = "signal")]
    pub(crate) fn signal(_: Trigger) {}

    #[cfg(feature = "signal")]
    pub(crate) fn no_signals(_: &io::Error) {}
}

#[cfg(not(feature = "tracing"))]
pub(crate) use disabled::*;
