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
/// # Where to put it
///
/// Outermost, so that what it counts includes everything: in axum the last `.layer(…)` of the
/// router. The layer works with and without axum, with any request body, and with any response body
/// whose data can be made from [`Bytes`](bytes::Bytes).
///
/// It is ready when the service inside is, so what waits there for readiness (tower's
/// `ConcurrencyLimit`, `Buffer` or `RateLimit`) has not reached the layer yet: neither counted nor
/// refused. Put those outside, or use [`max_in_flight`](crate::GracefulBuilder::max_in_flight).
/// axum's routers are always ready.
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
