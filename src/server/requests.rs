//! Recognizes HTTP/1 requests in the bytes of a connection, for servers other than `serve`. Two warnings
//! need them: requests that the layer does not see ([`outside`](crate::connection::outside)), and open
//! [`upgraded`](crate::connection::upgraded) connections.
//!
//! A request is recognized only where a read must begin with one: at the start of the connection, and
//! then as long as each read was one whole request without a body. After any other read the connection
//! is no longer inspected.

use http::{Method, StatusCode};

use super::ConnectionEntry;
use crate::connection::{
    flags::{INSPECTED, UPGRADES, WATCHED},
    outside::Window,
    requests::{Known, is_http1, parse},
};

/// The longest request head that is inspected, in bytes.
const MOST_BYTES: usize = 8 * 1024;

/// The end of a request head.
const END: &[u8] = b"\r\n\r\n";

/// The number of requests that are inspected on one connection.
const MOST_REQUESTS: u8 = 32;

/// Inspects bytes that were read.
#[cold]
#[inline(never)]
pub(super) fn read(entry: &ConnectionEntry, read: &[u8]) {
    inspect(entry, |known| known.read(entry, read));
}

/// Inspects bytes that are about to be written.
#[cold]
#[inline(never)]
pub(super) fn wrote(entry: &ConnectionEntry, written: &[u8]) {
    inspect(entry, |known| known.wrote(entry, written));
}

/// Calls `inspect` with what is known about the connection. If `inspect` returns false, the connection is no
/// longer inspected.
fn inspect(entry: &ConnectionEntry, inspect: impl FnOnce(&mut Known) -> bool) {
    let requests = &entry.owner.requests;
    // `inspect` may log, so the lock is not held.
    let mut known = requests.take(entry.number()).unwrap_or_default();
    if inspect(&mut known) {
        requests.put(entry.number(), known);
    } else {
        known.end(entry);
        entry.flags.take(INSPECTED);
    }
}

/// Removes a connection that was dropped, or is no longer inspected.
#[cold]
pub(super) fn end(entry: &ConnectionEntry) {
    if let Some(known) = entry.owner.requests.take(entry.number()) {
        known.end(entry);
    }
}

impl Known {
    /// Returns whether the connection is still to be inspected.
    fn read(&mut self, entry: &ConnectionEntry, read: &[u8]) -> bool {
        if self.asked {
            // This is a body, or a pipelined request, so the next read may begin anywhere.
            self.another = false;
            return true;
        }
        // What was searched before is not searched again: the peer may send single bytes.
        let searched = self.head.len().saturating_sub(END.len() - 1);
        self.head.extend_from_slice(read);
        let mut ends = self.head[searched..].windows(END.len());
        let Some(end) = ends.position(|end| end == END) else {
            return self.head.len() < MOST_BYTES && is_http1(&self.head);
        };
        let end = searched + end;
        let whole = self.head.len() == end + END.len();
        let head = std::mem::take(&mut self.head);
        let Some((method, path, fields)) = parse(&head[..end]) else {
            return false;
        };
        let (mut body, mut upgrades) = (false, false);
        for field in fields {
            let (name, value) = field.split_once(':').unwrap_or((field, ""));
            body |= name.eq_ignore_ascii_case("content-length") && value.trim() != "0"
                || name.eq_ignore_ascii_case("transfer-encoding");
            upgrades |= name.eq_ignore_ascii_case("upgrade");
        }
        self.upgrades = upgrades;
        if upgrades {
            entry.flags.set(UPGRADES);
            entry
                .owner
                .upgraded
                .asked(entry.number(), path, entry.peer());
        }
        if entry.flags.has(WATCHED) {
            self.window = Window::open(&entry.owner, &method, path, entry.peer(), false);
        }
        self.asked = true;
        self.requests += 1;
        self.another = whole
            && !body
            && !upgrades
            && entry.flags.has(WATCHED)
            && self.requests < MOST_REQUESTS
            && matches!(method, Method::GET | Method::HEAD);
        true
    }

    /// Returns whether the connection is still to be inspected.
    fn wrote(&mut self, entry: &ConnectionEntry, written: &[u8]) -> bool {
        if !self.asked {
            // This is the rest of a response, if there was a request.
            return self.requests > 0;
        }
        let status = written.strip_prefix(b"HTTP/1.1 ".as_slice());
        let status = status.or_else(|| written.strip_prefix(b"HTTP/1.0 "));
        let status = status.and_then(|status| status.get(..3));
        let Some(status) = status.and_then(|status| StatusCode::from_bytes(status).ok()) else {
            self.not_upgraded(entry);
            return false;
        };
        if status != StatusCode::SWITCHING_PROTOCOLS {
            if status.is_informational() {
                return true;
            }
            self.not_upgraded(entry);
        }
        if let Some(window) = self.window.take() {
            window.answered(&entry.owner, status);
        }
        self.asked = false;
        self.another
    }

    fn not_upgraded(&self, entry: &ConnectionEntry) {
        if self.upgrades {
            entry.not_upgraded();
        }
    }

    fn end(&self, entry: &ConnectionEntry) {
        if let Some(window) = self.window {
            window.close(&entry.owner);
        }
    }
}

#[cfg(all(test, feature = "axum", feature = "signal", not(tower_graceful_loom)))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::handle::graceful::Graceful;

    fn connect(graceful: &Graceful) -> Arc<ConnectionEntry> {
        let shared = graceful.shared();
        shared.connections.insert(shared.clone(), None)
    }

    const UPGRADE: &[u8] = b"GET /chat HTTP/1.1\r\nhost: test\r\nupgrade: websocket\r\n\r\n";

    #[test]
    fn a_head_is_recognized_in_any_pieces() {
        for piece in 1..=UPGRADE.len() {
            let graceful = Graceful::new();
            let entry = connect(&graceful);
            for piece in UPGRADE.chunks(piece) {
                assert_eq!(graceful.shared().upgraded.len(), 0);
                read(&entry, piece);
            }
            assert_eq!(graceful.shared().upgraded.len(), 1, "{piece}");
        }
    }

    #[test]
    fn a_refused_upgrade_is_forgotten() {
        for (response, upgraded) in [
            ("HTTP/1.1 403 Forbidden\r\n\r\n", 0),
            ("HTTP/1.1 100 Continue\r\n\r\n", 1),
            ("HTTP/1.1 101 Switching Protocols\r\n\r\n", 1),
            ("no response", 0),
        ] {
            let graceful = Graceful::new();
            let entry = connect(&graceful);
            read(&entry, UPGRADE);
            wrote(&entry, response.as_bytes());
            assert_eq!(graceful.shared().upgraded.len(), upgraded, "{response}");
        }
    }
}
