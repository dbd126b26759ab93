//! The level, the fields and the text of each queued event.

use std::time::Duration;

#[cfg(feature = "tracing")]
use tracing::level_filters::LevelFilter;

#[cfg(feature = "signal")]
use super::event::Effect;
use super::event::{Event, Progress, Reason, Transition};
#[cfg(feature = "signal")]
use crate::report::Trigger;
use crate::{
    config::plan::EffectivePlan,
    phase::Phase,
    report::{CutRequest, TaskOutcome, Warning},
    tasks::{awaited::Awaited, list::Task},
};

/// Emits one event of this crate: its level, its fields, its message.
macro_rules! event {
    ($level:ident, { $($name:ident = $value:expr),* $(,)? }, $($message:tt)+) => {{
        #[cfg(feature = "tracing")]
        crate::background::shielded(|| {
            tracing::$level!(target: "tower_graceful", $($name = $value,)* $($message)+);
        });
        #[cfg(not(feature = "tracing"))]
        let _ = (stringify!($level), $($value,)* format_args!($($message)+));
    }};
}

#[cfg(any(feature = "axum", feature = "signal"))]
pub(super) use event;

/// Whether any subscriber wants events of the debug level.
pub(crate) fn wants_debug() -> bool {
    #[cfg(feature = "tracing")]
    let wanted = LevelFilter::current() >= LevelFilter::DEBUG;
    #[cfg(not(feature = "tracing"))]
    let wanted = false;
    wanted
}

impl Event {
    #[cfg_attr(not(feature = "tracing"), expect(dead_code))]
    pub(super) fn write(&self) {
        match self {
            Self::Plan(it) => plan(it),
            Self::Transition(it) => transition(it),
            Self::Progress(it) => progress(it),
            Self::Task(it) => task(it),
            Self::QueueReset(queued) => queue_reset(*queued),
            Self::RuntimeEnds(it) => runtime_ends(it),
            Self::Warning(it) => warning(it),
            #[cfg(feature = "signal")]
            Self::Signal(it, effect) => signal(*it, *effect),
        }
    }
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
    let forced = match transition.reason {
        Reason::Cut | Reason::CutWorkGivenUp | Reason::CleanupOverdue | Reason::NoRuntime => true,
        // The cleanup was abandoned.
        Reason::Signal => transition.to == Phase::Stopped,
        _ => false,
    };
    if gives_up || forced {
        transition_event!(warn);
    } else {
        transition_event!(info);
    }
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

/// Logs how many connections were reset in the queues of listeners.
fn queue_reset(queued: usize) {
    event!(
        warn,
        { queued = queued },
        "connections reset in the accept queue: {queued}"
    );
}

/// Logs that `main` does not wait for the end of the stop.
fn runtime_ends(awaited: &Awaited) {
    event!(
        warn,
        { waits_for = &*awaited.to_string() },
        "the runtime ends before the service has stopped, which still waits for {awaited}; \
         await `run`, `serve` or `stopped()` before `main` returns"
    );
}

/// Logs a mistake in the setup.
fn warning(warning: &Warning) {
    event!(warn, {}, "{warning}");
}

#[cfg(feature = "signal")]
fn signal(trigger: Trigger, effect: Effect) {
    event!(
        info,
        { signal = &*trigger.to_string(), effect = &*effect.to_string() },
        "shutdown: a further {trigger} {effect}"
    );
}

/// Seconds, rounded to the millisecond, so that they are easy to read and to add.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}
