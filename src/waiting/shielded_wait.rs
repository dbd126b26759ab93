//! Waiting on a channel that wakes several tasks.
//!
//! A channel of tokio that wakes several tasks forgets the rest of them if a waker panics. So no task's own
//! waker is passed to such a channel. The wait has a waker of its own, which catches the panic. It also
//! notes the wake-up, so that a task that is often polled for another reason polls the wait only when it
//! has to.
//!
//! *No wake-up is lost.* A wake-up sets `woken` and then wakes the task. A poll unsets `woken` and then polls
//! the inner future. If a poll finds it unset, the wake-up of the task comes later, and leads to another
//! poll. A poll that finds it set sees what was done before the wake-up: both are read-modify-writes with
//! `AcqRel`. Model: `a_wake_up_is_not_lost_beside_another_poll`; it fails if the task is woken before
//! `woken` is set.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use pin_project_lite::pin_project;

use crate::{
    background::shielded,
    sync::{AtomicBool, Ordering},
};

pin_project! {
    /// Polls `wait` with a waker of its own, first and then whenever that waker was woken or the waker of
    /// the task has changed.
    pub(crate) struct ShieldedWait<F> {
        #[pin]
        wait: F,
        waker: Option<Arc<ShieldedWaker>>,
    }
}

struct ShieldedWaker {
    task: Waker,
    woken: AtomicBool,
}

impl<F: Future> ShieldedWait<F> {
    pub(crate) fn new(wait: F) -> Self {
        Self { wait, waker: None }
    }
}

impl<F: Future> Future for ShieldedWait<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let stored = this.waker.as_ref();
        let waker = match stored.filter(|stored| stored.task.will_wake(cx.waker())) {
            // AcqRel: see the module header.
            Some(stored) if !stored.woken.swap(false, Ordering::AcqRel) => return Poll::Pending,
            Some(stored) => stored,
            None => this.waker.insert(Arc::new(ShieldedWaker {
                task: cx.waker().clone(),
                woken: AtomicBool::new(false),
            })),
        };
        let waker = Waker::from(Arc::clone(waker));
        this.wait.poll(&mut Context::from_waker(&waker))
    }
}

impl Wake for ShieldedWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
        // The destructor of the task's waker is foreign code too.
        shielded(|| drop(self));
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // AcqRel: see the module header.
        self.woken.swap(true, Ordering::AcqRel);
        shielded(|| self.task.wake_by_ref());
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::{future::poll_fn, pin::pin};

    use loom::{model, thread};

    use super::*;
    use crate::sync::{Mutex, wait};

    /// A value that changes once, and the waker of the task that waits for it.
    #[derive(Default)]
    struct Change(Mutex<(bool, Option<Waker>)>);

    impl Change {
        fn poll(&self, cx: &Context<'_>) -> Poll<()> {
            let mut inner = self.0.lock().unwrap();
            if inner.0 {
                return Poll::Ready(());
            }
            inner.1 = Some(cx.waker().clone());
            Poll::Pending
        }

        fn happens(&self) {
            let mut inner = self.0.lock().unwrap();
            inner.0 = true;
            let waker = inner.1.take();
            drop(inner);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// If the wake-up could be lost, loom would find an execution that never ends.
    #[test]
    fn a_wake_up_is_not_lost_beside_another_poll() {
        model(|| {
            let changes = Arc::new([Change::default(), Change::default()]);
            let happening = (0..2).map(|index| {
                let changes = Arc::clone(&changes);
                thread::spawn(move || changes[index].happens())
            });
            let happening: Vec<_> = happening.collect();
            let [awaited, other] = &*changes;
            let mut shielded = pin!(ShieldedWait::new(poll_fn(|cx| awaited.poll(cx))));
            wait(|cx| {
                let _ = other.poll(cx);
                shielded.as_mut().poll(cx)
            });
            for thread in happening {
                thread.join().unwrap();
            }
        });
    }
}

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{cell::Cell, future::poll_fn};

    use tokio::sync::watch;
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;
    use crate::background::wakers;

    #[test]
    fn a_wait_is_polled_only_when_it_was_woken_or_the_task_has_another_waker() {
        let polls = Cell::new(0);
        let kept = Cell::new(None);
        let wait = ShieldedWait::new(poll_fn(|cx| {
            polls.set(polls.get() + 1);
            kept.set(Some(cx.waker().clone()));
            Poll::<()>::Pending
        }));
        let mut task = task::spawn(wait);
        for _ in 0..3 {
            assert_pending!(task.poll());
        }
        assert_eq!(polls.get(), 1);
        kept.take().unwrap().wake();
        assert!(task.is_woken());
        for _ in 0..3 {
            assert_pending!(task.poll());
        }
        assert_eq!(polls.get(), 2);
        let mut moved = task::spawn(task.into_inner());
        for _ in 0..3 {
            assert_pending!(moved.poll());
        }
        assert_eq!(polls.get(), 3);
        kept.take().unwrap().wake();
        assert!(moved.is_woken());
    }

    #[test]
    fn a_waker_that_panics_does_not_keep_others_from_being_woken() {
        // tokio has several lists of waiting tasks, and several places in each: more than one task for each.
        let (sender, receiver) = watch::channel(false);
        let wait = || {
            let mut receiver = receiver.clone();
            Box::pin(ShieldedWait::new(async move {
                receiver.wait_for(|value| *value).await.is_ok()
            }))
        };
        let panics = wakers::panicking();
        let mut first: Vec<_> = (0..100).map(|_| wait()).collect();
        for first in &mut first {
            assert_pending!(first.as_mut().poll(&mut Context::from_waker(&panics)));
        }
        let mut others: Vec<_> = (0..100).map(|_| task::spawn(wait())).collect();
        for other in &mut others {
            assert_pending!(other.poll());
        }
        sender.send_replace(true);
        for mut other in others {
            assert!(other.is_woken());
            assert!(assert_ready!(other.poll()));
        }
    }
}
