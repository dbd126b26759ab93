//! Listeners whose accept queues cannot be emptied because the process has no file descriptors
//! left.
//!
//! While one of them waits, idle connections are closed, and each that is gone makes room for one
//! of the queue. A connection of [`serve`] is told to close, and is closed when nothing is in flight
//! on it. The server of any other connection is told only after the listener is closed. Such a
//! connection reports the end of its stream instead, if it is idle for certain: see [`Activity`].
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

use crate::{
    shutdown::Shared,
    sync::{AtomicU32, Ordering, lock},
};

/// More connections than an accept queue holds, where nothing stops it from being filled.
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

/// A listener of the operating system, not the runtime's, whose every error is seen. Nonblocking.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) kind: SocketKind,
    /// By socket activation, or as far as is known: its queue outlives the process.
    pub(crate) is_passed: bool,
}

#[derive(Debug)]
pub(crate) enum SocketKind {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
}

impl Socket {
    /// Accepts a connection, and drops it.
    fn reset_one(&self) -> io::Result<()> {
        match &self.kind {
            SocketKind::Tcp(tcp) => tcp.accept().map(drop),
            #[cfg(unix)]
            SocketKind::Unix(unix) => unix.accept().map(drop),
        }
    }

    /// Resets what is in the queue, and says how many connections that were: at least one if it
    /// cannot be known because there is still no descriptor. The queue of a passed socket is left
    /// to the next process.
    fn reset_all(&self) -> usize {
        let mut count = 0;
        if self.is_passed {
            return count;
        }
        while count < MOST {
            match self.reset_one() {
                Ok(()) => count += 1,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if is_want(&error) => return count + 1,
                Err(_) => break,
            }
        }
        count
    }
}

/// Whether accepting failed for want of a descriptor, or of the kernel's memory for one.
pub(crate) fn is_want(error: &io::Error) -> bool {
    #[cfg(unix)]
    const WANTS: &[i32] = {
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
    const WANTS: &[i32] = {
        const WSAEMFILE: i32 = 10024;
        const WSAENOBUFS: i32 = 10055;
        &[WSAEMFILE, WSAENOBUFS]
    };
    #[cfg(not(any(unix, windows)))]
    const WANTS: &[i32] = &[];
    error
        .raw_os_error()
        .is_some_and(|code| WANTS.contains(&code))
}

/// How often waiting listeners have idle connections closed.
const ROUND: Duration = Duration::from_millis(13);

/// For how many rounds a connection must be quiet before it is closed: a little longer than what
/// any other close waits for what is on its way.
const QUIET: u32 = 3;

/// The listeners of one service that wait for descriptors, and what became of their queues.
#[derive(Default)]
pub(crate) struct Starved {
    /// While a listener waits, the number of the round, and otherwise 0. Read by each idle
    /// connection, without the lock. `Relaxed` in all places: a connection that sees it late is
    /// woken again.
    round: AtomicU32,
    /// A [`GracefulLayer`](crate::GracefulLayer) counts requests, so that it is known when none is
    /// in flight.
    layered: OnceLock<()>,
    waits: Mutex<Waits>,
}

#[derive(Default)]
struct Waits {
    waiting: Vec<Arc<Socket>>,
    /// These have given up. They are kept until connections are gone, so that it can be counted
    /// what is in their queues.
    given_up: Vec<Arc<Socket>>,
    /// Rounds so far.
    rounds: u32,
    /// Rounds before the present wait.
    first: u32,
    /// When the next round is due.
    next: Option<Instant>,
    /// When the last wait ended.
    over: Option<Instant>,
    /// Connections that were reset.
    reset: usize,
}

impl Starved {
    /// A layer was made.
    pub(crate) fn counts_requests(&self) {
        let _ = self.layered.set(());
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.round.load(Ordering::Relaxed) != 0
    }

    /// When the last listener was done with waiting.
    pub(crate) fn over(&self) -> Option<Instant> {
        lock!(self.waits).over
    }

    /// Closes the listeners that are left, now that connections are gone. Says how many
    /// connections have been reset so far.
    pub(crate) fn reset_queues(&self) -> usize {
        let mut waits = lock!(self.waits);
        let mut left = mem::take(&mut waits.waiting);
        left.append(&mut waits.given_up);
        self.round.store(0, Ordering::Relaxed);
        waits.reset += left.iter().map(|socket| socket.reset_all()).sum::<usize>();
        waits.reset
    }

    /// So many connections were accepted too late to be served.
    pub(crate) fn were_reset(&self, count: usize) {
        lock!(self.waits).reset += count;
    }

    /// The listener waits from now on, if it does not already.
    pub(crate) fn begins(&self, socket: &Arc<Socket>) {
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

    /// The wait is over, and perhaps the queue is not empty.
    pub(crate) fn ends(&self, socket: &Arc<Socket>, emptied: bool) {
        let mut waits = lock!(self.waits);
        let seat = waits
            .waiting
            .iter()
            .position(|one| Arc::ptr_eq(one, socket));
        let Some(seat) = seat else {
            return;
        };
        let socket = waits.waiting.swap_remove(seat);
        waits.over = Some(Instant::now());
        if waits.waiting.is_empty() {
            self.round.store(0, Ordering::Relaxed);
        }
        if !emptied && !socket.is_passed {
            waits.given_up.push(socket);
        }
    }

    /// Begins a round, if one is due. Says whether connections are to be told to close; in the
    /// first rounds they are only looked at.
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

/// What was read and written on a connection, as far as it says whether the connection is idle.
///
/// Two kinds of connection are idle for certain, once they have been quiet for some rounds: one on
/// which nothing was ever read; and, while no request is in flight in the whole service, one of
/// HTTP/1 that was written to after the last read. A connection that carries anything else is never
/// idle for certain: HTTP/2, in which a stream may be a tunnel; TLS; and what follows an upgrade or
/// a `CONNECT`.
///
/// Small, because there may be very many connections.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Activity {
    state: State,
    /// The round in which the connection was found to be quiet, modulo 255 and plus 1, or 0.
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
    /// The same, but the last write or flush was not ready. Where all has been handed over to be
    /// written, no request need be in flight any more.
    Unsent,
    /// Never idle for certain.
    Other,
}

impl Activity {
    /// The connection has an owner that closes it, whatever is read and written.
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

    /// The peer begins to speak, or begins again. A piece that may be the beginning of something
    /// else than a request of HTTP/1 is taken for it.
    fn begins(&mut self, read: &[u8]) {
        let may_begin = |what: &[u8]| read.iter().zip(what).all(|(one, other)| one == other);
        let other = may_begin(b"PRI * HTTP/2.0") || may_begin(b"CONNECT ");
        // An empty line may come before a further request.
        let again = self.state != State::Silent;
        let http1 = again || read.first().is_some_and(u8::is_ascii_uppercase);
        self.state = if http1 && !other {
            State::Asked
        } else {
            State::Other
        };
    }

    /// Something is written, which may be a response that upgrades the connection, and is not yet if
    /// it is not ready.
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

    /// Whether the connection is idle for certain. To be asked when there is nothing to read.
    #[inline]
    pub(crate) fn is_idle(&mut self, shared: &Shared) -> bool {
        let round = shared.starved.round.load(Ordering::Relaxed);
        round != 0 && self.is_idle_in(round, shared)
    }

    #[cold]
    fn is_idle_in(&mut self, round: u32, shared: &Shared) -> bool {
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
            State::Answered => shared.starved.layered.get().is_some() && shared.in_flight() == 0,
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
        graceful.shared().starved.begins(&socket(false));
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
            activity.is_idle(shared)
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
    fn what_may_be_in_use_is_not_idle() {
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
    fn a_response_that_its_client_does_not_read_is_not_idle() {
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
        assert!((0..9).all(|_| !activity.is_idle(graceful.shared())));
    }

    #[test]
    fn what_is_left_in_a_queue_is_counted_unless_the_next_process_has_it() {
        let starved = Starved::default();
        for (is_passed, expected) in [(true, 0), (false, 3)] {
            let socket = socket(is_passed);
            let SocketKind::Tcp(tcp) = &socket.kind else {
                unreachable!()
            };
            let address = tcp.local_addr().unwrap();
            let _clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
            starved.begins(&socket);
            starved.ends(&socket, false);
            assert!(!starved.is_waiting() && starved.over().is_some());
            assert_eq!(starved.reset_queues(), expected);
        }
        assert_eq!(starved.reset_queues(), 3);
    }

    #[test]
    fn the_numbers_of_the_errors_are_those_of_this_system() {
        use nix::errno::Errno;

        let wants = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
        assert!(wants.iter().all(|errno| is_want(&(*errno).into())));
        let others = [Errno::EAGAIN, Errno::ECONNABORTED, Errno::EPERM];
        assert!(!others.iter().any(|errno| is_want(&(*errno).into())));
    }
}
