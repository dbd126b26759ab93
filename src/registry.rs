//! The connections that are open, and the cut that ends them.
//!
//! A connection has a [`Line`]: a flag and the wakers of whoever waits for it to become readable
//! and writable. The cut raises every flag and then wakes both, so that the next poll, which fails,
//! comes at once. A waker is stored under the lock that raises the flag, before the connection is
//! polled: either the cut finds the waker, or the poll finds the flag.
//!
//! Each connection has wakers of its own. One notification shared by all of them would make ten
//! thousand tasks queue for one lock at the moment of the cut.

use std::{
    fmt, io,
    sync::{Arc, Mutex},
    task::{Context, Waker},
};

use slab::Slab;
use tokio::time::Instant;

use crate::sync::lock;

#[derive(Default)]
pub(crate) struct Registry {
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    lines: Slab<Arc<Line>>,
    listeners: Listeners,
    last_heard: Option<Instant>,
    /// The cut has come: whoever connects now is cut from the start.
    cut: bool,
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

    /// Enters a connection. The key is for [`remove`](Self::remove).
    pub(crate) fn insert(&self) -> (usize, Arc<Line>) {
        let mut open = lock!(self.open);
        let line = Arc::new(Line::new(open.cut));
        let key = open.lines.insert(Arc::clone(&line));
        open.last_heard = Some(Instant::now());
        (key, line)
    }

    /// Strikes out a connection. Says how many are left.
    pub(crate) fn remove(&self, key: usize) -> usize {
        let mut open = lock!(self.open);
        let line = open.lines.try_remove(key);
        let left = open.lines.len();
        drop(open);
        drop(line);
        left
    }

    /// Fails the reads and writes of every connection, present and future.
    pub(crate) fn cut(&self) {
        let lines: Vec<_> = {
            let mut open = lock!(self.open);
            open.cut = true;
            open.lines
                .iter()
                .map(|(_, line)| Arc::clone(line))
                .collect()
        };
        for line in lines {
            line.cut();
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

/// One connection's flag and wakers.
#[derive(Debug)]
pub(crate) struct Line {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    cut: bool,
    /// For reading and for writing: the two halves may live in two tasks.
    wakers: [Option<Waker>; 2],
}

/// The half of a connection that is polled.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Half {
    Read,
    Write,
}

impl Line {
    fn new(cut: bool) -> Self {
        Self {
            state: Mutex::new(State {
                cut,
                wakers: [None, None],
            }),
        }
    }

    /// To be called before a half is polled: fails once the connection is cut, and otherwise sees
    /// to it that the cut wakes the task that polls.
    pub(crate) fn enter(&self, half: Half, cx: &Context<'_>) -> io::Result<()> {
        let mut state = lock!(self.state);
        if state.cut {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the connection was cut, because the time to shut down is over",
            ));
        }
        match &mut state.wakers[half as usize] {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        Ok(())
    }

    pub(crate) fn is_cut(&self) -> bool {
        lock!(self.state).cut
    }

    fn cut(&self) {
        let wakers = {
            let mut state = lock!(self.state);
            state.cut = true;
            std::mem::take(&mut state.wakers)
        };
        for waker in wakers.into_iter().flatten() {
            waker.wake();
        }
    }
}
