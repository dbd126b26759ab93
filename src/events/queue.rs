//! The queue of events, and the log thread that writes them.

use std::time::Duration;
#[cfg(feature = "tracing")]
use std::{collections::VecDeque, sync::LazyLock};

#[cfg(feature = "tracing")]
use tracing::{Dispatch, dispatcher, level_filters::LevelFilter, subscriber::NoSubscriber};

#[cfg(feature = "signal")]
use super::event::Effect;
use super::event::Event;
#[cfg(feature = "signal")]
use crate::report::Trigger;
#[cfg(feature = "tracing")]
use crate::{
    background::JobThreads,
    sync::{Mutex, lock},
};

#[cfg(feature = "tracing")]
static LOG: LazyLock<JobThreads> = LazyLock::new(|| JobThreads::new("graceful-log", 1));

/// The subscriber that receives the events of a thread.
#[derive(Clone)]
pub(crate) struct Origin(#[cfg(feature = "tracing")] Dispatch);

impl Origin {
    /// The subscriber of this thread, if it has one. While a subscriber handles an event, `tracing`
    /// gives its thread none.
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
    /// A thread is writing. One writes at a time.
    is_writing: bool,
}

impl Queue {
    /// Queues events for [`write`](Self::write), or with `on_log_thread`, for the log thread.
    #[cfg_attr(not(feature = "tracing"), expect(clippy::unused_self))]
    pub(crate) fn push(&self, events: Vec<Event>, on_log_thread: bool, origin: Option<&Origin>) {
        #[cfg(feature = "tracing")]
        if LevelFilter::current() == LevelFilter::OFF || events.is_empty() {
        } else if on_log_thread {
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
        let _ = (events, on_log_thread, origin);
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
                if events.is_writing && !mine {
                    return;
                }
                let next = events.waiting.pop_front();
                mine = next.is_some();
                events.is_writing = mine;
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

/// Waits until the log thread has written its events, for at most 250 ms: a subscriber may block, and
/// the process may be about to end. If half of the margin of the plan is less, it waits for that time,
/// but not for less than 100 ms.
#[cfg_attr(not(feature = "tracing"), expect(unused_variables))]
pub(crate) fn flush(margin: Duration) {
    #[cfg(feature = "tracing")]
    LOG.flush((margin / 2).clamp(Duration::from_millis(100), Duration::from_millis(250)));
}

/// Logs a signal that arrives shortly after the last service has stopped. It belongs to no lifecycle.
#[cfg(feature = "signal")]
pub(crate) fn late_signal(trigger: Trigger) {
    let event = Event::Signal(trigger, Effect::Nothing);
    Queue::default().push(vec![event], true, None);
    work();
}
