//! Values that are kept until the process ends.
//!
//! A static list holds all of them, so that a leak checker finds them in use: valgrind (`.ci/leaks`),
//! `LeakSanitizer` (`.ci/sanitizers`) and Miri (`.ci/miri`) report memory that nothing points at. Each
//! lifecycle that makes a service adds its entries once. No request reads the list.

use std::{any::Any, sync::Mutex};

use crate::sync::lock;

/// Not from `sync`, because no model depends on it: outside of tests the list is only written.
static KEPT: Mutex<Vec<&'static (dyn Any + Send + Sync)>> = Mutex::new(Vec::new());

/// Keeps a value until the process ends.
pub(super) fn keep<T: Send + Sync + 'static>(value: T) -> &'static T {
    let value: &'static T = Box::leak(Box::new(value));
    lock!(KEPT).push(value);
    value
}

/// Whether the list contains this value.
#[cfg(all(test, not(tower_graceful_loom)))]
pub(super) fn is_kept<T>(value: &'static T) -> bool {
    let kept = lock!(KEPT);
    kept.iter().any(|kept| std::ptr::addr_eq(*kept, value))
}
