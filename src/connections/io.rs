use std::{
    any::Any,
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::Line;
use crate::{
    handle::Graceful,
    notice::{Stored, Told, Waiter},
    phase::Phase,
};

impl Graceful {
    /// Tracks a connection that you accepted yourself, for a server on hyper or tonic: it counts
    /// in [`connections`](Self::connections) until the returned IO is dropped, the service does
    /// not count as stopped before that, and at the drain deadline its reads and writes fail. A
    /// `TcpStream` on which something has been written is then reset, so that no half response
    /// looks like a whole one, and the report names its peer; of IO that wraps one neither is known.
    ///
    /// With axum's server use [`listener`](Self::listener) instead.
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # fn accepted(stream: tokio::net::TcpStream, graceful: &Graceful) {
    /// let io = graceful.track(stream); // AsyncRead + AsyncWrite, as the stream was
    /// # }
    /// ```
    pub fn track<I: 'static>(&self, io: I) -> GracefulIo<I> {
        let peer = tcp(&io).and_then(|tcp| tcp.peer_addr().ok());
        GracefulIo::new(self, io, peer)
    }
}

pin_project! {
    /// A connection that is counted, and cut at the drain deadline. Made by [`Graceful::track`]
    /// and by the listener of [`Graceful::listener`].
    ///
    /// Reads and writes go to the wrapped IO as they are, vectored writes included. Once the
    /// connection is cut, every read, write, flush and shutdown fails with
    /// [`ConnectionAborted`](io::ErrorKind::ConnectionAborted), and whoever waits for it is woken.
    pub struct GracefulIo<I: 'static> {
        #[pin]
        io: I,
        stored: Stored,
        // After the IO, so that the connection is closed before it is struck out.
        entry: Entry,
    }

    impl<I: 'static> PinnedDrop for GracefulIo<I> {
        fn drop(this: Pin<&mut Self>) {
            if this.entry.0.heard.is_unanswered() {
                this.entry.half_closed();
            }
            // The peer must not take a response that was cut off for a whole one.
            if this.entry.0.notice.is_cut_short() {
                reset(&this.io);
            }
        }
    }
}

fn tcp<I: 'static>(io: &I) -> Option<&TcpStream> {
    (io as &dyn Any).downcast_ref()
}

/// Has the connection reset when it is dropped, where it is one of TCP.
fn reset<I: 'static>(io: &I) {
    if let Some(tcp) = tcp(io) {
        let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
    }
}

/// Strikes out the connection when it is dropped.
struct Entry(Arc<Line>);

impl Entry {
    /// To be called before the connection is polled: fails once it is cut, and otherwise sees to
    /// it that the cut wakes the task that polls.
    #[inline]
    fn enter(&self, stored: &mut Stored, waiter: Waiter, cx: &Context<'_>) -> io::Result<()> {
        if self.0.notice.enter(stored, waiter, cx) == Told::Cut {
            return Err(cut());
        }
        Ok(())
    }

    /// Bytes have come. Of interest only once the time to close may be near. Returns the phase.
    #[inline]
    fn heard(&self) -> Phase {
        let shared = &self.0.owner;
        let phase = shared.phase();
        if phase > Phase::Serving {
            shared.connections.heard();
        }
        phase
    }

    /// The peer has closed its writing side, and the connection is dropped before a response that
    /// the peer may wait for. Counted while the service stops; what is cut is reported as such.
    #[cold]
    fn half_closed(&self) {
        let shared = &self.0.owner;
        if shared.phase() > Phase::Serving && self.0.notice.told() < Told::Cut {
            shared.connections.half_closed();
        }
    }
}

#[cold]
fn cut() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "the connection was cut, because the time to shut down is over",
    )
}

impl Drop for Entry {
    fn drop(&mut self) {
        let shared = &self.0.owner;
        let left = shared.connections.remove(&self.0);
        if left == 0 && shared.phase() == Phase::Closing {
            shared.ring();
        }
    }
}

impl<I: 'static> GracefulIo<I> {
    pub(super) fn new(graceful: &Graceful, io: I, peer: Option<SocketAddr>) -> Self {
        let shared = graceful.shared();
        let line = shared.connections.insert(shared.clone(), peer);
        shared.mark_served();
        Self {
            io,
            stored: Stored::default(),
            entry: Entry(line),
        }
    }
}

impl<I: 'static> GracefulIo<I> {
    /// The connection's line, on which is noted what is read from now on.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(super) fn noted(&self) -> Arc<Line> {
        self.entry.0.heard.listen();
        Arc::clone(&self.entry.0)
    }

    #[inline]
    fn to_write(self: Pin<&mut Self>, cx: &Context<'_>) -> io::Result<Pin<&mut I>> {
        let this = self.project();
        this.entry.enter(this.stored, Waiter::Write, cx)?;
        Ok(this.io)
    }

    /// To be called before bytes are written.
    #[inline]
    fn to_send(self: Pin<&mut Self>, cx: &Context<'_>) -> io::Result<Pin<&mut I>> {
        self.entry.0.heard.note_write();
        self.to_write(cx)
    }

    /// The wrapped IO.
    pub fn get_ref(&self) -> &I {
        &self.io
    }

    /// The wrapped IO. What is read or written on it directly is not cut.
    pub fn get_mut(&mut self) -> &mut I {
        &mut self.io
    }
}

impl<I: AsyncRead + 'static> AsyncRead for GracefulIo<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        this.entry.enter(this.stored, Waiter::Read, cx)?;
        let heard = &this.entry.0.heard;
        if heard.has_kept() {
            heard.hand_on(buf);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let has_room = buf.remaining() > 0;
        let result = this.io.poll_read(cx, buf);
        let read = &buf.filled()[before..];
        if !read.is_empty() {
            let lets_in = this.entry.heard() < Phase::Draining;
            let kept = heard.note(read, lets_in);
            if kept > 0 {
                let passed = buf.filled().len() - kept;
                buf.set_filled(passed);
            }
        } else if result.is_pending() {
            heard.note_nothing();
        } else if has_room && matches!(result, Poll::Ready(Ok(()))) {
            heard.note_end();
        }
        result
    }
}

impl<I: AsyncWrite + 'static> AsyncWrite for GracefulIo<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.to_send(cx)?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.to_write(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.to_write(cx)?.poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.to_send(cx)?.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl<I: fmt::Debug + 'static> fmt::Debug for GracefulIo<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GracefulIo")
            .field("io", &self.io)
            .field("cut", &(self.entry.0.notice.told() == Told::Cut))
            .finish_non_exhaustive()
    }
}
