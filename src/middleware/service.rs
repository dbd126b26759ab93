use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{
    body::GracefulBody, future::GracefulFuture, named::Named, refusal, special::SpecialFuture,
};
use crate::handle::Graceful;

/// The service a [`GracefulLayer`](super::GracefulLayer) makes. See there for what it does.
#[derive(Clone, Debug)]
pub struct GracefulService<S> {
    inner: S,
    graceful: Graceful,
}

impl<S> GracefulService<S> {
    pub(super) fn new(inner: S, graceful: Graceful) -> Self {
        Self { inner, graceful }
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
        match self.graceful.admit() {
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
        let version = request.version();
        GracefulFuture::special(match self.graceful.shared().admit_specially() {
            Ok(pass) if pass.gate().word().is_named() => {
                let named = Named::new(&self.graceful, &request);
                SpecialFuture::Named {
                    inner: self.inner.call(request),
                    named,
                    pass,
                    version,
                }
            }
            Ok(pass) => return GracefulFuture::counted(self.inner.call(request), pass, version),
            Err(_) if refusal::is_exempt(&self.graceful, &request) => {
                let graceful = self.graceful.clone();
                SpecialFuture::Exempt {
                    inner: self.inner.call(request),
                    graceful,
                    version,
                }
            }
            Err(refused) => SpecialFuture::Refused {
                refusal: refusal::refuse(&self.graceful, request, refused),
            },
        })
    }
}
