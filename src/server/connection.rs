//! One connection of `serve`: what its owner can do for it and nobody else.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, LazyLock, atomic::Ordering},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::{body::Body, extract::Request, response::Response};
use bytes::{Buf, Bytes};
use http::{HeaderValue, Method, StatusCode, Version, header};
use http_body::{Body as _, Frame, SizeHint};
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

use super::{ConnectionEntry, io::GracefulIo, settings::Settings};
use crate::{
    connection::{
        outside::Window,
        sniffer::{Awaited, Sniffer},
        stagger::SLOT_REACHED,
        state::{Directive, RegisteredWaker, WakerSlot},
        table::{OWES_NOTHING, RESPONDED, UPGRADES, WATCHED},
    },
    middleware::{connection_close, peer::TrackedPeer},
    phase::Phase,
    shutdown::step::LINGER,
};

/// Serves HTTP/1 and HTTP/2 on a connection until it closes or is cut.
///
/// The peer is asked to leave when its turn has come: over HTTP/2 by GOAWAY, which loses no
/// request, over HTTP/1 by the header of a response. Over HTTP/1 an idle connection is closed only
/// when everybody is, because a request may be on its way; but for one whose stream of events has
/// ended while the service drains.
pub(super) fn serve<I, S>(
    mut io: GracefulIo<I>,
    service: S,
    settings: &Arc<Settings>,
) -> Serving<I, S>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let owner = Owner(io.noted());
    if owner.phase() > Phase::Serving {
        owner.0.sniffer.joins_during_stop();
    }
    if settings.http1_only() {
        owner.0.sniffer.refuse_http2();
    }
    let mut http = auto::Builder::new(Streams(owner.clone()));
    let timer = HeadTimer {
        owner: owner.clone(),
        settings: Arc::clone(settings),
    };
    // hyper has to be given a duration. `HeadTimer` replaces it by the one in the settings.
    http.http1()
        .timer(timer)
        .header_read_timeout(Duration::from_secs(1));
    settings.apply(&mut http);
    let service = Owned {
        inner: TowerToHyperService::new(service),
        owner: owner.clone(),
        half_close: settings.half_close,
        http2_only: settings.http2_only(),
    };
    let connection = http.serve_connection_with_upgrades(TokioIo::new(io), service);
    Serving {
        // Its own, where there is room for it until the version is known, and none is needed later.
        connection: Some(connection.into_owned()),
        owner,
        settings: Arc::clone(settings),
        stored: RegisteredWaker::default(),
        opening: None,
        opened: false,
        turn: None,
        asked: Directive::Stay,
    }
}

pin_project! {
    /// A future of its own instead of an `async fn`, which would keep what it was made from.
    pub(super) struct Serving<I, S>
    where
        I: 'static,
        S: Service<Request, Response = Response, Error = Infallible>,
        S: Clone,
    {
        #[pin]
        connection: Option<Connection<I, S>>,
        owner: Owner,
        settings: Arc<Settings>,
        stored: RegisteredWaker,
        // Until it is known to be HTTP/1, where hyper's timer begins.
        opening: RareSleep,
        opened: bool,
        turn: RareSleep,
        asked: Directive,
    }
}

type Connection<I, S> =
    auto::UpgradeableConnection<'static, TokioIo<GracefulIo<I>>, Owned<S>, Streams>;

impl<I, S> Future for Serving<I, S>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.connection.is_some() {
            ready!(self.as_mut().poll_connection(cx));
            self.as_mut().project().connection.set(None);
        }
        let this = self.project();
        let state = &this.owner.0.state;
        // What it ran in tasks of their own ends with it.
        ready!(state.poll_streams_ended(this.stored, cx));
        state.owner_left();
        Poll::Ready(())
    }
}

impl<I, S> Serving<I, S>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    fn poll_connection(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        let sniffer = &this.owner.0.sniffer;
        let told = this.owner.0.state.enter(this.stored, WakerSlot::Owner, cx);
        let Some(mut connection) = this.connection.as_mut().as_pin_mut() else {
            return Poll::Ready(());
        };
        if told == Directive::Cut {
            return Poll::Ready(());
        }
        loop {
            // First of all, because what has arrived already is still to be answered.
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            if !*this.opened && sniffer.is_decided() {
                *this.opened = true;
                *this.opening = None;
            }
            if !*this.opened
                && this
                    .owner
                    .poll_head(Sniffer::FIRST, this.settings, this.opening, cx)
                    .is_ready()
            {
                return Poll::Ready(());
            }
            let leaves = match told {
                Directive::Stay | Directive::Stopping => false,
                Directive::LeaveInSlot => {
                    sniffer.is_http2() && this.owner.poll_turn(this.turn, cx).is_ready()
                }
                Directive::Leave => sniffer.is_http2(),
                Directive::Close | Directive::Expire | Directive::Cut => true,
            };
            if !leaves || *this.asked == told {
                return Poll::Pending;
            }
            *this.asked = told;
            connection.as_mut().graceful_shutdown();
        }
    }
}

/// Runs what hyper runs beside a connection of HTTP/2: each of its streams, in a task of its own.
#[derive(Clone)]
struct Streams(Owner);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let running = Running::new(self.0.clone());
        tokio::spawn(async move {
            stream.await;
            drop(running);
        });
    }
}

/// A stream's task that has not ended.
struct Running(Owner);

impl Running {
    fn new(owner: Owner) -> Self {
        owner.0.state.stream_began();
        Self(owner)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.state.stream_ended();
    }
}

/// At how many reads of a connection its requests are looked at, and how often after that.
const FIRST_READS: u32 = 32;
const EVERY_READS: u32 = 256;

/// Boxed, because most connections never need it and ten thousand may be idle.
type RareSleep = Option<Pin<Box<time::Sleep>>>;

/// What a connection and its requests share.
#[derive(Clone)]
struct Owner(Arc<ConnectionEntry>);

impl Owner {
    fn phase(&self) -> Phase {
        self.0.owner.phase()
    }

    /// When this connection's turn to leave comes.
    fn turn(&self) -> time::Instant {
        self.0.owner.slot_time(self.0.place)
    }

    fn poll_turn(&self, sleep: &mut RareSleep, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = sleep.get_or_insert_with(|| Box::pin(time::sleep_until(self.turn())));
        sleep.as_mut().poll(cx)
    }

    /// Ready when the head that is awaited has taken too long since it began.
    fn poll_head(
        &self,
        head: Awaited,
        settings: &Settings,
        sleep: &mut RareSleep,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let sleep = match sleep {
            Some(sleep) => sleep,
            none => {
                if !self.0.sniffer.has_begun(head) {
                    return Poll::Pending;
                }
                none.insert(Box::pin(time::sleep(settings.header_read_timeout)))
            }
        };
        sleep.as_mut().poll(cx)
    }

    /// Whether connections are asked one after another in this phase.
    fn is_spread(&self, phase: Phase) -> bool {
        phase == Phase::LameDuck && self.0.owner.policy.is_spread()
    }

    /// A request over HTTP/1 was dropped before there was a response. If its client has closed its
    /// writing side, that is why, and the client may have waited. What is cut is reported as such.
    #[cold]
    fn dropped_unanswered(&self) {
        let shared = &self.0.owner;
        if self.0.sniffer.has_ended()
            && shared.phase() > Phase::Serving
            && self.0.state.directive() < Directive::Cut
            && !self.0.flags.has(OWES_NOTHING)
        {
            shared.connections.half_closed();
        }
    }

    /// Looks at whether the layer sees a request: at the first ones of a connection, and then at one
    /// in many.
    #[cold]
    fn watch<B>(&self, request: &http::Request<B>) -> Option<Window> {
        let reads = self.0.sniffer.reads();
        if reads >= FIRST_READS && reads % EVERY_READS != 0 {
            return None;
        }
        let (shared, peer) = (&self.0.owner, self.0.peer());
        let path = request.uri().path();
        Window::open(shared, request.method(), path, peer, true)
    }

    /// A request that is looked at has this response.
    #[cold]
    fn answered(&self, window: Window, response: &Response) {
        let shared = &self.0.owner;
        let grpc = response.headers().get("grpc-status");
        if grpc.is_none_or(|status| status == "0") {
            window.answered(shared, response.status());
        } else {
            window.close(shared);
        }
    }

    /// Notes where an upgrade is asked for. Over HTTP/2 the connection has other streams too, and is
    /// none of them.
    #[cold]
    fn asks_for_upgrade<B>(&self, request: &http::Request<B>) {
        if request.version() < Version::HTTP_2 {
            let path = match request.uri().path() {
                // A tunnel's target is a host.
                "" => &*request.uri().to_string(),
                path => path,
            };
            self.0.flags.set(UPGRADES);
            let upgraded = &self.0.owner.upgraded;
            upgraded.asked(self.0.number(), path, self.0.peer());
        }
    }

    /// What follows is another protocol.
    #[cold]
    fn upgraded(&self) {
        self.0.sniffer.upgraded();
        self.0.upgraded();
    }

    /// Asks the peer to leave, with this response, if its turn has come.
    #[cold]
    fn ask_to_leave(&self, response: &mut Response, version: Version, phase: Phase) {
        self.0.flags.set(RESPONDED);
        let http2 = version == Version::HTTP_2;
        if self.is_spread(phase) {
            if time::Instant::now() < self.turn() {
                if http2 {
                    // It may have come after the others were told.
                    self.0.state.instruct(Directive::LeaveInSlot);
                }
                return;
            }
        } else if http2
            && self.0.sniffer.joined_during_stop()
            && phase == Phase::LameDuck
            && !self.0.owner.connections.asks_all()
        {
            // Who has no other place to go would come back, and be asked again with each request.
            return;
        }
        connection_close::say_close(response, version);
        if http2 {
            self.0.state.instruct(Directive::Leave);
        }
    }
}

/// A service whose responses ask the peer to leave once it shall.
///
/// One of hyper's, because hyper calls it when it has read a request's head, and tower's only when
/// the response is polled, which a client that has closed its writing side prevents.
struct Owned<S> {
    inner: TowerToHyperService<S>,
    owner: Owner,
    half_close: bool,
    http2_only: bool,
}

impl<S> hyper::service::Service<http::Request<Incoming>> for Owned<S>
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone,
{
    type Response = http::Response<OwnedBody>;
    type Error = Infallible;
    type Future = OwnedFuture<Inner<S>>;

    fn call(&self, mut request: http::Request<Incoming>) -> Self::Future {
        let version = request.version();
        if self.http2_only && version < Version::HTTP_2 {
            return OwnedFuture {
                inner: None,
                version,
                connect: false,
                is_lost_by_fin: false,
                window: None,
                owner: None,
            };
        }
        // hyper puts there what an upgrade needs, and otherwise nothing.
        if !request.extensions().is_empty() {
            self.owner.asks_for_upgrade(&request);
        }
        if self.owner.0.owner.wants_peers.load(Ordering::Relaxed) {
            if let Some(peer) = self.owner.0.peer() {
                request.extensions_mut().insert(TrackedPeer(peer));
            }
        }
        let watched = self.owner.0.flags.has(WATCHED);
        OwnedFuture {
            window: if watched {
                self.owner.watch(&request)
            } else {
                None
            },
            version,
            connect: request.method() == Method::CONNECT,
            is_lost_by_fin: version < Version::HTTP_2
                && !self.half_close
                && self.owner.phase() < Phase::Draining,
            owner: Some(self.owner.clone()),
            inner: Some(self.inner.call(request.map(Body::new))),
        }
    }
}

type Inner<S> = <TowerToHyperService<S> as hyper::service::Service<Request>>::Future;

pin_project! {
    struct OwnedFuture<F> {
        // `None` for a request over HTTP/1 to a server of HTTP/2 only.
        #[pin]
        inner: Option<F>,
        version: Version,
        connect: bool,
        // It came over HTTP/1 while requests were let in, and a FIN of its client drops it.
        is_lost_by_fin: bool,
        // Whether the layer sees it.
        window: Option<Window>,
        // Goes on to the body.
        owner: Option<Owner>,
    }

    impl<F> PinnedDrop for OwnedFuture<F> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let Some(owner) = this.owner {
                if let Some(window) = this.window.take() {
                    window.close(&owner.0.owner);
                }
                if *this.is_lost_by_fin {
                    owner.dropped_unanswered();
                }
            }
        }
    }
}

impl<F> Future for OwnedFuture<F>
where
    F: Future<Output = Result<Response, Infallible>>,
{
    type Output = Result<http::Response<OwnedBody>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some(inner) = this.inner.as_pin_mut() else {
            return Poll::Ready(Ok(version_not_supported(*this.version)));
        };
        let Some(owner) = this.owner else {
            return Poll::Pending;
        };
        let polled = if owner.is_spread(owner.phase()) {
            let turn = time::Instant::now() >= owner.turn();
            SLOT_REACHED.sync_scope(turn, || inner.poll(cx))
        } else {
            inner.poll(cx)
        };
        let Ok(mut response) = ready!(polled);
        if *this.version < Version::HTTP_2 && is_upgrade(&response, *this.connect) {
            owner.upgraded();
        }
        if let Some(window) = this.window.take() {
            owner.answered(window, &response);
        }
        let phase = owner.phase();
        if phase > Phase::Serving {
            owner.ask_to_leave(&mut response, *this.version, phase);
        }
        // Over HTTP/2 the peer is asked by other means.
        let http2 = *this.version == Version::HTTP_2;
        let comes_back = *this.version < Version::HTTP_2 && is_event_stream(&response);
        let owner = this.owner.take().filter(|_| comes_back || http2);
        Poll::Ready(Ok(response.map(|inner| OwnedBody {
            inner,
            owner,
            http2,
        })))
    }
}

/// What an HTTP/1 client gets from a server of HTTP/2 only
/// ([RFC 9110 §15.6.6](https://www.rfc-editor.org/rfc/rfc9110#section-15.6.6)).
#[cold]
fn version_not_supported(version: Version) -> http::Response<OwnedBody> {
    let mut response = Response::new(Body::from("this server speaks HTTP/2 only\n"));
    *response.status_mut() = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
    let text = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    connection_close::say_close(&mut response, version);
    response.map(|inner| OwnedBody {
        inner,
        owner: None,
        http2: false,
    })
}

/// Whether what follows this response is another protocol.
fn is_upgrade(response: &Response, connect: bool) -> bool {
    let status = response.status();
    status == StatusCode::SWITCHING_PROTOCOLS || connect && status.is_success()
}

fn is_event_stream(response: &Response) -> bool {
    const EVENTS: &[u8] = b"text/event-stream";
    // Most bodies have a known length, and events have none. That is cheaper to ask than the header.
    if response.body().size_hint().exact().is_some() {
        return false;
    }
    let kind = response.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.as_bytes().get(..EVENTS.len()));
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS))
}

/// A response's body. One of server-sent events that ends while draining takes its connection along:
/// the client comes back, on the same connection if it can, and would be refused, which is final to
/// an `EventSource`; the head went out long ago and could not ask it to leave. Of other responses
/// the next request is refused in words, because it may be one that is not sent twice.
///
/// Over HTTP/2 what its peer has no window for stays in the server, after the stream's task has ended.
/// So each piece counts as a stream until the server drops it.
struct OwnedBody {
    inner: Body,
    owner: Option<Owner>,
    http2: bool,
}

/// A piece of a response.
struct Piece {
    bytes: Bytes,
    _counted: Option<Running>,
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, bytes: usize) {
        self.bytes.advance(bytes);
    }

    fn copy_to_bytes(&mut self, length: usize) -> Bytes {
        self.bytes.copy_to_bytes(length)
    }
}

impl OwnedBody {
    fn ended(&mut self) {
        let Some(owner) = self.owner.take() else {
            return;
        };
        if self.http2 || owner.phase() < Phase::Draining {
            return;
        }
        let sniffer = owner.0.sniffer.reads();
        tokio::spawn(async move {
            time::sleep(LINGER).await;
            // What has come meanwhile is answered.
            if owner.0.sniffer.reads() == sniffer {
                owner.0.state.instruct(Directive::Close);
            }
        });
    }
}

impl http_body::Body for OwnedBody {
    type Data = Piece;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        let frame = frame.map(|frame| {
            let counting = self.owner.as_ref().filter(|_| self.http2);
            frame.map(|frame| {
                frame.map_data(|bytes| Piece {
                    bytes,
                    _counted: counting.map(|owner| Running::new(owner.clone())),
                })
            })
        });
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

/// The timer for the reading of a request head over HTTP/1.
///
/// hyper starts it when it begins to wait for a head, which would close idle connections too: a
/// balancer that takes one up again at that moment loses a request. So this one stands still until
/// the head's first byte.
struct HeadTimer {
    owner: Owner,
    settings: Arc<Settings>,
}

impl Timer for HeadTimer {
    fn sleep(&self, _: Duration) -> Pin<Box<dyn Sleep>> {
        Box::pin(HeadTimeout {
            head: self.owner.0.sniffer.await_head(),
            owner: self.owner.clone(),
            settings: Arc::clone(&self.settings),
            sleep: None,
        })
    }

    fn sleep_until(&self, _: Instant) -> Pin<Box<dyn Sleep>> {
        self.sleep(Duration::ZERO)
    }

    fn now(&self) -> Instant {
        /// For a deadline that is not looked at.
        static ANY: LazyLock<Instant> = LazyLock::new(Instant::now);
        *ANY
    }
}

struct HeadTimeout {
    head: Awaited,
    owner: Owner,
    settings: Arc<Settings>,
    sleep: RareSleep,
}

impl Sleep for HeadTimeout {}

impl Future for HeadTimeout {
    type Output = ();

    /// Polled by hyper each time it has read and the head is not whole.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.owner
            .poll_head(this.head, &this.settings, &mut this.sleep, cx)
    }
}
