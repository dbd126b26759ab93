//! The response body, and the end of its request.
//!
//! A request ends when its body has ended, has failed, or is dropped. Most bodies announce their
//! end: after the last frame `is_end_stream` is true, and a server does not poll again. But at that
//! time the server may not have sent the frame. hyper takes a body of 50 MB in one frame, for
//! example. The request would end while the server still held most of the data, and a stopping
//! service could close the connection.
//!
//! So in two cases the body does not announce its end with the last data frame: if that frame has
//! [`LARGE`] bytes or more, or if the service is stopping. Then:
//!
//! - The inner body is dropped at once, unless the request is named, and the request stays in
//!   flight. `is_end_stream` is false and the size hint is zero.
//! - The request ends when the server polls again, which returns `None`, or when it drops the body.
//!
//! hyper polls again when it has room. Over HTTP/1 its write buffer has less than about 400 KiB
//! then; if the length of the body is known, hyper drops the body at the same point instead. Over
//! HTTP/2 the stream has had window for at least a part of the frame, and the end of the stream is
//! a frame of its own. The part of the frame that does not fit into the window stays in the server.
//! So such a frame is also counted until the server drops its data ([`Piece`]). While there are
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

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::named::Named;
use crate::handle::graceful::{Permit, Piece};

/// The size in bytes from which on a last frame does not end its request.
const LARGE: usize = 16 * 1024;

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

pin_project! {
    #[project = SlowProj]
    enum SlowBody<B> {
        Named {
            #[pin]
            body: B,
            // In flight and in the request table. The entry is dropped first.
            held: Option<(Named, Permit)>,
        },
        /// The server has the last frame, and has not polled again.
        HandedOver { permit: Option<Permit> },
        /// The text of a rejection.
        Text { text: Bytes },
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
            is: false,
        };
        match outliving.kind.as_mut().project() {
            KindProj::Inner { body, permit } => poll_inner(body, permit, &mut outliving.is, cx),
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

type Polled<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

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

/// The permit, if the request stays in flight after this frame even if the frame is the last one.
#[inline(always)]
fn outliving<'a, D: Buf>(permit: Option<&'a Permit>, frame: &Frame<D>) -> Option<&'a Permit> {
    let permit = permit?;
    let data = frame.data_ref()?;
    (data.remaining() >= LARGE || permit.word().is_stopping()).then_some(permit)
}

/// Returns the frame, counted as a piece until the server drops its data.
#[cold]
#[inline(never)]
fn counted<D: Buf + From<Bytes>>(permit: &Permit, frame: Frame<D>) -> Frame<D> {
    frame.map_data(|mut data| {
        let data = data.copy_to_bytes(data.remaining());
        let piece = permit.piece();
        Bytes::from_owner(Counted {
            data,
            _piece: piece,
        })
        .into()
    })
}

struct Counted {
    data: Bytes,
    _piece: Piece,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyState {
    Open,
    Ended,
    /// The body returned an error, or it panicked.
    Failed,
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

/// As [`End`], for a named request.
struct NamedEnd<'a> {
    held: &'a mut Option<(Named, Permit)>,
    state: BodyState,
}

impl Drop for NamedEnd<'_> {
    fn drop(&mut self) {
        if self.state == BodyState::Open {
            return;
        }
        if let Some((named, permit)) = self.held.take() {
            // Remove the entry while the request is in flight.
            drop(named);
            if self.state == BodyState::Failed {
                permit.fail();
            }
        }
    }
}

/// When it is dropped with `is` set, replaces a body that its request outlives.
struct Outliving<'a, B> {
    kind: Pin<&'a mut Kind<B>>,
    is: bool,
}

impl<B> Drop for Outliving<'_, B> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.is {
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

impl<B: Body<Data: From<Bytes>>> SlowBody<B> {
    #[cold]
    #[inline(never)]
    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled<B> {
        match self.project() {
            SlowProj::Named { mut body, held } => {
                // The server has the last frame and polls again.
                if held.is_some() && body.is_end_stream() {
                    *held = None;
                    return Poll::Ready(None);
                }
                let mut end = NamedEnd {
                    held,
                    state: BodyState::Failed,
                };
                let polled = body.as_mut().poll_frame(cx);
                end.state = match &polled {
                    Poll::Pending => BodyState::Open,
                    Poll::Ready(Some(Ok(_))) if !body.is_end_stream() => BodyState::Open,
                    Poll::Ready(Some(Ok(_)) | None) => BodyState::Ended,
                    Poll::Ready(Some(Err(_))) => BodyState::Failed,
                };
                let Poll::Ready(Some(Ok(frame))) = polled else {
                    return polled;
                };
                let permit = end.held.as_ref().map(|(_, permit)| permit);
                let Some(permit) = outliving(permit, &frame) else {
                    return Poll::Ready(Some(Ok(frame)));
                };
                let frame = counted(permit, frame);
                end.state = BodyState::Open;
                Poll::Ready(Some(Ok(frame)))
            }
            SlowProj::HandedOver { permit } => {
                *permit = None;
                Poll::Ready(None)
            }
            // The text is returned once.
            SlowProj::Text { text } => {
                let text = std::mem::take(text);
                Poll::Ready((!text.is_empty()).then(|| Ok(Frame::data(text.into()))))
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn is_end_stream(&self) -> bool {
        match self {
            Self::Named { body, held } => held.is_none() && body.is_end_stream(),
            Self::HandedOver { permit } => permit.is_none(),
            Self::Text { text } => text.is_empty(),
        }
    }

    #[cold]
    #[inline(never)]
    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Named { body, held } if held.is_some() && body.is_end_stream() => {
                SizeHint::with_exact(0)
            }
            Self::Named { body, .. } => body.size_hint(),
            Self::HandedOver { .. } => SizeHint::with_exact(0),
            Self::Text { text } => SizeHint::with_exact(text.len() as u64),
        }
    }
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
