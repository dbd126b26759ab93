//! Named requests: which requests are in the request table, from when to when, and that nothing
//! else changes.

use std::{
    cell::Cell,
    convert::Infallible,
    fmt::Debug,
    future::{Ready, pending, ready},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{Empty, Full};
use tokio::{sync::oneshot, time::sleep};
use tokio_test::{
    assert_pending, assert_ready, assert_ready_err, assert_ready_ok,
    task::{self, Spawn},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_graceful::{
    CutRequest, Graceful, GracefulBody, GracefulBuilder, GracefulFuture, Outcome, Report,
};

use crate::support::{Busy, Script, Step, connection, get, panics, prompt, text, trailers, whole};

const DRAIN: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);

/// No delay, a drain of 10 s, and names.
fn named() -> GracefulBuilder {
    prompt().drain_timeout(DRAIN).name_requests(true)
}

/// Admits a request that behaves as `inner`.
fn send<F, B>(
    graceful: &Graceful,
    request: Request<Empty<Bytes>>,
    inner: F,
) -> Spawn<GracefulFuture<F, Empty<Bytes>>>
where
    F: Future<Output = Result<Response<B>, &'static str>>,
    B: Body<Data: From<Bytes>>,
{
    let mut inner = Some(inner);
    let inner = service_fn(move |_| inner.take().expect("one call"));
    task::spawn(graceful.layer().layer(inner).call(request))
}

/// Admits a request that is never answered.
fn endless(graceful: &Graceful, request: Request<Empty<Bytes>>) -> Busy {
    let inner = service_fn(|_| pending());
    graceful.layer().layer(inner).call(request)
}

/// A request whose response head has been sent, with this body.
fn answered<B>(graceful: &Graceful, body: B) -> Spawn<GracefulBody<B>>
where
    B: Body<Data: From<Bytes>>,
{
    let mut request = send(graceful, get("/answered"), ready(Ok(Response::new(body))));
    task::spawn(assert_ready_ok!(request.poll()).into_body())
}

type Polled<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

fn frame<B: Body>(body: &mut Spawn<B>) -> Polled<B> {
    body.enter(|cx, body| body.poll_frame(cx))
}

fn ended<B: Body>(body: &mut Spawn<B>) -> bool {
    body.enter(|_, body| body.is_end_stream())
}

async fn stop(graceful: &Graceful) -> Report {
    graceful.shutdown();
    graceful.stopped().await;
    graceful.run(pending::<()>()).await
}

/// Stops the service, cuts the requests in flight, and returns them.
async fn cut(graceful: &Graceful) -> Vec<(String, String, Duration, bool)> {
    let in_flight = graceful.in_flight();
    let report = stop(graceful).await;
    assert_eq!(report.outcome(), Outcome::Forced);
    assert_eq!(report.remaining().requests, in_flight);
    assert_eq!(report.requests().cut, in_flight);
    assert_eq!(report.requests_cut().len(), in_flight);
    let requests = report.requests_cut().iter().cloned();
    requests
        .map(|it: CutRequest| (it.method.to_string(), it.path, it.age, it.streaming))
        .collect()
}

fn row(
    method: &str,
    path: &str,
    age: Duration,
    streaming: bool,
) -> (String, String, Duration, bool) {
    (method.into(), path.into(), age, streaming)
}

#[tokio::test(start_paused = true)]
async fn requests_cut_are_named_by_method_path_and_age_oldest_first() {
    let graceful = named().build().unwrap();
    let gone = endless(&graceful, get("/gone"));
    let _first = endless(&graceful, get("/export?token=secret#part"));
    sleep(SECOND).await;
    drop(gone);
    // A new request uses the key of one that has ended.
    let post = Request::post("http://example.org/orders?x=1");
    let _second = endless(&graceful, post.body(Empty::new()).unwrap());
    sleep(SECOND / 2).await;
    let mut streaming = send(&graceful, get("/stream"), ready(Ok(whole("text"))));
    let _body = assert_ready_ok!(streaming.poll()).into_body();
    drop(streaming);
    assert_eq!(
        cut(&graceful).await,
        [
            row("GET", "/export", DRAIN + SECOND * 3 / 2, false),
            row("POST", "/orders", DRAIN + SECOND / 2, false),
            row("GET", "/stream", DRAIN, true),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn requests_of_the_lame_duck_phase_are_named_too() {
    let builder = Graceful::builder().drain_delay(SECOND).drain_timeout(DRAIN);
    let graceful = builder.name_requests(true).build().unwrap();
    graceful.shutdown();
    sleep(SECOND / 2).await;
    let mut late = send(&graceful, get("/late"), ready(Ok(whole("text"))));
    let response = assert_ready_ok!(late.poll());
    assert_eq!(connection(&response), ["close"]);
    sleep(SECOND).await;
    assert_eq!(
        cut(&graceful).await,
        [row("GET", "/late", DRAIN + SECOND / 2, true)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_streams_from_the_moment_its_head_is_out() {
    let graceful = named().build().unwrap();
    let (answer, answered) = oneshot::channel();
    let inner = async { answered.await.unwrap() };
    let mut request = send(&graceful, get("/slow"), inner);
    assert_pending!(request.poll());
    graceful.shutdown();
    sleep(SECOND).await;
    answer.send(Ok(whole("text"))).unwrap();
    let response = assert_ready_ok!(request.poll());
    assert_eq!(connection(&response), ["close"]);
    assert_eq!(
        cut(&graceful).await,
        [row("GET", "/slow", DRAIN, true)],
        "its age is that of the request"
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_that_ends_is_removed_from_the_table() {
    let graceful = named().build().unwrap();
    let _rest = endless(&graceful, get("/rest"));

    // Dropped before the first poll, and after it.
    drop(endless(&graceful, get("/dropped")));
    let mut half_way = task::spawn(endless(&graceful, get("/half-way")));
    assert_pending!(half_way.poll());
    drop(half_way);
    // Failed.
    let fails = ready(Err::<Response<Full<Bytes>>, _>("broken"));
    let mut fails = send(&graceful, get("/fails"), fails);
    assert_ready_err!(fails.poll());
    // Answered without a body: the request ends with the head.
    let empty = answered(&graceful, Empty::<Bytes>::new());
    // Read to an end that the body announced, and to one that it did not.
    let mut announced = answered(&graceful, Script::announcing([Step::Data("all")]));
    assert!(assert_ready!(frame(&mut announced)).unwrap().is_ok());
    let mut unannounced = answered(&graceful, Script::new([Step::Data("all")]));
    assert!(assert_ready!(frame(&mut unannounced)).unwrap().is_ok());
    assert_eq!(graceful.in_flight(), 2);
    assert!(assert_ready!(frame(&mut unannounced)).is_none());
    // Dropped half way, and ended by an error.
    let mut dropped = answered(&graceful, Script::new([Step::Data("one"), Step::Wait]));
    assert!(assert_ready!(frame(&mut dropped)).unwrap().is_ok());
    assert_pending!(frame(&mut dropped));
    drop(dropped);
    let mut broken = answered(&graceful, Script::new([Step::Error, Step::Data("never")]));
    assert!(assert_ready!(frame(&mut broken)).unwrap().is_err());

    assert_eq!(graceful.in_flight(), 1);
    assert_eq!(
        cut(&graceful).await,
        [row("GET", "/rest", DRAIN, false)],
        "the bodies are still alive"
    );
    drop((empty, announced, unannounced, broken));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_panics_is_removed_from_the_table() {
    let graceful = named().build().unwrap();
    let _rest = endless(&graceful, get("/rest"));
    let in_call = service_fn(
        |_: Request<Empty<Bytes>>| -> Ready<Result<Response<Empty<Bytes>>, Infallible>> {
            panic!("in the call")
        },
    );
    let mut in_call = graceful.layer().layer(in_call);
    assert!(panics(|| in_call.call(get("/in-call"))));
    let in_poll = async {
        assert!(graceful.in_flight() == 0, "in the poll");
        Ok(whole("never"))
    };
    let mut in_poll = send(&graceful, get("/in-poll"), in_poll);
    assert!(panics(|| in_poll.poll()));
    drop(in_poll);
    let mut in_body = answered(&graceful, Script::new([Step::Panic]));
    assert!(panics(|| frame(&mut in_body)));
    drop(in_body);
    assert_eq!(cut(&graceful).await, [row("GET", "/rest", DRAIN, false)]);
}

#[tokio::test(start_paused = true)]
async fn without_name_requests_no_request_is_named() {
    for builder in [prompt(), prompt().name_requests(true).name_requests(false)] {
        let graceful = builder.drain_timeout(DRAIN).build().unwrap();
        let _busy = endless(&graceful, get("/secret"));
        let report = stop(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Forced);
        assert_eq!(report.remaining().requests, 1);
        assert!(report.requests_cut().is_empty());
        let text = report.to_string();
        assert!(!text.contains("secret"), "{text}");
        assert!(text.contains("`name_requests(true)`"), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clean_stop_names_no_request() {
    let graceful = named().build().unwrap();
    let busy = endless(&graceful, get("/"));
    graceful.shutdown();
    sleep(SECOND).await;
    drop(busy);
    let report = stop(&graceful).await;
    assert_eq!(report.outcome(), Outcome::Clean);
    assert!(report.requests_cut().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_request_that_ends_after_the_cut_stays_in_the_report() {
    let graceful = named().build().unwrap();
    let busy = endless(&graceful, get("/late"));
    graceful.shutdown();
    sleep(DRAIN + SECOND / 10).await;
    drop(busy);
    let report = stop(&graceful).await;
    assert_eq!(report.requests_cut().len(), 1);
    assert_eq!(report.requests_cut()[0].age, DRAIN);
    assert_eq!(report.duration(), DRAIN + SECOND / 10);
}

/// Sends a request that is answered at once, reads the body, and returns the status.
async fn status(graceful: &Graceful, path: &str) -> u16 {
    let inner = service_fn(|_: Request<Empty<Bytes>>| ready(Ok::<_, Infallible>(whole("hello"))));
    let service = graceful.layer().layer(inner);
    let response = service.oneshot(get(path)).await.unwrap();
    let status = response.status().as_u16();
    text(response.into_body()).await;
    status
}

#[tokio::test(start_paused = true)]
async fn refused_and_uncounted_requests_are_not_named() {
    let builder = named().max_in_flight(2).exempt("/metrics");
    let graceful = builder.build().unwrap();
    let _busy = endless(&graceful, get("/busy"));
    // Below the limit an exempt request is in flight as any other.
    let _counted = endless(&graceful, get("/metrics"));
    let _uncounted = endless(&graceful, get("/metrics"));
    assert_eq!(graceful.in_flight(), 2);
    assert_eq!(status(&graceful, "/refused").await, 429);
    assert_eq!(status(&graceful, "/metrics").await, 200);
    graceful.shutdown();
    let _refused = endless(&graceful, get("/refused"));
    let _uncounted = endless(&graceful, get("/metrics"));
    assert_eq!(status(&graceful, "/refused").await, 503);
    assert_eq!(status(&graceful, "/metrics").await, 200);
    assert_eq!(graceful.in_flight(), 2);
    assert_eq!(
        cut(&graceful).await,
        [
            row("GET", "/busy", DRAIN, false),
            row("GET", "/metrics", DRAIN, false),
        ]
    );
    assert_eq!(status(&graceful, "/refused").await, 503);
}

#[tokio::test(start_paused = true)]
async fn the_count_the_limit_and_the_figures_are_as_without_names() {
    let mut seen = Vec::new();
    for names in [false, true] {
        let builder = Graceful::builder().drain_delay(SECOND).drain_timeout(DRAIN);
        let builder = builder.max_in_flight(2).name_requests(names);
        let graceful = builder.build().unwrap();
        let mut trace = Vec::new();
        trace.push(status(&graceful, "/").await.into());
        let first = endless(&graceful, get("/"));
        let mut second = send(&graceful, get("/"), ready(Ok(whole("text"))));
        let body = assert_ready_ok!(second.poll()).into_body();
        trace.push(graceful.in_flight());
        trace.push(status(&graceful, "/").await.into());
        drop(first);
        trace.push(graceful.in_flight());
        trace.push(status(&graceful, "/").await.into());
        graceful.shutdown();
        trace.push(status(&graceful, "/").await.into());
        let third = endless(&graceful, get("/"));
        trace.push(status(&graceful, "/").await.into());
        sleep(SECOND * 2).await;
        trace.push(status(&graceful, "/").await.into());
        text(body).await;
        trace.push(graceful.in_flight());
        let report = stop(&graceful).await;
        drop(third);
        trace.push(graceful.in_flight());
        seen.push((
            trace,
            report.requests(),
            report.remaining(),
            report.duration(),
        ));
    }
    assert_eq!(seen[0].0, [200, 2, 429, 1, 200, 200, 429, 503, 1, 0]);
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test(start_paused = true)]
async fn a_named_response_is_passed_on_as_it_is() {
    let graceful = named().build().unwrap();
    let script = Script::announcing([Step::Data("12345"), Step::Trailers]).hint(3, 70);
    let mut body = answered(&graceful, script);
    let hint = body.enter(|_, body| body.size_hint());
    assert_eq!((hint.lower(), hint.upper()), (3, Some(70)));
    assert!(!ended(&mut body));
    let data = assert_ready!(frame(&mut body)).unwrap().unwrap();
    assert_eq!(data.into_data().unwrap(), "12345");
    let last = assert_ready!(frame(&mut body)).unwrap().unwrap();
    assert_eq!(last.into_trailers().ok(), Some(trailers()));
    assert!(ended(&mut body));
    assert!(assert_ready!(frame(&mut body)).is_none());
    assert_eq!(graceful.in_flight(), 0);

    let mut request = send(&graceful, get("/"), ready(Ok(whole("hello"))));
    let debug = format!("{:?}", *request);
    assert!(debug.contains("named"), "{debug}");
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.headers().is_empty());
    assert_pending!(request.poll());
    let debug = format!("{:?}", response.body());
    assert!(debug.contains("named"), "{debug}");
}

/// The request is in flight until the server polls again, or has dropped the piece.
#[tokio::test(start_paused = true)]
async fn after_its_last_piece_a_named_response_has_not_ended_and_has_no_bytes_left() {
    let graceful = named().build().unwrap();
    let script = Script::announcing([Step::Data("12345")]).hint(3, 70);
    let mut body = answered(&graceful, script);
    graceful.shutdown();
    let _piece = assert_ready!(frame(&mut body)).unwrap().unwrap();
    assert!(!ended(&mut body));
    let hint = body.enter(|_, body| body.size_hint());
    assert_eq!(hint.exact(), Some(0));
    assert!(assert_ready!(frame(&mut body)).is_none());
    assert_eq!(graceful.in_flight(), 0);
}

/// Records how many requests are in flight while it is dropped.
struct AtDrop<'a> {
    graceful: &'a Graceful,
    seen: Rc<Cell<Option<usize>>>,
}

impl Drop for AtDrop<'_> {
    fn drop(&mut self) {
        self.seen.set(Some(self.graceful.in_flight()));
    }
}

impl Future for AtDrop<'_> {
    type Output = Result<Response<Full<Bytes>>, &'static str>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(Ok(whole("hello")))
    }
}

impl Body for AtDrop<'_> {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Polled<Self> {
        Poll::Pending
    }
}

#[test]
fn the_inner_future_and_body_are_dropped_before_the_request_ends() {
    let graceful = named().build().unwrap();
    let seen = Rc::default();
    let inside = || AtDrop {
        graceful: &graceful,
        seen: Rc::clone(&seen),
    };
    drop(send(&graceful, get("/"), inside()));
    assert_eq!(seen.take(), Some(1));
    let mut request = send(&graceful, get("/"), inside());
    let response = assert_ready_ok!(request.poll());
    assert_eq!(seen.take(), Some(1));
    drop((request, response));
    drop(answered(&graceful, inside()));
    assert_eq!(seen.take(), Some(1));
    assert_eq!(graceful.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn any_method_and_any_path_can_be_named() {
    let graceful = named().build().unwrap();
    let requests = [
        ("HEAD", "/", "/"),
        ("OPTIONS", "*", "*"),
        ("CONNECT", "example.org:443", ""),
        ("PURGE", "/a//b/../c;v=1", "/a//b/../c;v=1"),
        ("GET", "/caf%C3%A9?q", "/caf%C3%A9"),
    ];
    let mut busy = Vec::new();
    for (method, target, _) in requests {
        let mut request = get(target);
        *request.method_mut() = method.parse::<Method>().unwrap();
        busy.push(endless(&graceful, request));
        sleep(SECOND).await;
    }
    let names = cut(&graceful).await;
    let names: Vec<_> = names.iter().map(|it| (&*it.0, &*it.1)).collect();
    let expected: Vec<_> = requests.iter().map(|it| (it.0, it.2)).collect();
    assert_eq!(names, expected);
}

#[tokio::test(start_paused = true)]
async fn the_report_reads_well_with_long_names() {
    let graceful = named().build().unwrap();
    let long = format!("/{}", "x".repeat(5000));
    let _long = endless(&graceful, get(&long));
    let busy: Vec<_> = (0..1000).map(|_| endless(&graceful, get("/"))).collect();
    let report = stop(&graceful).await;
    drop(busy);
    assert_eq!(report.requests_cut().len(), 1001);
    let whole = report.requests_cut().iter().any(|it| it.path == long);
    assert!(
        whole,
        "the path is whole in the report, and cut in its text"
    );
    let text = report.to_string();
    assert!(
        text.lines().all(|line| line.chars().count() <= 80),
        "{text}"
    );
    assert!(
        text.contains("\n    GET / 10.0 s, no response yet\n"),
        "{text}"
    );
    assert!(text.ends_with("\n    and 998 more"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn two_layers_of_one_lifecycle_name_a_request_twice_as_they_count_it_twice() {
    let graceful = named().build().unwrap();
    let inner = service_fn(|_: Request<Empty<Bytes>>| {
        pending::<Result<Response<Empty<Bytes>>, Infallible>>()
    });
    let mut twice = graceful.layer().layer(graceful.layer().layer(inner));
    let _busy = twice.call(get("/"));
    assert_eq!(graceful.in_flight(), 2);
    assert_eq!(cut(&graceful).await.len(), 2);
}

#[cfg(feature = "axum")]
mod in_axum {
    use axum::{Router, routing};

    use super::*;

    /// The name under which a request to `/api/v1/users/7` is recorded.
    async fn name_in(app: Router, graceful: &Graceful) -> String {
        let mut request = task::spawn(app.oneshot(get("/api/v1/users/7?all")));
        assert_pending!(request.poll());
        assert_eq!(graceful.in_flight(), 1);
        let mut names = cut(graceful).await;
        names.remove(0).1
    }

    fn users() -> Router {
        Router::new().route("/users/{id}", routing::get(pending::<()>))
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_has_its_original_path_inside_nest_and_outside() {
        let inside = named().build().unwrap();
        let app = users().layer(inside.layer());
        let app = Router::new().nest("/v1", app);
        let app = Router::new().nest("/api", app);
        assert_eq!(name_in(app, &inside).await, "/api/v1/users/7");

        let between = named().build().unwrap();
        let app = Router::new().nest("/v1", users()).layer(between.layer());
        let app = Router::new().nest("/api", app);
        assert_eq!(name_in(app, &between).await, "/api/v1/users/7");

        let outside = named().build().unwrap();
        let app = Router::new().nest("/api", Router::new().nest("/v1", users()));
        let app = app.layer(outside.layer());
        assert_eq!(name_in(app, &outside).await, "/api/v1/users/7");
    }

    #[tokio::test(start_paused = true)]
    async fn a_route_layer_names_too_and_a_fallback_is_named() {
        let routed = named().build().unwrap();
        let app = Router::new().nest("/api/v1", users().route_layer(routed.layer()));
        assert_eq!(name_in(app, &routed).await, "/api/v1/users/7");

        let fallback = named().build().unwrap();
        let app = Router::new()
            .fallback(pending::<()>)
            .layer(fallback.layer());
        assert_eq!(name_in(app, &fallback).await, "/api/v1/users/7");
    }
}

#[test]
fn futures_and_bodies_with_names_are_as_thread_safe_as_without() {
    fn send_sync_unpin<T: Send + Sync + Unpin + Debug>(_: &T) {}
    let graceful = named().build().unwrap();
    let mut request = send(&graceful, get("/"), ready(Ok(whole("hi"))));
    send_sync_unpin(&*request);
    send_sync_unpin(assert_ready_ok!(request.poll()).body());
}
