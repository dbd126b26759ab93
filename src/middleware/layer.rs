use tower_layer::Layer;

use super::service::GracefulService;
use crate::handle::graceful::Graceful;

/// Counts requests in flight and refuses new ones once draining has begun.
///
/// Cheap to clone; every service it makes shares one lifecycle, one count and one limit, however
/// many routes, clones and connections there are. [`handle`](Self::handle) gives the [`Graceful`]
/// through which that lifecycle is observed and stopped.
///
/// # What it does
///
/// | phase | a request | its response |
/// |---|---|---|
/// | serving | is served | is left alone |
/// | lame duck | is served | HTTP/1: `Connection: close` |
/// | draining and later | is refused: 503, `Retry-After`, HTTP/1: `Connection: close` | begun earlier: HTTP/1: `Connection: close` |
/// | any, above [`max_in_flight`](crate::GracefulBuilder::max_in_flight) | is refused: 429, likewise | |
///
/// A request is in flight from the call to the end of its response *body*: a stream counts to its
/// last frame, and a large last frame counts until the server has room for more. A panic, a timeout or a client that goes away releases it at once.
///
/// While draining, the request's body is read before a refusal, so that a client still sending sees
/// the answer and not a broken connection: up to 16 MiB, for up to five seconds, and through no
/// silence longer than one second; less when the drain is over or its deadline is near. 128 refusals
/// may read at the same time, and further ones answer at once. The body of a client that waits for
/// `100 Continue`, over HTTP/1.1, is not read. Above the limit every refusal answers at once. gRPC
/// calls are refused with `UNAVAILABLE` as headers alone.
///
/// # Layer order
///
/// Outside of everything that does work for a request, and inside of what has to see refused
/// requests too. In axum each `.layer(…)` is outside of the ones before it, so it is one of the last:
///
/// ```
/// use std::time::Duration;
///
/// use axum::{
///     Router,
///     http::{HeaderName, StatusCode, header},
///     routing::get,
/// };
/// use tower_graceful::Graceful;
/// use tower_http::{
///     cors::{Any, CorsLayer},
///     request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer},
///     timeout::TimeoutLayer,
///     trace::TraceLayer,
/// };
///
/// fn app(graceful: &Graceful) -> Router {
///     let timeout = Duration::from_secs(10);
///     let cors = CorsLayer::new().allow_origin(Any).expose_headers([header::RETRY_AFTER]);
///     let id = HeaderName::from_static("x-request-id");
///     Router::new()
///         .route("/", get(|| async { "hello" }))
///         // Inside: timeouts, authentication, compression, body limits, buffers, load shedding.
///         .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, timeout))
///         .layer(graceful.layer())
///         // Outside: CORS, trace and metrics, request ids.
///         .layer(cors)
///         .layer(PropagateRequestIdLayer::new(id.clone()))
///         .layer(TraceLayer::new_for_http())
///         .layer(SetRequestIdLayer::new(id, MakeRequestUuid))
///         // After all layers: the probes.
///         .merge(graceful.probes())
/// }
/// ```
///
/// | outside | because |
/// |---|---|
/// | CORS | without `Access-Control-Allow-Origin` a browser hides the refusal from the page, which sees a network error ([Fetch, CORS check](https://fetch.spec.whatwg.org/#cors-check)). `Retry-After` can be read by the page if it is exposed |
/// | trace, metrics | a refused request is logged and counted |
/// | request ids | a refusal has an id, in its log line and in its response |
///
/// Everything else is inside. What it does for a request is then counted as in flight, until the end
/// of the response body, and a refusal costs none of it: no token is verified, nothing is compressed,
/// buffered or decoded.
///
/// A preflight (`OPTIONS`, with `Access-Control-Request-Method`) is answered by the CORS layer and
/// does not reach this one. So it passes in every phase, is not counted, and prolongs no drain. The
/// request that follows is refused, in a way that the page can read.
///
/// The layer works with and without axum, with any request body, and with any response body whose
/// data can be made from [`Bytes`](bytes::Bytes). In tower's `ServiceBuilder` the first `.layer(…)` is
/// the outermost, so there the order of the calls is the reverse.
///
/// The layer is ready when the service inside is. So in a plain tower stack, or in one
/// `ServiceBuilder`, a request that waits until an inner `ConcurrencyLimit`, `Buffer` or `RateLimit` is
/// ready has not reached this layer: it is neither counted nor refused. In an axum router give such a
/// layer a `.layer(…)` of its own; then the wait is part of the call, and counted. Or use
/// [`max_in_flight`](crate::GracefulBuilder::max_in_flight).
///
/// Applied twice, it counts each request twice, halves the limit, and may refuse at the inner
/// place what the outer one has let in just before draining began. Apply it once.
///
/// # Example
///
/// ```
/// use axum::{Router, routing::get};
/// use tower_graceful::GracefulLayer;
///
/// let layer = GracefulLayer::new();
/// let graceful = layer.handle();
/// let app: Router = Router::new()
///     .route("/", get(|| async { "hello" }))
///     .layer(layer);
/// assert_eq!(graceful.in_flight(), 0);
/// ```
#[derive(Clone, Debug, Default)]
pub struct GracefulLayer {
    graceful: Graceful,
}

impl GracefulLayer {
    /// A layer with a lifecycle of its own, [`Graceful::new`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The lifecycle this layer belongs to.
    #[must_use]
    pub fn handle(&self) -> Graceful {
        self.graceful.clone()
    }
}

impl<S> Layer<S> for GracefulLayer {
    type Service = GracefulService<S>;

    fn layer(&self, inner: S) -> GracefulService<S> {
        self.graceful.shared().starved.counts_requests();
        GracefulService::new(inner, self.graceful.admission())
    }
}

impl Graceful {
    /// The layer of this lifecycle. All layers of one lifecycle are the same.
    #[must_use]
    pub fn layer(&self) -> GracefulLayer {
        GracefulLayer {
            graceful: self.clone(),
        }
    }
}
