// What is always inlined here costs less than the call of it, which would move a frame once more.
#![expect(clippy::inline_always)]

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::named::Named;
use crate::handle::Pass;

pin_project! {
    /// The response body of [`GracefulService`](super::GracefulService): the inner service's, or
    /// the text of a refusal.
    ///
    /// Its request is in flight until it ends or is dropped. Data, trailers, size hint and the end
    /// of the stream are passed on as they are.
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
            pass: Option<Pass>,
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
            held: Option<(Named, Pass)>,
        },
        /// Of a refusal.
        Text { text: Bytes },
    }
}

impl<B> GracefulBody<B> {
    #[inline]
    pub(super) fn inner(body: B, pass: Option<Pass>) -> Self {
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
    pub(super) fn named(body: B, named: Named, pass: Pass) -> Self {
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
        match self.project().kind.project() {
            KindProj::Inner { body, pass } => poll_holding(body, pass, cx),
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

/// Polls a body, and drops what is held for it once it has ended.
#[inline(always)]
fn poll_holding<B: Body, H>(
    mut body: Pin<&mut B>,
    held: &mut Option<H>,
    cx: &mut Context<'_>,
) -> Polled<B> {
    let mut end = End { held, come: false };
    match body.as_mut().poll_frame(cx) {
        Poll::Ready(Some(Ok(frame))) => {
            end.come = body.is_end_stream();
            Poll::Ready(Some(Ok(frame)))
        }
        // An arm for each: to pass on two of them as one would move the frames of all once more.
        Poll::Ready(Some(Err(error))) => {
            end.come = true;
            Poll::Ready(Some(Err(error)))
        }
        Poll::Ready(None) => {
            end.come = true;
            Poll::Ready(None)
        }
        Poll::Pending => Poll::Pending,
    }
}

/// Lets go in its own drop: a frame is long, and by then it is where it is returned.
struct End<'a, H> {
    held: &'a mut Option<H>,
    come: bool,
}

impl<H> Drop for End<'_, H> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.come {
            *self.held = None;
        }
    }
}

impl<B: Body<Data: From<Bytes>>> Special<B> {
    #[cold]
    #[inline(never)]
    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled<B> {
        match self.project() {
            SpecialProj::Named { body, held } => poll_holding(body, held, cx),
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
            Self::Named { body, .. } => body.is_end_stream(),
            Self::Text { text } => text.is_empty(),
        }
    }

    #[cold]
    #[inline(never)]
    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Named { body, .. } => body.size_hint(),
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
                Special::Text { .. } => ("text", false),
            },
        };
        f.debug_struct("GracefulBody")
            .field("kind", &kind)
            .field("in_flight", &in_flight)
            .finish_non_exhaustive()
    }
}
