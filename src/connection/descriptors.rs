//! Listeners whose accept queues cannot be emptied because the process has no file descriptors
//! left, and the count of connections that were reset in a queue, for this or another reason.
//!
//! While such a listener waits, idle connections are closed, and each closed connection makes room
//! for one from the queue. A connection of [`serve`] is instructed to close, and closes when
//! nothing is in flight on it. The server of any other connection is only informed after the
//! listener has closed. Such a connection reports the end of its stream instead, if it is certainly
//! idle: see [`Activity`].
//!
//! [`serve`]: crate::Graceful::serve

#[cfg(unix)]
use std::os::unix::net::UnixListener;
use std::{
    io, mem,
    net::TcpListener,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use tokio::time::Instant;

use crate::sync::{AtomicU32, Ordering, lock};

/// The most connections accepted from one queue. More than an accept queue holds with usual
/// settings; a bound, because clients may refill the queue.
pub(crate) const MOST: usize = 4096;

/// Whether a listener's socket was passed to the process by socket activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(all(feature = "axum", any(target_os = "linux", target_os = "android"))),
    allow(dead_code)
)]
pub(crate) enum Passed {
    No,
    /// It cannot be told.
    Perhaps,
    /// It is the same socket as a passed descriptor.
    Yes,
}

/// A listening socket outside of the runtime, so that every error of `accept` is visible.
/// Nonblocking.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) kind: SocketKind,
    /// Passed by socket activation, or as far as is known: the queue outlives the process.
    pub(crate) is_passed: bool,
}

#[derive(Debug)]
pub(crate) enum SocketKind {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Socket {
    /// Accepts a connection and drops it, which resets it.
    fn reset_one(&self) -> io::Result<()> {
        match &self.kind {
            SocketKind::Tcp(tcp) => tcp.accept().map(drop),
            #[cfg(unix)]
            SocketKind::Unix(unix) => unix.accept().map(drop),
        }
    }

    /// Resets the connections in the queue and returns their number. If the number is unknown
    /// because there is still no descriptor, one connection is counted.
    fn reset_all(&self) -> usize {
        let (count, is_starved) = self.reset_some();
        count + usize::from(is_starved)
    }

    /// Resets connections in the queue and returns their number, and whether there was no
    /// descriptor for the rest. The queue of a passed socket is left to the next process.
    fn reset_some(&self) -> (usize, bool) {
        let mut count = 0;
        while count < MOST && !self.is_passed {
            match self.reset_one() {
                Ok(()) => count += 1,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return (count, is_out_of_descriptors(&error)),
            }
        }
        (count, false)
    }
}

/// Whether `accept` failed because there was no file descriptor, or no kernel memory for one.
pub(crate) fn is_out_of_descriptors(error: &io::Error) -> bool {
    #[cfg(unix)]
    const CODES: &[i32] = {
        /// The same on every Unix.
        const EMFILE: i32 = 24;
        const ENFILE: i32 = 23;
        const ENOMEM: i32 = 12;
        const ENOBUFS: i32 = if cfg!(any(target_os = "linux", target_os = "android")) {
            105
        } else {
            55
        };
        &[EMFILE, ENFILE, ENOMEM, ENOBUFS]
    };
    #[cfg(windows)]
    const CODES: &[i32] = {
        const WSAEMFILE: i32 = 10024;
        const WSAENOBUFS: i32 = 10055;
        &[WSAEMFILE, WSAENOBUFS]
    };
    #[cfg(not(any(unix, windows)))]
    const CODES: &[i32] = &[];
    error
        .raw_os_error()
        .is_some_and(|code| CODES.contains(&code))
}

/// The interval at which waiting listeners have idle connections closed.
const ROUND: Duration = Duration::from_millis(13);

/// For how many rounds a connection must be quiet before it is closed: a little longer than any
/// other close waits for data in transit.
const QUIET: u32 = 3;

/// The listeners of one service that wait for descriptors, and the results of their waits.
#[derive(Default)]
pub(crate) struct Starved {
    /// The number of the round while a listener waits, otherwise 0. Read by each idle connection
    /// without the lock. `Relaxed` everywhere: a connection that sees a round late is woken again
    /// in the next one.
    round: AtomicU32,
    /// Set if a [`GracefulLayer`](crate::GracefulLayer) counts requests, so that zero in flight is
    /// meaningful.
    layered: OnceLock<()>,
    waits: Mutex<Waits>,
}

#[derive(Default)]
struct Waits {
    waiting: Vec<Arc<Socket>>,
    /// Listeners that have given up. They are kept until connections have closed and descriptors
    /// are free, so that the connections in their queues can be counted.
    given_up: Vec<Arc<Socket>>,
    /// The number of rounds so far.
    rounds: u32,
    /// The number of rounds before the current wait.
    first: u32,
    /// When the next round is due.
    next: Option<Instant>,
    /// When the last wait ended.
    over: Option<Instant>,
    /// The number of connections that were reset.
    reset: usize,
}

impl Starved {
    /// Records that a layer was made.
    pub(crate) fn counts_requests(&self) {
        let _ = self.layered.set(());
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.round.load(Ordering::Relaxed) != 0
    }

    /// When the last listener finished waiting.
    pub(crate) fn over(&self) -> Option<Instant> {
        lock!(self.waits).over
    }

    /// Closes the remaining listeners, after connections have closed. Returns the number of
    /// connections reset so far.
    pub(crate) fn reset_queues(&self) -> usize {
        let mut waits = lock!(self.waits);
        let mut left = mem::take(&mut waits.waiting);
        left.append(&mut waits.given_up);
        self.round.store(0, Ordering::Relaxed);
        waits.reset += left.iter().map(|socket| socket.reset_all()).sum::<usize>();
        waits.reset
    }

    /// Records `count` connections that were accepted too late to be served.
    pub(crate) fn count_reset(&self, count: usize) {
        lock!(self.waits).reset += count;
    }

    /// Closes a listener that had no time to empty its queue, and counts the connections that are
    /// reset. If there are no descriptors to count them all, it is kept until connections have closed.
    pub(crate) fn close_unserved(&self, socket: Socket) {
        let (count, is_starved) = socket.reset_some();
        let mut waits = lock!(self.waits);
        waits.reset += count;
        if is_starved {
            waits.given_up.push(Arc::new(socket));
        }
    }

    /// Records that the listener waits from now on, if it is not waiting already.
    pub(crate) fn add_waiting(&self, socket: &Arc<Socket>) {
        let mut waits = lock!(self.waits);
        if waits.waiting.iter().any(|one| Arc::ptr_eq(one, socket)) {
            return;
        }
        if waits.waiting.is_empty() {
            waits.first = waits.rounds;
            waits.next = None;
        }
        waits.waiting.push(Arc::clone(socket));
    }

    /// Records that the listener no longer waits. `emptied`: its queue is empty.
    pub(crate) fn remove_waiting(&self, socket: &Arc<Socket>, emptied: bool) {
        let mut waits = lock!(self.waits);
        let index = waits
            .waiting
            .iter()
            .position(|one| Arc::ptr_eq(one, socket));
        let Some(index) = index else {
            return;
        };
        let socket = waits.waiting.swap_remove(index);
        waits.over = Some(Instant::now());
        if waits.waiting.is_empty() {
            self.round.store(0, Ordering::Relaxed);
        }
        if !emptied && !socket.is_passed {
            waits.given_up.push(socket);
        }
    }

    /// Begins a round if one is due. Returns whether connections are to be instructed to close; in
    /// the first rounds they are only observed.
    pub(crate) fn begin_round(&self) -> Option<bool> {
        let now = Instant::now();
        let mut waits = lock!(self.waits);
        if waits.next.is_some_and(|next| now < next) || waits.waiting.is_empty() {
            return None;
        }
        waits.next = Some(now + ROUND);
        waits.rounds += 1;
        self.round.store(waits.rounds, Ordering::Relaxed);
        Some(waits.rounds > waits.first + QUIET)
    }
}

/// What was read and written on a connection, as far as it shows whether the connection is idle.
///
/// Two kinds of connection are certainly idle after they have been quiet for some rounds: a
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
    pub(crate) fn is_owned(&mut self) {
        self.state = State::Other;
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
    use std::net::TcpStream;

    use super::*;
    use crate::Graceful;

    /// A lifecycle with a layer and a waiting listener.
    fn starved() -> Graceful {
        let graceful = Graceful::new();
        graceful.shared().starved.counts_requests();
        graceful.shared().starved.add_waiting(&socket(false));
        graceful
    }

    fn socket(is_passed: bool) -> Arc<Socket> {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        tcp.set_nonblocking(true).unwrap();
        let kind = SocketKind::Tcp(tcp);
        Arc::new(Socket { kind, is_passed })
    }

    fn is_idle_after(activity: &mut Activity, graceful: &Graceful, rounds: u32) -> bool {
        let shared = graceful.shared();
        let first = lock!(shared.starved.waits).rounds;
        let looks = (first + 1..=first + 1 + rounds).map(|round| {
            lock!(shared.starved.waits).rounds = round;
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
        activity.flushed(false);
        assert!(!is_idle_after(&mut activity, &graceful, 9));
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

    #[test]
    fn nothing_is_idle_while_no_listener_waits() {
        let graceful = Graceful::new();
        let mut activity = after(&[]);
        let shared = graceful.shared();
        assert!((0..9).all(|_| !activity.is_idle(&shared.starved, || shared.in_flight())));
    }

    #[test]
    fn the_rest_of_a_queue_is_counted_unless_it_belongs_to_the_next_process() {
        let starved = Starved::default();
        for (is_passed, expected) in [(true, 0), (false, 3)] {
            let socket = socket(is_passed);
            let SocketKind::Tcp(tcp) = &socket.kind else {
                unreachable!()
            };
            let address = tcp.local_addr().unwrap();
            let _clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
            starved.add_waiting(&socket);
            starved.remove_waiting(&socket, false);
            assert!(!starved.is_waiting() && starved.over().is_some());
            assert_eq!(starved.reset_queues(), expected);
        }
        assert_eq!(starved.reset_queues(), 3);
    }

    #[test]
    fn the_error_numbers_are_those_of_this_system() {
        use nix::errno::Errno;

        let exhausted = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
        assert!(
            exhausted
                .iter()
                .all(|errno| is_out_of_descriptors(&(*errno).into()))
        );
        let others = [Errno::EAGAIN, Errno::ECONNABORTED, Errno::EPERM];
        assert!(
            !others
                .iter()
                .any(|errno| is_out_of_descriptors(&(*errno).into()))
        );
    }
}
