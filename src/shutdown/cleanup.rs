//! Runs the tasks of a stop: hooks in the lame-duck phase, and after nothing is in flight any more,
//! the joining of the workers and the cleanup steps.

use std::{
    future::{pending, poll_fn},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use tokio::time::{self, Instant};

use super::{
    Lifecycle, Shared,
    state::{ClosingStage, LEAST_TIMEOUT},
};
use crate::{
    background::{drop_each, shielded},
    config::plan::instant_after,
    events::Event,
    phase::Phase,
    report::{TaskKind, TaskOutcome},
    tasks::list::{ABORT_TIME, Job, Registration},
};

/// Belongs to a task that runs a worker, a hook or a step. When the task is dropped before it has come to its end,
/// because it was aborted or its runtime ends, this records and logs it. A hook or step that has not begun is registered
/// again if there is still time for it.
///
/// It must be dropped after the future of the worker, hook or step.
pub(crate) struct Spawned {
    pub(crate) shared: Shared,
    key: usize,
    /// What has not begun.
    waiting: Option<Registration>,
}

impl Spawned {
    /// For a worker, which has begun.
    pub(crate) fn worker(shared: Shared, key: usize) -> Self {
        let waiting = None;
        Self {
            shared,
            key,
            waiting,
        }
    }

    fn new(shared: Shared, registration: Registration) -> Self {
        Self {
            shared,
            key: registration.key,
            waiting: Some(registration),
        }
    }

    /// Records that the hook or step begins, and returns it.
    fn begin(&mut self) -> Option<Job> {
        let registration = self.waiting.take()?;
        self.shared.work.began(self.key);
        Some(registration.job)
    }

    /// Records how the task ended.
    pub(crate) fn end(&self, outcome: TaskOutcome) {
        self.shared.task_ended(self.key, outcome);
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let outcome = match self.waiting.take() {
            Some(registration) => {
                if self.shared.work.put_back(registration) {
                    // A driver has to run it.
                    self.shared.notify();
                    return;
                }
                TaskOutcome::NotRun
            }
            None => TaskOutcome::Cut,
        };
        // Changes nothing if it was recorded already how the task ended.
        self.end(outcome);
    }
}

impl Lifecycle {
    /// Starts the hooks of the lame-duck phase. They run during the phase and are cut at its end.
    pub(super) fn start_hooks(self: &Arc<Self>) {
        for hook in self.work.take_hooks() {
            let mut phases = self.phases();
            let (key, timeout) = (hook.key, hook.timeout);
            let mut spawned = Spawned::new(self.clone(), hook);
            let handle = tokio::spawn(async move {
                let Some(mut job) = spawned.begin() else {
                    return;
                };
                let outcome = tokio::select! {
                    biased;
                    outcome = &mut job => outcome,
                    () = time::sleep(timeout) => TaskOutcome::Cut,
                    _ = phases.wait_for(|phase| *phase >= Phase::Draining) => TaskOutcome::Cut,
                };
                // A destructor of the hook may panic.
                shielded(|| drop(job));
                spawned.end(outcome);
            });
            self.work.spawned(key, handle.abort_handle());
        }
    }

    /// When the cleanup has to be finished, if it has begun.
    pub(super) fn cleanup_deadline(&self) -> Option<Instant> {
        let state = self.state();
        let shutdown = state.shutdown.as_ref()?;
        debug_assert!(
            shutdown.cleanup.is_none() || shutdown.closing_stage == ClosingStage::Servers
        );
        shutdown.cleanup.as_ref().map(|_| shutdown.end)
    }

    /// Joins the workers, and then runs the steps one after another. If this future is dropped because its runtime
    /// ends, the next driver goes on from there.
    ///
    /// Only the driver may poll it: the end of a task notifies the driver and wakes nothing else.
    pub(super) async fn clean_up(self: Arc<Self>, deadline: Instant) {
        self.join_hooks().await;
        // The timeline cuts them when their time is over.
        self.all_end(TaskKind::Worker).await;
        // No timeout is longer than the time that is left, so that a step with an infinite timeout
        // leaves the other steps their shares.
        let most = deadline.saturating_duration_since(Instant::now());
        loop {
            // After a change of the runtime this may be the step of the former one. It may block its thread there.
            self.join_step().await;
            let Some((step, rest)) = self.work.take_step() else {
                return;
            };
            let rest = rest.into_iter().map(|timeout| timeout.min(most));
            let timeout = share(deadline, step.timeout.min(most), rest);
            let key = step.key;
            let until = instant_after(Instant::now(), timeout);
            self.work.await_until(TaskKind::Cleanup, until);
            let mut spawned = Spawned::new(self.clone(), step);
            let handle = tokio::spawn(async move {
                if let Some(job) = spawned.begin() {
                    let outcome = job.await;
                    spawned.end(outcome);
                }
            });
            self.work.spawned(key, handle.abort_handle());
            if self.work.is_put_back(key) {
                // The runtime takes no more tasks, and is about to drop this one.
                pending::<()>().await;
            }
        }
    }

    /// Waits for hooks that have not yet noticed the end of the delay. A hook that has never been
    /// polled gets its first poll here.
    async fn join_hooks(&self) {
        let kind = TaskKind::LameDuck;
        let until = abort_deadline();
        // A hook that is dropped later must not run beside the workers and the steps.
        self.work.await_until(kind, until);
        if !self.ends_by(kind, until).await {
            self.cut_tasks(kind);
        }
    }

    /// Waits for the step that is in a runtime until its time is over, and then cuts it.
    async fn join_step(&self) {
        let kind = TaskKind::Cleanup;
        let Some(until) = self.work.waits_until(kind) else {
            return;
        };
        if self.ends_by(kind, until).await {
            return;
        }
        self.work.abort(kind);
        // A step that blocks its thread does not end.
        if !self.ends_by(kind, abort_deadline()).await {
            self.cut_tasks(kind);
        }
    }

    /// As [`all_end`](Self::all_end), until the deadline. Returns whether they have ended.
    async fn ends_by(&self, kind: TaskKind, deadline: Instant) -> bool {
        let ended = time::timeout_at(deadline, self.all_end(kind)).await;
        ended.is_ok()
    }

    /// Waits until the tasks of this kind that are in a runtime have ended.
    async fn all_end(&self, kind: TaskKind) {
        poll_fn(|_| {
            if self.work.awaits(kind) {
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        })
        .await;
    }

    /// Aborts the tasks of this kind, and records them as cut.
    fn cut_tasks(&self, kind: TaskKind) {
        self.work.abort(kind);
        for key in self.work.keys_awaited(kind) {
            self.task_ended(key, TaskOutcome::Cut);
        }
    }

    /// Drops the hooks and steps that have not been spawned when the service has stopped. Their futures may keep the
    /// lifecycle alive.
    pub(super) fn drop_jobs(&self) {
        drop_each(self.work.take_jobs().into_iter().flatten());
    }

    /// Records how a task ended, and logs it.
    fn task_ended(&self, key: usize, outcome: TaskOutcome) {
        let before_stop = self.phase() < Phase::Draining;
        if let Some(task) = self.work.ended(key, outcome, before_stop) {
            self.log_event(Event::Task(Box::new(task)));
        }
        // The cleanup may have waited for it. The lame-duck phase does not end early before its last hook has ended,
        // and this may be that hook. The phase is read after the end was recorded, as in `Work::release`.
        if self.phase() >= Phase::Closing || self.policy().leave_early.is_on() {
            self.notify();
        }
    }
}

/// Until when to wait for a task that is aborted now.
fn abort_deadline() -> Instant {
    instant_after(Instant::now(), ABORT_TIME)
}

/// The time that a step has. It has its timeout if the timeouts of all remaining steps fit before
/// the deadline, and otherwise its proportional share of the time that is left.
fn share(deadline: Instant, timeout: Duration, rest: impl Iterator<Item = Duration>) -> Duration {
    let left = deadline.saturating_duration_since(Instant::now());
    let asked = rest.fold(timeout, Duration::saturating_add);
    let timeout = if asked <= left {
        timeout
    } else {
        left.mul_f64(timeout.as_secs_f64() / asked.as_secs_f64())
    };
    timeout.max(LEAST_TIMEOUT)
}

#[cfg(all(test, feature = "signal", not(tower_graceful_loom)))]
mod tests {
    use std::{future::pending, sync::Arc};

    use super::*;
    use crate::{
        handle::graceful::Graceful,
        report::{Outcome, Report, Trigger},
    };

    const SECOND: Duration = Duration::from_secs(1);

    fn stop(graceful: &Graceful) {
        graceful.shared().signal(Trigger::Terminate);
    }

    fn skip_phase(graceful: &Graceful) {
        graceful.shared().signal(Trigger::Interrupt);
    }

    async fn report(graceful: &Graceful) -> Report {
        graceful.stopped().await;
        graceful.shared().report().unwrap()
    }

    fn outcomes(report: &Report) -> Vec<TaskOutcome> {
        report.tasks().iter().map(|it| it.outcome.clone()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_further_sigint_abandons_the_steps_at_once() {
        let graceful = Graceful::new();
        graceful.cleanup("done", SECOND, async {}).unwrap();
        let (running, waiting) = (pending::<()>(), pending::<()>());
        graceful.cleanup("running", SECOND * 9, running).unwrap();
        graceful.cleanup("waiting", SECOND * 9, waiting).unwrap();
        stop(&graceful);
        time::sleep(SECOND).await;
        assert_eq!(graceful.phase(), Phase::Closing);
        skip_phase(&graceful);
        assert_eq!(graceful.phase(), Phase::Stopped, "before it returns");
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Abandoned);
        assert_eq!(report.duration(), SECOND);
        assert_eq!(report.cleanup_time(), SECOND);
        assert_eq!(
            outcomes(&report),
            [TaskOutcome::Done, TaskOutcome::Cut, TaskOutcome::NotRun]
        );
        time::sleep(SECOND).await;
        #[cfg(feature = "signal")]
        assert!(
            graceful.shared().has_ended(),
            "the runtime has dropped the step"
        );
    }

    /// The watchdog ends the process, because `main` would wait for such a thread.
    #[cfg(feature = "signal")]
    #[test]
    fn a_worker_or_step_that_blocks_its_thread_has_not_ended_when_it_was_cut() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        for is_worker in [true, false] {
            let graceful = Graceful::builder()
                .drain_delay(Duration::ZERO)
                .worker_timeout(SECOND / 2)
                .build()
                .unwrap();
            let (release, blocked) = std::sync::mpsc::channel::<()>();
            let (begins, begun) = std::sync::mpsc::channel();
            let block = async move {
                begins.send(()).unwrap();
                let _ = blocked.recv();
            };
            let report = runtime.block_on(async {
                if is_worker {
                    graceful.worker("blocks", |_| block).unwrap();
                    // If it were aborted before its first poll, it would not block.
                    begun.recv().unwrap();
                } else {
                    graceful.cleanup("blocks", SECOND / 2, block).unwrap();
                }
                graceful.shutdown();
                report(&graceful).await
            });
            assert_eq!(outcomes(&report), [TaskOutcome::Cut]);
            assert!(!graceful.shared().has_ended());
            #[cfg(unix)]
            assert!(graceful.shared().describe_end().unwrap().contains("blocks"));
            drop(release);
            let deadline = Instant::now() + SECOND * 10;
            while !graceful.shared().has_ended() {
                assert!(Instant::now() < deadline, "it has not ended");
                std::thread::yield_now();
            }
        }
    }

    /// Such a hook may come to its end while the steps run.
    #[test]
    fn a_hook_that_blocks_its_thread_when_the_cleanup_begins_is_cut() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let graceful = Graceful::builder().drain_delay(SECOND / 8).build().unwrap();
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let block = async move {
            let _ = blocked.recv();
        };
        graceful.on_lame_duck("blocks", SECOND, block).unwrap();
        let shared = Arc::clone(graceful.shared());
        let step = async move {
            drop(release);
            while shared.work.tasks()[0].is_running() {
                tokio::task::yield_now().await;
            }
        };
        graceful.cleanup("step", SECOND * 9, step).unwrap();
        let report = runtime.block_on(async {
            graceful.shutdown();
            report(&graceful).await
        });
        assert_eq!(outcomes(&report), [TaskOutcome::Cut, TaskOutcome::Done]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_hook_whose_destructor_panics_has_ended() {
        struct Landmine;

        impl Drop for Landmine {
            fn drop(&mut self) {
                std::panic::resume_unwind(Box::new("stepped on"));
            }
        }

        let graceful = Graceful::new();
        let landmine = Landmine;
        let hook = async move {
            let _kept = landmine;
            pending::<()>().await;
        };
        graceful.on_lame_duck("hook", SECOND, hook).unwrap();
        stop(&graceful);
        time::sleep(SECOND * 2).await;
        assert!(!graceful.shared().work.has_hook());
        assert_eq!(outcomes(&report(&graceful).await), [TaskOutcome::Cut]);
    }

    /// If it were registered again, it would run beside the steps.
    #[tokio::test(start_paused = true)]
    async fn a_hook_that_is_dropped_after_the_wait_for_hooks_is_not_registered_again() {
        for is_late in [false, true] {
            let graceful = Graceful::new();
            graceful.on_lame_duck("hook", SECOND, async {}).unwrap();
            let shared = graceful.shared();
            let [hook] = shared.work.take_hooks().try_into().ok().unwrap();
            let spawned = Spawned::new(Arc::clone(shared), hook);
            let mut joins = tokio_test::task::spawn(shared.join_hooks());
            tokio_test::assert_pending!(joins.poll());
            if is_late {
                time::advance(ABORT_TIME).await;
            }
            drop(spawned);
            assert_eq!(shared.work.take_hooks().is_empty(), is_late);
        }
    }

    /// The driver runs on a runtime that nothing drives, and the worker on another one.
    #[test]
    fn a_worker_that_was_given_up_is_dropped_without_the_driver() {
        let [first, other] = [0, 1].map(|threads| {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            if threads == 0 {
                builder = tokio::runtime::Builder::new_current_thread();
            }
            builder.worker_threads(1).enable_all().build().unwrap()
        });
        let graceful = first.block_on(async { Graceful::new() });
        let held = Arc::new(());
        let kept = Arc::clone(&held);
        let endless = |_| async move {
            pending::<()>().await;
            drop(kept);
        };
        other.block_on(async { graceful.worker("endless", endless).unwrap() });
        stop(&graceful);
        let deadline = std::time::Instant::now() + SECOND * 10;
        while Arc::strong_count(&held) > 1 {
            assert!(std::time::Instant::now() < deadline, "the worker goes on");
            if graceful.phase() == Phase::Closing {
                skip_phase(&graceful);
            }
            std::thread::yield_now();
        }
        assert_eq!(graceful.phase(), Phase::Stopped);
    }

    #[tokio::test(start_paused = true)]
    async fn a_further_sigint_abandons_the_workers_at_once() {
        let graceful = Graceful::new();
        let held = Arc::new(());
        let kept = Arc::clone(&held);
        let endless = |_| async move {
            pending::<()>().await;
            drop(kept);
        };
        graceful.worker("endless", endless).unwrap();
        graceful.cleanup("step", SECOND, async {}).unwrap();
        stop(&graceful);
        time::sleep(SECOND).await;
        skip_phase(&graceful);
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Abandoned);
        assert_eq!(report.duration(), SECOND);
        assert_eq!(outcomes(&report), [TaskOutcome::Cut, TaskOutcome::NotRun]);
        assert_eq!(report.remaining().workers, 1);
        time::sleep(SECOND).await;
        assert_eq!(Arc::strong_count(&held), 1, "the worker has been dropped");
    }

    /// The driver is not polled any more once the service has stopped.
    #[test]
    fn a_step_that_was_not_run_is_dropped_with_the_runtime_of_the_driver() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let graceful = Graceful::new();
        let lifecycle = Arc::downgrade(graceful.shared());
        runtime.block_on(async {
            let kept = graceful.clone();
            let step = async move { drop(kept) };
            graceful.cleanup("step", SECOND, step).unwrap();
            let _hold = graceful.hold("hold");
            stop(&graceful);
            time::sleep(SECOND).await;
            skip_phase(&graceful);
            time::sleep(SECOND / 8).await;
            skip_phase(&graceful);
            assert_eq!(graceful.phase(), Phase::Stopped);
        });
        drop(graceful);
        assert!(lifecycle.upgrade().is_some(), "the step keeps it");
        drop(runtime);
        assert!(lifecycle.upgrade().is_none());
    }

    /// If it tried again, the step would be dropped and put back again and again.
    #[test]
    fn a_driver_whose_runtime_takes_no_more_tasks_leaves_the_step_to_the_next() {
        let graceful = Graceful::new();
        graceful.cleanup("step", SECOND, async {}).unwrap();
        let shared = Arc::clone(graceful.shared());
        let (ends, ended) = std::sync::mpsc::channel();
        let driver = std::thread::spawn(move || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_time().build().unwrap();
            let handle = runtime.handle().clone();
            drop(runtime);
            let _there = handle.enter();
            let deadline = Instant::now() + SECOND;
            let mut cleaning = tokio_test::task::spawn(shared.clone().clean_up(deadline));
            tokio_test::assert_pending!(cleaning.poll());
            assert_eq!(shared.work.steps(), 1);
            ends.send(()).unwrap();
        });
        ended.recv_timeout(SECOND * 20).expect("it hangs");
        driver.join().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_sigint_that_ends_the_drain_does_not_end_the_cleanup() {
        let graceful = Graceful::new();
        let hold = graceful.hold("hold");
        let step = time::sleep(SECOND);
        graceful.cleanup("step", SECOND * 2, step).unwrap();
        stop(&graceful);
        time::sleep(SECOND).await;
        skip_phase(&graceful);
        assert_eq!(graceful.phase(), Phase::Closing);
        let report = report(&graceful).await;
        drop(hold);
        assert_eq!(report.outcome(), Outcome::Forced);
        assert_eq!(outcomes(&report), [TaskOutcome::Done]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sigint_at_the_moment_the_last_work_ends_does_not_skip_the_cleanup() {
        let graceful = Graceful::new();
        let hold = graceful.hold("hold");
        graceful.cleanup("step", SECOND, async {}).unwrap();
        stop(&graceful);
        skip_phase(&graceful);
        assert_eq!(graceful.phase(), Phase::Closing);
        time::sleep(SECOND / 8).await;
        // The cut hold ends, and the timeline has not checked yet.
        drop(hold);
        skip_phase(&graceful);
        let report = report(&graceful).await;
        assert_eq!(report.outcome(), Outcome::Forced);
        assert_eq!(outcomes(&report), [TaskOutcome::Done]);
    }
}
