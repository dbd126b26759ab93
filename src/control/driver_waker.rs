//! Wakes the driver of a stop, and the control thread, when something has changed that they have to
//! check.
//!
//! The driver is always notified. The control thread is notified as well while the real clock
//! applies. There may be thousands of changes in one moment, so all notifications before the
//! thread's next check are combined into one.
//!
//! *No notification is lost.* A task makes its change and then sets `notified` by a
//! read-modify-write. If the flag was unset, the task notifies the thread. If it was set, this
//! happens before the thread unsets it, which it does by another read-modify-write before it
//! checks. Each read-modify-write is `AcqRel` and continues the release sequence of the one before,
//! so the thread sees the change. Model: `an_announced_change_is_seen`; it fails if the thread
//! checks before it unsets the flag.
//!
//! *`engaged` is seen in time.* A step sets it before it checks anything, and checks under the lock
//! under which the task makes its change. So the step sees the change, or the lock orders the setting of
//! `engaged` before the task's load of it.

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
    /// The control thread keeps the deadlines of this stop.
    engaged: AtomicBool,
    notified: AtomicBool,
}

impl DriverWaker {
    pub(crate) fn new(notify: fn(Id)) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);

        Self {
            id: IDS.fetch_add(1, Relaxed),
            driver: Notify::new(),
            notify,
            engaged: AtomicBool::new(false),
            notified: AtomicBool::new(false),
        }
    }

    pub(crate) fn id(&self) -> Id {
        self.id
    }

    pub(crate) fn notify(&self) {
        self.driver.notify_one();
        // Acquire and AcqRel: see the module header.
        if self.engaged.load(Ordering::Acquire) && !self.notified.swap(true, Ordering::AcqRel) {
            (self.notify)(self.id);
        }
    }

    /// Wakes the driver only.
    pub(crate) fn wake_driver(&self) {
        self.driver.notify_one();
    }

    pub(crate) async fn notified(&self) {
        self.driver.notified().await;
    }

    /// The control thread calls this before it checks the stop.
    pub(crate) fn begins_check(&self) {
        self.notified.swap(false, Ordering::AcqRel);
    }

    /// Sets whether the control thread is notified too. Returns whether it was before. Called
    /// before anything is checked, so that a later change finds the flag set.
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
        static ref WOKEN: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());
    }

    fn wake(_: Id) {
        *WOKEN.0.lock().unwrap() = true;
        WOKEN.1.notify_one();
    }

    /// The announced change is `Relaxed`: only the notification orders it.
    #[test]
    fn an_announced_change_is_seen() {
        model(|| {
            let driver_waker = Arc::new(DriverWaker::new(wake));
            driver_waker.engage(true);
            let change = Arc::new(AtomicUsize::new(0));
            let announcers: Vec<_> = (0..2)
                .map(|_| {
                    let (driver_waker, change) = (Arc::clone(&driver_waker), Arc::clone(&change));
                    thread::spawn(move || {
                        change.fetch_add(1, Ordering::Relaxed);
                        driver_waker.notify();
                    })
                })
                .collect();
            while change.load(Ordering::Relaxed) < 2 {
                let mut woken = WOKEN.0.lock().unwrap();
                while !*woken {
                    woken = WOKEN.1.wait(woken).unwrap();
                }
                *woken = false;
                drop(woken);
                driver_waker.begins_check();
            }
            for announcer in announcers {
                announcer.join().unwrap();
            }
        });
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{sync::atomic::AtomicUsize, task::Waker};

    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[test]
    fn the_control_thread_is_notified_once_before_it_checks_and_only_while_engaged() {
        static NOTIFIED: AtomicUsize = AtomicUsize::new(0);

        fn notified() -> usize {
            NOTIFIED.swap(0, Relaxed)
        }

        fn count(_: Id) {
            NOTIFIED.fetch_add(1, Relaxed);
        }

        let driver_waker = Arc::new(DriverWaker::new(count));
        driver_waker.notify();
        assert_eq!(notified(), 0, "the thread keeps no deadline of this stop");
        assert!(!driver_waker.engage(true));
        for round in 0..3 {
            driver_waker.notify();
            assert_eq!(notified(), 1, "{round}");
            driver_waker.notify();
            assert_eq!(notified(), 0, "{round}");
            driver_waker.begins_check();
        }
        assert!(driver_waker.engage(true));
        assert!(driver_waker.engage(false));
        driver_waker.notify();
        assert_eq!(notified(), 0);
        assert_ne!(DriverWaker::new(count).id(), driver_waker.id());
    }

    #[test]
    fn every_notification_wakes_the_driver() {
        let driver_waker = Arc::new(DriverWaker::new(|_| ()));
        let waker = Waker::from(Arc::clone(&driver_waker));
        let notifications: [&dyn Fn(); 4] = [
            &|| driver_waker.notify(),
            &|| driver_waker.wake_driver(),
            &|| waker.wake_by_ref(),
            &|| Waker::from(Arc::clone(&driver_waker)).wake(),
        ];
        for notify in notifications {
            let mut driver = task::spawn(driver_waker.notified());
            assert_pending!(driver.poll());
            notify();
            assert!(driver.is_woken());
            assert_ready!(driver.poll());
        }
    }
}
