use std::{
    any::Any,
    fmt,
    io::{self, Read},
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
    /// Tracks a connection that you accepted yourself, for a server on hyper or tonic: it counts
    /// in [`connections`](Self::connections) until the returned IO is dropped, the service does
    /// not count as stopped before that, and at the drain deadline its reads and writes fail. A
    /// `TcpStream` on which something has been written is then reset, so that no half response
    /// looks like a whole one, and the report names its peer; of IO that wraps one neither is known.
    ///
    /// A `TcpStream` or `UnixStream` is closed as [`GracefulIo`] says, other IO is dropped. So track
    /// what TLS is spoken on, not the stream of TLS. With axum's server use
    /// [`listener`](Self::listener) instead.
    ///
    /// ```
    /// # use tower_graceful::Graceful;
    /// # fn accepted(stream: tokio::net::TcpStream, graceful: &Graceful) {
    /// let io = graceful.track(stream); // AsyncRead + AsyncWrite, as the stream was
    /// # }
    /// ```
    ///
    /// tonic's own server asks its connections for their connect info by a trait of its own, which a
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

/// A connection that is counted, cut at the drain deadline, and closed so that its peer receives all
/// that was written. Made by [`Graceful::track`] and by the listener of [`Graceful::listener`].
///
/// Reads and writes go to the wrapped IO as they are, vectored writes included. Once the
/// connection is cut, every read, write, flush and shutdown fails with
/// [`ConnectionAborted`](io::ErrorKind::ConnectionAborted), and every task that waits for it is woken.
///
/// # Dropping
///
/// A socket that is closed while its peer still sends is reset, and with it the part of a response
/// that is still on its way ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)). So
/// when this is dropped inside a runtime, a task of its own closes the writing side, and reads and
/// discards what the peer sends until the peer closes too. The connection counts as
/// [open](Graceful::connections) until then. An idle connection is closed at once. One whose peer has
/// received everything (Linux says so, other systems do not) is closed when the peer has sent nothing
/// for 250 ms, or for a second if it has sent something, and after two seconds in any case. One whose
/// peer has not is closed after 30 s in which it has taken nothing; while the service stops it is
/// waited for until the drain deadline, and what it has not received then is in the
/// [report](crate::CutConnection::undelivered). A WebSocket's peer is waited for only while it takes
/// something at least every 250 ms: it has the close frame's answer to be waited for, see
/// [`Hold::close_socket`](crate::Hold::close_socket).
pub struct GracefulIo<I: 'static> {
    /// `None` once it is dropped.
    io: Option<I>,
    stored: RegisteredWaker,
    peer: Peer,
    written: Written,
    /// The last write had to wait.
    blocked: bool,
    heads: Heads,
    /// Bytes written while the service stops, as far as this can count: to more than `FAREWELL`.
    written_late: u8,
    /// Whether it is idle, where its descriptor is needed.
    activity: Activity,
    linger: Option<Linger<I>>,
    /// 0 is the connection itself. What a handshake has made of it, TLS for example, is a layer above,
    /// and has the same entry.
    layer: u8,
    // After the IO, so that the connection is closed before it is removed.
    entry: EntryGuard,
}

/// The other end of a connection, as reading and writing show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    Open,
    /// It has closed its writing side.
    Finished,
    /// A read or a write has failed, so there is no peer to close the connection for.
    Gone,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Written {
    Nothing,
    Something,
    /// Among it a `101 Switching Protocols`: the connection belongs to a handler, or will.
    Upgrade,
}

/// What reading shows of requests of HTTP/1. In the lower bits, how many line breaks there are at the
/// end of what was read, until there are two in a row: then the first head may be whole.
#[derive(Clone, Copy, Debug, Default)]
struct Heads(u8);

impl Heads {
    const BREAKS: u8 = 3;
    const WHOLE: u8 = 2;
    /// What was read since the last write is a request without a body.
    const BODILESS: u8 = 4;
    /// It begins with a method that has no body.
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

    /// A request may come in several reads: servers read a few bytes to tell HTTP/1 from HTTP/2.
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
        let line = &self.entry.line;
        if is_top && line.flags.has(LOOKED_AT) {
            requests::end(line);
        }
        if is_top && line.flags.has(UPGRADES) {
            line.owner.upgraded.ended(line.number());
        }
        if is_top && line.sniffer.is_unanswered() {
            self.entry.half_closed();
        }
        let request = self.heads.last_is_bodiless() && self.entry.line.sniffer.is_http1();
        let line = &self.entry.line;
        if self.layer > 0 {
            // For the layer below, which closes the connection when it is dropped in its turn.
            if is_top {
                let upgraded = self.written == Written::Upgrade;
                let upgraded = if upgraded { UPGRADED } else { 0 };
                line.flags
                    .set(upgraded | if request { BODILESS } else { 0 });
            }
            return;
        }
        let told = line.state.directive();
        if told == Directive::Cut {
            let left = tcp(&io).and_then(unacknowledged).unwrap_or(0);
            if left > FAREWELL || line.flags.has(RESPONDED) {
                line.undelivered.store(left, Ordering::Relaxed);
            }
            // The peer must not take a response that was cut off for a whole one.
            if line.state.is_cut_short() {
                reset(&io);
            }
            return;
        }
        // While serving, a peer that has closed first has received all that it waited for.
        let leaves = match self.peer {
            Peer::Open => false,
            Peer::Finished => told == Directive::Stay,
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
                    written: if line.flags.has(UPGRADED) {
                        Written::Upgrade
                    } else {
                        self.written
                    },
                    request: line.flags.has(BODILESS),
                }
            };
            linger(io, last, self.entry.hand_over());
        }
    }
}

/// What takes a connection over.
type Linger<I> = fn(I, Last, EntryGuard);

/// What passed on a connection that is taken over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Last {
    pub(super) written: Written,
    /// The last that was read is a request of HTTP/1 without a body, so that its client sends nothing
    /// more until it has read the response.
    pub(super) request: bool,
}

/// What a response begins with after which the connection is no longer one of HTTP/1.
const SWITCHING_PROTOCOLS: &[u8] = b"HTTP/1.1 101";

/// The IO, which is there until its wrapper is dropped.
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

/// Reads what the operating system has, where the runtime knows of nothing to be read.
///
/// The runtime asks the operating system for news only now and then, and a busy one may not have done
/// so for milliseconds. An idle connection of HTTP/1 that is told to close is closed after this read,
/// and a request that it misses is lost.
fn read_now<I: 'static>(io: &I, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    let Some(tcp) = tcp(io) else {
        return Poll::Pending;
    };
    let read = (&*SockRef::from(tcp)).read(buf.initialize_unfilled());
    match read {
        Ok(read) => {
            buf.advance(read);
            Poll::Ready(Ok(()))
        }
        // An error that lasts is found by the runtime, too.
        Err(_) => Poll::Pending,
    }
}

/// Has the connection reset when it is dropped, where it is one of TCP.
fn reset<I: 'static>(io: &I) {
    if let Some(tcp) = tcp(io) {
        let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
    }
}

/// The last entry of a connection removes it from the table when it is dropped: of the connection's
/// layers, and of what it was handed over to.
pub(super) struct EntryGuard {
    pub(super) line: Arc<ConnectionEntry>,
}

impl EntryGuard {
    /// Another one.
    fn share(line: &Arc<ConnectionEntry>) -> Self {
        line.entries.fetch_add(1, Ordering::Relaxed);
        Self {
            line: Arc::clone(line),
        }
    }

    /// An entry for what keeps the connection open from now on.
    fn hand_over(&self) -> Self {
        Self::share(&self.line)
    }

    /// The peer has closed its writing side, and the connection is dropped before a response that
    /// the peer may wait for. Counted while the service stops; what is cut is reported as such.
    #[cold]
    fn half_closed(&self) {
        let shared = &self.line.owner;
        if shared.phase() > Phase::Serving
            && self.line.state.directive() < Directive::Cut
            && !self.line.flags.has(OWES_NOTHING)
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
        if self.line.entries.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let shared = &self.line.owner;
        let connections = &shared.connections;
        if connections.remove(&self.line, || shared.phase()) {
            shared.notify();
        }
    }
}

impl<I: 'static> GracefulIo<I> {
    /// `linger` closes the connection. Without it the IO is dropped.
    pub(super) fn new(
        graceful: &Graceful,
        io: I,
        address: Option<SocketAddr>,
        linger: Option<Linger<I>>,
    ) -> Self {
        send_queue::prepare();
        let shared = graceful.shared();
        let line = shared.connections.insert(shared.clone(), address);
        shared.mark_served();
        Self::with_entry(io, linger, 0, EntryGuard { line })
    }

    /// What a handshake has made of the connection. It ends a layer, and this begins the next.
    #[cfg(feature = "axum")]
    pub(super) fn above(io: I, line: &Arc<ConnectionEntry>) -> Self {
        requests::end(line);
        line.flags.set(LOOKED_AT);
        let layer = line.sniffer.begin_layer();
        Self::with_entry(io, None, layer, EntryGuard::share(line))
    }

    fn with_entry(io: I, linger: Option<Linger<I>>, layer: u8, entry: EntryGuard) -> Self {
        Self {
            io: Some(io),
            stored: RegisteredWaker::default(),
            peer: Peer::Open,
            written: Written::Nothing,
            blocked: false,
            heads: Heads::default(),
            written_late: 0,
            activity: Activity::default(),
            linger,
            layer,
            entry,
        }
    }

    /// The connection's line.
    #[cfg(feature = "axum")]
    pub(super) fn line(&self) -> &Arc<ConnectionEntry> {
        &self.entry.line
    }

    /// No handshake has made anything else of it.
    #[inline]
    fn is_top(&self) -> bool {
        self.entry.line.sniffer.layer() == self.layer
    }

    /// The peer's address as the [report](crate::Report::connections_cut) gives it: of a tracked
    /// `TcpStream` the address that it is connected to, or the one that was
    /// [set](Self::set_peer) since.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.entry.line.peer()
    }

    /// Sets the peer's address for the report, where the IO does not know it: of IO that wraps a
    /// `TcpStream`, or behind a proxy that tells the address of its client.
    ///
    /// Inside a [handshake](crate::HandshakeExt::handshakes) it sets what the listener returns, and
    /// so `ConnectInfo<SocketAddr>`, too.
    pub fn set_peer(&self, peer: SocketAddr) {
        let line = &self.entry.line;
        line.owner.connections.rename(line, peer);
    }

    /// The same, for [`Graceful::track`] in one expression.
    ///
    /// ```
    /// # use std::net::SocketAddr;
    /// # use tower_graceful::{Graceful, GracefulIo};
    /// # use tokio::io::DuplexStream;
    /// # fn accepted(stream: DuplexStream, peer: SocketAddr, graceful: &Graceful) -> GracefulIo<DuplexStream> {
    /// graceful.track(stream).with_peer(peer)
    /// # }
    /// ```
    #[must_use = "it is the connection"]
    pub fn with_peer(self, peer: SocketAddr) -> Self {
        self.set_peer(peer);
        self
    }

    /// The connection's line, on which is noted what is read from now on.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(super) fn noted(&mut self) -> Arc<ConnectionEntry> {
        self.activity.is_owned();
        self.entry.line.flags.take(LOOKED_AT);
        self.entry.line.sniffer.listen();
        Arc::clone(&self.entry.line)
    }

    #[cfg(feature = "axum")]
    pub(super) fn is_cut(&self) -> bool {
        self.entry.line.state.directive() == Directive::Cut
    }

    /// The wrapped IO.
    pub fn get_ref(&self) -> &I {
        present(self.io.as_ref())
    }

    /// The wrapped IO. What is read or written on it directly is not cut.
    pub fn get_mut(&mut self) -> &mut I {
        present(self.io.as_mut())
    }

    /// To be called before the connection is polled: fails once it is cut, and otherwise sees to it
    /// that the cut wakes the task that polls.
    #[inline]
    fn enter(&mut self, waiter: WakerSlot, cx: &Context<'_>) -> io::Result<Directive> {
        if self.layer > 0 {
            return self.enter_above();
        }
        let told = self.entry.line.state.enter(&mut self.stored, waiter, cx);
        // What is to be written is owed.
        let expires = || waiter == WakerSlot::Read && self.expires();
        if told >= Directive::Expire && (told == Directive::Cut || expires()) {
            self.peer = Peer::Gone;
            return Err(cut());
        }
        Ok(told)
    }

    /// The layer below has the wakers, and is polled by what is between.
    fn enter_above(&mut self) -> io::Result<Directive> {
        let told = self.entry.line.state.directive();
        if told == Directive::Cut {
            self.peer = Peer::Gone;
            return Err(cut());
        }
        Ok(told)
    }

    /// Whether the connection, told to close a while ago, has nothing to wait for: no request is in
    /// flight on it, and the peer has acknowledged what it was sent.
    #[cold]
    fn expires(&self) -> bool {
        let line = &self.entry.line;
        let in_flight = if line.sniffer.is_http2() {
            line.may_have_streams()
        } else if !self.is_top() {
            line.flags.has(BUSY)
        } else {
            // Over HTTP/1 idle connections were closed when this one was told to, so it has been
            // upgraded, its first request is running, or its first head is not whole.
            self.written > Written::Nothing || self.heads.first_is_whole()
        };
        let responded = line.flags.has(RESPONDED);
        let owes = match self.io.as_ref().and_then(tcp).and_then(unacknowledged) {
            Some(left) => left > if responded { 0 } else { FAREWELL },
            None => responded,
        };
        // What is spoken on IO of another kind is not known.
        self.linger.is_some() && !in_flight && !owes && !self.blocked
    }

    #[cold]
    fn wrote_while_stopping(&mut self, bytes: usize) {
        if self.entry.line.flags.has(HANDSHAKE) {
            return;
        }
        let bytes = u8::try_from(bytes).unwrap_or(u8::MAX);
        self.written_late = self.written_late.saturating_add(bytes);
        if self.entry.line.sniffer.is_http1() || u32::from(self.written_late) > FAREWELL {
            self.entry.line.flags.set(RESPONDED);
        }
    }

    /// Writes, and notes what came of it.
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
            this.entry.line.sniffer.note_write();
        }
        let told = this.enter(WakerSlot::Write, cx)?;
        if is_top && this.entry.line.flags.has(LOOKED_AT) {
            // Before the client can send the next request.
            requests::wrote(&this.entry.line, head);
        }
        let result = write(Pin::new(this.get_mut()), cx);
        let upgrades = head.starts_with(SWITCHING_PROTOCOLS);
        this.activity.wrote(upgrades, result.is_ready());
        this.blocked = result.is_pending();
        match &result {
            Poll::Ready(Ok(bytes)) => {
                let written = if upgrades {
                    if is_top {
                        this.entry.line.upgraded();
                    }
                    Written::Upgrade
                } else {
                    Written::Something
                };
                this.written = this.written.max(written);
                this.heads.wrote();
                if this.layer > 0 && is_top {
                    this.entry.line.flags.set(BUSY);
                }
                if told > Directive::Stay && is_top {
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
        let told = this.enter(WakerSlot::Read, cx)?;
        let before = buf.filled().len();
        let room = buf.remaining() > 0;
        let is_top = this.is_top();
        let line = &this.entry.line;
        if is_top && line.sniffer.has_kept() {
            line.sniffer.hand_on(buf);
            return Poll::Ready(Ok(()));
        }
        let io = present(this.io.as_mut());
        let mut result = Pin::new(&mut *io).poll_read(cx, buf);
        if result.is_pending() && told >= Directive::Close {
            result = read_now(io, buf);
        }
        let read = &buf.filled()[before..];
        if !read.is_empty() {
            if told > Directive::Stay {
                line.read_while_stopping(told);
            }
            if !is_top {
                return result;
            }
            this.activity.read(read);
            if line.flags.has(LOOKED_AT) {
                requests::read(line, read);
            }
            this.heads.last(read);
            if this.written == Written::Nothing {
                this.heads.first(read);
                if this.layer > 0 && this.heads.first_is_whole() {
                    line.flags.set(BUSY);
                }
            }
            let lets_in = || told == Directive::Stay || line.owner.phase() < Phase::Draining;
            let kept = line.sniffer.note(read, lets_in);
            if kept > 0 {
                let passed = buf.filled().len() - kept;
                buf.set_filled(passed);
            }
            if line.sniffer.is_refused() {
                // Before the server has read a frame.
                buf.set_filled(before);
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            return result;
        }
        match &result {
            Poll::Pending if is_top => {
                line.sniffer.note_nothing();
                if this.activity.is_idle(&line.owner) {
                    // To the server this is a peer that has closed.
                    return Poll::Ready(Ok(()));
                }
            }
            Poll::Ready(Ok(())) if room => {
                this.peer = Peer::Finished;
                if is_top {
                    line.sniffer.note_end();
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
                &(self.entry.line.state.directive() == Directive::Cut),
            )
            .finish_non_exhaustive()
    }
}
