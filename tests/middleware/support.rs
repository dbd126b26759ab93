//! Lifecycles in a given phase, and bodies that follow a script.

use std::{
    cell::Cell,
    collections::VecDeque,
    convert::Infallible,
    fmt::Debug,
    future::{Pending, Ready, pending},
    marker::{PhantomData, PhantomPinned},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use pin_project_lite::pin_project;
use tokio_test::task::{self, Spawn};
use tower::{Layer, Service, service_fn};
use tower_graceful::{Graceful, GracefulBuilder, GracefulFuture, Phase};

/// The layer's future of a request that never ends. Keeps the request in flight.
pub(crate) type Busy =
    GracefulFuture<Pending<Result<Response<Empty<Bytes>>, Infallible>>, Empty<Bytes>>;

/// A lifecycle without a delay: it drains as soon as the stop is triggered.
pub(crate) fn prompt() -> GracefulBuilder {
    Graceful::builder().drain_delay(Duration::ZERO)
}

/// A draining lifecycle, and the request that it waits for.
pub(crate) fn draining(builder: GracefulBuilder) -> (Graceful, Busy) {
    let graceful = builder.drain_delay(Duration::ZERO).build().unwrap();
    let busy = hold(&graceful);
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::Draining);
    (graceful, busy)
}

/// A lifecycle at its limit, and the request that fills it.
pub(crate) fn full(builder: GracefulBuilder) -> (Graceful, Busy) {
    let graceful = builder.max_in_flight(1).build().unwrap();
    let busy = hold(&graceful);
    assert_eq!(graceful.in_flight(), 1);
    (graceful, busy)
}

pub(crate) fn lame_duck() -> Graceful {
    let graceful = Graceful::new();
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::LameDuck);
    graceful
}

/// Admits a request that does not end.
pub(crate) fn hold(graceful: &Graceful) -> Busy {
    graceful
        .layer()
        .layer(service_fn(|_| pending()))
        .call(get("/"))
}

/// Admits a request that behaves as `inner`.
pub(crate) fn start<F, B>(graceful: &Graceful, inner: F) -> Spawn<GracefulFuture<F, Empty<Bytes>>>
where
    F: Future<Output = Result<Response<B>, &'static str>>,
    B: Body<Data: From<Bytes>>,
{
    let mut inner = Some(inner);
    let mut service = graceful
        .layer()
        .layer(service_fn(move |_: Request<Empty<Bytes>>| {
            inner.take().expect("one call")
        }));
    task::spawn(service.call(get("/")))
}

type Never = Result<Response<Full<Bytes>>, Infallible>;

/// Sends a request that must not reach the inner service.
pub(crate) fn refuse<B: Body>(
    graceful: &Graceful,
    request: Request<B>,
) -> GracefulFuture<Ready<Never>, B> {
    let unreachable = |_| -> Ready<Never> { panic!("a refused request reached the inner service") };
    graceful
        .layer()
        .layer(service_fn(unreachable))
        .call(request)
}

pub(crate) fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(path).body(Empty::new()).unwrap()
}

pub(crate) fn whole(text: &'static str) -> Response<Full<Bytes>> {
    Response::new(Full::from(text))
}

/// The whole body as text.
pub(crate) async fn text<B>(body: B) -> String
where
    B: Body<Error: Debug>,
{
    let bytes = body.collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The options of `Connection`, as the field's values.
pub(crate) fn connection<B>(response: &Response<B>) -> Vec<&str> {
    let values = response.headers().get_all("connection").iter();
    values.map(|value| value.to_str().unwrap()).collect()
}

pub(crate) fn panics<T>(act: impl FnOnce() -> T) -> bool {
    catch_unwind(AssertUnwindSafe(act)).is_err()
}

pub(crate) enum Step {
    Data(&'static str),
    Trailers,
    Error,
    Wait,
    Panic,
}

/// How much of a [`Script`] has been polled.
#[derive(Clone, Default)]
pub(crate) struct Progress {
    polls: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
}

impl Progress {
    pub(crate) fn polls(&self) -> usize {
        self.polls.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

pin_project! {
    /// A body that follows its steps. Neither `Unpin` nor `Sync`.
    pub(crate) struct Script {
        steps: VecDeque<Step>,
        announces_end: bool,
        hint: SizeHint,
        progress: Progress,
        unsync: PhantomData<Cell<()>>,
        #[pin]
        pinned: PhantomPinned,
    }
}

impl Script {
    pub(crate) fn new(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            steps: steps.into_iter().collect(),
            announces_end: false,
            hint: SizeHint::default(),
            progress: Progress::default(),
            unsync: PhantomData,
            pinned: PhantomPinned,
        }
    }

    /// Reports the end of the stream after its last step.
    pub(crate) fn announcing(steps: impl IntoIterator<Item = Step>) -> Self {
        Self {
            announces_end: true,
            ..Self::new(steps)
        }
    }

    pub(crate) fn hint(self, lower: u64, upper: u64) -> Self {
        let mut hint = SizeHint::default();
        hint.set_upper(upper);
        hint.set_lower(lower);
        Self { hint, ..self }
    }

    pub(crate) fn progress(&self) -> Progress {
        self.progress.clone()
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        let this = self.project();
        this.progress.polls.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(match this.steps.pop_front() {
            None => None,
            Some(Step::Data(text)) => {
                this.progress.bytes.fetch_add(text.len(), Ordering::Relaxed);
                Some(Ok(Frame::data(Bytes::from_static(text.as_bytes()))))
            }
            Some(Step::Trailers) => Some(Ok(Frame::trailers(trailers()))),
            Some(Step::Error) => Some(Err("broken body")),
            Some(Step::Wait) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Step::Panic) => panic!("the body panics"),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.announces_end && self.steps.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

pub(crate) fn trailers() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("42"));
    trailers
}
