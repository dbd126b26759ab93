//! Log events: the plan once, one event per transition, one per repeated signal, one per worker, hook
//! or cleanup step that ends, warnings, connections that were reset in accept queues, and a progress
//! line while the stop waits. `at_once` has the events that belong to no step of the timeline.
//! Without the `tracing` feature, nothing is logged.
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

#[cfg(any(feature = "axum", feature = "signal"))]
mod at_once;
mod event;
mod queue;
mod texts;

#[cfg(all(
    test,
    feature = "axum",
    feature = "signal",
    feature = "tracing",
    not(tower_graceful_loom)
))]
mod tests;

#[cfg(feature = "axum")]
pub(crate) use self::at_once::{
    Limit, handshake_failed, handshake_panicked, listener_left, pre_stop_refused, queue_given_up,
    queue_lost,
};
#[cfg(feature = "signal")]
pub(crate) use self::{at_once::no_signals, event::Effect, queue::late_signal};
pub(crate) use self::{
    event::{Event, Progress, Reason, Transition},
    queue::{Origin, Queue, flush, work},
    texts::wants_debug,
};
