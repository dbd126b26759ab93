//! The tracked IO of a connection: it records what is read and written, and fails after the cut.

use std::{
    any::Any,
    fmt,
    io::{self, Read},
    mem::MaybeUninit,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{
    ConnectionEntry,
    linger::{self, FAREWELL},
    requests,
    send_queue::{self, unacknowledged},
};
use crate::connection::descriptors::Activity;
use crate::{
    connection::{
        state::{Directive, RegisteredWaker, WakerSlot},
        table::{
            BODILESS, BUSY, HANDSHAKE, LOOKED_AT, OWES_NOTHING, RESPONDED, UPGRADED, UPGRADES,
        },
    },
    handle::graceful::Graceful,
    phase::Phase,
    sync::Ordering,
};

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
    /// A `TcpStream` or `UnixStream` is closed as [`GracefulIo`] describes; other IO is dropped. So with
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
        let peer = tcp(&io).and_then(|tcp| tcp.peer_addr().ok());
        let linger = linger::is_socket(&io).then_some(linger::socket as Linger<I>);
        self.shared().tracks.store(true, Ordering::Relaxed);
        GracefulIo::new(self, io, peer, linger)
    }
}

/// A tracked connection: it is counted, cut at the drain deadline, and closed so that the peer receives
/// everything that was written. Made by [`Graceful::track`] and by the listener of [`Graceful::listener`].
///
/// Reads and writes, vectored writes included, are passed to the wrapped IO. After the cut, every read,
/// write, flush and shutdown fails with
/// [`ConnectionAborted`](io::ErrorKind::ConnectionAborted). The cut wakes every task that waits for the
/// connection.
///
/// # Dropping
///
/// If a socket is closed while its peer still sends, the connection is reset, and the peer loses the part
/// of the response that is in transit
/// ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)). So when a `GracefulIo` is
/// dropped inside a runtime, a spawned task closes the writing side, and reads and discards what the
/// peer sends until the peer closes too. The connection counts as [open](Graceful::connections) until
/// its socket is closed. The task closes the socket earlier than the peer in these cases:
///
/// - at once, if the connection is idle, if nothing was written on it, or if a read or write has failed;
///   while serving, also if the peer closed first;
/// - if the peer has received everything: when it has sent nothing for 250 ms, or for 1 s if it has sent
///   something since, and after 2 s in any case. Only Linux tells what the peer has received; on other
///   systems all written bytes count as received;
/// - if the peer has not received everything: after 30 s in which it has acknowledged nothing. While
///   the service stops, the task waits until the drain deadline instead, and the number of bytes that
///   the peer has not received is in the [report](crate::CutConnection::undelivered);
/// - after an upgrade, such as to a WebSocket: when the peer has acknowledged nothing for 250 ms, or
///   250 ms after it has received everything. To wait for the answer to a close frame, use
///   [`Hold::close_socket`](crate::Hold::close_socket).
pub struct GracefulIo<I: 'static> {
    /// `None` after `drop` has taken it.
    io: Option<I>,
    waker: RegisteredWaker,
    peer: Peer,
    written: Written,
    /// The last write returned `Pending`.
    blocked: bool,
    heads: Heads,
    /// The number of bytes written while the service stops. Saturates at 255, which is more than
    /// `FAREWELL`.
    written_late: u8,
    /// Shows whether the connection is idle, when a listener needs its file descriptor.
    activity: Activity,
    linger: Option<Linger<I>>,
    /// 0 for the accepted IO. The IO that a handshake returns, such as a TLS stream, is the next layer,
    /// and shares the connection entry.
    layer: u8,
    // Declared after the IO, so that the socket is closed before the entry is removed.
    guard: EntryGuard,
}

/// The state of the peer, as far as reads and writes show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    Open,
    /// The peer has closed its writing side.
    Finished,
    /// A read or a write has failed, so the drop does not wait for the peer.
    Gone,
}

/// What was written on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Written {
    Nothing,
    Something,
    /// A `101 Switching Protocols` was written, so the connection is passed to a handler.
    Upgrade,
}

/// What the reads show about HTTP/1 requests. The two lowest bits count the line breaks at the end of
/// the bytes read so far. Two in a row mean that the first head may be complete, and then the count
/// stays.
#[derive(Clone, Copy, Debug, Default)]
struct Heads(u8);

impl Heads {
    const BREAKS: u8 = 3;
    const WHOLE: u8 = 2;
    /// The bytes read since the last write are a request without a body.
    const BODILESS: u8 = 4;
    /// The bytes read since the last write begin with `GET` or `HEAD`, which have no body.
    const METHOD: u8 = 8;
    /// Something was read since the last write.
    const ASKING: u8 = 16;

    fn first_is_whole(self) -> bool {
        self.0 & Self::BREAKS == Self::WHOLE
    }

    fn last_is_bodiless(self) -> bool {
        self.0 & Self::BODILESS != 0
    }

    fn first(&mut self, read: &[u8]) {
        let mut breaks = self.0 & Self::BREAKS;
        for byte in read {
            breaks = match byte {
                _ if breaks == Self::WHOLE => break,
                b'\n' => breaks + 1,
                b'\r' => breaks,
                _ => 0,
            };
        }
        self.0 = self.0 & !Self::BREAKS | breaks;
    }

    /// A request may arrive in several reads, because servers first read a few bytes to tell HTTP/1 from
    /// HTTP/2.
    #[inline]
    fn last(&mut self, read: &[u8]) {
        let mut bits = self.0 & !Self::BODILESS;
        if bits & Self::ASKING == 0 {
            bits |= Self::ASKING;
            let method = read.starts_with(b"GET ") || read.starts_with(b"HEAD ");
            bits = bits & !Self::METHOD | if method { Self::METHOD } else { 0 };
        }
        if bits & Self::METHOD != 0 && read.ends_with(b"\r\n\r\n") {
            bits |= Self::BODILESS;
        }
        self.0 = bits;
    }

    #[inline]
    fn wrote(&mut self) {
        self.0 &= !Self::ASKING;
    }
}

impl<I: 'static> Drop for GracefulIo<I> {
    fn drop(&mut self) {
        let Some(io) = self.io.take() else { return };
        let is_top = self.is_top();
        let entry = &self.guard.entry;
        if is_top && entry.flags.has(LOOKED_AT) {
            requests::end(entry);
        }
        if is_top && entry.flags.has(UPGRADES) {
            entry.owner.upgraded.ended(entry.number());
        }
        if is_top && entry.sniffer.is_unanswered() {
            self.guard.half_closed();
        }
        let request = self.heads.last_is_bodiless() && self.guard.entry.sniffer.is_http1();
        let entry = &self.guard.entry;
        if self.layer > 0 {
            // The lowest layer closes the connection when it is dropped, and needs these flags then.
            if is_top {
                let upgraded = self.written == Written::Upgrade;
                let upgraded = if upgraded { UPGRADED } else { 0 };
                entry
                    .flags
                    .set(upgraded | if request { BODILESS } else { 0 });
            }
            return;
        }
        let directive = entry.state.directive();
        if directive == Directive::Cut {
            let left = tcp(&io).and_then(unacknowledged).unwrap_or(0);
            if left > FAREWELL || entry.flags.has(RESPONDED) {
                entry.undelivered.store(left, Ordering::Relaxed);
            }
            // The peer must not take a partial response for a complete one.
            if entry.state.is_cut_short() {
                reset(&io);
            }
            return;
        }
        if directive == Directive::Close && entry.state.is_unread() && has_unread(&io) {
            // Accepted so late that its server closes it without a read. The client's request is lost as
            // in the queue.
            entry.owner.starved.were_reset(1);
        }
        // While serving, a peer that has closed first waits for nothing more.
        let leaves = match self.peer {
            Peer::Open => false,
            Peer::Finished => directive == Directive::Stay,
            Peer::Gone => true,
        };
        if leaves || self.written == Written::Nothing {
            return;
        }
        if let Some(linger) = self.linger {
            let last = if is_top {
                Last {
                    written: self.written,
                    request,
                }
            } else {
                Last {
                    written: if entry.flags.has(UPGRADED) {
                        Written::Upgrade
                    } else {
                        self.written
                    },
                    request: entry.flags.has(BODILESS),
                }
            };
            linger(io, last, self.guard.hand_over());
        }
    }
}

/// Closes the connection of a dropped `GracefulIo`.
type Linger<I> = fn(I, Last, EntryGuard);

/// What was last read and written on a dropped connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Last {
    pub(super) written: Written,
    /// The last bytes read are an HTTP/1 request without a body. Then the client sends nothing more until
    /// it has read the response.
    pub(super) request: bool,
}

/// The beginning of a response after which the connection no longer speaks HTTP/1.
const SWITCHING_PROTOCOLS: &[u8] = b"HTTP/1.1 101";

/// Unwraps the IO, which is present until its wrapper is dropped.
#[inline]
fn present<T>(io: Option<T>) -> T {
    match io {
        Some(io) => io,
        None => unreachable!("it is taken by the drop of its wrapper alone"),
    }
}

pub(super) fn tcp<I: 'static>(io: &I) -> Option<&TcpStream> {
    (io as &dyn Any).downcast_ref()
}

/// Reads from the operating system directly, after the runtime has reported that there is nothing to
/// read.
///
/// A busy runtime may not have polled the operating system for milliseconds. An idle HTTP/1 connection
/// that is instructed to close is closed after this read, and a request that the read misses is lost.
fn read_now<I: 'static>(io: &I, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    let Some(tcp) = tcp(io) else {
        return Poll::Pending;
    };
    // Checked first, because most idle connections have nothing to read, and a read without unsafe code
    // writes zeros into the whole buffer, which makes its 8 KiB resident.
    if SockRef::from(tcp)
        .peek(&mut [MaybeUninit::uninit()])
        .is_err()
    {
        return Poll::Pending;
    }
    let read = (&*SockRef::from(tcp)).read(buf.initialize_unfilled());
    match read {
        Ok(read) => {
            buf.advance(read);
            Poll::Ready(Ok(()))
        }
        // The runtime reports a lasting error at the next poll.
        Err(_) => Poll::Pending,
    }
}

/// Makes the drop of a TCP connection reset it.
fn reset<I: 'static>(io: &I) {
    if let Some(tcp) = tcp(io) {
        let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
    }
}

/// Whether the peer has sent something that was not read.
fn has_unread<I: 'static>(io: &I) -> bool {
    let peeked = tcp(io).map(|tcp| SockRef::from(tcp).peek(&mut [MaybeUninit::uninit()]));
    matches!(peeked, Some(Ok(bytes)) if bytes > 0)
}

/// Keeps a connection in the table. Each layer of the connection has a guard, and so has the task that
/// closes it. Dropping the last guard removes the connection entry.
pub(super) struct EntryGuard {
    pub(super) entry: Arc<ConnectionEntry>,
}

impl EntryGuard {
    /// Makes another guard for the same entry.
    fn share(entry: &Arc<ConnectionEntry>) -> Self {
        entry.entries.fetch_add(1, Ordering::Relaxed);
        Self {
            entry: Arc::clone(entry),
        }
    }

    /// A guard for the task that closes the connection.
    fn hand_over(&self) -> Self {
        Self::share(&self.entry)
    }

    /// Counts a connection that is dropped without a response after the peer has closed its writing side,
    /// because the peer may still wait for that response. Counts only while the service stops, and not
    /// after the cut: cut connections are reported as such.
    #[cold]
    fn half_closed(&self) {
        let shared = &self.entry.owner;
        if shared.phase() > Phase::Serving
            && self.entry.state.directive() < Directive::Cut
            && !self.entry.flags.has(OWES_NOTHING)
        {
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

impl Drop for EntryGuard {
    fn drop(&mut self) {
        if self.entry.entries.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let shared = &self.entry.owner;
        let connections = &shared.connections;
        if connections.remove(&self.entry, || shared.phase()) {
            shared.notify();
        }
    }
}

impl<I: 'static> GracefulIo<I> {
    /// `linger` closes the connection after the drop. Without it the IO is only dropped.
    pub(super) fn new(
        graceful: &Graceful,
        io: I,
        address: Option<SocketAddr>,
        linger: Option<Linger<I>>,
    ) -> Self {
        send_queue::prepare();
        let shared = graceful.shared();
        let entry = shared.connections.insert(shared.clone(), address);
        shared.mark_served();
        Self::with_entry(io, linger, 0, EntryGuard { entry })
    }

    /// Wraps the IO that a handshake has returned, as the next layer of the connection.
    #[cfg(feature = "axum")]
    pub(super) fn above(io: I, entry: &Arc<ConnectionEntry>) -> Self {
        requests::end(entry);
        entry.flags.set(LOOKED_AT);
        let layer = entry.sniffer.begin_layer();
        Self::with_entry(io, None, layer, EntryGuard::share(entry))
    }

    fn with_entry(io: I, linger: Option<Linger<I>>, layer: u8, guard: EntryGuard) -> Self {
        Self {
            io: Some(io),
            waker: RegisteredWaker::default(),
            peer: Peer::Open,
            written: Written::Nothing,
            blocked: false,
            heads: Heads::default(),
            written_late: 0,
            activity: Activity::default(),
            linger,
            layer,
            guard,
        }
    }

    /// The connection entry.
    #[cfg(feature = "axum")]
    pub(super) fn entry(&self) -> &Arc<ConnectionEntry> {
        &self.guard.entry
    }

    /// Whether this is the topmost layer, which the server reads and writes.
    #[inline]
    fn is_top(&self) -> bool {
        self.guard.entry.sniffer.layer() == self.layer
    }

    /// The peer's address, as in the [report](crate::Report::connections_cut). It is the address that was
    /// [set](Self::set_peer) last. Otherwise it is the remote address of a tracked `TcpStream`, or the
    /// address that a listener returned, if that is a `SocketAddr`.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.guard.entry.peer()
    }

    /// Sets the peer's address for the report. Use it for IO that wraps a `TcpStream`, or behind a proxy
    /// that sends the address of its client.
    ///
    /// Inside a [handshake](crate::HandshakeExt::handshakes) it also sets the address that the listener
    /// returns, and so `ConnectInfo<SocketAddr>`.
    pub fn set_peer(&self, peer: SocketAddr) {
        let entry = &self.guard.entry;
        entry.owner.connections.rename(entry, peer);
    }

    /// Sets the peer's address and returns the connection, to be chained to [`Graceful::track`].
    ///
    /// ```
    /// # use std::net::SocketAddr;
    /// # use tower_graceful::{Graceful, GracefulIo};
    /// # use tokio::io::DuplexStream;
    /// # fn accepted(stream: DuplexStream, peer: SocketAddr, graceful: &Graceful) -> GracefulIo<DuplexStream> {
    /// graceful.track(stream).with_peer(peer)
    /// # }
    /// ```
    #[must_use = "dropping the returned IO closes the connection"]
    pub fn with_peer(self, peer: SocketAddr) -> Self {
        self.set_peer(peer);
        self
    }

    /// Passes the connection to `serve`: from now on the sniffer records every read.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(super) fn begin_serving(&mut self) -> Arc<ConnectionEntry> {
        self.activity.is_owned();
        self.guard.entry.flags.take(LOOKED_AT);
        self.guard.entry.sniffer.listen();
        Arc::clone(&self.guard.entry)
    }

    #[cfg(feature = "axum")]
    pub(super) fn is_cut(&self) -> bool {
        self.guard.entry.state.directive() == Directive::Cut
    }

    /// The wrapped IO.
    pub fn get_ref(&self) -> &I {
        present(self.io.as_ref())
    }

    /// The wrapped IO. The cut does not affect direct reads and writes on it.
    pub fn get_mut(&mut self) -> &mut I {
        present(self.io.as_mut())
    }

    /// Called before each poll of the wrapped IO. Registers the waker of the task, so that the cut wakes
    /// it. Fails if the connection has been cut, or has expired.
    #[inline]
    fn enter(&mut self, slot: WakerSlot, cx: &Context<'_>) -> io::Result<Directive> {
        if self.layer > 0 {
            return self.enter_above();
        }
        let directive = self.guard.entry.state.enter(&mut self.waker, slot, cx);
        // Only reads expire: a write may belong to a response.
        let expires = || slot == WakerSlot::Read && self.expires();
        if directive >= Directive::Expire && (directive == Directive::Cut || expires()) {
            self.peer = Peer::Gone;
            return Err(cut());
        }
        Ok(directive)
    }

    /// As `enter`, for a layer above a handshake. The lowest layer registers the wakers when the TLS stream
    /// or other IO in between polls it.
    fn enter_above(&mut self) -> io::Result<Directive> {
        let directive = self.guard.entry.state.directive();
        if directive == Directive::Cut {
            self.peer = Peer::Gone;
            return Err(cut());
        }
        Ok(directive)
    }

    /// Whether a connection that was instructed to close a while ago can be closed now: no request is in
    /// flight on it, and the peer has acknowledged what was sent.
    #[cold]
    fn expires(&self) -> bool {
        let entry = &self.guard.entry;
        let in_flight = if entry.sniffer.is_http2() {
            entry.may_have_streams()
        } else if !self.is_top() {
            entry.flags.has(BUSY)
        } else {
            // Idle HTTP/1 connections have already closed. So this connection was upgraded, or its first
            // request is running, or its first head is incomplete.
            self.written > Written::Nothing || self.heads.first_is_whole()
        };
        let responded = entry.flags.has(RESPONDED);
        let owes = match self.io.as_ref().and_then(tcp).and_then(unacknowledged) {
            Some(left) => left > if responded { 0 } else { FAREWELL },
            None => responded,
        };
        // Without `linger` the IO is no socket, and its protocol is unknown.
        self.linger.is_some() && !in_flight && !owes && !self.blocked
    }

    #[cold]
    fn wrote_while_stopping(&mut self, bytes: usize) {
        if self.guard.entry.flags.has(HANDSHAKE) {
            return;
        }
        let bytes = u8::try_from(bytes).unwrap_or(u8::MAX);
        self.written_late = self.written_late.saturating_add(bytes);
        if self.guard.entry.sniffer.is_http1() || u32::from(self.written_late) > FAREWELL {
            self.guard.entry.flags.set(RESPONDED);
        }
    }

    /// Writes, and records the result. `head` is the beginning of the bytes.
    #[inline]
    fn poll_writing(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        head: &[u8],
        write: impl FnOnce(Pin<&mut I>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>>
    where
        I: Unpin,
    {
        let this = &mut *self;
        let is_top = this.is_top();
        if is_top {
            this.guard.entry.sniffer.note_write();
        }
        let directive = this.enter(WakerSlot::Write, cx)?;
        if is_top && this.guard.entry.flags.has(LOOKED_AT) {
            // Before the write, because the client may send the next request right after it.
            requests::wrote(&this.guard.entry, head);
        }
        let result = write(Pin::new(this.get_mut()), cx);
        let upgrades = head.starts_with(SWITCHING_PROTOCOLS);
        this.activity.wrote(upgrades, result.is_ready());
        this.blocked = result.is_pending();
        match &result {
            Poll::Ready(Ok(bytes)) => {
                let written = if upgrades {
                    if is_top {
                        this.guard.entry.upgraded();
                    }
                    Written::Upgrade
                } else {
                    Written::Something
                };
                this.written = this.written.max(written);
                this.heads.wrote();
                if this.layer > 0 && is_top {
                    this.guard.entry.flags.set(BUSY);
                }
                if directive > Directive::Stay && is_top {
                    this.wrote_while_stopping(*bytes);
                }
            }
            Poll::Ready(Err(_)) => this.peer = Peer::Gone,
            Poll::Pending => {}
        }
        result
    }
}

impl<I: AsyncRead + Unpin + 'static> AsyncRead for GracefulIo<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let directive = this.enter(WakerSlot::Read, cx)?;
        let before = buf.filled().len();
        let room = buf.remaining() > 0;
        let is_top = this.is_top();
        let entry = &this.guard.entry;
        if is_top && entry.sniffer.has_kept() {
            entry.sniffer.hand_on(buf);
            return Poll::Ready(Ok(()));
        }
        let io = present(this.io.as_mut());
        let mut result = Pin::new(&mut *io).poll_read(cx, buf);
        if result.is_pending() && directive >= Directive::Close {
            result = read_now(io, buf);
        }
        let read = &buf.filled()[before..];
        if !read.is_empty() {
            if directive > Directive::Stay {
                entry.read_while_stopping(directive);
            }
            if !is_top {
                return result;
            }
            this.activity.read(read);
            if entry.flags.has(LOOKED_AT) {
                requests::read(entry, read);
            }
            this.heads.last(read);
            if this.written == Written::Nothing {
                this.heads.first(read);
                if this.layer > 0 && this.heads.first_is_whole() {
                    entry.flags.set(BUSY);
                }
            }
            let lets_in = || directive == Directive::Stay || entry.owner.phase() < Phase::Draining;
            let kept = entry.sniffer.note(read, lets_in);
            if kept > 0 {
                let passed = buf.filled().len() - kept;
                buf.set_filled(passed);
            }
            if entry.sniffer.is_refused() {
                // The server must not read a frame.
                buf.set_filled(before);
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            return result;
        }
        match &result {
            Poll::Pending if is_top => {
                entry.sniffer.note_nothing();
                if this.activity.is_idle(&entry.owner) {
                    // Reports the end of the stream, so that the server closes the connection.
                    return Poll::Ready(Ok(()));
                }
            }
            Poll::Ready(Ok(())) if room => {
                this.peer = Peer::Finished;
                if is_top {
                    entry.sniffer.note_end();
                }
            }
            Poll::Pending | Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(_)) => this.peer = Peer::Gone,
        }
        result
    }
}

impl<I: AsyncWrite + Unpin + 'static> AsyncWrite for GracefulIo<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_writing(cx, buf, |io, cx| io.poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.enter(WakerSlot::Write, cx)?;
        let result = Pin::new(present(self.io.as_mut())).poll_flush(cx);
        self.activity.flushed(result.is_ready());
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.enter(WakerSlot::Write, cx)?;
        Pin::new(present(self.io.as_mut())).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let head = bufs.first().map_or(&[][..], |head| head);
        self.poll_writing(cx, head, |io, cx| io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.get_ref().is_write_vectored()
    }
}

impl<I: fmt::Debug + 'static> fmt::Debug for GracefulIo<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GracefulIo")
            .field("io", self.get_ref())
            .field(
                "cut",
                &(self.guard.entry.state.directive() == Directive::Cut),
            )
            .finish_non_exhaustive()
    }
}
