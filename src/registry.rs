//! The connections that are open, and what they are told: to leave, to close, and in the end that
//! they are cut.
//!
//! A connection has a [`Line`]: what it has been told, and the wakers of whoever waits for it to
//! become readable or writable, and of whoever owns it. The cut tells every connection and then
//! wakes all of them, so that the next poll, which fails, comes at once. A waker is stored under the
//! lock under which the connection is told, before the connection is polled: either the cut finds
//! the waker, or the poll finds the cut.
//!
//! Each connection has wakers of its own. One notification shared by all of them would make ten
//! thousand tasks queue for one lock at the moment of the cut.

use std::{
    cmp::Reverse,
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    task::{Context, Waker},
};

use slab::Slab;
use tokio::time::Instant;

#[cfg(all(feature = "axum", feature = "signal"))]
use crate::heard::Heard;
use crate::{report::CutConnection, spread::Place, sync::lock};

#[derive(Default)]
pub(crate) struct Registry {
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    lines: Slab<Arc<Line>>,
    listeners: Listeners,
    last_heard: Option<Instant>,
    /// Connections so far.
    entered: u64,
    /// What everybody has been told.
    told: Told,
}

/// What a connection is told. It only ever moves forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Told {
    /// To go on.
    #[default]
    Stay,
    /// To leave when its turn in the spread has come.
    TakeTurns,
    /// To leave, if the peer can be told so without losing a request: by the GOAWAY of HTTP/2.
    Leave,
    /// To close when the last response is out, and at once where there is none to wait for.
    Close,
    /// To close now.
    Cut,
}

/// Listeners that accept.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Listeners {
    /// Those that are open now.
    pub(crate) open: usize,
    /// There has been one.
    pub(crate) any: bool,
}

impl Registry {
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

    /// Whether there is a connection that nobody has tried to read yet.
    pub(crate) fn has_unread(&self) -> bool {
        let open = lock!(self.open);
        open.lines.iter().any(|(_, line)| line.is_unread())
    }

    /// Enters a connection, until [`remove`](Self::remove).
    pub(crate) fn insert(&self, peer: Option<SocketAddr>) -> Arc<Line> {
        let opened = Instant::now();
        let mut open = lock!(self.open);
        // Who connects while others are asked to leave has a request, and is asked with its answer.
        let told = if open.told >= Told::Close {
            open.told
        } else {
            Told::Stay
        };
        let place = Place::nth(open.entered);
        let entry = open.lines.vacant_entry();
        let line = Arc::new(Line {
            key: entry.key(),
            peer,
            opened,
            place,
            state: Mutex::new(State {
                told,
                wrote: false,
                #[cfg(all(feature = "axum", feature = "signal"))]
                heard: Heard::default(),
                #[cfg(all(feature = "axum", feature = "signal"))]
                streams: 0,
                wakers: [None, None, None],
            }),
        });
        entry.insert(Arc::clone(&line));
        open.entered += 1;
        open.last_heard = Some(opened);
        line
    }

    /// Strikes out a connection. Says how many are left.
    pub(crate) fn remove(&self, line: &Line) -> usize {
        let mut open = lock!(self.open);
        let line = open.lines.try_remove(line.key);
        let left = open.lines.len();
        drop(open);
        drop(line);
        left
    }

    /// The connections that are open, for the report: the oldest first.
    pub(crate) fn list(&self, now: Instant) -> Vec<CutConnection> {
        let mut list: Vec<_> = {
            let open = lock!(self.open);
            let lines = open.lines.iter();
            lines.map(|(_, line)| line.describe(now)).collect()
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
        let lines: Vec<_> = {
            let mut open = lock!(self.open);
            if open.told >= told {
                return;
            }
            open.told = told;
            let lines = open.lines.iter();
            lines.map(|(_, line)| Arc::clone(line)).collect()
        };
        for line in lines {
            line.tell(told);
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("open", &self.len())
            .finish_non_exhaustive()
    }
}

/// One connection: what it has been told, who is to be woken, and what is known of it. All in one
/// place, because there may be very many.
#[derive(Debug)]
pub(crate) struct Line {
    key: usize,
    peer: Option<SocketAddr>,
    pub(crate) opened: Instant,
    #[cfg_attr(not(all(feature = "axum", feature = "signal")), expect(dead_code))]
    pub(crate) place: Place,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    told: Told,
    /// Something has been written, or tried to be.
    wrote: bool,
    /// Noted for who asks: see [`Line::note`].
    #[cfg(all(feature = "axum", feature = "signal"))]
    heard: Heard,
    /// Tasks that run beside the connection's own.
    #[cfg(all(feature = "axum", feature = "signal"))]
    streams: u32,
    /// One for each [`Waiter`].
    wakers: [Option<Waker>; 3],
}

impl State {
    fn remember(&mut self, waiter: Waiter, cx: &Context<'_>) {
        match &mut self.wakers[waiter as usize] {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
    }
}

/// Who waits: for reading and for writing, which may happen in two tasks, and for being told.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Waiter {
    Read,
    Write,
    #[cfg_attr(not(all(feature = "axum", feature = "signal")), expect(dead_code))]
    Owner,
}

impl Line {
    /// To be called before the connection is polled: fails once it is cut, and otherwise sees to
    /// it that the cut wakes the task that polls.
    pub(crate) fn enter(&self, waiter: Waiter, cx: &Context<'_>) -> io::Result<()> {
        let mut state = lock!(self.state);
        if state.told == Told::Cut {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the connection was cut, because the time to shut down is over",
            ));
        }
        state.wrote |= matches!(waiter, Waiter::Write);
        state.remember(waiter, cx);
        Ok(())
    }

    /// Notes what was read.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn note(&self, read: &[u8]) {
        lock!(self.state).heard.note(read);
    }

    /// Asks of what was noted.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn heard<T>(&self, ask: impl FnOnce(&mut Heard) -> T) -> T {
        ask(&mut lock!(self.state).heard)
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn stream_began(&self) {
        lock!(self.state).streams += 1;
    }

    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn stream_ended(&self) {
        let owner = {
            let mut state = lock!(self.state);
            state.streams -= 1;
            if state.streams > 0 {
                return;
            }
            state.wakers[Waiter::Owner as usize].take()
        };
        if let Some(owner) = owner {
            owner.wake();
        }
    }

    /// Ready when no task runs beside. When the last one ends, the task is woken.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn poll_streams_ended(&self, cx: &Context<'_>) -> std::task::Poll<()> {
        let mut state = lock!(self.state);
        if state.streams == 0 {
            return std::task::Poll::Ready(());
        }
        state.remember(Waiter::Owner, cx);
        std::task::Poll::Pending
    }

    /// What the connection has been told. When it is told more, the task is woken.
    #[cfg(all(feature = "axum", feature = "signal"))]
    pub(crate) fn told(&self, cx: &Context<'_>) -> Told {
        let mut state = lock!(self.state);
        state.remember(Waiter::Owner, cx);
        state.told
    }

    fn describe(&self, now: Instant) -> CutConnection {
        CutConnection {
            peer: self.peer,
            age: now.saturating_duration_since(self.opened),
        }
    }

    fn is_unread(&self) -> bool {
        let state = lock!(self.state);
        state.told < Told::Cut && state.wakers[Waiter::Read as usize].is_none()
    }

    /// It was cut when something had been written, or tried to be.
    pub(crate) fn is_cut_short(&self) -> bool {
        let state = lock!(self.state);
        state.told == Told::Cut && state.wrote
    }

    pub(crate) fn is_cut(&self) -> bool {
        lock!(self.state).told == Told::Cut
    }

    /// Tells this connection. Less than it has been told already changes nothing.
    pub(crate) fn tell(&self, told: Told) {
        let wakers = {
            let mut state = lock!(self.state);
            if state.told >= told {
                return;
            }
            state.told = told;
            let [_, _, owner] = &mut state.wakers;
            if told == Told::Cut {
                std::mem::take(&mut state.wakers)
            } else {
                [None, None, owner.take()]
            }
        };
        for waker in wakers.into_iter().flatten() {
            waker.wake();
        }
    }
}
