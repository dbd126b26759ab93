//! Listeners whose accept queues cannot be emptied because the process has no file descriptors
//! left, and the count of connections that were reset in a queue, for this or another reason.
//!
//! While such a listener waits, idle connections are closed, and each closed connection makes room
//! for one from the queue. A connection of [`serve`] is instructed to close, and closes when
//! nothing is in flight on it. The server of any other connection is only informed after the
//! listener has closed. Such a connection reports the end of its stream instead, if it is certainly
//! idle: see `activity`.
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
    /// Whether the queue outlives the process, as far as is known: the socket is shared, or was or may
    /// have been passed by socket activation.
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

/// For how many rounds a connection must be quiet before it is closed: 39 ms, a little longer than
/// `QUIET_BEFORE_CLOSE` of `shutdown`, because data may be in transit.
pub(super) const QUIET: u32 = 3;

/// The listeners of one service that wait for descriptors, and the results of their waits.
#[derive(Default)]
pub(crate) struct Starved {
    /// The number of the round while a listener waits, otherwise 0. Read by each idle connection
    /// without the lock. `Relaxed` everywhere: a connection that sees a round late is woken again
    /// in the next one.
    pub(super) round: AtomicU32,
    /// Set if a [`GracefulLayer`](crate::GracefulLayer) counts requests, so that zero in flight is
    /// meaningful.
    pub(super) layered: OnceLock<()>,
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
    pub(crate) fn mark_layered(&self) {
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

    /// Records `count` connections that were accepted and not served.
    pub(crate) fn count_reset(&self, count: usize) {
        lock!(self.waits).reset += count;
    }

    /// Closes a listener that had no time to empty its queue, and counts the connections that are
    /// reset. If there are no descriptors to count them all, it is kept until connections have closed.
    pub(crate) fn close_unserved(&self, socket: Arc<Socket>) {
        let (count, is_starved) = socket.reset_some();
        let mut waits = lock!(self.waits);
        waits.reset += count;
        if is_starved {
            waits.given_up.push(socket);
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

#[cfg(all(test, unix))]
mod tests {
    use std::net::TcpStream;

    use tokio::time::advance;

    use super::*;

    fn socket(is_passed: bool) -> Arc<Socket> {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        tcp.set_nonblocking(true).unwrap();
        let kind = SocketKind::Tcp(tcp);
        Arc::new(Socket { kind, is_passed })
    }

    fn connect(socket: &Socket) -> [TcpStream; 3] {
        let SocketKind::Tcp(tcp) = &socket.kind else {
            unreachable!()
        };
        let address = tcp.local_addr().unwrap();
        [(); 3].map(|()| TcpStream::connect(address).unwrap())
    }

    #[test]
    fn the_rest_of_a_queue_is_counted_unless_it_belongs_to_the_next_process() {
        let starved = Starved::default();
        for (is_passed, expected) in [(true, 0), (false, 3)] {
            let socket = socket(is_passed);
            let _clients = connect(&socket);
            starved.add_waiting(&socket);
            starved.remove_waiting(&socket, false);
            assert!(!starved.is_waiting() && starved.over().is_some());
            assert_eq!(starved.reset_queues(), expected);
        }
        assert_eq!(starved.reset_queues(), 3);
        for (is_passed, expected) in [(true, 3), (false, 6)] {
            let socket = socket(is_passed);
            let _clients = connect(&socket);
            starved.close_unserved(socket);
            assert_eq!(starved.reset_queues(), expected);
        }
    }

    #[test]
    fn a_listener_that_has_emptied_its_queue_is_not_kept() {
        let starved = Starved::default();
        let socket = socket(false);
        starved.add_waiting(&socket);
        starved.remove_waiting(&socket, true);
        assert_eq!(Arc::strong_count(&socket), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_begins_every_13_ms_and_closes_connections_from_the_fourth_on() {
        const MS: Duration = Duration::from_millis(1);
        let starved = Starved::default();
        let socket = socket(false);
        for _ in 0..2 {
            assert!(starved.begin_round().is_none() && !starved.is_waiting());
            starved.add_waiting(&socket);
            for closes in [false, false, false, true, true] {
                assert_eq!(starved.begin_round(), Some(closes));
                assert!(starved.is_waiting());
                advance(ROUND.saturating_sub(MS)).await;
                assert_eq!(starved.begin_round(), None);
                advance(MS).await;
            }
            starved.remove_waiting(&socket, true);
        }
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
