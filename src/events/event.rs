//! The data of the events that a step of the timeline queues.

use std::{fmt, time::Duration};

use crate::{
    config::plan::EffectivePlan,
    phase::Phase,
    report::{CutRequest, LeftEarly, Trigger, Warning},
    tasks::{awaited::Awaited, list::Task},
};

/// A log event.
pub(crate) enum Event {
    Plan(EffectivePlan),
    Transition(Transition),
    Progress(Progress),
    Task(Box<Task>),
    /// Connections that were reset in accept queues.
    QueueReset(usize),
    /// The runtime ends in a stop that nothing awaits, before these tasks have ended.
    RuntimeEnds(Awaited),
    Warning(Warning),
    #[cfg(feature = "signal")]
    Signal(Trigger, Effect),
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
                f.write_str("every connection has closed, and the next process accepts new ones")
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

/// What the stop waits for.
pub(crate) struct Progress {
    pub(crate) phase: Phase,
    pub(crate) in_flight: usize,
    pub(crate) connections: usize,
    pub(crate) time_left: Duration,
    pub(crate) oldest: Vec<CutRequest>,
    pub(crate) awaited: Awaited,
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
