//! The bodies that are not on the fast path: of a named request, of a request that outlives its
//! body, and of a rejection. `body` says when a request outlives its body.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{
    body_poll::{BodyState, Polled, counted, outliving},
    named::Named,
};
use crate::handle::graceful::Permit;

pin_project! {
    #[project = SlowProj]
    pub(super) enum SlowBody<B> {
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

/// As `End` of `body`, for a named request.
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

impl<B: Body<Data: From<Bytes>>> SlowBody<B> {
    #[cold]
    #[inline(never)]
    pub(super) fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled<B> {
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
    pub(super) fn is_end_stream(&self) -> bool {
        match self {
            Self::Named { body, held } => held.is_none() && body.is_end_stream(),
            Self::HandedOver { permit } => permit.is_none(),
            Self::Text { text } => text.is_empty(),
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn size_hint(&self) -> SizeHint {
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
