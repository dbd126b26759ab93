//! Tracking of connections that the user has accepted.

use super::{
    io::{GracefulIo, Linger},
    linger, socket,
};
use crate::{handle::graceful::Graceful, sync::Ordering};

impl Graceful {
    /// Tracks a connection that you accepted yourself, for a server on hyper or tonic. With axum's
    /// server use [`listener`](Self::listener) instead.
    ///
    /// The connection counts in [`connections`](Self::connections) until it is closed, and the service
    /// does not count as stopped before that. At the drain deadline its reads and writes fail. If it is
    /// a `TcpStream` on which something has been written, it is reset then, so that the peer does not
    /// take a partial response for a complete one, and the report names the peer. A type that wraps a
    /// `TcpStream` is not reset, and its peer is unknown unless it is [set](GracefulIo::set_peer).
    ///
    /// A `TcpStream` or `UnixStream` is closed as [`GracefulIo`] describes, so end the runtime only when
    /// [`run`](Self::run) has returned or [`stopped`](Self::stopped) has resolved; other IO is dropped. So with
    /// TLS, track the socket below TLS and not the TLS stream.
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # fn accepted(stream: tokio::net::TcpStream, graceful: &Graceful) {
    /// let io = graceful.track(stream); // AsyncRead + AsyncWrite, as the stream was
    /// # }
    /// ```
    ///
    /// tonic's own server gets connect info from its connections through a trait of tonic, which a
    /// newtype can implement:
    ///
    /// ```ignore
    /// # use std::{io, pin::Pin, task::{Context, Poll}};
    /// # use tokio::{io::{AsyncRead, AsyncWrite, ReadBuf}, net::TcpStream};
    /// use tonic::transport::server::{Connected, TcpConnectInfo};
    /// use tower_graceful::GracefulIo;
    ///
    /// struct Tracked(GracefulIo<TcpStream>);
    ///
    /// impl Connected for Tracked {
    ///     type ConnectInfo = TcpConnectInfo;
    ///
    ///     fn connect_info(&self) -> TcpConnectInfo {
    ///         self.0.get_ref().connect_info()
    ///     }
    /// }
    ///
    /// impl AsyncRead for Tracked {
    ///     fn poll_read(
    ///         mut self: Pin<&mut Self>,
    ///         cx: &mut Context<'_>,
    ///         buf: &mut ReadBuf<'_>,
    ///     ) -> Poll<io::Result<()>> {
    ///         Pin::new(&mut self.0).poll_read(cx, buf)
    ///     }
    /// }
    ///
    /// impl AsyncWrite for Tracked {
    ///     // Each method calls the same method of `self.0`.
    /// #   fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
    /// #       Pin::new(&mut self.0).poll_write(cx, buf)
    /// #   }
    /// #   fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
    /// #       Pin::new(&mut self.0).poll_flush(cx)
    /// #   }
    /// #   fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
    /// #       Pin::new(&mut self.0).poll_shutdown(cx)
    /// #   }
    /// }
    /// ```
    pub fn track<I: 'static>(&self, io: I) -> GracefulIo<I> {
        let peer = socket::tcp(&io).and_then(|tcp| tcp.peer_addr().ok());
        let linger = socket::is_socket(&io).then_some(linger::close_socket as Linger<I>);
        self.shared().tracks.store(true, Ordering::Relaxed);
        GracefulIo::new(self, io, peer, linger)
    }
}
