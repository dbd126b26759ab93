//! The response body, and the end of its request.
//!
//! A request ends when its body has ended, has failed, or is dropped. Most bodies announce their
//! end: after the last frame `is_end_stream` is true, and a server does not poll again. But at that
//! time the server may not have sent the frame. hyper takes a body of 50 MB in one frame, for
//! example. The request would end while the server still held most of the data, and a stopping
//! service could close the connection.
//!
//! So in two cases the body does not announce its end with the last data frame: if that frame has
//! 16 KiB or more, or if the service is stopping. Then:
//!
//! - The inner body is dropped at once, unless the request is named, and the request stays in
//!   flight. `is_end_stream` is false and the size hint is zero.
//! - The request ends when the server polls again, which returns `None`, or when it drops the body.
//!
//! hyper polls again when it has room. Over HTTP/1 its write buffer has less than about 400 KiB
//! then; if the length of the body is known, hyper drops the body at the same point instead. Over
//! HTTP/2 the stream has had window for at least a part of the frame, and the end of the stream is
//! a frame of its own. The part of the frame that does not fit into the window stays in the server.
//! So such a frame is also counted until the server drops its data (`Piece`). While there are
//! pieces, an HTTP/2 connection may have data to send although no request is in flight and its peer
//! is silent.
//!
//! A small last frame ends its request at once while the service is serving. Another poll would
//! cost every request, and a frame of that size fits into any socket's send buffer. Trailers end
//! the request too, because a server drops the body after them.

// Functions with `inline(always)` cost less than a call, which would move each frame once more.
#![expect(clippy::inline_always)]

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{
    body_poll::{BodyState, Polled, counted, outliving},
    named::Named,
    slow_body::SlowBody,
};
use crate::handle::graceful::Permit;

pin_project! {
    /// The response body of [`GracefulService`](super::GracefulService): the inner service's body,
    /// or the text of a rejection.
    ///
    /// The request is in flight until this body ends or is dropped. Data, trailers and the size
    /// hint are passed on unchanged, and so is the end of the stream, with one exception. After a
    /// last data frame of 16 KiB or more, and after any last data frame while the service stops,
    /// `is_end_stream` stays false until the server polls once more. A server polls when it has
    /// room for more data, so the request stays in flight while the server holds much of the frame.
    pub struct GracefulBody<B> {
        #[pin]
        kind: Kind<B>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<B> {
        Inner {
            #[pin]
            body: B,
            // Declared after the body, so that the body is dropped while its request is still in
            // flight.
            permit: Option<Permit>,
        },
        /// Boxed, because it is rare.
        Slow {
            slow: Pin<Box<SlowBody<B>>>,
        },
    }
}

impl<B> GracefulBody<B> {
    #[inline]
    pub(super) fn inner(body: B, permit: Option<Permit>) -> Self {
        Self {
            kind: Kind::Inner { body, permit },
        }
    }

    fn slow(slow: SlowBody<B>) -> Self {
        let slow = Box::pin(slow);
        Self {
            kind: Kind::Slow { slow },
        }
    }

    pub(super) fn text(text: Bytes) -> Self {
        Self::slow(SlowBody::Text { text })
    }

    /// The body for a request that is not counted.
    pub(super) fn uncounted(body: B) -> Self {
        Self::inner(body, None)
    }
}

/// An empty body without a counted request. Other middleware uses it for its own responses.
impl<B: Default> Default for GracefulBody<B> {
    fn default() -> Self {
        Self::uncounted(B::default())
    }
}

impl<B: Body> GracefulBody<B> {
    /// The body for a named request.
    pub(super) fn named(body: B, named: Named, permit: Permit) -> Self {
        let held = (!body.is_end_stream()).then_some((named, permit));
        Self::slow(SlowBody::Named { body, held })
    }
}

impl<B> Body for GracefulBody<B>
where
    B: Body<Data: From<Bytes>>,
{
    type Data = B::Data;
    type Error = B::Error;

    #[inline(always)]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut outliving = Outliving {
            kind: self.project().kind,
            outlives: false,
        };
        match outliving.kind.as_mut().project() {
            KindProj::Inner { body, permit } => {
                poll_inner(body, permit, &mut outliving.outlives, cx)
            }
            KindProj::Slow { slow } => slow.as_mut().poll_frame(cx),
        }
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Inner { body, .. } => body.is_end_stream(),
            Kind::Slow { slow } => slow.is_end_stream(),
        }
    }

    #[inline]
    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Inner { body, .. } => body.size_hint(),
            Kind::Slow { slow } => slow.size_hint(),
        }
    }
}

/// Polls a body, and releases its permit when the body has ended, unless the request outlives its
/// body.
#[inline(always)]
fn poll_inner<B: Body<Data: From<Bytes>>>(
    mut body: Pin<&mut B>,
    permit: &mut Option<Permit>,
    outlives: &mut bool,
    cx: &mut Context<'_>,
) -> Polled<B> {
    let mut end = End {
        permit,
        state: BodyState::Failed,
    };
    match body.as_mut().poll_frame(cx) {
        Poll::Ready(Some(Ok(frame))) => {
            let over = body.is_end_stream();
            if let Some(permit) = outliving(end.permit.as_ref(), &frame) {
                end.state = BodyState::Open;
                *outlives = over;
                return Poll::Ready(Some(Ok(counted(permit, frame))));
            }
            end.state = if over {
                BodyState::Ended
            } else {
                BodyState::Open
            };
            Poll::Ready(Some(Ok(frame)))
        }
        // Separate arms: one arm for both would move every frame once more.
        Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
        Poll::Ready(None) => {
            end.state = BodyState::Ended;
            Poll::Ready(None)
        }
        Poll::Pending => {
            end.state = BodyState::Open;
            Poll::Pending
        }
    }
}

/// Releases the permit when it is dropped. A frame is large, and at that time it has already been
/// moved into the return value. A panic drops this guard too.
struct End<'a> {
    permit: &'a mut Option<Permit>,
    state: BodyState,
}

impl Drop for End<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        match self.state {
            BodyState::Open => {}
            BodyState::Ended => *self.permit = None,
            BodyState::Failed => {
                if let Some(permit) = self.permit.take() {
                    permit.fail();
                }
            }
        }
    }
}

/// When it is dropped with `outlives` set, replaces the body, which its request outlives.
struct Outliving<'a, B> {
    kind: Pin<&'a mut Kind<B>>,
    outlives: bool,
}

impl<B> Drop for Outliving<'_, B> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.outlives {
            hand_over(self.kind.as_mut());
        }
    }
}

#[cold]
#[inline(never)]
fn hand_over<B>(mut kind: Pin<&mut Kind<B>>) {
    let permit = match kind.as_mut().project() {
        KindProj::Inner { permit, .. } => permit.take(),
        KindProj::Slow { .. } => return,
    };
    let slow = Box::pin(SlowBody::HandedOver { permit });
    // Drops the inner body while its request is still in flight.
    kind.set(Kind::Slow { slow });
}

impl<B> fmt::Debug for GracefulBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, in_flight) = match &self.kind {
            Kind::Inner { permit, .. } => ("inner", permit.is_some()),
            Kind::Slow { slow } => match &**slow {
                SlowBody::Named { held, .. } => ("named", held.is_some()),
                SlowBody::HandedOver { permit } => ("handed over", permit.is_some()),
                SlowBody::Text { .. } => ("text", false),
            },
        };
        f.debug_struct("GracefulBody")
            .field("kind", &kind)
            .field("in_flight", &in_flight)
            .finish_non_exhaustive()
    }
}
