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
    slow_path::{SpecialFuture, ask_to_leave},
};
use crate::handle::graceful::Unanswered;

pin_project! {
    /// The response future of [`GracefulService`](super::GracefulService).
    ///
    /// Its request is in flight until it resolves, and then until the response's body ends.
    /// Dropping it releases the request, which then counts as
    /// [dropped](crate::Requests::dropped) if the service stops. Polled again after it is ready, it stays pending.
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
            // After the future, so that it is dropped while its request is still in flight.
            pass: Unanswered,
            version: Version,
        },
        // Boxed, because it is rare.
        Special { special: Pin<Box<SpecialFuture<F, B>>> },
        Over,
    }
}

impl<F, B> GracefulFuture<F, B> {
    #[inline]
    pub(super) fn counted(inner: F, pass: Unanswered, version: Version) -> Self {
        Self {
            state: State::Counted {
                inner,
                pass,
                version,
            },
        }
    }

    pub(super) fn special(future: SpecialFuture<F, B>) -> Self {
        let special = Box::pin(future);
        Self {
            state: State::Special { special },
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
                pass,
                version,
            } => {
                // What is polled stays where it is, and is moved once, into what is returned.
                let mut polled = inner.poll(cx);
                let ends = match &mut polled {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(response)) => {
                        if pass.word().is_slow() {
                            ask_to_leave(response, pass, *version);
                        }
                        response.body().is_end_stream()
                    }
                    Poll::Ready(Err(_)) => true,
                };
                // The future, and then its request, unless the body has it.
                let pass = match self.project().state.project_replace(State::Over) {
                    StateOwn::Counted { pass, .. } => Some(pass.answered()).filter(|_| !ends),
                    _ => None,
                };
                polled.map_ok(|it| it.map(|body| GracefulBody::inner(body, pass)))
            }
            StateProj::Special { special } => poll_special(special.as_mut(), cx).map(|it| *it),
            StateProj::Over => Poll::Pending,
        }
    }
}

/// On the heap, so that what is rare needs no room beside the response of every request.
#[cold]
#[inline(never)]
fn poll_special<F: Future>(special: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<Box<F::Output>> {
    special.poll(cx).map(Box::new)
}

impl<F, B> fmt::Debug for GracefulFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Counted { .. } => "admitted",
            State::Special { special } => special.state(),
            State::Over => "done",
        };
        f.debug_struct("GracefulFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
