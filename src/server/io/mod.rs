//! The tracked IO of a connection: it records what is read and written, and fails after the cut.

mod frames;
mod heads;
#[cfg(feature = "axum")]
mod layers;
mod poll;

use std::{fmt, net::SocketAddr};

use self::heads::Heads;
use super::{
    entry_guard::EntryGuard,
    linger::{CLOSING_BYTES, Last, Written},
    requests,
    send_queue::{self, unacknowledged},
    socket::{has_unread, reset, tcp},
};
use crate::{
    connection::{
        activity::Activity,
        directive::Directive,
        flags::{BODY, HANDSHAKE, INSPECTED, RESPONDED, UPGRADED, UPGRADES},
        upgraded::Upgrade,
        wakers::RegisteredWaker,
    },
    handle::graceful::Graceful,
    sync::Ordering,
};

/// A tracked connection: it is counted, cut at the drain deadline, and closed so that the peer receives
/// everything that was written. Made by [`Graceful::track`] and by the listener of [`Graceful::listener`].
///
/// Reads and writes, vectored writes included, are passed to the wrapped IO. After the cut, every read,
/// write, flush and shutdown fails with
/// [`ConnectionAborted`](std::io::ErrorKind::ConnectionAborted). The cut wakes every task that waits for the
/// connection.
///
/// # Dropping
///
/// If a socket is closed while its peer still sends, the connection is reset, and the peer loses the part
/// of the response that is in transit
/// ([RFC 9112 §9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)). So when a `GracefulIo` is
/// dropped inside a runtime, a spawned task closes the writing side, and reads and discards what the
/// peer sends until the peer closes too. The connection counts as [open](Graceful::connections) until
/// its socket is closed. If the runtime ends earlier, the task ends too; a stop then counts the connection if
/// the peer has not received everything. The task closes the socket earlier than the peer in these cases:
///
/// - at once, if the connection is idle, if nothing was written on it, if a read or write has failed, or if its
///   [handshake](crate::HandshakeExt::handshakes) is dropped when connections close; while serving, also if the peer
///   closed first;
/// - if the peer has received everything: at once if its last request had no body and it has sent nothing since (on a
///   server other than `serve`, only if that request was read while the service stopped); otherwise when it has
///   then been silent for 250 ms, or for 1 s if it has sent something since it received everything. After 2 s the
///   socket is closed in any case. Only Linux tells what the peer has received; on other systems all written bytes
///   count as received, and no connection is closed at once for that;
/// - if the peer has not received everything: after 30 s in which it has acknowledged nothing (1 s after a handshake
///   that has failed), and after 5 min in any case. The operating system goes on sending then;
/// - if the peer has not received everything while the service stops: at the drain deadline. The number of bytes that
///   the peer has not received is in the [report](crate::CutConnection::undelivered). If no response was written since
///   the stop began, and the peer has vanished (on Linux: it has not answered three retransmissions), the task closes
///   the socket earlier. The report does not count this connection, and the operating system goes on sending;
/// - after an upgrade, such as to a WebSocket: when the peer has acknowledged nothing for 250 ms (for 1 s if more
///   than a close frame is left; a stop then counts the connection), or 250 ms after it has received everything. To
///   wait for the answer to a close frame, use [`Hold::close_socket`](crate::Hold::close_socket).
pub struct GracefulIo<I: 'static> {
    /// `None` after `drop` has taken it.
    io: Option<I>,
    waker: RegisteredWaker,
    peer: Peer,
    written: Written,
    writing: Writing,
    heads: Heads,
    /// Shows whether the connection is idle, when a listener needs its file descriptor.
    activity: Activity,
    linger: Option<Linger<I>>,
    /// Of the lowest layer.
    seen: Seen,
    /// 0 for the accepted IO. The IO that a handshake returns, such as a TLS stream, is the next layer,
    /// and shares the connection entry.
    layer: u8,
    // Declared after the IO, so that the socket is closed before the entry is removed.
    guard: EntryGuard,
}

/// The latest directive from `Leave` on that a poll has seen, and whether the peer had received a response of the stop
/// at such a time. One byte, because there may be very many connections.
#[derive(Clone, Copy, Debug, Default)]
struct Seen(u8);

impl Seen {
    const DELIVERED: u8 = 1 << 7;

    /// Whether a poll has seen such a directive.
    fn leaves(self) -> bool {
        self.0 & !Self::DELIVERED > 0
    }

    /// Notes a directive, and returns whether it is later than those before.
    fn notes(&mut self, directive: Directive) -> bool {
        let latest = self.0 & !Self::DELIVERED;
        let is_new = directive as u8 > latest;
        if is_new {
            self.0 = self.0 & Self::DELIVERED | directive as u8;
        }
        is_new
    }

    fn has_delivered(self) -> bool {
        self.0 & Self::DELIVERED != 0
    }

    fn note_delivered(&mut self) {
        self.0 |= Self::DELIVERED;
    }
}

/// The state of the writing side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    Open,
    /// The last write or flush returned `Pending`.
    Blocked,
    /// The server has closed it.
    Shut,
}

/// The state of the peer, as far as reads and writes show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    Open,
    /// The peer has closed its writing side, and the server is not told yet. The wrapped IO need not report
    /// it again.
    Withheld,
    /// The peer has closed its writing side.
    Finished,
    /// A read or a write has failed, so the drop does not wait for the peer.
    Gone,
}

impl<I: 'static> Drop for GracefulIo<I> {
    fn drop(&mut self) {
        let Some(io) = self.io.take() else { return };
        let is_top = self.is_top();
        let entry = &self.guard.entry;
        if is_top && entry.flags.has(INSPECTED) {
            requests::end(entry);
        }
        if is_top && entry.flags.has(UPGRADES) {
            let connection = Upgrade::Connection(entry.number());
            entry.owner.upgraded.ended(connection);
        }
        // `serve` knows its requests.
        if is_top && !entry.is_served() && self.heads.is_asked() {
            entry.dropped_unanswered();
        }
        let stops = entry.state.directive().is_uncut_stop();
        // A layer below the top follows the top, which has cleared the state if nothing was torn.
        let may_be_torn = !is_top || self.peer <= Peer::Withheld;
        if stops && may_be_torn && entry.is_torn_by_close() {
            if is_top {
                entry.owner.connections.torn(entry);
            }
            // The peer must not take a part of a response for the whole. The lowest layer has the socket.
            reset(&io);
            return;
        }
        if is_top {
            // No server is left that could drop bytes.
            entry.state.set_blocked(false);
        }
        let entry = &self.guard.entry;
        let may_have_body = entry.flags.has(BODY);
        let request = if is_top {
            self.heads.last_is_bodiless()
                && entry.sniffer.is_http1()
                && !(entry.is_served() && may_have_body)
        } else {
            !may_have_body
        };
        if self.layer > 0 {
            // The lowest layer closes the connection when it is dropped, and needs this flag then.
            if is_top {
                entry.flags.put(BODY, !request);
            }
            return;
        }
        let directive = entry.state.directive();
        if directive == Directive::Cut {
            let left = tcp(&io).and_then(unacknowledged).unwrap_or(0);
            if left > CLOSING_BYTES || entry.flags.has(RESPONDED) {
                entry.undelivered.store(left, Ordering::Relaxed);
            }
            // The peer must not take a partial response for a complete one.
            if entry.state.is_cut_short() {
                reset(&io);
            }
            return;
        }
        // Accepted so late that its server closes it without a read. The client's request is lost as in the
        // queue.
        let never_read = match directive {
            Directive::Close => entry.state.is_unread(),
            // A task that finds the connection expired has tried to read, but has read nothing.
            Directive::Expire => !entry.sniffer.has_read(),
            _ => false,
        };
        if never_read && has_unread(&io) {
            entry.owner.starved.count_reset(1);
        }
        // While serving, a peer that has closed first waits for nothing more.
        let leaves = match self.peer {
            Peer::Open | Peer::Withheld => false,
            Peer::Finished => directive == Directive::Stay,
            Peer::Gone => true,
        };
        // The peer of a handshake that is dropped waits for no response.
        let handshake = entry.flags.has(HANDSHAKE);
        let drops_handshake = handshake && directive >= Directive::Close;
        if leaves || self.written == Written::Nothing || drops_handshake {
            return;
        }
        if let Some(linger) = self.linger {
            let last = Last {
                written: if entry.flags.has(UPGRADED) {
                    Written::Upgrade
                } else if handshake {
                    Written::Handshake
                } else {
                    self.written
                },
                request,
                // While serving, a server closes a connection first only after a response.
                responded: directive == Directive::Stay
                    || self.seen.has_delivered()
                    || entry.flags.has(RESPONDED),
                shut: self.writing == Writing::Shut,
            };
            linger(io, last, EntryGuard::share(entry));
        }
    }
}

/// Closes the connection of a dropped `GracefulIo`.
pub(super) type Linger<I> = fn(I, Last, EntryGuard);

/// Unwraps the IO, which is present until its wrapper is dropped.
#[inline]
fn present<T>(io: Option<T>) -> T {
    match io {
        Some(io) => io,
        None => unreachable!("it is taken by the drop of its wrapper alone"),
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
        if entry.state.directive() == Directive::Cut {
            // It came too late to be listed with the connections that were cut.
            shared.starved.count_reset(1);
        }
        shared.mark_served();
        Self::with_entry(io, linger, 0, EntryGuard { entry })
    }

    fn with_entry(io: I, linger: Option<Linger<I>>, layer: u8, guard: EntryGuard) -> Self {
        Self {
            io: Some(io),
            waker: RegisteredWaker::default(),
            peer: Peer::Open,
            written: Written::Nothing,
            writing: Writing::Open,
            heads: Heads::default(),
            activity: Activity::default(),
            linger,
            seen: Seen::default(),
            layer,
            guard,
        }
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

    /// The wrapped IO.
    pub fn get_ref(&self) -> &I {
        present(self.io.as_ref())
    }

    /// The wrapped IO. The cut does not affect direct reads and writes on it.
    pub fn get_mut(&mut self) -> &mut I {
        present(self.io.as_mut())
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
