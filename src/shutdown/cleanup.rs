//! Runs the tasks of a stop: hooks in the lame-duck phase, and after nothing is in flight any more,
//! the joining of the workers and the cleanup steps.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::{JoinError, JoinHandle},
    time::{self, Instant},
};

use super::{
    Lifecycle,
    state::{ABORT_TIME, ClosingStage, LEAST_TIMEOUT},
};
use crate::{
    background::shielded,
    config::plan::instant_after,
    events::Event,
    phase::Phase,
    report::{TaskKind, TaskOutcome},
};

/// A task that is aborted when this handle is dropped.
struct Job(JoinHandle<()>);

impl Job {
    /// Waits for the task until the deadline, and aborts it then. Returns whether it has ended.
    async fn ends_by(&mut self, deadline: Instant) -> bool {
        let ended = time::timeout_at(deadline, &mut self.0).await.is_ok();
        if !ended {
            self.0.abort();
        }
        ended
    }

    /// Waits until the aborted task has ended. A task that blocks its thread does not end, so the
    /// wait has a deadline.
    async fn has_aborted_by(&mut self, deadline: Instant) {
        let _: Result<Result<(), JoinError>, _> = time::timeout_at(deadline, &mut self.0).await;
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Lifecycle {
    /// Starts the hooks of the lame-duck phase. They run during the phase and are cut at its end.
    pub(super) fn start_hooks(self: &Arc<Self>) {
        for hook in self.work.take(TaskKind::LameDuck) {
            let shared = self.clone();
            let mut phases = self.phases();
            let key = hook.key;
            let handle = tokio::spawn(async move {
                shared.work.began(hook.key);
                let mut job = hook.job;
                let outcome = tokio::select! {
                    biased;
                    outcome = &mut job => outcome,
                    () = time::sleep(hook.timeout) => TaskOutcome::Cut,
                    _ = phases.wait_for(|phase| *phase >= Phase::Draining) => TaskOutcome::Cut,
                };
                // A destructor of the hook may panic.
                shielded(|| drop(job));
                shared.task_ended(hook.key, outcome);
            });
            self.work.add_running_hook(key, handle);
        }
    }

    /// Waits for hooks that have not yet noticed the end of the delay. A hook that has never been
    /// polled gets its first poll here.
    async fn join_hooks(&self) {
        let abort_deadline = abort_deadline();
        for (key, handle) in self.work.take_running_hooks() {
            if !Job(handle).ends_by(abort_deadline).await {
                self.task_ended(key, TaskOutcome::Cut);
            }
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

    /// Joins the workers, and then runs the steps one after another. If this future is dropped, the
    /// running task is aborted and the remaining ones do not run.
    pub(super) async fn clean_up(self: Arc<Self>, deadline: Instant) {
        self.join_hooks().await;
        self.join_workers(deadline).await;
        let mut steps = self.work.take(TaskKind::Cleanup);
        // No timeout is longer than the time that is left, so that a step with an infinite timeout
        // leaves the other steps their shares.
        let most = deadline.saturating_duration_since(Instant::now());
        for step in &mut steps {
            step.timeout = step.timeout.min(most);
        }
        let mut steps = steps.into_iter();
        while let Some(step) = steps.next() {
            let rest = steps.as_slice().iter().map(|step| step.timeout);
            let timeout = share(deadline, step.timeout, rest);
            self.work.began(step.key);
            let shared = self.clone();
            let mut job = Job(tokio::spawn(async move {
                let outcome = step.job.await;
                shared.task_ended(step.key, outcome);
            }));
            self.work.started(step.key, &job.0);
            let until = instant_after(Instant::now(), timeout);
            if !job.ends_by(until).await {
                job.has_aborted_by(abort_deadline()).await;
                self.task_ended(step.key, TaskOutcome::Cut);
            }
            self.record_if_late(step.key, until);
        }
    }

    async fn join_workers(&self, deadline: Instant) {
        let workers = self.work.take_workers();
        if workers.is_empty() {
            return;
        }
        let until = instant_after(Instant::now(), self.workers_share(deadline));
        // All handles are wrapped before the first wait, so that every worker is aborted if this
        // future is dropped.
        let workers: Vec<_> = workers
            .into_iter()
            .map(|(key, handle)| (key, Job(handle)))
            .collect();
        let mut cut = Vec::new();
        for (key, mut job) in workers {
            if job.ends_by(until).await {
                self.record_if_late(key, until);
            } else {
                cut.push((key, job));
            }
        }
        let abort_deadline = abort_deadline();
        for (key, mut job) in cut {
            job.has_aborted_by(abort_deadline).await;
            self.task_ended(key, TaskOutcome::Cut);
        }
    }

    /// A task that blocks its thread cannot be aborted, and may complete long after its timeout.
    /// Such a task is recorded as cut.
    fn record_if_late(&self, key: usize, until: Instant) {
        self.work.cut_if_late(key, instant_after(until, ABORT_TIME));
    }

    /// How long the cleanup waits for workers. The steps keep the time that they have asked for,
    /// but at most half of the time that is left.
    fn workers_share(&self, deadline: Instant) -> Duration {
        let left = deadline.saturating_duration_since(Instant::now());
        let most = left.saturating_sub(self.work.asked_by_steps().min(left / 2));
        self.policy().worker_timeout.unwrap_or(most).min(most)
    }

    /// Aborts or drops what is left when the service has stopped without a cleanup. Its futures may keep the
    /// lifecycle alive.
    pub(super) fn give_up_work(&self) {
        for (_, worker) in self.work.take_workers() {
            worker.abort();
        }
        for kind in [TaskKind::LameDuck, TaskKind::Cleanup] {
            let jobs = self.work.take(kind);
            shielded(|| drop(jobs));
        }
    }

    /// Records how a task ended, and logs it.
    pub(crate) fn task_ended(&self, key: usize, outcome: TaskOutcome) {
        let before_stop = self.phase() < Phase::Draining;
        if let Some(task) = self.work.ended(key, outcome, before_stop) {
            self.log_event(Event::Task(Box::new(task)));
        }
        if self.policy().leave_early.is_on() {
            // The lame-duck phase does not end early before its last hook has ended. This may be
            // that hook.
            self.notify();
        }
    }

    /// Records that the cleanup is done.
    pub(super) fn cleaned_up(self: &Arc<Self>) {
        self.change(|state, _| {
            let cleanup = state.shutdown.as_mut().and_then(|it| it.cleanup.as_mut());
            if let Some(cleanup) = cleanup {
                cleanup.done = true;
            }
        });
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
