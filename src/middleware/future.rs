// The call of what is always inlined here would move the response once more.
#![expect(clippy::inline_always)]

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;

use super::{body::GracefulBody, special::SpecialFuture};
use crate::{handle::Pass, leaving, phase::Phase, timeline::Shared};

pin_project! {
    /// The response future of [`GracefulService`](super::GracefulService).
    ///
    /// Its request is in flight until it resolves, and then until the response's body ends.
    /// Dropping it releases the request. Polled again after it is ready, it stays pending.
    #[must_use = "futures do nothing unless polled"]
    pub struct GracefulFuture<F, B> {
        // `None` if the request is special, and once this is ready.
        #[pin]
        inner: Option<F>,
        // After the future, so that it is dropped while its request is still in flight.
        pass: Option<Pass>,
        version: Version,
        // Instead of the others. Boxed, because it is rare.
        special: Option<Pin<Box<SpecialFuture<F, B>>>>,
    }
}

impl<F, B> GracefulFuture<F, B> {
    #[inline]
    pub(super) fn counted(inner: F, pass: Pass, version: Version) -> Self {
        Self {
            inner: Some(inner),
            pass: Some(pass),
            version,
            special: None,
        }
    }

    pub(super) fn special(future: SpecialFuture<F, B>) -> Self {
        Self {
            inner: None,
            pass: None,
            version: Version::default(),
            special: Some(Box::pin(future)),
        }
    }
}

impl<F, E, ReqBody, ResBody> Future for GracefulFuture<F, ReqBody>
where
    F: Future<Output = Result<Response<ResBody>, E>>,
    ReqBody: Body,
    ResBody: Body<Data: From<Bytes>>,
{
    type Output = Result<Response<GracefulBody<ResBody>>, E>;

    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            return poll_special(this.special, cx);
        };
        // What is polled stays where it is, and is moved once, into the response that goes out.
        let mut polled = inner.poll(cx);
        if polled.is_pending() {
            return Poll::Pending;
        }
        // Before its request is released.
        this.inner.set(None);
        let mut pass = this.pass.take();
        if let (Poll::Ready(Ok(response)), Some(held)) = (&mut polled, &pass) {
            ask_to_leave(response, held.gate(), *this.version);
            if response.body().is_end_stream() {
                pass = None;
            }
        }
        polled.map_ok(|response| response.map(|body| GracefulBody::inner(body, pass)))
    }
}

#[cold]
#[inline(never)]
fn poll_special<F: Future>(
    special: &mut Option<Pin<Box<F>>>,
    cx: &mut Context<'_>,
) -> Poll<F::Output> {
    match special {
        Some(special) => special.as_mut().poll(cx),
        None => Poll::Pending,
    }
}

/// Where the service stops, has a response ask its client to leave.
#[inline]
pub(super) fn ask_to_leave<B>(response: &mut Response<B>, shared: &Shared, version: Version) {
    if shared.word().is_special() && leaves(shared) {
        leaving::say_close(response, version);
    }
}

/// Whether a response that goes out now asks its client to leave.
#[cold]
fn leaves(shared: &Shared) -> bool {
    let phase = shared.word().phase();
    phase > Phase::LameDuck || phase == Phase::LameDuck && shared.asks_to_leave()
}

impl<F, B> fmt::Debug for GracefulFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (&self.inner, &self.special) {
            (Some(_), _) => "admitted",
            (None, Some(special)) => special.state(),
            (None, None) => "done",
        };
        f.debug_struct("GracefulFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
