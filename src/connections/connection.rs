//! One connection of `serve`: what its owner can do for it and nobody else.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::{body::Body, extract::Request, response::Response};
use bytes::Bytes;
use http::{Version, header};
use http_body::{Frame, SizeHint};
use hyper::{
    body::Incoming,
    rt::{Executor, Sleep, Timer},
};
use hyper_util::{rt::TokioIo, server::conn::auto, service::TowerToHyperService};
use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time,
};
use tower_service::Service;

use super::io::GracefulIo;
use crate::{
    handle::Graceful,
    heard::Heard,
    leaving,
    phase::Phase,
    registry::{Line, Told},
    spread::TURN,
    timeline::LINGER,
};

/// Serves HTTP/1 and HTTP/2 on a connection until it closes or is cut.
///
/// The peer is asked to leave when its turn has come: over HTTP/2 by GOAWAY, which loses no
/// request, over HTTP/1 by the header of a response. Over HTTP/1 an idle connection is closed only
/// when everybody is, because a request may be on its way; but for one whose stream of events has
/// ended while the service drains.
pub(super) async fn serve<I, S>(mut io: GracefulIo<I>, service: S, graceful: Graceful)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let owner = Arc::new(Owner {
        line: io.noted(),
        late: graceful.phase() > Phase::Serving,
        graceful,
    });
    let mut http = auto::Builder::new(Streams(Arc::clone(&owner)));
    let timer = HeadTimer(Arc::clone(&owner));
    // That there is one is enough; how long it is, the timer knows.
    http.http1()
        .timer(timer.clone())
        .header_read_timeout(Duration::from_secs(1));
    // For WebSockets (RFC 8441).
    http.http2().enable_connect_protocol();
    let service = TowerToHyperService::new(Owned {
        inner: service,
        owner: Arc::clone(&owner),
    });
    {
        let is_http2 = || owner.line.heard(|heard| heard.is_http2());
        // hyper's timer begins where it is known to be HTTP/1.
        let mut opening = pin!(timer.timeout(0));
        let mut opened = false;
        let mut turn = None;
        let mut asked = Told::Stay;
        let mut connection = pin!(http.serve_connection_with_upgrades(TokioIo::new(io), service));
        poll_fn(|cx| {
            let told = owner.line.told(cx);
            if told == Told::Cut {
                return Poll::Ready(());
            }
            loop {
                // First of all, because what has arrived already is still to be answered.
                if connection.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                opened = opened || owner.line.heard(|heard| heard.is_decided());
                if !opened && opening.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
                let leaves = match told {
                    Told::Stay => false,
                    Told::TakeTurns => is_http2() && owner.poll_turn(&mut turn, cx).is_ready(),
                    Told::Leave => is_http2(),
                    Told::Close | Told::Cut => true,
                };
                if !leaves || asked == told {
                    return Poll::Pending;
                }
                asked = told;
                connection.as_mut().graceful_shutdown();
            }
        })
        .await;
    }
    // What it ran in tasks of their own ends with it.
    poll_fn(|cx| owner.line.poll_streams_ended(cx)).await;
}

/// Runs what hyper runs beside a connection of HTTP/2: each of its streams, in a task of its own.
#[derive(Clone)]
struct Streams(Arc<Owner>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let running = Running::new(Arc::clone(&self.0));
        tokio::spawn(async move {
            stream.await;
            drop(running);
        });
    }
}

/// A stream's task that has not ended.
struct Running(Arc<Owner>);

impl Running {
    fn new(owner: Arc<Owner>) -> Self {
        owner.line.stream_began();
        Self(owner)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.line.stream_ended();
    }
}

/// Boxed, because most connections never need it and ten thousand may be idle.
type RareSleep = Option<Pin<Box<time::Sleep>>>;

/// What a connection and its requests share.
struct Owner {
    line: Arc<Line>,
    /// It has come when others were asked to leave already.
    late: bool,
    graceful: Graceful,
}

impl Owner {
    /// When this connection's turn to leave comes.
    fn turn(&self) -> time::Instant {
        self.graceful.shared().turn(self.line.place)
    }

    fn poll_turn(&self, sleep: &mut RareSleep, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = sleep.get_or_insert_with(|| Box::pin(time::sleep_until(self.turn())));
        sleep.as_mut().poll(cx)
    }

    /// Whether connections are asked one after another in this phase.
    fn is_spread(&self, phase: Phase) -> bool {
        phase == Phase::LameDuck && self.graceful.policy().is_spread()
    }

    /// Asks the peer to leave, with this response, if its turn has come.
    #[cold]
    fn ask_to_leave(&self, response: &mut Response, version: Version, phase: Phase) {
        let http2 = version == Version::HTTP_2;
        if self.is_spread(phase) {
            if time::Instant::now() < self.turn() {
                if http2 {
                    // It may have come after the others were told.
                    self.line.tell(Told::TakeTurns);
                }
                return;
            }
        } else if http2
            && self.late
            && phase == Phase::LameDuck
            && !self.graceful.shared().connections.asks_everybody()
        {
            // Who has no other place to go would come back, and be asked again with each request.
            return;
        }
        leaving::say_close(response, version);
        if http2 {
            self.line.tell(Told::Leave);
        }
    }
}

/// A service whose responses ask the peer to leave once it shall.
#[derive(Clone)]
struct Owned<S> {
    inner: S,
    owner: Arc<Owner>,
}

impl<S> Service<http::Request<Incoming>> for Owned<S>
where
    S: Service<Request, Response = Response, Error = Infallible>,
{
    type Response = http::Response<OwnedBody>;
    type Error = Infallible;
    type Future = OwnedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Incoming>) -> Self::Future {
        OwnedFuture {
            version: request.version(),
            owner: Some(Arc::clone(&self.owner)),
            inner: self.inner.call(request.map(Body::new)),
        }
    }
}

pin_project! {
    struct OwnedFuture<F> {
        #[pin]
        inner: F,
        version: Version,
        // Goes on to the body.
        owner: Option<Arc<Owner>>,
    }
}

impl<F> Future for OwnedFuture<F>
where
    F: Future<Output = Result<Response, Infallible>>,
{
    type Output = Result<http::Response<OwnedBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some(owner) = this.owner else {
            return Poll::Pending;
        };
        let polled = if owner.is_spread(owner.graceful.phase()) {
            let turn = time::Instant::now() >= owner.turn();
            TURN.sync_scope(turn, || this.inner.poll(cx))
        } else {
            this.inner.poll(cx)
        };
        let Ok(mut response) = ready!(polled);
        let phase = owner.graceful.phase();
        if phase > Phase::Serving {
            owner.ask_to_leave(&mut response, *this.version, phase);
        }
        // Over HTTP/2 the peer is asked by other means.
        let comes_back = *this.version < Version::HTTP_2 && is_event_stream(&response);
        let owner = this.owner.take().filter(|_| comes_back);
        Poll::Ready(Ok(response.map(|inner| OwnedBody { inner, owner })))
    }
}

fn is_event_stream(response: &Response) -> bool {
    const EVENTS: &[u8] = b"text/event-stream";
    let kind = response.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.as_bytes().get(..EVENTS.len()));
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS))
}

/// A response's body. One of server-sent events that ends while draining takes its connection along:
/// the client comes back, on the same connection if it can, and would be refused, which is final to
/// an `EventSource`; the head went out long ago and could not ask it to leave. Of other responses
/// the next request is refused in words, because it may be one that is not sent twice.
struct OwnedBody {
    inner: Body,
    owner: Option<Arc<Owner>>,
}

impl OwnedBody {
    fn ended(&mut self) {
        let Some(owner) = self.owner.take() else {
            return;
        };
        if owner.graceful.phase() < Phase::Draining {
            return;
        }
        let heard = owner.line.heard(|heard| heard.bytes);
        tokio::spawn(async move {
            time::sleep(LINGER).await;
            // What has come meanwhile is answered.
            if owner.line.heard(|now| now.bytes) == heard {
                owner.line.tell(Told::Close);
            }
        });
    }
}

impl http_body::Body for OwnedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) || self.inner.is_end_stream() {
            self.ended();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The timer that bounds the reading of a request head over HTTP/1.
///
/// hyper starts it when it begins to wait for a head, which would close idle connections too: a
/// balancer that takes one up again at that moment loses a request. So this one stands still until
/// the head's first byte.
#[derive(Clone)]
struct HeadTimer(Arc<Owner>);

impl HeadTimer {
    fn timeout(&self, awaited_from: u64) -> HeadTimeout {
        HeadTimeout {
            awaited_from,
            owner: Arc::clone(&self.0),
            sleep: None,
        }
    }
}

impl Timer for HeadTimer {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Sleep>> {
        let awaited_from = self.0.line.heard(Heard::await_head);
        Box::pin(self.timeout(awaited_from))
    }

    fn sleep_until(&self, _: Instant) -> Pin<Box<dyn Sleep>> {
        self.sleep(Duration::ZERO)
    }

    fn now(&self) -> Instant {
        // For a deadline that is not looked at.
        self.0.line.opened.into_std()
    }
}

struct HeadTimeout {
    awaited_from: u64,
    owner: Arc<Owner>,
    sleep: RareSleep,
}

impl Sleep for HeadTimeout {}

impl Future for HeadTimeout {
    type Output = ();

    /// Polled by hyper each time it has read and the head is not whole.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let sleep = match &mut this.sleep {
            Some(sleep) => sleep,
            none => {
                if this.owner.line.heard(|heard| heard.bytes) == this.awaited_from {
                    return Poll::Pending;
                }
                let timeout = this.owner.graceful.policy().header_read_timeout;
                none.insert(Box::pin(time::sleep(timeout)))
            }
        };
        sleep.as_mut().poll(cx)
    }
}
