//! One connection of `serve`: GOAWAY, slots of the spread, head timeouts, and the end of its streams.
//! These need the HTTP connection itself, which only `serve` owns.

mod body;
mod head_timer;
mod owner;
mod service;
mod tunnel;

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{extract::Request, response::Response};
use hyper::rt::Executor;
use hyper_util::{rt::TokioIo, server::conn::auto, service::TowerToHyperService};
use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tower_service::Service;

use self::{
    head_timer::{HeadTimeout, HeadTimer},
    owner::{OpenStream, Owner, RareSleep},
    service::Owned,
    tunnel::Tunnel,
};
use super::{
    io::GracefulIo,
    settings::{Settings, Versions},
};
use crate::{
    connection::{
        directive::Directive,
        flags::CLOSE_NOTICED,
        wakers::{RegisteredWaker, WakerSlot},
    },
    phase::Phase,
};

/// Serves HTTP/1 and HTTP/2 on a connection until it closes or is cut.
///
/// The peer is asked to leave when the slot of the connection is reached: over HTTP/2 by GOAWAY, which
/// loses no request; over HTTP/1 by the `Connection: close` header of a response. An idle HTTP/1
/// connection is closed only when all connections are, because a request may be in transit. There are two
/// exceptions: a connection whose event stream has ended while the service drains, and idle connections
/// while a listener waits for file descriptors.
///
/// `running` is dropped with the returned future.
pub(super) fn serve<I, S>(
    mut io: GracefulIo<I>,
    service: S,
    settings: &Arc<Settings>,
    running: mpsc::Sender<Infallible>,
) -> Serving<I, S>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let owner = Owner(io.begin_serving());
    if owner.phase() > Phase::Serving {
        owner.0.sniffer.mark_joined_during_stop();
    }
    if settings.versions == Versions::Http1 {
        owner.0.sniffer.refuse_http2();
    }
    let mut http = auto::Builder::new(Streams(owner.clone()));
    // hyper requires a duration here, which `HeadTimer` ignores.
    http.http1()
        .timer(HeadTimer(owner.clone()))
        .header_read_timeout(Duration::from_secs(1));
    settings.apply(&mut http);
    let service = Owned {
        inner: TowerToHyperService::new(service),
        owner: owner.clone(),
        half_close: settings.half_close,
        http2_only: settings.versions == Versions::Http2,
    };
    let connection = http.serve_connection_with_upgrades(TokioIo::new(io), service);
    Serving {
        // `into_owned` copies the builder, so that the future is `'static`. hyper-util keeps the copy only
        // until the version is known.
        connection: Some(connection.into_owned()),
        owner,
        settings: Arc::clone(settings),
        waker: RegisteredWaker::default(),
        head: HeadTimeout::default(),
        slot: None,
        asked: Directive::Stay,
        running,
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
        head: HeadTimeout,
        slot: RareSleep,
        asked: Directive,
        running: mpsc::Sender<Infallible>,
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
        state.owner_left(cx);
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
        sniffer.begin_poll();
        loop {
            // Polled before the directive is obeyed, because requests that have arrived are answered.
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let timeout = this.settings.header_read_timeout;
            if this.head.poll(sniffer, timeout, cx).is_ready() {
                return Poll::Ready(());
            }
            let leaves = match directive {
                Directive::Stay | Directive::Stopping => false,
                Directive::LeaveInSlot => {
                    sniffer.is_http2() && this.owner.poll_slot(this.slot, cx).is_ready()
                }
                Directive::Leave | Directive::Read => sniffer.is_http2(),
                Directive::Close | Directive::Expire | Directive::Cut => true,
            };
            // hyper may drop what it has when it is told to close an HTTP/1 connection: the rest of a response, of
            // an upload that is read on after its response, a request behind another, the head of an upgrade. Not
            // while it waits for a request, unless the connection has asked for an upgrade, and the last response
            // is not written yet. Each of these ends wakes this task.
            let at_rest = || sniffer.awaits_head() && !this.owner.0.is_torn_by_close();
            let leaves = leaves && (sniffer.is_http2() || at_rest());
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

/// Spawns the tasks of an HTTP/2 connection for hyper: one for each stream, and one more for each tunnel.
#[derive(Clone)]
struct Streams(Owner);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let open = OpenStream::new(self.0.clone());
        match Tunnel::begin(&self.0) {
            None => drop(tokio::spawn(Stream {
                running: stream,
                _open: open,
            })),
            Some(tunnel) => spawn_tunnel(Box::pin(stream), tunnel, open),
        }
    }
}

/// Boxed, because few streams are tunnels.
#[cold]
fn spawn_tunnel(
    stream: Pin<Box<dyn Future<Output = ()> + Send>>,
    tunnel: Tunnel,
    open: OpenStream,
) {
    tokio::spawn(async move {
        stream.await;
        drop(tunnel);
        drop(open);
    });
}

pin_project! {
    /// The task of one HTTP/2 stream. Not an `async` block, which would be twice as large and be copied with
    /// each stream.
    struct Stream<F> {
        #[pin]
        running: F,
        // Dropped after the stream.
        _open: OpenStream,
    }
}

impl<F: Future<Output = ()>> Future for Stream<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.project().running.poll(cx)
    }
}
