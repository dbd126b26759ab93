use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
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
        // After the body, so that the body is dropped while its request is still in flight.
        pass: Option<Pass>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<B> {
        Inner { #[pin] body: B },
        // On the roll for as long as there is a pass. Boxed, because it is rare.
        Named { #[pin] body: B, named: Option<Box<Named>> },
        Text { text: Bytes },
    }
}

impl<B> GracefulBody<B> {
    pub(super) fn text(text: Bytes) -> Self {
        Self {
            kind: Kind::Text { text },
            pass: None,
        }
    }
}

/// An empty body that no request is counted for, as other middleware makes to answer by itself.
impl<B: Default> Default for GracefulBody<B> {
    fn default() -> Self {
        Self {
            kind: Kind::Inner { body: B::default() },
            pass: None,
        }
    }
}

impl<B: Body> GracefulBody<B> {
    #[inline]
    pub(super) fn new(body: B, pass: Option<Pass>) -> Self {
        // An empty body is never polled by some servers, and has nothing left to wait for.
        let pass = pass.filter(|_| !body.is_end_stream());
        Self {
            kind: Kind::Inner { body },
            pass,
        }
    }
}

impl<B: Body> GracefulBody<B> {
    pub(super) fn named(body: B, pass: Option<Pass>, named: Option<Box<Named>>) -> Self {
        let ended = body.is_end_stream();
        Self {
            kind: Kind::Named {
                named: named.filter(|_| !ended),
                body,
            },
            pass: pass.filter(|_| !ended),
        }
    }
}

impl<B> Body for GracefulBody<B>
where
    B: Body<Data: From<Bytes>>,
{
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        match this.kind.as_mut().project() {
            KindProj::Inner { body } => {
                let (frame, ended) = ready!(poll_frame(body, cx));
                if ended {
                    *this.pass = None;
                }
                Poll::Ready(frame)
            }
            KindProj::Named { body, named } => {
                let (frame, ended) = ready!(poll_frame(body, cx));
                if ended {
                    *named = None;
                    *this.pass = None;
                }
                Poll::Ready(frame)
            }
            KindProj::Text { text } => {
                let text = std::mem::take(text);
                if text.is_empty() {
                    return Poll::Ready(None);
                }
                Poll::Ready(Some(Ok(Frame::data(text.into()))))
            }
        }
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Inner { body } | Kind::Named { body, .. } => body.is_end_stream(),
            Kind::Text { text } => text.is_empty(),
        }
    }

    #[inline]
    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Inner { body } | Kind::Named { body, .. } => body.size_hint(),
            Kind::Text { text } => SizeHint::with_exact(text.len() as u64),
        }
    }
}

/// The next frame, and whether it is the last.
#[inline]
#[allow(clippy::type_complexity)] // the trait's own, and a flag
fn poll_frame<B: Body>(
    mut body: Pin<&mut B>,
    cx: &mut Context<'_>,
) -> Poll<(Option<Result<Frame<B::Data>, B::Error>>, bool)> {
    let frame = ready!(body.as_mut().poll_frame(cx));
    let ended = match &frame {
        Some(Ok(_)) => body.is_end_stream(),
        Some(Err(_)) | None => true,
    };
    Poll::Ready((frame, ended))
}

impl<B> fmt::Debug for GracefulBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.kind {
            Kind::Inner { .. } => "inner",
            Kind::Named { .. } => "named",
            Kind::Text { .. } => "text",
        };
        f.debug_struct("GracefulBody")
            .field("kind", &kind)
            .field("in_flight", &self.pass.is_some())
            .finish_non_exhaustive()
    }
}
