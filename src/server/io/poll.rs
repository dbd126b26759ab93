//! Reads and writes of the tracked IO: what each records, and what it refuses after the cut.
//!
//! This file is long because what a read does depends on what the writes have recorded.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{GracefulIo, Peer, Writing, frames, heads, present};
use crate::{
    connection::{
        directive::Directive,
        flags::{BUSY, HANDSHAKE, INSPECTED, RESPONDED, STREAMLESS, UPGRADED, UPGRADES},
        wakers::WakerSlot,
    },
    phase::Phase,
    server::{
        linger::{Written, gave_up},
        requests,
        send_queue::unacknowledged,
        socket::{has_unread, probes_idle_peer, read_now, tcp},
    },
};

/// The beginning of a response after which the connection no longer speaks HTTP/1.
const SWITCHING_PROTOCOLS: &[u8] = b"HTTP/1.1 101";

#[cold]
fn cut() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "the connection was cut, because the time to shut down is over",
    )
}

impl<I: 'static> GracefulIo<I> {
    /// Called before each poll of the wrapped IO. Registers the waker of the task, so that the cut wakes
    /// it. Fails if the connection has been cut, or has expired.
    #[inline]
    fn enter(&mut self, slot: WakerSlot, cx: &Context<'_>) -> io::Result<Directive> {
        if self.layer > 0 {
            return self.enter_above();
        }
        let directive = self.guard.entry.state.enter(&mut self.waker, slot, cx);
        if directive >= Directive::Leave {
            self.enter_leaving(directive, slot, cx)?;
        }
        Ok(directive)
    }

    /// As `enter`, from the directive to leave on.
    #[cold]
    fn enter_leaving(
        &mut self,
        directive: Directive,
        slot: WakerSlot,
        cx: &Context<'_>,
    ) -> io::Result<()> {
        if self.seen.notes(directive) {
            self.note_received();
        }
        // Only reads expire: a write may belong to a response.
        let expires =
            || directive == Directive::Expire && slot == WakerSlot::Read && self.expires(cx);
        if directive == Directive::Cut {
            self.peer = Peer::Gone;
            return Err(cut());
        }
        // The drop waits for a peer that still sends or receives.
        if expires() { Err(cut()) } else { Ok(()) }
    }

    /// Notes whether the peer has received the responses of the stop: before anything is written because of the
    /// directive, such as a GOAWAY. A peer that vanishes later has lost no response.
    fn note_received(&mut self) {
        let entry = &self.guard.entry;
        let owes = entry.flags.has(RESPONDED);
        if owes && !self.is_blocked() && self.unacknowledged() == Some(0) {
            self.seen.note_delivered();
            entry.flags.take(RESPONDED);
        }
    }

    /// A read or a write has failed, so the drop does not wait for the peer. If the kernel has given up the peer, the
    /// peer may have lost a response. It has lost one
    ///
    /// - if the kernel had no room for the rest of it;
    /// - if the kernel does not probe idle peers, because then it gives up only a peer that owes an acknowledgement;
    /// - if the connection leaves, because then [`note_received`](Self::note_received) has cleared `RESPONDED` if the peer
    ///   had acknowledged everything.
    #[cold]
    fn failed(&mut self, error: &io::Error) {
        let first = std::mem::replace(&mut self.peer, Peer::Gone) < Peer::Gone;
        let entry = &self.guard.entry;
        let stops = entry.state.directive().is_uncut_stop() && entry.flags.has(RESPONDED);
        let Some(tcp) = self.io.as_ref().and_then(tcp) else {
            return;
        };
        let owes = || self.is_blocked() || self.seen.leaves() || !probes_idle_peer(tcp);
        if first && stops && gave_up(error) && owes() {
            entry.owner.connections.torn(entry);
        }
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

    /// The number of bytes that the peer has not acknowledged, if it is known. Not if the connection has ended: the next
    /// read tells how.
    fn unacknowledged(&self) -> Option<u32> {
        let tcp = self.io.as_ref().and_then(tcp)?;
        tcp.peer_addr().ok()?;
        unacknowledged(tcp)
    }

    /// Whether a connection that was instructed to close a while ago can be closed now: no request is in
    /// flight on it, and the peer has acknowledged the responses of the stop.
    #[cold]
    fn expires(&self, cx: &Context<'_>) -> bool {
        let entry = &self.guard.entry;
        let in_flight = if entry.sniffer.is_http2() {
            // An HTTP/2 server reads before it writes. What the last stream has left, such as the head of a
            // response without a body, is written after this read. So the next read decides.
            let decides = entry.flags.has(STREAMLESS);
            let has_streams = entry.may_have_streams(|| entry.owner.pieces());
            if has_streams {
                // It may have begun after a read that found no stream.
                entry.flags.take(STREAMLESS);
            } else if !decides {
                entry.flags.set(STREAMLESS);
                cx.waker().wake_by_ref();
            }
            has_streams || !decides
        } else if !self.is_top() {
            entry.flags.has(BUSY)
        } else {
            // Idle HTTP/1 connections have already closed. So this connection was upgraded, or its first
            // request is running, or its first head is incomplete.
            self.written > Written::Nothing || self.heads.first_is_whole()
        };
        let owes = || entry.flags.has(RESPONDED) && self.unacknowledged() != Some(0);
        // Without `linger` the IO is no socket, and its protocol is unknown.
        self.linger.is_some() && !in_flight && !self.is_blocked() && !owes()
    }

    fn is_blocked(&self) -> bool {
        self.writing == Writing::Blocked
    }

    /// The last bytes read or written belong to HTTP/1, as far as this can be told.
    fn speaks_http1(&self) -> bool {
        let entry = &self.guard.entry;
        if entry.is_served() {
            entry.sniffer.is_http1() && !entry.flags.has(UPGRADED)
        } else {
            self.activity.is_http1()
        }
    }

    /// Reports the end that the peer has sent, as soon as no write is blocked.
    #[cold]
    fn poll_withheld(&mut self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        let entry = &self.guard.entry;
        if self.is_blocked() {
            // The IO in between is not polled any more, so it does not poll the layer that has the wakers.
            let directive = entry.state.enter(&mut self.waker, WakerSlot::Read, cx);
            if directive < Directive::Cut {
                return Poll::Pending;
            }
            self.peer = Peer::Gone;
            return Poll::Ready(Err(cut()));
        }
        entry.was_read_once_more();
        entry.sniffer.note_end();
        self.peer = Peer::Finished;
        Poll::Ready(Ok(()))
    }

    /// Records whether a write or a flush was blocked.
    #[inline]
    fn note_writing(&mut self, is_pending: bool) {
        match (self.is_blocked(), is_pending) {
            (true, true) => {}
            (false, true) => self.set_writing(Writing::Blocked),
            (_, false) => self.set_writing(Writing::Open),
        }
    }

    #[inline]
    fn set_writing(&mut self, writing: Writing) {
        let before = std::mem::replace(&mut self.writing, writing);
        if before == writing {
            return;
        }
        let state = &self.guard.entry.state;
        if self.is_top() {
            state.set_blocked(self.is_blocked());
        }
        if before == Writing::Blocked && self.peer == Peer::Withheld {
            // The server reads the end now.
            state.wake_reader();
        }
    }

    /// `head`: the beginning of the bytes.
    #[cold]
    fn wrote_while_stopping(&self, head: &[u8], bytes: usize) {
        let entry = &self.guard.entry;
        if entry.flags.has(HANDSHAKE | RESPONDED) {
            return;
        }
        // Control frames are in one piece.
        let may_be_response = || head.get(..bytes).is_none_or(frames::may_be_response);
        if entry.sniffer.is_http1() || may_be_response() {
            entry.flags.set(RESPONDED);
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
        this.heads.begins_write();
        let directive = this.enter(WakerSlot::Write, cx)?;
        if is_top && this.guard.entry.flags.has(INSPECTED) {
            // Before the write, because the client may send the next request right after it.
            requests::wrote(&this.guard.entry, head);
        }
        let result = write(Pin::new(this.get_mut()), cx);
        // Only the first write after a read begins with a head, except if requests were pipelined: then a write
        // may begin with the response to an upgrade that was asked for. `serve` sees its responses.
        let entry = &this.guard.entry;
        let upgrades = head.starts_with(SWITCHING_PROTOCOLS)
            && (this.heads.is_asking() || entry.flags.has(UPGRADES))
            && !entry.is_served();
        this.activity.wrote(upgrades, result.is_ready());
        if let Poll::Ready(Err(error)) = &result {
            this.failed(error);
        }
        this.note_writing(result.is_pending());
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
                    this.wrote_while_stopping(head, *bytes);
                }
            }
            Poll::Ready(Err(_)) | Poll::Pending => {}
        }
        result
    }
}

/// The path of a request that begins with these bytes. Nothing if it is incomplete.
#[cold]
fn path(read: &[u8]) -> &str {
    let mut parts = read.split(|byte| matches!(byte, b' ' | b'?'));
    // What follows shows that it is complete.
    let path = parts.nth(1).filter(|_| parts.next().is_some());
    path.and_then(|path| std::str::from_utf8(path).ok())
        .unwrap_or_default()
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
        if this.peer == Peer::Withheld && room {
            return this.poll_withheld(cx);
        }
        let entry = &this.guard.entry;
        if is_top && entry.sniffer.has_held_back() {
            entry.sniffer.release_held_back(buf);
            return Poll::Ready(Ok(()));
        }
        // hyper reads twice when it begins to wait for a head.
        if is_top && directive == Directive::Stay && entry.sniffer.would_find_nothing() {
            return Poll::Pending;
        }
        let io = present(this.io.as_mut());
        let mut result = Pin::new(&mut *io).poll_read(cx, buf);
        if result.is_pending() && directive >= Directive::Read {
            result = read_now(io, buf);
            if result.is_pending() && this.layer == 0 {
                this.guard.entry.was_read_once_more();
            }
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
            if entry.flags.has(INSPECTED) {
                requests::read(entry, read);
            }
            // The connection may not have its directive yet.
            let is_probe =
                || entry.owner.phase() > Phase::Serving && entry.owner.is_probe(path(read));
            let admits = || directive == Directive::Stay || entry.owner.phase() < Phase::Draining;
            // `serve` says it by a flag. While serving, no other server is worth the search.
            let may_have_body = || {
                let searches = entry.owner.phase() > Phase::Serving;
                !entry.is_served() && (!searches || heads::may_have_body(read))
            };
            this.heads.note_last(read, is_probe, admits, may_have_body);
            if this.written == Written::Nothing {
                this.heads.note_first(read);
                if this.layer > 0 && this.heads.first_is_whole() {
                    entry.flags.set(BUSY);
                }
            }
            let kept = entry.sniffer.note(read);
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
                let owner = &entry.owner;
                // Asks the operating system too: the runtime may not have done so since the peer sent.
                if this.activity.is_idle(&owner.starved, || owner.in_flight()) && !has_unread(io) {
                    // Reports the end of the stream, so that the server closes the connection.
                    return Poll::Ready(Ok(()));
                }
            }
            Poll::Ready(Ok(())) if room => {
                if this.layer == 0 {
                    entry.was_read_once_more();
                }
                if is_top && this.is_blocked() && this.speaks_http1() {
                    // The client may still read. If hyper read the end now, it would drop the rest of the
                    // response, whose request may have finished.
                    this.peer = Peer::Withheld;
                    return this.poll_withheld(cx);
                }
                this.peer = Peer::Finished;
                if is_top {
                    entry.sniffer.note_end();
                }
            }
            Poll::Pending | Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => this.failed(error),
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
        if self.writing != Writing::Shut {
            self.note_writing(result.is_pending());
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.enter(WakerSlot::Write, cx)?;
        let result = Pin::new(present(self.io.as_mut())).poll_shutdown(cx);
        if matches!(result, Poll::Ready(Ok(()))) {
            self.set_writing(Writing::Shut);
        }
        result
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

#[cfg(all(test, unix, not(tower_graceful_loom)))]
mod tests {
    use std::{
        io::{self, Write},
        net::{self, Ipv4Addr},
        pin::Pin,
        sync::Arc,
        task::{Context, Poll},
        time::Duration,
    };

    use futures_util::FutureExt;
    use tokio::{
        io::{
            AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, duplex, join,
            split,
        },
        net::TcpListener,
        task::{consume_budget, coop},
        time,
    };

    use super::UPGRADED;
    use crate::{
        Graceful,
        connection::descriptors::{Socket, SocketKind},
    };

    /// Reports the end once, which the contract of `AsyncRead` allows.
    struct EndsOnce(ReadHalf<DuplexStream>, bool);

    impl AsyncRead for EndsOnce {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.1 {
                return Poll::Pending;
            }
            let before = buf.filled().len();
            let read = Pin::new(&mut self.0).poll_read(cx, buf);
            self.1 = read.is_ready() && buf.filled().len() == before;
            read
        }
    }

    #[tokio::test]
    async fn an_end_that_was_withheld_is_reported_once_the_writes_go_on() {
        let (mut client, server) = duplex(64);
        let (read, write) = split(server);
        let mut io = Graceful::new().track(join(EndsOnce(read, false), write));
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        client.shutdown().await.unwrap();
        io.read_exact(&mut [0; 18]).await.unwrap();
        io.write_all(&[b'x'; 64]).await.unwrap();
        assert!(io.write(b"x").now_or_never().is_none());
        assert!(io.read(&mut [0]).now_or_never().is_none());
        client.read_exact(&mut [0; 64]).await.unwrap();
        io.write_all(b"x").await.unwrap();
        assert_eq!(io.read(&mut [0]).now_or_never().unwrap().unwrap(), 0);
    }

    /// A body may contain anything.
    #[tokio::test]
    async fn only_a_write_after_a_read_can_begin_with_the_head_of_an_upgrade() {
        for (served, request, upgrades) in [
            (false, false, false),
            (false, true, true),
            (true, true, false),
        ] {
            let (mut client, server) = duplex(1000);
            let mut io = Graceful::new().track(server);
            if served {
                io.guard.entry.sniffer.listen();
            }
            client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            io.read_exact(&mut [0; 18]).await.unwrap();
            if !request {
                io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 16\r\n\r\n")
                    .await
                    .unwrap();
            }
            io.write_all(b"HTTP/1.1 101 abc").await.unwrap();
            let upgraded = io.guard.entry.flags.has(UPGRADED);
            assert_eq!(upgraded, upgrades, "{served} {request}");
        }
    }

    /// The request is in the socket, and the runtime does not tell.
    #[tokio::test]
    async fn a_connection_with_an_unread_request_is_not_closed_for_its_descriptor() {
        let graceful = Graceful::new();
        let starved = &graceful.shared().starved;
        starved.mark_layered();
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut client = net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let mut io = graceful.track(tcp.accept().await.unwrap().0);
        let request = b"GET / HTTP/1.1\r\n\r\n";
        client.write_all(request).unwrap();
        io.read_exact(&mut [0; 18]).await.unwrap();
        io.write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .await
            .unwrap();
        let nothing = time::timeout(Duration::from_millis(20), io.read(&mut [0])).await;
        assert!(nothing.is_err());
        let kind = SocketKind::Tcp(tcp.into_std().unwrap());
        let is_passed = false;
        starved.add_waiting(&Arc::new(Socket { kind, is_passed }));
        let round = async || {
            while starved.begin_round().is_none() {
                time::sleep(Duration::from_millis(1)).await;
            }
        };
        round().await;
        assert!(io.read(&mut [0]).now_or_never().is_none());
        for _ in 0..3 {
            round().await;
        }
        client.write_all(request).unwrap();
        while coop::has_budget_remaining() {
            let _ = consume_budget().now_or_never();
        }
        let read = io.read(&mut [0]).now_or_never();
        assert!(read.is_none(), "{read:?}");
        assert_eq!(io.read(&mut [0; 18]).await.unwrap(), 18);
    }
}
