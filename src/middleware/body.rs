use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{held::Held, named::Named};
use crate::handle::Pass;

pin_project! {
    /// The response body of [`GracefulService`](super::GracefulService): the inner service's, or
    /// the text of a refusal.
    ///
    /// Its request is in flight until it ends or is dropped. Data, trailers, size hint and the end
    /// of the stream are passed on as they are.
    pub struct GracefulBody<B> {
        // `None` of a refusal.
        #[pin]
        inner: Option<B>,
        // After the body, so that it is dropped while its request is still in flight.
        held: Held<Special>,
    }
}

enum Special {
    /// In flight and on the roll, struck out first.
    Named(#[expect(dead_code)] Named, #[expect(dead_code)] Pass),
    /// Of a refusal.
    Text(Bytes),
}

impl<B> GracefulBody<B> {
    pub(super) fn text(text: Bytes) -> Self {
        Self {
            inner: None,
            held: Held::special(Special::Text(text)),
        }
    }

    fn refusal(&self) -> &[u8] {
        match &self.held {
            Held::Special(special) => match &**special {
                Special::Text(text) => text,
                Special::Named(..) => &[],
            },
            Held::Nothing | Held::Pass(_) => &[],
        }
    }
}

/// An empty body that no request is counted for, as other middleware makes to answer by itself.
impl<B: Default> Default for GracefulBody<B> {
    fn default() -> Self {
        Self {
            inner: Some(B::default()),
            held: Held::Nothing,
        }
    }
}

impl<B: Body> GracefulBody<B> {
    pub(super) fn new(body: B, pass: Pass) -> Self {
        Self::holding(body, Held::Pass(pass))
    }

    /// For a request that is known by name.
    pub(super) fn named(body: B, named: Named, pass: Pass) -> Self {
        Self::holding(body, Held::special(Special::Named(named, pass)))
    }

    /// For a request that was let pass uncounted.
    pub(super) fn exempt(body: B) -> Self {
        Self::holding(body, Held::Nothing)
    }

    fn holding(body: B, held: Held<Special>) -> Self {
        // An empty body is never polled by some servers, and has nothing left to wait for.
        let held = if body.is_end_stream() {
            Held::Nothing
        } else {
            held
        };
        Self {
            inner: Some(body),
            held,
        }
    }
}

impl<B> Body for GracefulBody<B>
where
    B: Body<Data: From<Bytes>>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let Some(mut body) = this.inner.as_pin_mut() else {
            return Poll::Ready(take_text(this.held).map(Ok));
        };
        let frame = ready!(body.as_mut().poll_frame(cx));
        let ended = match &frame {
            Some(Ok(_)) => body.is_end_stream(),
            Some(Err(_)) | None => true,
        };
        if ended {
            drop(this.held.take());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Some(body) => body.is_end_stream(),
            None => self.refusal().is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Some(body) => body.size_hint(),
            None => SizeHint::with_exact(self.refusal().len() as u64),
        }
    }
}

/// The text of a refusal, once.
#[cold]
fn take_text<D: From<Bytes>>(held: &mut Held<Special>) -> Option<Frame<D>> {
    match held.take() {
        Held::Special(special) => match *special {
            Special::Text(text) if !text.is_empty() => Some(Frame::data(text.into())),
            Special::Text(_) | Special::Named(..) => None,
        },
        Held::Nothing | Held::Pass(_) => None,
    }
}

impl<B> fmt::Debug for GracefulBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match (&self.inner, &self.held) {
            (Some(_), Held::Special(_)) => "named",
            (Some(_), _) => "inner",
            (None, _) => "text",
        };
        let in_flight = self.inner.is_some() && !matches!(self.held, Held::Nothing);
        f.debug_struct("GracefulBody")
            .field("kind", &kind)
            .field("in_flight", &in_flight)
            .finish_non_exhaustive()
    }
}
