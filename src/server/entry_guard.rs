//! The guards that keep a connection in the table until its last layer is closed.

use std::sync::Arc;

use super::ConnectionEntry;
use crate::{
    connection::{directive::Directive, flags::MAY_DROP},
    phase::Phase,
    sync::Ordering,
};

/// Keeps a connection in the table. Each layer of the connection has a guard, and so has the task that
/// closes it. Dropping the last guard removes the connection entry.
pub(super) struct EntryGuard {
    pub(super) entry: Arc<ConnectionEntry>,
}

impl EntryGuard {
    /// Makes another guard for the same entry.
    pub(super) fn share(entry: &Arc<ConnectionEntry>) -> Self {
        entry.entries.fetch_add(1, Ordering::Relaxed);
        Self {
            entry: Arc::clone(entry),
        }
    }

    /// A guard for the task that closes the connection.
    pub(super) fn hand_over(&self) -> Self {
        Self::share(&self.entry)
    }

    /// Counts a connection that is dropped without a response after the peer has closed its writing side,
    /// because the peer may still wait for that response. Counts only while the service stops, and not
    /// after the cut: cut connections are reported as such.
    #[cold]
    pub(super) fn half_closed(&self) {
        let shared = &self.entry.owner;
        if shared.phase() > Phase::Serving
            && self.entry.state.directive() < Directive::Cut
            && !self.entry.flags.has(MAY_DROP)
        {
            shared.connections.half_closed();
        }
    }
}

impl Drop for EntryGuard {
    fn drop(&mut self) {
        if self.entry.entries.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let shared = &self.entry.owner;
        let connections = &shared.connections;
        if connections.remove(&self.entry, || shared.phase()) {
            shared.notify();
        }
    }
}
