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
//!
//! # A step whose runtime ends
//!
//! A hook or step is taken from the list and spawned, and then its handle is recorded. Meanwhile its runtime may end,
//! and drops the task before it has begun. Each of these calls decides under the lock of the list.
//!
//! 1. *The next driver finds it.* It is marked as spawned in the critical section in which it is taken, and as registered
//!    in the one in which it is put back. So once it is not awaited any more, it is in the list, or it is
//!    recorded how it ended. Model: `a_step_whose_runtime_ends_is_taken_by_the_next_driver`.
//! 2. *Once the service has stopped, nothing is kept and nothing runs on.* [`give_up`](Work::give_up) sets `given_up`, aborts
//!    what is in a runtime, and the caller drops what is in the list. From then on `put_back` puts nothing into the
//!    list, and `spawned` aborts. Model: `a_step_that_is_given_up_is_dropped_and_aborted`.
//!
//! The models fail if a step is marked as registered before the critical section in which it is put back, if `put_back`
//! or `spawned` does not look at `given_up`, and if `give_up` aborts before it sets that.

use std::{cmp::Reverse, collections::VecDeque, iter, time::Duration};

use slab::Slab;
use tokio::{task::AbortHandle, time::Instant};

use super::{
    awaited::Awaited,
    list::{Job, List, Name, Registration, Stage, Task},
};
use crate::{
    background::shielded,
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

    /// The tasks that have not ended.
    pub(crate) fn not_ended(&self) -> Awaited {
        let mut awaited = Awaited::default();
        let list = lock!(self.list);
        for task in list.tasks.values().filter(|task| task.ended.is_none()) {
            awaited.add(task.kind.as_str(), iter::once(&task.name));
        }
        awaited
    }

    /// Registers a hook or a step. Returns false if hooks or steps are no longer accepted.
    pub(crate) fn register(&self, kind: TaskKind, name: Name, timeout: Duration, job: Job) -> bool {
        let mut list = lock!(self.list);
        if list.registered(kind).closed {
            return false;
        }
        let key = list.enter(name, kind);
        let registration = Registration { key, timeout, job };
        list.registered(kind).jobs.push_back(registration);
        true
    }

    /// Takes the hooks that have not been spawned, for the caller to spawn. From now on no hook is accepted.
    pub(crate) fn take_hooks(&self) -> Vec<Registration> {
        let mut list = lock!(self.list);
        list.hooks.closed = true;
        let hooks: Vec<_> = std::mem::take(&mut list.hooks.jobs).into();
        for hook in &hooks {
            list.spawns(hook.key);
        }
        hooks
    }

    /// Takes the next step, for the caller to spawn, with the timeouts of those that follow it. If there is none, no
    /// step is accepted from now on.
    pub(crate) fn take_step(&self) -> Option<(Registration, Vec<Duration>)> {
        let mut list = lock!(self.list);
        let Some(step) = list.steps.jobs.pop_front() else {
            list.steps.closed = true;
            return None;
        };
        list.spawns(step.key);
        let rest = list.steps.jobs.iter().map(|step| step.timeout).collect();
        Some((step, rest))
    }

    /// Registers a hook or step again, because its runtime has ended before it began. Drops it and returns false if
    /// its time is over, if it was recorded how it ended, or if the service has stopped.
    pub(crate) fn put_back(&self, registration: Registration) -> bool {
        let mut list = lock!(self.list);
        let given_up = list.given_up;
        let key = registration.key;
        let in_time = |task: &&mut Task| task.until.is_none_or(|until| Instant::now() < until);
        let task = list.tasks.get_mut(&key).filter(|it| it.is_awaited());
        let Some(task) = task.filter(in_time).filter(|_| !given_up) else {
            drop(list);
            shielded(|| drop(registration));
            return false;
        };
        let handle = task.handle.take();
        task.stage = Stage::Registered;
        task.until = None;
        let kind = task.kind;
        // Steps are spawned one at a time, so this one was the first.
        list.registered(kind).jobs.push_front(registration);
        drop(list);
        drop(handle);
        true
    }

    /// Registers a worker. Returns its key, under which the caller must spawn it, or `None` if workers are no longer
    /// accepted.
    pub(crate) fn add_worker(&self, name: Name) -> Option<usize> {
        let mut list = lock!(self.list);
        let accepts = !list.workers_closed;
        accepts.then(|| list.enter(name, TaskKind::Worker))
    }

    /// Records the handle of a task that has been spawned.
    pub(crate) fn spawned(&self, key: usize, handle: AbortHandle) {
        let mut list = lock!(self.list);
        let given_up = list.given_up;
        // It may have ended before its handle is passed on.
        let task = list.tasks.get_mut(&key).filter(|it| it.is_awaited());
        match task {
            Some(task) if !given_up => task.handle = Some(handle),
            _ => {
                drop(list);
                // It may also have been recorded as cut.
                handle.abort();
            }
        }
    }

    /// Records that a hook or step begins to run.
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
        let failed = outcome != TaskOutcome::EndedEarly;
        let handle = task.end(outcome);
        let task = task.clone();
        let unlisted = if ends_early {
            list.unlist(key, failed)
        } else {
            None
        };
        drop(list);
        drop((handle, unlisted));
        Some(task)
    }

    /// Whether a task of this kind is in a runtime and has not ended.
    pub(crate) fn awaits(&self, kind: TaskKind) -> bool {
        lock!(self.list).awaited(kind).next().is_some()
    }

    /// The keys of the tasks that are in a runtime and have not ended.
    pub(crate) fn keys_awaited(&self, kind: TaskKind) -> Vec<usize> {
        let list = lock!(self.list);
        list.awaited(kind).map(|(key, _)| *key).collect()
    }

    /// Sets until when the stop waits for the tasks of this kind that are in a runtime. If these are the workers, no
    /// worker is accepted from now on.
    pub(crate) fn await_until(&self, kind: TaskKind, until: Instant) {
        let mut list = lock!(self.list);
        list.workers_closed |= kind == TaskKind::Worker;
        let tasks = list.tasks.values_mut();
        for task in tasks.filter(|task| task.kind == kind && task.is_awaited()) {
            task.until = Some(until);
        }
    }

    /// Whether the step is registered again, because the runtime in which it was spawned takes no more tasks.
    pub(crate) fn is_put_back(&self, key: usize) -> bool {
        let list = lock!(self.list);
        let task = list.tasks.get(&key);
        task.is_some_and(|task| task.stage == Stage::Registered)
    }

    /// When the stop no longer waits for the tasks of this kind that are in a runtime. `None` if there are none, or
    /// if it is not known for one of them.
    pub(crate) fn waits_until(&self, kind: TaskKind) -> Option<Instant> {
        let list = lock!(self.list);
        let until: Option<Vec<_>> = list.awaited(kind).map(|(_, task)| task.until).collect();
        until?.into_iter().max()
    }

    /// Aborts the tasks of this kind.
    pub(crate) fn abort(&self, kind: TaskKind) {
        let handles: Vec<_> = {
            let list = lock!(self.list);
            let handles = list.awaited(kind).map(|(_, task)| task.handle.clone());
            handles.flatten().collect()
        };
        for handle in handles {
            handle.abort();
        }
    }

    /// Whether there is a worker, a step or a hook to run or wait for once nothing is in flight. If there is none,
    /// nothing is accepted from now on either.
    pub(crate) fn has_cleanup_or_closes(&self) -> bool {
        let mut list = lock!(self.list);
        if list.tasks.values().any(|task| task.ended.is_none()) {
            return true;
        }
        list.close();
        false
    }

    /// Accepts nothing from now on, and aborts everything that has not ended.
    pub(crate) fn give_up(&self) {
        {
            let mut list = lock!(self.list);
            list.close();
            list.given_up = true;
        }
        for kind in [TaskKind::LameDuck, TaskKind::Worker, TaskKind::Cleanup] {
            self.abort(kind);
        }
    }

    /// Takes the hooks and steps that have not been spawned, for the caller to drop.
    pub(crate) fn take_jobs(&self) -> [VecDeque<Registration>; 2] {
        let mut list = lock!(self.list);
        [TaskKind::LameDuck, TaskKind::Cleanup]
            .map(|kind| std::mem::take(&mut list.registered(kind).jobs))
    }

    /// How many steps have not been spawned.
    pub(crate) fn steps(&self) -> usize {
        lock!(self.list).steps.jobs.len()
    }

    /// The sum of the timeouts of the steps that have not been spawned.
    pub(crate) fn asked_by_steps(&self) -> Duration {
        let list = lock!(self.list);
        let timeouts = list.steps.jobs.iter().map(|step| step.timeout);
        timeouts.fold(Duration::ZERO, Duration::saturating_add)
    }

    /// Whether there is a hook that is not over.
    pub(crate) fn has_hook(&self) -> bool {
        let list = lock!(self.list);
        let mut tasks = list.tasks.values();
        tasks.any(|task| task.kind == TaskKind::LameDuck && task.ended.is_none())
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
    use std::{
        future::pending,
        sync::{Arc, LazyLock, Weak},
    };

    use loom::{model, thread};
    use tokio::{
        runtime::{self, Runtime},
        task::{JoinHandle, yield_now},
    };

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

    /// Nothing drives it, except `is_aborted`.
    static RUNTIME: LazyLock<Runtime> =
        LazyLock::new(|| runtime::Builder::new_current_thread().build().unwrap());

    fn spawn() -> JoinHandle<()> {
        RUNTIME.spawn(pending())
    }

    /// Whether the task was aborted. Ends it in any case.
    fn is_aborted(task: &JoinHandle<()>) -> bool {
        let runs = || {
            RUNTIME.block_on(async {
                for _ in 0..4 {
                    yield_now().await;
                }
            });
        };
        runs();
        let aborted = task.is_finished();
        task.abort();
        runs();
        aborted
    }

    /// Work with a step that a driver has taken, and a reference that the step keeps.
    fn taken() -> (Arc<Work>, Registration, Arc<()>) {
        let work = Arc::new(Work::default());
        let held = Arc::new(());
        let kept = Arc::clone(&held);
        let job = Box::pin(async move {
            drop(kept);
            TaskOutcome::Done
        });
        let (kind, name) = (TaskKind::Cleanup, "step".into());
        assert!(work.register(kind, name, Duration::ZERO, job));
        let (step, _) = work.take_step().unwrap();
        (work, step, held)
    }

    /// As the runtime does when it drops the task of a step that has not begun.
    fn ends(work: &Work, step: Registration) -> bool {
        let key = step.key;
        let is_back = work.put_back(step);
        if !is_back {
            work.ended(key, TaskOutcome::NotRun, false);
        }
        is_back
    }

    #[test]
    fn a_step_whose_runtime_ends_is_taken_by_the_next_driver() {
        model(|| {
            let (work, step, held) = taken();
            let key = step.key;
            let [first, second] = [(); 2].map(|()| spawn());
            let runtime = {
                let work = Arc::clone(&work);
                thread::spawn(move || assert!(ends(&work, step)))
            };
            work.spawned(key, first.abort_handle());
            // The next driver waits until the step is not awaited any more.
            if work.awaits(TaskKind::Cleanup) {
                runtime.join().unwrap();
            }
            let (step, _) = work.take_step().expect("the step is lost");
            work.spawned(key, second.abort_handle());
            assert_eq!(Arc::strong_count(&held), 2);
            work.give_up();
            drop(step);
            is_aborted(&first);
            assert!(is_aborted(&second), "the handle of the first task is kept");
        });
    }

    #[test]
    fn a_step_that_is_given_up_is_dropped_and_aborted() {
        for begins in [false, true] {
            model(move || {
                let (work, step, held) = taken();
                let key = step.key;
                let task = spawn();
                let handle = task.abort_handle();
                let driver = {
                    let work = Arc::clone(&work);
                    thread::spawn(move || work.spawned(key, handle))
                };
                let runtime = {
                    let work = Arc::clone(&work);
                    thread::spawn(move || {
                        if begins {
                            work.began(key);
                        } else {
                            ends(&work, step);
                        }
                    })
                };
                work.give_up();
                drop(work.take_jobs());
                driver.join().unwrap();
                runtime.join().unwrap();
                assert_eq!(Arc::strong_count(&held), 1, "the list keeps the step");
                let aborted = is_aborted(&task);
                // If it has not begun, its runtime has dropped it.
                assert!(aborted || !begins, "the task runs on");
            });
        }
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

#[cfg(all(test, not(tower_graceful_loom)))]
mod tests {
    use std::{future::pending, sync::Arc};

    use tokio::time::advance;

    use super::{super::list::ABORT_TIME, *};

    const SECOND: Duration = Duration::from_secs(1);

    /// Takes a step whose timeout begins now, and puts it back after `event`. The second value is whether it is
    /// registered again.
    fn put_back(timeout: Duration, event: impl FnOnce(&Work, usize)) -> (Work, bool) {
        let work = Work::default();
        let held = Arc::new(());
        let kept = Arc::clone(&held);
        let job = Box::pin(async move {
            pending::<()>().await;
            drop(kept);
            TaskOutcome::Done
        });
        assert!(work.register(TaskKind::Cleanup, "step".into(), timeout, job));
        let (step, _) = work.take_step().unwrap();
        let key = step.key;
        work.await_until(TaskKind::Cleanup, Instant::now() + timeout);
        assert!(work.awaits(TaskKind::Cleanup) && !work.is_put_back(key));
        event(&work, key);
        let is_back = work.put_back(step);
        assert_eq!(work.is_put_back(key), is_back);
        assert_eq!(Arc::strong_count(&held) == 1, !is_back);
        (work, is_back)
    }

    #[test]
    fn a_step_that_is_put_back_is_taken_again_with_a_time_of_its_own() {
        let (work, is_back) = put_back(SECOND, |_, _| ());
        assert!(is_back && !work.awaits(TaskKind::Cleanup));
        assert!(work.has_cleanup_or_closes());
        assert!(work.take_step().is_some());
        assert_eq!(work.waits_until(TaskKind::Cleanup), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_that_is_put_back_too_late_is_dropped() {
        let time_is_over = put_back(Duration::ZERO, |_, _| ());
        let has_stopped = put_back(SECOND, |work, _| work.give_up());
        let cut = |work: &Work, key| drop(work.ended(key, TaskOutcome::Cut, false));
        let was_cut = put_back(SECOND, cut);
        for (work, is_back) in [time_is_over, has_stopped, was_cut] {
            assert!(!is_back && work.take_step().is_none());
        }
    }

    #[test]
    fn no_worker_is_accepted_after_the_time_of_the_workers_has_begun() {
        let work = Work::default();
        assert!(work.add_worker("worker".into()).is_some());
        let until = Instant::now() + SECOND;
        work.await_until(TaskKind::Cleanup, until);
        assert_eq!(work.waits_until(TaskKind::Worker), None);
        work.await_until(TaskKind::Worker, until);
        assert_eq!(work.waits_until(TaskKind::Worker), Some(until));
        assert!(work.add_worker("too late".into()).is_none());
    }

    #[test]
    fn a_drain_is_woken_by_the_end_of_the_last_hold() {
        let work = Work::default();
        let [first, last] = [(); 2].map(|()| work.hold("work".into()));
        assert!(!work.release(first, || Phase::Draining));
        assert!(work.release(last, || Phase::Draining));
        let before = work.hold("work".into());
        assert!(!work.release(before, || Phase::LameDuck));
    }

    /// An abort takes that long where the task does not block its thread.
    #[tokio::test(start_paused = true)]
    async fn a_task_that_completes_more_than_50_ms_after_its_time_was_cut() {
        let late = Duration::from_millis(1);
        for (after, expected) in [
            (ABORT_TIME, TaskOutcome::Done),
            (ABORT_TIME + late, TaskOutcome::Cut),
        ] {
            let work = Work::default();
            let key = work.add_worker("worker".into()).unwrap();
            work.await_until(TaskKind::Worker, Instant::now());
            advance(after).await;
            let task = work.ended(key, TaskOutcome::Done, false).unwrap();
            assert_eq!(task.ended.unwrap().1, expected);
        }
    }

    /// The abort does not find it, because its handle is passed on later.
    #[tokio::test]
    async fn a_worker_that_was_given_up_while_it_was_spawned_is_aborted() {
        let events: [fn(&Work, usize); 2] = [
            |work, _| work.give_up(),
            |work, key| drop(work.ended(key, TaskOutcome::Cut, false)),
        ];
        for event in events {
            let work = Work::default();
            let key = work.add_worker("worker".into()).unwrap();
            let worker = tokio::spawn(pending::<()>());
            event(&work, key);
            work.spawned(key, worker.abort_handle());
            assert!(worker.await.unwrap_err().is_cancelled());
        }
    }
}
