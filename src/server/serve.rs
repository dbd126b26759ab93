//! The server whose connections are ours.

use std::{any::Any, convert::Infallible, future::poll_fn, pin::pin, ptr};

use axum::{extract::Request, response::Response, serve::Listener};
use tokio::task::JoinSet;
use tower_service::Service;

use super::{accepted::Accepted, connection, io::GracefulIo, listener::GracefulListener, tracked};
use crate::{handle::graceful::Graceful, report::Report, shutdown::state::ClosingStage};

impl Graceful {
    /// Serves `app` on `listener` over HTTP/1 and HTTP/2 until the service has stopped, and
    /// reports. SIGTERM or SIGINT stop it, as with [`drain`](Self::drain).
    ///
    /// `app` is whatever axum's `serve` takes: a `Router`, a `MethodRouter`, a handler, a
    /// make-service, with or without connect info; connect info of your own is made from an
    /// [`Accepted`]. `listener` is any of axum's, see [`listener`](Self::listener). For TLS, or anything
    /// else that comes before HTTP, it is
    /// [`graceful.listener(tcp).handshakes(…)`](crate::HandshakeExt::handshakes): what is tracked already
    /// is not tracked again.
    ///
    /// It does what axum's `serve` does with [`listener`](Self::listener), [`drain`](Self::drain)
    /// and [`run`](Self::run), and what only the owner of a connection can do besides:
    ///
    /// - peers that speak HTTP/2 are asked to leave by GOAWAY
    ///   ([RFC 9113 §6.8](https://www.rfc-editor.org/rfc/rfc9113#section-6.8)): with their next
    ///   response in the lame-duck phase; when draining starts the rest, and who has connected
    ///   since, although the listener stays open;
    /// - over HTTP/1, where server-sent events end while the service drains their connection is
    ///   closed 25 ms later, if nothing has come on it: the client comes back, and to an
    ///   `EventSource` a refusal would be final;
    /// - [`close_spread`](crate::GracefulBuilder::close_spread) is kept for each connection;
    /// - a request head over HTTP/1 that does not arrive within
    ///   [`header_read_timeout`](crate::GracefulBuilder::header_read_timeout) closes its
    ///   connection. Idle connections stay;
    /// - at the drain deadline the handlers are dropped with their connections, whatever they wait
    ///   for.
    ///
    /// The signal handlers are installed by this call; the listening begins when the future is
    /// polled. Dropping the future closes the listener and aborts the connections; those that are
    /// upgraded belong to their handlers, and stay until the service stops.
    ///
    /// ```no_run
    /// use axum::{Router, routing::get};
    /// use tower_graceful::GracefulLayer;
    ///
    /// #[tokio::main]
    /// async fn main() -> std::io::Result<std::process::ExitCode> {
    ///     let layer = GracefulLayer::new();
    ///     let graceful = layer.handle();
    ///     let app = Router::new()
    ///         .route("/", get(|| async { "hello" }))
    ///         .layer(layer)
    ///         .merge(graceful.probes());
    ///     let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    ///     Ok(graceful.serve(listener, app).await.into())
    /// }
    /// ```
    ///
    /// # Panics
    ///
    /// The future, when it is polled outside a runtime.
    pub fn serve<L, M, S>(
        &self,
        listener: L,
        app: M,
    ) -> impl Future<Output = Report> + Send + use<L, M, S>
    where
        L: Listener,
        M: for<'a> Service<Accepted<'a, L>, Error = Infallible, Response = S> + Send + 'static,
        for<'a> <M as Service<Accepted<'a, L>>>::Future: Send,
        S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        self.handle_signals_or_log();
        let graceful = self.clone();
        let source = Source::new(&graceful, listener);
        async move { graceful.run(accept(source, app, graceful.clone())).await }
    }
}

/// Where connections come from.
enum Source<L: Listener> {
    Untracked(GracefulListener<L>),
    /// The listener's connections are tracked already.
    Tracked(L, tracked::Find),
}

impl<L: Listener> Source<L> {
    fn new(graceful: &Graceful, listener: L) -> Self {
        match tracked::find::<L::Io>() {
            Some(find) => Self::Tracked(listener, find),
            None => Self::Untracked(GracefulListener::within(graceful.clone(), listener)),
        }
    }

    async fn accept(&mut self, graceful: &Graceful) -> (GracefulIo<L::Io>, L::Addr) {
        match self {
            Self::Untracked(listener) => listener.accept().await,
            Self::Tracked(listener, find) => {
                let (io, addr) = listener.accept().await;
                let io = match find(&io) {
                    // The server reads what the handshake, if any, has made of it.
                    Some(line)
                        if ptr::eq(&raw const *line.owner, &raw const **graceful.shared()) =>
                    {
                        GracefulIo::above(io, &line)
                    }
                    // By another lifecycle, or none.
                    _ => {
                        let peer = (&addr as &dyn Any).downcast_ref().copied();
                        GracefulIo::new(graceful, io, peer, None)
                    }
                };
                (io, addr)
            }
        }
    }
}

/// Serves every connection until the connections are to be closed, and then until they are.
async fn accept<L, M, S>(mut listener: Source<L>, mut app: M, graceful: Graceful)
where
    L: Listener,
    M: for<'a> Service<Accepted<'a, L>, Error = Infallible, Response = S> + Send + 'static,
    for<'a> <M as Service<Accepted<'a, L>>>::Future: Send,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let mut closing_stages = graceful.shared().closing_stages();
    let mut told_to_close = pin!(async move {
        let _ = closing_stages
            .wait_for(|closing_stage| *closing_stage >= ClosingStage::Connections)
            .await;
    });
    let mut connections = JoinSet::new();
    'accepting: loop {
        let (io, remote_addr) = {
            // One that has begun is not dropped for anything but the end: a listener may be in the
            // middle of a handshake.
            let mut accept = pin!(listener.accept(&graceful));
            loop {
                tokio::select! {
                    accepted = &mut accept => break accepted,
                    // One that has panicked took nothing but itself.
                    Some(_) = connections.join_next() => {}
                    () = &mut told_to_close => break 'accepting,
                }
            }
        };
        let Ok(()) = poll_fn(|cx| app.poll_ready(cx)).await;
        let Ok(service) = app.call(Accepted::new(io.get_ref(), remote_addr)).await;
        connections.spawn(connection::serve(io, service));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}
