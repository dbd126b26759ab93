//! The order in which listeners and connections close, so that no request on its way is lost.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Lifecycle,
    state::{ClosingStage, Reads, Shutdown},
};
use crate::phase::Phase;

/// How long no connection may have been opened and no byte read before the connections are told to
/// close. A server that is told to close closes silent connections at once, and would lose the
/// requests that are in transit on them. Measured on loopback: without this wait, a third of the
/// requests that race with the stop are lost.
pub(crate) const QUIET_BEFORE_CLOSE: Duration = Duration::from_millis(25);

/// The longest wait for that silence. Some clients are never silent.
const LONGEST_QUIET_WAIT: Duration = Duration::from_millis(150);

/// The longest wait for connections that no task has read yet, and for handshakes whose peers have
/// sent something. On a busy machine the runtime reads a new connection late, and a request may
/// already be waiting on it.
pub(super) const MOST_UNREAD: Duration = Duration::from_secs(1);

/// How often to check whether such handshakes are still in progress, and whether connections have
/// closed.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// How often to check whether responses that would be dropped have gone out.
const TORN_CHECK_INTERVAL: Duration = Duration::from_millis(25);

/// How soon to check whether every connection has been read once more. Usually this takes microseconds.
const FIRST_CHECK: Duration = Duration::from_millis(1);

/// How long to wait for the next connection to be read once more: with nothing in flight, and with
/// requests in flight, whose connections may not be read.
const READ_PATIENCE: Duration = Duration::from_millis(250);
const READ_PATIENCE_BUSY: Duration = Duration::from_millis(50);

impl Lifecycle {
    /// Closes the listeners, and then tells the servers to close their connections. Returns when to
    /// check again, if this is not finished.
    pub(super) fn advance_closing(&self, shutdown: &mut Shutdown, now: Instant) -> Option<Instant> {
        if shutdown.closing_stage >= ClosingStage::Connections {
            return None;
        }
        let begun = *shutdown.closing_begun.get_or_insert(now);
        shutdown.closing_stage = shutdown.closing_stage.max(ClosingStage::Listeners);
        let listeners = self.connections.listeners();
        // Without a listener of this crate it is unknown when connections are accepted, so there is no
        // listener to wait for, and no first request.
        if listeners.so_far > 0 && shutdown.cut.is_none() && !self.has_handed_over() {
            // A listener closes soon after its task has run. On an overloaded machine the task may
            // run late.
            let mut last_accepts = begun + MOST_UNREAD;
            if self.starved.is_waiting() {
                last_accepts = last_accepts.max(shutdown.close_idle_at);
            }
            let last_accepts = shutdown.drain_until.min(last_accepts);
            if listeners.open > 0 && now < last_accepts {
                return Some(last_accepts);
            }
            let begun = self.starved.over().map_or(begun, |over| over.max(begun));
            let most = shutdown.drain_until.min(begun + MOST_UNREAD);
            if now < most && self.connections.has_handshakes() {
                shutdown.last_handshake = Some(now);
                return Some(most.min(now + CHECK_INTERVAL));
            }
            let unread = self.connections.has_unread();
            let most = begun
                + if unread {
                    MOST_UNREAD
                } else {
                    LONGEST_QUIET_WAIT
                };
            // A client sends its first request with the last message of the handshake or right
            // after it.
            let last_handshake = shutdown
                .last_handshake
                .map_or(most, |at| at + CHECK_INTERVAL + QUIET_BEFORE_CLOSE);
            let most = shutdown.drain_until.min(most.max(last_handshake));
            if self.connections.take_activity() || unread {
                shutdown.last_activity = Some(now);
            }
            let last_activity = shutdown
                .last_activity
                .max(shutdown.entered.first().copied());
            let until = last_activity
                .map_or(now, |at| at + QUIET_BEFORE_CLOSE)
                .min(most);
            if now < until {
                return Some(until);
            }
            if let Some(until) = self.read_once_more(shutdown, now) {
                return Some(until);
            }
        }
        // A client that does not read must not keep the lame-duck phase from its end.
        let most = if self.phase() == Phase::LameDuck {
            shutdown.close_idle_at.min(begun + MOST_UNREAD)
        } else {
            shutdown.close_idle_at
        };
        if now < most && shutdown.cut.is_none() && self.connections.has_torn_by_close() {
            return Some(most.min(now + TORN_CHECK_INTERVAL));
        }
        shutdown.close_connections(now);
        None
    }

    /// Makes the servers read their connections once more. A server that is told to close does not read
    /// its idle connections before it closes them. On a busy machine a request may wait on one of them
    /// although nothing was read for a while. The servers of `serve` read by themselves. Returns when to
    /// check again, as long as connections are unread and their number still falls: some are never read,
    /// such as those whose handler does not read the rest of an upload.
    fn read_once_more(&self, shutdown: &mut Shutdown, now: Instant) -> Option<Instant> {
        shutdown.closing_stage = ClosingStage::Reads;
        let left = self.connections.not_read_once_more();
        let first = shutdown.reads.is_none();
        let reads = shutdown.reads.get_or_insert(Reads {
            begun: now,
            left,
            fell: now,
        });
        if left < reads.left {
            (reads.left, reads.fell) = (left, now);
        }
        let (most, patience) = if self.is_idle() {
            (MOST_UNREAD, READ_PATIENCE)
        } else {
            (LONGEST_QUIET_WAIT, READ_PATIENCE_BUSY)
        };
        let until = (reads.begun + most).min(reads.fell + patience);
        let until = shutdown.drain_until.min(until);
        let interval = if first { FIRST_CHECK } else { CHECK_INTERVAL };
        (left > 0 && now < until).then(|| until.min(now + interval))
    }
}
