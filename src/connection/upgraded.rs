//! The upgraded connections, with the paths of the requests that asked for the upgrade.
//!
//! They are kept here and not in each connection's entry, because there may be very many
//! connections and few are upgraded. A connection is added when it asks for the upgrade, and
//! removed when its IO is dropped: after that the handler no longer uses it, even if the socket
//! still waits for the peer to close.

use std::{cmp::Reverse, collections::HashMap, net::SocketAddr, sync::Mutex};

use tokio::time::Instant;

use crate::{report::UpgradedConnection, sync::lock};

#[derive(Default)]
pub(crate) struct Upgraded(Mutex<HashMap<usize, Entry>>);

struct Entry {
    path: Option<Box<str>>,
    peer: Option<SocketAddr>,
    asked: Instant,
    upgraded: bool,
}

impl Upgraded {
    /// Records that a request asks for an upgrade. `connection` is a number that no other open
    /// connection has.
    #[cold]
    pub(crate) fn asked(&self, connection: usize, path: &str, peer: Option<SocketAddr>) {
        let entry = Entry {
            path: Some(path.into()),
            peer,
            asked: Instant::now(),
            upgraded: false,
        };
        lock!(self.0).insert(connection, entry);
    }

    /// Records that the upgrade was granted.
    #[cold]
    pub(crate) fn began(&self, connection: usize, peer: Option<SocketAddr>) {
        let mut connections = lock!(self.0);
        let entry = connections.entry(connection).or_insert_with(|| Entry {
            path: None,
            peer,
            asked: Instant::now(),
            upgraded: true,
        });
        entry.upgraded = true;
    }

    #[cold]
    pub(crate) fn ended(&self, connection: usize) {
        let ended = lock!(self.0).remove(&connection);
        drop(ended);
    }

    /// The open upgraded connections, oldest first.
    pub(crate) fn list(&self, now: Instant) -> Vec<UpgradedConnection> {
        let mut list: Vec<_> = {
            let connections = lock!(self.0);
            let upgraded = connections.values().filter(|entry| entry.upgraded);
            let list = upgraded.map(|entry| UpgradedConnection {
                path: entry.path.as_deref().map(str::to_owned),
                peer: entry.peer,
                age: now.saturating_duration_since(entry.asked),
            });
            list.collect()
        };
        list.sort_by_key(|connection| Reverse(connection.age));
        list
    }

    #[cfg(all(test, feature = "axum", feature = "signal", not(tower_graceful_loom)))]
    pub(crate) fn len(&self) -> usize {
        lock!(self.0).len()
    }

    pub(crate) fn any(&self) -> bool {
        lock!(self.0).values().any(|entry| entry.upgraded)
    }
}
