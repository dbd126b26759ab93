//! Who publishes an update, so that a task that blocks the publishing thread keeps no other from being woken.
//!
//! To publish an update is to wake the tasks that it concerns one after another. Wakers are foreign code, and may
//! block. Due wakers stay in a queue until each is taken ([`waiters`](crate::waiting::waiters)), so whatever publishes
//! the same update or a later one continues with the rest of them. A *job* publishes an update on a thread of
//! [`background`](crate::background). A call that has to publish before it returns does so itself, beside the jobs.
//!
//! 1. *A waker that blocks a job keeps no other task from being woken.* Before a job publishes, it queues a copy of
//!    itself, which another thread takes.
//! 2. *No update is left to a call.* An update counts as begun once there is a job for it, or once all of it is
//!    published. So there is no job for an update only if there is one for a later update, or nothing left to do.
//! 3. *A copy does not end too early.* An update counts as done only after all its tasks have been woken. So a copy
//!    that ends without publishing leaves nothing behind. It is done after the last copy that publishes, so
//!    the copies come to an end.
//!
//! Model: `every_task_is_woken_beside_one_that_blocks`. It fails if a job queues its copy after it has published, if
//! an update counts as done before its tasks are woken, and if it counts as begun when a call begins to publish it.

use std::sync::Arc;

use crate::{
    background::Job,
    sync::{Mutex, lock},
};

/// What publishes updates. A later update is the greater one, and includes the earlier ones.
pub(super) trait Publisher: Send + Sync + Sized + 'static {
    type Update: Copy + Ord + Send + 'static;

    fn published(&self) -> &Published<Self::Update>;

    /// Wakes the tasks that this update concerns and that have not been woken.
    fn wake_tasks(&self, update: Self::Update);

    /// Runs a job on another thread.
    fn run_elsewhere(&self, job: Job);

    /// The job that publishes an update. `None` if there is one, or if nothing has changed since the last one.
    fn to_publish(self: &Arc<Self>, update: Self::Update) -> Option<Job> {
        let mut latest = lock!(self.published().0);
        if latest.begun >= update {
            return None;
        }
        latest.begun = update;
        Some(self.publishing(update))
    }

    /// A job that publishes an update unless all of it is published.
    fn publishing(self: &Arc<Self>, update: Self::Update) -> Job {
        let publisher = Arc::clone(self);
        Box::new(move || {
            let is_done = lock!(publisher.published().0).done >= update;
            if !is_done {
                publisher.run_elsewhere(publisher.publishing(update));
                publisher.publish(update);
            }
        })
    }

    /// Publishes an update on this thread. No lock may be held, because wakers may call back.
    fn publish(&self, update: Self::Update) {
        self.wake_tasks(update);
        let mut latest = lock!(self.published().0);
        latest.begun = latest.begun.max(update);
        latest.done = latest.done.max(update);
    }
}

/// The latest updates of a publisher.
pub(super) struct Published<U>(Mutex<Latest<U>>);

struct Latest<U> {
    /// It is published, or a job publishes it.
    begun: U,
    /// All of it is published.
    done: U,
}

impl<U: Copy> Published<U> {
    pub(super) fn new(first: U) -> Self {
        Self(Mutex::new(Latest {
            begun: first,
            done: first,
        }))
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::collections::VecDeque;

    use loom::{model::Builder, sync::Condvar, thread};

    use super::*;

    /// What a waker does.
    #[derive(Clone, Copy, PartialEq)]
    enum Waker {
        Returns,
        /// Blocks until the others have been woken.
        Blocks,
    }

    /// The tasks that do not block: one that waits for the first update, one that waits for the second.
    const OTHERS: usize = 2;

    struct Service {
        published: Published<u8>,
        tasks: Mutex<Tasks>,
        changed: Condvar,
    }

    struct Tasks {
        /// With the update that each waits for.
        waiting: Vec<(u8, Waker)>,
        due: VecDeque<Waker>,
        woken: usize,
        jobs: VecDeque<Job>,
    }

    impl Service {
        fn new() -> Self {
            use Waker::{Blocks, Returns};

            Self {
                published: Published::new(0),
                tasks: Mutex::new(Tasks {
                    waiting: vec![(1, Returns), (2, Blocks), (2, Returns)],
                    due: VecDeque::new(),
                    woken: 0,
                    jobs: VecDeque::new(),
                }),
                changed: Condvar::new(),
            }
        }

        /// Runs jobs until the tasks have been woken.
        fn work(&self) {
            loop {
                let mut tasks = lock!(self.tasks);
                while tasks.jobs.is_empty() && tasks.woken < OTHERS {
                    tasks = self.changed.wait(tasks).unwrap();
                }
                let Some(job) = tasks.jobs.pop_front() else {
                    return;
                };
                drop(tasks);
                job();
            }
        }
    }

    impl Publisher for Service {
        type Update = u8;

        fn published(&self) -> &Published<u8> {
            &self.published
        }

        fn wake_tasks(&self, update: u8) {
            let mut tasks = lock!(self.tasks);
            let Tasks { waiting, due, .. } = &mut *tasks;
            waiting.retain(|(awaited, waker)| {
                if *awaited <= update {
                    due.push_back(*waker);
                }
                *awaited > update
            });
            while let Some(waker) = tasks.due.pop_front() {
                if waker == Waker::Returns {
                    tasks.woken += 1;
                    self.changed.notify_all();
                }
                while waker == Waker::Blocks && tasks.woken < OTHERS {
                    tasks = self.changed.wait(tasks).unwrap();
                }
                // As in `waiters`, each waker is taken under the lock and woken without it.
                drop(tasks);
                tasks = lock!(self.tasks);
            }
        }

        fn run_elsewhere(&self, job: Job) {
            lock!(self.tasks).jobs.push_back(job);
            self.changed.notify_all();
        }
    }

    /// Two passes have made an update each, and a call publishes one of them itself. If a task were not woken, loom
    /// would find an execution that never ends.
    #[test]
    fn every_task_is_woken_beside_one_that_blocks() {
        for called in [1, 2] {
            let mut bounded = Builder::new();
            bounded.preemption_bound = Some(2);
            bounded.check(move || {
                let service = Arc::new(Service::new());
                let passes = [1, 2].map(|update| {
                    let service = Arc::clone(&service);
                    thread::spawn(move || {
                        if let Some(job) = service.to_publish(update) {
                            service.run_elsewhere(job);
                        }
                        service.work();
                    })
                });
                service.publish(called);
                for pass in passes {
                    pass.join().unwrap();
                }
                assert_eq!(lock!(service.published.0).done, 2);
                assert!(lock!(service.tasks).jobs.is_empty());
            });
        }
    }
}
