//! The body of a refused request is read before the response, within limits.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Interval, interval, timeout};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower_graceful::Phase;

use crate::support::{Script, Step, draining, full, get, prompt, refuse, whole};

const MIB: u64 = 1024 * 1024;

fn post<B>(body: B) -> Request<B> {
    Request::post("/upload").body(body).unwrap()
}

#[test]
fn while_draining_a_refused_body_is_read_to_its_end_before_the_answer() {
    let (graceful, _busy) = draining(prompt());
    let body = Script::new([
        Step::Data("four"),
        Step::Wait,
        Step::Data("seven77"),
        Step::Trailers,
    ]);
    let read = body.progress();
    // A runtime, because waiting needs its clock.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let mut request = task::spawn(refuse(&graceful, post(body)));
    assert_eq!(read.polls(), 0, "read by the future, not by the call");
    assert_pending!(request.poll());
    assert_eq!(read.bytes(), 4);
    assert!(request.is_woken());
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(read.bytes(), 11);
    assert_eq!(read.polls(), 5, "up to and including the end");
}

#[tokio::test(start_paused = true)]
async fn above_the_limit_the_answer_does_not_wait_for_the_body() {
    let (graceful, busy) = full(prompt().drain_delay(Duration::from_secs(1)));
    for phase in [Phase::Serving, Phase::LameDuck] {
        assert_eq!(graceful.phase(), phase);
        let body = Script::new([Step::Data("data"), Step::Wait]);
        let read = body.progress();
        let mut request = task::spawn(refuse(&graceful, post(body)));
        let response = assert_ready_ok!(request.poll());
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(read.polls(), 0, "{phase:?}");
        graceful.shutdown();
    }
    drop(busy);
}

/// How many refusals may read bodies at the same time.
const READERS: usize = 128;

#[tokio::test(start_paused = true)]
async fn at_most_128_refusals_read_bodies_at_the_same_time() {
    let (graceful, _busy) = draining(prompt());
    let mut readers: Vec<_> = (0..READERS)
        .map(|_| task::spawn(refuse(&graceful, post(Slow::Stalled))))
        .collect();
    // A future that is not polled reads nothing and takes no place.
    let unpolled = refuse(&graceful, post(Slow::Stalled));
    for reader in &mut readers {
        assert_pending!(reader.poll());
    }
    for reader in &mut readers {
        assert_pending!(reader.poll(), "each keeps its place");
    }
    let answered_unread = || {
        let body = Script::new([Step::Data("data")]);
        let read = body.progress();
        let mut request = task::spawn(refuse(&graceful, post(body)));
        let response = assert_ready_ok!(request.poll());
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        read.polls() == 0
    };
    assert!(answered_unread(), "the next one answers at once");
    drop(readers.pop());
    assert!(
        !answered_unread(),
        "a refusal that is dropped gives its place back"
    );
    assert!(!answered_unread(), "and so does one that has answered");
    tokio::time::advance(Duration::from_secs(1)).await;
    for reader in &mut readers {
        assert_ready_ok!(reader.poll());
    }
    let mut again: Vec<_> = (0..READERS)
        .map(|_| task::spawn(refuse(&graceful, post(Slow::Stalled))))
        .collect();
    for reader in &mut again {
        assert_pending!(reader.poll());
    }
    drop(unpolled);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_without_a_body_takes_no_place_from_those_that_read() {
    let (graceful, _busy) = draining(prompt());
    let bodiless: Vec<_> = (0..READERS)
        .map(|_| {
            let mut request = task::spawn(refuse(&graceful, get("/")));
            assert_ready_ok!(request.poll());
            request
        })
        .collect();
    let mut reader = task::spawn(refuse(&graceful, post(Slow::Stalled)));
    assert_pending!(reader.poll());
    drop(bodiless);
}

#[test]
fn a_body_is_not_polled_past_its_announced_end() {
    let (graceful, _busy) = draining(prompt());
    let body = Script::announcing([Step::Data("all")]);
    let read = body.progress();
    let mut request = task::spawn(refuse(&graceful, post(body)));
    assert_ready_ok!(request.poll());
    assert_eq!((read.bytes(), read.polls()), (3, 1));
}

#[test]
fn a_body_announced_as_too_large_is_not_read_at_all() {
    let (graceful, _busy) = draining(prompt());
    let size = 16 * MIB + 1;
    let body = Script::new([Step::Data("first")]).hint(size, size);
    let read = body.progress();
    let mut request = task::spawn(refuse(&graceful, post(body)));
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(read.polls(), 0);
}

/// Chunks of a MiB.
struct Chunks {
    left: u64,
    announced: bool,
    given: Arc<AtomicU64>,
}

impl Body for Chunks {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        static CHUNK: [u8; 1024 * 1024] = [0; 1024 * 1024];
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.left -= 1;
        self.given.fetch_add(MIB, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&CHUNK)))))
    }

    fn size_hint(&self) -> SizeHint {
        if self.announced {
            SizeHint::with_exact(self.left * MIB)
        } else {
            SizeHint::default()
        }
    }
}

fn read_of(chunks: u64, announced: bool) -> u64 {
    let (graceful, _busy) = draining(prompt());
    let given = Arc::default();
    let body = Chunks {
        left: chunks,
        announced,
        given: Arc::clone(&given),
    };
    let mut request = task::spawn(refuse(&graceful, post(body)));
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    given.load(Ordering::Relaxed)
}

#[test]
fn sixteen_mebibytes_are_read_announced_or_not() {
    assert_eq!(read_of(16, true), 16 * MIB);
    assert_eq!(read_of(16, false), 16 * MIB);
}

#[test]
fn an_endless_body_is_answered_at_the_size_limit() {
    assert_eq!(
        read_of(u64::MAX, false),
        17 * MIB,
        "the chunk that passes it"
    );
}

/// A body that yields one byte at each tick without end, or no bytes at all.
enum Slow {
    Stalled,
    Dripping(Interval),
}

impl Body for Slow {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut *self {
            Self::Stalled => Poll::Pending,
            Self::Dripping(ticks) => {
                ready!(ticks.poll_tick(cx));
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b".")))))
            }
        }
    }
}

/// How long the response takes.
async fn answered_after(body: Slow) -> Duration {
    let (graceful, _busy) = draining(prompt());
    let begun = Instant::now();
    let answer = timeout(Duration::from_secs(60), refuse(&graceful, post(body)));
    let response = answer.await.expect("an answer").unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    begun.elapsed()
}

/// How late a timer may fire.
const LATE: Duration = Duration::from_millis(5);

#[tokio::test(start_paused = true)]
async fn a_body_that_stalls_is_answered_after_a_second() {
    let second = Duration::from_secs(1);
    let waited = answered_after(Slow::Stalled).await;
    assert!((second..second + LATE).contains(&waited), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_drips_is_answered_after_five_seconds() {
    let five = Duration::from_secs(5);
    for silence in [300, 950] {
        let drips = interval(Duration::from_millis(silence));
        let waited = answered_after(Slow::Dripping(drips)).await;
        assert!((five..five + LATE).contains(&waited), "{waited:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_pauses_is_answered_after_the_first_long_silence() {
    let drips = interval(Duration::from_millis(1500));
    let waited = answered_after(Slow::Dripping(drips)).await;
    let second = Duration::from_secs(1);
    assert!((second..second + LATE).contains(&waited), "{waited:?}");
}

/// Empty frames, always ready, without end.
struct Empties;

impl Body for Empties {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::new()))))
    }
}

#[tokio::test(start_paused = true)]
async fn endless_empty_frames_neither_block_the_thread_nor_escape_the_time_limit() {
    let (graceful, _busy) = draining(prompt());
    let mut request = task::spawn(refuse(&graceful, post(Empties)));
    assert_pending!(request.poll());
    assert!(request.is_woken(), "it has yielded, and goes on");
    tokio::time::advance(Duration::from_secs(5)).await;
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[test]
fn outside_a_runtime_a_stalled_body_is_answered_at_once() {
    let (graceful, _busy) = draining(prompt());
    let mut request = task::spawn(refuse(&graceful, post(Slow::Stalled)));
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[test]
fn a_body_that_waits_for_100_continue_is_never_polled() {
    let (graceful, _busy) = draining(prompt());
    for expect in ["100-continue", "100-Continue", "other=1, 100-continue"] {
        let body = Script::new([Step::Data("data")]);
        let read = body.progress();
        let mut request = post(body);
        request
            .headers_mut()
            .insert("expect", expect.parse().unwrap());
        let mut request = task::spawn(refuse(&graceful, request));
        let response = assert_ready_ok!(request.poll());
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(read.polls(), 0);
    }
}

/// How much is read of the body of a refused request with `Expect: 100-continue`.
fn read_although_expecting(version: Version) -> usize {
    let (graceful, _busy) = draining(prompt());
    let body = Script::new([Step::Data("data")]);
    let read = body.progress();
    let mut request = post(body);
    *request.version_mut() = version;
    let expect = HeaderValue::from_static("100-continue");
    request.headers_mut().insert("expect", expect);
    let mut request = task::spawn(refuse(&graceful, request));
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    read.bytes()
}

#[test]
fn an_expectation_over_http10_is_ignored() {
    assert_eq!(read_although_expecting(Version::HTTP_10), 4);
}

/// Over HTTP/2 the server sends no 100, so the client sends the body anyway.
#[test]
fn an_expectation_over_http2_does_not_keep_the_body_from_being_read() {
    assert_eq!(read_although_expecting(Version::HTTP_2), 4);
    assert_eq!(read_although_expecting(Version::HTTP_11), 0);
}

#[test]
fn a_request_body_that_fails_is_answered() {
    let (graceful, _busy) = draining(prompt());
    let body = Script::new([Step::Data("data"), Step::Error, Step::Data("never")]);
    let read = body.progress();
    let mut request = task::spawn(refuse(&graceful, post(body)));
    let response = assert_ready_ok!(request.poll());
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(read.polls(), 2, "not polled after its error");
}

#[test]
fn a_served_request_keeps_its_body() {
    use tower::{Layer, Service, service_fn};
    let graceful = tower_graceful::Graceful::new();
    let body = Script::new([Step::Data("data")]);
    let read = body.progress();
    let received = AtomicBool::new(false);
    let inner = service_fn(|request: Request<Script>| -> Ready<Result<_, Infallible>> {
        received.store(true, Ordering::Relaxed);
        drop(request);
        ready(Ok(whole("ok")))
    });
    let future = pin!(graceful.layer().layer(inner).call(post(body)));
    assert_ready_ok!(task::spawn(future).poll());
    assert!(received.load(Ordering::Relaxed));
    assert_eq!(read.polls(), 0, "that is the service's business");
}

#[test]
fn on_http2_too_the_body_is_read_before_the_answer() {
    let (graceful, _busy) = draining(prompt());
    let body = Script::new([Step::Data("data")]);
    let read = body.progress();
    let mut request = post(body);
    *request.version_mut() = Version::HTTP_2;
    let mut request = task::spawn(refuse(&graceful, request));
    assert_ready_ok!(request.poll());
    assert!(read.polls() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_grpc_call_whose_stream_stays_open_is_answered_soon() {
    let (graceful, _busy) = draining(prompt());
    let mut request = post(Slow::Stalled);
    let grpc = HeaderValue::from_static("application/grpc");
    request.headers_mut().insert("content-type", grpc);
    let begun = Instant::now();
    let response = refuse(&graceful, request).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "14");
    assert!(begun.elapsed() <= Duration::from_millis(60));
}

#[tokio::test(start_paused = true)]
async fn the_answer_goes_out_before_the_drain_deadline() {
    let deadline = Duration::from_secs(2);
    let (graceful, _busy) = draining(prompt().drain_timeout(deadline));
    let drips = interval(Duration::from_millis(100));
    let begun = Instant::now();
    let refused = refuse(&graceful, post(Slow::Dripping(drips)));
    timeout(deadline, refused).await.unwrap().unwrap();
    let left = deadline.checked_sub(begun.elapsed()).unwrap();
    let (most, least) = (Duration::from_millis(350), Duration::from_millis(150));
    assert!(left >= least && left <= most, "{left:?}");
}

#[tokio::test(start_paused = true)]
async fn the_answer_goes_out_soon_after_the_drain_is_over() {
    let (graceful, busy) = draining(prompt());
    let _open = graceful.track(tokio::io::empty());
    let drips = interval(Duration::from_millis(100));
    let refused = tokio::spawn(refuse(&graceful, post(Slow::Dripping(drips))));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    drop(busy);
    refused.await.unwrap().unwrap();
    assert!(begun.elapsed() <= Duration::from_millis(700));
}

#[tokio::test(start_paused = true)]
async fn a_silent_upload_is_answered_soon_after_the_drain_is_over() {
    let (graceful, busy) = draining(prompt());
    let _open = graceful.track(tokio::io::empty());
    let refused = tokio::spawn(refuse(&graceful, post(Slow::Stalled)));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begun = Instant::now();
    drop(busy);
    refused.await.unwrap().unwrap();
    assert!(begun.elapsed() <= Duration::from_millis(550));
}

#[tokio::test(start_paused = true)]
async fn the_answer_goes_out_before_connections_are_cut_in_closing() {
    let (graceful, busy) = draining(prompt().drain_timeout(Duration::from_millis(200)));
    let _open = graceful.track(tokio::io::empty());
    let drips = interval(Duration::from_millis(20));
    let refused = tokio::spawn(refuse(&graceful, post(Slow::Dripping(drips))));
    drop(busy);
    tokio::select! {
        answer = refused => assert!(answer.unwrap().is_ok()),
        () = graceful.stopped() => panic!("cut before it was answered"),
    }
}
