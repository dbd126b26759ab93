use std::{convert::Infallible, fmt};

use axum::{
    extract::Request,
    response::Response,
    serve::{IncomingStream, Listener},
};
use tower_service::Service;

use super::listener::TrackedListener;
use crate::{handle::Graceful, report::Report};

impl Graceful {
    /// Serves `app` on `listener` until the service has stopped, and reports: axum's `serve` with
    /// the connections [tracked](Self::listener), [`drain`](Self::drain) as its shutdown signal,
    /// and [`run`](Self::run) around it.
    ///
    /// `app` is whatever axum's `serve` takes: a `Router`, a make-service, with or without connect
    /// info. The signal handlers are installed by this call; the listening begins when the future
    /// is polled.
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
    /// As [`drain`](Self::drain); and the future, when it is polled outside a runtime.
    pub fn serve<L, M, S>(
        &self,
        listener: L,
        app: M,
    ) -> impl Future<Output = Report> + Send + use<L, M, S>
    where
        L: Listener,
        L::Addr: fmt::Debug,
        M: for<'a> Service<
                IncomingStream<'a, TrackedListener<L>>,
                Error = Infallible,
                Response = S,
            > + Send
            + 'static,
        for<'a> <M as Service<IncomingStream<'a, TrackedListener<L>>>>::Future: Send,
        S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let server = axum::serve(self.listener(listener), app).with_graceful_shutdown(self.drain());
        self.run(server)
    }
}
