//! `Graceful::serve`: the server of this crate, which owns its connections, and its settings.
//!
//! Most of this file is documentation of public items.

use std::{
    convert::Infallible,
    fmt,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{extract::Request, response::Response, serve::Listener};
use tower_service::Service;

use super::{
    accept::{self, Source},
    accepted::Accepted,
    settings::{Settings, Versions},
};
use crate::{handle::graceful::Graceful, report::Report};

impl Graceful {
    /// Serves `app` on `listener` over HTTP/1 and HTTP/2 until the service has stopped, and returns the
    /// [`Report`]. SIGTERM and SIGINT stop the service, as with [`drain`](Self::drain).
    ///
    /// `app` may be anything that axum's `serve` takes: a `Router`, a `MethodRouter`, a handler, or a
    /// make-service, with or without connect info. A make-service is called for one connection after another;
    /// while one call waits, the server accepts nothing, and the listener does not close. Connect info of your own is made from an
    /// [`Accepted`]. `listener` may be any listener of axum, see [`listener`](Self::listener). For TLS,
    /// or anything else that comes before HTTP, pass
    /// [`graceful.listener(tcp).handshakes(…)`](crate::HandshakeExt::handshakes). Connections of these
    /// listeners are not tracked twice. A listener of your own must not [`track`](Self::track) its
    /// connections.
    ///
    /// The call installs the signal handlers and returns a [`Serve`], which has the settings of the
    /// server. Accepting begins when the `Serve` is awaited. To pass it to `tokio::spawn` or
    /// `tokio::select!`, call [`into_future`](IntoFuture::into_future) on it.
    ///
    /// ```no_run
    /// use axum::{Router, routing::get};
    /// use tower_graceful::GracefulLayer;
    ///
    /// #[tokio::main]
    /// async fn main() -> Result<std::process::ExitCode, Box<dyn std::error::Error>> {
    ///     let layer = GracefulLayer::new();
    ///     let graceful = layer.handle();
    ///     let app = Router::new()
    ///         .route("/", get(|| async { "hello" }))
    ///         .layer(layer);
    ///     let app = graceful.probes().merge(app);
    ///     let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    ///     Ok(graceful.serve(listener, app).await.into())
    /// }
    /// ```
    ///
    /// # How it differs from axum's `serve`
    ///
    /// It does the same as axum's `serve` with [`listener`](Self::listener), [`drain`](Self::drain) and
    /// [`run`](Self::run). Because it owns its connections, it does more:
    ///
    /// - It asks HTTP/2 peers to leave by GOAWAY
    ///   ([RFC 9113 §6.8](https://www.rfc-editor.org/rfc/rfc9113#section-6.8)). A peer that connected
    ///   before the lame-duck phase gets it with its next response in that phase. When the phase ends, the
    ///   remaining peers get it, also those that connected during the phase, and so do peers that connect
    ///   later while the listener is still open.
    /// - If server-sent events end on an HTTP/1 connection while the service drains, it closes the
    ///   connection 25 ms later, unless another request has arrived on it. Otherwise the `EventSource`
    ///   would reconnect on the same connection and be refused, and it does not reconnect after a refusal.
    /// - [`close_spread`](crate::GracefulBuilder::close_spread) gives each connection a slot, and not each
    ///   response.
    /// - It closes an HTTP/1 connection if a request head does not arrive within
    ///   [`header_read_timeout`](Serve::header_read_timeout). Idle connections stay open.
    /// - At the drain deadline it drops the handlers with their connections, whatever they wait for.
    ///
    /// # Many routes and many connections
    ///
    /// As with axum's `serve`, each connection gets a copy of a `Router`: some 400 bytes for each route, and 30
    /// more for each layer on it. 100 routes take about 40 KB for each connection. If the memory matters, pass
    /// `app.into_make_service()`: then all connections share the routes. They also share the reference count
    /// of the routes, which each request changes.
    pub fn serve<L, M, S>(&self, listener: L, app: M) -> Serve<L, M, S>
    where
        L: Listener,
        M: for<'a> Service<Accepted<'a, L>, Error = Infallible, Response = S> + Send + 'static,
        for<'a> <M as Service<Accepted<'a, L>>>::Future: Send,
        S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        self.handle_signals_or_log();
        Serve {
            source: Source::new(self, listener),
            app,
            settings: Settings::new(self.shared().policy()),
            graceful: self.clone(),
            service: PhantomData,
        }
    }
}

/// A configured server that is not running yet. Made by [`Graceful::serve`].
///
/// Awaiting it runs the server until the service has stopped, and returns the [`Report`]. The
/// methods change the HTTP settings of this server only: two servers of one [`Graceful`] may differ.
/// Each setting has a default.
///
/// ```no_run
/// use std::time::Duration;
/// # use axum::Router;
/// # use tower_graceful::Graceful;
/// # #[tokio::main]
/// # async fn main() -> std::io::Result<std::process::ExitCode> {
/// # let (graceful, app) = (Graceful::new(), Router::new());
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
/// let report = graceful
///     .serve(listener, app)
///     .header_read_timeout(Duration::from_secs(10))
///     .http2_keep_alive_interval(Duration::from_secs(60))
///     .await;
/// # Ok(report.into())
/// # }
/// ```
///
/// Every value of a setting is accepted. Each method documents the meaning of zero and of
/// `Duration::MAX`.
///
/// For other settings of hyper, use a server of your own: see
/// [`Graceful::track`] and [`Graceful::run`].
#[must_use = "a server does nothing until it is awaited"]
pub struct Serve<L: Listener, M, S> {
    source: Source<L>,
    app: M,
    settings: Settings,
    graceful: Graceful,
    service: PhantomData<fn() -> S>,
}

impl<L: Listener, M, S> Serve<L, M, S> {
    /// How long a request head over HTTP/1 may take to arrive, from its first byte to its last,
    /// before the connection is closed. Default: the value of the
    /// [builder](crate::GracefulBuilder::header_read_timeout), which is 30 s unless it is set.
    ///
    /// If the first bytes of a head arrive together with the previous request, the time runs from the end
    /// of the response to that request. A few empty lines between requests do not begin a head
    /// ([RFC 9112 §2.2](https://www.rfc-editor.org/rfc/rfc9112#section-2.2)). Very many do, because hyper
    /// keeps them until a head follows: 1 KB of them, or 15 that arrive separately.
    ///
    /// `Duration::MAX` means no timeout. Zero closes every connection whose request head does not
    /// arrive in one piece. The resolution is 1 ms.
    ///
    /// The timeout does not limit how long a connection may be idle. axum's own server has no such
    /// setting, and waits for the rest of a head without limit.
    pub fn header_read_timeout(mut self, timeout: Duration) -> Self {
        self.settings.header_read_timeout = timeout;
        self
    }

    /// Whether to answer an HTTP/1 client that closes its writing side after a whole request and
    /// before the response, as `nc -N`, `socat` and some health checks and proxies do
    /// ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)). Default: the value of the
    /// [builder](crate::GracefulBuilder::half_close), which is false unless it is set, as in hyper and
    /// axum.
    ///
    /// A client that closes its writing side and a client that closes its connection send the same
    /// FIN, so each choice has a cost:
    ///
    /// - True: the FIN is ignored until the response is written, while serving and while draining. A
    ///   reset (RST) is not noticed before that either. The handler of a client that has left runs to its
    ///   end, and a drain waits for it. Where handlers are long or expensive, put a timeout on them.
    /// - False: the FIN drops the handler at once, and the client gets no response. During a
    ///   shutdown the dropped request is reported in
    ///   [`Remaining::half_closed`](crate::Remaining::half_closed), and the outcome is
    ///   [`Forced`](crate::Outcome::Forced), because the client may have waited. If the response has begun, its
    ///   body is dropped, and the request counts as finished: a client that leaves an event stream or stops a
    ///   download sends the same FIN. While bytes of a
    ///   response wait for the client to take them, the server does not see the FIN. So a client that has sent
    ///   FIN still receives the whole of a finished response. The same holds on axum's server with a tracked
    ///   listener.
    ///
    /// HTTP/2 has no such ambiguity, and the setting does not apply to it. axum's own server has no
    /// such setting and drops the handler.
    pub fn half_close(mut self, answer: bool) -> Self {
        self.settings.half_close = answer;
        self
    }

    /// The time without any data from the peer after which the server sends a PING on an HTTP/2 connection
    /// ([RFC 9113 §6.7](https://www.rfc-editor.org/rfc/rfc9113#section-6.7)). Default: no PING is
    /// sent.
    ///
    /// If the peer does not acknowledge within
    /// [`http2_keep_alive_timeout`](Self::http2_keep_alive_timeout), the connection is closed and its
    /// handlers are dropped. Use it if peers may disappear without closing their connections:
    /// machines that are switched off, mobile clients, NAT and firewalls that drop the state of a
    /// connection. Without it, such a connection stays open until TCP times out, which never happens on
    /// an idle connection. If the server waits to send on a connection, the PING cannot be sent either: the
    /// handlers are dropped, but the connection stays open until TCP times out.
    ///
    /// Each idle connection costs a PING and its acknowledgement in each interval. If the
    /// interval is zero, or 30 years or more, no PING is sent. HTTP/1 has no PING.
    pub fn http2_keep_alive_interval(mut self, interval: Duration) -> Self {
        self.settings.keep_alive_interval = interval;
        self
    }

    /// How long a peer may take to acknowledge the PING of
    /// [`http2_keep_alive_interval`](Self::http2_keep_alive_interval) before its connection is
    /// closed. Default: 20 s, as in hyper. It has no effect without an interval.
    ///
    /// `Duration::MAX` closes no connection. Zero closes each connection at its first PING, even if the
    /// peer is alive. Choose a value above the round trip time of your slowest clients.
    pub fn http2_keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.settings.keep_alive_timeout = timeout;
        self
    }

    /// How many requests a peer may have open at once on one HTTP/2 connection
    /// ([RFC 9113 §5.1.2](https://www.rfc-editor.org/rfc/rfc9113#section-5.1.2)). Default: 200, as in
    /// hyper. Further requests wait in the client, or are refused with `REFUSED_STREAM`.
    ///
    /// The limit holds for each connection.
    /// [`max_in_flight`](crate::GracefulBuilder::max_in_flight) is the limit for the whole service. With a
    /// limit above 254: a connection that has had more than 254 request bodies open at once does not expire
    /// during a stop. If its peer has vanished, it is cut at the drain deadline.
    /// Zero counts as 1, because a client that may not open a stream would wait forever.
    pub fn http2_max_concurrent_streams(mut self, streams: u32) -> Self {
        self.settings.max_concurrent_streams = Some(streams.max(1));
        self
    }

    /// Serves HTTP/1 only. Default: the first bytes of a connection tell HTTP/1 from HTTP/2.
    ///
    /// A connection that begins with the preface of HTTP/2
    /// ([RFC 9113 §3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)) is closed without a
    /// response, and no frame on it is read. Behind TLS, offer `http/1.1` alone in ALPN, so that
    /// clients do not try HTTP/2.
    ///
    /// Of `http1_only` and [`http2_only`](Self::http2_only) the one that is called last takes effect.
    pub fn http1_only(mut self) -> Self {
        self.settings.versions = Versions::Http1;
        self
    }

    /// Serves HTTP/2 only. Default: the first bytes of a connection tell HTTP/1 from HTTP/2.
    ///
    /// A request over HTTP/1 is answered `505 HTTP Version Not Supported`
    /// ([RFC 9110 §15.6.6](https://www.rfc-editor.org/rfc/rfc9110#section-15.6.6)) with
    /// `Connection: close`. Neither `app` nor its layers see it, so probes over HTTP/1, such as
    /// those of Kubernetes, need a server of their own. Behind TLS, offer `h2` alone in ALPN.
    ///
    /// If both [`http1_only`](Self::http1_only) and `http2_only` are called, the last call takes effect.
    pub fn http2_only(mut self) -> Self {
        self.settings.versions = Versions::Http2;
        self
    }
}

impl<L, M, S> IntoFuture for Serve<L, M, S>
where
    L: Listener,
    M: for<'a> Service<Accepted<'a, L>, Error = Infallible, Response = S> + Send + 'static,
    for<'a> <M as Service<Accepted<'a, L>>>::Future: Send,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Output = Report;
    type IntoFuture = ServeFuture;

    fn into_future(self) -> ServeFuture {
        let Self {
            source,
            app,
            settings,
            graceful,
            service: _,
        } = self;
        let server = accept::accept(source, app, Arc::new(settings), graceful.clone());
        ServeFuture(Box::pin(graceful.run(server)))
    }
}

impl<L: Listener, M, S> fmt::Debug for Serve<L, M, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve")
            .field("settings", &self.settings)
            .field("graceful", &self.graceful)
            .finish_non_exhaustive()
    }
}

/// A running server: resolves to the [`Report`] when the service has stopped. Made from a [`Serve`]
/// by `await` or by [`into_future`](IntoFuture::into_future).
///
/// Dropping it closes the listener and aborts the connections. Upgraded connections belong to their
/// handlers: they stay open until the handlers drop them, or until the cut.
///
/// ```no_run
/// # use axum::Router;
/// # use tower_graceful::Graceful;
/// # #[tokio::main]
/// # async fn main() -> std::io::Result<()> {
/// # let (graceful, app) = (Graceful::new(), Router::new());
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
/// let server = tokio::spawn(graceful.serve(listener, app).into_future());
/// # Ok(())
/// # }
/// ```
///
/// # Panics
///
/// When it is polled outside a tokio runtime.
#[must_use = "futures do nothing unless polled"]
pub struct ServeFuture(Pin<Box<dyn Future<Output = Report> + Send>>);

impl Future for ServeFuture {
    type Output = Report;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Report> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for ServeFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServeFuture").finish_non_exhaustive()
    }
}
