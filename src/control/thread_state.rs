//! Whether there is a control thread, and whether it sleeps. Protected by the lock of `Control`.

use std::mem;

pub(super) struct ThreadState {
    /// The process that the thread runs in, if there is a thread.
    thread: Option<u32>,
    /// The thread checks everything before it sleeps again.
    awake: bool,
}

impl ThreadState {
    pub(super) fn new() -> Self {
        Self {
            thread: None,
            awake: true,
        }
    }

    /// A forked child has no thread.
    pub(super) fn has_thread(&self, process: u32) -> bool {
        self.thread == Some(process)
    }

    /// Records that the thread has been started. It checks everything before it sleeps.
    pub(super) fn started(&mut self, process: u32) {
        self.thread = Some(process);
        self.awake = true;
    }

    /// Records that the thread checks everything now.
    pub(super) fn begins_check(&mut self) {
        self.awake = true;
    }

    /// Records that the thread has found nothing to do and sleeps. The caller chooses what to wait
    /// on under the same lock.
    pub(super) fn sleeps(&mut self) {
        self.awake = false;
    }

    /// Records that nothing needs the thread, and that it ends without another check.
    pub(super) fn leaves(&mut self) {
        self.thread = None;
    }

    /// Requests a check by the thread. Returns whether the thread sleeps, and so has to be woken.
    #[must_use]
    pub(super) fn wakes(&mut self) -> bool {
        !mem::replace(&mut self.awake, true)
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::sync::Arc;

    use loom::{
        model,
        sync::{Condvar, Mutex, MutexGuard},
        thread,
    };

    use super::*;

    /// What the thread waits on.
    #[derive(Clone, Copy)]
    enum On {
        /// The socket, after the lock is released. The byte stays in it until it is read.
        Socket,
        /// The condition variable, which releases the lock itself.
        Condition,
    }

    /// The control thread without its clock. The socket is a count of bytes.
    struct Control {
        inner: Mutex<Inner>,
        needed: Condvar,
        bytes: Mutex<usize>,
        written: Condvar,
        on: On,
    }

    struct Inner {
        thread: ThreadState,
        /// How many entries the thread has to check, and how many it has seen.
        entered: usize,
        seen: usize,
        /// The thread is needed until it has seen this many entries.
        needs: usize,
    }

    impl Control {
        fn new(on: On, needs: usize) -> Arc<Self> {
            Arc::new(Self {
                inner: Mutex::new(Inner {
                    thread: ThreadState::new(),
                    entered: 0,
                    seen: 0,
                    needs,
                }),
                needed: Condvar::new(),
                bytes: Mutex::new(0),
                written: Condvar::new(),
                on,
            })
        }

        fn wake(&self, inner: &mut Inner) {
            if inner.thread.wakes() {
                self.needed.notify_one();
                *self.bytes.lock().unwrap() += 1;
                self.written.notify_one();
            }
        }

        /// Adds an entry. Returns whether a thread has to be started for it.
        fn enter(&self) -> bool {
            let mut inner = self.inner.lock().unwrap();
            inner.entered += 1;
            if inner.thread.has_thread(1) {
                self.wake(&mut inner);
                return false;
            }
            inner.thread.started(1);
            true
        }

        fn run(&self) {
            let mut inner = self.inner.lock().unwrap();
            loop {
                inner.thread.begins_check();
                if inner.seen < inner.entered {
                    inner.seen = inner.entered;
                    // Entries are handled without the lock.
                    drop(inner);
                    inner = self.inner.lock().unwrap();
                    continue;
                }
                if inner.seen >= inner.needs {
                    inner.thread.leaves();
                    return;
                }
                inner = self.sleep(inner);
            }
        }

        fn sleep<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
            inner.thread.sleeps();
            if matches!(self.on, On::Condition) {
                return self.needed.wait(inner).unwrap();
            }
            drop(inner);
            let mut bytes = self.bytes.lock().unwrap();
            while *bytes == 0 {
                bytes = self.written.wait(bytes).unwrap();
            }
            *bytes = 0;
            drop(bytes);
            self.inner.lock().unwrap()
        }
    }

    /// Adds an entry, and runs the thread if it has to be started.
    fn enter(control: &Arc<Control>) -> Option<thread::JoinHandle<()>> {
        control.enter().then(|| {
            let control = Arc::clone(control);
            thread::spawn(move || control.run())
        })
    }

    /// Point 2 of the header of `control`. If the thread oversleeps an entry, that is a deadlock,
    /// which loom reports.
    fn oversleeps_no_entry(on: On) {
        model(move || {
            let control = Control::new(on, 3);
            let runs = enter(&control).expect("there was no thread");
            let other = {
                let control = Arc::clone(&control);
                thread::spawn(move || assert!(!control.enter()))
            };
            assert!(!control.enter());
            other.join().unwrap();
            runs.join().unwrap();
            assert_eq!(control.inner.lock().unwrap().seen, 3);
        });
    }

    #[test]
    fn the_thread_oversleeps_no_entry_on_the_socket() {
        oversleeps_no_entry(On::Socket);
    }

    #[test]
    fn the_thread_oversleeps_no_entry_on_the_condition() {
        oversleeps_no_entry(On::Condition);
    }

    /// Point 1 of the header of `control`. The thread ends whenever it has seen everything.
    #[test]
    fn an_entry_is_never_left_without_a_thread() {
        model(|| {
            let control = Control::new(On::Socket, 0);
            let other = {
                let control = Arc::clone(&control);
                thread::spawn(move || enter(&control))
            };
            let mine = enter(&control);
            let others = other.join().unwrap();
            for runs in [mine, others].into_iter().flatten() {
                runs.join().unwrap();
            }
            let inner = control.inner.lock().unwrap();
            assert_eq!(inner.seen, 2);
            assert!(!inner.thread.has_thread(1));
        });
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_a_thread_that_sleeps_is_woken_and_only_once() {
        let mut state = ThreadState::new();
        assert!(!state.wakes(), "there is no thread");
        state.started(1);
        assert!(!state.wakes(), "it has not slept yet");
        state.sleeps();
        assert!(state.wakes());
        assert!(!state.wakes());
        state.sleeps();
        state.begins_check();
        assert!(!state.wakes(), "it checks everything");
    }

    #[test]
    fn a_thread_belongs_to_the_process_that_started_it() {
        let mut state = ThreadState::new();
        assert!(!state.has_thread(1));
        state.started(1);
        assert!(state.has_thread(1) && !state.has_thread(2));
        state.leaves();
        assert!(!state.has_thread(1));
    }
}
