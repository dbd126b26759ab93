//! One connection of `serve`: GOAWAY, slots of the spread, head timeouts, and the end of its streams.
//! These need the HTTP connection itself, which only `serve` owns.

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
        table::{CLOSE_NOTICED, OWES_NOTHING, OWNED, RESPONDED, UPGRADES, WATCHED},
    },
    middleware::{connection_close, peer::TrackedPeer},
    phase::Phase,
    shutdown::step::LINGER,
};

/// Serves HTTP/1 and HTTP/2 on a connection until it closes or is cut.
///
/// The peer is asked to leave when the slot of the connection is reached: over HTTP/2 by GOAWAY, which
/// loses no request; over HTTP/1 by the `Connection: close` header of a response. An idle HTTP/1
/// connection is closed only when all connections are, because a request may be in transit. There are two
/// exceptions: a connection whose event stream has ended while the service drains, and idle connections
/// while a listener waits for file descriptors.
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
    let owner = Owner(io.begin_serving());
    owner.0.flags.set(OWNED);
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
    // hyper requires a duration here. `HeadTimer` ignores it and uses the one in the settings.
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
        // `into_owned` copies the builder, so that the future is `'static`. hyper-util keeps the copy only
        // until the version is known.
        connection: Some(connection.into_owned()),
        owner,
        settings: Arc::clone(settings),
        waker: RegisteredWaker::default(),
        opening: None,
        opened: false,
        slot: None,
        asked: Directive::Stay,
    }
}

pin_project! {
    /// The future of one connection. Not an `async fn`, whose future would also store its arguments.
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
        waker: RegisteredWaker,
        // The head timeout until the protocol is known. After that hyper's timer keeps it for HTTP/1.
        opening: RareSleep,
        opened: bool,
        slot: RareSleep,
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
            self.owner.0.flags.set(CLOSE_NOTICED);
            self.as_mut().project().connection.set(None);
        }
        let this = self.project();
        let state = &this.owner.0.state;
        // The streams of HTTP/2 run in their own tasks, and this future ends after the last of them.
        ready!(state.poll_streams_ended(this.waker, cx));
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
        let directive = this.owner.0.state.enter(this.waker, WakerSlot::Owner, cx);
        let Some(mut connection) = this.connection.as_mut().as_pin_mut() else {
            return Poll::Ready(());
        };
        if directive == Directive::Cut {
            return Poll::Ready(());
        }
        loop {
            // Polled before the directive is obeyed, because requests that have arrived are answered.
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
            let leaves = match directive {
                Directive::Stay | Directive::Stopping => false,
                Directive::LeaveInSlot => {
                    sniffer.is_http2() && this.owner.poll_slot(this.slot, cx).is_ready()
                }
                Directive::Leave => sniffer.is_http2(),
                Directive::Close | Directive::Expire | Directive::Cut => true,
            };
            if !leaves || *this.asked == directive {
                if directive >= Directive::Close {
                    this.owner.0.flags.set(CLOSE_NOTICED);
                }
                return Poll::Pending;
            }
            *this.asked = directive;
            connection.as_mut().graceful_shutdown();
        }
    }
}

/// Spawns the tasks of an HTTP/2 connection for hyper: one for each stream.
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

/// Counts the task of a stream, or a piece of a response body, until it is dropped.
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

/// A watched connection opens a window for each request within its first `FIRST_READS` reads. Later it
/// opens one only for a request whose read has a number that is a multiple of `EVERY_READS`.
const FIRST_READS: u32 = 32;
const EVERY_READS: u32 = 256;

/// Boxed to keep connections small: most never need the timer, and there may be very many.
type RareSleep = Option<Pin<Box<time::Sleep>>>;

/// What a connection and its requests share.
#[derive(Clone)]
struct Owner(Arc<ConnectionEntry>);

impl Owner {
    fn phase(&self) -> Phase {
        self.0.owner.phase()
    }

    /// When the slot of this connection is reached.
    fn slot_time(&self) -> time::Instant {
        self.0.owner.slot_time(self.0.place)
    }

    fn poll_slot(&self, sleep: &mut RareSleep, cx: &mut Context<'_>) -> Poll<()> {
        let sleep = sleep.get_or_insert_with(|| Box::pin(time::sleep_until(self.slot_time())));
        sleep.as_mut().poll(cx)
    }

    /// Ready when the awaited head has begun and has not been completed within the timeout.
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

    /// Whether connections are asked to leave one after another in this phase.
    fn is_spread(&self, phase: Phase) -> bool {
        phase == Phase::LameDuck && self.0.owner.policy.is_spread()
    }

    /// Counts an HTTP/1 request that was dropped without a response because its client has closed its
    /// writing side: the client may have waited for the response. Counts only while the service stops, and
    /// not after the cut: cut connections are reported as such.
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

    /// Opens a window to check whether the layer sees this request: for the first requests of a
    /// connection, and then for one in many.
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

    /// Closes the window of a request with its response. A failed gRPC call is not evaluated,
    /// like a response with an error status.
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

    /// Records that a request asks for an upgrade. Not over HTTP/2, where a tunnel is one stream of many
    /// and the connection itself is not upgraded.
    #[cold]
    fn asks_for_upgrade<B>(&self, request: &http::Request<B>) {
        if request.version() < Version::HTTP_2 {
            let path = match request.uri().path() {
                // The target of a `CONNECT` is a host and has no path.
                "" => &*request.uri().to_string(),
                path => path,
            };
            self.0.flags.set(UPGRADES);
            let upgraded = &self.0.owner.upgraded;
            upgraded.asked(self.0.number(), path, self.0.peer());
        }
    }

    /// Records that the connection speaks another protocol from now on.
    #[cold]
    fn upgraded(&self) {
        self.0.sniffer.upgraded();
        self.0.upgraded();
    }

    /// Asks the peer to leave with this response, if the slot of the connection has been reached.
    #[cold]
    fn ask_to_leave(&self, response: &mut Response, version: Version, phase: Phase) {
        self.0.flags.set(RESPONDED);
        let http2 = version == Version::HTTP_2;
        if self.is_spread(phase) {
            if time::Instant::now() < self.slot_time() {
                if http2 {
                    // The connection may have been opened after the others were instructed.
                    self.0.state.instruct(Directive::LeaveInSlot);
                }
                return;
            }
        } else if http2
            && self.0.sniffer.joined_during_stop()
            && phase == Phase::LameDuck
            && !self.0.owner.connections.asks_all()
        {
            // The client connected although the service is stopping, so it may know no other server. It
            // would reconnect here, and be asked to leave again with each request.
            return;
        }
        connection_close::say_close(response, version);
        if http2 {
            self.0.state.instruct(Directive::Leave);
        }
    }
}

/// A service whose responses ask the peer to leave when it is due.
///
/// It implements hyper's `Service` and not tower's. hyper calls its own service as soon as it has read a
/// request head. A tower service would be called only when the response is polled, which never happens
/// if the client has closed its writing side by then.
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
        // hyper inserts an extension only for a request that may become an upgrade.
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
        // `None` for an HTTP/1 request to a server that speaks HTTP/2 only.
        #[pin]
        inner: Option<F>,
        version: Version,
        connect: bool,
        // An HTTP/1 request that arrived while requests were admitted, and that a FIN of its client drops.
        is_lost_by_fin: bool,
        // Checks whether the layer sees the request.
        window: Option<Window>,
        // Moves to the body.
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
            let slot_reached = time::Instant::now() >= owner.slot_time();
            SLOT_REACHED.sync_scope(slot_reached, || inner.poll(cx))
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
        let http2 = *this.version == Version::HTTP_2;
        let reconnects = *this.version < Version::HTTP_2 && is_event_stream(&response);
        let owner = this.owner.take().filter(|_| reconnects || http2);
        Poll::Ready(Ok(response.map(|inner| OwnedBody {
            inner,
            owner,
            http2,
        })))
    }
}

/// The response to an HTTP/1 client of a server that speaks HTTP/2 only
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

/// Whether the connection speaks another protocol after this response.
fn is_upgrade(response: &Response, connect: bool) -> bool {
    let status = response.status();
    status == StatusCode::SWITCHING_PROTOCOLS || connect && status.is_success()
}

fn is_event_stream(response: &Response) -> bool {
    const EVENTS: &[u8] = b"text/event-stream";
    // An event stream has no known length, and most other bodies have one. This check is cheaper than
    // the search for the header.
    if response.body().size_hint().exact().is_some() {
        return false;
    }
    let kind = response.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.as_bytes().get(..EVENTS.len()));
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case(EVENTS))
}

/// The body of a response.
///
/// When an HTTP/1 body of server-sent events ends while the service drains, its connection is closed.
/// Otherwise the client would reconnect on the same connection and be refused, and an `EventSource`
/// does not reconnect after a refusal. The head of the response was sent too early to ask the client to
/// leave. After other responses the connection stays open, and the next request on it is refused with a
/// 503: a client may not repeat a request, such as a `POST`, that is lost with its connection.
///
/// Over HTTP/2, pieces for which the peer has no window stay in the server after the task of the stream
/// has ended. So each piece counts as a stream until the server drops it.
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
        let reads = owner.0.sniffer.reads();
        tokio::spawn(async move {
            time::sleep(LINGER).await;
            // A request that has arrived in the meantime is answered instead.
            if owner.0.sniffer.reads() == reads {
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
/// hyper starts the timer when it begins to wait for a head. That would close idle connections too, and
/// a load balancer that reuses one at that moment would lose a request. So this timer runs only from the
/// first byte of the head.
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
        /// hyper computes a deadline from it, which `sleep_until` ignores.
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

    /// hyper polls this after each read that leaves the head incomplete.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.owner
            .poll_head(this.head, &this.settings, &mut this.sleep, cx)
    }
}
