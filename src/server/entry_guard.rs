//! The guards that keep a connection in the table until its last layer is closed.

use std::sync::Arc;

use super::ConnectionEntry;
use crate::sync::Ordering;

/// Keeps a connection in the table. Each layer of the connection has a guard, and so has the task that
/// closes it. Dropping the last guard removes the connection entry.
pub(super) struct EntryGuard {
    pub(super) entry: Arc<ConnectionEntry>,
}

impl EntryGuard {
    /// Makes another guard for the same entry.
    pub(super) fn share(entry: &Arc<ConnectionEntry>) -> Self {
        entry.guards.fetch_add(1, Ordering::Relaxed);
        Self {
            entry: Arc::clone(entry),
        }
    }
}

impl Drop for EntryGuard {
    fn drop(&mut self) {
        if self.entry.guards.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let shared = &self.entry.owner;
        let connections = &shared.connections;
        if connections.remove(&self.entry, || shared.phase()) {
            shared.notify();
        }
    }
}
