//! Values that are kept until the process ends.
//!
//! A static list holds all of them, so that a leak checker finds them in use: `LeakSanitizer` and
//! Miri report only memory that nothing points at. Each lifecycle that makes a service adds its
//! entries once, in constant time. No request reads the list.

use std::sync::Mutex;

use crate::sync::lock;

/// Not from `sync`, because no model depends on it: outside of tests the list is only written.
static LAST: Mutex<Option<&'static dyn Kept>> = Mutex::new(None);

trait Kept: Send + Sync {
    #[cfg(all(test, not(tower_graceful_loom)))]
    fn address(&self) -> usize;
    #[cfg(all(test, not(tower_graceful_loom)))]
    fn before(&self) -> Option<&'static dyn Kept>;
}

struct Entry<T> {
    value: T,
    #[cfg_attr(not(all(test, not(tower_graceful_loom))), expect(dead_code))]
    before: Option<&'static dyn Kept>,
}

impl<T: Send + Sync> Kept for Entry<T> {
    #[cfg(all(test, not(tower_graceful_loom)))]
    fn address(&self) -> usize {
        std::ptr::from_ref(&self.value).addr()
    }

    #[cfg(all(test, not(tower_graceful_loom)))]
    fn before(&self) -> Option<&'static dyn Kept> {
        self.before
    }
}

/// Keeps a value until the process ends.
pub(super) fn keep<T: Send + Sync + 'static>(value: T) -> &'static T {
    let mut last = lock!(LAST);
    let entry: &'static Entry<T> = Box::leak(Box::new(Entry {
        value,
        before: *last,
    }));
    *last = Some(entry);
    &entry.value
}

/// Whether the list contains this value.
#[cfg(all(test, not(tower_graceful_loom)))]
pub(super) fn is_kept<T>(value: &'static T) -> bool {
    let address = std::ptr::from_ref(value).addr();
    let mut entry = *lock!(LAST);
    while let Some(kept) = entry {
        if kept.address() == address {
            return true;
        }
        entry = kept.before();
    }
    false
}
