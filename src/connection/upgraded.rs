//! The upgraded connections, with the paths of the requests that asked for the upgrade.
//!
//! They are kept here and not in each connection's entry, because there may be very many
//! connections and few are upgraded. A connection is added when it asks for the upgrade, and
//! removed when its IO is dropped: after that the handler no longer uses it, even if the socket
//! still waits for the peer to close.
//!
//! Over HTTP/2 a connection has one entry for each of its tunnels. A tunnel is added when its request
//! asks for it, and removed when its stream ends. Only `serve` knows tunnels.

#[cfg(all(feature = "axum", feature = "signal"))]
use std::collections::hash_map;
use std::{cmp::Reverse, collections::HashMap, net::SocketAddr, sync::Mutex};

use tokio::time::Instant;

use crate::{report::UpgradedConnection, sync::lock};

#[derive(Default)]
pub(crate) struct Upgraded(Mutex<Upgrades>);

#[derive(Default)]
struct Upgrades {
    entries: HashMap<Upgrade, Entry>,
    /// The number of the last tunnel.
    #[cfg(all(feature = "axum", feature = "signal"))]
    last_tunnel: u32,
}

/// What is upgraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Upgrade {
    /// A connection, by a number that no other open connection has.
    Connection(usize),
    /// A stream of HTTP/2.
    #[cfg(all(feature = "axum", feature = "signal"))]
    Tunnel(TunnelNumber),
}

/// A number that no other open tunnel has.
#[cfg(all(feature = "axum", feature = "signal"))]
pub(crate) type TunnelNumber = std::num::NonZeroU32;

struct Entry {
    path: Option<Box<str>>,
    peer: Option<SocketAddr>,
    asked: Instant,
    upgraded: bool,
}

impl Entry {
    fn asked(path: &str, peer: Option<SocketAddr>) -> Self {
        Self {
            path: Some(path.into()),
            peer,
            asked: Instant::now(),
            upgraded: false,
        }
    }
}

impl Upgraded {
    /// Records that a request asks for an upgrade of its connection.
    #[cold]
    pub(crate) fn asked(&self, connection: usize, path: &str, peer: Option<SocketAddr>) {
        let entry = Entry::asked(path, peer);
        let mut upgrades = lock!(self.0);
        let upgrade = Upgrade::Connection(connection);
        upgrades.entries.insert(upgrade, entry);
    }

    /// Records that a request over HTTP/2 asks for a tunnel. Returns the number of the tunnel.
    #[cfg(all(feature = "axum", feature = "signal"))]
    #[cold]
    pub(crate) fn asked_for_tunnel(&self, path: &str, peer: Option<SocketAddr>) -> TunnelNumber {
        let entry = Entry::asked(path, peer);
        let mut upgrades = lock!(self.0);
        loop {
            upgrades.last_tunnel = upgrades.last_tunnel.wrapping_add(1);
            let Some(number) = TunnelNumber::new(upgrades.last_tunnel) else {
                continue;
            };
            if let hash_map::Entry::Vacant(free) = upgrades.entries.entry(Upgrade::Tunnel(number)) {
                free.insert(entry);
                return number;
            }
        }
    }

    /// Records that the upgrade was granted.
    #[cold]
    pub(crate) fn began(&self, upgrade: Upgrade, peer: Option<SocketAddr>) {
        let mut upgrades = lock!(self.0);
        let entry = upgrades.entries.entry(upgrade).or_insert_with(|| Entry {
            path: None,
            peer,
            asked: Instant::now(),
            upgraded: true,
        });
        entry.upgraded = true;
    }

    #[cold]
    pub(crate) fn ended(&self, upgrade: Upgrade) {
        let ended = lock!(self.0).entries.remove(&upgrade);
        drop(ended);
    }

    /// Forgets an upgrade, unless it was granted.
    #[cold]
    pub(crate) fn not_begun(&self, upgrade: Upgrade) {
        let refused = |entry: &Entry| !entry.upgraded;
        let mut upgrades = lock!(self.0);
        let is_refused = upgrades.entries.get(&upgrade).is_some_and(refused);
        let forgotten = is_refused.then(|| upgrades.entries.remove(&upgrade));
        drop(upgrades);
        drop(forgotten);
    }

    /// The open upgraded connections and tunnels, oldest first.
    pub(crate) fn list(&self, now: Instant) -> Vec<UpgradedConnection> {
        let mut list: Vec<_> = {
            let upgrades = lock!(self.0);
            let open = upgrades.entries.values().filter(|entry| entry.upgraded);
            let list = open.map(|entry| UpgradedConnection {
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
        lock!(self.0).entries.len()
    }

    pub(crate) fn any(&self) -> bool {
        let upgrades = lock!(self.0);
        upgrades.entries.values().any(|entry| entry.upgraded)
    }
}
