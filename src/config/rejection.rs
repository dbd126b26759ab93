//! The answer to a rejected request: plain data, and its HTTP form.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};

use crate::admission::Refused;

/// Why a request was rejected. The report, the counters and the guide call such a request *refused*; both
/// words mean the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectionReason {
    /// The service is draining: it completes the requests in flight and accepts no new ones. The
    /// answer is sent after the request's body has been read, within limits: see
    /// [`GracefulLayer`](crate::GracefulLayer).
    Draining,
    /// The limit set by [`max_in_flight`](crate::GracefulBuilder::max_in_flight) is reached. The
    /// answer is sent at once.
    Overloaded,
}

/// A rejected request and the reason: the argument of the function given to
/// [`GracefulBuilder::rejection`](crate::GracefulBuilder::rejection).
///
/// It gives access to the head of the request. The body is not available, because the function is called
/// before it is read. A `Rejection` only borrows the head, so admitted requests have no extra cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejection<'a> {
    reason: RejectionReason,
    retry_after: Duration,
    method: &'a Method,
    uri: &'a Uri,
    version: Version,
    headers: &'a HeaderMap,
}

impl<'a> Rejection<'a> {
    pub(crate) fn new<B>(refused: Refused, retry_after: Duration, request: &'a Request<B>) -> Self {
        let reason = match refused {
            Refused::Draining => RejectionReason::Draining,
            Refused::Full => RejectionReason::Overloaded,
        };
        Self {
            reason,
            retry_after,
            method: request.method(),
            uri: request.uri(),
            version: request.version(),
            headers: request.headers(),
        }
    }

    /// The method of the request.
    #[must_use]
    pub fn method(&self) -> &'a Method {
        self.method
    }

    /// The URI of the request as the layer sees it. Inside axum's `nest` this is the URI without
    /// the prefix.
    #[must_use]
    pub fn uri(&self) -> &'a Uri {
        self.uri
    }

    /// The HTTP version of the request.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The header fields of the request.
    #[must_use]
    pub fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    /// The reason for the rejection.
    #[must_use]
    pub fn reason(&self) -> RejectionReason {
        self.reason
    }

    /// The default status: 503 while draining ([RFC 9110
    /// §15.6.4](https://www.rfc-editor.org/rfc/rfc9110#section-15.6.4)), and 429 above the limit
    /// ([RFC 6585 §4](https://www.rfc-editor.org/rfc/rfc6585#section-4)).
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self.reason {
            RejectionReason::Draining => StatusCode::SERVICE_UNAVAILABLE,
            RejectionReason::Overloaded => StatusCode::TOO_MANY_REQUESTS,
        }
    }

    /// How long the client should wait before it tries again. The `Retry-After` header has whole
    /// seconds, so it is rounded up.
    #[must_use]
    pub fn retry_after(&self) -> Duration {
        self.retry_after
    }

    fn message(&self) -> &'static str {
        match self.reason {
            RejectionReason::Draining => "shutting down, please try again",
            RejectionReason::Overloaded => "too many requests in flight, please try again later",
        }
    }

    /// The default answer: a status and one line of text.
    pub(crate) fn text(&self) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(format!("{}\n", self.message())));
        *response.status_mut() = self.status();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        response
    }

    /// The answer for gRPC clients: `UNAVAILABLE` as headers alone ("Trailers-Only"), with HTTP
    /// status 200.
    ///
    /// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#responses>
    pub(crate) fn grpc(&self) -> Response<Bytes> {
        let mut response = Response::new(Bytes::new());
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/grpc"),
        );
        headers.insert("grpc-status", HeaderValue::from_static("14"));
        headers.insert("grpc-message", HeaderValue::from_static(self.message()));
        response
    }

    pub(crate) fn retry_after_value(&self) -> HeaderValue {
        let seconds = self.retry_after.as_secs();
        let fraction = u64::from(self.retry_after.subsec_nanos() > 0);
        HeaderValue::from(seconds.saturating_add(fraction))
    }
}

/// Whether a request with these headers is a gRPC call: its content type is `application/grpc`,
/// alone or followed by `+codec` or parameters. gRPC-Web is not included, because its clients read
/// HTTP statuses.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        let (kind, rest) = value.as_bytes().split_at(GRPC.len().min(value.len()));
        kind.eq_ignore_ascii_case(GRPC) && matches!(rest.first(), None | Some(b'+' | b';' | b' '))
    })
}

/// The user's function that makes the answer to a rejected request.
#[derive(Clone)]
pub(crate) struct RejectionFn(Arc<Respond>);

type Respond = dyn Fn(&Rejection<'_>) -> Response<Bytes> + Send + Sync;

impl RejectionFn {
    pub(crate) fn new(
        respond: impl Fn(&Rejection<'_>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(respond))
    }

    pub(crate) fn call(&self, rejection: &Rejection<'_>) -> Response<Bytes> {
        (self.0)(rejection)
    }
}

impl fmt::Debug for RejectionFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RejectionFn")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_whole_seconds_rounded_up() {
        for (duration, header) in [
            (Duration::ZERO, "0"),
            (Duration::from_nanos(1), "1"),
            (Duration::from_secs(7), "7"),
            (Duration::from_millis(7001), "8"),
            (Duration::MAX, "18446744073709551615"),
        ] {
            let request = Request::new(());
            let rejection = Rejection::new(Refused::Draining, duration, &request);
            assert_eq!(rejection.retry_after_value(), header);
        }
    }

    #[test]
    fn a_grpc_call_is_recognized_by_its_content_type() {
        for (value, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=utf-8", true),
            ("Application/GRPC", true),
            ("application/grpc-web", false),
            ("text/plain", false),
            ("application/grpc-web+proto", false),
            ("application/json", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
            assert_eq!(is_grpc(&headers), grpc, "{value}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }
}
