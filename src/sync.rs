//! The source of the atomics and locks that a protocol of this crate depends on.
//!
//! In a normal build these are the types of the standard library. Under `--cfg tower_graceful_loom`
//! they are loom's, so that the `models` modules explore the interleavings of the code that ships.
//! What no model depends on may use the standard library directly.

#[cfg(not(tower_graceful_loom))]
pub(crate) use std::sync::{
    Condvar, Mutex,
    atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicUsize, Ordering},
};

#[cfg(tower_graceful_loom)]
pub(crate) use loom::sync::{
    Condvar, Mutex,
    atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicUsize, Ordering},
};

/// Locks `mutex`, also if a panic has poisoned it.
///
/// Every critical section in this crate leaves its data consistent at each step, so a poisoned lock
/// means at worst a missed step. And `Drop` must not panic.
macro_rules! lock {
    ($mutex:expr) => {
        $mutex
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    };
}
pub(crate) use lock;

/// In a model, polls until the result is ready, always with the same waker. In an optimised build,
/// loom's own waker compares as different in each poll, so it would never be recognised as the
/// stored one.
#[cfg(all(test, tower_graceful_loom))]
pub(crate) fn wait<T>(
    mut poll: impl FnMut(&mut std::task::Context<'_>) -> std::task::Poll<T>,
) -> T {
    let mut kept = None;
    loom::future::block_on(std::future::poll_fn(|cx| {
        let waker: &mut std::task::Waker = kept.get_or_insert_with(|| cx.waker().clone());
        assert!(waker.will_wake(&waker.clone()));
        poll(&mut std::task::Context::from_waker(waker))
    }))
}
