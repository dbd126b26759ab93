//! What the layer adds to a request: through layer, guard and body, beside tower-http's counter,
//! which counts and does nothing else, and beside no layer at all. `cargo bench`
//!
//! All in one run, so that ratios mean something where times do not.

#![allow(missing_docs)] // of what the macros make

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use tower::{Layer, Service};
use tower_graceful::Graceful;
use tower_http::metrics::InFlightRequestsLayer;

/// A handler that costs as little as one can.
#[derive(Clone)]
struct Handler;

impl Service<Request<Full<Bytes>>> for Handler {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Full<Bytes>>) -> Self::Future {
        ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
    }
}

/// As axum does it: a clone of the service for each request, and the body to its end.
fn request<S, B>(service: &S)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = Infallible> + Clone,
    B: Body,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut service = service.clone();
    let future = pin!(service.call(Request::new(Full::default())));
    let Poll::Ready(Ok(response)) = future.poll(&mut cx) else {
        unreachable!("the handler is ready at once")
    };
    let mut body = pin!(response.into_body());
    while let Poll::Ready(Some(frame)) = body.as_mut().poll_frame(&mut cx) {
        std::hint::black_box(frame.is_ok());
    }
}

fn add<S, B>(criterion: &mut Criterion, name: &str, service: &S)
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + Sync,
    B: Body,
{
    let mut group = criterion.benchmark_group("request");
    for threads in [1, 2] {
        group.bench_function(BenchmarkId::new(name, threads), |bencher| {
            bencher.iter_custom(|requests| {
                let start = std::time::Instant::now();
                std::thread::scope(|scope| {
                    for _ in 0..threads {
                        scope.spawn(|| (0..requests).for_each(|_| request(service)));
                    }
                });
                start.elapsed()
            });
        });
    }
    group.finish();
}

fn requests(criterion: &mut Criterion) {
    let graceful = Graceful::new();
    let limited = Graceful::builder().max_in_flight(1_000).build().unwrap();
    let (counting, _counter) = InFlightRequestsLayer::pair();
    add(criterion, "no layer", &Handler);
    add(
        criterion,
        "tower-http InFlightRequests",
        &counting.layer(Handler),
    );
    add(criterion, "GracefulLayer", &graceful.layer().layer(Handler));
    add(
        criterion,
        "GracefulLayer, max_in_flight",
        &limited.layer().layer(Handler),
    );
}

criterion_group!(benches, requests);
criterion_main!(benches);
