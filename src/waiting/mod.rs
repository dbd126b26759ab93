//! Waiting for a phase, by the thousands, without delay of the stop by those that wait.

pub(crate) mod phase_receiver;
pub(crate) mod waiters;
pub(crate) mod watch_until;
