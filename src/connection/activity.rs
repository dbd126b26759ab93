//! What was read and written on a connection, and whether that shows that it is idle, so that it can
//! be closed while a listener waits for file descriptors.

use super::descriptors::{QUIET, Starved};
use crate::sync::Ordering;

/// What was read and written on a connection, as far as it shows whether the connection is idle.
///
/// Two kinds of connection are certainly idle after they have been quiet for some rounds (a round is
/// one attempt of a waiting listener to get descriptors, see `descriptors`): a
/// connection on which nothing was ever read; and, while no request is in flight in the whole
/// service, an HTTP/1 connection that was written to after the last read. All other connections are
/// never certainly idle: HTTP/2, in which a stream may be a tunnel; TLS; and connections after an
/// upgrade or a `CONNECT`.
///
/// This type is small because there may be very many connections.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Activity {
    state: State,
    /// The round in which the connection was found quiet, modulo 255 and plus 1, or 0.
    quiet: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// Nothing was read.
    #[default]
    Silent,
    /// HTTP/1: something was read after the last write.
    Asked,
    /// HTTP/1: something was written after the last read.
    Answered,
    /// As `Answered`, but the last write or flush was not ready. If the whole response has been
    /// handed over to be written, the request may no longer be counted as in flight.
    Unsent,
    /// Never certainly idle.
    Other,
}

impl Activity {
    /// Marks a connection that has an owner which closes it, so that its bytes need not be
    /// observed.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn mark_owned(&mut self) {
        self.state = State::Other;
    }

    /// A request was read that looks like HTTP/1, and is not a `CONNECT`; nothing was upgraded.
    pub(crate) fn is_http1(self) -> bool {
        matches!(self.state, State::Asked | State::Answered | State::Unsent)
    }

    #[inline]
    pub(crate) fn read(&mut self, read: &[u8]) {
        self.quiet = 0;
        if matches!(self.state, State::Silent | State::Answered | State::Unsent) {
            self.begins(read);
        }
    }

    /// The peer begins a request. Bytes that may also be the beginning of something other than an
    /// HTTP/1 request count as that other thing.
    fn begins(&mut self, read: &[u8]) {
        let may_begin = |what: &[u8]| read.iter().zip(what).all(|(one, other)| one == other);
        let other = may_begin(b"PRI * HTTP/2.0") || may_begin(b"CONNECT ");
        // An empty line may come before a later request.
        let again = self.state != State::Silent;
        let http1 = again || read.first().is_some_and(u8::is_ascii_uppercase);
        self.state = if http1 && !other {
            State::Asked
        } else {
            State::Other
        };
    }

    /// Records a write. `upgrades`: it may be a response that upgrades the connection. `is_ready`:
    /// the write has completed.
    #[inline]
    pub(crate) fn wrote(&mut self, upgrades: bool, is_ready: bool) {
        self.quiet = 0;
        if self.state == State::Silent || upgrades {
            self.state = State::Other;
        }
        if self.state != State::Other {
            self.state = State::Answered;
            self.flushed(is_ready);
        }
    }

    #[inline]
    pub(crate) fn flushed(&mut self, is_ready: bool) {
        self.state = match self.state {
            State::Answered if !is_ready => State::Unsent,
            State::Unsent if is_ready => State::Answered,
            state => state,
        };
    }

    /// Whether the connection is certainly idle. Called when there is nothing to read. `in_flight` counts
    /// the requests of the whole service.
    #[inline]
    pub(crate) fn is_idle(&mut self, starved: &Starved, in_flight: impl FnOnce() -> usize) -> bool {
        let round = starved.round.load(Ordering::Relaxed);
        round != 0 && self.is_idle_in(round, starved, in_flight)
    }

    #[cold]
    fn is_idle_in(
        &mut self,
        round: u32,
        starved: &Starved,
        in_flight: impl FnOnce() -> usize,
    ) -> bool {
        let round = (round % 255) as u8;
        if self.quiet == 0 {
            self.quiet = round + 1;
        }
        let rounds = (u16::from(round) + 255 - u16::from(self.quiet - 1)) % 255;
        if u32::from(rounds) < QUIET {
            return false;
        }
        match self.state {
            State::Silent => true,
            // Without a layer no request is counted.
            State::Answered => starved.layered.get().is_some() && in_flight() == 0,
            State::Asked | State::Unsent | State::Other => false,
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::{net::TcpListener, sync::Arc};

    use super::*;
    use crate::{
        Graceful,
        connection::descriptors::{Socket, SocketKind},
    };

    /// A lifecycle with a layer and a waiting listener.
    fn starved() -> Graceful {
        let graceful = Graceful::new();
        graceful.shared().starved.mark_layered();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let kind = SocketKind::Tcp(tcp);
        let is_passed = false;
        let socket = Arc::new(Socket { kind, is_passed });
        graceful.shared().starved.add_waiting(&socket);
        graceful
    }

    fn is_idle_after(activity: &mut Activity, graceful: &Graceful, rounds: u32) -> bool {
        let shared = graceful.shared();
        let first = shared.starved.round.load(Ordering::Relaxed);
        let looks = (first + 1..=first + 1 + rounds).map(|round| {
            shared.starved.round.store(round, Ordering::Relaxed);
            activity.is_idle(&shared.starved, || shared.in_flight())
        });
        looks.last().unwrap()
    }

    fn after(exchange: &[(&[u8], &[u8])]) -> Activity {
        let mut activity = Activity::default();
        for (read, written) in exchange {
            if !read.is_empty() {
                activity.read(read);
            }
            if !written.is_empty() {
                activity.wrote(written.starts_with(b"HTTP/1.1 101"), true);
            }
        }
        activity
    }

    const GET: &[u8] = b"GET / HTTP/1.1\r\n\r\n";
    const OK: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

    #[test]
    fn silent_and_answered_connections_are_idle_once_they_are_quiet() {
        let graceful = starved();
        for exchange in [&[][..], &[(GET, OK)], &[(GET, OK), (GET, OK)]] {
            let mut activity = after(exchange);
            assert!(!is_idle_after(&mut activity, &graceful, QUIET - 1));
            assert!(is_idle_after(&mut activity, &graceful, 0));
            activity.read(GET);
            activity.wrote(false, true);
            assert!(!is_idle_after(&mut activity, &graceful, QUIET - 1));
        }
    }

    #[test]
    fn a_connection_that_may_be_in_use_is_not_idle() {
        let graceful = starved();
        let exchanges: &[&[(&[u8], &[u8])]] = &[
            &[(GET, b"")],
            &[(b"GET / HT", b"")],
            &[(GET, OK), (b"\r\n", b"")],
            &[(GET, OK), (b"GET / HT", b"")],
            &[(GET, b"HTTP/1.1 101 Switching Protocols\r\n")],
            &[(GET, OK), (GET, b"HTTP/1.1 101 Switching"), (b"x", b"y")],
            &[(GET, OK), (b"", b"HTTP/1.1 101 Switching"), (b"x", b"y")],
            &[(b"CONNECT a:1 HTTP/1.1\r\n", OK)],
            &[(b"CON", b""), (b"NECT a:1 HTTP/1.1\r\n", OK)],
            &[(GET, OK), (b"CONNECT a:1 HTTP/1.1\r\n", OK)],
            &[(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\x04")],
            &[(b"P", b"\0\0\0\x04")],
            &[(b"\x16\x03\x01", b"\x16\x03\x03")],
        ];
        for exchange in exchanges {
            assert!(
                !is_idle_after(&mut after(exchange), &graceful, 9),
                "{exchange:?}"
            );
        }
    }

    #[test]
    fn a_connection_with_an_unread_response_is_not_idle() {
        let graceful = starved();
        let mut activity = after(&[(GET, OK)]);
        activity.wrote(false, false);
        assert!(!is_idle_after(&mut activity, &graceful, 9));
        activity.wrote(false, true);
        for _ in 0..2 {
            activity.flushed(false);
            assert!(!is_idle_after(&mut activity, &graceful, 9));
        }
        activity.flushed(true);
        assert!(is_idle_after(&mut activity, &graceful, 9));
    }

    #[test]
    fn nothing_is_idle_while_work_is_in_flight_or_cannot_be_counted() {
        let graceful = starved();
        let hold = graceful.hold("work");
        let mut activity = after(&[(GET, OK)]);
        assert!(!is_idle_after(&mut activity, &graceful, 9));
        assert!(is_idle_after(&mut after(&[]), &graceful, 9));
        drop(hold);
        assert!(is_idle_after(&mut activity, &graceful, 9));
        let uncounted = Graceful::new();
        assert!(!is_idle_after(&mut activity, &uncounted, 9));
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn a_connection_that_its_owner_closes_is_not_idle() {
        let mut activity = Activity::default();
        activity.mark_owned();
        assert!(!is_idle_after(&mut activity, &starved(), 9));
    }

    /// The number of the round in which it was found quiet is kept in one byte.
    #[test]
    fn a_connection_is_idle_after_the_same_time_in_late_rounds() {
        let graceful = starved();
        for first in 250..260 {
            let round = &graceful.shared().starved.round;
            round.store(first, Ordering::Relaxed);
            let mut activity = after(&[]);
            assert!(!is_idle_after(&mut activity, &graceful, QUIET - 1));
            assert!(is_idle_after(&mut activity, &graceful, 0), "{first}");
        }
    }

    #[test]
    fn nothing_is_idle_while_no_listener_waits() {
        let graceful = Graceful::new();
        let mut activity = after(&[]);
        let shared = graceful.shared();
        assert!((0..9).all(|_| !activity.is_idle(&shared.starved, || shared.in_flight())));
    }
}
