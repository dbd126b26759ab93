//! The entry of one connection in the [table](super::table).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use super::{
    directive::Directive,
    flags::{ACTIVE, ANSWERS, Flags, HANDSHAKE, LINGERS, READ_ONCE_MORE, RESPONDED},
    sniffer::Sniffer,
    stagger::Place,
    state::ConnectionState,
};
use crate::{
    report::CutConnection,
    sync::{AtomicU8, AtomicU32, Ordering},
};

/// One connection. All its data is in one small allocation, because there may be very many
/// connections.
pub(crate) struct ConnectionEntry<O> {
    pub(crate) owner: O,
    pub(super) peer: Option<SocketAddr>,
    /// When it was opened, in nanoseconds after the first connection.
    pub(super) opened: u64,
    /// The index in the table. Changes under the table's lock.
    pub(super) index: AtomicU32,
    #[cfg_attr(not(all(feature = "axum", feature = "signal")), expect(dead_code))]
    pub(crate) place: Place,
    pub(crate) sniffer: Sniffer,
    pub(crate) flags: Flags,
    /// The number of guards that must be dropped before the connection is removed. `Relaxed` when a
    /// guard is added, because another guard exists; `AcqRel` when one is dropped, so that the last
    /// drop is ordered after all others.
    pub(crate) guards: AtomicU8,
    /// Bytes that the peer had not acknowledged when the connection was cut.
    pub(crate) undelivered: AtomicU32,
    pub(crate) state: ConnectionState,
}

impl<O> ConnectionEntry<O> {
    /// A number that no other open connection has.
    pub(crate) fn number(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Records a read while the service stops.
    #[inline]
    pub(crate) fn read_while_stopping(&self, directive: Directive) {
        if directive < Directive::Leave && self.flags.has(ACTIVE) {
            return;
        }
        self.note_read(directive);
    }

    fn note_read(&self, directive: Directive) {
        let asked = if self.is_served() {
            Directive::Leave
        } else {
            Directive::Close
        };
        let answers = if directive >= asked { ANSWERS } else { 0 };
        self.flags.set(ACTIVE | answers);
    }

    /// Records that nothing is left to read: the peer has closed its writing side, or nothing was there
    /// when the server was told to [read once more](Directive::Read).
    pub(crate) fn was_read_once_more(&self) {
        // What a handshake reads is not a request.
        if !self.flags.has(HANDSHAKE) {
            self.flags.set(READ_ONCE_MORE);
        }
    }

    /// Whether HTTP/2 streams may be open, or responses may be left in the server, a while after
    /// the peer was asked to leave. On `serve` this is known. Other servers send the GOAWAY with a
    /// ping; a live peer answers it, and then the connection closes with its last stream. `pieces` is the
    /// number of pieces of responses that all servers hold.
    pub(crate) fn may_have_streams(&self, pieces: impl FnOnce() -> usize) -> bool {
        #[cfg(all(feature = "axum", feature = "signal"))]
        if self.is_served() {
            return self.state.has_streams();
        }
        self.flags.has(ANSWERS) || pieces() > 0
    }

    /// Whether the connection belongs to `serve`, which sends the GOAWAY as soon as the connection
    /// is instructed to leave. Other servers send it when they close their connections.
    pub(crate) fn is_served(&self) -> bool {
        self.sniffer.is_listened_to()
    }
}

/// A connection that was open at the cut.
pub(crate) struct OpenAtCut<O> {
    pub(crate) entry: Arc<ConnectionEntry<O>>,
    pub(super) peer: Option<SocketAddr>,
    pub(super) age: Duration,
}

impl<O> OpenAtCut<O> {
    pub(crate) fn undelivered(&self) -> u32 {
        self.entry.undelivered.load(Ordering::Relaxed)
    }

    /// Whether a response went out on the connection while the service stopped.
    pub(crate) fn responded(&self) -> bool {
        self.entry.flags.has(RESPONDED)
    }

    /// Whether the server had dropped the IO before, so that no request is counted for the bytes
    /// that the peer had not taken.
    pub(crate) fn lingered(&self) -> bool {
        self.entry.flags.has(LINGERS)
    }

    pub(crate) fn describe(&self) -> CutConnection {
        CutConnection {
            peer: self.peer,
            age: self.age,
            undelivered: self.undelivered().into(),
        }
    }
}
