//! The layers of a connection: the accepted IO, what a handshake makes of it, and the server on top.

use std::sync::Arc;

use super::GracefulIo;
use crate::{
    connection::flags::{BODY, INSPECTED},
    server::{ConnectionEntry, entry_guard::EntryGuard, requests},
};

impl<I: 'static> GracefulIo<I> {
    /// Wraps the IO that a handshake has returned, as the next layer of the connection.
    pub(in crate::server) fn above(io: I, entry: &Arc<ConnectionEntry>) -> Self {
        requests::end(entry);
        // The drop of the top layer says whether the last request may have a body.
        entry.flags.set(INSPECTED | BODY);
        entry.state.set_blocked(false);
        let layer = entry.sniffer.begin_layer();
        Self::with_entry(io, None, layer, EntryGuard::share(entry))
    }

    /// The connection entry.
    pub(in crate::server) fn entry(&self) -> &Arc<ConnectionEntry> {
        &self.guard.entry
    }

    /// Passes the connection to `serve`: from now on the sniffer records every read.
    #[cfg(feature = "signal")]
    pub(in crate::server) fn begin_serving(&mut self) -> Arc<ConnectionEntry> {
        self.activity.mark_owned();
        self.guard.entry.flags.take(INSPECTED);
        self.guard.entry.sniffer.listen();
        Arc::clone(&self.guard.entry)
    }
}
