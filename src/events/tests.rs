//! The level and the text of events that no test of a whole service causes.

use std::{
    fmt, io,
    sync::{Arc, Mutex},
    time::Duration,
};

use tracing::{
    Dispatch, Event as Logged, Level, Subscriber, dispatcher,
    field::{Field, Visit},
};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt},
    registry,
};

use super::{
    Event, Reason, Transition, handshake_failed, handshake_panicked, listener_left, no_signals,
    queue_given_up, queue_lost,
};
use crate::phase::Phase;

type Lines = Arc<Mutex<Vec<(Level, String)>>>;

struct Capture(Lines);

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl<S: Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &Logged<'_>, _: Context<'_, S>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        let line = (*event.metadata().level(), message.0);
        self.0.lock().unwrap().push(line);
    }
}

fn logged(log: impl FnOnce()) -> Vec<(Level, String)> {
    // With a single subscriber, tracing asks the subscriber of the thread that reaches an event first whether it is
    // enabled, and remembers the answer for all threads.
    let _second = Dispatch::new(registry());
    let lines = Lines::default();
    let capture = Capture(Arc::clone(&lines));
    let dispatch = Dispatch::new(registry().with(capture));
    dispatcher::with_default(&dispatch, log);
    lines.lock().unwrap().drain(..).collect()
}

#[test]
fn events_outside_of_the_timeline_are_logged_with_their_causes() {
    let error = || io::Error::other("the cause");
    let peer = "192.0.2.1:9".parse().ok();
    let lines = logged(|| {
        queue_lost(&error());
        queue_given_up();
        listener_left();
        handshake_failed(peer, Some(Box::new(error())));
        handshake_failed(None, None);
        handshake_panicked();
        no_signals(&error());
    });
    let expected = [
        (Level::WARN, "queue is empty: the cause"),
        (Level::WARN, "no file descriptors left"),
        (Level::DEBUG, "left to the next process"),
        (Level::DEBUG, "with 192.0.2.1:9 has failed: the cause"),
        (Level::DEBUG, "with a peer has failed: it took too long"),
        (Level::WARN, "a handshake has panicked"),
        (Level::ERROR, "end the process at once: the cause"),
    ];
    assert_eq!(lines.len(), expected.len(), "{lines:?}");
    for ((level, text), (expected_level, end)) in lines.iter().zip(expected) {
        assert!(*level == expected_level && text.ends_with(end), "{text}");
    }
}

#[test]
fn a_signal_that_ends_the_cleanup_is_a_warning_and_one_that_ends_a_wait_is_not() {
    for (to, level) in [
        (Phase::Draining, Level::INFO),
        (Phase::Closing, Level::INFO),
        (Phase::Stopped, Level::WARN),
    ] {
        let transition = Event::Transition(Transition {
            to,
            reason: Reason::Signal,
            after: Duration::ZERO,
            time_left: Duration::ZERO,
            in_flight: 0,
            connections: 0,
        });
        let lines = logged(|| transition.write());
        assert_eq!(lines[0].0, level, "{lines:?}");
    }
}
