//! When a request ends, from the head of its response to the end of the body.

use std::{
    cell::Cell,
    future::ready,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use tokio_test::{
    assert_pending, assert_ready, assert_ready_ok,
    task::{self, Spawn},
};
use tower::ServiceExt;
use tower_graceful::{Graceful, GracefulBody};

use crate::support::{Script, Step, draining, get, panics, prompt, refuse, start, trailers, whole};

/// The body that the layer returns, after its future was dropped.
fn through<B>(graceful: &Graceful, body: B) -> Spawn<GracefulBody<B>>
where
    B: Body<Data: From<Bytes>>,
{
    let mut request = start(graceful, ready(Ok(Response::new(body))));
    task::spawn(assert_ready_ok!(request.poll()).into_body())
}

type Polled<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

fn frame<B: Body>(body: &mut Spawn<B>) -> Polled<B> {
    body.enter(|cx, body| body.poll_frame(cx))
}

fn data<B: Body<Data: Into<Bytes>, Error: std::fmt::Debug>>(body: &mut Spawn<B>) -> Bytes {
    let frame = assert_ready!(frame(body)).unwrap().unwrap();
    frame.into_data().ok().unwrap().into()
}

#[test]
fn a_stream_that_does_not_announce_its_end_is_in_flight_until_it_returns_none() {
    let graceful = Graceful::new();
    let steps = [Step::Data("one"), Step::Wait, Step::Data("two")];
    let mut body = through(&graceful, Script::new(steps));
    assert_eq!(data(&mut body), "one");
    assert_eq!(graceful.in_flight(), 1);
    assert_pending!(frame(&mut body));
    assert_eq!(graceful.in_flight(), 1);
    assert_eq!(data(&mut body), "two");
    assert_eq!(
        graceful.in_flight(),
        1,
        "nothing said that this was the last"
    );
    assert!(assert_ready!(frame(&mut body)).is_none());
    assert_eq!(graceful.in_flight(), 0, "with the body still alive");
}

#[test]
fn a_stream_that_announces_its_end_is_released_with_its_last_frame() {
    let graceful = Graceful::new();
    let steps = [Step::Data("one"), Step::Data("two")];
    let mut body = through(&graceful, Script::announcing(steps));
    assert_eq!(data(&mut body), "one");
    assert_eq!(graceful.in_flight(), 1);
    assert_eq!(data(&mut body), "two");
    assert_eq!(graceful.in_flight(), 0);
}

/// From this size on a last frame does not end its request.
const LARGE: usize = 16 * 1024;

fn text_of(size: usize) -> &'static str {
    "x".repeat(size).leak()
}

/// Takes the last frame of a body. Returns whether the body then reports its end.
fn last_frame_taken<B: Body<Data: Into<Bytes>, Error: std::fmt::Debug>>(
    graceful: &Graceful,
    body: &mut Spawn<B>,
    size: usize,
) -> bool {
    assert_eq!(data(body).len(), size);
    let (_, _, ended) = hints(body);
    assert_eq!(graceful.in_flight(), usize::from(!ended));
    ended
}

/// The server polls again when it has room, and only then the request ends.
fn is_over_when_polled_again<B: Body>(graceful: &Graceful, body: &mut Spawn<B>) {
    assert_eq!(hints(body), (0, Some(0), false));
    assert_eq!(graceful.in_flight(), 1);
    for _ in 0..3 {
        assert!(assert_ready!(frame(body)).is_none());
        assert_eq!(hints(body), (0, Some(0), true));
        assert_eq!(graceful.in_flight(), 0);
    }
}

#[test]
fn a_large_last_frame_is_in_flight_until_the_server_asks_for_more() {
    for name in [false, true] {
        let graceful = Graceful::builder().name_requests(name).build().unwrap();
        let mut body = through(&graceful, Full::<Bytes>::from(text_of(LARGE)));
        assert!(!last_frame_taken(&graceful, &mut body, LARGE));
        is_over_when_polled_again(&graceful, &mut body);

        let mut body = through(&graceful, Full::<Bytes>::from(text_of(LARGE - 1)));
        assert!(last_frame_taken(&graceful, &mut body, LARGE - 1), "{name}");
    }
}

#[test]
fn a_large_last_frame_is_in_flight_until_the_server_drops_the_body() {
    for name in [false, true] {
        let graceful = Graceful::builder().name_requests(name).build().unwrap();
        let mut body = through(&graceful, Full::<Bytes>::from(text_of(LARGE)));
        assert!(!last_frame_taken(&graceful, &mut body, LARGE));
        drop(body);
        assert_eq!(graceful.in_flight(), 0);
    }
}

#[test]
fn only_the_size_of_the_last_frame_matters() {
    let graceful = Graceful::new();
    let steps = [Step::Data(text_of(LARGE)), Step::Data("end")];
    let mut body = through(&graceful, Script::announcing(steps));
    assert_eq!(data(&mut body).len(), LARGE);
    assert!(last_frame_taken(&graceful, &mut body, 3));

    let steps = [Step::Data("begin"), Step::Data(text_of(LARGE))];
    let mut body = through(&graceful, Script::announcing(steps).hint(3, 70));
    assert_eq!(data(&mut body), "begin");
    assert_eq!(hints(&mut body), (3, Some(70), false));
    assert!(!last_frame_taken(&graceful, &mut body, LARGE));
    is_over_when_polled_again(&graceful, &mut body);
}

#[test]
fn while_the_service_stops_a_last_frame_of_any_size_is_in_flight_until_the_next_poll() {
    for name in [false, true] {
        for delay in [0, 5] {
            let builder = Graceful::builder().drain_delay(Duration::from_secs(delay));
            let graceful = builder.name_requests(name).build().unwrap();
            let mut bodies: Vec<_> = (0..2)
                .map(|_| through(&graceful, Full::<Bytes>::from("all")))
                .collect();
            graceful.shutdown();
            let mut body = bodies.remove(0);
            assert_eq!(data(&mut body), "all");
            assert_eq!(hints(&mut body), (0, Some(0), false));
            assert_eq!(graceful.in_flight(), 2);
            drop(bodies);
            is_over_when_polled_again(&graceful, &mut body);
        }
    }
}

#[test]
fn a_held_body_is_not_polled_past_its_announced_end() {
    for name in [false, true] {
        let graceful = Graceful::builder().name_requests(name).build().unwrap();
        let script = Script::announcing([Step::Data(text_of(LARGE))]);
        let read = script.progress();
        let mut body = through(&graceful, script);
        assert!(!last_frame_taken(&graceful, &mut body, LARGE));
        assert!(assert_ready!(frame(&mut body)).is_none());
        assert_eq!(graceful.in_flight(), 0);
        assert_eq!(read.polls(), 1);
    }
}

#[test]
fn trailers_end_a_request_also_while_the_service_stops() {
    let graceful = Graceful::new();
    let steps = [Step::Data(text_of(LARGE)), Step::Trailers];
    let mut body = through(&graceful, Script::announcing(steps));
    graceful.shutdown();
    assert_eq!(data(&mut body).len(), LARGE);
    assert_eq!(graceful.in_flight(), 1);
    assert!(
        assert_ready!(frame(&mut body))
            .unwrap()
            .unwrap()
            .is_trailers()
    );
    assert_eq!(graceful.in_flight(), 0);
    assert!(body.enter(|_, body| body.is_end_stream()));
}

#[test]
fn trailers_are_forwarded_and_are_the_last_frame() {
    let graceful = Graceful::new();
    let steps = [Step::Data("data"), Step::Trailers];
    let mut body = through(&graceful, Script::announcing(steps));
    assert_eq!(data(&mut body), "data");
    assert_eq!(graceful.in_flight(), 1);
    let last = assert_ready!(frame(&mut body)).unwrap().unwrap();
    assert_eq!(last.into_trailers().ok(), Some(trailers()));
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn a_body_that_fails_is_released_and_its_error_is_forwarded() {
    let graceful = Graceful::new();
    let steps = [Step::Data("data"), Step::Error, Step::Data("never")];
    let mut body = through(&graceful, Script::new(steps));
    assert_eq!(data(&mut body), "data");
    let error = assert_ready!(frame(&mut body)).unwrap().unwrap_err();
    assert_eq!(error, "broken body");
    assert_eq!(graceful.in_flight(), 0, "with the body still alive");
}

#[test]
fn a_body_dropped_half_way_is_released() {
    let graceful = Graceful::new();
    let steps = [Step::Data("one"), Step::Data("two")];
    let mut body = through(&graceful, Script::new(steps));
    assert_eq!(data(&mut body), "one");
    assert_eq!(graceful.in_flight(), 1);
    drop(body);
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn a_body_that_panics_is_released_when_it_is_dropped() {
    let graceful = Graceful::new();
    let mut body = through(&graceful, Script::new([Step::Panic]));
    assert!(panics(|| frame(&mut body)));
    drop(body);
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn a_poll_after_the_end_returns_what_the_inner_body_returns() {
    let graceful = Graceful::new();
    let mut body = through(&graceful, Full::<Bytes>::from("all"));
    assert_eq!(data(&mut body), "all");
    for _ in 0..3 {
        assert!(assert_ready!(frame(&mut body)).is_none());
        assert_eq!(graceful.in_flight(), 0);
    }

    let (graceful, _busy) = draining(prompt());
    let mut refused = task::spawn(refuse(&graceful, get("/")));
    let mut body = task::spawn(assert_ready_ok!(refused.poll()).into_body());
    assert!(!data(&mut body).is_empty());
    for _ in 0..3 {
        assert!(assert_ready!(frame(&mut body)).is_none());
    }
}

#[test]
fn responses_without_content_are_released_with_their_head() {
    for status in [
        StatusCode::OK, // to HEAD
        StatusCode::NO_CONTENT,
        StatusCode::NOT_MODIFIED,
    ] {
        let graceful = Graceful::new();
        let mut response = Response::new(Empty::<Bytes>::new());
        *response.status_mut() = status;
        let mut request = start(&graceful, ready(Ok(response)));
        let response = assert_ready_ok!(request.poll());
        assert_eq!(response.status(), status);
        assert!(response.body().is_end_stream());
        assert_eq!(graceful.in_flight(), 0, "{status}");
    }
}

/// The lower and upper bound of the body's size, and whether it has ended.
fn hints<B: Body>(body: &mut Spawn<B>) -> (u64, Option<u64>, bool) {
    body.enter(|_, body| {
        let hint = body.size_hint();
        (hint.lower(), hint.upper(), body.is_end_stream())
    })
}

#[test]
fn size_hint_and_end_of_stream_are_forwarded() {
    let graceful = Graceful::new();
    let steps = [Step::Data("12345"), Step::Data("67")];
    let mut body = through(&graceful, Script::announcing(steps).hint(3, 70));
    assert_eq!(hints(&mut body), (3, Some(70), false));
    data(&mut body);
    assert_eq!(hints(&mut body), (3, Some(70), false));
    data(&mut body);
    assert_eq!(hints(&mut body), (3, Some(70), true));

    let mut body = through(&graceful, Full::<Bytes>::from("12345"));
    assert_eq!(hints(&mut body), (5, Some(5), false));
    data(&mut body);
    assert_eq!(hints(&mut body), (0, Some(0), true));

    let mut body = through(&graceful, Script::new([]));
    assert_eq!(
        hints(&mut body),
        (0, None, false),
        "an end that was not announced"
    );
}

#[test]
fn a_refusal_knows_its_size_and_its_end() {
    let (graceful, _busy) = draining(prompt());
    let mut refused = task::spawn(refuse(&graceful, get("/")));
    let mut body = task::spawn(assert_ready_ok!(refused.poll()).into_body());
    let (lower, upper, ended) = hints(&mut body);
    assert_eq!((upper, ended), (Some(lower), false));
    assert_eq!(data(&mut body).len() as u64, lower);
    assert_eq!(hints(&mut body), (0, Some(0), true));
}

#[tokio::test]
async fn data_may_be_any_type_made_from_bytes() {
    let (graceful, _busy) = draining(prompt().exempt("/exempt"));
    let service = || {
        let inner = tower::service_fn(|_: http::Request<Empty<Bytes>>| {
            let body = Full::new(BytesMut::from("mutable"));
            ready(Ok::<_, &'static str>(Response::new(body)))
        });
        tower::Layer::layer(&graceful.layer(), inner)
    };
    let served = service().oneshot(get("/exempt")).await.unwrap();
    let data: BytesMut = only_data(served.into_body()).await;
    assert_eq!(data, "mutable");
    let refused = service().oneshot(get("/")).await.unwrap();
    let data: BytesMut = only_data(refused.into_body()).await;
    assert!(data.starts_with(b"shutting down"));
}

async fn only_data<B: Body<Error: std::fmt::Debug> + Unpin>(mut body: B) -> B::Data {
    let frame = body.frame().await.unwrap().unwrap();
    frame.into_data().ok().unwrap()
}

/// A body whose data, error and value stay on one thread. Records how many requests are in flight
/// while it is dropped.
struct Local<'a> {
    graceful: &'a Graceful,
    seen: Rc<Cell<Option<usize>>>,
}

impl Body for Local<'_> {
    type Data = Bytes;
    type Error = Rc<str>;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Rc<str>>>> {
        Poll::Pending
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(1)
    }
}

impl Drop for Local<'_> {
    fn drop(&mut self) {
        self.seen.set(Some(self.graceful.in_flight()));
    }
}

#[test]
fn the_inner_body_is_dropped_before_its_request_is_released() {
    let graceful = Graceful::new();
    let seen = Rc::new(Cell::new(None));
    let local = Local {
        graceful: &graceful,
        seen: Rc::clone(&seen),
    };
    let mut body = through(&graceful, local);
    assert_pending!(frame(&mut body));
    drop(body);
    assert_eq!(seen.get(), Some(1));
    assert_eq!(graceful.in_flight(), 0);
}

#[test]
fn futures_and_bodies_are_as_thread_safe_as_what_they_wrap() {
    fn send<T: Send>(_: &T) {}
    fn send_sync_unpin<T: Send + Sync + Unpin>(_: &T) {}
    let graceful = Graceful::new();
    let mut request = start(&graceful, ready(Ok(Response::new(Script::new([])))));
    send(&*request);
    send(assert_ready_ok!(request.poll()).body());
    let mut request = start(&graceful, ready(Ok(whole("hi"))));
    send_sync_unpin(assert_ready_ok!(request.poll()).body());
}
