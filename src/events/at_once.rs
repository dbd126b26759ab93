//! Events that are written at once, on the thread on which they happen.

use super::texts::event;
#[cfg(feature = "axum")]
use super::texts::wants_debug;

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

/// A call of the preStop route was refused.
#[cfg(feature = "axum")]
pub(crate) fn pre_stop_refused(reason: &str) {
    event!(
        warn,
        { reason = reason },
        "a call of the preStop route is refused: {reason}"
    );
}

#[cfg(feature = "signal")]
pub(crate) fn no_signals(error: &std::io::Error) {
    event!(
        error,
        { error = &*error.to_string() },
        "cannot listen for signals; they will end the process at once: {error}"
    );
}
