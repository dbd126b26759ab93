//! Facts about a connection.

use crate::sync::{AtomicU16, Ordering};

/// Facts about a connection, one bit each. `Relaxed`: they publish nothing else in memory.
#[derive(Debug)]
pub(crate) struct Flags(AtomicU16);

impl Flags {
    pub(super) fn new(flags: u16) -> Self {
        Self(AtomicU16::new(flags))
    }

    /// Whether any of these flags is set.
    pub(crate) fn has(&self, flags: u16) -> bool {
        self.0.load(Ordering::Relaxed) & flags != 0
    }

    /// Writes only if something changes.
    pub(crate) fn set(&self, flags: u16) {
        if self.0.load(Ordering::Relaxed) & flags != flags {
            self.0.fetch_or(flags, Ordering::Relaxed);
        }
    }

    /// Clears and sets flags. Writes only if something changes.
    #[inline]
    pub(crate) fn change(&self, clear: u16, set: u16) {
        if self.0.load(Ordering::Relaxed) & (clear | set) != set {
            self.0.fetch_and(!clear, Ordering::Relaxed);
            self.0.fetch_or(set, Ordering::Relaxed);
        }
    }

    /// Sets or clears a flag. Writes only if it changes.
    #[inline]
    pub(crate) fn put(&self, flag: u16, on: bool) {
        if on {
            self.set(flag);
        } else {
            self.take(flag);
        }
    }

    /// Clears a flag, and returns whether it was set.
    pub(crate) fn take(&self, flag: u16) -> bool {
        self.has(flag) && self.0.fetch_and(!flag, Ordering::Relaxed) & flag != 0
    }
}

/// Something was read since the flag was last cleared. Only set while the service stops, and on
/// insertion.
pub(crate) const ACTIVE: u16 = 1;
/// Something was read since the peer was asked to leave.
pub(super) const ANSWERS: u16 = 2;
/// The server has dropped the IO, and the connection waits for the peer to take the rest. Or what its peer has lost is
/// counted.
pub(crate) const LINGERS: u16 = 4;
/// A response went out while the service stopped, and its peer may not have received all of it.
pub(crate) const RESPONDED: u16 = 8;
/// Some requests of this connection are checked for whether the layer sees them.
pub(crate) const WATCHED: u16 = 16;
/// The connection has asked for an upgrade, now or earlier.
pub(crate) const UPGRADES: u16 = 32;
/// The bytes are searched for requests: on a server other than `serve`, and as long as requests can
/// be told apart.
pub(crate) const INSPECTED: u16 = 64;
/// A handshake is running on the connection.
pub(crate) const HANDSHAKE: u16 = 128;
/// After a handshake: something was written, or the first HTTP/1 head is complete.
pub(crate) const BUSY: u16 = 256;
/// The connection no longer speaks HTTP.
pub(crate) const UPGRADED: u16 = 512;
/// The last HTTP/1 request may have a body: on `serve`, if it is a `GET` or `HEAD`; above a handshake, when the top
/// layer has been dropped.
pub(crate) const BODY: u16 = 1024;
/// The peer's address is in the table of renamed peers.
pub(super) const RENAMED: u16 = 2048;
/// The request on this connection may be dropped without a response: it is a call of the preStop
/// route, and its caller may disconnect.
pub(crate) const MAY_DROP: u16 = 4096;
/// The `serve` task of the connection has read the directive to close. Draining need not wait for it
/// any more.
pub(crate) const CLOSE_NOTICED: u16 = 8192;
/// Nothing was there when the connection was [read once more](super::directive::Directive::Read), or the
/// peer had closed its writing side.
pub(crate) const READ_ONCE_MORE: u16 = 16384;
/// Over HTTP/2, when the connection may expire: there was no stream at the last read, and it found
/// nothing.
pub(crate) const STREAMLESS: u16 = 32768;

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_set_and_taken_without_the_others() {
        let flags = Flags::new(LINGERS);
        flags.set(ACTIVE);
        flags.set(ACTIVE | ANSWERS);
        assert!(flags.has(ACTIVE) && flags.has(ANSWERS) && flags.has(LINGERS));
        assert!(!flags.has(RESPONDED));
        assert!(flags.take(ACTIVE));
        assert!(!flags.take(ACTIVE) && !flags.has(ACTIVE));
        assert!(flags.has(ANSWERS) && flags.has(LINGERS));
        flags.change(ANSWERS | LINGERS, ACTIVE);
        assert!(flags.has(ACTIVE) && !flags.has(ANSWERS) && !flags.has(LINGERS));
        flags.put(ANSWERS, true);
        assert!(flags.has(ANSWERS) && flags.has(ACTIVE));
        flags.put(ANSWERS, false);
        assert!(!flags.has(ANSWERS) && flags.has(ACTIVE));
        let none = Flags::new(0);
        none.set(READ_ONCE_MORE);
        assert!(none.has(READ_ONCE_MORE));
        none.change(0, READ_ONCE_MORE | ACTIVE);
        assert!(none.has(ACTIVE));
        none.change(READ_ONCE_MORE, 0);
        assert!(none.has(ACTIVE) && !none.has(READ_ONCE_MORE));
    }
}
