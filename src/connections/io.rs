use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    handle::Graceful,
    phase::Phase,
    registry::{Half, Line},
};

impl Graceful {
    /// Tracks a connection that you accepted yourself, for a server on hyper or tonic: it counts
    /// in [`connections`](Self::connections) until the returned IO is dropped, the service does
    /// not count as stopped before that, and at the drain deadline its reads and writes fail.
    ///
    /// With axum's server use [`listener`](Self::listener) instead.
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # fn accepted(stream: tokio::net::TcpStream, graceful: &Graceful) {
    /// let io = graceful.track(stream); // AsyncRead + AsyncWrite, as the stream was
    /// # }
    /// ```
    pub fn track<I>(&self, io: I) -> GracefulIo<I> {
        let (key, line) = self.shared().connections.insert();
        self.shared().mark_served();
        GracefulIo {
            io,
            line,
            entry: Entry {
                graceful: self.clone(),
                key,
            },
        }
    }
}

pin_project! {
    /// A connection that is counted, and cut at the drain deadline. Made by [`Graceful::track`]
    /// and by the listener of [`Graceful::listener`].
    ///
    /// Reads and writes go to the wrapped IO as they are, vectored writes included. Once the
    /// connection is cut, every read, write, flush and shutdown fails with
    /// [`ConnectionAborted`](io::ErrorKind::ConnectionAborted), and whoever waits for it is woken.
    pub struct GracefulIo<I> {
        #[pin]
        io: I,
        line: Arc<Line>,
        // After the IO, so that the connection is closed before it is struck out.
        entry: Entry,
    }
}

struct Entry {
    graceful: Graceful,
    key: usize,
}

impl Entry {
    /// Bytes have come. Of interest only once the time to close may be near.
    fn heard(&self) {
        let shared = self.graceful.shared();
        if shared.word().phase() > Phase::Serving {
            shared.connections.heard();
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let shared = self.graceful.shared();
        let left = shared.connections.remove(self.key);
        if left == 0 && shared.word().phase() == Phase::Closing {
            shared.ring();
        }
    }
}

impl<I> GracefulIo<I> {
    /// The wrapped IO.
    pub fn get_ref(&self) -> &I {
        &self.io
    }

    /// The wrapped IO. What is read or written on it directly is not cut.
    pub fn get_mut(&mut self) -> &mut I {
        &mut self.io
    }
}

impl<I: AsyncRead> AsyncRead for GracefulIo<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        this.line.enter(Half::Read, cx)?;
        let before = buf.filled().len();
        let result = this.io.poll_read(cx, buf);
        if buf.filled().len() > before {
            this.entry.heard();
        }
        result
    }
}

impl<I: AsyncWrite> AsyncWrite for GracefulIo<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        this.line.enter(Half::Write, cx)?;
        this.io.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        this.line.enter(Half::Write, cx)?;
        this.io.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        this.line.enter(Half::Write, cx)?;
        this.io.poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        this.line.enter(Half::Write, cx)?;
        this.io.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl<I: fmt::Debug> fmt::Debug for GracefulIo<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GracefulIo")
            .field("io", &self.io)
            .field("cut", &self.line.is_cut())
            .finish_non_exhaustive()
    }
}
