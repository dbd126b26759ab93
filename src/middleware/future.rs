use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;

use super::{body::GracefulBody, named::Named, refusal::Refusal};
use crate::{
    handle::{Graceful, Pass},
    leaving,
    phase::Phase,
    timeline::Shared,
};

pin_project! {
    /// The response future of [`GracefulService`](super::GracefulService).
    ///
    /// Its request is in flight until it resolves, and then until the response's body ends.
    /// Dropping it releases the request. Polled again after it is ready, it stays pending.
    #[must_use = "futures do nothing unless polled"]
    pub struct GracefulFuture<F, B> {
        #[pin]
        state: State<F, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B> {
        Admitted { #[pin] inner: F, pass: Option<Pass>, version: Version },
        // Admitted, and on the roll. Boxed, as below. Off the roll before it is released.
        Named { #[pin] inner: F, named: Option<Box<Named>>, pass: Option<Pass>, version: Version },
        // Let pass without being counted, where it would have been refused.
        Exempt { #[pin] inner: F, graceful: Graceful, version: Version },
        // Boxed: it is rare, and would make every admitted request's future larger.
        Refused { refusal: Pin<Box<Refusal<B>>> },
        Done,
    }
}

impl<F, B> GracefulFuture<F, B> {
    #[inline]
    pub(super) fn admitted(inner: F, pass: Pass, version: Version) -> Self {
        Self {
            state: State::Admitted {
                inner,
                pass: Some(pass),
                version,
            },
        }
    }

    pub(super) fn named(inner: F, pass: Pass, named: Named, version: Version) -> Self {
        Self {
            state: State::Named {
                inner,
                pass: Some(pass),
                named: Some(Box::new(named)),
                version,
            },
        }
    }

    pub(super) fn exempt(inner: F, graceful: Graceful, version: Version) -> Self {
        Self {
            state: State::Exempt {
                inner,
                graceful,
                version,
            },
        }
    }

    pub(super) fn refused(refusal: Refusal<B>) -> Self {
        Self {
            state: State::Refused {
                refusal: Box::pin(refusal),
            },
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
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        match state.as_mut().project() {
            StateProj::Admitted {
                inner,
                pass,
                version,
            } => {
                let result = ready!(inner.poll(cx));
                let (pass, version) = (pass.take(), *version);
                // The inner future goes before its request is released.
                state.set(State::Done);
                let mut response = result?;
                if pass.as_ref().is_some_and(|pass| leaves(pass.gate())) {
                    leaving::say_close(&mut response, version);
                }
                Poll::Ready(Ok(response.map(|body| GracefulBody::new(body, pass))))
            }
            StateProj::Named {
                inner,
                pass,
                named,
                version,
            } => {
                let result = ready!(inner.poll(cx));
                let (pass, named, version) = (pass.take(), named.take(), *version);
                state.set(State::Done);
                let mut response = result?;
                if pass.as_ref().is_some_and(|pass| leaves(pass.gate())) {
                    leaving::say_close(&mut response, version);
                }
                if let Some(named) = &named {
                    named.streams();
                }
                Poll::Ready(Ok(
                    response.map(|body| GracefulBody::named(body, pass, named))
                ))
            }
            StateProj::Exempt {
                inner,
                graceful,
                version,
            } => {
                let result = ready!(inner.poll(cx));
                let (leaves, version) = (leaves(graceful.shared()), *version);
                state.set(State::Done);
                let mut response = result?;
                if leaves {
                    leaving::say_close(&mut response, version);
                }
                Poll::Ready(Ok(response.map(|body| GracefulBody::new(body, None))))
            }
            StateProj::Refused { refusal } => {
                let response = ready!(refusal.as_mut().poll(cx));
                Poll::Ready(Ok(response.map(GracefulBody::text)))
            }
            StateProj::Done => Poll::Pending,
        }
    }
}

/// Whether a response that goes out now asks its client to leave.
#[inline]
fn leaves(shared: &Shared) -> bool {
    let phase = shared.word().phase();
    phase > Phase::Serving && (phase > Phase::LameDuck || shared.asks_to_leave())
}

impl<F, B> fmt::Debug for GracefulFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Admitted { .. } => "admitted",
            State::Named { .. } => "named",
            State::Exempt { .. } => "exempt",
            State::Refused { .. } => "refused",
            State::Done => "done",
        };
        f.debug_struct("GracefulFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
