//! The measured services: a handler that costs as little as possible, and the layers and types that
//! applications put around a handler to count in-flight requests. All benches share them, so that all
//! of them measure the same.

#![allow(dead_code)] // no bench uses every peer

use std::{
    convert::Infallible,
    future::{Ready, poll_fn, ready},
    hint::black_box,
    pin::{Pin, pin},
    sync::atomic::{
        AtomicUsize,
        Ordering::{Relaxed, Release},
    },
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tower::{Layer, Service, limit::ConcurrencyLimitLayer};
use tower_graceful::Graceful;
use tower_http::metrics::{InFlightRequests, InFlightRequestsLayer};

#[derive(Clone)]
pub(crate) struct Handler;

impl<R> Service<Request<R>> for Handler {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<R>) -> Self::Future {
        ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
    }
}

/// A handler with a boxed future that is ready at its second poll.
#[derive(Clone)]
pub(crate) struct Boxed;

impl<R: Send + 'static> Service<Request<R>> for Boxed {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        Box::pin(async move {
            let mut again = false;
            poll_fn(|_| {
                if std::mem::replace(&mut again, true) {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
            .await;
            drop(request);
            Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
        })
    }
}

type BoxBody = Pin<Box<dyn Body<Data = Bytes, Error = Infallible> + Send>>;

/// Performs one request as a server does: it clones the service, puts the future and the body behind
/// pointers, and asks the body for its size and for its end.
pub(crate) fn request_behind_pointers<S: Peer>(service: &S) {
    let mut cx = Context::from_waker(Waker::noop());
    let mut service = service.clone();
    let Poll::Ready(Ok(())) = service.poll_ready(&mut cx) else {
        unreachable!("there is room")
    };
    // The black box keeps the compiler from inlining the request into the service. In a server the
    // request comes from a parser, which is not inlined either.
    let called = service.call(black_box(Request::new(Full::default())));
    drop(service);
    let mut future: Pin<Box<dyn Future<Output = Response<BoxBody>> + Send>> =
        black_box(Box::pin(async move {
            let Ok(response) = called.await;
            response.map(|body| Box::pin(body) as BoxBody)
        }));
    let response = loop {
        if let Poll::Ready(response) = future.as_mut().poll(&mut cx) {
            break response;
        }
    };
    drop(future);
    let mut body = black_box(response.into_body());
    black_box(body.size_hint());
    while !body.is_end_stream() {
        let frame = body.as_mut().poll_frame(&mut cx);
        black_box(frame.is_ready());
    }
}

/// Performs one request, and reads the body of its response to the end.
pub(crate) fn request<S, R, B>(service: &mut S)
where
    S: Service<Request<R>, Response = Response<B>, Error = Infallible>,
    R: Default,
    B: Body,
{
    let mut cx = Context::from_waker(Waker::noop());
    let Poll::Ready(Ok(())) = service.poll_ready(&mut cx) else {
        unreachable!("there is room")
    };
    let future = pin!(service.call(Request::new(R::default())));
    let Poll::Ready(Ok(response)) = future.poll(&mut cx) else {
        unreachable!("the handler is ready at once")
    };
    let mut body = pin!(response.into_body());
    while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut cx) {
        black_box(frame.is_ok());
    }
}

/// Performs one request on a clone of the service, as axum does.
pub(crate) fn request_of_a_clone<S, B>(service: &S)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = Infallible> + Clone,
    B: Body,
{
    request(&mut service.clone());
}

/// A handler that peers can be put around.
pub(crate) trait Inner: Peer<Body = Full<Bytes>, Future: Unpin> {}

impl<S: Peer<Body = Full<Bytes>, Future: Unpin>> Inner for S {}

pub(crate) fn graceful(inner: impl Inner) -> impl Peer {
    Graceful::new().layer().layer(inner)
}

/// [`graceful`] with a limit of in-flight requests.
pub(crate) fn graceful_limited(inner: impl Inner) -> impl Peer {
    let graceful = Graceful::builder().max_in_flight(1_000).build().unwrap();
    graceful.layer().layer(inner)
}

/// tower-http's counter, which does nothing else.
pub(crate) fn tower_http<S: Inner>(inner: S) -> InFlightRequests<S> {
    let (layer, _counter) = InFlightRequestsLayer::pair();
    layer.layer(inner)
}

/// tower's limit. It holds a permit only until the head of the response.
pub(crate) fn concurrency_limit(inner: impl Inner) -> impl Peer {
    ConcurrencyLimitLayer::new(1_000).layer(inner)
}

/// A counter in a static variable that refuses no request and counts until the body is dropped: the
/// least that a layer can do if it follows a response to its end.
#[derive(Clone)]
pub(crate) struct Bare;

impl<S> Layer<S> for Bare {
    type Service = Guarded<S, Self>;

    fn layer(&self, inner: S) -> Self::Service {
        Guarded { inner, guard: Self }
    }
}

impl Guards for Bare {
    type Guard = BareGuard;

    fn guard(&self) -> BareGuard {
        IN_FLIGHT.fetch_add(1, Relaxed);
        BareGuard
    }
}

static IN_FLIGHT: AtomicUsize = AtomicUsize::new(0);

pub(crate) struct BareGuard;

impl Drop for BareGuard {
    fn drop(&mut self) {
        IN_FLIGHT.fetch_sub(1, Release);
    }
}

/// Each request holds a token of one tracker.
pub(crate) fn task_tracker(inner: impl Inner) -> impl Peer {
    let tracker = TaskTracker::new();
    Guarded {
        inner,
        guard: move || -> TaskTrackerToken { tracker.token() },
    }
}

/// Each request holds a child of one token.
pub(crate) fn cancellation_token(inner: impl Inner) -> impl Peer {
    let token = CancellationToken::new();
    Guarded {
        inner,
        guard: move || token.child_token(),
    }
}

/// A service that can be measured.
pub(crate) trait Peer:
    Service<Request<Full<Bytes>>, Response = Response<Self::Body>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
    type Body: Body<Data = Bytes, Error = Infallible> + Send + 'static;
}

impl<S, B> Peer for S
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + Sync + 'static,
    S::Future: Send,
    B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
{
    type Body = B;
}

/// Makes the guard of each request.
pub(crate) trait Guards {
    type Guard;

    fn guard(&self) -> Self::Guard;
}

impl<F: Fn() -> G, G> Guards for F {
    type Guard = G;

    fn guard(&self) -> G {
        self()
    }
}

/// A service that takes a guard for each request and holds it until the response body is dropped. This
/// is what an application writes around a type that is not a layer.
#[derive(Clone)]
pub(crate) struct Guarded<S, M> {
    inner: S,
    guard: M,
}

impl<S, M, R, B> Service<Request<R>> for Guarded<S, M>
where
    S: Service<Request<R>, Response = Response<B>, Future: Unpin>,
    M: Guards<Guard: Unpin>,
{
    type Response = Response<Guarding<B, M::Guard>>;
    type Error = S::Error;
    type Future = Guarding<S::Future, M::Guard>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let guard = Some(self.guard.guard());
        Guarding {
            inner: self.inner.call(request),
            guard,
        }
    }
}

/// A future or a body with its guard.
pub(crate) struct Guarding<T, G> {
    inner: T,
    guard: Option<G>,
}

impl<F, G, B, E> Future for Guarding<F, G>
where
    F: Future<Output = Result<Response<B>, E>> + Unpin,
    G: Unpin,
{
    type Output = Result<Response<Guarding<B, G>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response = ready!(Pin::new(&mut self.inner).poll(cx))?;
        let guard = self.guard.take();
        Poll::Ready(Ok(response.map(|inner| Guarding { inner, guard })))
    }
}

impl<B: Body + Unpin, G: Unpin> Body for Guarding<B, G> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
