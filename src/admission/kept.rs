//! What is kept until the process ends.
//!
//! A static list holds all of it, so that a leak checker finds it in use: `LeakSanitizer` and Miri
//! report only what nothing points at any more. An entry is added once for each lifecycle that makes a
//! service, in constant time, and no request looks at the list.

use std::sync::Mutex;

use crate::sync::lock;

/// Not through `sync`, because no model has a say in it: it is written only, and read by nobody.
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

/// Whether the list leads to a value.
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
