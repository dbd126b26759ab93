use tower_layer::Layer;

use super::service::GracefulService;
use crate::handle::graceful::Graceful;

/// A tower layer that counts requests in flight, and rejects new requests once draining has begun.
///
/// Add it to a router or service with [`Graceful::layer`], as below. The layer is cheap to clone.
/// All services that it makes share one lifecycle, one count and one limit, however many routes,
/// clones and connections there are. [`handle`](Self::handle) returns the [`Graceful`] that
/// observes and stops this lifecycle.
///
/// # What it does
///
/// | phase | a request | its response |
/// |---|---|---|
/// | serving | is served | is not changed |
/// | lame duck | is served | HTTP/1: `Connection: close`; with [`close_spread`](crate::GracefulBuilder::close_spread) on a growing fraction of connections |
/// | draining and later | is rejected: 503, `Retry-After`, HTTP/1: `Connection: close` | to an earlier request: HTTP/1: `Connection: close` |
/// | before draining, above [`max_in_flight`](crate::GracefulBuilder::max_in_flight) | is rejected: 429, `Retry-After`, HTTP/1: `Connection: close` | |
///
/// A request is in flight from the call to the end of its response *body*. A stream counts until
/// its last frame, and a large last frame counts until the server has room for more. A panic, a
/// timeout or a client that goes away releases the request at once.
///
/// While draining, the request's body is read before the rejection is sent, so that a client that
/// is still sending receives the answer and not a broken connection. At most 16 MiB are read, for
/// at most five seconds, and a silence may last one second (50 ms for a gRPC call). The time is
/// shorter when the drain is over or its deadline is near. At most 128 rejections read at the same
/// time; further ones are sent at once. Over HTTP/1.1 the body of a client that waits for `100
/// Continue` is not read. Above the in-flight limit every rejection is sent at once. gRPC calls are
/// rejected with `UNAVAILABLE` as headers alone.
///
/// # Layer order
///
/// Put the layer outside of everything that does work for a request, and inside of everything that
/// must see rejected requests too. In axum each `.layer(…)` is outside of the ones before it, so add
/// this layer after most of the others. The order of the layers outside does not matter to it:
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
///     let app = Router::new()
///         .route("/", get(|| async { "hello" }))
///         // Inside: timeouts, authentication, compression, body limits, buffers, load shedding.
///         .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, timeout))
///         .layer(graceful.layer())
///         // Outside: request ids, trace and metrics, CORS.
///         .layer(PropagateRequestIdLayer::new(id.clone()))
///         .layer(TraceLayer::new_for_http())
///         .layer(SetRequestIdLayer::new(id, MakeRequestUuid))
///         .layer(cors);
///     // After all layers: the probes.
///     graceful.probes().merge(app)
/// }
/// ```
///
/// | outside | because |
/// |---|---|
/// | CORS | without `Access-Control-Allow-Origin` a browser hides the rejection from the page, which sees a network error ([Fetch, CORS check](https://fetch.spec.whatwg.org/#cors-check)). The page can read `Retry-After` if the field is exposed |
/// | trace, metrics | rejected requests are logged and counted |
/// | request ids | a rejection has an id, in its log line and in its response |
///
/// Everything else is inside. Its work for a request then counts as in flight until the end of the
/// response body, and a rejection costs none of that work: no token is verified, and nothing is
/// compressed, buffered or decoded.
///
/// The CORS layer answers a preflight (`OPTIONS` with `Access-Control-Request-Method`), so the
/// preflight does not reach this layer. It succeeds in every phase, is not counted, and does not
/// prolong a drain. The request that follows is rejected with a response that the page can read.
///
/// The layer works with and without axum, with any request body, and with any response body whose
/// data can be made from [`Bytes`](bytes::Bytes). In tower's `ServiceBuilder` the first `.layer(…)`
/// is the outermost, so the order of the calls is reversed there.
///
/// The layer is ready when the inner service is. So in a plain tower stack, or in one
/// `ServiceBuilder`, a request that waits for an inner `ConcurrencyLimit`, `Buffer` or `RateLimit`
/// to become ready has not reached this layer: it is neither counted nor rejected. In an axum
/// router, give such a layer a `.layer(…)` of its own: the wait is then part of the call and is
/// counted. Or use [`max_in_flight`](crate::GracefulBuilder::max_in_flight) instead.
///
/// Apply the layer once. If it is applied twice, it counts each request twice and halves the limit.
/// The inner layer may then reject a request that the outer one admitted just before draining
/// began.
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
    /// Makes a layer with a new lifecycle, [`Graceful::new`].
    ///
    /// # Panics
    ///
    /// As [`Graceful::new`], inside a tokio runtime without timers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the handle of this layer's lifecycle.
    #[must_use]
    pub fn handle(&self) -> Graceful {
        self.graceful.clone()
    }
}

impl<S> Layer<S> for GracefulLayer {
    type Service = GracefulService<S>;

    fn layer(&self, inner: S) -> GracefulService<S> {
        self.graceful.shared().starved.mark_layered();
        GracefulService::new(inner, self.graceful.shared().admission())
    }
}

impl Graceful {
    /// Returns the layer of this lifecycle. All layers of one lifecycle are equivalent.
    #[must_use]
    pub fn layer(&self) -> GracefulLayer {
        GracefulLayer {
            graceful: self.clone(),
        }
    }
}
