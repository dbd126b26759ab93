//! The table of holds, and of the tasks that are registered to run during a shutdown.
//!
//! The timeline decides when a task runs; `handle` has the public API.
//!
//! # The last hold and the drain
//!
//! 1. *The end of the last hold is not missed.* [`release`](Work::release) removes the hold under
//!    the lock and then reads the phase. The timeline advances the phase and then counts the holds
//!    under the lock. If the removal comes first, the count is zero. If the count comes first, the
//!    lock orders the advance before the reading of the phase, so `release` sees the phase and the
//!    caller wakes the driver. Model: `the_end_of_the_last_hold_is_seen_or_wakes_the_driver`.
//! 2. *A hold that continues a request is waited for.* Such a hold begins before the request ends.
//!    [`is_idle`](Work::is_idle) checks the requests first: if they have ended, the hold is already
//!    in the count. Model: `a_hold_that_continues_a_request_is_waited_for`.
//!
//! The models fail if the phase is read before the removal, and if the holds are counted before the
//! requests are checked.

use std::{cmp::Reverse, iter, time::Duration};

use slab::Slab;
use tokio::{sync::oneshot, task::JoinHandle, time::Instant};

use super::{
    awaited::Awaited,
    list::{Job, List, Name, Registration, Task},
};
use crate::{
    phase::Phase,
    report::{CutHold, TaskKind, TaskOutcome, UnlistedWorkers},
    sync::{Mutex, lock},
};

#[derive(Default)]
pub(crate) struct Work {
    holds: Mutex<Slab<(Name, Instant)>>,
    list: Mutex<List>,
}

impl Work {
    pub(crate) fn hold(&self, name: Name) -> usize {
        lock!(self.holds).insert((name, Instant::now()))
    }

    /// Ends a hold. Returns true if a drain may be waiting for it: it was the last hold, and
    /// draining has begun. The phase is read after the hold has been removed: point 1 of the module
    /// header.
    pub(crate) fn release(&self, key: usize, phase: impl FnOnce() -> Phase) -> bool {
        let mut holds = lock!(self.holds);
        let held = holds.try_remove(key);
        let left = holds.len();
        drop(holds);
        drop(held);
        left == 0 && phase() >= Phase::Draining
    }

    /// Whether all requests have ended and there are no holds. In this order: point 2 of the module
    /// header.
    pub(crate) fn is_idle(&self, requests_are_over: impl FnOnce() -> bool) -> bool {
        requests_are_over() && self.holds() == 0
    }

    pub(crate) fn holds(&self) -> usize {
        lock!(self.holds).len()
    }

    /// The holds, oldest first.
    pub(crate) fn list_holds(&self, now: Instant) -> Vec<CutHold> {
        let mut list: Vec<_> = {
            let holds = lock!(self.holds);
            let holds = holds.iter().map(|(_, (name, begun))| CutHold {
                name: name.clone().into_owned(),
                age: now.saturating_duration_since(*begun),
            });
            holds.collect()
        };
        list.sort_by_key(|hold| Reverse(hold.age));
        list
    }

    /// The holds, and during the cleanup also the tasks that have begun and not ended. The steps run
    /// one after another, so at most one of them is named.
    pub(crate) fn awaited(&self, cleans_up: bool) -> Awaited {
        let mut awaited = Awaited::default();
        awaited.add("hold", lock!(self.holds).iter().map(|(_, (name, _))| name));
        if cleans_up {
            let list = lock!(self.list);
            let run = |task: &&Task| task.began.is_some() && task.ended.is_none();
            for task in list.tasks.values().filter(run) {
                awaited.add(task.kind.as_str(), iter::once(&task.name));
            }
        }
        awaited
    }

    /// Registers a hook or a step. Returns false if the hooks or steps have already been taken.
    pub(crate) fn register(&self, kind: TaskKind, name: Name, timeout: Duration, job: Job) -> bool {
        let mut list = lock!(self.list);
        if list.registered(kind).taken {
            return false;
        }
        let key = list.enter(name, kind, None);
        let registration = Registration { key, timeout, job };
        list.registered(kind).jobs.push(registration);
        true
    }

    /// Takes the hooks or the steps, once.
    pub(crate) fn take(&self, kind: TaskKind) -> Vec<Registration> {
        let mut list = lock!(self.list);
        let registered = list.registered(kind);
        registered.taken = true;
        std::mem::take(&mut registered.jobs)
    }

    /// Registers a worker that `spawn` starts. Returns false if workers are no longer accepted. The
    /// worker must wait for its key, and must not begin without it.
    pub(crate) fn add_worker(
        &self,
        name: Name,
        spawn: impl FnOnce(oneshot::Receiver<usize>) -> JoinHandle<()>,
    ) -> bool {
        let (send_key, receive_key) = oneshot::channel();
        // Called without the lock: a runtime that shuts down drops the worker inside this call.
        let handle = spawn(receive_key);
        let mut list = lock!(self.list);
        if list.workers_closed {
            return false;
        }
        let key = list.enter(name, TaskKind::Worker, Some(Instant::now()));
        list.started(key, &handle);
        list.workers.insert(key, handle);
        drop(list);
        let _ = send_key.send(key);
        true
    }

    /// Takes the handles of the workers that have not ended. From now on no worker is accepted.
    pub(crate) fn take_workers(&self) -> Vec<(usize, JoinHandle<()>)> {
        let mut list = lock!(self.list);
        list.workers_closed = true;
        std::mem::take(&mut list.workers).into_iter().collect()
    }

    pub(crate) fn add_running_hook(&self, key: usize, handle: JoinHandle<()>) {
        let mut list = lock!(self.list);
        list.started(key, &handle);
        list.running_hooks.push((key, handle));
    }

    /// Takes the handles of the hooks that have been started.
    pub(crate) fn take_running_hooks(&self) -> Vec<(usize, JoinHandle<()>)> {
        std::mem::take(&mut lock!(self.list).running_hooks)
    }

    pub(crate) fn started(&self, key: usize, handle: &JoinHandle<()>) {
        lock!(self.list).started(key, handle);
    }

    pub(crate) fn began(&self, key: usize) {
        if let Some(task) = lock!(self.list).tasks.get_mut(&key) {
            task.began = Some(Instant::now());
        }
    }

    /// Records how a task ended. Only the first call for a task counts. Returns the task if it was
    /// recorded. A worker that ends before the stop has not been told to, so it ends early.
    pub(crate) fn ended(
        &self,
        key: usize,
        outcome: TaskOutcome,
        before_stop: bool,
    ) -> Option<Task> {
        let mut list = lock!(self.list);
        let task = list.tasks.get_mut(&key)?;
        if task.ended.is_some() {
            return None;
        }
        let ends_early = before_stop && task.kind == TaskKind::Worker;
        let outcome = match outcome {
            TaskOutcome::Done if ends_early => TaskOutcome::EndedEarly,
            outcome => outcome,
        };
        let failed = matches!(outcome, TaskOutcome::Failed(_) | TaskOutcome::Panicked(_));
        let own = task.end(outcome);
        let task = task.clone();
        let handle = list.workers.remove(&key);
        let unlisted = if ends_early {
            list.unlist(key, failed)
        } else {
            None
        };
        drop(list);
        drop((own, handle, unlisted));
        Some(task)
    }

    /// Records a task that ended without an error, but after `latest`, as cut.
    pub(crate) fn cut_if_late(&self, key: usize, latest: Instant) {
        let mut list = lock!(self.list);
        let ended = list
            .tasks
            .get_mut(&key)
            .and_then(|task| task.ended.as_mut());
        if let Some((ended, outcome @ TaskOutcome::Done)) = ended {
            if *ended > latest {
                *outcome = TaskOutcome::Cut;
            }
        }
    }

    /// Whether there is a worker, a step or an unfinished hook to run or wait for once nothing is
    /// in flight. If there is none, nothing is accepted from now on either.
    pub(crate) fn has_cleanup_or_closes(&self) -> bool {
        let mut list = lock!(self.list);
        if !list.workers.is_empty() || !list.steps.jobs.is_empty() || list.has_hook() {
            return true;
        }
        list.workers_closed = true;
        list.hooks.taken = true;
        list.steps.taken = true;
        false
    }

    /// How many steps have not been taken.
    pub(crate) fn steps(&self) -> usize {
        lock!(self.list).steps.jobs.len()
    }

    /// The sum of the timeouts of the steps.
    pub(crate) fn asked_by_steps(&self) -> Duration {
        let list = lock!(self.list);
        let timeouts = list.steps.jobs.iter().map(|step| step.timeout);
        timeouts.fold(Duration::ZERO, Duration::saturating_add)
    }

    /// A hook has not begun, or not come to its end.
    pub(crate) fn has_hook(&self) -> bool {
        lock!(self.list).has_hook()
    }

    pub(crate) fn tasks(&self) -> Vec<Task> {
        lock!(self.list).tasks.values().cloned().collect()
    }

    /// The number of workers that ended before the stop and are not in [`tasks`](Self::tasks) any
    /// more.
    pub(crate) fn unlisted(&self) -> UnlistedWorkers {
        lock!(self.list).unlisted
    }
}

#[cfg(all(test, tower_graceful_loom))]
mod models {
    use std::sync::{Arc, Weak};

    use loom::{model, thread};

    use super::*;
    use crate::sync::{AtomicBool, Ordering::Relaxed};

    type Gate = crate::admission::Gate<(), ()>;

    fn holding() -> (Arc<Gate>, Arc<Work>) {
        let gate = Gate::new(None, false, (), &Weak::new());
        (Arc::new(gate), Arc::default())
    }

    /// The check that the timeline makes.
    fn is_idle(gate: &Gate, work: &Work) -> bool {
        work.is_idle(|| gate.settled_word().is_idle())
    }

    #[test]
    fn the_end_of_the_last_hold_is_seen_or_wakes_the_driver() {
        model(|| {
            let (gate, work) = holding();
            let woken = Arc::new(AtomicBool::new(false));
            let holds = [(); 2].map(|()| work.hold("work".into()));
            let ends = holds.map(|key| {
                let (gate, work, woken) = (gate.clone(), work.clone(), woken.clone());
                thread::spawn(move || {
                    if work.release(key, || gate.phase()) {
                        woken.store(true, Relaxed);
                    }
                })
            });
            gate.advance(Phase::Draining);
            let seen = is_idle(&gate, &work);
            for end in ends {
                end.join().unwrap();
            }
            assert!(seen || woken.load(Relaxed), "the drain waits forever");
            assert!(is_idle(&gate, &work));
        });
    }

    #[test]
    fn a_hold_that_continues_a_request_is_waited_for() {
        model(|| {
            let (gate, work) = holding();
            let request = gate.admission().admit().unwrap().answered();
            gate.advance(Phase::Draining);
            let handler = {
                let work = work.clone();
                thread::spawn(move || {
                    let key = work.hold("work".into());
                    drop(request);
                    key
                })
            };
            assert!(!is_idle(&gate, &work), "the work is in flight or held");
            let key = handler.join().unwrap();
            assert!(work.release(key, || gate.phase()));
            assert!(is_idle(&gate, &work));
        });
    }
}
