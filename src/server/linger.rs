//! Closing a connection so that the peer receives everything that was written.
//!
//! If a socket is closed while its peer still sends, the kernel resets the connection and discards
//! what it has not delivered yet, such as the rest of a response. A peer may still send because it
//! updates an HTTP/2 window, answers a ping, pipelines a request, or continues an upload
//! ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)). So when a server drops a
//! connection, this module closes the writing side, and reads and discards what the peer sends until
//! the peer closes too. The connection counts as open until then.
//!
//! The socket is closed
//! - when the peer has closed its side and everything is delivered, or the peer has reset the
//!   connection;
//! - as soon as everything is delivered, if nothing is unread and the peer will send nothing: it has
//!   closed its side, its last request is known to have no body, or the server has dropped the connection
//!   while the service was stopping, and no response was sent on it since the stop began. So an idle
//!   connection costs no time. After an upgrade the peer may send at any time;
//! - when everything is delivered, and the peer has sent nothing for [`SILENT_PEER_TIMEOUT`] (for [`ACTIVE_PEER_TIMEOUT`] if it
//!   has sent something since, for [`STARVED_TIMEOUT`] while a listener waits for file descriptors), or has
//!   not closed for [`LINGER_TIMEOUT`];
//! - while serving, when the peer has acknowledged nothing for [`STALLED_TIMEOUT`], [`FAR_PEER_TIMEOUT`] after a
//!   handshake that has failed, or not everything within [`UNDELIVERED_TIMEOUT`]. The kernel continues to send;
//! - while the service stops, when the peer [has vanished](Queue::has_vanished), if no response was sent on the connection
//!   since the stop began. The kernel continues to send, and the report does not count the connection;
//! - after an upgrade: [`SILENT_PEER_TIMEOUT`] after the peer last acknowledged something, [`FAR_PEER_TIMEOUT`] if more
//!   is left than a close frame, or [`SILENT_PEER_TIMEOUT`] after everything was delivered. If the service stops, the
//!   report counts it if more was left than a close frame;
//! - while the service stops, when the connection is cut. The report gives the number of bytes that
//!   were not delivered;
//! - when the kernel gives up the peer. The report counts the connection if a response of the stop is lost, or the
//!   rest of an upgraded connection.
//!
//! The number of delivered bytes is unknown if the operating system does not give it, or if the IO is
//! not a TCP socket. Then all written bytes count as delivered. Such a connection is never closed at
//! once if something was written on it: it stays open as long as one whose response was just sent.
//!
//! This file is long because the rules above and the code that follows them must be read together.

use std::{
    io::{
        self,
        ErrorKind::{BrokenPipe, ConnectionReset, NotConnected},
    },
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    runtime::Handle,
    time::{self, Instant},
};

#[cfg(unix)]
use tokio::net::UnixStream;

use super::{
    entry_guard::EntryGuard,
    send_queue::{Queue, queue},
    socket::{has_unread, take, tcp},
};
use crate::{
    connection::{
        directive::Directive,
        flags::{LINGERS, RESPONDED, UPGRADED},
        wakers::{RegisteredWaker, WakerSlot},
    },
    sync::Ordering,
};

/// How long the peer may be silent after its last byte, if it has sent something since everything was
/// delivered.
const ACTIVE_PEER_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the peer may be silent if it has sent nothing since everything was delivered. It may be in
/// the middle of an upload, or a frame may be in transit.
const SILENT_PEER_TIMEOUT: Duration = Duration::from_millis(250);

/// Replaces [`SILENT_PEER_TIMEOUT`] while a listener waits for file descriptors, because this connection holds one.
const STARVED_TIMEOUT: Duration = Duration::from_millis(25);

/// How long a peer that never stops sending is read from after everything was delivered.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the peer of an upgraded connection may acknowledge nothing while more than a close frame is undelivered:
/// longer than a round trip to a distant client.
const FAR_PEER_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the peer may acknowledge nothing while bytes are undelivered and the service is serving.
const STALLED_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the peer may take to acknowledge everything while the service is serving.
const UNDELIVERED_TIMEOUT: Duration = Duration::from_secs(300);

/// The first and the longest interval between two queries of the undelivered bytes. Each interval is
/// twice the one before. While the service is serving, a peer that has not acknowledged everything after
/// [`SLOW_PEER`] is queried less often, because there may be very many of them.
const FIRST_QUERY_INTERVAL: Duration = Duration::from_millis(2);
const LONGEST_QUERY_INTERVAL: Duration = Duration::from_millis(100);
const SLOW_PEER_QUERY_INTERVAL: Duration = Duration::from_secs(1);
const SLOW_PEER: Duration = Duration::from_secs(2);

/// The number of reads before the task yields to others, and the size of each read in bytes.
const READS: usize = 16;
const READ: usize = 4096;

/// The kernel counts an unacknowledged FIN as one byte of the send queue.
const FIN: u32 = 1;

/// The most bytes that closing a connection sends without any response: HTTP/2 frames (two GOAWAY and
/// a PING, 17 bytes each) in TLS records, a TLS alert, and a FIN. So many undelivered bytes or fewer
/// may contain no response.
pub(super) const CLOSING_BYTES: u32 = 192;

/// What was written on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Written {
    Nothing,
    Something,
    /// By a handshake that has failed. Known when the connection is dropped.
    Handshake,
    /// A `101 Switching Protocols` was written, so the connection is passed to a handler.
    Upgrade,
}

/// What was last read and written on a dropped connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Last {
    pub(super) written: Written,
    /// The last bytes read are an HTTP/1 request without a body. Then the client sends nothing more until
    /// it has read the response.
    pub(super) request: bool,
    /// A response may just have been sent. Not changed by a stop that begins afterwards.
    pub(super) responded: bool,
    /// The writing side is closed.
    pub(super) shut: bool,
}

/// Closes a connection that its server has dropped, if the IO is a `TcpStream` or `UnixStream` of
/// tokio. Other IO is dropped.
pub(super) fn close_socket<I: 'static>(socket: I, last: Last, guard: EntryGuard) {
    let mut socket = Some(socket);
    if let Some(tcp) = take::<TcpStream>(&mut socket) {
        return close(tcp, last, guard);
    }
    #[cfg(unix)]
    if let Some(unix) = take::<UnixStream>(&mut socket) {
        return close(unix, last, guard);
    }
    drop((socket, guard));
}

/// Closes a connection that its server has dropped. Spawns a task for that, unless the connection is
/// idle or there is no runtime.
pub(super) fn close<I>(io: I, last: Last, guard: EntryGuard)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut lingering = Lingering {
        io,
        waker: RegisteredWaker::default(),
        eof: false,
        received: false,
        last,
        is_undecided: false,
        guard,
    };
    // Most connections are idle and need no task. Only a TCP socket is polled here: this runs in a
    // `drop`, perhaps during a panic, and the poll of other IO may panic too, which would abort.
    if tcp(&lingering.io).is_some() {
        let noop = &mut Context::from_waker(Waker::noop());
        if lingering.poll_peer(noop).is_ready() && !lingering.eof {
            return;
        }
    }
    let left = lingering.undelivered();
    if lingering.is_idle(left) {
        return;
    }
    lingering.note_undelivered(left.unwrap_or(0));
    lingering.is_undecided = true;
    lingering.guard.entry.flags.set(LINGERS);
    if let Ok(runtime) = Handle::try_current() {
        drop(runtime.spawn(lingering.until_closed()));
    }
}

/// Whether the kernel has given up the peer. A peer that has reset the connection has left.
pub(super) fn gave_up(error: &io::Error) -> bool {
    !matches!(error.kind(), ConnectionReset | BrokenPipe | NotConnected)
}

struct Lingering<I: 'static> {
    io: I,
    waker: RegisteredWaker,
    /// The peer's writing side is closed.
    eof: bool,
    /// Bytes were received since `linger` last checked.
    received: bool,
    last: Last,
    /// `linger` has not returned.
    is_undecided: bool,
    // After the IO, so that the connection is closed before it is removed.
    guard: EntryGuard,
}

impl<I> Drop for Lingering<I> {
    /// Counts what is lost.
    fn drop(&mut self) {
        if self.is_undecided {
            // There is no runtime, or it has ended and dropped the task.
            let queue = self.queue().filter(|queue| !self.is_given_up(*queue));
            self.note_undelivered(queue.unwrap_or_default().unacknowledged);
        }
        let entry = &self.guard.entry;
        // While serving, nothing is counted. After the cut the connection is in the list.
        if entry.state.directive().is_uncut_stop() && entry.undelivered.load(Ordering::Relaxed) > 0
        {
            entry.owner.connections.torn(entry);
        }
    }
}

impl<I> Lingering<I> {
    /// What is unacknowledged, with 0 bytes if they contain nothing that must be waited for. `None` if it is unknown.
    fn queue(&self) -> Option<Queue> {
        let queue = queue(tcp(&self.io)?)?;
        // If the peer sends nothing, closing causes no reset, and the kernel delivers the rest, if the peer still
        // exists. A response of a stop must have been received.
        let may_be_response = self.guard.entry.flags.has(RESPONDED);
        let nothing = if self.peer_is_silent() && !may_be_response {
            CLOSING_BYTES
        } else {
            FIN
        };
        let is_owed = queue.unacknowledged > nothing;
        Some(if is_owed { queue } else { Queue::default() })
    }

    /// See [`queue`](Self::queue).
    fn undelivered(&self) -> Option<u32> {
        self.queue().map(|queue| queue.unacknowledged)
    }

    /// Whether the peer has vanished, and all its responses were written before the stop.
    fn is_given_up(&self, queue: Queue) -> bool {
        queue.has_vanished() && !self.guard.entry.flags.has(RESPONDED)
    }

    /// The number of bytes that are lost by an error.
    fn lost_by(&self, error: &io::Error) -> u32 {
        let entry = &self.guard.entry;
        // What was written before the stop is no loss.
        let is_loss = gave_up(error) && entry.flags.has(RESPONDED | UPGRADED);
        if is_loss {
            entry.undelivered.load(Ordering::Relaxed)
        } else {
            0
        }
    }

    /// Whether the peer sends nothing more before it has read what was written. After an upgrade a peer may
    /// send at any time.
    fn peer_is_silent(&self) -> bool {
        let waits = self.last.request || !self.last.responded;
        waits && self.last.written != Written::Upgrade
    }

    /// Stores for the report how many of these undelivered bytes are a loss. This is stored after each query, because
    /// the task may not run between the cut and the report. A close frame alone is no loss.
    fn note_undelivered(&self, left: u32) {
        let is_close_frame = self.last.written == Written::Upgrade && left <= CLOSING_BYTES;
        let loss = if is_close_frame { 0 } else { left };
        self.guard.entry.undelivered.store(loss, Ordering::Relaxed);
    }

    /// Whether the connection can be closed at once. `left`: the number of undelivered bytes, if known.
    fn is_idle(&self, left: Option<u32>) -> bool {
        let silent = self.eof || self.peer_is_silent();
        // Asks the operating system too: the runtime may not have done so since the peer sent, and tells
        // nothing to a task that has used up its budget.
        silent && !self.received && left == Some(0) && !has_unread(&self.io)
    }
}

impl<I> Lingering<I>
where
    I: AsyncRead + AsyncWrite + Unpin + 'static,
{
    /// Closes the writing side, then reads and discards. Ready when the connection is cut, when the peer has closed
    /// its side, or with an error.
    fn poll_peer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, waker, .. } = self;
        if self.guard.entry.state.enter(waker, WakerSlot::Read, cx) == Directive::Cut {
            return Poll::Ready(Ok(()));
        }
        if !self.last.shut && Pin::new(&mut *io).poll_shutdown(cx)?.is_ready() {
            self.last.shut = true;
        }
        if self.eof {
            return Poll::Pending;
        }
        for _ in 0..READS {
            let mut space = [std::mem::MaybeUninit::uninit(); READ];
            let mut buf = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut *io).poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                self.eof = true;
                return Poll::Ready(Ok(()));
            }
            self.received = true;
            // It sends although its last request had no body.
            self.last.request = false;
        }
        // Yields to other tasks, because the peer may never stop sending.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    async fn until_closed(mut self) {
        let left = self.linger().await;
        self.note_undelivered(left);
        self.is_undecided = false;
    }

    /// Waits until the connection can be closed. Returns how many bytes the peer has not received and loses, as far as
    /// this is known.
    async fn linger(&mut self) -> u32 {
        let mut interval = FIRST_QUERY_INTERVAL;
        let mut left = u32::MAX;
        let begun = Instant::now();
        // When the peer last acknowledged something, and when it last sent something.
        let (mut took, mut sent) = (begun, begun);
        let mut delivered = None;
        loop {
            let peer = std::future::poll_fn(|cx| self.poll_peer(cx));
            if let Ok(ended) = time::timeout(interval, peer).await {
                if let Err(error) = ended {
                    return self.lost_by(&error);
                }
                if self.guard.entry.state.directive() == Directive::Cut {
                    return self.undelivered().unwrap_or(0);
                }
            }
            let now = Instant::now();
            let queue = self.queue();
            let known = queue.map(|queue| queue.unacknowledged);
            if known == Some(0) {
                // Nothing is left also after an error that no read has returned.
                let error = tcp(&self.io).and_then(|tcp| tcp.take_error().ok()?);
                if let Some(error) = error {
                    return self.lost_by(&error);
                }
            }
            let before = std::mem::replace(&mut left, known.unwrap_or(0));
            self.note_undelivered(left);
            let received = std::mem::take(&mut self.received);
            if left < before {
                took = now;
            }
            if received {
                sent = now;
            }
            let upgraded = self.last.written == Written::Upgrade;
            let serving = self.guard.entry.state.directive() == Directive::Stay;
            let is_slow = left > 0 && serving && !upgraded && now - begun >= SLOW_PEER;
            interval = (interval * 2).min(if is_slow {
                SLOW_PEER_QUERY_INTERVAL
            } else {
                LONGEST_QUERY_INTERVAL
            });
            if left > 0 {
                let patience = if upgraded && left > CLOSING_BYTES {
                    FAR_PEER_TIMEOUT
                } else if upgraded {
                    // The handler has dropped it, and has waited for the peer as long as it wanted.
                    SILENT_PEER_TIMEOUT
                } else if serving && self.last.written == Written::Handshake {
                    // The rest says at most why it has failed.
                    FAR_PEER_TIMEOUT
                } else if serving {
                    STALLED_TIMEOUT
                } else {
                    // The cut ends it.
                    Duration::MAX
                };
                let given_up = queue.is_some_and(|queue| self.is_given_up(queue));
                let ends = if serving {
                    now - begun >= UNDELIVERED_TIMEOUT
                } else {
                    given_up
                };
                if now - took >= patience || ends {
                    // The kernel continues to send. An upgraded connection loses the rest as soon as its peer sends
                    // something.
                    return if upgraded { left } else { 0 };
                }
                continue;
            }
            let silent = self.peer_is_silent() && !received && !has_unread(&self.io);
            if self.eof || known.is_some() && silent {
                return 0;
            }
            let (since, talks) = *delivered.get_or_insert((now, false));
            let talks = talks || received;
            delivered = Some((since, talks));
            let most = if upgraded {
                SILENT_PEER_TIMEOUT
            } else {
                LINGER_TIMEOUT
            };
            let silence = if talks && !upgraded {
                ACTIVE_PEER_TIMEOUT
            } else if known.is_some() && self.guard.entry.owner.starved.is_waiting() {
                STARVED_TIMEOUT
            } else {
                SILENT_PEER_TIMEOUT
            };
            if now - sent.max(since) >= silence || now - since >= most {
                return 0;
            }
        }
    }
}

#[cfg(all(test, target_os = "linux", not(tower_graceful_loom)))]
mod tests {
    use std::{
        io::{Read, Write},
        net,
    };

    use futures_util::FutureExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpSocket},
    };

    use super::{super::send_queue::unacknowledged, *};
    use crate::{GracefulIo, Report, handle::graceful::Graceful};

    /// A connection that its server has dropped, and whose client has much left to read. The client sends
    /// nothing and reads at least as much as makes its kernel acknowledge something. Its reads block the thread:
    /// otherwise the paused clock would go on while they wait for the kernel.
    async fn dropped(graceful: &Graceful) -> net::TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(4096).unwrap();
        let client = client.connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let mut io = graceful.track(accepted.unwrap().0);
        let much = vec![0; 1 << 20];
        let write = std::future::poll_fn(|cx| Pin::new(&mut io).poll_write(cx, &much));
        assert!(write.await.unwrap() > 200_000);
        drop(io);
        let client = client.unwrap().into_std().unwrap();
        client.set_nonblocking(false).unwrap();
        client
    }

    /// No server is left that could drop a response.
    #[tokio::test]
    async fn a_blocked_connection_that_its_server_has_dropped_delays_no_other() {
        let graceful = Graceful::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut io = graceful.track(listener.accept().await.unwrap().0);
        let request = b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n";
        (&client).write_all(request).unwrap();
        io.read_exact(&mut vec![0; request.len()]).await.unwrap();
        let much = vec![b'x'; 1 << 20];
        while io.write_all(&much).now_or_never().is_some() {}
        let connections = &graceful.shared().connections;
        assert!(connections.has_torn_by_close());
        drop(io);
        assert_eq!(graceful.connections(), 1);
        assert!(!connections.has_torn_by_close());
    }

    async fn wait_until_closed(graceful: &Graceful) {
        let closed = async {
            while graceful.connections() > 0 {
                time::sleep(FIRST_QUERY_INTERVAL).await;
            }
        };
        time::timeout(Duration::from_secs(20), closed)
            .await
            .unwrap();
    }

    async fn connect() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        (client.unwrap(), accepted.unwrap().0)
    }

    /// The client's kernel takes little from it before the client reads.
    async fn connect_with_little_room() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpSocket::new_v4().unwrap();
        client.set_recv_buffer_size(4096).unwrap();
        let client = client.connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let tcp = accepted.unwrap().0;
        tcp.set_nodelay(true).unwrap();
        (client.unwrap(), tcp)
    }

    /// Writes pieces of this size until the client's kernel has no room for one.
    async fn fill_room(io: &mut GracefulIo<TcpStream>, size: usize) {
        // The kernel of the client acknowledges what it has room for within 40 ms.
        let acknowledges = Duration::from_millis(60);
        while unacknowledged(io.get_ref()) == Some(0) {
            io.write_all(&vec![b'x'; size]).await.unwrap();
            if unacknowledged(io.get_ref()) != Some(0) {
                time::sleep(acknowledges).await;
            }
        }
        let left = unacknowledged(io.get_ref()).unwrap();
        assert!(left as usize <= size, "{left}");
    }

    /// As few bytes as a server writes to close a connection.
    #[tokio::test]
    async fn a_short_response_that_the_client_has_not_received_is_waited_for_while_stopping() {
        let graceful = Graceful::new();
        let (mut client, tcp) = connect_with_little_room().await;
        let mut io = graceful.track(tcp);
        let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        client.write_all(request).await.unwrap();
        io.read_exact(&mut vec![0; request.len()]).await.unwrap();
        graceful.shutdown();
        fill_room(&mut io, 100).await;
        drop(io);
        assert_eq!(graceful.connections(), 1);
        client.read_to_end(&mut Vec::new()).await.unwrap();
        wait_until_closed(&graceful).await;
    }

    /// Its request looked like one without a body. The client would lose the response by a reset.
    #[tokio::test]
    async fn a_client_that_sends_on_after_its_request_is_read_from() {
        let graceful = Graceful::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut io = graceful.track(listener.accept().await.unwrap().0);
        let request = b"GET / HTTP/1.1\r\ncontent-length: 9\r\n\r\n";
        client.write_all(request).await.unwrap();
        io.read_exact(&mut vec![0; request.len()]).await.unwrap();
        graceful.shutdown();
        io.write_all(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
            .await
            .unwrap();
        client.write_all(b"x").await.unwrap();
        drop(io);
        for _ in 0..3 {
            assert_eq!(graceful.connections(), 1);
            time::sleep(SILENT_PEER_TIMEOUT).await;
            client.write_all(b"x").await.unwrap();
        }
        drop(client);
        wait_until_closed(&graceful).await;
    }

    /// A handler has answered without reading the upload, and the stop begins while the client sends it.
    #[tokio::test]
    async fn an_upload_that_outlasts_the_begin_of_the_stop_is_read_from() {
        let graceful = Graceful::new();
        let (mut client, tcp) = connect().await;
        let mut io = graceful.track(tcp);
        let request = b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\n";
        client.write_all(request).await.unwrap();
        io.read_exact(&mut vec![0; request.len()]).await.unwrap();
        io.write_all(b"HTTP/1.1 413 Content Too Large\r\n\r\n")
            .await
            .unwrap();
        drop(io);
        graceful.shutdown();
        for _ in 0..3 {
            // Longer than the interval of the queries.
            time::sleep(SILENT_PEER_TIMEOUT / 2).await;
            assert_eq!(graceful.connections(), 1);
            client.write_all(b"x").await.unwrap();
        }
        drop(client);
        wait_until_closed(&graceful).await;
    }

    /// The body is on its way when the server closes the connection.
    #[tokio::test]
    async fn a_client_that_has_announced_a_body_is_waited_for_whatever_the_method() {
        for (fields, stops, waits) in [
            ("content-length: 4", false, true),
            ("content-length: 4", true, true),
            ("Transfer-Encoding: chunked", true, true),
            ("x-content-length: 4", true, false),
        ] {
            let graceful = Graceful::new();
            let (mut client, tcp) = connect().await;
            let mut io = graceful.track(tcp);
            if stops {
                graceful.shutdown();
            }
            let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\naccept: *\r\n\r\n");
            client.write_all(request.as_bytes()).await.unwrap();
            io.read_exact(&mut vec![0; request.len()]).await.unwrap();
            let response = b"HTTP/1.1 404 Not Found\r\n\r\n";
            io.write_all(response).await.unwrap();
            client
                .read_exact(&mut vec![0; response.len()])
                .await
                .unwrap();
            while unacknowledged(io.get_ref()) != Some(0) {
                time::sleep(FIRST_QUERY_INTERVAL).await;
            }
            drop(io);
            assert_eq!(
                graceful.connections(),
                usize::from(waits),
                "{fields} {stops}"
            );
            drop(client);
            wait_until_closed(&graceful).await;
        }
    }

    /// Few bytes, as of one call of gRPC.
    #[tokio::test]
    async fn a_short_response_over_http2_is_waited_for_while_stopping() {
        let graceful = Graceful::new();
        let (mut client, tcp) = connect_with_little_room().await;
        let mut io = graceful.track(tcp);
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        client.write_all(preface).await.unwrap();
        io.read_exact(&mut vec![0; preface.len()]).await.unwrap();
        fill_room(&mut io, 100).await;
        graceful.shutdown();
        let mut headers = vec![0; 9 + 50];
        (headers[2], headers[3]) = (50, 1);
        io.write_all(&headers).await.unwrap();
        drop(io);
        assert_eq!(graceful.connections(), 1);
        client.read_to_end(&mut Vec::new()).await.unwrap();
        wait_until_closed(&graceful).await;
    }

    #[tokio::test]
    async fn a_connection_that_expires_is_read_from() {
        let plan = Graceful::builder().drain_delay(Duration::ZERO);
        let graceful = plan.build().unwrap();
        let (mut client, tcp) = connect_with_little_room().await;
        let mut io = graceful.track(tcp);
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        client.write_all(preface).await.unwrap();
        io.read_exact(&mut vec![0; preface.len()]).await.unwrap();
        graceful.shutdown();
        let mut headers = vec![0; 9 + 50];
        (headers[2], headers[3]) = (50, 1);
        io.write_all(&headers).await.unwrap();
        client.read_exact(&mut headers).await.unwrap();
        let run = tokio::spawn(graceful.run(async {}));
        io.read(&mut [0]).await.unwrap_err();
        drop(io);
        assert_eq!(graceful.connections(), 1);
        drop(client);
        assert_eq!(run.await.unwrap().outcome(), crate::Outcome::Clean);
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Client {
        Stays,
        HalfCloses,
        Resets,
    }

    /// The report of a stop that ends while a client has not received everything.
    async fn report_of_loss(
        (mut client, tcp): (TcpStream, TcpStream),
        request: &[u8],
        does: Client,
        response: &[u8],
    ) -> Report {
        let deadline = Duration::from_secs(20);
        let plan = Graceful::builder().drain_delay(Duration::ZERO);
        let graceful = plan.drain_timeout(deadline).build().unwrap();
        let mut io = graceful.track(tcp);
        client.write_all(request).await.unwrap();
        io.read_exact(&mut vec![0; request.len()]).await.unwrap();
        if does == Client::HalfCloses {
            client.shutdown().await.unwrap();
        }
        let permit = graceful.shared().admission().admit().unwrap().answered();
        graceful.shutdown();
        io.write_all(response).await.unwrap();
        let much = vec![0; 1 << 20];
        while io.write_all(&much).now_or_never().is_some() {}
        drop((io, permit));
        assert_eq!(graceful.connections(), 1);
        if does == Client::Resets {
            // It has unread bytes.
            drop(client);
        }
        let report = graceful.run(async {}).await;
        assert!(report.duration() < deadline, "{report}");
        report
    }

    #[tokio::test]
    async fn a_client_that_the_kernel_gives_up_loses_its_response_and_one_that_resets_does_not() {
        for (does, lost) in [
            (Client::Stays, 1),
            (Client::HalfCloses, 1),
            (Client::Resets, 0),
        ] {
            let (client, tcp) = connect_with_little_room().await;
            let timeout = Some(Duration::from_millis(300));
            let socket = socket2::SockRef::from(&tcp);
            socket.set_tcp_user_timeout(timeout).unwrap();
            let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
            let response = b"HTTP/1.1 200 OK\r\n\r\n";
            let report = report_of_loss((client, tcp), request, does, response).await;
            let cut = report.requests().cut;
            let connections = report.remaining().connections;
            assert_eq!((connections, cut), (lost, lost), "{does:?} {report}");
        }
    }

    /// The request was answered by the upgrade.
    #[tokio::test]
    async fn what_an_upgraded_connection_has_not_delivered_when_it_is_closed_is_reported() {
        let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n";
        let response = b"HTTP/1.1 101 Switching Protocols\r\n\r\n";
        let sockets = connect_with_little_room().await;
        let report = report_of_loss(sockets, request, Client::Stays, response).await;
        let cut = report.requests().cut;
        assert_eq!((report.remaining().connections, cut), (1, 0), "{report}");
    }

    /// The handler drops the WebSocket just before the deadline.
    #[tokio::test]
    async fn a_close_frame_that_is_undelivered_at_the_cut_is_no_loss() {
        let deadline = SILENT_PEER_TIMEOUT * 2;
        let plan = Graceful::builder().drain_delay(Duration::ZERO);
        let graceful = plan.drain_timeout(deadline).build().unwrap();
        let (mut client, tcp) = connect_with_little_room().await;
        let mut io = graceful.track(tcp);
        let request = b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n";
        client.write_all(request).await.unwrap();
        io.read_exact(&mut vec![0; request.len()]).await.unwrap();
        io.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            .await
            .unwrap();
        fill_room(&mut io, 100).await;
        let hold = graceful.hold("WebSocket");
        graceful.shutdown();
        while graceful.phase() < crate::Phase::Draining {
            time::sleep(FIRST_QUERY_INTERVAL).await;
        }
        time::sleep(SILENT_PEER_TIMEOUT * 3 / 2).await;
        let number = |io: &GracefulIo<TcpStream>| unacknowledged(io.get_ref());
        assert!(number(&io) > Some(FIN));
        drop((io, hold));
        let report = graceful.run(async {}).await;
        let is_late = report.duration() >= deadline;
        assert_eq!(
            report.outcome(),
            crate::Outcome::Clean,
            "{is_late} {report}"
        );
        drop(client);
    }

    /// Others of the service's runtimes go on.
    #[test]
    fn what_a_connection_has_not_delivered_when_its_runtime_ends_is_reported() {
        let runtime = || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all().build().unwrap()
        };
        let plan = Graceful::builder().drain_delay(Duration::ZERO);
        let graceful = plan.build().unwrap();
        let other = runtime();
        let client = other.block_on(async {
            let (mut client, tcp) = connect_with_little_room().await;
            let mut io = graceful.track(tcp);
            let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
            client.write_all(request).await.unwrap();
            io.read_exact(&mut vec![0; request.len()]).await.unwrap();
            let permit = graceful.shared().admission().admit().unwrap().answered();
            graceful.shutdown();
            let much = vec![b'x'; 1 << 20];
            while io.write_all(&much).now_or_never().is_some() {}
            drop((io, permit));
            assert_eq!(graceful.connections(), 1);
            client
        });
        drop(other);
        let report = runtime().block_on(graceful.run(async {}));
        let lost = (report.remaining().connections, report.requests().cut);
        assert_eq!(lost, (1, 1), "{report}");
        drop(client);
    }

    /// How long the connection stays open if its client does this again and again.
    async fn open_while(graceful: &Graceful, mut acts: impl AsyncFnMut()) -> Duration {
        let begun = Instant::now();
        while graceful.connections() > 0 {
            acts().await;
        }
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_acknowledges_a_little_now_and_then_is_waited_for_with_a_limit() {
        let graceful = Graceful::new();
        let mut client = dropped(&graceful).await;
        let open = open_while(&graceful, async || {
            client.read_exact(&mut [0; 8192]).unwrap();
            time::sleep(STALLED_TIMEOUT / 2).await;
        });
        let late = open.await.checked_sub(UNDELIVERED_TIMEOUT);
        assert!(late.is_some_and(|late| late < STALLED_TIMEOUT), "{late:?}");
    }

    /// Its response has ended before the stop. Its kernel answers, but has no room.
    #[tokio::test(start_paused = true)]
    async fn a_client_that_pauses_is_waited_for() {
        for (before, reads) in [
            (Duration::ZERO, true),
            (STALLED_TIMEOUT / 2, true),
            (Duration::ZERO, false),
        ] {
            let deadline = Duration::from_secs(20);
            let plan = Graceful::builder().drain_delay(Duration::ZERO);
            let graceful = plan.drain_timeout(deadline).build().unwrap();
            let mut client = dropped(&graceful).await;
            time::sleep(before).await;
            graceful.shutdown();
            let run = graceful.run(async {});
            let mut run = std::pin::pin!(run);
            let pause = time::timeout(deadline / 2, &mut run);
            assert!(pause.await.is_err());
            if reads {
                client.read_to_end(&mut Vec::new()).unwrap();
            }
            let report = run.await;
            let lost = (report.remaining().connections, report.requests().cut);
            assert_eq!(lost, (usize::from(!reads), 0), "{report}");
            drop(client);
        }
    }

    /// The longest time from the moment at which a slow client has read everything until its connection is
    /// closed. The clients read at different moments between two queries.
    async fn longest_after_delivery(graceful: &Graceful, stops: bool) -> Duration {
        let mut longest = Duration::ZERO;
        for n in 0..10 {
            let mut client = dropped(graceful).await;
            time::sleep(SLOW_PEER * 2).await;
            if stops {
                graceful.shutdown();
                time::sleep(SLOW_PEER_QUERY_INTERVAL).await;
            }
            time::sleep(LONGEST_QUERY_INTERVAL * n).await;
            let mut all = Vec::new();
            client.read_to_end(&mut all).unwrap();
            let moment = Duration::from_millis(1);
            let open = open_while(graceful, async || time::sleep(moment).await);
            longest = longest.max(open.await);
        }
        longest
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_is_queried_less_often_while_serving() {
        let plan = Graceful::builder().grace_period(STALLED_TIMEOUT * 10);
        let graceful = plan.drain_delay(STALLED_TIMEOUT * 5).build().unwrap();
        let serving = longest_after_delivery(&graceful, false).await;
        assert!(serving >= SLOW_PEER_QUERY_INTERVAL, "{serving:?}");
        let stopping = longest_after_delivery(&graceful, true).await;
        assert!(
            stopping <= SILENT_PEER_TIMEOUT + LONGEST_QUERY_INTERVAL * 2,
            "{stopping:?}"
        );
    }
}
