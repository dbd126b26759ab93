//! The input of the make-service of `serve`, and the apps that `serve` takes.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    net::SocketAddr,
    task::{Context, Poll},
};

use axum::{
    Router, extract::connect_info::Connected, handler::HandlerService, routing::MethodRouter,
    serve::Listener,
};
use tower_service::Service;

/// A connection that [`Graceful::serve`](crate::Graceful::serve) has accepted. `serve` passes it to the
/// make-service, as axum's server passes an [`IncomingStream`](axum::serve::IncomingStream), which only
/// axum can make.
///
/// For connect info of your own, implement [`Connected`] with it:
///
/// ```
/// use std::net::SocketAddr;
///
/// use axum::extract::connect_info::Connected;
/// use tokio::net::TcpListener;
/// use tower_graceful::Accepted;
///
/// #[derive(Clone)]
/// struct Peer {
///     address: SocketAddr,
///     nodelay: bool,
/// }
///
/// impl Connected<Accepted<'_, TcpListener>> for Peer {
///     fn connect_info(accepted: Accepted<'_, TcpListener>) -> Self {
///         Self {
///             address: *accepted.remote_addr(),
///             nodelay: accepted.io().nodelay().unwrap_or_default(),
///         }
///     }
/// }
/// ```
#[derive(Debug)]
pub struct Accepted<'a, L: Listener> {
    io: &'a L::Io,
    remote_addr: L::Addr,
}

impl<'a, L: Listener> Accepted<'a, L> {
    pub(super) fn new(io: &'a L::Io, remote_addr: L::Addr) -> Self {
        Self { io, remote_addr }
    }

    /// The IO, as the listener returned it.
    pub fn io(&self) -> &L::Io {
        self.io
    }

    /// The peer's address.
    pub fn remote_addr(&self) -> &L::Addr {
        &self.remote_addr
    }
}

/// For `into_make_service_with_connect_info::<SocketAddr>()`.
impl<L: Listener<Addr = Self>> Connected<Accepted<'_, L>> for SocketAddr {
    fn connect_info(accepted: Accepted<'_, L>) -> Self {
        accepted.remote_addr
    }
}

/// Implements the make-service trait for a type that serves every connection with a clone of itself. axum
/// does the same for its own `IncomingStream`.
macro_rules! serve_on_every_connection {
    ([$($generics:ident),*], $service:ty, |$this:ident| $clone:expr) => {
        impl<L: Listener, $($generics: Clone),*> Service<Accepted<'_, L>> for $service {
            type Response = Self;
            type Error = Infallible;
            type Future = Ready<Result<Self, Infallible>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, _: Accepted<'_, L>) -> Self::Future {
                let $this = self;
                ready(Ok($clone))
            }
        }
    };
}

// `with_state` prepares the routes once for each connection, and not again for each request.
serve_on_every_connection!([], Router, |this| this.clone().with_state(()));
serve_on_every_connection!([], MethodRouter, |this| this.clone().with_state(()));
serve_on_every_connection!([H, T, S], HandlerService<H, T, S>, |this| this.clone());
