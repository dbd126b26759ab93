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
    slow_path::SpecialFuture,
};
use crate::{admission::Refused, handle::graceful::Admission};

/// The service a [`GracefulLayer`](super::GracefulLayer) makes. See there for what it does.
///
/// To clone it is to clone the service inside and to copy a pointer. It does not keep the lifecycle
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

    /// The service inside.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service inside. What is called on it directly is not counted.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Takes the service inside out.
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

    // The call of it would move the request once more.
    #[expect(clippy::inline_always)]
    #[inline(always)]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        match self.admission.admit() {
            Some(pass) => {
                let version = request.version();
                GracefulFuture::counted(self.inner.call(request), pass, version)
            }
            None => self.call_specially(request),
        }
    }
}

impl<S> GracefulService<S> {
    /// A call that is more than a count: while the service stops, above its limit, or with names.
    #[cold]
    #[inline(never)]
    fn call_specially<ReqBody>(
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
        GracefulFuture::special(match admitted {
            Ok(pass) => match Named::new(&pass, &request) {
                None => return GracefulFuture::counted(self.inner.call(request), pass, version),
                Some(named) => SpecialFuture::Named {
                    inner: self.inner.call(request),
                    named,
                    pass,
                    version,
                },
            },
            Err(refused) if refusal::is_exempt(admission, &request) => SpecialFuture::Exempt {
                inner: self.inner.call(request),
                admission,
                least_phase: refused.least_phase(),
                version,
            },
            Err(refused) => SpecialFuture::Refused {
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
