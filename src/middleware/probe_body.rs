//! The response body of the probes and of the preStop route.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// The body of a [`Probe`](crate::Probe)'s answer: one line of text, or nothing.
#[derive(Clone, Debug, Default)]
pub struct ProbeBody {
    pub(super) text: Option<Bytes>,
}

impl ProbeBody {
    /// Makes the body of an answer. An answer to HEAD has no text.
    #[cfg(feature = "axum")]
    pub(super) fn new(text: Bytes, head: bool) -> Self {
        Self {
            text: (!head).then_some(text),
        }
    }
}

impl Body for ProbeBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.text.take().map(|text| Ok(Frame::data(text))))
    }

    fn is_end_stream(&self) -> bool {
        self.text.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.text.as_ref().map_or(0, Bytes::len) as u64)
    }
}
