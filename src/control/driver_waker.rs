//! What is rung when something has changed that a stop under way has to look at.
//!
//! The ring goes to the driver, and where the real clock rules to the control thread. There may be
//! thousands in one moment, so those that come before the thread has looked are one.
//!
//! No ring is lost. A ringer makes its change, and then sets the flag by a read-modify-write. Whoever
//! finds it unset rings the thread. Whoever finds it set comes before the thread unsets it, by another
//! read-modify-write, and then looks: each continues the release sequence of the one before, so that
//! the thread sees the change. `models` fails where the thread looks before it unsets the flag.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::Wake,
};

use tokio::sync::Notify;

use super::Id;
use crate::sync::{AtomicBool, Ordering};

pub(crate) struct DriverWaker {
    id: Id,
    driver: Notify,
    notify: fn(Id),
    /// The control thread has this stop.
    engaged: AtomicBool,
    rung: AtomicBool,
}

impl DriverWaker {
    pub(crate) fn new(notify: fn(Id)) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);

        Self {
            id: IDS.fetch_add(1, Relaxed),
            driver: Notify::new(),
            notify,
            engaged: AtomicBool::new(false),
            rung: AtomicBool::new(false),
        }
    }

    pub(crate) fn id(&self) -> Id {
        self.id
    }

    pub(crate) fn notify(&self) {
        self.driver.notify_one();
        // `Acquire` and `AcqRel`: the header.
        if self.engaged.load(Ordering::Acquire) && !self.rung.swap(true, Ordering::AcqRel) {
            (self.notify)(self.id);
        }
    }

    /// Rings for the driver alone.
    pub(crate) fn wake_driver(&self) {
        self.driver.notify_one();
    }

    pub(crate) async fn rung(&self) {
        self.driver.notified().await;
    }

    /// The control thread is about to look.
    pub(crate) fn looks(&self) {
        self.rung.swap(false, Ordering::AcqRel);
    }

    /// From now on the control thread is rung too, or no longer. Says whether it was. Before anything
    /// is looked at: whoever changes something later then finds it said.
    pub(crate) fn engage(&self, engaged: bool) -> bool {
        self.engaged.swap(engaged, Ordering::AcqRel)
    }
}

impl Wake for DriverWaker {
    fn wake(self: Arc<Self>) {
        self.notify();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.notify();
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use loom::{
        model,
        sync::{Condvar, Mutex, atomic::AtomicUsize},
        thread,
    };

    use super::*;

    loom::lazy_static! {
        /// What the control thread waits on.
        static ref POST: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
    }

    fn post(_: Id) {
        *POST.0.lock().unwrap() = true;
        POST.1.notify_one();
    }

    /// The change that is announced is a `Relaxed` store: only the bell orders it.
    #[test]
    fn a_change_that_is_rung_for_is_seen() {
        model(|| {
            let driver_waker = Arc::new(DriverWaker::new(post));
            driver_waker.engage(true);
            let change = Arc::new(AtomicUsize::new(0));
            let ringers: Vec<_> = (0..2)
                .map(|_| {
                    let (driver_waker, change) = (Arc::clone(&driver_waker), Arc::clone(&change));
                    thread::spawn(move || {
                        change.fetch_add(1, Ordering::Relaxed);
                        driver_waker.notify();
                    })
                })
                .collect();
            while change.load(Ordering::Relaxed) < 2 {
                let mut posted = POST.0.lock().unwrap();
                while !*posted {
                    posted = POST.1.wait(posted).unwrap();
                }
                *posted = false;
                drop(posted);
                driver_waker.looks();
            }
            for ringer in ringers {
                ringer.join().unwrap();
            }
        });
    }
}
