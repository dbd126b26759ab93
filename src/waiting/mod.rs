//! Waiting for a phase of the lifecycle.
//!
//! Futures wait here: those of `handle` for a phase (`draining()`, `stopped()`, `until_draining()`,
//! `Stop`) and the preStop route in `waiters`, `subscribe()` in `phase_receiver`, and futures that
//! wait until a watched value reaches a point in `watch_until`. Thousands of tasks may wait at once. None of them can delay the stop: the
//! timeline wakes them without holding a lock, and a panic in a waker is caught.
//!
//! `waiters` and `shielded_wait` contain the arguments that no wake-up is lost, and loom models for
//! them. Change `waiters`' locking, or the order in `shielded_wait`, only together with both.

pub(crate) mod phase_receiver;
pub(crate) mod shielded_wait;
pub(crate) mod waiters;
pub(crate) mod watch_until;
