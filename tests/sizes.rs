//! How much the layer adds to what it wraps: a response future may be moved many times before it
//! is polled, and a body is held for as long as a client reads it.
//!
//! The tests assert upper bounds, so that no type grows unnoticed. If a type gets smaller, lower its bound.

use std::{future::Ready, pin::Pin};

use bytes::Bytes;
use http::Response;
use http_body_util::{Full, combinators::UnsyncBoxBody};
use tower_graceful::{GracefulBody, GracefulFuture, GracefulService};

/// How many bytes larger `W` is than `T`.
fn added<W, T>() -> usize {
    size_of::<W>() - size_of::<T>()
}

/// A future that boxes, as axum's do, and one that is the response itself.
type Boxed = Pin<Box<dyn Future<Output = Response<Full<Bytes>>> + Send>>;
type Direct = Ready<Response<Full<Bytes>>>;
type BoxedBody = UnsyncBoxBody<Bytes, std::convert::Infallible>;

#[cfg(target_pointer_width = "64")]
#[test]
fn a_service_is_one_pointer_larger() {
    assert!(added::<GracefulService<()>, ()>() <= 8);
    assert!(added::<GracefulService<Boxed>, Boxed>() <= 8);
}

/// At most three words: the permit, the HTTP version, which decides whether the response gets
/// `Connection: close`, and the variant of the state.
#[cfg(target_pointer_width = "64")]
#[test]
fn a_future_is_three_words_larger() {
    assert!(added::<GracefulFuture<Boxed, Full<Bytes>>, Boxed>() <= 24);
    assert!(added::<GracefulFuture<Direct, Full<Bytes>>, Direct>() <= 24);
}

/// At most two words: the permit and the variant. A third word for inner bodies in which the compiler cannot
/// store the variant in an unused value.
#[cfg(target_pointer_width = "64")]
#[test]
fn a_body_is_two_words_larger_or_three() {
    assert!(added::<GracefulBody<BoxedBody>, BoxedBody>() <= 16);
    assert!(added::<GracefulBody<Full<Bytes>>, Full<Bytes>>() <= 24);
}
