//! The entry of one connection in the [table](super::table).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use super::{
    directive::Directive,
    flags::{
        ACTIVE, ANSWERS, Flags, HANDSHAKE, LINGERS, READ_ONCE_MORE, RESPONDED, STREAMLESS,
        UPGRADED, UPGRADES,
    },
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
    /// Bytes that the peer had not acknowledged when the connection was cut. While it [lingers](LINGERS), when this
    /// was last looked at.
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
        // `serve` asks the peer to leave at once, other servers when they close.
        let is_asked =
            directive >= Directive::Leave && (directive >= Directive::Close || self.is_served());
        let answers = if is_asked { ANSWERS } else { 0 };
        // A stream may begin and end before the next read.
        self.flags.change(STREAMLESS, ACTIVE | answers);
    }

    /// Whether hyper would drop bytes that it has not written yet, if its server closed the connection now: it
    /// takes a connection that has asked for an upgrade, and was not upgraded, for one that is being upgraded.
    pub(crate) fn is_torn_by_close(&self) -> bool {
        self.state.is_blocked() && self.flags.has(UPGRADES) && !self.flags.has(UPGRADED)
    }

    /// Whether what the peer has not received belongs to a response of the stop. After an upgrade it belongs to no
    /// request.
    pub(crate) fn owes_response(&self) -> bool {
        self.flags.has(RESPONDED) && !self.flags.has(UPGRADED)
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
            return self.state.has_streams() || self.state.has_uploads();
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
    /// The number of responses whose bodies had ended during the stop, and of which the server held bytes.
    /// Known on `serve`.
    pub(crate) unsent: u32,
}

impl<O> OpenAtCut<O> {
    pub(crate) fn undelivered(&self) -> u32 {
        self.entry.undelivered.load(Ordering::Relaxed)
    }

    /// Whether what the peer has not received belongs to a response of the stop.
    pub(crate) fn owes_response(&self) -> bool {
        self.entry.owes_response()
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

#[cfg(all(test, feature = "axum", feature = "signal", not(tower_graceful_loom)))]
mod tests {
    use super::*;
    use crate::connection::table::ConnectionTable;

    fn connect() -> Arc<ConnectionEntry<()>> {
        ConnectionTable::default().insert((), None)
    }

    #[test]
    fn open_connections_have_different_numbers() {
        let [one, other] = [(); 2].map(|()| connect());
        assert_eq!(one.number(), one.number());
        assert_ne!(one.number(), other.number());
    }

    /// The GOAWAY goes out when a connection of `serve` is told to leave, and elsewhere when it is told to
    /// close.
    #[test]
    fn a_peer_answers_if_something_is_read_after_the_goaway() {
        for (served, directive, answers) in [
            (true, Directive::Stopping, false),
            (true, Directive::Leave, true),
            (true, Directive::Close, true),
            (false, Directive::Stopping, false),
            (false, Directive::Leave, false),
            (false, Directive::Read, false),
            (false, Directive::Close, true),
            (false, Directive::Expire, true),
        ] {
            let entry = connect();
            if served {
                entry.sniffer.listen();
            }
            assert_eq!(entry.is_served(), served);
            // It has been active since it was inserted.
            entry.read_while_stopping(directive);
            assert_eq!(entry.flags.has(ANSWERS), answers, "{served} {directive:?}");
            assert!(entry.flags.take(ACTIVE));
            entry.read_while_stopping(directive);
            assert_eq!(entry.flags.has(ANSWERS), answers, "{served} {directive:?}");
            assert!(entry.flags.has(ACTIVE), "{served} {directive:?}");
        }
    }

    #[test]
    fn what_a_handshake_reads_is_no_request() {
        let entry = connect();
        entry.flags.set(HANDSHAKE);
        entry.was_read_once_more();
        assert!(!entry.flags.has(READ_ONCE_MORE));
        entry.flags.take(HANDSHAKE);
        entry.was_read_once_more();
        assert!(entry.flags.has(READ_ONCE_MORE));
    }

    #[test]
    fn streams_may_be_open_if_the_peer_answers_or_a_piece_of_a_response_is_held() {
        for (answers, held, expected) in [
            (false, 0, false),
            (true, 0, true),
            (false, 1, true),
            (true, 1, true),
        ] {
            let entry = connect();
            if answers {
                entry.flags.set(ANSWERS);
            }
            assert_eq!(
                entry.may_have_streams(|| held),
                expected,
                "{answers} {held}"
            );
            // A server of `serve` knows its streams.
            entry.sniffer.listen();
            assert!(!entry.may_have_streams(|| held));
            entry.state.upload_began();
            assert!(entry.may_have_streams(|| held));
            entry.state.upload_ended();
            assert!(!entry.may_have_streams(|| held));
            entry.state.stream_began();
            assert!(entry.may_have_streams(|| held));
        }
    }
}
