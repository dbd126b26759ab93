use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;

use super::{
    body::GracefulBody,
    slow_path::{SlowFuture, ask_to_leave},
};
use crate::handle::graceful::Unanswered;

pin_project! {
    /// The response future of [`GracefulService`](super::GracefulService).
    ///
    /// The request is in flight until this future resolves, and then until the response body ends.
    /// Dropping the future releases the request; while the service stops, the request then counts
    /// as [dropped](crate::Requests::dropped). Polls after the future has resolved return
    /// `Pending`.
    #[must_use = "futures do nothing unless polled"]
    pub struct GracefulFuture<F, B> {
        #[pin]
        state: State<F, B>,
    }
}

pin_project! {
    #[project = StateProj]
    #[project_replace = StateOwn]
    enum State<F, B> {
        Counted {
            #[pin]
            inner: F,
            // Declared after the future, so that the future is dropped while its request is still
            // in flight.
            permit: Unanswered,
            version: Version,
        },
        // Boxed, because it is rare.
        Slow { slow: Pin<Box<SlowFuture<F, B>>> },
        Over,
    }
}

impl<F, B> GracefulFuture<F, B> {
    #[inline]
    pub(super) fn counted(inner: F, permit: Unanswered, version: Version) -> Self {
        Self {
            state: State::Counted {
                inner,
                permit,
                version,
            },
        }
    }

    pub(super) fn slow(future: SlowFuture<F, B>) -> Self {
        let slow = Box::pin(future);
        Self {
            state: State::Slow { slow },
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

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.as_mut().project().state.project() {
            StateProj::Counted {
                inner,
                permit,
                version,
            } => {
                // The result stays in place here, and is moved only once, into the return value.
                let mut polled = inner.poll(cx);
                let ends = match &mut polled {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(response)) => {
                        if permit.word().is_slow() {
                            ask_to_leave(response, permit, *version);
                        }
                        response.body().is_end_stream()
                    }
                    Poll::Ready(Err(_)) => true,
                };
                // Drops the future, and then the permit, unless the body gets it.
                let permit = match self.project().state.project_replace(State::Over) {
                    StateOwn::Counted { permit, .. } => Some(permit.answered()).filter(|_| !ends),
                    _ => None,
                };
                polled.map_ok(|it| it.map(|body| GracefulBody::inner(body, permit)))
            }
            StateProj::Slow { slow } => poll_slow(slow.as_mut(), cx).map(|it| *it),
            StateProj::Over => Poll::Pending,
        }
    }
}

/// The output is boxed, so that the rare case takes no stack space in the poll of every request.
#[cold]
#[inline(never)]
fn poll_slow<F: Future>(slow: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<Box<F::Output>> {
    slow.poll(cx).map(Box::new)
}

impl<F, B> fmt::Debug for GracefulFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Counted { .. } => "admitted",
            State::Slow { slow } => slow.state(),
            State::Over => "done",
        };
        f.debug_struct("GracefulFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
