//! The response body, and when its request is over.
//!
//! A request is over when its body has ended, has failed or is dropped. Most bodies foretell their
//! end: after the last frame `is_end_stream` is true, and a server does not poll again. That the
//! server has the frame does not mean that it has sent it. hyper takes a body of 50 MB in one frame,
//! and would hold all of it after the request was over and the connection of a stopping service
//! could be closed.
//!
//! So where it matters the body does not report its end together with the last data frame:
//!
//! - That frame is [`LARGE`] or larger, or the service is stopping.
//! - The inner body is dropped at once, and its request stays in flight. `is_end_stream` is false
//!   and the size hint is zero.
//! - The request is over when the server polls again, which answers `None`, or drops the body.
//!
//! hyper polls again when it has room. Over HTTP/1 its write buffer is below some 400 KiB then; where
//! the length is known it drops the body instead, at that same point. Over HTTP/2 the stream has had
//! window for at least a part of the frame, and the end of the stream is a frame of its own. What it
//! has no window for stays in the server. So such frames are also counted until their data is dropped
//! ([`Piece`]): while there are any, a connection of HTTP/2 may owe something although nothing is in
//! flight and its peer is silent.
//!
//! A small last frame while the service serves ends its request at once, because to ask a body once
//! more costs every request, and what a server holds of it then fits any socket's buffer. Trailers
//! end it too: a server drops the body when it has them.

// What is always inlined here costs less than the call of it, which would move a frame once more.
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

/// How many bytes the last frame has from which on its request outlives it.
const LARGE: usize = 16 * 1024;

pin_project! {
    /// The response body of [`GracefulService`](super::GracefulService): the inner service's, or
    /// the text of a refusal.
    ///
    /// Its request is in flight until it ends or is dropped. Data, trailers and size hint are passed
    /// on as they are. So is the end of the stream, with one exception: after a last data frame of
    /// 16 KiB or more, and after any while the service stops, `is_end_stream` stays false until the
    /// server polls once more. A server does so when it has room for more, so the request stays in
    /// flight while the server holds much of the frame.
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
            // After the body, so that it is dropped while its request is still in flight.
            pass: Option<Permit>,
        },
        /// Boxed, because it is rare.
        Special {
            special: Pin<Box<Special<B>>>,
        },
    }
}

pin_project! {
    #[project = SpecialProj]
    enum Special<B> {
        Named {
            #[pin]
            body: B,
            // In flight and on the roll, struck out first.
            held: Option<(Named, Permit)>,
        },
        /// The server has the last frame, and has not asked for more.
        HandedOver { pass: Option<Permit> },
        /// Of a refusal.
        Text { text: Bytes },
    }
}

impl<B> GracefulBody<B> {
    #[inline]
    pub(super) fn inner(body: B, pass: Option<Permit>) -> Self {
        Self {
            kind: Kind::Inner { body, pass },
        }
    }

    fn special(special: Special<B>) -> Self {
        let special = Box::pin(special);
        Self {
            kind: Kind::Special { special },
        }
    }

    pub(super) fn text(text: Bytes) -> Self {
        Self::special(Special::Text { text })
    }

    /// For a request that was let pass uncounted.
    pub(super) fn uncounted(body: B) -> Self {
        Self::inner(body, None)
    }
}

/// An empty body that no request is counted for, as other middleware makes to answer by itself.
impl<B: Default> Default for GracefulBody<B> {
    fn default() -> Self {
        Self::uncounted(B::default())
    }
}

impl<B: Body> GracefulBody<B> {
    /// For a request that is known by name.
    pub(super) fn named(body: B, named: Named, pass: Permit) -> Self {
        let held = (!body.is_end_stream()).then_some((named, pass));
        Self::special(Special::Named { body, held })
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
            KindProj::Inner { body, pass } => poll_inner(body, pass, &mut outliving.is, cx),
            KindProj::Special { special } => special.as_mut().poll_frame(cx),
        }
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Inner { body, .. } => body.is_end_stream(),
            Kind::Special { special } => special.is_end_stream(),
        }
    }

    #[inline]
    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Inner { body, .. } => body.size_hint(),
            Kind::Special { special } => special.size_hint(),
        }
    }
}

type Polled<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

/// Polls a body, and releases its request once the body has ended, unless the request outlives it.
#[inline(always)]
fn poll_inner<B: Body<Data: From<Bytes>>>(
    mut body: Pin<&mut B>,
    pass: &mut Option<Permit>,
    outlives: &mut bool,
    cx: &mut Context<'_>,
) -> Polled<B> {
    let mut end = End {
        pass,
        state: BodyState::Failed,
    };
    match body.as_mut().poll_frame(cx) {
        Poll::Ready(Some(Ok(frame))) => {
            let over = body.is_end_stream();
            if let Some(pass) = outliving(end.pass.as_ref(), &frame) {
                end.state = BodyState::Open;
                *outlives = over;
                return Poll::Ready(Some(Ok(counted(pass, frame))));
            }
            end.state = if over {
                BodyState::Ended
            } else {
                BodyState::Open
            };
            Poll::Ready(Some(Ok(frame)))
        }
        // An arm for each: to pass on two of them as one would move the frames of all once more.
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

/// The pass of a request that is in flight beyond this frame, also if it is the last of its body.
#[inline(always)]
fn outliving<'a, D: Buf>(pass: Option<&'a Permit>, frame: &Frame<D>) -> Option<&'a Permit> {
    let pass = pass?;
    let data = frame.data_ref()?;
    (data.remaining() >= LARGE || pass.word().is_stopping()).then_some(pass)
}

/// The frame, counted until the server drops its data.
#[cold]
#[inline(never)]
fn counted<D: Buf + From<Bytes>>(pass: &Permit, frame: Frame<D>) -> Frame<D> {
    frame.map_data(|mut data| {
        let data = data.copy_to_bytes(data.remaining());
        let piece = pass.piece();
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
    /// It returned an error, or it panicked.
    Failed,
}

/// Releases the request in its own drop: a frame is long, and by then it is where it is returned. A
/// panic drops it too.
struct End<'a> {
    pass: &'a mut Option<Permit>,
    state: BodyState,
}

impl Drop for End<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        match self.state {
            BodyState::Open => {}
            BodyState::Ended => *self.pass = None,
            BodyState::Failed => {
                if let Some(pass) = self.pass.take() {
                    pass.fail();
                }
            }
        }
    }
}

/// As [`End`], for a request that is known by name.
struct NamedEnd<'a> {
    held: &'a mut Option<(Named, Permit)>,
    state: BodyState,
}

impl Drop for NamedEnd<'_> {
    fn drop(&mut self) {
        if self.state == BodyState::Open {
            return;
        }
        if let Some((named, pass)) = self.held.take() {
            // Removed from the table while it is in flight.
            drop(named);
            match self.state {
                BodyState::Failed => pass.fail(),
                BodyState::Open | BodyState::Ended => drop(pass),
            }
        }
    }
}

/// In its own drop too, replaces a body whose request outlives it.
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
    let pass = match kind.as_mut().project() {
        KindProj::Inner { pass, .. } => pass.take(),
        KindProj::Special { .. } => return,
    };
    let special = Box::pin(Special::HandedOver { pass });
    // Drops the inner body, while its request is still in flight.
    kind.set(Kind::Special { special });
}

impl<B: Body<Data: From<Bytes>>> Special<B> {
    #[cold]
    #[inline(never)]
    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled<B> {
        match self.project() {
            SpecialProj::Named { mut body, held } => {
                // The server has the last frame, and asks for more.
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
                let pass = end.held.as_ref().map(|(_, pass)| pass);
                let Some(pass) = outliving(pass, &frame) else {
                    return Poll::Ready(Some(Ok(frame)));
                };
                let frame = counted(pass, frame);
                end.state = BodyState::Open;
                Poll::Ready(Some(Ok(frame)))
            }
            SpecialProj::HandedOver { pass } => {
                *pass = None;
                Poll::Ready(None)
            }
            // Once.
            SpecialProj::Text { text } => {
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
            Self::HandedOver { pass } => pass.is_none(),
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
            Kind::Inner { pass, .. } => ("inner", pass.is_some()),
            Kind::Special { special } => match &**special {
                Special::Named { held, .. } => ("named", held.is_some()),
                Special::HandedOver { pass } => ("handed over", pass.is_some()),
                Special::Text { .. } => ("text", false),
            },
        };
        f.debug_struct("GracefulBody")
            .field("kind", &kind)
            .field("in_flight", &in_flight)
            .finish_non_exhaustive()
    }
}
