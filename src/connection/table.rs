//! The connections that are open, and the telling of them: to leave, to close, and in the end that
//! they are cut.
//!
//! A connection has a [`ConnectionEntry`]: what is known of it, and its [`ConnectionState`]. The cut tells every
//! connection and wakes whoever waits for it, so that the next poll, which fails, comes at once.
//!
//! Each connection has wakers of its own. One notification shared by all of them would make ten
//! thousand tasks queue for one lock at the moment of the cut.
//!
//! 1. *The end of the last connection is not missed.* [`remove`](ConnectionTable::remove) removes it under the
//!    lock, and then reads the phase. The timeline advances the phase, and then counts the connections
//!    under the lock. If the removal comes first, the count is zero. If the count comes first, the
//!    lock orders the advance before the reading of the phase, so that the timeline is rung for.
//! 2. *A connection that comes while the others are told is told too.* Under the lock
//!    [`instruct`](ConnectionTable::instruct) notes what is told and copies the list. A connection is entered before
//!    that, and is in the list, or after it, and is told when it is entered.
//!
//! `models` holds both, and fails where the phase is read before the removal, and where the list is
//! copied before what is told is noted.

use std::{cmp::Reverse, collections::HashMap, fmt, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    sniffer::Sniffer,
    stagger::Place,
    state::{ConnectionState, Directive},
};
use crate::{
    phase::Phase,
    report::CutConnection,
    sync::{AtomicU8, AtomicU16, AtomicU32, Mutex, Ordering, lock},
};

/// Each connection keeps its owner `O` alive.
pub(crate) struct ConnectionTable<O> {
    open: Mutex<Open<O>>,
}

struct Open<O> {
    /// Each knows its seat, which changes when another one leaves.
    lines: Vec<Arc<ConnectionEntry<O>>>,
    /// The peers of lines that have the flag [`RENAMED`], by the address of the line.
    renamed: HashMap<usize, SocketAddr>,
    listeners: Listeners,
    /// When the first connection was opened.
    first: Option<Instant>,
    /// Connections so far.
    entered: u64,
    /// When the last one was opened that is [`WATCHED`], in nanoseconds after the first one.
    watched: u64,
    /// Requests that were dropped because their clients had closed their writing side.
    half_closed: usize,
    /// What everybody has been told.
    told: Directive,
}

/// Listeners that accept.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Listeners {
    /// Those that are open now.
    pub(crate) open: usize,
    /// There have been so many.
    pub(crate) so_far: usize,
    /// And so many of these are not left to the next process.
    own: usize,
}

impl Listeners {
    /// There has been one, and what connects to any of them is accepted by the next process.
    pub(crate) fn are_shared(self) -> bool {
        self.so_far > 0 && self.own == 0
    }
}

impl<O> Default for ConnectionTable<O> {
    fn default() -> Self {
        Self {
            open: Mutex::new(Open {
                lines: Vec::new(),
                renamed: HashMap::new(),
                listeners: Listeners::default(),
                first: None,
                entered: 0,
                watched: 0,
                half_closed: 0,
                told: Directive::default(),
            }),
        }
    }
}

impl<O> ConnectionTable<O> {
    pub(crate) fn listeners(&self) -> Listeners {
        lock!(self.open).listeners
    }

    #[cfg(feature = "axum")]
    pub(crate) fn listener_opened(&self, is_shared: bool) {
        let mut open = lock!(self.open);
        open.listeners.open += 1;
        open.listeners.own += usize::from(!is_shared);
        open.listeners.so_far += 1;
    }

    #[cfg(feature = "axum")]
    pub(crate) fn listener_closed(&self) {
        lock!(self.open).listeners.open -= 1;
    }

    /// Whether a connection was entered, or while the service stops was read from, since this was
    /// last asked.
    pub(crate) fn take_stirred(&self) -> bool {
        let open = lock!(self.open);
        // Of each, because each is to be asked anew.
        let stirred = open.lines.iter().filter(|line| line.flags.take(STIRRED));
        stirred.count() > 0
    }

    pub(crate) fn len(&self) -> usize {
        lock!(self.open).lines.len()
    }

    /// There is a connection, or could be.
    pub(crate) fn has_any(&self) -> bool {
        let open = lock!(self.open);
        open.listeners.open > 0 || !open.lines.is_empty()
    }

    /// Counts a request that was dropped because its client had closed its writing side before there
    /// was a response.
    #[cold]
    pub(crate) fn half_closed(&self) {
        lock!(self.open).half_closed += 1;
    }

    /// How many of these there were.
    pub(crate) fn count_half_closed(&self) -> usize {
        lock!(self.open).half_closed
    }

    /// Whether there is a connection that nobody has tried to read yet.
    pub(crate) fn has_unread(&self) -> bool {
        let open = lock!(self.open);
        open.lines.iter().any(|line| line.state.is_unread())
    }

    /// Whether a handshake runs whose peer has sent something.
    pub(crate) fn has_handshakes(&self) -> bool {
        let open = lock!(self.open);
        let mut lines = open.lines.iter();
        lines.any(|line| line.flags.has(HANDSHAKE) && line.sniffer.has_read())
    }

    /// Replaces the address of the peer, which is another one behind a proxy.
    pub(crate) fn rename(&self, line: &Arc<ConnectionEntry<O>>, peer: SocketAddr) {
        let mut open = lock!(self.open);
        open.renamed.insert(line.number(), peer);
        line.flags.set(RENAMED);
    }

    pub(crate) fn peer(&self, line: &ConnectionEntry<O>) -> Option<SocketAddr> {
        if line.flags.has(RENAMED) {
            return lock!(self.open).renamed.get(&line.number()).copied();
        }
        line.peer
    }

    /// Enters a connection, until [`remove`](Self::remove).
    pub(crate) fn insert(&self, owner: O, peer: Option<SocketAddr>) -> Arc<ConnectionEntry<O>> {
        let now = Instant::now();
        let mut open = lock!(self.open);
        // A client that connects while others are asked to leave has a request, and is asked with the
        // response to it.
        let told = if open.told >= Directive::Close {
            open.told
        } else {
            open.told.min(Directive::Stopping)
        };
        let opened = now.saturating_duration_since(*open.first.get_or_insert(now));
        let opened = u64::try_from(opened.as_nanos()).unwrap_or(u64::MAX);
        let watched = open.entered < ALL_WATCHED || opened - open.watched >= WATCH_EVERY;
        if watched {
            open.watched = opened;
        }
        let seat = u32::try_from(open.lines.len()).expect("files are counted in 32 bits");
        let line = Arc::new(ConnectionEntry {
            owner,
            peer,
            opened,
            seat: AtomicU32::new(seat),
            place: Place::nth(open.entered),
            sniffer: Sniffer::default(),
            flags: Flags::new(STIRRED | LOOKED_AT | if watched { WATCHED } else { 0 }),
            entries: AtomicU8::new(1),
            undelivered: AtomicU32::new(0),
            state: ConnectionState::new(told),
        });
        open.lines.push(Arc::clone(&line));
        open.entered += 1;
        line
    }

    /// Strikes out a connection. Says whether the service may have waited for it: it was the last one,
    /// and connections are being closed, or none can come while they are asked to leave. The phase is read after the removal: point 1 of the module
    /// header.
    pub(crate) fn remove(&self, line: &ConnectionEntry<O>, phase: impl FnOnce() -> Phase) -> bool {
        let mut open = lock!(self.open);
        let seat = line.seat.load(Ordering::Relaxed);
        let line = open.lines.swap_remove(seat as usize);
        if line.flags.has(RENAMED) {
            open.renamed.remove(&line.number());
        }
        if let Some(moved) = open.lines.get(seat as usize) {
            moved.seat.store(seat, Ordering::Relaxed);
        }
        let left = open.lines.len();
        let listeners = open.listeners.open;
        drop(open);
        drop(line);
        left == 0
            && match phase() {
                Phase::LameDuck => listeners == 0,
                phase => phase == Phase::Closing,
            }
    }

    /// The connections that are open at the cut, the oldest first. What becomes of each is known
    /// when it has been closed.
    pub(crate) fn list(&self, now: Instant) -> Vec<Left<O>> {
        let mut list: Vec<_> = {
            let open = lock!(self.open);
            let first = now.saturating_duration_since(open.first.unwrap_or(now));
            let lines = open.lines.iter().cloned();
            let left = lines.map(|line| Left {
                age: first.saturating_sub(Duration::from_nanos(line.opened)),
                peer: open.renamed.get(&line.number()).copied().or(line.peer),
                line,
            });
            left.collect()
        };
        list.sort_by_key(|left| Reverse(left.age));
        list
    }

    /// Has every connection look again at what it was told.
    pub(crate) fn wake_all(&self) {
        let lines = lock!(self.open).lines.clone();
        for line in lines {
            line.state.wake_all();
        }
    }

    /// Whether everybody who was there has been told to leave.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn asks_all(&self) -> bool {
        lock!(self.open).told >= Directive::Leave
    }

    /// The connections that are open, and were already at this instant.
    #[cfg(feature = "axum")]
    pub(crate) fn opened_before(&self, instant: Instant) -> Vec<Arc<ConnectionEntry<O>>> {
        let open = lock!(self.open);
        let first = open.first.unwrap_or(instant);
        let lines = open.lines.iter();
        let before =
            |line: &&Arc<ConnectionEntry<O>>| first + Duration::from_nanos(line.opened) <= instant;
        lines.filter(before).cloned().collect()
    }

    /// Tells every connection: those that are open, and if it is to close, those that come.
    pub(crate) fn instruct(&self, told: Directive) {
        let lines = {
            let mut open = lock!(self.open);
            if open.told >= told {
                return;
            }
            open.told = told;
            open.lines.clone()
        };
        for line in lines {
            line.state.instruct(told);
        }
    }
}

impl<O> fmt::Debug for ConnectionTable<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionTable")
            .field("open", &self.len())
            .finish_non_exhaustive()
    }
}

/// One connection: what it is told, and what is known of it. All in one place, and small, because
/// there may be very many.
pub(crate) struct ConnectionEntry<O> {
    pub(crate) owner: O,
    peer: Option<SocketAddr>,
    /// Nanoseconds after the first one.
    opened: u64,
    /// Where it is in the table. Changes under the table's lock.
    seat: AtomicU32,
    #[cfg_attr(not(all(feature = "axum", feature = "signal")), expect(dead_code))]
    pub(crate) place: Place,
    pub(crate) sniffer: Sniffer,
    pub(crate) flags: Flags,
    /// How many entries are to be dropped before it is removed. `Relaxed` when one is added, by one that
    /// is there; `AcqRel` when one is dropped, so that the last one speaks for all.
    pub(crate) entries: AtomicU8,
    /// Bytes that the peer had not acknowledged when the connection was cut.
    pub(crate) undelivered: AtomicU32,
    pub(crate) state: ConnectionState,
}

impl<O> ConnectionEntry<O> {
    /// A number that no other open connection has.
    pub(crate) fn number(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// What knows how many pieces of responses its servers hold.
pub(crate) trait Pieces {
    fn pieces(&self) -> usize;
}

impl<O> ConnectionEntry<O> {
    /// Notes that something was read while the service stops.
    #[inline]
    pub(crate) fn read_while_stopping(&self, told: Directive) {
        if told < Directive::Leave && self.flags.has(STIRRED) {
            return;
        }
        self.note_read(told);
    }

    fn note_read(&self, told: Directive) {
        let asked = if self.is_served() {
            Directive::Leave
        } else {
            Directive::Close
        };
        let answers = if told >= asked { ANSWERS } else { 0 };
        self.flags.set(STIRRED | answers);
    }

    /// Whether streams of HTTP/2 may be open, or responses be left in the server, a while after the
    /// peer was asked to leave. `serve` knows. On other servers the GOAWAY comes with a ping; a peer
    /// that is there answers it, and then the connection closes with its last stream.
    pub(crate) fn may_have_streams(&self) -> bool
    where
        O: Pieces,
    {
        #[cfg(all(feature = "axum", feature = "signal"))]
        if self.is_served() {
            return self.state.has_streams();
        }
        self.flags.has(ANSWERS) || self.owner.pieces() > 0
    }

    /// `serve` has it, and sends the GOAWAY as soon as the connection is told to leave. Other servers
    /// send it when they close their connections.
    pub(crate) fn is_served(&self) -> bool {
        self.sniffer.is_listened_to()
    }
}

/// Something was read since this was last looked at. Kept only while the service stops.
pub(crate) const STIRRED: u16 = 1;
/// Something was read since the peer was asked to leave.
const ANSWERS: u16 = 2;
/// Its server has let go of it, and it waits for the peer to take the rest.
pub(crate) const LINGERS: u16 = 4;
/// A response went out while the service stopped.
pub(crate) const RESPONDED: u16 = 8;
/// Some of its requests are looked at, whether the layer sees them.
pub(crate) const WATCHED: u16 = 16;
/// It has asked for an upgrade, and is among those that have.
pub(crate) const UPGRADES: u16 = 32;
/// What passes is looked at for requests: where the server is not ours, and as long as they can be told
/// apart.
pub(crate) const LOOKED_AT: u16 = 64;
/// A handshake runs on it.
pub(crate) const HANDSHAKE: u16 = 128;
/// After a handshake: something was written, or the first head of HTTP/1 is whole.
pub(crate) const BUSY: u16 = 256;
/// After a handshake: it was upgraded from HTTP/1.
pub(crate) const UPGRADED: u16 = 512;
/// After a handshake: the last that was read is a request of HTTP/1 without a body.
pub(crate) const BODILESS: u16 = 1024;
/// Its peer is in the table of renamed peers.
const RENAMED: u16 = 2048;

/// So many connections are watched, and after them one in so many nanoseconds.
const ALL_WATCHED: u64 = 8;
const WATCH_EVERY: u64 = 20_000_000;

/// What is noted of a connection, one bit each. `Relaxed`: they say nothing about anything else in
/// memory.
#[derive(Debug)]
pub(crate) struct Flags(AtomicU16);

impl Flags {
    fn new(flags: u16) -> Self {
        Self(AtomicU16::new(flags))
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.0.load(Ordering::Relaxed) & flag != 0
    }

    /// Writes only where something changes.
    pub(crate) fn set(&self, flags: u16) {
        if self.0.load(Ordering::Relaxed) & flags != flags {
            self.0.fetch_or(flags, Ordering::Relaxed);
        }
    }

    /// Takes a flag back, and says whether it was set.
    pub(crate) fn take(&self, flag: u16) -> bool {
        self.has(flag) && self.0.fetch_and(!flag, Ordering::Relaxed) & flag != 0
    }
}

/// A connection that was open at the cut.
pub(crate) struct Left<O> {
    pub(crate) line: Arc<ConnectionEntry<O>>,
    peer: Option<SocketAddr>,
    age: Duration,
}

impl<O> Left<O> {
    pub(crate) fn undelivered(&self) -> u32 {
        self.line.undelivered.load(Ordering::Relaxed)
    }

    /// A response went out on it while the service stopped.
    pub(crate) fn responded(&self) -> bool {
        self.line.flags.has(RESPONDED)
    }

    /// Its server had let go of it, so that no request is counted for what it still owed.
    pub(crate) fn lingered(&self) -> bool {
        self.line.flags.has(LINGERS)
    }

    pub(crate) fn describe(&self) -> CutConnection {
        CutConnection {
            peer: self.peer,
            age: self.age,
            undelivered: self.undelivered().into(),
        }
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use loom::{model, thread};

    use super::*;
    use crate::{
        admission::Gate,
        sync::{AtomicBool, Ordering::Relaxed},
    };

    type Connected = Gate<(), ConnectionTable<()>>;

    fn connected() -> Connected {
        Gate::new(None, false, (), |_| ConnectionTable::default())
    }

    #[test]
    fn the_end_of_the_last_connection_is_seen_or_rung_for() {
        model(|| {
            let gate = connected();
            let rung = Arc::new(AtomicBool::new(false));
            let lines = [(); 2].map(|()| gate.insert((), None));
            let ends = lines.map(|line| {
                let (gate, rung) = (gate.clone(), Arc::clone(&rung));
                thread::spawn(move || {
                    if gate.remove(&line, || gate.phase()) {
                        rung.store(true, Relaxed);
                    }
                })
            });
            gate.advance(Phase::Closing);
            let seen = gate.len() == 0;
            for end in ends {
                end.join().unwrap();
            }
            assert!(
                seen || rung.load(Relaxed),
                "it is waited for to the deadline"
            );
            assert_eq!(gate.len(), 0);
        });
    }

    #[test]
    fn a_connection_that_comes_while_others_are_told_is_told_too() {
        model(|| {
            let registry = Arc::new(ConnectionTable::default());
            let there = registry.insert((), None);
            let comes = {
                let registry = Arc::clone(&registry);
                thread::spawn(move || registry.insert((), None))
            };
            registry.instruct(Directive::Close);
            let came = comes.join().unwrap();
            for line in [there, came] {
                assert_eq!(line.state.directive(), Directive::Close);
            }
        });
    }
}

#[cfg(all(test, target_pointer_width = "64", not(tower_graceful_loom)))]
mod tests {
    use super::*;

    /// With the counts of its `Arc` it fills what an allocator has for 128 bytes.
    #[test]
    fn a_line_is_small() {
        assert!(
            size_of::<ConnectionEntry<Arc<()>>>() <= 112,
            "{}",
            size_of::<ConnectionEntry<Arc<()>>>()
        );
    }
}
