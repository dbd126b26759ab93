//! The connections that are open, and the telling of them: to leave, to close, and in the end that
//! they are cut.
//!
//! A connection has a [`Line`]: what is known of it, and its [`Notice`]. The cut tells every
//! connection and wakes whoever waits for it, so that the next poll, which fails, comes at once.
//!
//! Each connection has wakers of its own. One notification shared by all of them would make ten
//! thousand tasks queue for one lock at the moment of the cut.

use std::{
    cmp::Reverse,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    heard::Heard,
    notice::{Notice, Told},
    report::CutConnection,
    spread::Place,
    sync::{AtomicU32, Ordering, lock},
};

/// Each connection keeps its owner `O` alive.
pub(crate) struct Registry<O> {
    open: Mutex<Open<O>>,
}

struct Open<O> {
    /// Each knows its seat, which changes when another one leaves.
    lines: Vec<Arc<Line<O>>>,
    listeners: Listeners,
    /// When the first connection was opened.
    first: Option<Instant>,
    last_heard: Option<Instant>,
    /// Connections so far.
    entered: u64,
    /// Requests that were dropped because their clients had closed their writing side.
    half_closed: usize,
    /// What everybody has been told.
    told: Told,
}

/// Listeners that accept.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Listeners {
    /// Those that are open now.
    pub(crate) open: usize,
    /// There has been one.
    pub(crate) any: bool,
}

impl<O> Default for Registry<O> {
    fn default() -> Self {
        Self {
            open: Mutex::new(Open {
                lines: Vec::new(),
                listeners: Listeners::default(),
                first: None,
                last_heard: None,
                entered: 0,
                half_closed: 0,
                told: Told::default(),
            }),
        }
    }
}

impl<O> Registry<O> {
    pub(crate) fn listeners(&self) -> Listeners {
        lock!(self.open).listeners
    }

    #[cfg(feature = "axum")]
    pub(crate) fn listener_opened(&self) {
        let mut open = lock!(self.open);
        open.listeners.open += 1;
        open.listeners.any = true;
    }

    #[cfg(feature = "axum")]
    pub(crate) fn listener_closed(&self) {
        lock!(self.open).listeners.open -= 1;
    }

    /// When a connection was last entered, or since the stop was asked for, read from.
    pub(crate) fn last_heard(&self) -> Option<Instant> {
        lock!(self.open).last_heard
    }

    pub(crate) fn heard(&self) {
        lock!(self.open).last_heard = Some(Instant::now());
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
        open.lines.iter().any(|line| line.notice.is_unread())
    }

    /// Enters a connection, until [`remove`](Self::remove).
    pub(crate) fn insert(&self, owner: O, peer: Option<SocketAddr>) -> Arc<Line<O>> {
        let now = Instant::now();
        let mut open = lock!(self.open);
        // Who connects while others are asked to leave has a request, and is asked with its answer.
        let told = if open.told >= Told::Close {
            open.told
        } else {
            Told::Stay
        };
        let opened = now.saturating_duration_since(*open.first.get_or_insert(now));
        let seat = u32::try_from(open.lines.len()).expect("files are counted in 32 bits");
        let line = Arc::new(Line {
            owner,
            peer,
            opened: u64::try_from(opened.as_nanos()).unwrap_or(u64::MAX),
            seat: AtomicU32::new(seat),
            place: Place::nth(open.entered),
            heard: Heard::default(),
            notice: Notice::new(told),
        });
        open.lines.push(Arc::clone(&line));
        open.entered += 1;
        open.last_heard = Some(now);
        line
    }

    /// Strikes out a connection. Says how many are left.
    pub(crate) fn remove(&self, line: &Line<O>) -> usize {
        let mut open = lock!(self.open);
        let seat = line.seat.load(Ordering::Relaxed);
        let line = open.lines.swap_remove(seat as usize);
        if let Some(moved) = open.lines.get(seat as usize) {
            moved.seat.store(seat, Ordering::Relaxed);
        }
        let left = open.lines.len();
        drop(open);
        drop(line);
        left
    }

    /// The connections that are open, for the report: the oldest first.
    pub(crate) fn list(&self, now: Instant) -> Vec<CutConnection> {
        let mut list: Vec<_> = {
            let open = lock!(self.open);
            let first = open.first.unwrap_or(now);
            let lines = open.lines.iter();
            lines.map(|line| line.describe(first, now)).collect()
        };
        list.sort_by_key(|connection| Reverse(connection.age));
        list
    }

    /// Whether everybody who was there has been told to leave.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn asks_everybody(&self) -> bool {
        lock!(self.open).told >= Told::Leave
    }

    /// Tells every connection: those that are open, and if it is to close, those that come.
    pub(crate) fn tell(&self, told: Told) {
        let lines = {
            let mut open = lock!(self.open);
            if open.told >= told {
                return;
            }
            open.told = told;
            open.lines.clone()
        };
        for line in lines {
            line.notice.tell(told);
        }
    }
}

impl<O> fmt::Debug for Registry<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("open", &self.len())
            .finish_non_exhaustive()
    }
}

/// One connection: what it is told, and what is known of it. All in one place, and small, because
/// there may be very many.
pub(crate) struct Line<O> {
    pub(crate) owner: O,
    peer: Option<SocketAddr>,
    /// Nanoseconds after the first one.
    opened: u64,
    /// Where it is in the table. Changes under the table's lock.
    seat: AtomicU32,
    #[cfg_attr(not(all(feature = "axum", feature = "signal")), expect(dead_code))]
    pub(crate) place: Place,
    pub(crate) heard: Heard,
    pub(crate) notice: Notice,
}

impl<O> Line<O> {
    fn describe(&self, first: Instant, now: Instant) -> CutConnection {
        let age = now.saturating_duration_since(first);
        CutConnection {
            peer: self.peer,
            age: age.saturating_sub(Duration::from_nanos(self.opened)),
        }
    }
}

#[cfg(all(test, target_pointer_width = "64", not(tower_graceful_loom)))]
mod tests {
    use super::*;

    /// With the counts of its `Arc` it fills what an allocator has for 120 bytes.
    #[test]
    fn a_line_is_small() {
        assert!(
            size_of::<Line<Arc<()>>>() <= 104,
            "{}",
            size_of::<Line<Arc<()>>>()
        );
    }
}
