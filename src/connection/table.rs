//! The table of open connections, and the directives given to all of them.
//!
//! Each connection has a [`ConnectionEntry`]: what is known about it, and its [`ConnectionState`].
//! The cut instructs every connection and wakes the tasks that wait for it, so that the next poll,
//! which fails, comes at once.
//!
//! Each connection has its own wakers. A single notification shared by all of them would make ten
//! thousand tasks queue for one lock at the moment of the cut.
//!
//! 1. *The end of the last connection is not missed.* [`remove`](ConnectionTable::remove) removes
//!    the connection under the lock and then reads the phase. The timeline advances the phase and
//!    then counts the connections under the lock. If the removal comes first, the count is zero. If
//!    the count comes first, the lock orders the advance before the reading of the phase, so
//!    `remove` sees the phase and the caller wakes the driver. Model:
//!    `the_end_of_the_last_connection_is_seen_or_wakes_the_driver`.
//! 2. *A connection that comes while the others are instructed is instructed too.* Under the lock,
//!    [`instruct`](ConnectionTable::instruct) stores the directive and copies the list. A
//!    connection is inserted before that and is in the list, or after it and gets the directive
//!    when it is inserted. Model:
//!    `a_connection_that_comes_while_others_are_instructed_is_instructed_too`.
//! 3. *A connection that comes at the cut is listed, or is cut from its beginning.* The connections are
//!    listed some time before they are instructed. Under the lock, [`cut`](ConnectionTable::cut) copies
//!    the list and sets what a connection gets that is inserted later, which is then counted. Model:
//!    `a_connection_that_comes_at_the_cut_is_listed_or_cut_from_its_beginning`.
//!
//! The models fail if the phase is read before the removal, if the list is copied before the directive
//! is stored, and if the cut does not set what later connections get.
//!
//! This file is long because everything that takes the lock of the table is in it.

use std::{cmp::Reverse, collections::HashMap, mem, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    directive::Directive,
    entry::{ConnectionEntry, OpenAtCut},
    flags::{
        ACTIVE, CLOSE_NOTICED, Flags, HANDSHAKE, INSPECTED, LINGERS, MAY_DROP, READ_ONCE_MORE,
        RENAMED, UPGRADED, WATCHED,
    },
    sniffer::Sniffer,
    stagger::Place,
    state::ConnectionState,
};
use crate::{
    phase::Phase,
    sync::{AtomicU8, AtomicU32, Mutex, Ordering, lock},
};

/// The number of connections that are all watched at first. After them, at most one per
/// `WATCH_EVERY` nanoseconds is watched.
const ALL_WATCHED: u64 = 8;
const WATCH_EVERY: u64 = 20_000_000;

/// Each entry keeps its owner `O` alive.
pub(crate) struct ConnectionTable<O> {
    open: Mutex<Open<O>>,
}

struct Open<O> {
    /// Each entry knows its index here, which changes when another entry is removed.
    connections: Vec<Arc<ConnectionEntry<O>>>,
    /// The peers of entries that have the flag [`RENAMED`], by [`number`](ConnectionEntry::number).
    renamed: HashMap<usize, SocketAddr>,
    listeners: Listeners,
    /// When the first connection was opened.
    first: Option<Instant>,
    /// The number of connections so far.
    entered: u64,
    /// When the last [`WATCHED`] connection was opened, in nanoseconds after the first connection.
    watched: u64,
    lost: Lost,
    /// The latest directive to all connections.
    directive: Directive,
    /// The connections have been listed for the cut, and are about to be instructed.
    is_cut: bool,
    /// How often [`Directive::Expire`] was given. A connection that had something to wait for the last time
    /// may have nothing left to wait for.
    expiries: u32,
    /// The connections that have not been given it yet.
    uninstructed: Vec<Arc<ConnectionEntry<O>>>,
}

/// What was lost while the service stopped, without a cut.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lost {
    /// Requests that were dropped because their clients had closed their writing side.
    pub(crate) half_closed: usize,
    /// Connections whose peers do not receive the rest of what was written.
    pub(crate) torn: usize,
    /// Those on which bytes of a response went out while the service stopped. The responses of the others belong to
    /// no request of the report.
    pub(crate) torn_requests: usize,
}

/// Listeners that accept connections.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Listeners {
    /// Those that are open now.
    pub(crate) open: usize,
    /// The number of listeners so far, including closed ones.
    pub(crate) so_far: usize,
    /// The number of those in `so_far` that are not left to the next process.
    own: usize,
}

impl Listeners {
    /// Whether there has been a listener, and every one is left to the next process.
    pub(crate) fn are_shared(self) -> bool {
        self.so_far > 0 && self.own == 0
    }
}

impl<O> Default for ConnectionTable<O> {
    fn default() -> Self {
        Self {
            open: Mutex::new(Open {
                connections: Vec::new(),
                renamed: HashMap::new(),
                listeners: Listeners::default(),
                first: None,
                entered: 0,
                watched: 0,
                lost: Lost::default(),
                directive: Directive::default(),
                is_cut: false,
                expiries: 0,
                uninstructed: Vec::new(),
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

    /// Whether, since the last call, a connection was inserted, or read from while the service
    /// stops.
    pub(crate) fn take_activity(&self) -> bool {
        let open = lock!(self.open);
        // `count` and not `any`, because the flag of each entry must be cleared.
        let active = open
            .connections
            .iter()
            .filter(|entry| entry.flags.take(ACTIVE));
        active.count() > 0
    }

    /// Holds the lock of the table until it is dropped.
    #[cfg(all(test, feature = "axum", feature = "signal", not(tower_graceful_loom)))]
    pub(crate) fn hold(&self) -> impl Sized + '_ {
        lock!(self.open)
    }

    pub(crate) fn len(&self) -> usize {
        lock!(self.open).connections.len()
    }

    /// Whether there is a connection, or a listener that may accept one.
    pub(crate) fn has_any(&self) -> bool {
        let open = lock!(self.open);
        open.listeners.open > 0 || !open.connections.is_empty()
    }

    /// Notes that the request on the connection with this peer may be dropped without a response.
    #[cfg(feature = "axum")]
    pub(crate) fn mark_may_drop(&self, peer: SocketAddr) {
        let open = lock!(self.open);
        let renamed = |entry: &ConnectionEntry<O>| {
            entry.flags.has(RENAMED) && open.renamed.get(&entry.number()) == Some(&peer)
        };
        let mut entries = open.connections.iter();
        if let Some(entry) = entries.find(|entry| entry.peer == Some(peer) || renamed(entry)) {
            entry.flags.set(MAY_DROP);
        }
    }

    /// Counts a request that was dropped because its client had closed its writing side before there
    /// was a response.
    #[cold]
    pub(crate) fn half_closed(&self) {
        lock!(self.open).lost.half_closed += 1;
    }

    /// Counts a connection whose peer does not receive the rest of what was written. If it has been listed at the
    /// cut, it counts there.
    #[cold]
    pub(crate) fn torn(&self, entry: &ConnectionEntry<O>) {
        let mut open = lock!(self.open);
        let is_listed = open.is_cut;
        if is_listed && entry.flags.has(LINGERS) {
            return;
        }
        open.lost.torn_requests += usize::from(entry.owes_response());
        if !is_listed {
            open.lost.torn += 1;
            // If it is listed before it is closed, it has nothing more to lose.
            entry.flags.set(LINGERS);
            entry.undelivered.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn lost_so_far(&self) -> Lost {
        lock!(self.open).lost
    }

    /// Whether there is a connection that no task has tried to read yet.
    pub(crate) fn has_unread(&self) -> bool {
        let open = lock!(self.open);
        open.connections.iter().any(|entry| entry.state.is_unread())
    }

    /// Whether a `serve` task has not yet read the directive to close its connection. Tasks of other
    /// servers are unknown and not included, and neither are connections that are upgraded, that their server
    /// has dropped, or whose request may be dropped.
    pub(crate) fn has_close_unnoticed(&self) -> bool {
        const OTHERS: u16 = CLOSE_NOTICED | UPGRADED | MAY_DROP | LINGERS;
        let open = lock!(self.open);
        let mut connections = open.connections.iter();
        connections.any(|entry| entry.is_served() && !entry.flags.has(OTHERS))
    }

    /// How many connections have not been [read once more](Directive::Read), of those that a server other
    /// than `serve` has read before.
    pub(crate) fn not_read_once_more(&self) -> usize {
        const OTHERS: u16 = READ_ONCE_MORE | UPGRADED | MAY_DROP | HANDSHAKE | LINGERS;
        let open = lock!(self.open);
        let connections = open.connections.iter();
        let left = connections.filter(|entry| {
            !entry.is_served() && !entry.flags.has(OTHERS) && !entry.state.is_unread()
        });
        left.count()
    }

    /// Whether a connection may be idle that belongs to a server other than `serve`. Such servers do not say
    /// when they notice something, so the connections are compared with the requests in flight. If one of
    /// them speaks HTTP/2, all these requests may be on it, and any other connection may be idle. Connections
    /// that their server has dropped are not included.
    pub(crate) fn may_be_idle(&self, in_flight: usize) -> bool {
        let open = lock!(self.open);
        let connections = open.connections.iter();
        let mut others = connections
            .filter(|entry| !entry.is_served() && !entry.flags.has(MAY_DROP | UPGRADED | LINGERS));
        let count = others.clone().count();
        count > in_flight || others.any(|entry| entry.sniffer.is_http2())
    }

    /// Whether the servers must not be told yet to close their connections. `serve` waits by itself.
    pub(crate) fn has_torn_by_close(&self) -> bool {
        let open = lock!(self.open);
        let mut others = open.connections.iter().filter(|entry| !entry.is_served());
        others.any(|entry| entry.is_torn_by_close())
    }

    /// Whether a handshake is running whose peer has sent something.
    pub(crate) fn has_handshakes(&self) -> bool {
        let open = lock!(self.open);
        let mut connections = open.connections.iter();
        connections.any(|entry| entry.flags.has(HANDSHAKE) && entry.sniffer.has_read())
    }

    /// Replaces the address of the peer, for a connection behind a proxy.
    pub(crate) fn rename(&self, entry: &Arc<ConnectionEntry<O>>, peer: SocketAddr) {
        let mut open = lock!(self.open);
        open.renamed.insert(entry.number(), peer);
        entry.flags.set(RENAMED);
    }

    pub(crate) fn peer(&self, entry: &ConnectionEntry<O>) -> Option<SocketAddr> {
        if entry.flags.has(RENAMED) {
            return lock!(self.open).renamed.get(&entry.number()).copied();
        }
        entry.peer
    }

    /// Inserts a connection. The caller removes it with [`remove`](Self::remove).
    pub(crate) fn insert(&self, owner: O, peer: Option<SocketAddr>) -> Arc<ConnectionEntry<O>> {
        let now = Instant::now();
        let mut open = lock!(self.open);
        // A client that connects while others are asked to leave has a request to send, and is
        // asked with the response to it.
        let directive = if open.is_cut {
            Directive::Cut
        } else if open.directive >= Directive::Read {
            open.directive
        } else {
            open.directive.min(Directive::Stopping)
        };
        let opened = now.saturating_duration_since(*open.first.get_or_insert(now));
        let opened = u64::try_from(opened.as_nanos()).unwrap_or(u64::MAX);
        // Saturating, because clocks of paused runtimes differ.
        let since = opened.saturating_sub(open.watched);
        let watched = open.entered < ALL_WATCHED || since >= WATCH_EVERY;
        if watched {
            open.watched = opened;
        }
        let index = u32::try_from(open.connections.len()).expect("files are counted in 32 bits");
        let entry = Arc::new(ConnectionEntry {
            owner,
            peer,
            opened,
            index: AtomicU32::new(index),
            place: Place::nth(open.entered),
            sniffer: Sniffer::default(),
            flags: Flags::new(ACTIVE | INSPECTED | if watched { WATCHED } else { 0 }),
            guards: AtomicU8::new(1),
            undelivered: AtomicU32::new(0),
            state: ConnectionState::new(directive),
        });
        open.connections.push(Arc::clone(&entry));
        open.entered += 1;
        entry
    }

    /// Removes a connection. Returns true if the service may be waiting for it: it was the last
    /// one, and connections are being closed, or no other can come while they are asked to leave.
    /// The phase is read after the removal: point 1 of the module header.
    pub(crate) fn remove(&self, entry: &ConnectionEntry<O>, phase: impl FnOnce() -> Phase) -> bool {
        let mut open = lock!(self.open);
        let index = entry.index.load(Ordering::Relaxed);
        let entry = open.connections.swap_remove(index as usize);
        if entry.flags.has(RENAMED) {
            open.renamed.remove(&entry.number());
        }
        if let Some(moved) = open.connections.get(index as usize) {
            moved.index.store(index, Ordering::Relaxed);
        }
        let left = open.connections.len();
        let listeners = open.listeners.open;
        drop(open);
        drop(entry);
        left == 0
            && match phase() {
                Phase::LameDuck => listeners == 0,
                phase => phase == Phase::Closing,
            }
    }

    /// Lists the connections that are open at the cut, oldest first. The other values of each are final
    /// only after it has been closed. A connection that is inserted later is cut from its beginning.
    pub(crate) fn cut(&self, now: Instant) -> Vec<OpenAtCut<O>> {
        let mut list: Vec<_> = {
            let mut open = lock!(self.open);
            open.is_cut = true;
            let first = now.saturating_duration_since(open.first.unwrap_or(now));
            let connections = open.connections.iter().cloned();
            let left = connections.map(|entry| OpenAtCut {
                age: first.saturating_sub(Duration::from_nanos(entry.opened)),
                peer: open.renamed.get(&entry.number()).copied().or(entry.peer),
                #[cfg(all(feature = "axum", feature = "signal"))]
                unsent: entry.state.unsent(),
                #[cfg(not(all(feature = "axum", feature = "signal")))]
                unsent: 0,
                entry,
            });
            left.collect()
        };
        list.sort_by_key(|left| Reverse(left.age));
        list
    }

    /// Whether all connections that were open have been asked to leave.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn asks_all(&self) -> bool {
        lock!(self.open).directive >= Directive::Leave
    }

    /// The open connections that were already open at this instant.
    #[cfg(feature = "axum")]
    pub(crate) fn opened_before(&self, instant: Instant) -> Vec<Arc<ConnectionEntry<O>>> {
        let open = lock!(self.open);
        let first = open.first.unwrap_or(instant);
        let connections = open.connections.iter();
        let before = |entry: &&Arc<ConnectionEntry<O>>| {
            first + Duration::from_nanos(entry.opened) <= instant
        };
        connections.filter(before).cloned().collect()
    }

    /// Instructs every open connection. A connection that is inserted later gets the directive too
    /// if it is `Read` or later, and `Stopping` otherwise; after the [cut](Self::cut), it is cut. If `expiries`,
    /// the number of times that [`Expire`](Directive::Expire) was given, has grown, every connection reads that
    /// directive again.
    pub(crate) fn instruct(&self, directive: Directive, expiries: u32) {
        let mut open = lock!(self.open);
        let mut former = Vec::new();
        if (open.directive, open.expiries) < (directive, expiries) {
            (open.directive, open.expiries) = (directive, expiries);
            let all = open.connections.clone();
            former = mem::replace(&mut open.uninstructed, all);
        }
        drop(open);
        // May drop the last reference to values of the user, so the lock is released before.
        drop(former);
        // One after another, so that the next call continues with the rest if a waker blocks.
        loop {
            let (entry, directive, expiries) = {
                let mut open = lock!(self.open);
                let Some(entry) = open.uninstructed.pop() else {
                    open.uninstructed = Vec::new();
                    return;
                };
                (entry, open.directive, open.expiries)
            };
            entry.state.instruct(directive);
            if expiries > 1 {
                entry.state.wake_all();
            }
        }
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::sync::Weak;

    use loom::{model, thread};

    use super::*;
    use crate::{
        admission::Gate,
        sync::{AtomicBool, Ordering::Relaxed},
    };

    #[test]
    fn the_end_of_the_last_connection_is_seen_or_wakes_the_driver() {
        model(|| {
            let gate = Gate::<(), ()>::new(None, false, (), &Weak::new());
            let (gate, table) = (Arc::new(gate), Arc::new(ConnectionTable::default()));
            let woken = Arc::new(AtomicBool::new(false));
            let connections = [(); 2].map(|()| table.insert((), None));
            let ends = connections.map(|entry| {
                let (gate, table, woken) = (gate.clone(), table.clone(), woken.clone());
                thread::spawn(move || {
                    if table.remove(&entry, || gate.phase()) {
                        woken.store(true, Relaxed);
                    }
                })
            });
            gate.advance(Phase::Closing);
            let seen = table.len() == 0;
            for end in ends {
                end.join().unwrap();
            }
            assert!(
                seen || woken.load(Relaxed),
                "the service waits until the deadline"
            );
            assert_eq!(table.len(), 0);
        });
    }

    #[test]
    fn a_connection_that_comes_while_others_are_instructed_is_instructed_too() {
        model(|| {
            let table = Arc::new(ConnectionTable::default());
            let first = table.insert((), None);
            let inserting = {
                let table = Arc::clone(&table);
                thread::spawn(move || table.insert((), None))
            };
            table.instruct(Directive::Close, 0);
            let second = inserting.join().unwrap();
            for entry in [first, second] {
                assert_eq!(entry.state.directive(), Directive::Close);
            }
        });
    }

    #[test]
    fn a_connection_that_comes_at_the_cut_is_listed_or_cut_from_its_beginning() {
        model(|| {
            let table = Arc::new(ConnectionTable::default());
            let inserting = {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    let entry = table.insert((), None);
                    let is_cut = entry.state.directive() == Directive::Cut;
                    (entry, is_cut)
                })
            };
            let cut = table.cut(Instant::now());
            table.instruct(Directive::Cut, 0);
            let (entry, is_cut) = inserting.join().unwrap();
            let is_listed = cut.iter().any(|open| Arc::ptr_eq(&open.entry, &entry));
            assert!(is_listed || is_cut, "neither listed nor counted");
        });
    }
}

#[cfg(all(test, target_pointer_width = "64", not(tower_graceful_loom)))]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering::Relaxed},
        task::{Context, Wake},
        thread,
    };

    use tokio::time::advance;

    use super::*;
    use crate::{
        background::wakers,
        connection::{
            flags::RESPONDED,
            wakers::{RegisteredWaker, WakerSlot},
        },
    };

    /// With the counts of its `Arc`, an entry fills an allocation of 128 bytes.
    #[test]
    fn an_entry_is_small() {
        assert!(
            size_of::<ConnectionEntry<Arc<()>>>() <= 112,
            "{}",
            size_of::<ConnectionEntry<Arc<()>>>()
        );
    }

    /// Its task has panicked, for example.
    #[test]
    fn a_connection_that_its_server_has_dropped_is_not_waited_for_when_connections_close() {
        let table = ConnectionTable::<()>::default();
        let entry = table.insert((), None);
        entry.sniffer.listen();
        assert!(table.has_close_unnoticed());
        entry.flags.set(LINGERS);
        assert!(!table.has_close_unnoticed());
    }

    #[cfg(feature = "axum")]
    #[test]
    fn a_listener_may_accept_a_connection() {
        let table = ConnectionTable::<()>::default();
        assert!(!table.has_any());
        table.listener_opened(false);
        assert!(table.has_any());
        table.listener_closed();
        let _entry = table.insert((), None);
        assert!(table.has_any());
    }

    #[cfg(feature = "axum")]
    #[test]
    fn a_call_that_may_be_dropped_is_found_by_its_peer_or_by_the_name_of_its_peer() {
        let [peer, proxy, renamed] =
            ["192.0.2.1:1", "192.0.2.2:2", "192.0.2.3:3"].map(|it| it.parse().unwrap());
        for (called, marked) in [
            (peer, [false, true]),
            (renamed, [true, false]),
            ("192.0.2.4:4".parse().unwrap(), [false, false]),
        ] {
            let table = ConnectionTable::<()>::default();
            let entries = [proxy, peer].map(|peer| table.insert((), Some(peer)));
            table.rename(&entries[0], renamed);
            table.mark_may_drop(called);
            assert_eq!(entries.map(|entry| entry.flags.has(MAY_DROP)), marked);
        }
    }

    #[test]
    fn what_is_lost_is_counted() {
        let table = ConnectionTable::<()>::default();
        for count in 1..=2 {
            table.half_closed();
            let entry = table.insert((), None);
            entry.flags.set(RESPONDED);
            table.torn(&entry);
            let lost = table.lost_so_far();
            assert_eq!(
                (lost.half_closed, lost.torn, lost.torn_requests),
                (count, count, count)
            );
        }
    }

    #[test]
    fn a_connection_that_waits_for_no_request_is_not_idle() {
        let table = ConnectionTable::<()>::default();
        let entry = table.insert((), None);
        assert!(table.may_be_idle(0) && !table.may_be_idle(1));
        for flag in [MAY_DROP, UPGRADED, LINGERS] {
            entry.flags.set(flag);
            assert!(!table.may_be_idle(0), "{flag}");
            entry.flags.take(flag);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn eight_connections_are_watched_and_then_one_every_20_ms() {
        const MS: Duration = Duration::from_millis(1);
        let table = ConnectionTable::<()>::default();
        let is_watched = || table.insert((), None).flags.has(WATCHED);
        assert!((0..8).all(|_| is_watched()));
        for _ in 0..2 {
            assert!(!is_watched());
            advance(19 * MS).await;
            assert!(!is_watched());
            advance(MS).await;
            assert!(is_watched());
        }
    }

    #[test]
    fn the_service_may_wait_for_the_last_connection_where_no_other_can_come() {
        for (phase, listeners, waits) in [
            (Phase::Serving, 0, false),
            (Phase::LameDuck, 0, true),
            (Phase::LameDuck, 1, false),
            (Phase::Draining, 0, false),
            (Phase::Closing, 1, true),
        ] {
            let table = ConnectionTable::<()>::default();
            lock!(table.open).listeners.open = listeners;
            let [first, last] = [(); 2].map(|()| table.insert((), None));
            assert!(!table.remove(&first, || phase), "{phase} {listeners}");
            assert_eq!(table.remove(&last, || phase), waits, "{phase} {listeners}");
        }
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    #[test]
    fn all_connections_are_asked_to_leave_from_leave_on() {
        let table = ConnectionTable::<()>::default();
        table.instruct(Directive::LeaveInSlot, 0);
        assert!(!table.asks_all());
        table.instruct(Directive::Leave, 0);
        assert!(table.asks_all());
        table.instruct(Directive::Close, 0);
        assert!(table.asks_all());
    }

    #[cfg(feature = "axum")]
    #[tokio::test(start_paused = true)]
    async fn connections_are_found_by_the_time_at_which_they_were_opened() {
        let table = ConnectionTable::<()>::default();
        let begun = Instant::now();
        let later = Duration::from_millis(10);
        table.insert((), None);
        advance(later).await;
        table.insert((), None);
        assert_eq!(table.opened_before(begun).len(), 1);
        assert_eq!(table.opened_before(begun + later).len(), 2);
    }

    /// The connections are listed some time before they are instructed.
    #[test]
    fn a_connection_that_is_torn_at_the_cut_counts_once() {
        for lingers in [false, true] {
            for (listed, torn) in [(true, 0), (false, 1)] {
                let table = ConnectionTable::<()>::default();
                let entry = table.insert((), None);
                entry.flags.put(LINGERS, lingers);
                entry.undelivered.store(1, Ordering::Relaxed);
                let now = Instant::now();
                let before = listed.then(|| table.cut(now));
                table.torn(&entry);
                assert_eq!(table.lost_so_far().torn, torn, "{lingers} {listed}");
                let list = before.unwrap_or_else(|| table.cut(now));
                let counts = !list[0].lingered() || list[0].undelivered() > 0;
                assert_eq!(counts, listed, "{lingers} {listed}");
            }
        }
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    /// Whichever order is used, a connection comes after the one whose waker blocks.
    #[test]
    fn a_waker_that_blocks_keeps_no_other_connection_from_its_directive() {
        for (before, directive, expiries) in [
            (None, Directive::Cut, 0),
            (Some((Directive::Expire, 1)), Directive::Expire, 2),
        ] {
            let table = ConnectionTable::<()>::default();
            let entries = [(); 3].map(|()| table.insert((), None));
            if let Some((directive, expiries)) = before {
                table.instruct(directive, expiries);
            }
            let (blocks, is_woken, release) = wakers::blocking();
            let others = Arc::new(Woken::default());
            let woken = [
                Arc::clone(&others).into(),
                blocks,
                Arc::clone(&others).into(),
            ];
            for (entry, waker) in entries.iter().zip(&woken) {
                let cx = Context::from_waker(waker);
                let mut registered = RegisteredWaker::default();
                entry.state.enter(&mut registered, WakerSlot::Read, &cx);
            }
            thread::scope(|scope| {
                scope.spawn(|| table.instruct(directive, expiries));
                is_woken.recv().unwrap();
                // As another thread does, which publishes the same directive again.
                table.instruct(directive, expiries);
                assert_eq!(others.0.load(Relaxed), 2, "{directive:?}");
                for entry in &entries {
                    assert_eq!(entry.state.directive(), directive);
                }
                drop(release);
            });
        }
    }
}
