//! The only door to atomics and to the locks that order against them.
//!
//! In a normal build these are the standard library's. Under `--cfg tower_graceful_loom` they are
//! loom's, so that the models in `gate` explore every interleaving of the very code that ships.

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

/// Locks `mutex`, also when a panic elsewhere has poisoned it.
///
/// Every critical section in this crate leaves its data whole at each step, so a poisoned lock
/// holds nothing worse than a missed step, and `Drop` must not panic.
macro_rules! lock {
    ($mutex:expr) => {
        $mutex
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    };
}
pub(crate) use lock;

/// In a model, polls until it is ready, with one and the same waker. Loom's own is another one each
/// time, as far as an optimized build can tell, so that it would never be found stored.
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
