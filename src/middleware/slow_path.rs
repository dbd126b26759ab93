//! The response future of a request that takes the slow path: a named request, an exempt request
//! that is not counted, or a rejected request.

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
    #[project = SlowProj]
    #[project_replace = SlowOwn]
    pub(super) enum SlowFuture<F, B> {
        /// In flight and in the request table. The entry is removed before the permit is released.
        Named {
            #[pin]
            inner: F,
            named: Named,
            permit: Unanswered,
            version: Version,
        },
        /// Passed to the inner service without being counted, at a time when requests for other
        /// paths are rejected.
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

impl<F, B> SlowFuture<F, B> {
    pub(super) fn state(&self) -> &'static str {
        match self {
            Self::Named { .. } => "named",
            Self::Exempt { .. } => "exempt",
            Self::Refused { .. } => "refused",
            Self::Over => "done",
        }
    }
}

impl<F, E, ReqBody, ResBody> Future for SlowFuture<F, ReqBody>
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
            SlowProj::Named { inner, .. } | SlowProj::Exempt { inner, .. } => {
                ready!(inner.poll(cx))
            }
            SlowProj::Refused { refusal } => {
                let response = ready!(refusal.poll(cx));
                return Poll::Ready(Ok(response.map(GracefulBody::text)));
            }
            SlowProj::Over => return Poll::Pending,
        };
        // Drops the inner future while its request is still in flight.
        let own = self.project_replace(Self::Over);
        Poll::Ready(match own {
            SlowOwn::Named {
                named,
                permit,
                version,
                ..
            } => {
                if let Ok(response) = &mut result {
                    ask_to_leave(response, &permit, version);
                    named.streams();
                }
                let permit = permit.answered();
                result.map(|it| it.map(|body| GracefulBody::named(body, named, permit)))
            }
            SlowOwn::Exempt {
                admission,
                least_phase,
                version,
                ..
            } => {
                if let Ok(response) = &mut result {
                    let phase = admission.phase().max(least_phase);
                    let spreads = admission.rules().is_spread();
                    if asks_to_leave(phase, spreads, || admission.owner()) {
                        connection_close::say_close(response, version);
                    }
                }
                result.map(|it| it.map(GracefulBody::uncounted))
            }
            SlowOwn::Refused { .. } | SlowOwn::Over => {
                result.map(|it| it.map(GracefulBody::uncounted))
            }
        })
    }
}

/// Adds `Connection: close` to a response if its client is to leave.
#[cold]
#[inline(never)]
pub(super) fn ask_to_leave<B>(response: &mut Response<B>, permit: &Unanswered, version: Version) {
    let phase = permit.word().phase();
    if asks_to_leave(phase, permit.spreads_leaving(), || permit.owner()) {
        connection_close::say_close(response, version);
    }
}

/// Whether a response that is sent now asks its client to leave. `owner` takes a lock that all requests
/// share, so it is called only if clients are asked one after another.
fn asks_to_leave(phase: Phase, spreads: bool, owner: impl FnOnce() -> Option<Shared>) -> bool {
    match phase {
        Phase::Serving => false,
        Phase::LameDuck => !spreads || owner().is_none_or(|shared| shared.asks_to_leave()),
        Phase::Draining | Phase::Closing | Phase::Stopped => true,
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use http::{Request, header::CONNECTION};
    use http_body_util::Empty;
    use tower::{Layer, ServiceExt, service_fn};

    use super::*;
    use crate::Graceful;

    #[tokio::test(start_paused = true)]
    async fn clients_are_asked_to_leave_at_once_unless_that_is_spread() {
        for (spread, asks) in [(Duration::ZERO, true), (Duration::from_secs(5), false)] {
            let graceful = Graceful::builder().close_spread(spread).build().unwrap();
            let service = graceful.layer().layer(service_fn(async |_| {
                Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
            }));
            graceful.shutdown();
            let request = Request::new(Empty::<Bytes>::new());
            let response = service.oneshot(request).await.unwrap();
            assert_eq!(response.headers().contains_key(CONNECTION), asks);
        }
    }

    #[test]
    fn a_response_takes_no_lock_that_requests_share_unless_clients_are_asked_one_after_another() {
        let lock = || unreachable!("the lock is taken");
        assert!(!asks_to_leave(Phase::Serving, true, lock));
        assert!(asks_to_leave(Phase::LameDuck, false, lock));
        assert!(asks_to_leave(Phase::Draining, true, lock));
    }
}
