//! The response to a request that is more than a count: known by name, let pass uncounted, or
//! refused.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;

use super::connection_close;
use super::{body::GracefulBody, named::Named, refusal::Refusal};
use crate::{
    handle::graceful::{Admission, Unanswered},
    phase::Phase,
    shutdown::Shared,
};

pin_project! {
    #[project = SpecialProj]
    #[project_replace = SpecialOwn]
    pub(super) enum SpecialFuture<F, B> {
        /// In flight and on the roll, struck out first.
        Named {
            #[pin]
            inner: F,
            named: Named,
            pass: Unanswered,
            version: Version,
        },
        /// Let pass without being counted, where it would have been refused.
        Exempt {
            #[pin]
            inner: F,
            admission: Admission,
            least_phase: Phase,
            version: Version,
        },
        Refused {
            #[pin]
            refusal: Refusal<B>,
        },
        Over,
    }
}

impl<F, B> SpecialFuture<F, B> {
    pub(super) fn state(&self) -> &'static str {
        match self {
            Self::Named { .. } => "named",
            Self::Exempt { .. } => "exempt",
            Self::Refused { .. } => "refused",
            Self::Over => "done",
        }
    }
}

impl<F, E, ReqBody, ResBody> Future for SpecialFuture<F, ReqBody>
where
    F: Future<Output = Result<Response<ResBody>, E>>,
    ReqBody: Body,
    ResBody: Body<Data: From<Bytes>>,
{
    type Output = Result<Response<GracefulBody<ResBody>>, E>;

    #[cold]
    #[inline(never)]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut result = match self.as_mut().project() {
            SpecialProj::Named { inner, .. } | SpecialProj::Exempt { inner, .. } => {
                ready!(inner.poll(cx))
            }
            SpecialProj::Refused { refusal } => {
                let response = ready!(refusal.poll(cx));
                return Poll::Ready(Ok(response.map(GracefulBody::text)));
            }
            SpecialProj::Over => return Poll::Pending,
        };
        // Drops the future inside, before its request is released.
        let own = self.project_replace(Self::Over);
        Poll::Ready(match own {
            SpecialOwn::Named {
                named,
                pass,
                version,
                ..
            } => {
                if let Ok(response) = &mut result {
                    ask_to_leave(response, &pass, version);
                    named.streams();
                }
                let pass = pass.answered();
                result.map(|it| it.map(|body| GracefulBody::named(body, named, pass)))
            }
            SpecialOwn::Exempt {
                admission,
                least_phase,
                version,
                ..
            } => {
                if let Ok(response) = &mut result {
                    if leaves(admission.phase().max(least_phase), || admission.gate()) {
                        connection_close::say_close(response, version);
                    }
                }
                result.map(|it| it.map(GracefulBody::uncounted))
            }
            SpecialOwn::Refused { .. } | SpecialOwn::Over => {
                result.map(|it| it.map(GracefulBody::uncounted))
            }
        })
    }
}

/// Has a response ask its client to leave, if the service stops.
#[cold]
#[inline(never)]
pub(super) fn ask_to_leave<B>(response: &mut Response<B>, pass: &Unanswered, version: Version) {
    if leaves(pass.word().phase(), || pass.gate()) {
        connection_close::say_close(response, version);
    }
}

/// Whether a response that goes out now asks its client to leave.
fn leaves(phase: Phase, gate: impl FnOnce() -> Option<Shared>) -> bool {
    match phase {
        Phase::Serving => false,
        Phase::LameDuck => gate().is_none_or(|shared| shared.asks_to_leave()),
        Phase::Draining | Phase::Closing | Phase::Stopped => true,
    }
}
