//! Events that are written at once, on the thread on which they happen.

#[cfg(feature = "axum")]
use std::time::Duration;

#[cfg(feature = "axum")]
use tokio::time::Instant;

use super::texts::event;
#[cfg(feature = "axum")]
use super::texts::wants_debug;
#[cfg(feature = "axum")]
use crate::sync::lock;

/// Logs that the rest of a listener's queue cannot be accepted.
#[cfg(feature = "axum")]
pub(crate) fn queue_lost(error: &std::io::Error) {
    event!(
        warn,
        { error = &*error.to_string() },
        "a listener is closed before its queue is empty: {error}"
    );
}

/// The listener is closed at the start of the stop, with its queue as it is.
#[cfg(feature = "axum")]
pub(crate) fn listener_left() {
    event!(
        debug,
        {},
        "shutdown: a shared listening socket is left to the next process"
    );
}

/// Logs that the rest of a listener's queue could not be accepted for lack of file descriptors.
#[cfg(feature = "axum")]
pub(crate) fn queue_given_up() {
    event!(
        warn,
        {},
        "a listener is closed before its queue is empty: there are no file descriptors left"
    );
}

/// Logs a failed handshake. Without an error, the handshake was too slow.
#[cfg(feature = "axum")]
pub(crate) fn handshake_failed(
    peer: Option<std::net::SocketAddr>,
    error: Option<Box<dyn std::error::Error + Send + Sync>>,
) {
    if !wants_debug() {
        return;
    }
    let error = match error {
        Some(error) => crate::tasks::completion::with_sources(&*error),
        None => "it took too long".to_owned(),
    };
    let peer = peer.map_or_else(|| "a peer".to_owned(), |peer| peer.to_string());
    event!(
        debug,
        { peer = &*peer, error = &*error },
        "the handshake with {peer} has failed: {error}"
    );
}

#[cfg(feature = "axum")]
pub(crate) fn handshake_panicked() {
    event!(warn, {}, "a handshake has panicked");
}

/// A call of the preStop route was refused. Every client that reaches the route can cause it, so it is logged
/// once a second at most.
#[cfg(feature = "axum")]
pub(crate) fn pre_stop_refused(limit: &Limit, reason: &str) {
    let Some(suppressed) = limit.pass() else {
        return;
    };
    let others = match suppressed {
        0 => String::new(),
        others => format!(" ({others} others were refused since the last event)"),
    };
    event!(
        warn,
        { reason = reason, suppressed = suppressed },
        "a call of the preStop route is refused: {reason}{others}"
    );
}

/// Limits events to one a second.
#[cfg(feature = "axum")]
#[derive(Default)]
pub(crate) struct Limit(std::sync::Mutex<(Option<Instant>, u64)>);

#[cfg(feature = "axum")]
impl Limit {
    /// If an event may be logged now, returns how many were suppressed since the last one.
    fn pass(&self) -> Option<u64> {
        const EVERY: Duration = Duration::from_secs(1);
        let now = Instant::now();
        let mut limit = lock!(self.0);
        let (last, suppressed) = &mut *limit;
        if last.is_some_and(|last| now.saturating_duration_since(last) < EVERY) {
            *suppressed += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(suppressed))
    }
}

#[cfg(feature = "signal")]
pub(crate) fn no_signals(error: &std::io::Error) {
    event!(
        error,
        { error = &*error.to_string() },
        "cannot listen for signals; they will end the process at once: {error}"
    );
}
