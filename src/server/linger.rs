//! Closing a connection so that its peer receives what was written.
//!
//! A socket that is closed while its peer still sends resets the connection, and the kernel throws
//! away what it has not delivered: the rest of a response, because a client of HTTP/2 has announced a
//! window, answered a ping, pipelined a request, or has not finished its upload
//! ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)). So when a server lets go of a
//! connection, its writing side is closed, and what the peer sends is read and discarded until the
//! peer closes too. The connection counts as open until then.
//!
//! It ends
//! - when the peer has closed or reset the connection, and everything is delivered;
//! - at once, where everything is delivered, nothing is unread, and the client is not in the middle of
//!   an upload or of HTTP/2: an idle connection costs no time, and neither does one whose request had
//!   no body;
//! - when everything is delivered and the peer has been silent for [`SILENCE`] or [`STILL`], or has
//!   not closed for [`MOST`];
//! - while serving, when nothing has been delivered for [`STALLED`]. The kernel goes on trying;
//! - where it was upgraded, [`STILL`] after the peer last took something, or has everything;
//! - while the service stops, when the connection is cut: what is not delivered then is in the report.
//!
//! Where it is not known what is delivered, because the operating system does not say so or the IO is
//! not a socket of TCP, that counts as delivered which has been written; but then a connection on which
//! something was written is never idle, and has the time of one whose response has just been sent.

use std::{
    any::Any,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    thread,
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
    io::{EntryGuard, Last, Written, tcp},
    send_queue::unacknowledged,
};
use crate::{
    connection::{
        state::{Directive, RegisteredWaker, WakerSlot},
        table::{LINGERS, RESPONDED},
    },
    sync::Ordering,
};

/// For how long a peer that sends is listened to after the last byte that came.
const SILENCE: Duration = Duration::from_secs(1);

/// For how long one is listened to that has sent nothing since: it may be in the middle of an upload,
/// or have a frame on its way.
const STILL: Duration = Duration::from_millis(250);

/// The same, while a listener waits for descriptors.
const STARVED: Duration = Duration::from_millis(25);

/// For how long one that never stops is listened to.
const MOST: Duration = Duration::from_secs(2);

/// How long the peer may take nothing of what is left, while serving.
const STALLED: Duration = Duration::from_secs(30);

/// How often the operating system is asked what is delivered: soon, and then less often.
const FIRST_LOOK: Duration = Duration::from_millis(2);
const LAST_LOOK: Duration = Duration::from_millis(100);

/// How much is read before other tasks have their turn.
const READS: usize = 16;
const READ: usize = 4096;

/// What a FIN counts for in the send queue.
const FIN: u32 = 1;

/// What a connection without a response says when it closes: frames of HTTP/2 (two GOAWAY and a PING,
/// 17 bytes each) in records of TLS, an alert, a FIN.
pub(super) const FAREWELL: u32 = 192;

/// Whether it is a socket of tokio's.
pub(super) fn is_socket<I: 'static>(io: &I) -> bool {
    #[cfg(unix)]
    if (io as &dyn Any).is::<UnixStream>() {
        return true;
    }
    tcp(io).is_some()
}

/// Closes a connection that its server has let go of, if it is a socket of tokio's. Anything else is
/// dropped.
pub(super) fn socket<I: 'static>(socket: I, last: Last, entry: EntryGuard) {
    let mut socket = Some(socket);
    let any: &mut dyn Any = &mut socket;
    if let Some(tcp) = any.downcast_mut::<Option<TcpStream>>() {
        if let Some(tcp) = tcp.take() {
            io(tcp, last, entry);
        }
        return;
    }
    #[cfg(unix)]
    if let Some(unix) = any.downcast_mut::<Option<UnixStream>>() {
        if let Some(unix) = unix.take() {
            io(unix, last, entry);
        }
        return;
    }
    drop((socket, entry));
}

/// Closes a connection that its server has let go of.
pub(super) fn io<I>(io: I, last: Last, entry: EntryGuard)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut lingering = Lingering {
        io,
        stored: RegisteredWaker::default(),
        shut: false,
        eof: false,
        received: false,
        last,
        entry,
    };
    // Most connections are idle, and need no task. Only a socket is polled here, because other IO may
    // panic, and this runs where a task may be unwinding already.
    if tcp(&lingering.io).is_some() {
        let noop = &mut Context::from_waker(Waker::noop());
        if lingering.poll_peer(noop).is_ready() && !lingering.eof {
            return;
        }
    }
    if lingering.is_idle() || thread::panicking() {
        return;
    }
    lingering.entry.line.flags.set(LINGERS);
    if let Ok(runtime) = Handle::try_current() {
        drop(runtime.spawn(lingering.until_closed()));
    }
}

struct Lingering<I: 'static> {
    io: I,
    stored: RegisteredWaker,
    /// The writing side is closed.
    shut: bool,
    /// The peer's writing side is closed.
    eof: bool,
    /// Something came since this was last looked at.
    received: bool,
    last: Last,
    // After the IO, so that the connection is closed before it is removed.
    entry: EntryGuard,
}

impl<I> Lingering<I>
where
    I: AsyncRead + AsyncWrite + Unpin + 'static,
{
    /// Discards what comes. Ready when nothing more can: the connection is cut, its peer has closed
    /// or reset it.
    fn poll_peer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Self { io, stored, .. } = self;
        if self.entry.line.state.enter(stored, WakerSlot::Read, cx) == Directive::Cut {
            return Poll::Ready(());
        }
        if !self.shut {
            match Pin::new(&mut *io).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => self.shut = true,
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => {}
            }
        }
        if self.eof {
            return Poll::Pending;
        }
        for _ in 0..READS {
            let mut space = [std::mem::MaybeUninit::uninit(); READ];
            let mut buf = ReadBuf::uninit(&mut space);
            let read = ready!(Pin::new(&mut *io).poll_read(cx, &mut buf));
            if read.is_err() {
                return Poll::Ready(());
            }
            if buf.filled().is_empty() {
                self.eof = true;
                return Poll::Ready(());
            }
            self.received = true;
        }
        // Others want their turn, and the peer may never stop.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// What the peer has not acknowledged of what it is owed, if it is known.
    fn undelivered(&self) -> Option<u32> {
        let left = unacknowledged(tcp(&self.io)?)?;
        // To a client that sends nothing, the kernel delivers what is left.
        let little = self.last.request || !self.has_responded();
        let nothing = if little { FAREWELL } else { FIN };
        Some(if left > nothing { left } else { 0 })
    }

    /// A response may just have been sent. While serving nothing else makes a server close first.
    fn has_responded(&self) -> bool {
        self.entry.line.state.directive() == Directive::Stay || self.entry.line.flags.has(RESPONDED)
    }

    /// There is nothing to wait for.
    fn is_idle(&self) -> bool {
        let quiet = self.eof || self.last.request || !self.has_responded();
        quiet && !self.received && self.undelivered() == Some(0)
    }

    async fn until_closed(mut self) {
        let mut look = FIRST_LOOK;
        let mut left = u32::MAX;
        // When the peer last took something, and when it last sent something.
        let (mut took, mut sent) = (Instant::now(), Instant::now());
        let mut delivered = None;
        loop {
            let peer = std::future::poll_fn(|cx| self.poll_peer(cx));
            if time::timeout(look, peer).await.is_ok() && !self.eof {
                break;
            }
            let now = Instant::now();
            let known = self.undelivered();
            let before = std::mem::replace(&mut left, known.unwrap_or(0));
            let received = std::mem::take(&mut self.received);
            if left < before {
                took = now;
            }
            if received {
                sent = now;
            }
            look = (look * 2).min(LAST_LOOK);
            if left > 0 {
                let patience = match self.entry.line.state.directive() {
                    // A handler has let go of it, after as much waiting as it found right.
                    _ if self.last.written == Written::Upgrade => STILL,
                    Directive::Stay => STALLED,
                    // The cut ends it.
                    _ => Duration::MAX,
                };
                if now - took >= patience {
                    return;
                }
                continue;
            }
            if self.eof {
                return;
            }
            let (since, talks) = *delivered.get_or_insert((now, false));
            let talks = talks || received;
            delivered = Some((since, talks));
            let upgraded = self.last.written == Written::Upgrade;
            let most = if upgraded { STILL } else { MOST };
            let silence = if talks && !upgraded {
                SILENCE
            } else if known.is_some() && self.entry.line.owner.starved.is_waiting() {
                // Its descriptor is needed.
                STARVED
            } else {
                STILL
            };
            if now - sent.max(since) >= silence || now - since >= most {
                return;
            }
        }
        if self.entry.line.state.directive() == Directive::Cut {
            let left = self.undelivered().unwrap_or(0);
            self.entry.line.undelivered.store(left, Ordering::Relaxed);
        }
    }
}
