use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Response, Version};
use http_body::Body;
use pin_project_lite::pin_project;

use super::{body::GracefulBody, held::Held, named::Named, refusal::Refusal};
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
        // `None` if the request was refused, and once this is ready.
        #[pin]
        inner: Option<F>,
        // After the future, so that it is dropped while its request is still in flight.
        held: Held<Special<B>>,
        version: Version,
    }
}

enum Special<B> {
    /// In flight and on the roll, struck out first.
    Named(Named, Pass),
    /// Let pass without being counted, where it would have been refused.
    Exempt(Graceful),
    Refused(Pin<Box<Refusal<B>>>),
}

impl<F, B> GracefulFuture<F, B> {
    pub(super) fn admitted(inner: F, pass: Pass, version: Version) -> Self {
        Self::holding(inner, Held::Pass(pass), version)
    }

    pub(super) fn named(inner: F, pass: Pass, named: Named, version: Version) -> Self {
        Self::holding(inner, Held::special(Special::Named(named, pass)), version)
    }

    pub(super) fn exempt(inner: F, graceful: Graceful, version: Version) -> Self {
        Self::holding(inner, Held::special(Special::Exempt(graceful)), version)
    }

    fn holding(inner: F, held: Held<Special<B>>, version: Version) -> Self {
        Self {
            inner: Some(inner),
            held,
            version,
        }
    }

    pub(super) fn refused(refusal: Refusal<B>, version: Version) -> Self {
        Self {
            inner: None,
            held: Held::special(Special::Refused(Box::pin(refusal))),
            version,
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

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let Some(inner) = this.inner.as_mut().as_pin_mut() else {
            return poll_refused(this.held, cx);
        };
        let result = ready!(inner.poll(cx));
        // Before its request is released.
        this.inner.set(None);
        match this.held.take() {
            Held::Pass(pass) if !pass.gate().word().is_special() => Poll::Ready(
                result.map(|response| response.map(|body| GracefulBody::new(body, pass))),
            ),
            held => Poll::Ready(specially(result, held, *this.version)),
        }
    }
}

/// The answer to a refused request; pending for ever once it has been given, and where the future
/// is polled after it was ready.
#[cold]
fn poll_refused<E, ReqBody, ResBody>(
    held: &mut Held<Special<ReqBody>>,
    cx: &mut Context<'_>,
) -> Poll<Result<Response<GracefulBody<ResBody>>, E>>
where
    ReqBody: Body,
{
    let Held::Special(special) = held else {
        return Poll::Pending;
    };
    let Special::Refused(refusal) = &mut **special else {
        return Poll::Pending;
    };
    let response = ready!(refusal.as_mut().poll(cx));
    Poll::Ready(Ok(response.map(GracefulBody::text)))
}

/// A response that is more than the end of a count: while the service stops, to an exempt path, or
/// with names.
#[cold]
fn specially<E, ReqBody, ResBody: Body>(
    result: Result<Response<ResBody>, E>,
    held: Held<Special<ReqBody>>,
    version: Version,
) -> Result<Response<GracefulBody<ResBody>>, E> {
    let mut response = result?;
    let mut ask = |shared: &Shared| {
        if leaves(shared) {
            leaving::say_close(&mut response, version);
        }
    };
    Ok(match held {
        Held::Pass(pass) => {
            ask(pass.gate());
            response.map(|body| GracefulBody::new(body, pass))
        }
        Held::Special(special) => match *special {
            Special::Named(named, pass) => {
                ask(pass.gate());
                named.streams();
                response.map(|body| GracefulBody::named(body, named, pass))
            }
            Special::Exempt(graceful) => {
                ask(graceful.shared());
                response.map(GracefulBody::exempt)
            }
            Special::Refused(_) => response.map(GracefulBody::exempt),
        },
        Held::Nothing => response.map(GracefulBody::exempt),
    })
}

/// Whether a response that goes out now asks its client to leave.
fn leaves(shared: &Shared) -> bool {
    let phase = shared.word().phase();
    phase > Phase::LameDuck || phase == Phase::LameDuck && shared.asks_to_leave()
}

impl<F, B> fmt::Debug for GracefulFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (&self.inner, &self.held) {
            (Some(_), Held::Special(special)) => match **special {
                Special::Named(..) => "named",
                Special::Exempt(_) | Special::Refused(_) => "exempt",
            },
            (Some(_), _) => "admitted",
            (None, Held::Special(_)) => "refused",
            (None, _) => "done",
        };
        f.debug_struct("GracefulFuture")
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
