use std::{
    fmt,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{
    arrivals, body::GracefulBody, future::GracefulFuture, named::Named, probe_route, refusal,
    slow_path::SlowFuture,
};
use crate::{admission::Refused, handle::graceful::Admission};

/// The service that a [`GracefulLayer`](super::GracefulLayer) makes. The layer's page describes
/// what it does.
///
/// A clone clones the inner service and copies a pointer. The service does not keep the lifecycle
/// alive: see [`Graceful`](crate::Graceful).
pub struct GracefulService<S> {
    inner: S,
    admission: Admission,
}

impl<S: Clone> Clone for GracefulService<S> {
    #[inline]
    fn clone(&self) -> Self {
        let (inner, admission) = probe_route::clone(&self.inner, self.admission);
        Self { inner, admission }
    }
}

impl<S> GracefulService<S> {
    pub(super) fn new(inner: S, admission: Admission) -> Self {
        Self { inner, admission }
    }

    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the inner service. Requests passed to it directly are not counted.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Unwraps the inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for GracefulService<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    ReqBody: Body,
    ResBody: Body<Data: From<Bytes>>,
{
    type Response = Response<GracefulBody<ResBody>>;
    type Error = S::Error;
    type Future = GracefulFuture<S::Future, ReqBody>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    // `inline(always)`, because a function call would move the request once more.
    #[expect(clippy::inline_always)]
    #[inline(always)]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        match self.admission.admit() {
            Some(permit) => {
                let version = request.version();
                GracefulFuture::counted(self.inner.call(request), permit, version)
            }
            None => self.call_slow(request),
        }
    }
}

impl<S> GracefulService<S> {
    /// The slow path: while the service stops, at the limit, and with named requests.
    #[cold]
    #[inline(never)]
    fn call_slow<ReqBody>(
        &mut self,
        request: Request<ReqBody>,
    ) -> GracefulFuture<S::Future, ReqBody>
    where
        S: Service<Request<ReqBody>>,
    {
        let admission = self.admission;
        let version = request.version();
        let admitted = admission.admit_slow();
        if !matches!(admitted, Err(Refused::Draining)) {
            arrivals::note(admission, &request);
        }
        GracefulFuture::slow(match admitted {
            Ok(permit) => match Named::new(&permit, &request) {
                None => return GracefulFuture::counted(self.inner.call(request), permit, version),
                Some(named) => SlowFuture::Named {
                    inner: self.inner.call(request),
                    named,
                    permit,
                    version,
                },
            },
            Err(refused) if refusal::is_exempt(admission, &request) => SlowFuture::Exempt {
                inner: self.inner.call(request),
                admission,
                least_phase: refused.least_phase(),
                version,
            },
            Err(refused) => SlowFuture::Refused {
                refusal: refusal::refuse(admission, request, refused),
            },
        })
    }
}

impl<S: fmt::Debug> fmt::Debug for GracefulService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.admission.word();
        f.debug_struct("GracefulService")
            .field("inner", &self.inner)
            .field("phase", &word.phase())
            .field("in_flight", &word.count())
            .finish_non_exhaustive()
    }
}
