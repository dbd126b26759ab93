//! The queue of events, and the log thread that writes them.

#[cfg(feature = "tracing")]
use std::{collections::VecDeque, sync::LazyLock, time::Duration};

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

/// Logs a signal that arrives shortly after the last service has stopped.
#[cfg(feature = "signal")]
pub(crate) fn late_signal(trigger: Trigger) {
    aside(Event::Signal(trigger, Effect::Nothing));
}
