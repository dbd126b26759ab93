//! When a request is in flight, up to the head of its response.

use std::{
    future::{Ready, pending, poll_fn, ready},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::Response;
use http_body_util::Empty;
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, service_fn};
use tower_graceful::Graceful;

use crate::support::{Script, Step, draining, get, hold, panics, prompt, refuse, start, whole};

type Answer<B> = Result<Response<B>, &'static str>;

#[test]
fn a_request_is_in_flight_from_the_call_on() {
    let graceful = Graceful::new();
    let mut request = start(&graceful, pending::<Answer<Empty<Bytes>>>());
    assert_eq!(graceful.in_flight(), 1, "before the first poll");
    assert_pending!(request.poll());
    assert_eq!(graceful.in_flight(), 1);
}

#[test]
fn making_the_service_and_polling_it_ready_counts_nothing() {
    let graceful = Graceful::new();
    let inner = service_fn(|_: http::Request<Empty<Bytes>>| pending::<Answer<Empty<Bytes>>>());
    let mut service = task::spawn(graceful.layer().layer(inner));
    assert_ready_ok!(service.enter(|cx, mut service| service.poll_ready(cx)));
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn a_response_that_streams_is_in_flight_after_its_head() {
    let graceful = Graceful::new();
    let body = Script::new([Step::Data("more")]);
    let mut request = start(&graceful, ready(Ok(Response::new(body))));
    let response = assert_ready_ok!(request.poll());
    drop(request);
    assert_eq!(graceful.in_flight(), 1, "held by the body alone");
    drop(response);
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn dropping_the_future_releases_its_request() {
    let graceful = Graceful::new();
    let mut polled = start(&graceful, pending::<Answer<Empty<Bytes>>>());
    assert_pending!(polled.poll());
    let unpolled = hold(&graceful);
    assert_eq!(graceful.in_flight(), 2);
    drop(polled);
    assert_eq!(graceful.in_flight(), 1);
    drop(unpolled);
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn a_panic_in_call_releases_the_request() {
    let graceful = Graceful::new();
    let mut counted = 0;
    let inner = service_fn(|_| -> Ready<Answer<Empty<Bytes>>> {
        counted = graceful.in_flight();
        panic!("call panics")
    });
    let mut service = graceful.layer().layer(inner);
    assert!(panics(|| service.call(get("/"))));
    assert_eq!(counted, 1, "in flight while the inner call runs");
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn a_panic_in_poll_releases_the_request_once_the_future_is_dropped() {
    let graceful = Graceful::new();
    let inner = poll_fn(|_| -> Poll<Answer<Empty<Bytes>>> { panic!("poll panics") });
    let mut request = start(&graceful, inner);
    assert!(panics(|| request.poll()));
    drop(request);
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn an_error_releases_the_request_and_is_passed_on() {
    let graceful = Graceful::new();
    let mut request = start(&graceful, ready(Answer::<Empty<Bytes>>::Err("broken")));
    assert_eq!(graceful.in_flight(), 1);
    assert_eq!(assert_ready_err!(request.poll()), "broken");
    assert_eq!(graceful.in_flight(), 0, "with the future still alive");
}

#[test]
fn polled_after_it_is_ready_the_future_stays_pending() {
    let graceful = Graceful::new();
    let mut request = start(&graceful, ready(Ok(whole("hi"))));
    let _ = assert_ready_ok!(request.poll());
    assert_pending!(request.poll());

    let mut request = start(&graceful, ready(Answer::<Empty<Bytes>>::Err("broken")));
    assert_ready_err!(request.poll());
    assert_pending!(request.poll());

    let (graceful, _busy) = draining(prompt().exempt("/"));
    let mut request = task::spawn(refuse(&graceful, get("/refused")));
    let _ = assert_ready_ok!(request.poll());
    assert_pending!(request.poll());

    let mut request = start(&graceful, ready(Ok(whole("exempt"))));
    let _ = assert_ready_ok!(request.poll());
    assert_pending!(request.poll());
}

/// Records how many requests were in flight when it was dropped.
struct Witness<'a, T> {
    graceful: &'a Graceful,
    seen: &'a mut Option<usize>,
    output: Option<T>,
}

impl<T> Drop for Witness<'_, T> {
    fn drop(&mut self) {
        *self.seen = Some(self.graceful.in_flight());
    }
}

impl<T: Unpin> Future for Witness<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        self.output.take().map_or(Poll::Pending, Poll::Ready)
    }
}

#[test]
fn the_inner_future_is_dropped_when_the_response_is_returned() {
    let graceful = Graceful::new();
    let mut seen = None;
    let inner = Witness {
        graceful: &graceful,
        seen: &mut seen,
        output: Some(Ok::<_, &str>(Response::new(whole("hi")))),
    };
    let mut request = start(&graceful, inner);
    let response = assert_ready_ok!(request.poll());
    assert_eq!(graceful.in_flight(), 1, "held by the body");
    drop(response);
    assert_eq!(graceful.in_flight(), 0);
    drop(request);
    assert_eq!(
        seen,
        Some(1),
        "it was dropped after its request was released"
    );
}

#[test]
fn the_inner_future_is_dropped_before_its_request_is_released() {
    let outputs: [Option<Answer<Empty<Bytes>>>; 3] = [
        Some(Ok(Response::new(Empty::new()))),
        Some(Err("broken")),
        None, // dropped while pending
    ];
    for output in outputs {
        let graceful = Graceful::new();
        let ends = output.is_some();
        let mut seen = None;
        let mut request = start(
            &graceful,
            Witness {
                graceful: &graceful,
                seen: &mut seen,
                output,
            },
        );
        if ends {
            let _ = assert_ready!(request.poll());
            assert_eq!(graceful.in_flight(), 0);
        } else {
            assert_pending!(request.poll());
        }
        drop(request);
        assert_eq!(seen, Some(1));
        assert_eq!(graceful.in_flight(), 0);
    }
}
